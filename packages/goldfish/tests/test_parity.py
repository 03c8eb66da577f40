"""The reference hash against values computed with the authors' published code."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fourfold_goldfish import Goldfish

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "goldfish"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden/goldfish is not beside this checkout"
)


def test_every_published_mask_is_reproduced() -> None:
    """All cases of the hash-table strategy, bit for bit, ignored targets included."""
    cases = json.loads((GOLDEN / "goldfish_golden.json").read_text())["cases"]
    cases = [case for case in cases if case["strategy"] == "hash-table"]
    with safe_open(GOLDEN / "goldfish_golden.safetensors", "pt") as golden:
        for case in cases:
            targets = golden.get_tensor(f"in/{case['input']}")
            expected = golden.get_tensor(f"drop/{case['key']}")
            goldfish = Goldfish(
                k=case["k"],
                context=case["h"],
                hash="reference",
                window="inclusive",
                boundary="straddle",
            )
            ignored = targets == -100
            assert torch.equal(goldfish.drop(targets) | ignored, expected), case["key"]
            assert int((goldfish.drop(targets) | ignored).sum()) == int(expected.sum())
    assert len(cases) == 128


def test_the_table_is_the_published_one() -> None:
    """Its digest, on this torch."""
    facts = json.loads((GOLDEN / "goldfish_golden.json").read_text())["hash_table"]
    generator = torch.Generator("cpu").manual_seed(facts["seed"])
    table = torch.rand(facts["size"], generator=generator)
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == facts["sha256"]
