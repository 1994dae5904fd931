"""Bad environment variables, and what goes wrong in the middle of training."""

from __future__ import annotations

from tests.recipes.bad_inputs import Case

CASES = [
    Case("NGPU 0", r"NGPU: must be a positive integer, not '0'", environ={"NGPU": "0"}),
    Case("NGPU a word", r"NGPU: must be a positive integer, not 'abc'", environ={"NGPU": "abc"}),
    Case("NGPU negative", r"NGPU: must be a positive integer, not '-1'", environ={"NGPU": "-1"}),
    Case("COMM_MODE unknown", r"COMM_MODE: there is no mode 'nonsense'", environ={"COMM_MODE": "nonsense"}),
    Case("COMM_MODE local_tensor", r"COMM_MODE=local_tensor is not supported", environ={"COMM_MODE": "local_tensor"}),
    Case("LOG_RANK beyond the ranks", r"LOG_RANK: must be local ranks below NGPU=1", environ={"LOG_RANK": "99"}),
    Case("LOG_RANK a word", r"LOG_RANK: must be local ranks", environ={"LOG_RANK": "all"}),
    Case(
        "NODE_RANK beyond the nodes",
        r"NODE_RANK: must be between 0 and NNODES - 1 = 1",
        environ={"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "localhost"},
    ),
    Case(
        "NNODES without an address", r"MASTER_ADDR: is needed with NNODES=2", environ={"NNODES": "2", "NODE_RANK": "0"}
    ),
    Case("MAX_RESTARTS a word", r"MAX_RESTARTS: must be 0 or a positive integer", environ={"MAX_RESTARTS": "many"}),
    Case("TRAIN_FILE a path", r"TRAIN_FILE: 'train\.py' is not the name", environ={"TRAIN_FILE": "train.py"}),
    Case("TRAIN_FILE missing", r"TRAIN_FILE: no module named 'nowhere'", environ={"TRAIN_FILE": "nowhere"}),
    Case(
        "loss not finite",
        r"error: step \d: loss .*gradient norm (nan|inf).*lower optimizer\.lr",
        toml="[optimizer]\nlr = 1e30",
        status=1,
        trains=True,
    ),
    Case(
        "loss not finite on two ranks",
        r"error: step \d: loss .*gradient norm (nan|inf).*lower optimizer\.lr",
        toml="[optimizer]\nlr = 1e30",
        environ={"NGPU": "2"},
        status=1,
        trains=True,
    ),
    Case(
        "loss not finite on a resume",
        r"error: step \d: loss .*gradient norm (nan|inf).*lower optimizer\.lr",
        flags="--optimizer.lr 1e30 --training.steps 20",
        resumes=True,
        status=1,
        trains=True,
        goes_on=True,
    ),
]
