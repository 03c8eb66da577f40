"""`fourfold-goldfish`, or `python -m fourfold_goldfish`: what a model recites, and training without it."""

from fourfold_goldfish import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "goldfish",
        {
            "report": commands.report,
            "audit": commands.audit,
            "mask": commands.mask,
            "extract": commands.extract,
            "train": commands.train,
            "figure": commands.figure,
            "reproduce": cli.reproduces("goldfish"),
        },
    )


if __name__ == "__main__":
    main()
