"""Launches of a paper's own runs: a torchrun line, and a file for Slurm."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One run at the paper's scale."""

    name: str
    """Lower case, for the file: `tinyllama-k4`."""
    title: str
    needs: str
    """Hardware, weights and data."""
    command: str
    """What every rank runs, from `python` on: `-m fourfold_goldfish train tinyllama ...`."""
    nodes: int
    gpus: int
    """GPUs of a node, one rank each."""
    hours: float
    """Time limit to ask the scheduler for; a run that meets it goes on when it is submitted again."""

    @property
    def torchrun(self) -> str:
        """The line to type: on the one node, or on every node with the first one's name in `FIRST_NODE`."""
        meeting = "--standalone"
        if self.nodes > 1:
            meeting = (
                f'--nnodes {self.nodes} --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:29500" '
                f"--rdzv-id {self.name}"
            )
        return f"torchrun {meeting} --nproc-per-node {self.gpus} {self.command}"

    @property
    def sbatch(self) -> str:
        """A job file for Slurm: `srun` starts the ranks, which find one another by Slurm's variables."""
        minutes = round(60 * self.hours)
        return (
            "#!/bin/bash\n"
            f"# {self.title}\n"
            f"# Needs: {self.needs}\n"
            f"#SBATCH --job-name={self.name}\n"
            f"#SBATCH --nodes={self.nodes}\n"
            f"#SBATCH --ntasks-per-node={self.gpus}\n"
            "#SBATCH --gpus-per-task=1\n"
            f"#SBATCH --time={minutes // 60:02}:{minutes % 60:02}:00\n"
            "#SBATCH --output=%x-%j.log\n"
            "# Add your site's own lines: account, partition, modules.\n"
            "set -euo pipefail\n"
            f"srun python {self.command}\n"
        )
