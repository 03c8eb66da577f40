"""`fourfold-gemstones`, or `python -m fourfold_gemstones`: fit runs of yours, or reproduce the paper."""

from fourfold_gemstones import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "gemstones",
        {
            "fit": commands.fit,
            "identify": commands.identify,
            "contest": commands.contest,
            "speedup": commands.speedup,
            "forecast": commands.forecast,
            "leave-future-out": commands.leave_future_out,
            "laws": commands.laws,
            "sample": commands.sample,
            "reproduce": cli.reproduces("gemstones"),
        },
    )


if __name__ == "__main__":
    main()
