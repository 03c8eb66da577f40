"""`fourfold-hpc-coder`, or `python -m fourfold_hpc_coder`: judge, make data, tune, generate, reproduce."""

from collections.abc import Sequence

from fourfold_hpc_coder import commands
from fourfold_parallel.reproduce import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Perform the command that the arguments name."""
    cli.main(
        "hpc_coder",
        {
            "score": commands.score,
            "serve": commands.serve,
            "judges": commands.judges,
            "paper-scores": commands.paper_scores,
            "example": commands.example,
            "make-data": commands.make_data,
            "finetune": commands.finetune,
            "generate": commands.generate,
            "reproduce": cli.reproduces("hpc_coder"),
        },
        arguments,
    )


if __name__ == "__main__":
    main()
