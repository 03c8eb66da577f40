"""A run on the grid is the serial run: optimizer steps, clipping, checkpoints, files."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from fourfold_parallel.grid.engine import Fourfold, GridSession
from fourfold_parallel.grid.gradients import gradient_norm, local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.run.train import seed_dropout
from fourfold_parallel.testing.grids import Sizes, close, in_float64, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks

STEP = 1e-8
"""Parameters after five steps in float64. AdamW divides small gradients by their own size."""
ROWS, VOCABULARY = 8, 61
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=36, vocab_size=VOCABULARY, max_position_embeddings=32, use_cache=False,
)  # fmt: skip
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32, use_cache=False,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.float64).train()


def optimizer_for(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if kind == "adagrad":  # has state before its first step
        return torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.5)
    return torch.optim.AdamW(groups, lr=3e-3, eps=1e-6)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, 9), generator=random)
    targets = tokens[:, 1:].masked_fill(torch.rand(ROWS, 8, generator=random) < 0.4, -100)
    targets[:2] = -100
    return tokens[:, :-1], targets


def nats(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return token_nats(logits, targets, model).sum()


def step_of(session: GridSession, step: int, microbatches: int, max_norm: float) -> float:
    """One step as the training loop does it."""
    tokens, targets = (one.chunk(session.ranks)[session.rank] for one in batch_of(step))
    valid = session.sum((targets != -100).sum())
    rows = zip(tokens.chunk(microbatches), targets.chunk(microbatches), strict=True)
    for index, (some_tokens, some_targets) in enumerate(rows):
        with session.microbatch(is_last=index == microbatches - 1):
            session.backward(nats(session.model, some_tokens, some_targets) / valid)
    return session.update(max_norm)


def engine_of(sizes: Sizes, **how: Any) -> Fourfold:
    data, depth, row, col = sizes
    return Fourfold(data=data, depth=depth, row=row, col=col, **how)


@contextmanager
def opened(sizes: Sizes, config: Any, kind: str = "adamw", **how: Any) -> Iterator[GridSession]:
    model = build(config)
    optimizer = optimizer_for(model, kind)
    with engine_of(sizes, **how).open(
        model, optimizer, precision="fp32", batch=ROWS, microbatch=ROWS
    ) as session:
        yield session


def same_parameters(session: GridSession, serial: nn.Module, *, what: str) -> None:
    expected = dict(serial.named_parameters())
    parallel = session.parallel
    for name, parameter in parallel.model.named_parameters():
        kept = parallel.stored[name].keep(expected[name].detach())
        piece = piece_of(kept, parameter, parallel.mesh)
        close(local(parameter), piece, what=f"{what}: {name}", tolerance=STEP)


def steps_are_serial(sizes: Sizes, config: Any, kind: str, microbatches: int, **how: Any) -> None:
    serial = in_float64(build(config))
    optimizer = optimizer_for(serial, kind)
    with opened(sizes, config, kind, **how) as session:
        for step in range(5):
            tokens, targets = batch_of(step)
            optimizer.zero_grad()
            (nats(serial, tokens, targets) / (targets != -100).sum()).backward()
            norm = nn.utils.clip_grad_norm_(serial.parameters(), 0.1)
            optimizer.step()
            ours = step_of(session, step, microbatches, 0.1)
            assert abs(ours - norm.item()) < STEP * norm.item()
            same_parameters(session, serial, what=f"{sizes} {kind} {how} step {step}")


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adagrad"])
def test_five_steps_are_serial(kind: str) -> None:
    """Weight-decay groups, clipping at 0.1, uneven valid targets, with and without accumulation."""
    for sizes, microbatches in (((2, 1, 2, 1), 2), ((1, 2, 1, 2), 1), ((2, 2, 1, 1), 1)):
        run_on_ranks(
            4, steps_are_serial, sizes=sizes, config=LLAMA, kind=kind, microbatches=microbatches
        )


def test_tied_and_fused_weights_step_as_serial() -> None:
    run_on_ranks(4, steps_are_serial, sizes=(1, 2, 2, 1), config=GPT2, kind="adamw", microbatches=2)


def test_cut_optimizer_states_step_as_serial() -> None:
    """ZeRO-1 over data, on its own and with the other axes."""
    for sizes, config in (((4, 1, 1, 1), LLAMA), ((2, 2, 1, 1), GPT2), ((2, 1, 2, 1), LLAMA)):
        run_on_ranks(
            4, steps_are_serial, sizes=sizes, config=config, kind="adamw", microbatches=2,
            shards_optimizer=True,
        )  # fmt: skip


def states_are_cut(sizes: Sizes) -> tuple[int, int]:
    with opened(sizes, LLAMA, shards_optimizer=True) as session:
        step_of(session, 0, 1, 1.0)
        held = sum(
            local(value).numel()
            for state in session.optimizer.state.values()
            for key, value in state.items()
            if key == "exp_avg"
        )
        return held, sum(local(p).numel() for p in session.model.parameters())


def test_a_replica_holds_its_share_of_the_optimizers_state_only() -> None:
    held = run_on_ranks(4, states_are_cut, sizes=(4, 1, 1, 1))
    total = held[0][1]
    assert sum(share for share, _ in held) == total
    assert max(share for share, _ in held) <= 0.3 * total


def norms_are_serial(sizes: Sizes) -> None:
    serial = in_float64(build(LLAMA))
    tokens, targets = batch_of(0)
    (nats(serial, tokens, targets) / (targets != -100).sum()).backward()
    with opened(sizes, LLAMA) as session:
        mine, wanted = (one.chunk(session.ranks)[session.rank] for one in (tokens, targets))
        with session.microbatch(is_last=True):
            session.backward(nats(session.model, mine, wanted) / (targets != -100).sum())
        for order in (1.0, 2.0, 3.0, float("inf")):
            expected = nn.utils.get_total_norm(
                [p.grad for p in serial.parameters() if p.grad is not None], order
            )
            ours = gradient_norm(session.model.parameters(), session.parallel.mesh, order=order)
            assert abs(ours.item() - expected.item()) < STEP * expected.item(), order


def test_norms_of_every_order_are_serial() -> None:
    """Each element counts once, however many ranks hold a copy of it."""
    for sizes in ((2, 1, 1, 2), (1, 2, 2, 1), (1, 1, 4, 1)):
        run_on_ranks(4, norms_are_serial, sizes=sizes)


def any_grid_to_any_other(grids: list[Sizes], config: Any, folder: Path, **how: Any) -> None:
    serial = in_float64(build(config))
    optimizer = optimizer_for(serial, "adamw")
    for step in range(3):
        tokens, targets = batch_of(step)
        optimizer.zero_grad()
        (nats(serial, tokens, targets) / (targets != -100).sum()).backward()
        nn.utils.clip_grad_norm_(serial.parameters(), 0.1)
        optimizer.step()
    for index, sizes in enumerate(grids):
        here = folder / str(index)
        with opened(sizes, config, **how) as session:
            for step in range(2):
                step_of(session, step, 1, 0.1)
            save(session, here)
        for other in grids:
            with opened(other, config, **how) as session:
                restore(session, here / "step-00000000")
                step_of(session, 2, 1, 0.1)
                same_parameters(session, serial, what=f"saved on {sizes}, loaded on {other}")


GRIDS: list[Sizes] = [(1, 4, 1, 1), (2, 1, 2, 1), (1, 1, 2, 2)]


def test_a_checkpoint_goes_from_any_grid_to_any_other(tmp_path: Path) -> None:
    """With moments: the next step after loading is that of the serial run."""
    run_on_ranks(4, any_grid_to_any_other, grids=GRIDS[1:], config=GPT2, folder=tmp_path)


@pytest.mark.slow
def test_a_checkpoint_goes_through_every_pair(tmp_path: Path) -> None:
    for config in (LLAMA, GPT2):
        for shards_optimizer in (False, True):
            folder = tmp_path / f"{config.model_type}{shards_optimizer}"
            folder.mkdir()
            run_on_ranks(
                4, any_grid_to_any_other, grids=[*GRIDS, (4, 1, 1, 1), (1, 2, 2, 1)],
                config=config, folder=folder, shards_optimizer=shards_optimizer,
            )  # fmt: skip


def files_are_the_plain_models(config: Any, sizes: Sizes, folder: Path) -> None:
    mesh = mesh_of(sizes)
    plain = build(config)
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    parallelize(plain, mesh).save(folder)
    opened_again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, tensor in opened_again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).to(torch.float64)
    parallel = parallelize(empty, mesh, weights=folder)
    for name, parameter in parallel.model.named_parameters():
        kept = parallel.stored[name].keep(expected[name])
        assert torch.equal(local(parameter), piece_of(kept, parameter, mesh)), name
    tokens, _ = batch_of(0)
    mine = tokens.chunk(mesh.batch_size())[mesh.batch_rank()]
    serial = in_float64(opened_again.eval())(input_ids=mine).logits
    close(parallel.model.eval()(input_ids=mine).logits, serial, what="logits", tolerance=STEP)


def test_files_from_a_grid_are_the_plain_models_and_load_from_meta(tmp_path: Path) -> None:
    """Bit for bit, both ways, for plain, tied, fused and transposed weights."""
    for config in (LLAMA, GPT2):
        folder = tmp_path / config.model_type
        run_on_ranks(
            4, files_are_the_plain_models, config=config, sizes=(1, 2, 2, 1), folder=folder
        )


def anonymous_bytes() -> int:
    """Memory that is this process' own; pages of a mapped file are the system's to drop."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of_a_second_load(config: Any, folder: Path, sizes: Sizes) -> tuple[int, int]:
    """The first takes what a process takes once: threads, communicators, caches."""
    large_pieces = -3, 65536  # M_MMAP_THRESHOLD: what is freed leaves the process
    assert ctypes.CDLL(None).mallopt(*large_pieces)
    peak_of_loading(config, folder, sizes)
    return peak_of_loading(config, folder, sizes)


def peak_of_loading(config: Any, folder: Path, sizes: Sizes) -> tuple[int, int]:
    mesh = mesh_of(sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    peak, before, ends = 0, anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ends.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    parallel = parallelize(model, mesh, weights=folder)
    ends.set()
    watcher.join()
    return peak - before, sum(local(p).nbytes for p in parallel.model.parameters())


@pytest.mark.slow
def test_loading_holds_little_more_than_the_shard(tmp_path: Path) -> None:
    """At most 1.3 times the rank's shard of a 340 MB model, at the worst moment."""
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048,
        vocab_size=2000,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for peak, shard in run_on_ranks(
        4, peak_of_a_second_load, config=config, folder=tmp_path, sizes=(1, 2, 2, 1)
    ):
        assert peak <= 1.3 * shard


def peaks_of_a_checkpoint(config: Any, folder: Path, sizes: Sizes) -> tuple[float, float]:
    """Peak memory of a save and of a load onto a model without values, over what this rank holds."""

    @contextmanager
    def peak() -> Iterator[list[int]]:
        found, before, ends = [0], anonymous_bytes(), threading.Event()

        def watch() -> None:
            while not ends.is_set():
                found[0] = max(found[0], anonymous_bytes() - before)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield found
        ends.set()
        watcher.join()

    def session_of(model: Any) -> Any:
        return engine_of(sizes).open(
            model, torch.optim.AdamW(model.parameters()), precision="fp32", batch=4, microbatch=4
        )

    with session_of(AutoModelForCausalLM.from_config(config)) as session:
        tokens = torch.zeros(4 // session.ranks, 4, dtype=torch.long)
        with session.microbatch(is_last=True):
            session.backward(session.model(input_ids=tokens).logits.float().sum())
        session.update(1.0)
        shard = sum(
            part.values.nbytes for _, held in session.state().tensors() for part in held.parts
        )
        with peak() as saving:
            path = save(session, folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with peak() as loading, session_of(empty) as session:
        restore(session, path)
    return saving[0] / shard, loading[0] / shard


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_takes_little_more_memory_than_the_shard(tmp_path: Path) -> None:
    """At most 1.3 times what a rank holds of a 340 MB model with its moments, to save it and to load it."""
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048,
        vocab_size=2000,
    )  # fmt: skip
    for saving, loading in run_on_ranks(
        4, peaks_of_a_checkpoint, config=config, folder=tmp_path, sizes=(1, 2, 2, 1)
    ):
        assert saving <= 1.3
        assert loading <= 1.3


def converting_is_refused() -> None:
    mesh = mesh_of((2, 1, 1, 1))
    parallel = parallelize(build(LLAMA), mesh)
    watched = next(iter(parallel.model.parameters()))
    parallel.model.to("cpu")
    tokens = batch_of(0)[0].chunk(2)[mesh.batch_rank()]
    parallel.model(input_ids=tokens, labels=tokens).loss.backward()
    gradient = local(watched.grad)
    assert torch.equal(mesh.data.all_reduce(gradient.clone()).wait(), 2 * gradient)  # summed
    with pytest.raises(ValueError, match=r"float64 on cpu and cannot become torch.float32"):
        parallel.model.float()


def test_a_model_on_the_grid_stays_watched_when_it_is_moved_nowhere() -> None:
    run_on_ranks(2, converting_is_refused)


def only_elementwise_optimizers() -> None:
    model = build(LLAMA)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    opened = engine_of((1, 1, 2, 1)).open(
        model, torch.optim.Adafactor(matrices), precision="fp32", batch=ROWS, microbatch=ROWS
    )
    with pytest.raises(ValueError, match=r"piece of a matrix by itself.*Adafactor"), opened:
        pass

    class Mine(torch.optim.AdamW):
        """What a subclass does to an element is not known."""

    opened = engine_of((1, 1, 2, 1)).open(
        model, Mine(matrices), precision="fp32", batch=ROWS, microbatch=ROWS
    )
    with pytest.raises(ValueError, match="Mine"), opened:
        pass


def test_an_optimizer_that_mixes_elements_is_refused() -> None:
    run_on_ranks(2, only_elementwise_optimizers)


DROPPED = GPT2Config(**{**GPT2.to_dict(), "resid_pdrop": 0.3, "embd_pdrop": 0.3})


def dropped_out(sizes: Sizes) -> tuple[int, Tensor, Tensor]:
    """This rank's share of the batch, what its first dropout left, and its logits."""
    mesh = mesh_of(sizes)
    parallel = parallelize(build(DROPPED), mesh)
    left: list[Tensor] = []
    parallel.model.transformer.drop.register_forward_hook(
        lambda module, args, output: left.append(output != 0)
    )
    outputs = []
    for _ in range(2):
        seed_dropout(seed=1, step=7, share=mesh.batch_rank())
        outputs.append(parallel.model(input_ids=torch.ones(ROWS, 16, dtype=torch.long)).logits)
    assert torch.equal(outputs[0], outputs[1])
    return mesh.batch_rank(), left[0], outputs[0].detach()


def test_dropout_is_a_function_of_step_and_share() -> None:
    """Equal on ranks that hold copies, else different; at its rate; equal in a second run."""
    for sizes in ((1, 2, 2, 1), (2, 1, 1, 2)):
        found = run_on_ranks(4, dropped_out, sizes=sizes)
        by_share: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for share, left, logits in found:
            by_share.setdefault(share, []).append((left, logits))
            n = left.numel()
            assert abs(left.double().mean().item() - 0.7) < 4 * (0.7 * 0.3 / n) ** 0.5
        (left_0, logits_0), (left_1, logits_1) = by_share[0]
        assert torch.equal(left_0, left_1)
        assert torch.equal(logits_0, logits_1)
        assert not torch.equal(left_0, by_share[1][0][0])
