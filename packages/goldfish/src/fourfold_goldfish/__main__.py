"""`python -m fourfold_goldfish`: reproduce the goldfish paper."""

from fourfold_goldfish.experiment import EXPERIMENT
from fourfold_parallel.run.cli import main

main(EXPERIMENT)
