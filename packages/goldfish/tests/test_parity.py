"""Every published case: 243 masks computed with the authors' code, and the two deployed variants."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fourfold_goldfish import Goldfish
from fourfold_goldfish.other_hashes import mix_low_half
from fourfold_goldfish.reproduce.recipes import APERTUS, APERTUS_2, AUTHORS

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "goldfish"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden/goldfish is not beside this checkout"
)


def golden(name: str) -> torch.Tensor:
    with safe_open(GOLDEN / "goldfish_golden.safetensors", "pt") as file:
        return file.get_tensor(name)


def facts() -> dict[str, Any]:
    return json.loads((GOLDEN / "goldfish_golden.json").read_text())


def ours(case: dict[str, Any]) -> Goldfish:
    """Our value for a published case."""
    k = case["k"]
    match case["strategy"]:
        case "hash-table" | "hash-avalanche" as strategy:
            return Goldfish(
                k=k,
                context=case["h"],
                hash="reference" if strategy == "hash-table" else "avalanche",
                window="inclusive",
                boundary="straddle",
            )
        case "static":
            return Goldfish(k=k, context=1, hash="static", key=case["start"])
        case "seeded_random":
            return Goldfish(k=k, context=1, hash="random", key=case["seed"])
    raise AssertionError(case["strategy"])


COUNTS = {"hash-table": 128, "hash-avalanche": 76, "static": 30}


@needs_golden
@pytest.mark.parametrize("strategy", COUNTS)
def test_every_published_mask_is_reproduced(strategy: str) -> None:
    """Bit for bit, targets that were ignored before included."""
    cases = [case for case in facts()["cases"] if case["strategy"] == strategy]
    for case in cases:
        targets = golden(f"in/{case['input']}")
        expected = golden(f"drop/{case['key']}")
        assert torch.equal(ours(case).drop(targets) | (targets == -100), expected), case["key"]
        assert int((expected & (targets != -100)).sum()) == case["n_drop"]
    assert len(cases) == COUNTS[strategy]


@needs_golden
def test_the_nine_masks_of_the_broken_strategies_are_not_masks() -> None:
    """As executed they ignore rows 0 and 1 and nothing else; ours is the random mask that was meant."""
    broken = [case for case in facts()["cases"] if case["strategy"] not in COUNTS]
    for case in broken:
        executed = golden(f"drop/{case['key']}")
        assert bool(executed[:2].all())
        assert not bool(executed[2:].any())
        if case["strategy"] == "seeded_random":
            targets = golden(f"in/{case['input']}")
            assert torch.equal(ours(case).drop(targets), golden(f"intended/{case['key']}"))
    assert len(broken) == 9
    assert len(broken) + sum(COUNTS.values()) == 243


@needs_golden
def test_the_table_and_the_avalanche_are_the_published_ones() -> None:
    """The table's digest, on this torch, and the hash's published inputs and outputs."""
    table_facts = facts()["hash_table"]
    generator = torch.Generator("cpu").manual_seed(table_facts["seed"])
    table = torch.rand(table_facts["size"], generator=generator)
    assert hashlib.sha256(table.numpy().tobytes()).hexdigest() == table_facts["sha256"]
    assert torch.equal(mix_low_half(golden("hashint/in_int64")), golden("hashint/out"))


@needs_golden
def test_the_published_loss_and_gradient_follow() -> None:
    """Cross-entropy over what our mask keeps: the published loss, and zero rows where it drops."""
    targets = golden("loss/targets").long()
    logits = golden("loss/logits").requires_grad_()
    ignored = targets == -100
    for name, k, context in (("hash_k4_h4", 4, 4), ("hash_k4_h13", 4, 13), ("hash_k2_h13", 2, 13)):
        goldfish = Goldfish(
            k=k, context=context, hash="reference", window="inclusive", boundary="straddle"
        )
        kept = targets.masked_fill(goldfish.drop(targets) | ignored, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), kept.flatten())
        [gradient] = torch.autograd.grad(loss, logits)
        published = facts()["losses"][name]
        # float32 sums in another order than the published chunks of 128 rows.
        assert loss.item() == pytest.approx(published["loss"], rel=1e-6)
        assert int((gradient.flatten(0, 1) == 0).all(-1).sum()) == published["n_zero_rows"]
        if name == "hash_k4_h13":
            torch.testing.assert_close(gradient, golden("loss/grad/hash_k4_h13"))


def deployed(labels: np.ndarray, *, is_dot: bool) -> np.ndarray:
    """Apertus' masks as its datasets compute them, one row at a time, from their descriptions."""
    generator = torch.Generator().manual_seed(2971215073)
    table = torch.rand(1_000_003, generator=generator)
    windows = torch.from_numpy(labels).unfold(0, 50, 1)
    if is_dot:
        generator = torch.Generator().manual_seed(2971215073 + 50)
        odd = torch.randint(0, 2**62, (50,), dtype=torch.int64, generator=generator) | 1
        keys = (windows * odd).sum(dim=-1)
    else:
        keys = windows.prod(dim=-1)
    dropped = np.zeros(len(labels), dtype=bool)
    dropped[49:] = (table[keys % 1_000_003] < 1 / 50).numpy()
    return dropped


@pytest.mark.parametrize("is_dot", [False, True], ids=["apertus", "apertus2"])
def test_the_deployed_variants_are_reproduced(is_dot: bool) -> None:
    """Both generations of Apertus, at their k = 50 and h = 50, padding and exempt ids included."""
    random = np.random.default_rng(5)
    for _ in range(40):
        labels = random.integers(0, 131_072, 600)
        labels[550:] = 0  # the first generation turns its padding, -1, into 0 before it hashes
        expected = deployed(labels, is_dot=is_dot)
        if is_dot:
            exempt = (0, *labels[100:200].tolist())
            goldfish = APERTUS_2(exempt=exempt)
            expected &= ~np.isin(labels, exempt)
        else:
            labels[550:] = -1
            goldfish = APERTUS
        assert np.array_equal(goldfish.drop(torch.from_numpy(labels)[None])[0].numpy(), expected)


def test_the_authors_settings_are_the_published_ones() -> None:
    assert (AUTHORS.k, AUTHORS.context, AUTHORS.hash) == (4, 13, "reference")
