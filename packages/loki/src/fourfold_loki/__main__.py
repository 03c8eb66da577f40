"""`python -m fourfold_loki`: reproduce the paper."""

from fourfold_loki.experiment import EXPERIMENT
from fourfold_parallel.run.cli import main

main(EXPERIMENT)
