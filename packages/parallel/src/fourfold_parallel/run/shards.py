"""Shards: the files of a checkpoint, written by many ranks, read by any number of others.

Each rank writes what torch's distributed checkpoint plans for it: of every rectangle that several ranks
hold, one of them writes it. A file is plain safetensors. A whole tensor lies there under its own name, a
rectangle under `name[rows,columns]`, and the header holds a checksum of each. `checkpoint.json` beside the
files names them, with the digest of their headers, and holds the checksum of every whole tensor, which is
the sum of those of its rectangles however it is cut (`common.checksum`).

So what is read is checked where it matters, in memory: the ranks sum the checksums of what they hold now, and
compare. Only where that fails are files read again, to say which one is to blame.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from fourfold_parallel.common.checksum import checksum, shown, signed
from fourfold_parallel.common.files import StrPath, sha256_of
from fourfold_parallel.common.held import Box, Held, HeldPart, Saved, State

MANIFEST = "checkpoint.json"
FORMAT = 2
"""Version of the manifest; 1 had no shards and no checksums."""
PIECE_BYTES = 16 << 20
"""Written at a time: what a full disk refuses is known soon, and other threads run between two pieces."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Number formats, as safetensors names them."""
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class CorruptError(ValueError):
    """A checkpoint is not what was written; the message names the file, and the tensor where one is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A rectangle of a tensor in a file."""

    name: str
    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Its first byte in the file."""
    checksum: str

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def place(self) -> str:
        """For messages: `model.norm.weight[0:64]`."""
        spans = (f"{a}:{a + size}" for a, size in zip(self.offsets, self.sizes, strict=True))
        return f"{self.name}[{','.join(spans)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`checkpoint.json`: all that is known of a checkpoint but the values of its tensors."""

    step: int
    run: dict[str, Any]
    ranks: int
    numbers: Mapping[str, Any]
    """Of the optimizer (`State.numbers`)."""
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]
    """Shape, number format and checksum by name."""
    shards: Mapping[str, tuple[int, str]]
    """Bytes, and the sha256 of the header, by file."""
    beside: Mapping[str, str]
    """sha256 of the other files, by name."""

    def saved(self) -> Saved:
        """The content that a session makes room for."""
        shapes = {name: (shape, dtype) for name, (shape, dtype, _) in self.tensors.items()}
        return Saved(shapes=shapes, numbers=self.numbers)

    def text(self) -> str:
        """As the file holds it: with a digest of itself at the end."""
        values = {
            "format": FORMAT, "step": self.step, "run": self.run, "ranks": self.ranks,
            "numbers": self.numbers,
            "tensors": {
                name: [list(shape), _NAMES[dtype], total]
                for name, (shape, dtype, total) in self.tensors.items()
            },
            "shards": {name: list(about) for name, about in self.shards.items()},
            "beside": dict(self.beside),
        }  # fmt: skip
        return json.dumps({**values, "sha256": _digest(values)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CorruptError: The file is not what was written.
            ValueError: An earlier version of fourfold wrote it; the way out is named.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            said = values.pop("sha256", None)
        except (OSError, ValueError, AttributeError) as error:
            raise CorruptError(f"{path} cannot be read ({error})") from error
        if said is None and "step" in values:
            raise ValueError(
                f"{folder} was written by a version of fourfold whose checkpoints had no checksums, and "
                f"which goes on from them. Its weights are plain: begin a run of its own from them, with "
                f"model=Published(name='{folder}', ...), or remove {folder.parent} to start over"
            )
        if said != _digest(values):
            raise CorruptError(f"{path} is not what was written: its digest differs")
        if values["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {values['format']}, this version of fourfold reads {FORMAT}; "
                "use the version that wrote it"
            )
        return cls(
            step=values["step"], run=values["run"], ranks=values["ranks"],
            numbers=values["numbers"],
            tensors={
                name: (tuple(shape), _DTYPES[dtype], total)
                for name, (shape, dtype, total) in values["tensors"].items()
            },
            shards={name: (nbytes, header) for name, (nbytes, header) in values["shards"].items()},
            beside=values["beside"],
        )  # fmt: skip


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- writing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A box's place in a rank's memory."""

    name: str
    whole: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    start: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        if self.box.sizes == self.whole:
            return self.name
        spans = zip(self.box.offsets, self.box.sizes, strict=True)
        return f"{self.name}[{','.join(f'{start}:{start + size}' for start, size in spans)}]"

    @property
    def nbytes(self) -> int:
        return math.prod(self.box.sizes) * self.dtype.itemsize

    def memory(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.nbytes].view(self.dtype).view(self.box.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The part of one rank: files with their bytes and header digests, and its part of every checksum."""

    shards: Mapping[str, tuple[int, str]]
    checksums: Mapping[str, int]


def plan(state: State, *, group: dist.ProcessGroup | None) -> SavePlan:
    """This rank's part in writing a state: torch's plan, where one holder of a rectangle writes it.

    Every rank calls this; the plan holds until the layout of the state changes.

    Args:
        state: this rank's.
        group: all ranks, on the CPU; None for one process.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(state.tensors()), is_coordinator=True)
    mine = planner.create_local_plan()
    if group is None:
        return mine
    plans: list[SavePlan] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(plans, mine, group=group)
    shared, _ = planner.create_global_plan(plans)
    return shared[dist.get_rank(group)]


class Image:
    """This rank's share of a checkpoint: one stretch of host memory, laid out like the files made of it.

    It is made once and used for every save, so that host memory stays flat and a snapshot is a copy.

    Args:
        state: this rank's, for the layout.
        items: what this rank writes of it (`plan`).
        label: ends the names of the files: `-00003` for rank 3; empty for one process.
    """

    def __init__(self, state: State, items: Iterable[WriteItem], *, label: str) -> None:
        held = dict(state.tensors())
        self.layout = layout_of(state)
        wanted = {(item.index.fqn, tuple(item.index.offset or ())) for item in items}
        self._files: dict[str, list[_Entry]] = {}
        start = 0
        for kind, names in (("model", state.weights), ("optimizer", state.moments)):
            boxes = [
                (name, box)
                for name in names
                for box in held[name].boxes()
                if (name, box.offsets) in wanted
            ]
            # Wide numbers first, so that each lies at a multiple of its own width.
            boxes.sort(key=lambda box: -held[box[0]].dtype.itemsize)
            entries: list[_Entry] = []
            start = -(-start // 8) * 8
            for name, box in boxes:
                entries.append(
                    _Entry(
                        name=name,
                        whole=held[name].shape,
                        box=box,
                        dtype=held[name].dtype,
                        start=start,
                    )
                )
                start += entries[-1].nbytes
            if entries or not label:
                self._files[f"{kind}{label}.safetensors"] = entries
        self.nbytes = start
        on_gpu = any(part.values.is_cuda for tensor in held.values() for part in tensor.parts)
        self._on_gpu = on_gpu
        self._flat = torch.empty(start, dtype=torch.uint8, pin_memory=on_gpu)

    def take(self, state: State) -> None:
        """Copy a state of the same layout into this memory; what is written later is of this moment."""
        held = dict(state.tensors())
        for entries in self._files.values():
            for entry in entries:
                [box] = [b for b in held[entry.name].boxes() if b.offsets == entry.box.offsets]
                box.copy_to(entry.memory(self._flat))
        if self._on_gpu:
            torch.cuda.synchronize()

    def write(self, folder: Path) -> Written:
        """Write the files, durably, with the checksums of what the memory holds."""
        shards: dict[str, tuple[int, str]] = {}
        totals: dict[str, int] = {}
        for file, entries in self._files.items():
            sums: dict[str, str] = {}
            described: dict[str, Any] = {}
            first = entries[0].start if entries else 0
            for entry in entries:
                value = checksum(entry.memory(self._flat), entry.box.offsets)
                totals[entry.name] = totals.get(entry.name, 0) + value
                sums[entry.key] = shown(value)
                bounds = [entry.start - first, entry.start - first + entry.nbytes]
                described[entry.key] = {
                    "dtype": _NAMES[entry.dtype], "shape": list(entry.box.sizes),
                    "data_offsets": bounds,
                }  # fmt: skip
            stop = entries[-1].start + entries[-1].nbytes if entries else 0
            shards[file] = write_shard(folder / file, described, sums, [self._flat[first:stop]])
        return Written(shards=shards, checksums=totals)


def layout_of(state: State) -> tuple[Any, ...]:
    """Changes where a state is cut otherwise than before, or holds other tensors."""
    return tuple(
        (
            name,
            held.shape,
            held.dtype,
            tuple((p.offsets, tuple(p.values.shape)) for p in held.parts),
        )
        for name, held in state.tensors()
    )


def write_shard(
    path: Path,
    described: Mapping[str, Any],
    checksums: Mapping[str, str],
    stretches: Iterable[Tensor],
) -> tuple[int, str]:
    """Write a safetensors file, durably; gives its bytes and the sha256 of its header.

    Args:
        path: of the file.
        described: safetensors' description of each tensor, by key, in the order of the data.
        checksums: by key.
        stretches: the data, in pieces of memory of bytes.
    """
    about = {"format": "pt", "checksums": json.dumps(checksums)}
    header = json.dumps({"__metadata__": about, **described}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    written = 8 + len(header)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(handle, struct.pack("<Q", len(header)) + header)
        for stretch in stretches:
            view = memoryview(cast(Any, stretch.numpy()))
            for start in range(0, len(view), PIECE_BYTES):
                write_all(handle, view[start : start + PIECE_BYTES])
            written += len(view)
        os.fsync(handle)
    finally:
        os.close(handle)
    return written, hashlib.sha256(header).hexdigest()


def write_all(handle: int, content: bytes | memoryview) -> None:
    """Write all of it: a disk that fills up takes a part without an error, and refuses the rest."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def manifest(
    written: Sequence[Written],
    state: State,
    *,
    step: int,
    run: dict[str, Any],
    beside: Mapping[str, bytes],
) -> Manifest:
    """The manifest of what all ranks wrote."""
    totals: dict[str, int] = {}
    shards: dict[str, tuple[int, str]] = {}
    for part in written:
        shards.update(part.shards)
        for name, value in part.checksums.items():
            totals[name] = totals.get(name, 0) + value
    return Manifest(
        step=step, run=run, ranks=len(written), numbers=state.numbers,
        tensors={
            name: (held.shape, held.dtype, shown(totals.get(name, 0) % 2**64))
            for name, held in state.tensors()
        },
        shards=shards,
        beside={name: hashlib.sha256(content).hexdigest() for name, content in beside.items()},
    )  # fmt: skip


# ---- reading


def chunks_in(folder: Path, file: str, about: tuple[int, str]) -> list[Chunk]:
    """The rectangles in a shard, by its header.

    Args:
        folder: the checkpoint.
        file: name of the shard.
        about: its bytes and the digest of its header, as the manifest says.

    Raises:
        CorruptError: The file is missing, cut short, or not the one that was written.
    """
    path = folder / file
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = stream.read(min(length, about[0]))
        actual = path.stat().st_size
    except (OSError, struct.error) as error:
        raise CorruptError(f"{path} cannot be read ({error})") from error
    if actual != about[0]:
        raise CorruptError(f"{path} has {actual} bytes, {about[0]} were written")
    if hashlib.sha256(header).hexdigest() != about[1]:
        raise CorruptError(
            f"{path} is not the file that was written: its header differs (a file of another save?)"
        )
    described = json.loads(header)
    sums = json.loads(described.pop("__metadata__")["checksums"])
    chunks = []
    for key, values in described.items():
        name, bracket, spans = key.partition("[")
        sizes = tuple(values["shape"])
        offsets = (0,) * len(sizes)
        if bracket:
            offsets = tuple(int(span.partition(":")[0]) for span in spans[:-1].split(","))
        chunks.append(
            Chunk(
                name=name, file=file, offsets=offsets, sizes=sizes, dtype=_DTYPES[values["dtype"]],
                start=8 + length + values["data_offsets"][0], checksum=sums[key],
            )
        )  # fmt: skip
    return chunks


def mapped(folder: Path, file: str) -> Tensor:
    """A file's bytes, mapped: they are read when they are touched, and are no memory of this process."""
    path = folder / file
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def values_of(chunk: Chunk, content: Tensor) -> Tensor:
    """A chunk's values in its file's bytes."""
    data = content[chunk.start : chunk.start + chunk.nbytes]
    return data.view(chunk.dtype).view(chunk.sizes)


class ShardReader(StorageReader):
    """The files of a checkpoint as torch's distributed checkpoint reads them.

    `torch.distributed.checkpoint.load(state_dict, storage_reader=ShardReader(folder))` works with it too.

    Args:
        folder: the checkpoint.
        manifest: its manifest; read where none is given.
    """

    def __init__(self, folder: StrPath, manifest: Manifest | None = None) -> None:
        self._folder = Path(folder)
        self.manifest = Manifest.read(self._folder) if manifest is None else manifest
        self._chunks: dict[MetadataIndex, Chunk] = {}
        self._by_name: dict[str, list[Chunk]] = {}

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Every rectangle, once the headers have been read (`read_metadata`)."""
        return tuple(self._chunks.values())

    def refuse(self, names: Sequence[str]) -> None:
        """Say of tensors that are not what was written which file is to blame.

        Raises:
            CorruptError: There are such tensors.
        """
        if names:
            raise CorruptError(
                next(
                    blame(self, self._folder, names),
                    f"{self._folder}: {names[0]} was read otherwise than it was written, though its "
                    "files are sound (memory that fails?)",
                )
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - torch's signature
        """The places of all tensors, from the headers of the files.

        Raises:
            CorruptError: A file is not what was written.
        """
        for file, about in self.manifest.shards.items():
            for chunk in chunks_in(self._folder, file, about):
                self._by_name.setdefault(chunk.name, []).append(chunk)
                self._chunks[MetadataIndex(chunk.name, torch.Size(chunk.offsets))] = chunk
        described: Any = {}
        for name in self.manifest.tensors:
            described |= self.metadata_of(name).state_dict_metadata
        return Metadata(
            state_dict_metadata=described, storage_data=self._chunks, storage_meta=StorageMeta()
        )

    def metadata_of(self, name: str) -> Metadata:
        """The places of one tensor, once the headers have been read."""
        shape, dtype, _ = self.manifest.tensors[name]
        lie = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in self._by_name.get(name, [])
        ]
        described: Any = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype), size=torch.Size(shape), chunks=lie
            )
        }
        return Metadata(state_dict_metadata=described)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is asked for from the mapped files into the tensors that the planner names."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            chunk = self._chunks[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for file, wanted in by_file.items():
            content = mapped(self._folder, file)
            for item, chunk in wanted:
                values = values_of(chunk, content)
                for dim, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    values = values.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: `read_metadata` has read all."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Look at another folder, where one is named."""
        if checkpoint_id is not None:
            self._folder = Path(checkpoint_id)
            self.manifest = Manifest.read(self._folder)
        self._chunks, self._by_name = {}, {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a checkpoint of ours."""
        return (Path(checkpoint_id) / MANIFEST).is_file()


class _Planner(DefaultLoadPlanner):
    """torch's planner, over what ranks hold instead of over tensors."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.original_state_dict = self.state_dict = state_dict
        self.mappings, self.metadata = {}, metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held: Any = self.state_dict[index.fqn]
        assert isinstance(held, Held)
        assert index.offset is not None
        return held.part_at(index.offset)


def read(reader: ShardReader, tensors: Mapping[str, Held]) -> None:
    """Fill what this rank holds from the files; nothing is checked but the headers, and no rank waits.

    Raises:
        CorruptError: A file is missing, cut short or of another save.
    """
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), reader.read_metadata())
    reader.read_data(planner.create_local_plan(), planner)


def held_checksums(tensors: Mapping[str, Held]) -> Tensor:
    """Checksum and number of elements of what this rank holds of each tensor: int64, [2, tensors]."""
    sums = [
        signed(sum(checksum(part.values, part.offsets) for part in held.parts) % 2**64)
        for held in tensors.values()
    ]
    counts = [sum(part.values.numel() for part in held.parts) for held in tensors.values()]
    return torch.tensor([sums, counts], dtype=torch.int64).reshape(2, -1)


def unlike(manifest: Manifest, tensors: Mapping[str, Held], total: Tensor) -> list[str]:
    """Names of tensors that are not in memory what was written.

    Args:
        manifest: what was written.
        tensors: what is held.
        total: `held_checksums` summed over all ranks. Ranks that hold copies count as often.
    """
    wrong = []
    for name, value, count in zip(tensors, *total.tolist(), strict=True):
        shape, _, expected = manifest.tensors[name]
        elements = math.prod(shape)
        if elements == 0:
            continue
        copies, rest = divmod(count, elements)
        if rest or not copies or (value - copies * int(expected, 16)) % 2**64:
            wrong.append(name)
    return wrong


def blame(reader: ShardReader, folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Read the chunks of some tensors again, and tell of each whose bytes are not what was written."""
    names = set(names)
    for chunk in reader.chunks:
        if chunk.name in names:
            actual = checksum(values_of(chunk, mapped(folder, chunk.file)), chunk.offsets)
            if shown(actual) != chunk.checksum:
                yield f"{folder / chunk.file}: {chunk.place} is not what was written"


def faults(folder: Path) -> Iterator[str]:
    """Everything that is wrong with a checkpoint's files, one sentence each; nothing where it is sound.

    Raises:
        ValueError: An earlier version of fourfold wrote it.
    """
    try:
        reader = ShardReader(folder)
    except CorruptError as error:
        yield str(error)
        return
    sound: dict[str, tuple[int, str]] = {}
    for file, about in reader.manifest.shards.items():
        try:
            chunks_in(folder, file, about)
            sound[file] = about
        except CorruptError as error:
            yield str(error)
    partial = ShardReader(folder, replace(reader.manifest, shards=sound))
    partial.read_metadata()
    blamed = list(blame(partial, folder, reader.manifest.tensors))
    yield from blamed
    if not blamed and len(sound) == len(reader.manifest.shards):
        yield from _sums_that_differ(partial)
    for name, digest in reader.manifest.beside.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif sha256_of(path) != digest:
            yield f"{path} is not what was written"
    plain = folder / PLAIN
    if plain.is_file() and PLAIN not in reader.manifest.shards:
        yield from _plain_faults(plain, reader.manifest)


PLAIN = "model.safetensors"
"""The weights, whole and under the plain model's names: what `from_pretrained` reads."""


def _sums_that_differ(reader: ShardReader) -> Iterator[str]:
    totals = dict.fromkeys(reader.manifest.tensors, 0)
    for chunk in reader.chunks:
        totals[chunk.name] += int(chunk.checksum, 16)
    for name, (shape, _, expected) in reader.manifest.tensors.items():
        if shown(totals[name] % 2**64) != expected and math.prod(shape):
            yield f"{name}: the files hold other values than the manifest says"


def _plain_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            if shown(checksum(tensor, (0,) * tensor.ndim)) != manifest.tensors[name][2]:
                yield f"{path}: {name} is not what was written"


def rewrite(source: Path, folder: Path, *, shards: int, only_weights: bool = False) -> Manifest:
    """Write a checkpoint's tensors anew, cut along their first dim into so many files.

    Peak memory is one rectangle; values are copied from mapped files.

    Args:
        source: a checkpoint.
        folder: an empty folder; gets the files but no manifest.
        shards: 1 leaves whole tensors under their plain names.
        only_weights: leave the optimizer's moments out.

    Returns:
        The source's manifest, for the new files.

    Raises:
        CorruptError: A tensor's checksum differs from what the source's manifest says.
    """
    reader = ShardReader(source)
    reader.read_metadata()
    old = reader.manifest
    kinds = {"model": [n for n in old.tensors if "/" not in n]}
    if not only_weights:
        kinds["optimizer"] = [n for n in old.tensors if "/" in n]
    totals: dict[str, int] = {}
    about: dict[str, tuple[int, str]] = {}
    for shard in range(shards):
        label = "" if shards == 1 else f"-{shard:05d}"
        for kind, names in kinds.items():
            pieces = [
                (name, piece)
                for name in sorted(names, key=lambda name: -old.tensors[name][1].itemsize)
                if (piece := _piece(*old.tensors[name][:2], shard, shards)) is not None
            ]
            if pieces or shards == 1:
                file = f"{kind}{label}.safetensors"
                about[file] = _rewrite_file(reader, folder / file, pieces, totals)
    for name, total in totals.items():
        if shown(total % 2**64) != old.tensors[name][2]:
            blamed = next(blame(reader, source, [name]), f"{source}: {name} was read wrongly")
            raise CorruptError(blamed)
    return replace(
        old, shards=about, ranks=shards,
        tensors={name: value for name, value in old.tensors.items() if name in totals},
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of a tensor, to be read when they are written."""

    whole: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _piece(shape: tuple[int, ...], dtype: torch.dtype, shard: int, shards: int) -> _Piece | None:
    if shards == 1 or not shape:
        return (
            None
            if shard
            else _Piece(whole=shape, dtype=dtype, offsets=(0,) * len(shape), sizes=shape)
        )
    first, last = (shape[0] * edge // shards for edge in (shard, shard + 1))
    if first == last:
        return None
    rest = len(shape) - 1
    return _Piece(
        whole=shape, dtype=dtype, offsets=(first, *(0,) * rest), sizes=(last - first, *shape[1:])
    )


def _rewrite_file(
    reader: ShardReader, path: Path, pieces: list[tuple[str, _Piece]], totals: dict[str, int]
) -> tuple[int, str]:
    """Two passes over the source: one for the checksums, which stand first in a file, one for the data."""
    described: dict[str, Any] = {}
    sums: dict[str, str] = {}
    start = 0
    for name, piece in pieces:
        box = Box(piece.offsets, piece.sizes, ())
        entry = _Entry(name=name, whole=piece.whole, box=box, dtype=piece.dtype, start=start)
        bounds = [start, start + entry.nbytes]
        described[entry.key] = {
            "dtype": _NAMES[piece.dtype], "shape": list(piece.sizes), "data_offsets": bounds,
        }  # fmt: skip
        value = checksum(_gathered(reader, name, piece), piece.offsets)
        totals[name] = totals.get(name, 0) + value
        sums[entry.key] = shown(value)
        start = bounds[1]
    stretches = (
        _gathered(reader, name, piece).reshape(-1).view(torch.uint8) for name, piece in pieces
    )
    return write_shard(path, described, sums, stretches)


def _gathered(reader: ShardReader, name: str, piece: _Piece) -> Tensor:
    memory = torch.empty(piece.sizes, dtype=piece.dtype)
    held = Held(piece.whole, piece.dtype, (HeldPart(piece.offsets, memory),))
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if memory.numel():
        planner.set_up_planner({name: held}, reader.metadata_of(name))
        reader.read_data(planner.create_local_plan(), planner)
    return memory
