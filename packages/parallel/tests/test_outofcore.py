"""Training out of core is the plain run to the bit, keeps its budget, and refuses what it cannot do."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from fourfold_parallel.commands import schedule
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.plan.timeline import BudgetError
from fourfold_parallel.planning.outofcore import told as told_again
from fourfold_parallel.run.engines import DDP, Engine, Session, Single
from fourfold_parallel.run.outofcore import Decisions, OutOfCore
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.stores import Disk, Host, StoreError, Throttled
from fourfold_parallel.run.train import train
from fourfold_parallel.testing.ranks import run_on_ranks

VOCABULARY, ROWS, LENGTH = 61, 6, 16
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    intermediate_size=48, vocab_size=VOCABULARY, max_position_embeddings=32, attention_dropout=0.1,
    tie_word_embeddings=True, attn_implementation="eager",
)  # fmt: skip
GPT2 = GPT2Config(  # dropout of 0.1 in three places, tied, views of one projection
    n_embd=32, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=32, use_cache=False
)
MIXTURES = ("KKKK", "SSSS", "RRRR", "SRSK", "KSRS")


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@contextmanager
def opened(engine: Engine, config: Any = LLAMA, *, precision: Any = "fp32") -> Iterator[Session]:
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with engine.open(model, optimizer, precision=precision, batch=ROWS, microbatch=ROWS) as session:
        yield session


def backward_of(session: Session, step: int, microbatches: int = 1) -> list[Tensor]:
    """Losses of a step's microbatches, as the training loop computes them."""
    tokens = torch.randint(
        0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step)
    )
    torch.manual_seed(100 + step)  # dropout
    losses = []
    for index, rows in enumerate(tokens.chunk(session.ranks)[session.rank].chunk(microbatches)):
        with session.microbatch(is_last=index == microbatches - 1):
            loss = session.model(input_ids=rows, labels=rows).loss
            session.backward(loss / microbatches)
        losses.append(loss.detach())
    return losses


def told(
    engine: Engine, config: Any, precision: str, microbatches: int, steps: int
) -> list[Tensor]:
    """Every loss, the gradients of the first two steps, and the weights after all steps."""
    values: list[Tensor] = []
    with opened(engine, config, precision=precision) as session:
        for step in range(steps):
            values += backward_of(session, step, microbatches)
            if step < 2:
                grads = [local(p.grad) for p in session.model.parameters() if p.grad is not None]
                values += [gradient.clone() for gradient in grads]
            session.update(1.0)
        values += [local(p.detach()).clone() for p in session.model.parameters()]
    return values


def microbatch_of(session: Session, between: Callable[[], None] = lambda: None) -> None:
    """Forward, something between, and backward."""
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    with session.microbatch(is_last=True):
        loss = session.model(input_ids=rows, labels=rows).loss
        between()
        session.backward(loss)


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("precision", "microbatches"), [("fp32", 1), ("fp32", 3), ("bf16", 3)])
def test_losses_gradients_and_steps_are_the_plain_runs(
    config: Any, precision: str, microbatches: int
) -> None:
    """To the bit, for whatever is kept, swapped or recomputed, with dropout and a tied head."""
    plain = told(Single(), config, precision, microbatches, 2)
    for letters in MIXTURES:
        engine = OutOfCore(inner=Single(), budget=Decisions(letters=letters))
        assert same(plain, told(engine, config, precision, microbatches, 2)), letters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_of_adamw_are_the_plain_runs(precision: str) -> None:
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SRSK"), store=Disk())
    assert same(told(Single(), GPT2, precision, 1, 20), told(engine, GPT2, precision, 1, 20))


ON_TWO_RANKS: dict[str, Engine] = {
    "ddp": DDP(),
    "row": Fourfold(row=2),
    "depth": Fourfold(depth=2),
    "depth, kept": Fourfold(depth=2, keeps_tiles=True),
    "col": Fourfold(col=2),
    "data": Fourfold(data=2, shards_optimizer=True),
}


def law_of_the_plain_run(name: str, precision: str, microbatches: int, steps: int) -> None:
    engine = ON_TWO_RANKS[name]
    plain = told(engine, LLAMA, precision, microbatches, steps)
    for letters in ("SRSK", "RSSR"):
        around = OutOfCore(inner=engine, budget=Decisions(letters=letters))
        assert same(plain, told(around, LLAMA, precision, microbatches, steps)), letters


OFTEN = {"ddp", "row", "depth"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in ON_TWO_RANKS]
)
def test_two_ranks_compute_what_the_inner_engine_does(name: str) -> None:
    """With all overlaps, to the bit; the grid's rows and tiles in bfloat16 too."""
    law = {"name": name, "microbatches": 3, "steps": 2}
    for precision in ("fp32", "bf16") if name in {"depth", "depth, kept"} else ("fp32",):
        run_on_ranks(2, law_of_the_plain_run, precision=precision, **law)


def frozen(letters: str, layers: int) -> list[Tensor]:
    """Losses and gradients where the embedding and the first layers are not trained."""
    engine = OutOfCore(inner=Single(), budget=Decisions(letters=letters)) if letters else Single()
    with opened(engine, GPT2) as session:
        trunk: Any = session.model.get_submodule("transformer")
        for part in (trunk.wte, trunk.wpe, *trunk.h[:layers]):
            part.requires_grad_(False)
        losses = backward_of(session, 0)
        return losses + [p.grad for p in session.model.parameters() if p.grad is not None]


def test_layers_that_are_not_trained_are_left_as_they_are() -> None:
    """Nothing is saved in them, and nothing asks for them in backward."""
    for layers in (0, 2):
        plain = frozen("", layers)
        for letters in MIXTURES:
            assert same(plain, frozen(letters, layers)), (letters, layers)


def law_of_one_choice(share: float) -> str:
    """Ranks whose measurements differ decide alike, and within the budget of each."""
    with opened(OutOfCore(inner=DDP(), budget=10**9)) as session:
        backward_of(session, 0)
        [(stack, *_)] = session.planner.plans.values()
    budget = int(stack.smallest_budget + share * (stack.largest_budget - stack.smallest_budget))
    store = Throttled(store=Disk(), bytes_per_s=1e8)
    with opened(OutOfCore(inner=DDP(), budget=budget, store=store)) as session:
        backward_of(session, 0)
        events = reads_and_writes(session)
        session.optimizer.zero_grad()
        backward_of(session, 0)
        assert max(total for _, total in events) <= budget
        [choice] = session.planner.choices
        return f"{choice.decisions} {choice.timeline.seconds}"


def test_ranks_choose_alike() -> None:
    mine, other = run_on_ranks(2, law_of_one_choice, share=0.4)
    assert mine == other


# The budget


def reads_and_writes(session: Any) -> list[tuple[str, int]]:
    session.planner.flow.events = events = []
    return events


def test_the_budget_is_kept_at_every_event_and_used() -> None:
    """Ten budgets, from the smallest that does to everything kept."""
    with opened(OutOfCore(inner=Single(), budget=10**9)) as session:
        backward_of(session, 0)
        [choice] = session.planner.choices
        [(stack, *_)] = session.planner.plans.values()
    assert choice.decisions == "KKKK"
    least, most = stack.smallest_budget, stack.largest_budget
    plain = told(Single(), LLAMA, "fp32", 1, 1)
    chosen = set()
    for step in range(10):
        budget = least + (most - least) * step // 9
        with opened(OutOfCore(inner=Single(), budget=budget)) as session:
            backward_of(session, 0)  # measures, plans
            events = reads_and_writes(session)
            session.optimizer.zero_grad()
            losses = backward_of(session, 0)
            assert torch.equal(losses[0], plain[0])
            [choice] = session.planner.choices
            spare = max(block.spare_bytes for block in stack.blocks)
            most_held = max(total for _, total in events)
            assert most_held + spare <= budget
            assert most_held <= choice.timeline.peak_bytes <= budget
            assert events[-1][1] == 0
            chosen.add(choice.decisions)
    assert len(chosen) > 2


def test_a_budget_that_nothing_keeps_is_refused_with_the_smallest_that_would() -> None:
    """Before the first forward; the budget that the message names is taken."""
    with opened(OutOfCore(inner=Single(), budget=1000)) as session:
        with pytest.raises(BudgetError, match=r"block 0 alone needs [\d,]+ to run") as refusal:
            backward_of(session, 0)
        assert all(p.grad is None for p in session.model.parameters())
    words = str(refusal.value).split("use ")[1]
    least = int(words.split(" or more")[0].replace(",", ""))
    with pytest.raises(BudgetError), opened(OutOfCore(inner=Single(), budget=least - 1)) as session:
        backward_of(session, 0)
    with opened(OutOfCore(inner=Single(), budget=least)) as session:
        assert torch.equal(backward_of(session, 0)[0], told(Single(), LLAMA, "fp32", 1, 1)[0])


# Traps


def swapped_layers(session: Any) -> list[Any]:
    return [*session.planner.flow.now.blocks.values()]


def test_a_swapped_blocks_memory_is_freed_and_nothing_holds_it() -> None:
    """The graph keeps the hooks: what they captured would live until backward."""
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SSSS"))
    with opened(engine) as session:
        backward_of(session, 0)
        rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
        before = {id(held) for held in gc.get_objects()}
        with session.microbatch(is_last=True):
            loss = session.model(input_ids=rows, labels=rows).loss
            blocks = swapped_layers(session)
            for block in blocks:
                block.out.result()
            assert [block.nbytes() for block in blocks] == [0, 0, 0, 0]
            assert not any(block.cells or block.watched for block in blocks)
            size = ROWS * LENGTH * LLAMA.intermediate_size * 4  # of what the MLP saves four times
            fresh = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before]
            assert [t.shape for t in fresh if t.untyped_storage().nbytes() == size] == []
            session.backward(loss)
        session.update(1.0)


def test_an_address_that_is_used_again_is_another_storage() -> None:
    """A layer frees and allocates as it goes: by address some storages would be taken for one."""
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SSSS"))
    with opened(engine) as session, session.microbatch(is_last=True):
        rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
        loss = session.model(input_ids=rows, labels=rows).loss
        counts = [len(block.members) for block in swapped_layers(session)]
        session.backward(loss)
    assert len(set(counts)) == 1
    # A Llama layer: input, two norms, q, k, v, attention's, gate, up, their product; many saved twice, as
    # views.
    assert 15 <= counts[0] <= 25


def test_a_tensor_changed_in_place_is_refused() -> None:
    """As torch refuses it, and by the block's number."""
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SSSS"))
    with opened(engine) as session:
        mlp: Any = session.model.get_submodule("model.layers.2.mlp")
        plain = mlp.forward

        def spoiling(x: Tensor) -> Tensor:
            y = plain(x)
            x.mul_(2)  # `gate` and `up` have saved it
            return y

        mlp.forward = spoiling
        with pytest.raises(RuntimeError, match=r"block 2, was changed in place"):
            microbatch_of(session)


def test_a_graph_that_is_kept_is_read_twice() -> None:
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))

    def twice(engine: Engine) -> list[Tensor]:
        with opened(engine) as session:
            torch.manual_seed(0)
            with session.microbatch(is_last=True):
                loss = session.model(input_ids=rows, labels=rows).loss
                loss.backward(retain_graph=True)
                loss.backward()
            return [p.grad.clone() for p in session.model.parameters() if p.grad is not None]

    plain = twice(Single())
    for letters in MIXTURES:
        assert same(plain, twice(OutOfCore(inner=Single(), budget=Decisions(letters=letters)))), (
            letters
        )


def test_an_exception_between_forward_and_backward_leaves_the_store_empty() -> None:
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SSSS"), store=Disk())

    def interrupt() -> None:
        raise KeyboardInterrupt

    with opened(engine) as session:
        backward_of(session, 0)
        shelf = session.planner.flow.ways.shelf
        end = shelf._end
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                microbatch_of(session, interrupt)
        assert shelf._end == end  # its places are used again
        session.optimizer.zero_grad()
        assert torch.equal(backward_of(session, 0)[0], told(Single(), LLAMA, "fp32", 1, 1)[0])


def test_other_shapes_are_planned_anew_and_evaluation_is_left_alone() -> None:
    with opened(OutOfCore(inner=Single(), budget=10**9)) as session:
        backward_of(session, 0)
        backward_of(session, 1)
        assert len(session.planner.plans) == 1
        rows = torch.randint(0, VOCABULARY, (2, LENGTH))
        with session.microbatch(is_last=True):
            session.backward(session.model(input_ids=rows, labels=rows).loss)
        assert len(session.planner.plans) == 2
        session.model.eval()
        with torch.no_grad(), session.microbatch(is_last=True):
            session.model(input_ids=rows)
        session.model(input_ids=rows)  # outside of a microbatch
        assert len(session.planner.plans) == 2


def test_two_forwards_before_a_backward_are_refused() -> None:
    engine = OutOfCore(inner=Single(), budget=10**9)
    rows = torch.randint(0, VOCABULARY, (2, LENGTH))
    with opened(engine) as session, session.microbatch(is_last=True):
        session.model(input_ids=rows)
        with pytest.raises(RuntimeError, match="call the model once in a microbatch"):
            session.model(input_ids=rows)


def test_an_inner_engine_that_recomputes_is_refused() -> None:
    model = build(LLAMA)
    model.activation_checkpointing_enable({"use_reentrant": False})
    engine = OutOfCore(inner=Single(), budget=10**9)
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(ValueError, match="recomputes its layers already"),
        engine.open(model, optimizer, precision="fp32", batch=2, microbatch=2),
    ):
        pass


# Stores


def test_a_flipped_bit_is_named_and_no_gradient_is_computed_from_it(tmp_path: Path) -> None:
    engine = OutOfCore(
        inner=Single(), budget=Decisions(letters="SSSS"), store=Disk(folder=str(tmp_path))
    )
    with opened(engine) as session:
        flow = session.planner.flow

        def flip() -> None:
            flow.now.blocks[1].out.result()
            at, file = flow.now.blocks[1].kept.at[3], flow.ways.shelf._file
            [byte] = os.pread(file, 1, at)
            os.pwrite(file, bytes([byte ^ 16]), at)

        said = r"block 1 could not be read back: .*fourfold-.* holds other bytes"
        with pytest.raises(StoreError, match=said):
            microbatch_of(session, flip)
        layers = session.model.get_submodule("model.layers")
        assert all(p.grad is None for layer in [*layers][:2] for p in layer.parameters())
        session.optimizer.zero_grad()
        assert torch.equal(backward_of(session, 0)[0], told(Single(), LLAMA, "fp32", 1, 1)[0])
    assert not [*tmp_path.iterdir()]


def test_a_file_cut_short_and_a_full_disk_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SSKK"), store=Disk())
    with opened(engine) as session:
        flow = session.planner.flow

        def cut() -> None:
            flow.now.blocks[1].out.result()
            os.ftruncate(flow.ways.shelf._file, 100)

        said = r"block 1 could not be read back: .* bytes at [\d,]+: it was cut"
        with pytest.raises(StoreError, match=said):
            microbatch_of(session, cut)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(engine) as session:
        backward_of(session, 0)
        session.planner.flow.ways.shelf._free.clear()
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match=r"block 0 could not be written: .*No space left"):
            backward_of(session, 0)


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal, torch\n"
        "from fourfold_parallel.run.stores import Disk\n"
        "shelf = Disk(folder=sys.argv[1]).open(torch.device('cpu'))\n"
        "shelf.write([torch.ones(10000, dtype=torch.uint8)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_takes_no_file_is_refused() -> None:
    with (
        pytest.raises(StoreError, match="takes no file"),
        opened(OutOfCore(inner=Single(), budget=10**9, store=Disk(folder="/nowhere/at/all"))),
    ):
        pass


@pytest.mark.parametrize(
    "store", [Host(), Disk(checks=False), Throttled(store=Host(), bytes_per_s=1e8)]
)
def test_every_store_gives_back_what_it_took(store: Any) -> None:
    shelf = store.open(torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    taken = []
    for sizes in ((1, 5000, 8192), (5000,), (1, 1)):
        pieces = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=random) for n in sizes]
        taken.append((pieces, shelf.write(pieces)))
    shelf.drop(taken.pop(0)[1])
    pieces = [torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=random)]
    taken.append((pieces, shelf.write(pieces)))
    for pieces, kept in reversed(taken):
        back = [torch.empty_like(piece) for piece in pieces]
        shelf.read(kept, back)
        assert all(map(torch.equal, pieces, back))
    shelf.close()


# The loop


def test_a_recipe_trains_unchanged_and_its_record_says_what_was_planned_and_waited_for(
    tmp_path: Path, small_run: Run
) -> None:
    """Losses, norms and weights of the recipe, resumed under another engine on the way."""
    plain = train(
        small_run, record=tmp_path / "p.jsonl", checkpoints=tmp_path / "p", progress=silent
    )
    store = Throttled(store=Disk(), bytes_per_s=1e7)
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="RS"), store=store)
    run = replace(small_run, engine=engine, microbatch=4)
    assert from_json(to_json(run)) == run
    place = {"record": tmp_path / "o.jsonl", "checkpoints": tmp_path / "o", "progress": silent}
    small = train(
        replace(small_run, microbatch=4),
        record=tmp_path / "m.jsonl",
        checkpoints=tmp_path / "m",
        progress=silent,
    )
    last = train(run, **place)
    for name in ("model.safetensors",):
        assert (last.path / name).read_bytes() == (small.path / name).read_bytes()
    assert plain.step == last.step
    record = read_record(tmp_path / "o.jsonl")
    [plan] = record.of("plan")
    assert plan.values["decisions"] == "RS"
    for step in record.of("step"):
        assert step.number("swapped_bytes") > 0
        assert step.number("recomputed_s") > 0
        assert step.number("store_waited_s") > 0
        assert step.number("held_bytes") > 0
    assert "held_bytes" not in read_record(tmp_path / "p.jsonl").of("step")[0].values


def test_a_record_is_drawn_as_it_was_planned(tmp_path: Path, small_run: Run) -> None:
    """`fourfold schedule`: the drawn timeline is the predicted one."""
    engine = OutOfCore(inner=Single(), budget=Decisions(letters="SR"))
    run = replace(small_run, engine=engine, horizon=Steps(count=1))
    record = tmp_path / "r.jsonl"
    train(run, record=record, checkpoints=tmp_path / "c", progress=silent)
    [plan] = read_record(record).of("plan")
    assert told_again(plan).seconds == pytest.approx(plan.number("predicted_s"))
    schedule(record)
    assert (tmp_path / "r.svg").read_text().count("</svg>") == 1
    plain, kept = replace(small_run, horizon=Steps(count=1)), tmp_path / "plain"
    train(plain, record=kept / "r.jsonl", checkpoints=kept, progress=silent)
    with pytest.raises(ValueError, match="holds no plan"):
        schedule(kept / "r.jsonl")
