"""`python -m titan_growth.launch`: what `run_train.sh` becomes."""

import sys

from titan_growth.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
