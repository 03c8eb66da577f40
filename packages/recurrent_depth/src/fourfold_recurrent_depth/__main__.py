"""`python -m fourfold_recurrent_depth`: reproduce the paper, or train a model on your own text."""

from fourfold_parallel.reproduce import cli
from fourfold_recurrent_depth import commands


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "recurrent_depth",
        {"reproduce": cli.reproduces("recurrent_depth"), "train": commands.train},
    )


if __name__ == "__main__":
    main()
