"""`fourfold`, or `python -m fourfold_parallel`: everything that is installed, at once."""

from fourfold_parallel import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "parallel",
        {
            "reproduce": commands.reproduce,
            "report": commands.report,
            "plan": commands.plan,
            "certify": commands.certify,
            "watch": commands.watch,
            "mllog": commands.mllog,
            "checkpoint": commands.checkpoint,
            "storm": commands.storm,
            "packages": commands.packages,
            "probe": commands.probe,
        },
    )


if __name__ == "__main__":
    main()
