"""Reading Parquet; needs the extra `fourfold-gemstones[parquet]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Columns of a Parquet file by name."""
    return pyarrow.parquet.read_table(path).to_pydict()
