"""`fourfold certify`: what it finds, what it says, and how it ends."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaMLP

from fourfold_parallel.__main__ import main
from fourfold_parallel.certify.certificate import Certificate, certify
from fourfold_parallel.certify.compare import QUANTITIES, GridOutcome, on_grids, worst_of
from fourfold_parallel.certify.page import write_page
from fourfold_parallel.certify.toys import default_toy
from fourfold_parallel.testing.ranks import run_on_ranks

EQUAL = GridOutcome(result="equal", differences=dict.fromkeys(QUANTITIES, 1e-15))


def certificate(**changes: Any) -> Certificate:
    """Of two grids, made up."""
    grids = {"float64": {(1, 1, 1, 2): EQUAL, (1, 1, 2, 1): EQUAL}}
    base: Any = {
        "model": "m", "model_type": "llama", "ranks": 2, "dtypes": ("float64",), "grids": grids,
        "pairs": {((1, 1, 1, 2), (1, 1, 2, 1)): GridOutcome(result="equal")},
    }  # fmt: skip
    return Certificate(**{**base, **changes})


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["fourfold", "certify", *words])
    main()


def test_a_published_configuration_is_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every grid of two ranks in both formats, four pairs, a table, a page and JSON."""
    fields = {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    call(monkeypatch, str(tmp_path / "config.json"), "--ranks", "2", "--out", str(tmp_path))
    shown = capsys.readouterr().out
    assert "4 of 4 pairs bit for bit" in shown
    assert "the certificate holds: 12 equal" in shown
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert found["holds"]
    assert found["grids"]["float64"].keys() == {"data=2", "depth=2", "row=2", "col=2"}
    exact = [o["differences"] for o in found["grids"]["float64"].values()]
    coarse = [o["differences"] for o in found["grids"]["bfloat16"].values()]
    assert max(max(of.values()) for of in exact) < 1e-12
    assert min(of["logits"] for of in coarse) > 1e-4
    assert found["toy"]["tie_word_embeddings"]
    page = (tmp_path / "certificate.html").read_text()
    assert "Largest difference over all grids" in page
    assert not re.search(r"""(src|href)="https?:""", page)  # one file, nothing fetched


def test_a_certificate_holds_where_something_is_equal_and_nothing_is_wrong() -> None:
    assert certificate().holds
    assert certificate().verdict == "holds: 3 equal"
    refused = GridOutcome(result="refused", message="heads do not divide")
    wrong = replace(EQUAL, result="wrong")
    one = (1, 1, 1, 2)
    assert certificate(grids={"float64": {one: EQUAL, (1, 1, 2, 1): refused}}).holds
    assert not certificate(grids={"float64": {one: EQUAL, (1, 1, 2, 1): wrong}}).holds
    assert not certificate(grids={"float64": {one: refused}}, pairs={}).holds
    assert not certificate(pairs={(one, one): replace(wrong, result="crash")}).holds


def test_a_certificate_that_does_not_hold_ends_with_status_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(EQUAL, result="wrong", where="model.norm.weight")
    found = certificate(grids={"float64": {(1, 1, 2, 1): broken}})
    monkeypatch.setattr("fourfold_parallel.certify.certificate.certify", lambda *_, **__: found)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "m", "--out", str(tmp_path))
    assert ended.value.code == 1
    assert "wrong at model.norm.weight" in capsys.readouterr().out
    write_page(found, tmp_path / "page.html")
    assert "does not hold: 1 equal, 1 wrong" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.json",), "nowhere.json is no file"),
        (("here.json", "--ranks", "17"), "ranks=17 is none or more than the 16"),
        (("vit.json",), "vit is no causal language model"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    (tmp_path / "here.json").write_text('{"model_type": "llama"}')
    (tmp_path / "vit.json").write_text('{"model_type": "vit"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def with_a_fault(size: float) -> list[GridOutcome]:
    """Outcomes of a Llama whose hidden units are a little larger on the grid; on every rank."""
    plain = LlamaMLP.forward

    def larger(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(mlp, x) * (1 + size * isinstance(mlp.down_proj.weight, DTensor))

    LlamaMLP.forward = larger
    try:
        config = default_toy("llama")
        return on_grids(config, [(1, 1, 1, 2)], torch.float64, {"checks": False})
    finally:
        LlamaMLP.forward = plain


def test_a_fault_of_a_millionth_is_found() -> None:
    """Each quantity shows it, as large as it is; without it there is nothing."""
    for size, result in ((0.0, "equal"), (1e-6, "wrong")):
        [outcome] = map(worst_of, zip(*run_on_ranks(2, with_a_fault, size=size), strict=True))
        assert outcome.result == result
    assert all(1e-9 < outcome.differences[name] < 1e-4 for name in QUANTITIES)


def test_ranks_that_disagree_about_a_refusal_are_a_crash() -> None:
    refused = GridOutcome(result="refused", message="no")
    assert worst_of([refused, refused]).result == "refused"
    assert worst_of([EQUAL, refused]).result == "crash"
    further = replace(EQUAL, differences={**EQUAL.differences, "loss": 1e-12})
    assert worst_of([further, EQUAL]).differences["loss"] == 1e-12


def test_what_one_process_holds_is_certified_on_one_rank() -> None:
    found = certify(default_toy("gpt2"), ranks=1, dtypes=("float64",))
    assert found.holds
    assert [*found.grids["float64"]] == [(1, 1, 1, 1)]
