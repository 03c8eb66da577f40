"""Looking at a session changes nothing: a save before the first update is no update, on any engine."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.run.engines import DDP, FSDP2, Engine, Session, Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.testing.ranks import run_on_ranks

STEP_0 = "step-00000000"
MODEL = Llama(
    width=16, depth=2, heads=4, kv_heads=2, hidden=32, vocabulary=64, context=32, tied=True
)
ENGINES: dict[str, Engine] = {
    "single": Single(),
    "ddp": DDP(),
    "fsdp2": FSDP2(reshard_after_forward=True),
    "fourfold": Fourfold(data=1, depth=2, row=1, col=1),
}


def trained(engine: Engine, folder: Path, *, saves: str) -> dict[str, Tensor]:
    """The whole weights after two updates; saved before the first, or read back after other ones."""
    model = MODEL.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with engine.open(model, optimizer, precision="fp32", batch=4, microbatch=4) as session:
        before, after = folder / "before", folder / "after"
        if saves != "never":
            save(session, before)
        if saves == "and read":
            step(session, seed=9)
            restore(session, before / STEP_0)
        for seed in (1, 2):
            step(session, seed=seed)
        save(session, after)
    from fourfold_parallel.run.state import load_weights

    plain = MODEL.build(seed=0)
    load_weights(plain, after / STEP_0)
    return {name: weight.detach() for name, weight in plain.named_parameters()}


def step(session: Session, *, seed: int) -> None:
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(seed))
    mine = tokens.chunk(session.ranks)[session.rank]
    with session.microbatch(is_last=True):
        session.backward(session.model(input_ids=mine, use_cache=False).logits.logsumexp(-1).sum())
    session.update(float("inf"))


def saving_is_no_update(engine: str, folder: str) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    with mock.patch.dict(os.environ, launched):
        results = [
            trained(ENGINES[engine], Path(folder) / saves, saves=saves)
            for saves in ("never", "before", "and read")
        ]
    for other in results[1:]:
        for name, weight in results[0].items():
            assert torch.equal(other[name], weight), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_save_before_the_first_update_changes_nothing(tmp_path: Path, engine: str) -> None:
    run_on_ranks(
        1 if engine == "single" else 2, saving_is_no_update, engine=engine, folder=str(tmp_path)
    )


def test_a_first_update_of_adamw_moves_by_the_learning_rate(tmp_path: Path) -> None:
    """Adam's first step is the gradient's sign times the rate (Kingma and Ba 2015), saved before or not."""
    model = torch.nn.Linear(3, 1, bias=False)
    begun = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    with Single().open(model, optimizer, precision="fp32", batch=1, microbatch=1) as session:
        save(session, tmp_path)
        session.backward(session.model(torch.tensor([[1.0, -2.0, 3.0]])).sum())
        session.update(float("inf"))
    moved = model.weight.detach() - begun
    torch.testing.assert_close(moved, torch.tensor([[-0.1, 0.1, -0.1]]), rtol=1e-5, atol=0)
