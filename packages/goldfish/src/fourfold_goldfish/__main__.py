"""`python -m fourfold_goldfish`: reproduce the paper; or `audit`, `extract`, `train`, `figure`."""

import sys

from fourfold_goldfish.commands import COMMANDS, run
from fourfold_goldfish.reproduce.experiment import EXPERIMENT
from fourfold_parallel.reproduce.cli import main

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        run(sys.argv[1], sys.argv[2:])
    else:
        main(EXPERIMENT)
