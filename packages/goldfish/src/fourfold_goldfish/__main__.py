"""`fourfold-goldfish`, or `python -m fourfold_goldfish`: report, audit, extract, train, figure, reproduce."""

from fourfold_goldfish import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "goldfish",
        {
            "report": commands.report,
            "audit": commands.audit,
            "extract": commands.extract,
            "train": commands.train,
            "figure": commands.figure,
            "reproduce": cli.reproduces("goldfish"),
        },
    )


if __name__ == "__main__":
    main()
