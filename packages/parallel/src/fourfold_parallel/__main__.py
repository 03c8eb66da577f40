"""`fourfold`, or `python -m fourfold_parallel`: everything that is installed, at once."""

import importlib
import importlib.metadata
import sys

from fourfold_parallel import commands
from fourfold_parallel.reproduce import cli


def main() -> None:
    """Perform the command that the arguments name, or a package's own: `fourfold gemstones fit`."""
    package = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if package in importlib.metadata.entry_points(group="fourfold.experiments").names:
        sys.argv = [f"{sys.argv[0]} {package}", *sys.argv[2:]]
        importlib.import_module(f"fourfold_{package}.__main__").main()
        return
    cli.main(
        "parallel",
        {
            "reproduce": commands.reproduce,
            "report": commands.report,
            "plan": commands.plan,
            "certify": commands.certify,
            "watch": commands.watch,
            "schedule": commands.schedule,
            "checkpoint": commands.checkpoint,
            "storm": commands.storm,
            "packages": commands.packages,
            "probe": commands.probe,
        },
    )


if __name__ == "__main__":
    main()
