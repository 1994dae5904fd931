"""`python -m titan_growth.launch`: what `run_train.sh` runs."""

import sys

from titan_growth.launch.launcher import main
from titan_growth.tools.packages import require_core

if __name__ == "__main__":
    require_core()
    sys.exit(main())
