"""Where the published data is, and a small synthetic suite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.runs import RunTable

PUBLISHED = Path(__file__).parents[3] / ".." / "shared" / "data" / "gemstones"


@pytest.fixture(scope="session")
def published() -> Path:
    """A copy of the published measurements and parameters."""
    if not PUBLISHED.is_dir():
        pytest.skip("needs a copy of the paper's data at ../shared/data/gemstones")
    return PUBLISHED


TRUTH = PowerLaw(
    variables=("parameters", "tokens"),
    log_coefficients=(5.0, 12.0),
    exponents=(0.27, 0.55),
    log_floor=0.65,
)


@pytest.fixture
def truth() -> PowerLaw:
    """A law in parameters and tokens, near the published one."""
    return TRUTH


@pytest.fixture
def suite() -> RunTable:
    """Twelve shapes, twelve checkpoints each, with losses of `truth` and an error per run."""
    shapes = [(256, 8), (256, 40), (384, 12), (512, 6), (512, 24), (768, 4)]
    shapes += [(768, 40), (1024, 16), (1280, 36), (1792, 7), (2048, 27), (3072, 12)]
    tokens = np.geomspace(5e9, 3e11, 12)
    width, depth, count = (
        np.asarray(column, dtype=float)
        for column in zip(*[(w, d, t) for w, d in shapes for t in tokens], strict=True)
    )
    parameters = GEMSTONES.parameters(width, depth)
    error = np.repeat(np.random.default_rng(7).normal(0, 0.01, len(shapes)), len(tokens))
    loss = TRUTH.loss({"parameters": parameters, "tokens": count}) * np.exp(error)
    return RunTable.from_columns(
        {
            "run": [f"{w:g}x{d:g}" for w, d in zip(width, depth, strict=True)],
            "width": width,
            "depth": depth,
            "parameters": parameters,
            "tokens": count,
            "loss_nats": loss,
        },
        architecture=GEMSTONES,
        source="synthetic suite",
    )
