"""A small run on text made here, so that no test waits for a corpus."""

from pathlib import Path

import pytest

from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs

TEXT = "the grid holds four axes and every axis carries one kind of split of the work"
WORDS = tuple(TEXT.split())


def write_corpus(folder: Path) -> tuple[str, ...]:
    """Ten documents of 400 words in a fixed, aperiodic order."""
    paths = []
    for document in range(10):
        words = [WORDS[(i * i + 7 * i * document + document) % len(WORDS)] for i in range(400)]
        path = folder / f"document-{document}.txt"
        path.write_text(" ".join(words), encoding="utf-8")
        paths.append(str(path))
    return tuple(paths)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this session only, shared by its tests."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FOURFOLD_CACHE", str(base))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return TextFiles(paths=write_corpus(tmp_path_factory.mktemp("corpus")), licence="made here")


@pytest.fixture
def small_run(corpus: TextFiles) -> Run:
    return Run(
        name="small",
        model=Llama(
            width=32, depth=2, heads=4, kv_heads=2, hidden=64, vocabulary=320, context=32, tied=True
        ),
        data=Packed(corpus=corpus, tokenizer=BytePairs(vocabulary=320), held_out=0.1),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=2, floor=0.1),
        horizon=Steps(count=6),
        batch=8,
        microbatch=8,
        sequence=24,
        max_grad_norm=0.5,
        precision="fp32",
        engine=Single(),
        seed=3,
        validate_every=4,
        checkpoint_every=2,
    )
