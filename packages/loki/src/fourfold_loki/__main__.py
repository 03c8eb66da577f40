"""`fourfold-loki`, or `python -m fourfold_loki`: reproduce the paper, or try Loki on a model of yours."""

from fourfold_loki import commands
from fourfold_parallel.reproduce import cli

COMMANDS = {
    "reproduce": cli.reproduces("loki"),
    "calibrate": commands.calibrate,
    "rank": commands.rank,
    "doctor": commands.doctor,
    "ppl": commands.ppl,
    "passkey": commands.passkey,
    "tasks": commands.tasks,
    "bench": commands.bench,
    "table": commands.table,
    "autotune": commands.autotune,
}


def main() -> None:
    """Perform the command that the arguments name."""
    cli.main("loki", COMMANDS)


if __name__ == "__main__":
    main()
