"""`fourfold-outliers`, or `python -m fourfold_outliers`: outlier dimensions, and token frequency."""

from fourfold_outliers import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main("outliers", {"report": commands.report, "reproduce": cli.reproduces("outliers")})


if __name__ == "__main__":
    main()
