"""Against values computed with the authors' published code, and against transformers' own attention."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourfold_loki import Basis, Budget, Count, Sparse, attending, read_published
from fourfold_loki.attention import attend
from fourfold_loki.basis import Label, PublishedSource
from fourfold_loki.selectors import H2O, Candidates, Exact, Loki, Selector

FLOAT32 = 2e-5
"""The golden outputs are float32 sums in another order."""
LOGITS = 1e-4
"""Across two major versions of transformers; the full model's logits differ by 2e-7."""


@pytest.fixture(scope="module")
def masks(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "loki_masks.safetensors")


def kept(
    selector: Selector, masks: dict[str, torch.Tensor], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep mask and output of a selector on the golden queries, as in the published protocol."""
    queries, keys = masks["q"], masks["k"]
    visible = masks["causal_mask"] == 0
    scaling = queries.shape[-1] ** -0.5
    budget = Budget(amount=Count(keys=count), selection="per head")
    among = Candidates(
        queries=queries,
        keys=keys,
        visible=visible,
        scaling=scaling,
        layer=0,
        turned=False,
        past_mass=torch.zeros(queries.shape[0], queries.shape[1], keys.shape[2]),
        allowance=torch.full(visible.shape[:-1], count),
    )
    scores = selector.scores(among)
    keep = budget.keep(scores, visible, kv_heads=keys.shape[1], layer=0)
    return keep, attend(queries, keys, masks["v"], keep, scaling=scaling)


def golden_basis(masks: dict[str, torch.Tensor]) -> Basis:
    maps = masks["P"]
    return Basis(
        query_maps=maps,
        key_maps=maps,
        spectra=torch.ones(maps.shape[:-1]),
        label=Label(kind="pca", stage="after rotary", source=PublishedSource(folder="golden")),
    )


@pytest.mark.parametrize("width", [4, 8, 16, 32])
@pytest.mark.parametrize("count", [12, 24, 48, 96])
def test_masks_and_outputs_are_the_published_ones(
    masks: dict[str, torch.Tensor], width: int, count: int
) -> None:
    keep, output = kept(Loki(basis=golden_basis(masks), widths=(width,)), masks, count)
    causal = masks["causal_mask"] == 0
    assert torch.equal(keep, masks[f"loki_d{width}_k{count}_keep"] & causal)
    torch.testing.assert_close(
        output, masks[f"loki_d{width}_k{count}_out"], atol=FLOAT32, rtol=FLOAT32
    )


@pytest.mark.parametrize("count", [12, 24, 48])
def test_exact_top_k_is_the_published_one(masks: dict[str, torch.Tensor], count: int) -> None:
    _, output = kept(Exact(), masks, count)
    torch.testing.assert_close(output, masks[f"topk_k{count}_out"], atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("heavy", [12, 24])
def test_h2o_evicts_what_the_published_code_evicts(
    masks: dict[str, torch.Tensor], heavy: int
) -> None:
    """Heavy and recent keys, `heavy` of each."""
    keep, output = kept(H2O(), masks, 2 * heavy)
    assert torch.equal(keep, masks[f"h2o_r{heavy}_keep"])
    torch.testing.assert_close(output, masks[f"h2o_r{heavy}_out"], atol=FLOAT32, rtol=FLOAT32)


@pytest.fixture(scope="module")
def tiny(golden: Path) -> PreTrainedModel:
    """In float64: one of the golden selections hangs on the sixth decimal of a float32 score."""
    facts = json.loads((golden / "tiny_llama_config.json").read_text())
    names = (
        "vocab_size max_position_embeddings hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings"
    )
    config = LlamaConfig(**{name: facts[name] for name in names.split()})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(golden / "tiny_llama.safetensors"))
    return model.double()


@pytest.fixture(scope="module")
def values(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "tiny_llama_golden.safetensors")


@torch.no_grad()
def logits(
    model: PreTrainedModel, selector: Selector, share: float, ids: torch.Tensor
) -> torch.Tensor:
    """Every query masked, int(share * length) keys for each, selected per query head."""
    budget = Budget(amount=Count(keys=int(share * ids.shape[1])), selection="per head")
    mode = Sparse(selector=selector, budget=budget, reach="every query")
    with attending(model, mode):
        return model(ids).logits.float()


def golden_cases() -> list[tuple[str, str, float]]:
    return [
        (stage, width, share)
        for stage in ("pre", "post")
        for width in ("2", "4", "8", "16", "0.9")
        for share in (0.125, 0.25, 0.5, 1.0)
    ]


@pytest.mark.parametrize(("stage", "width", "share"), golden_cases())
def test_a_whole_model_gives_the_published_logits(
    tiny: PreTrainedModel,
    values: dict[str, torch.Tensor],
    golden: Path,
    stage: str,
    width: str,
    share: float,
) -> None:
    """All 40 cases, with the transforms read from the published layout.

    A width below 1 is a share of the variance, counted one short by the published code.
    """
    basis = read_published(
        golden / "pca" / "tiny-PCA" / "wikitext",
        stage="after rotary" if stage == "post" else "before rotary",
    )
    if "." in width:
        widths = basis.widths_for(float(width), reference_off_by_one=True)
        facts = json.loads((golden / "tiny_llama_golden.json").read_text())
        assert list(widths) == facts[f"loki.{stage}rotary.r{width}.k{share}"]["d_used"]
    else:
        widths = (int(width),) * basis.layers
    ours = logits(tiny, Loki(basis=basis, widths=widths), share, values["input_ids"])
    theirs = values[f"loki.{stage}rotary.r{width}.k{share}"]
    torch.testing.assert_close(ours, theirs, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_a_whole_model_with_exact_top_k(
    tiny: PreTrainedModel, values: dict[str, torch.Tensor], share: float
) -> None:
    ours = logits(tiny, Exact(), share, values["input_ids"])
    torch.testing.assert_close(ours, values[f"topk.k{share}"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("heavy", [0.0625, 0.125, 0.25])
def test_a_whole_model_with_h2o(
    tiny: PreTrainedModel, values: dict[str, torch.Tensor], heavy: float
) -> None:
    ours = logits(tiny, H2O(), 2 * heavy, values["input_ids"])
    torch.testing.assert_close(ours, values[f"h2o.h{heavy}"], atol=LOGITS, rtol=0)


def test_the_basis_that_we_fit_is_the_published_one(
    tiny: PreTrainedModel, values: dict[str, torch.Tensor]
) -> None:
    """Principal directions up to sign, and their shares of the variance, of both stages."""
    from fourfold_loki import fit
    from fourfold_loki.calibration import calibrate_tokens

    statistics = calibrate_tokens(tiny, values["calib_ids"])
    for stage, name in (("after rotary", "postrotary"), ("before rotary", "prerotary")):
        basis = fit(statistics, "pca", stage)  # type: ignore[arg-type]
        for layer in range(2):
            theirs = values[f"{name}.pca_components.{layer}"].mT
            overlap = (basis.query_maps[layer] * theirs).sum(-2).abs()
            torch.testing.assert_close(overlap, torch.ones_like(overlap), atol=2e-3, rtol=0)
            shares = basis.spectra[layer] / basis.spectra[layer].sum(-1, keepdim=True)
            published = values[f"{name}.pca_explained_variance.{layer}"]
            torch.testing.assert_close(shares, published, atol=1e-4, rtol=0)
