"""`fourfold-gemstones`, or `python -m fourfold_gemstones`: fit runs of yours, or reproduce the paper."""

from fourfold_gemstones import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "gemstones",
        {
            "fit": commands.fit,
            "sample": commands.sample,
            "reproduce": cli.reproduces("gemstones"),
        },
    )


if __name__ == "__main__":
    main()
