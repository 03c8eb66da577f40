"""`fourfold-mlperf-hpc`, or `python -m fourfold_mlperf_hpc`: time to quality, taken apart."""

from fourfold_mlperf_hpc import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "mlperf_hpc",
        {
            "decompose": commands.decompose,
            "score": commands.score,
            "roofline": commands.roofline,
            "published": commands.published,
            "mllog": commands.mllog,
            "extract": commands.extract,
            "reproduce": cli.reproduces("mlperf_hpc"),
        },
    )


if __name__ == "__main__":
    main()
