"""`python -m fourfold_recurrent_depth`: reproduce the recurrent-depth paper."""

from fourfold_parallel.reproduce.cli import main
from fourfold_recurrent_depth.reproduce.experiment import EXPERIMENT

if __name__ == "__main__":
    main(EXPERIMENT)
