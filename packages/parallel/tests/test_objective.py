"""Masks that packages announce to one another through the runtime."""

from pathlib import Path

import pytest
import torch

from fourfold_parallel.run.objective import announced_mask

PLUGIN = """
import torch


class EveryKth:
    def __init__(self, *, k, exempt):
        self.k, self.exempt = k, exempt

    def drop(self, tokens, document_ids=None):
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return (places % self.k == 0) & ~torch.isin(tokens, torch.tensor(self.exempt))
"""


def test_a_mask_is_found_where_a_package_announces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the entry point alone: nothing here imports the package."""
    (tmp_path / "every_kth.py").write_text(PLUGIN)
    facts = tmp_path / "every_kth-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: every_kth\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[fourfold.target_masks]\nevery-kth = every_kth:EveryKth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mask = announced_mask("every-kth", k=3, exempt=(7,))
    dropped = mask.drop(torch.tensor([[7, 1, 2, 3, 4, 5, 6]]))
    assert dropped.tolist() == [[False, False, False, True, False, False, True]]


def test_an_unknown_mask_is_refused_with_the_package_that_would_bring_it() -> None:
    with pytest.raises(ValueError, match="install fourfold-nobody"):
        announced_mask("nobody", k=4)
