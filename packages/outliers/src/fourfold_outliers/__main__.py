"""`fourfold-outliers`, or `python -m fourfold_outliers`: outlier dimensions of a transformer, and token frequency."""

from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main("outliers", {"reproduce": cli.reproduces("outliers")})


if __name__ == "__main__":
    main()
