"""Laws of checkpoints: what is read is what was written, or the file that is not is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from fourfold_parallel.common.checksum import checksum
from fourfold_parallel.common.held import Held, State, parts_of_stretch
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.grid.layout import Stored
from fourfold_parallel.run import checkpoint, shards
from fourfold_parallel.run.checkpoint import Checkpoint, Keep
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.shards import CorruptError, Manifest, ShardReader
from fourfold_parallel.run.train import train, trained_model

FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    random_ = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=random_).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    dtype=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
def test_the_checksums_of_any_pieces_add_up_to_the_tensors(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    """Cut again and again at random places along random dims; pieces are views, transposed ones too."""
    whole = numbers(shape, dtype, seed)
    kept = whole.clone()
    cuts = random.Random(seed)
    pieces = [((0,) * whole.ndim, whole)]
    for _ in range(4 * bool(shape)):
        offsets, piece = pieces.pop(cuts.randrange(len(pieces)))
        dim = cuts.randrange(len(shape))
        edge = cuts.randint(0, piece.shape[dim])
        for start, length in ((0, edge), (edge, piece.shape[dim] - edge)):
            moved = [*offsets]
            moved[dim] += start
            pieces.append((tuple(moved), piece.narrow(dim, start, length)))
    total = sum(checksum(piece, offsets) for offsets, piece in pieces) % 2**64
    assert total == checksum(whole, (0,) * whole.ndim)
    assert torch.equal(whole, kept)  # looking changes nothing


def plain_checksum(whole: Tensor) -> int:
    """The definition, in loops: SplitMix64 (Steele, Lea and Flood 2014) in Python's own integers."""

    def factor(direction: int, place: int) -> int:
        z = (place + (direction << 40)) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    total = 0
    rows, columns = whole.shape
    bits = whole.view(torch.int32).tolist()
    for row in range(rows):
        for column in range(columns):
            total += bits[row][column] * factor(2, row) * factor(1, column)
    return total % 2**64


def test_the_checksum_is_its_definition() -> None:
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert checksum(whole, (0, 0)) == plain_checksum(whole)


@pytest.mark.parametrize("dtype", FORMATS[:-1])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    """Each of the bits of each element, turned alone, changes the checksum."""
    whole = numbers((3, 5), dtype)
    before = checksum(whole, (0, 0))
    flat = whole.view(torch.uint8).view(-1)
    for byte in range(len(flat)):
        for bit in range(8):
            flat[byte] ^= 1 << bit
            assert checksum(whole, (0, 0)) != before
            flat[byte] ^= 1 << bit
    assert checksum(whole, (0, 0)) == before


def test_elements_that_change_places_change_the_checksum() -> None:
    whole = torch.arange(12.0).view(3, 4)
    for other in (whole.flip(0), whole.flip(1), whole.roll(1), whole.view(4, 3).t().reshape(3, 4)):
        assert checksum(other, (0, 0)) != checksum(whole, (0, 0))
    assert checksum(whole, (0, 1)) != checksum(whole, (0, 0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_rectangles_are_what_read_reads(transposed: bool, parts: int, pieces: int) -> None:
    """Every piece of a kept tensor, aligned to its parts or not: its rectangles fill the published one."""
    published = torch.arange(18.0 * 5).view(18, 5)
    if transposed:
        published = published.t().contiguous()
    how = Stored(transposed=transposed, parts=parts)
    shape = how.keep_shape(published.shape)
    filled = torch.full_like(published, -1)
    for piece in range(pieces):
        rows = slice(18 * piece // pieces, 18 * (piece + 1) // pieces)
        slices = (rows, slice(0, 5))
        kept = how.read(published, slices, shape)
        for offsets, values in how.rectangles(kept, slices, shape):
            place = tuple(
                slice(start, start + size)
                for start, size in zip(offsets, values.shape, strict=True)
            )
            assert torch.equal(published[place], values)
            filled[place] = values
    assert torch.equal(filled, published)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    edges=st.lists(st.integers(0, 125), max_size=4),
)
def test_a_stretch_is_made_of_rectangles(shape: tuple[int, ...], edges: list[int]) -> None:
    """As DeepSpeed cuts: whatever the edges, the rectangles of all stretches fill the tensor, once."""
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    flat, filled = whole.reshape(-1), torch.full_like(whole, -1)
    places = sorted({0, len(flat), *(edge for edge in edges if edge < len(flat))})
    for start, stop in pairwise(places):
        for offsets, values in parts_of_stretch(shape, start, flat[start:stop]):
            place = tuple(
                slice(begin, begin + size)
                for begin, size in zip(offsets, values.shape, strict=True)
            )
            assert torch.equal(whole[place], values)
            assert bool((filled[place] == -1).all())
            filled[place] = values
    assert torch.equal(filled, whole)


def run_to(folder: Path, run: Run, keep: Keep | None = None) -> Checkpoint:
    return train(
        run, record=folder / "r.jsonl", checkpoints=folder / "c", progress=silent,
        keep=keep or Keep(),
    )  # fmt: skip


def steps_in(folder: Path) -> list[int]:
    return [one.step for one in checkpoint.checkpoints(folder)]


def flip(path: Path, *, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_save_holds_what_is_in_memory_at_its_step(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments of the live model, looked at when a save begins, are what is read back later."""
    memory: list[dict[str, str]] = []
    take = shards.Image.take

    def look(image: shards.Image, state: State) -> None:
        held = dict(state.tensors())
        sums, _ = shards.held_checksums(held).tolist()
        memory.append(
            {name: f"{value % 2**64:016x}" for name, value in zip(held, sums, strict=True)}
        )
        take(image, state)

    monkeypatch.setattr(shards.Image, "take", look)
    run_to(tmp_path, small_run, Keep(last=9))
    whole = checkpoint.checkpoints(tmp_path / "c")
    assert [one.step for one in whole] == [2, 4, 6]
    for one, seen in zip(whole, memory, strict=True):
        assert {
            name: total for name, (_, _, total) in Manifest.read(one.path).tensors.items()
        } == seen
        assert [*shards.faults(one.path)] == []
    assert all(memory[0][name] != memory[1][name] != memory[2][name] for name in memory[0])


def test_kept_are_the_newest_the_milestones_and_the_second_place(
    tmp_path: Path, small_run: Run
) -> None:
    run = replace(small_run, horizon=Steps(count=7), checkpoint_every=1)
    last = run_to(tmp_path, run, Keep(last=2, every=3, also=tmp_path / "other"))
    for place in (tmp_path / "c", tmp_path / "other"):
        assert steps_in(place) == [3, 6, 7]
        assert (place / "latest").read_text() == "step-00000007\n"
        assert sorted(path.name for path in place.iterdir()) == [
            "latest", "step-00000003", "step-00000006", "step-00000007",
        ]  # fmt: skip
    assert [*shards.faults(tmp_path / "other/step-00000006")] == []
    # The first place is lost as a whole: the second is gone on from.
    shutil.rmtree(tmp_path / "c")
    longer = replace(run, horizon=Steps(count=7))
    again = checkpoint.latest(tmp_path / "c", run=longer, also=tmp_path / "other")
    assert again is not None
    assert again.path == tmp_path / "other/step-00000007"
    assert last.step == again.step


@pytest.mark.parametrize("place", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, small_run: Run, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensor and file; the run then goes on from the step before and ends as if nothing had been."""
    straight = run_to(tmp_path / "straight", small_run)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(
            small_run, record=broken / "r.jsonl", checkpoints=broken / "c", progress=interrupt_at(5)
        )
    assert steps_in(broken / "c") == [2, 4]
    flip(broken / "c/step-00000004" / place)
    [said] = shards.faults(broken / "c/step-00000004")
    assert place in said
    assert "layers.1.self_attn.v_proj.weight" in said or "[" in said
    last = run_to(broken, small_run)
    assert said in caplog.text
    assert [
        int(event.number("step")) for event in read_record(broken / "r.jsonl").of("resumed")
    ] == [2]
    assert len([*(broken / "c").glob("corrupt-step-00000004-*")]) == 1
    ours, theirs = trained_model(small_run, last), trained_model(small_run, straight)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def interrupt_at(step: int):
    def tell(done: int, total: int, note: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return tell


def test_where_nothing_is_sound_the_run_says_so(tmp_path: Path, small_run: Run) -> None:
    run_to(tmp_path, small_run)
    for step in (4, 6):
        flip(tmp_path / f"c/step-0000000{step}/model.safetensors")
    with pytest.raises(CorruptError, match="none of 2 checkpoints is sound: remove"):
        run_to(tmp_path, small_run)


def test_whatever_is_wrong_with_a_folder_is_told(tmp_path: Path, small_run: Run) -> None:
    """Cut, missing, exchanged or changed files, the manifest's included: each is named."""
    run_to(tmp_path, small_run)
    sound, older = tmp_path / "c/step-00000006", tmp_path / "c/step-00000004"
    assert [*shards.faults(sound)] == []

    def damaged(name: str) -> Path:
        shutil.copytree(sound, tmp_path / name)
        return tmp_path / name

    def told(folder: Path) -> str:
        [said] = shards.faults(folder)
        return said

    cut = damaged("cut")
    os.truncate(cut / "model.safetensors", 100)
    assert "model.safetensors has 100 bytes" in told(cut)
    missing = damaged("missing")
    (missing / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors cannot be read" in told(missing)
    stale = damaged("stale")
    shutil.copyfile(older / "model.safetensors", stale / "model.safetensors")
    assert "its header differs (a file of another save?)" in told(stale)
    config = damaged("config")
    flip(config / "config.json", at=20)
    assert "config.json is not what was written" in told(config)
    manifest = damaged("manifest")
    text = (manifest / "checkpoint.json").read_text()
    (manifest / "checkpoint.json").write_text(text.replace('"step": 6', '"step": 7'))
    assert "its digest differs" in told(manifest)
    (manifest / "checkpoint.json").write_text(text[:99])
    assert "cannot be read" in told(manifest)


def test_a_manifest_that_is_passed_over_is_told(
    tmp_path: Path, small_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run_to(tmp_path, small_run)
    flip(tmp_path / "c/step-00000006/checkpoint.json", at=30)
    assert steps_in(tmp_path / "c") == [4]
    assert "it is passed over" in caplog.text


def test_resharded_and_exported_it_is_the_same(tmp_path: Path, small_run: Run) -> None:
    """One rank's files as five ranks' and back: equal checksums; plain transformers reads the export."""
    last = run_to(tmp_path, small_run)
    five = checkpoint.reshard(last.path, tmp_path / "five", ranks=5)
    one = checkpoint.reshard(five, tmp_path / "one", ranks=1)
    assert len([*five.glob("*.safetensors")]) == 10
    manifests = [Manifest.read(path) for path in (last.path, five, one)]
    assert manifests[0].tensors == manifests[1].tensors == manifests[2].tensors
    for folder in (five, one):
        assert [*shards.faults(folder)] == []
    plain = checkpoint.export(five, tmp_path / "plain")
    assert plain.name == "model.safetensors"
    expected = trained_model(small_run, last).state_dict()
    for folder in (plain.parent, one):
        read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(read[name], weight) for name, weight in expected.items())
    with pytest.raises(ValueError, match="is there already"):
        checkpoint.reshard(last.path, tmp_path / "five", ranks=2)
    flip(five / "model-00003.safetensors")
    with pytest.raises(CorruptError, match=r"model-00003.safetensors: .* is not what was written"):
        checkpoint.export(five, tmp_path / "again")


def test_torchs_own_loader_reads_the_shards(tmp_path: Path, small_run: Run) -> None:
    """`torch.distributed.checkpoint.load` with our reader, into a plain state dict."""
    import torch.distributed.checkpoint as dcp

    last = run_to(tmp_path, small_run)
    five = checkpoint.reshard(last.path, tmp_path / "five", ranks=5)
    expected = trained_model(small_run, last)
    state = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, storage_reader=ShardReader(five))
    assert all(torch.equal(state[name], p) for name, p in expected.named_parameters())


def test_the_pointer_moves_last(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of a checkpoint is synced before its rename, and that before `latest` moves."""
    seen: list[tuple[str, str]] = []
    fsync, replace_ = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        seen.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        seen.append(("rename", str(target)))
        return replace_(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    last = run_to(tmp_path, replace(small_run, horizon=Steps(count=2)))
    folder = str(tmp_path / "c")
    renamed = seen.index(("rename", str(last.path)))
    pointed = seen.index(("rename", f"{folder}/latest"))
    before = [Path(name).name for what, name in seen[:renamed] if what == "sync"]
    files = {path.name for path in last.path.iterdir()}
    assert files - {"checkpoint.json"} <= set(before)
    assert any(name.startswith(".checkpoint.json") for name in before)
    assert any(name.startswith(".step-00000002.") for name in before)
    assert ("sync", folder) in seen[renamed:pointed]


@pytest.mark.parametrize("moment", ["snapshot", "save", "rename", "renamed"])
def test_a_save_that_dies_leaves_the_last_whole_checkpoint(
    tmp_path: Path, small_run: Run, moment: str
) -> None:
    """Killed there at the second save: what is left is whole, and the next run clears up and ends alike."""
    import subprocess
    import sys

    from fourfold_parallel.common.values import to_json

    straight = run_to(tmp_path / "straight", small_run)
    (tmp_path / "run.json").write_text(json.dumps(to_json(small_run)))
    program = Path(__file__).parent / "killed_in_a_save.py"
    killed = subprocess.run(
        [sys.executable, str(program), str(tmp_path), moment, "2"], capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    expected = [2, 4] if moment == "renamed" else [2]
    assert steps_in(tmp_path / "killed/c") == expected
    last = run_to(tmp_path / "killed", small_run)
    assert {path.name for path in (tmp_path / "killed/c").iterdir()} == {
        "latest", "step-00000004", "step-00000006",
    }  # fmt: skip
    ours, theirs = Manifest.read(last.path), Manifest.read(straight.path)
    assert ours.tensors == theirs.tensors


def test_a_full_disk_during_a_save_costs_that_checkpoint_only(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three saves fails: the run goes on, the record says so, and nothing half is left."""
    write = shards.write_all
    saves: list[Path] = []

    def full_at_the_second(handle: int, content: bytes | memoryview) -> None:
        place = Path(str(Path(f"/proc/self/fd/{handle}").readlink())).parent
        saves.extend([place] if place not in saves else [])
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        write(handle, content)

    monkeypatch.setattr(shards, "write_all", full_at_the_second)
    run_to(tmp_path, small_run)
    assert steps_in(tmp_path / "c") == [2, 6]
    [failed] = read_record(tmp_path / "r.jsonl").of("save_failed")
    assert failed.number("step") == 4
    assert "disk" in str(failed.values["reason"])
    assert "make room" in str(failed.values["reason"])
    assert not [*(tmp_path / "c").glob(".*")]


def test_a_full_disk_at_the_last_save_ends_the_run_by_name(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, content: bytes | memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_all", full)
    with pytest.raises(OSError, match=r"last checkpoint could not be written.*is full.*make room"):
        run_to(tmp_path, replace(small_run, checkpoint_every=99))
    assert steps_in(tmp_path / "c") == []


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back by a year between two launches: the newest step is gone on from, and times do not run back."""
    with pytest.raises(KeyboardInterrupt):
        train(
            small_run, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "c",
            progress=interrupt_at(5),
        )  # fmt: skip
    import time

    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400)
    run_to(tmp_path, small_run)
    record = read_record(tmp_path / "r.jsonl")
    assert [event.number("step") for event in record.of("resumed")] == [4]
    times = [event.number("at_ms") for event in record.events[1:]]
    assert times == sorted(times)


def test_whole_is_one_part() -> None:
    held = Held.whole(torch.zeros(2, 3))
    assert held.boxes()[0].sizes == (2, 3)
    assert Held.whole(torch.zeros(0, 3)).boxes() == ()
