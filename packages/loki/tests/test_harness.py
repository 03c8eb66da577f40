"""lm-evaluation-harness under a selection: its log-likelihoods are those of the masked model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fourfold_loki import Budget, Share, Sparse, Statistics, attending, fit
from fourfold_loki.selectors import Loki

pytest.importorskip("lm_eval", reason="needs lm-eval, the extra [evaluation] of this package")

FLOAT32 = 1e-3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    known = {"<pad>": 0, "<end>": 1} | {f"w{n}": n for n in range(2, 97)}
    made = Tokenizer(WordLevel(known, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<pad>", eos_token="<end>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def lm(
    make_llama: Callable[..., PreTrainedModel],
    statistics: Statistics,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    from fourfold_loki.evaluate.harness import LokiLM

    file = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    fit(statistics).save(file)
    return LokiLM(
        pretrained=make_llama(), tokenizer=tokenizer, basis=str(file), batch_size=2, max_length=64
    )


def words(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def test_it_scores_as_the_masked_model(
    lm: Any, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    """A quarter of the visible keys at every query, as in the published evaluations."""
    from lm_eval.api.instance import Instance

    ids = tokens(2, 40)
    pairs = [(words(row[:30].tolist()), " " + words(row[30:].tolist())) for row in ids]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    scores = [score for score, _ in lm.loglikelihood(requests)]
    mode = Sparse(
        selector=Loki(basis=fit(statistics), widths=(4, 4)),
        budget=Budget(amount=Share(of_visible=0.25)),
        reach="every query",
    )
    with attending(lm.model, mode), torch.no_grad():
        logits = lm.model(ids, use_cache=False).logits.log_softmax(-1)
    with torch.no_grad():
        dense = lm.model(ids, use_cache=False).logits.log_softmax(-1)
    for row, score in enumerate(scores):
        ours, full = (
            float(each[row, 29:-1].gather(1, ids[row, 30:, None]).sum()) for each in (logits, dense)
        )
        assert score == pytest.approx(ours, abs=FLOAT32)
        assert abs(score - full) > 10 * FLOAT32
    assert 0.2 < lm.reads.share < 0.35


def test_a_task_of_local_text_runs_without_a_hub(
    lm: Any, tokenizer: Any, tokens: Callable[..., Tensor]
) -> None:
    """The right answer moves from choice to choice, and is the window's own end."""
    from fourfold_loki.evaluate.harness import asked, continuations, task_manager

    windows = tokens(5, 24)
    task = continuations(tokenizer, windows, answer=6, choices=3)
    documents = task["custom_dataset"]()["test"]
    assert [document["right"] for document in documents] == [0, 1, 2, 0, 1]
    for document, window in zip(documents, windows, strict=True):
        assert document["choices"][document["right"]] == words(window[-6:].tolist())
        assert len(set(document["choices"])) == 3
    results = asked(lm, [task], task_manager([], ()), questions=9)
    assert 0 <= results["results"]["continuations"]["acc,none"] <= 1
    assert results["n-samples"]["continuations"]["effective"] == 5
    with pytest.raises(ValueError, match="at least as many windows"):
        continuations(tokenizer, windows, answer=6, choices=9)
