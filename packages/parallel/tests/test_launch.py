"""What srun leaves in the environment becomes what torch reads."""

from __future__ import annotations

import os

import pytest

from fourfold_parallel.launch import adopt_slurm, is_main_rank, world_size

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *SRUN):
        monkeypatch.setenv(name, "to be removed at the end of the test")
        monkeypatch.delenv(name)


def test_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    adopt_slurm()
    assert [os.environ[name] for name in NAMES] == ["5", "1", "8", "10.0.0.7", "23456"]
    assert world_size() == 8
    assert not is_main_rank()


def test_torchrun_under_slurm_keeps_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"RANK": "2", "WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    adopt_slurm()
    assert world_size() == 4
    assert "MASTER_ADDR" not in os.environ


def test_one_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    adopt_slurm()
    assert world_size() == 1
    assert is_main_rank()
