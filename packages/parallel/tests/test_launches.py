"""Job files are what Slurm and a shell take."""

import subprocess
from pathlib import Path

from fourfold_parallel.reproduce.launches import Launch

LAUNCH = Launch(
    name="toy-k4",
    title="Toy",
    needs="16 GPUs",
    command="-m fourfold_toy train --arm k4",
    nodes=2,
    gpus=8,
    hours=1.5,
)


def test_a_job_file_asks_for_the_ranks_and_the_time(tmp_path: Path) -> None:
    """A shell parses it, and its ranks are nodes times GPUs."""
    path = tmp_path / "toy.sbatch"
    path.write_text(LAUNCH.sbatch)
    subprocess.run(["bash", "-n", path], check=True)
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in LAUNCH.sbatch.splitlines()
        if line.startswith("#SBATCH")
    )
    assert asked["nodes"] == "2"
    assert asked["ntasks-per-node"] == "8"
    assert asked["time"] == "01:30:00"
    assert LAUNCH.sbatch.endswith("srun python -m fourfold_toy train --arm k4\n")


def test_the_line_to_type_names_a_meeting_point_only_where_nodes_must_meet() -> None:
    assert "--nnodes 2" in LAUNCH.torchrun
    assert '"$FIRST_NODE:29500"' in LAUNCH.torchrun
    alone = Launch(
        name="t", title="T", needs="1 GPU", command="-m fourfold_toy", nodes=1, gpus=1, hours=1
    )
    assert alone.torchrun == "torchrun --standalone --nproc-per-node 1 -m fourfold_toy"
