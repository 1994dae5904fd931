"""One run on this rank, from its first or next step to its end, over roll-backs.

Folder, data, checkpoints and heartbeat outlive a roll-back; model, optimizer and observers are rebuilt.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.rewind import RollBackError, remember_load_step
from titan_growth.config.loader import to_json, to_toml
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.exit_report import DONE, FAILED, REQUEUE, RESIZE, Outcome
from titan_growth.liveness.heartbeat import Heartbeat
from titan_growth.liveness.stop_signal import StopSignal
from titan_growth.metrics.observers import Observers
from titan_growth.run.data import RunData
from titan_growth.run.start import RunStart, require_same_data
from titan_growth.run.state import RunState
from titan_growth.tools.collectives import on_rank0, set_timeout, timeout_in_force
from titan_growth.tools.device import Device
from titan_growth.tools.errors import TitanGrowthError, TrainingError
from titan_growth.tools.logs import logger
from titan_growth.tools.run_folder import RunFolder
from titan_growth.trainer import Trainer

LAST_SAVE_SECONDS = 30.0
"""How long a failing run waits for a background save."""


@dataclass
class Session:
    """What outlives a roll-back to an earlier checkpoint."""

    folder: RunFolder
    device: Device
    run_data: RunData
    checkpointer: CheckpointManager
    stop: StopSignal
    heartbeat: Heartbeat | None = None

    def last_checkpoint(self) -> str:
        """What a failed run can resume from, for its error message."""
        saved = self.checkpointer.saver.last_saved
        if saved is None:
            return "There is no checkpoint yet; the same command starts over"
        return f"The last checkpoint is {saved.path.name}; run the same command again"

    def run(self, start: RunStart) -> Outcome:
        """Trains to the end, and restarts from an earlier checkpoint whenever the run rolls back."""
        while True:
            try:
                return self._train(start)
            except RollBackError as back:
                if dist.get_world_size() > 1:
                    set_timeout(start.recipe.comm.init_timeout_seconds)
                checkpoint = self.checkpointer.roll_back(back)
            gc.collect()  # the error kept the model alive, and the next one is about to be built
            self.device.free_memory()
            start = start.back_to(checkpoint)

    def _train(self, start: RunStart) -> Outcome:
        with self.trainer(start) as trainer:
            completed = _fit(trainer)
            for line in trainer.observers.summary(
                trainer.progress, self.checkpointer.saver.last_saved, completed=completed
            ):
                logger.info("%s", line)
        return Outcome(DONE) if completed else self._stopped(trainer)

    @contextlib.contextmanager
    def trainer(self, start: RunStart) -> Iterator[Trainer]:
        """A trainer ready to fit. What it holds is closed on exit, whatever happens."""
        self._prepare(start)
        plan = start.plan
        state = RunState(plan, self.run_data, self.device)
        observers = Observers(plan.recipe, self.folder, self.device, start.checkpoint, self.heartbeat)
        try:
            for line in (plan.recipe.job.description, *plan.describe(self.device.type), observers.peak_source):
                logger.info("%s", line)
            with observers.profiler:  # which writes a last snapshot when CUDA memory runs out
                state.load(start.checkpoint)
                observers.recorder.seconds_before = state.seconds
                if start.checkpoint is None:
                    self.run_data.log_accounts()
                    observers.record_data(state.progress, self.run_data.account, self.run_data.validation_account)
                yield Trainer(state, checkpointer=self.checkpointer, observers=observers, stop=self.stop)
            self.checkpointer.saver.close()
        except TitanGrowthError:
            self.checkpointer.saver.close()  # all ranks are alive, so a background save can finish
            raise
        except BaseException:
            # Another rank may be gone. If only this rank's part of a background save is missing, let it finish.
            self.checkpointer.saver.close(min(LAST_SAVE_SECONDS, timeout_in_force()))
            raise
        finally:
            observers.close()
            state.close()

    def _prepare(self, start: RunStart) -> None:
        """Prepares the run folder: sets later checkpoints aside and writes ledger and recipe."""
        start.log()
        require_same_data(start.checkpoint, self.run_data)
        if start.recipe.comm.mode != "default":
            return  # a dry run leaves the folder as it is
        section = start.recipe.checkpoint
        if start.fresh or (section.enable and not section.load_only):
            self.checkpointer.begin(start.checkpoint.step if start.checkpoint is not None else None)
            if start.checkpoint is not None:
                on_rank0(lambda: remember_load_step(start.load_step, self.checkpointer.root))
        on_rank0(lambda: _save_recipe(start.plan.recipe, self.folder))

    def _stopped(self, trainer: Trainer) -> Outcome:
        """The outcome of a run that ended before its last step."""
        step, saved = trainer.progress.step, self.checkpointer.saver.last_saved
        if wanted := trainer.wanted_ranks:
            return Outcome(RESIZE, f"saved at step {step}; the growth wants {wanted} ranks", wanted)
        if saved is not None and saved.step == step:
            return Outcome(
                REQUEUE, f"stopped at step {step} and saved{self.stop.reason}; run the same command again to continue"
            )
        load_only = trainer.plan.recipe.checkpoint.load_only
        key = "checkpoint.load_only is true" if load_only else "checkpoint.enable is false"
        return Outcome(FAILED, f"stopped at step {step} without saving: {key}")


def _fit(trainer: Trainer) -> bool:
    """The run has started: any error from here on is a failure (1), no longer a bad recipe or folder (2)."""
    try:
        return trainer.fit()
    except TitanGrowthError as error:
        if error.exit_status == FAILED:
            raise
        raise TrainingError(str(error)) from error


def _save_recipe(recipe: Recipe, folder: RunFolder) -> None:
    folder.write_text("recipe.toml", to_toml(recipe))
    if recipe.job.save_config_file is not None:
        folder.write_text(recipe.job.save_config_file, to_json(recipe))
    if recipe.job.print_config:
        print(to_toml(recipe))
