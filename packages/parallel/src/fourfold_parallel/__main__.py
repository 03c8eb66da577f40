"""`fourfold`, or `python -m fourfold_parallel`: everything that is installed, at once."""

import importlib
import sys

from fourfold_parallel import commands
from fourfold_parallel.reproduce import cli
from fourfold_parallel.reproduce.experiment import installed


def main() -> None:
    """Perform the command that the arguments name, or hand it to the package: `fourfold goldfish report`."""
    if len(sys.argv) > 1 and sys.argv[1] in installed() and sys.argv[1] != "parallel":
        package = importlib.import_module(f"fourfold_{sys.argv.pop(1)}.__main__")
        package.main()
        return
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
