"""Checkpoints before a person: what is there, whether it is sound, and what can be made of it."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fourfold_parallel.run import checkpoint, shards
from fourfold_parallel.run.shards import CorruptError, Manifest


def found(folder: Path) -> list[Path]:
    """The checkpoints at a place: itself, or those in it, oldest first.

    Raises:
        ValueError: There is none.
    """
    if (folder / shards.MANIFEST).is_file():
        return [folder]
    whole = sorted(path.parent for path in folder.glob(f"step-*/{shards.MANIFEST}"))
    if not whole:
        raise ValueError(
            f"{folder} is no checkpoint and holds none; name a folder step-…, or the one they lie in"
        )
    return whole


def show(folder: Path, target: Console) -> None:
    """Print a line for each checkpoint: step, ranks, shards, bytes, and what stands in its way."""
    table = Table(
        "checkpoint", "step", "ranks", "engine", "files", "GB", "read by from_pretrained", box=None
    )
    pointer = folder / checkpoint.LATEST
    last = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    for path in found(folder):
        name = f"{path.name} (latest)" if path.name == last else path.name
        try:
            about = Manifest.read(path)
        except ValueError as error:
            table.add_row(name, "", "", "", "", "", str(error))
            continue
        engine = str(about.run.get("engine", {}).get("type", "")).rpartition("/")[2]
        gigabytes = sum(nbytes for nbytes, _ in about.shards.values()) / 1e9
        is_plain = (path / shards.PLAIN).is_file() and (path / "config.json").is_file()
        table.add_row(
            name, str(about.step), str(about.ranks), engine, str(len(about.shards)),
            f"{gigabytes:.3g}", "yes" if is_plain else "after export",
        )  # fmt: skip
    target.print(table)


def verify(folder: Path, target: Console) -> None:
    """Read every byte of the checkpoints at a place, and compare it with its checksum.

    Raises:
        ValueError: Something is not what was written; the first fault is named, all are printed.
    """
    wrong: list[str] = []
    for path in found(folder):
        told = list(_faults(path))
        target.print(f"{path}: {'sound' if not told else f'{len(told)} faults'}", soft_wrap=True)
        for fault in told:
            target.print(f"  {fault}", soft_wrap=True)
        wrong += told
    if wrong:
        raise ValueError(
            f"{wrong[0]}; {len(wrong)} faults in all. A run passes such a checkpoint over and goes on from "
            "the one before"
        )


def _faults(path: Path) -> Iterator[str]:
    try:
        yield from shards.faults(path)
    except CorruptError:
        raise
    except ValueError as error:
        yield str(error)


def newest(folder: Path) -> Path:
    """The last checkpoint at a place."""
    return found(folder)[-1]
