"""Laws of files: whole or absent, whoever else writes them."""

import json
from pathlib import Path

from fourfold_parallel.common.files import whole_folder, write_text


def test_the_folder_that_came_first_is_kept(tmp_path: Path) -> None:
    """Two fill a folder at once: what the first one's readers have open stays where it is."""
    path = tmp_path / "made"
    with whole_folder(path) as ours:
        write_text(ours / "meta.json", "1")
        with whole_folder(path) as theirs:
            write_text(theirs / "meta.json", "2")
        opened = path.stat().st_ino
    assert path.stat().st_ino == opened
    assert json.loads((path / "meta.json").read_text()) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]
