#!/usr/bin/env bash
# Train with a recipe: checks it, starts one process per device, and reports the outcome as its exit status.
#
#   ./run_train.sh [--section.key value ...]       from any folder; overrides any key of the recipe
#   ./run_train.sh --help                          all keys
#
# Environment (all optional):
#   CONFIG_FILE   the recipe; default train_configs/debug_model.toml. --job.config_file takes precedence
#   NGPU          ranks on this machine; default all CUDA devices, or 1 on a CPU
#   LOG_RANK      local ranks whose output is shown, comma separated; default 0
#   COMM_MODE     fake_backend: a dry run of one step in one process that stands for all NGPU ranks
#   TRAIN_FILE    the module each rank runs; default titan_growth.train
#   MAX_RESTARTS  how often failed ranks are restarted; default 0
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    more than one machine; default one
#   OMP_NUM_THREADS  CPU threads per rank; default its share of the cores
#
# Status: 0 done, 1 failed, 2 bad recipe or environment, 75 saved: run the same command again,
# 76 saved: run it again with another number of ranks (on one machine without a scheduler it does so itself).
set -euo pipefail

script="${BASH_SOURCE[0]}"
while [[ -L "$script" ]]; do
    target="$(readlink "$script")"
    [[ "$target" == /* ]] || target="$(dirname "$script")/$target"
    script="$target"
done
checkout="$(cd "$(dirname "$script")" && pwd -P)"

# conda's base environment is active in every shell, so it was not chosen for this run; .venv was.
conda=""
if [[ "${CONDA_DEFAULT_ENV:-}" != base ]]; then conda="${CONDA_PREFIX:-}"; fi
python=""
for candidate in "${VIRTUAL_ENV:-}" "$conda" "$checkout/.venv"; do
    if [[ -n "$candidate" && -x "$candidate/bin/python" ]]; then
        python="$candidate/bin/python"
        break
    fi
done
if [[ -z "$python" ]] && ! python="$(command -v python3)"; then
    echo "run_train.sh: no python3 on PATH. Install Python 3.10 or newer, then run $checkout/setup.sh train" >&2
    exit 2
fi

probe='
import sys
if sys.version_info < (3, 10):
    sys.exit("old")
from importlib.util import find_spec
sys.exit("package" if find_spec("titan_growth") is None else 0)
'
missing="$("$python" -c "$probe" 2>&1)" || true
case "$missing" in
    "") ;;
    package) export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" ;;
    old)
        echo "run_train.sh: $python is older than Python 3.10. Run $checkout/setup.sh train: it finds a newer one" >&2
        exit 2 ;;
    *)
        echo "run_train.sh: $python does not work (${missing##*$'\n'}). Run $checkout/setup.sh train" >&2
        exit 2 ;;
esac

export TITAN_GROWTH_CHECKOUT="$checkout"
exec "$python" -m titan_growth.launch "$@"
