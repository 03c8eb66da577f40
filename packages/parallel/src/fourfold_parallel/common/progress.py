"""Progress as a value: libraries call it, the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """Told how far a piece of work has come."""

    def __call__(self, done: int, total: int, note: str) -> None:
        """`done` of `total` steps; `note` is a few words, such as the current loss."""
        ...


def silent(done: int, total: int, note: str) -> None:
    """Say nothing."""
