"""`fourfold-continual`, or `python -m fourfold_continual`: continual pretraining, and what is forgotten."""

from fourfold_continual import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "continual",
        {
            "train": commands.train,
            "report": commands.report,
            "reproduce": cli.reproduces("continual"),
        },
    )


if __name__ == "__main__":
    main()
