"""The job script of docs/guide/clusters.md, run with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "clusters.md"


@pytest.mark.parametrize(
    ("status", "num_ranks", "said"),
    [
        (0, None, []),
        (1, None, []),
        (75, None, ["scontrol requeue 7"]),
        (76, 32, ["sbatch --export=ALL --nodes=4 train.sbatch, NGPU=8"]),
        (76, 4, ["sbatch --export=ALL --nodes=1 train.sbatch, NGPU=4"]),
        (76, 24, ["sbatch --export=ALL --nodes=3 train.sbatch, NGPU=8"]),
    ],
)
def test_the_job_does_what_the_status_asks_for(
    status: int, num_ranks: int | None, said: list[str], tmp_path: Path
) -> None:
    def command(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    script = PAGE.read_text().split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/bash\n#SBATCH")
    (tmp_path / "train.sbatch").write_text(script)
    log = tmp_path / "said"
    command("srun", 'SLURM_NODEID=1 "$@"')
    command("scontrol", f'if [ $1 = show ]; then echo one; echo two; else echo "scontrol $*" >> {log}; fi')
    command("sbatch", f'echo "sbatch $*, NGPU=$NGPU" >> {log}')
    folder = tmp_path / "outputs" / "gstack_7b"
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text(json.dumps({"num_ranks": num_ranks}))
    command("run_train.sh", f'echo "$NNODES $NODE_RANK $MASTER_ADDR $NGPU $CONFIG_FILE $*" > ran; exit {status}')
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    environ.pop("NGPU", None)
    environ["SLURM_JOB_NODELIST"] = "node[1-2]"
    done = subprocess.run(["bash", "train.sbatch"], cwd=tmp_path, env=environ, check=False)
    assert done.returncode == status
    ran = (tmp_path / "ran").read_text().strip()
    assert ran == "2 1 one 8 train_configs/gstack_7b.toml --job.dump_folder outputs/gstack_7b"
    assert (log.read_text().splitlines() if log.exists() else []) == said
