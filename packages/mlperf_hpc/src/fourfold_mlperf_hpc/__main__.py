"""`fourfold-mlperf-hpc`, or `python -m fourfold_mlperf_hpc`: time to quality, taken apart."""

from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main("mlperf_hpc", {"reproduce": cli.reproduces("mlperf_hpc")})


if __name__ == "__main__":
    main()
