"""Outliers while a model trains: what is told is what a pass over the same rows measures, on a grid too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold_outliers.geometry import Sums
from fourfold_outliers.reproduce.language import Bigrams
from fourfold_outliers.stream import Documents, looking, measure, width_of
from fourfold_outliers.telemetry import Outliers, described, gathered, over
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run.engines import Engine, Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train, trained_model
from fourfold_parallel.testing.ranks import run_on_ranks


def small_run(engine: Engine) -> Run:
    return Run(
        name="small",
        model=Llama(
            width=32, depth=2, heads=4, kv_heads=4, hidden=64, vocabulary=64, context=16, tied=True
        ),
        data=Bigrams(
            law="zipf", vocabulary=64, entropy_nats=2.0, rows=32, validation_rows=16, seed=0
        ),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Constant(warmup_steps=1),
        horizon=Steps(count=4),
        batch=8,
        microbatch=4,
        sequence=15,
        max_grad_norm=1.0,
        precision="fp32",
        engine=engine,
        seed=0,
        validate_every=2,
        checkpoint_every=4,
    )


def recorded(run: Run, folder: Path, *, watched: bool = True) -> Record:
    last = train(
        run, record=folder / "r.jsonl", checkpoints=folder / "checkpoints", progress=silent,
        observers=(Outliers(),) if watched else (),
    )  # fmt: skip
    del last
    return read_record(folder / "r.jsonl")


def test_an_event_is_what_a_pass_over_the_held_out_rows_measures(tmp_path: Path) -> None:
    """After each validation; and the run is the one that nobody watches."""
    run = small_run(Single())
    record = recorded(run, tmp_path / "watched")
    events = record.of("outliers")
    assert [event.number("step") for event in events] == [2, 4]
    plain = recorded(run, tmp_path / "alone", watched=False)
    assert not plain.of("outliers")
    for kind, key in (("step", "loss_nats"), ("validation", "validation_loss_nats")):
        ours, theirs = ([e.number(key) for e in r.of(kind)] for r in (record, plain))
        assert ours == theirs
    from fourfold_parallel.run import checkpoint

    last = checkpoint.latest(tmp_path / "watched" / "checkpoints", run=run)
    assert last is not None
    rows = run.data.validation(sequence=15).batch(0, batch=16).tokens[:, :-1]
    sums = measure(trained_model(run, last), Documents(ids=rows, of=(0,) * 16)).sums
    expected = described(sums)
    for key in ("tokens", "outliers_by_layer"):
        assert events[-1].values[key] == expected[key]
    for key in ("cosine_by_layer", "top_share_by_layer"):
        assert events[-1].numbers(key) == pytest.approx(expected[key], abs=2e-5)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 20] = 3.0
    return model


def cutting_the_stream_changes_no_sum(data: int, col: int) -> None:
    """Each rank sees its coordinates and its rows; gathered, they are one process's sums."""
    model = small_llama()
    ids = torch.randint(2, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    whole = measure(model, Documents(ids=ids, of=(0, 0, 0, 0))).sums
    mesh = Mesh(data=data, col=col)
    split = parallelize(model, mesh).model
    rows = ids[mesh.batch_rank() * 4 // data : (mesh.batch_rank() + 1) * 4 // data]
    start, stop = mesh.col.bounds(width_of(split))
    piece = Sums.empty(1, 3, stop - start)

    def look(layer: int, states: torch.Tensor) -> None:
        piece.add_(0, layer, states[:, 1:].flatten(0, 1), over_width=over(mesh.col))

    with torch.no_grad(), looking(split, look):
        split(input_ids=rows, use_cache=False)
    ours = gathered(piece, mesh, width_of(split))
    for name in ("tokens", "total", "square", "beyond", "unit", "unit_square", "norm"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(whole, name), atol=1e-6, rtol=1e-6, msg=name
        )
    assert float(whole.shares()[0, 0, 20]) == 1.0


@pytest.mark.parametrize(("data", "col"), [(1, 2), (2, 1)])
def test_a_cut_stream_is_measured_as_one_process_does(data: int, col: int) -> None:
    run_on_ranks(2, cutting_the_stream_changes_no_sum, data=data, col=col)


def a_watched_grid_tells_what_one_process_tells(folder: str) -> None:
    run = small_run(Fourfold(col=2))
    recorded(run, Path(folder))


def a_grid_that_cuts_tokens_is_refused(folder: str) -> None:
    with pytest.raises(
        ValueError, match="cuts_tokens=True leaves a rank of row a part of the tokens"
    ):
        recorded(replace(small_run(Fourfold(row=2, cuts_tokens=True)), sequence=14), Path(folder))


def test_cut_tokens_are_refused(tmp_path: Path) -> None:
    run_on_ranks(2, a_grid_that_cuts_tokens_is_refused, folder=str(tmp_path / "grid"))


def test_a_run_on_the_grid_tells_what_one_process_tells(tmp_path: Path) -> None:
    run_on_ranks(2, a_watched_grid_tells_what_one_process_tells, folder=str(tmp_path / "grid"))
    alone = recorded(replace(small_run(Single())), tmp_path / "alone").of("outliers")
    grid = read_record(tmp_path / "grid" / "r.jsonl").of("outliers")
    assert len(alone) == len(grid) == 2
    for ours, theirs in zip(grid, alone, strict=True):
        assert ours.values["tokens"] == theirs.values["tokens"]
        assert ours.values["outliers_by_layer"] == theirs.values["outliers_by_layer"]
        assert ours.numbers("cosine_by_layer") == pytest.approx(
            theirs.numbers("cosine_by_layer"), abs=1e-4
        )
