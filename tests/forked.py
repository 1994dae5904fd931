"""Entry points in a process of their own, forked from this one: it has imported torch, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Forked:
    """A function in a forked process, with the interface of `subprocess.Popen` for one whose output is read at the end.

    folder: its working directory.
    environ: its whole environment.
    paths: put in front of `sys.path`, as PYTHONPATH would.
    """

    def __init__(
        self, main: Callable[[], int], *, folder: Path, environ: dict[str, str], paths: tuple[Path, ...] = ()
    ) -> None:
        self.returncode: int | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _live(main, self._output.fileno(), folder, environ, paths)

    def send_signal(self, number: int) -> None:
        """To a process that has not been waited for."""
        assert self.returncode is None, "it has ended"
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """(standard output and error, as they came, nothing) of the ended process.

        Raises:
            AssertionError: with the output so far, when it has not ended after `timeout` seconds. It is killed then.
        """
        deadline = time.monotonic() + timeout
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it has not ended after {timeout} s:\n{self._read()}")
            time.sleep(0.005)
        self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self._read(), None

    def _read(self) -> str:
        self._output.seek(0)
        return self._output.read().decode()


def ended(main: Callable[[], int], *, timeout: float = 250, **settings: Any) -> tuple[int, str]:
    """(status, output) of a function in a forked process, settings as of `Forked`."""
    process = Forked(main, **settings)
    output, _ = process.communicate(timeout)
    assert process.returncode is not None
    return process.returncode, output


def _live(main: Callable[[], int], output: int, folder: Path, environ: dict[str, str], paths: tuple[Path, ...]) -> None:
    """The life of the child. It leaves behind what pytest has set up and ends without running pytest's clean-up."""
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:0] = [str(path) for path in paths]
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
