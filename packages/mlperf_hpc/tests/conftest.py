"""A small run on text made here, so that no test waits for a corpus."""

from pathlib import Path

import pytest

from fourfold_parallel.run.recipe import Run
from fourfold_parallel.storm.study import small_run as storm_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this session only, shared by its tests."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FOURFOLD_CACHE", str(base))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture
def small_run(corpus: Path) -> Run:
    """A little Llama of a little text, in one process."""
    from dataclasses import replace

    from fourfold_parallel.run.engines import Single

    return replace(
        storm_run(corpus, steps=6), engine=Single(), validate_every=4, checkpoint_every=2
    )
