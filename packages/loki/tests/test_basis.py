"""Laws of bases and of the moments they are fitted to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import Basis, Statistics, fit, read_published
from fourfold_loki.attention import approximate_scores, most_relevant, scores_of
from fourfold_loki.basis import Kind, PublishedSource
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.moments import CalibrationSource, Moments, rank_of
from fourfold_parallel.common.values import from_json

KINDS: tuple[Kind, ...] = ("pca", "pca_uncentred", "balanced")
MAPS = 1e-5
"""Float32 maps of a float64 fit; the condition of a balanced map is about ten."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_maps_of_a_basis_undo_each_other(statistics: Statistics, kind: Kind) -> None:
    """W W^-1 = I, so scores of all coordinates are exact."""
    basis = fit(statistics, kind)
    product = basis.query_maps @ basis.key_maps.mT
    eye = torch.eye(basis.head_width).expand_as(product)
    torch.testing.assert_close(product, eye, atol=MAPS, rtol=0)


def score_errors(basis: Basis, statistics: Statistics, width: int) -> Tensor:
    """E (q k^T - ŝ)² by layer and head, for queries and centred keys of these moments."""
    queries = statistics.queries.covariance(centred=False)
    keys = statistics.keys.covariance(centred=True)
    lead = basis.query_maps[..., :width].double() @ basis.key_maps[..., :width].double().mT
    rest = torch.eye(basis.head_width, dtype=torch.float64) - lead
    return torch.einsum("lhij,lhij->lh", queries, rest @ keys @ rest.mT)


@pytest.mark.parametrize("width", [1, 4, 12])
def test_a_balanced_basis_has_the_least_score_error_and_states_it(
    statistics: Statistics, width: int
) -> None:
    """Its error is the sum of the σ² left out, below that of every other basis."""
    balanced = fit(statistics, "balanced")
    error = score_errors(balanced, statistics, width)
    stated = balanced.spectra[..., width:].double().sum(-1)
    torch.testing.assert_close(error, stated, rtol=1e-3, atol=1e-3)
    for kind in ("pca", "pca_uncentred"):
        assert (error <= score_errors(fit(statistics, kind), statistics, width)).all()  # type: ignore[arg-type]


def test_centring_drops_the_attention_sink_and_the_other_bases_keep_it() -> None:
    """The finding in miniature: all keys share a large mean but one, which queries favour for lacking it.

    Centred PCA spends its coordinates on what varies and cannot see the mean; the uncentred basis begins
    with it. 300 tokens, 16 coordinates, 4 of them ranked.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.3, 16)
    mean = torch.zeros(16)
    mean[12] = 8.0
    keys = torch.randn(1, 1, 300, 16, generator=generator) * spread + mean
    keys[:, :, 0] = 0.0  # the sink
    queries = torch.randn(1, 1, 300, 16, generator=generator) * 0.2 - mean
    moments = [Moments.empty(1, 1, 16) for _ in range(4)]
    for each, vectors in zip(moments, (keys, queries, keys, queries), strict=True):
        each.add_(0, vectors)
    source = CalibrationSource(model="made here", corpora=(), tokens=300)
    statistics = Statistics(
        keys=moments[0],
        queries=moments[1],
        keys_before=moments[2],
        queries_before=moments[3],
        source=source,
    )
    kept = {}
    everything = torch.ones(1, 1, 300, 300, dtype=torch.bool)
    for kind in KINDS:
        rotation = fit(statistics, kind).rotation(0)
        scores = approximate_scores(
            rotation.turn_queries(queries), rotation.turn_keys(keys), width=4, scaling=1.0
        )
        keep = most_relevant(scores, everything, torch.full((1, 1, 300), 30))
        kept[kind] = float(keep[..., 0].float().mean())
    assert scores_of(queries, keys, scaling=1.0).argmax(-1).eq(0).all()
    assert kept["pca"] < 0.3
    assert kept["pca_uncentred"] > 0.95
    assert kept["balanced"] > 0.95


def test_moments_of_parts_are_the_moments_of_the_whole(
    llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    ids = tokens(4, 64)
    whole = calibrate_tokens(llama, ids)
    parts = calibrate_tokens(llama, ids[:1]) + calibrate_tokens(llama, ids[1:])
    assert parts.source.tokens == whole.source.tokens == 256
    for ours, theirs in zip(
        (parts.keys, parts.queries_before), (whole.keys, whole.queries_before), strict=True
    ):
        torch.testing.assert_close(ours.outer, theirs.outer)
        torch.testing.assert_close(ours.total, theirs.total)


def test_keys_before_rotary_are_what_the_projection_gives(
    llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """Turned back by the angles of their positions."""
    ids = tokens(2, 48)
    seen: list[Tensor] = []
    attention = llama.model.layers[1].self_attn
    handle = attention.k_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    statistics = calibrate_tokens(llama, ids)
    handle.remove()
    # Shorter calls are those that find out whether the embedding can be undone.
    whole = [keys for keys in seen if keys.shape[1] == 48]
    keys = torch.cat(whole).unflatten(-1, (2, 16)).transpose(1, 2)
    expected = Moments.empty(2, 2, 16)
    expected.add_(1, keys)
    torch.testing.assert_close(
        statistics.keys_before.outer[1], expected.outer[1], rtol=1e-4, atol=1e-2
    )
    assert (statistics.keys.outer[1] - expected.outer[1]).abs().max() > 1


def test_rank_counts_directions_and_the_published_plots_show_one_less() -> None:
    spectrum = torch.tensor([[6.0, 3.0, 0.5, 0.5]])
    assert [int(rank_of(spectrum, share)) for share in (0.5, 0.6, 0.61, 0.9, 0.91, 1.0)] == [
        1, 1, 2, 2, 3, 4,
    ]  # fmt: skip
    moments = Moments(
        torch.full((1, 1), 10.0).double(),
        torch.zeros(1, 1, 4).double(),
        torch.diag(torch.tensor([60.0, 30.0, 5.0, 5.0])).double()[None, None],
    )
    assert moments.rank(0.85).tolist() == [[2]]
    assert moments.rank(0.85, reference_index=True).tolist() == [[1]]
    with pytest.raises(ValueError, match=r"share=1\.5"):
        moments.rank(1.5)


def test_files_give_back_what_was_saved(statistics: Statistics, tmp_path: Path) -> None:
    basis = fit(statistics)
    basis.save(str(tmp_path / "basis.safetensors"))
    statistics.save(str(tmp_path / "statistics.safetensors"))
    again = Basis.load(str(tmp_path / "basis.safetensors"))
    assert again.label == basis.label
    assert torch.equal(again.query_maps, basis.query_maps)
    assert torch.equal(again.key_maps, basis.key_maps)
    moments = Statistics.load(tmp_path / "statistics.safetensors")
    assert moments.source == statistics.source
    assert torch.equal(moments.keys.outer, statistics.keys.outer)
    with pytest.raises(ValueError, match=r"not written by Basis\.save"):
        Basis.load(tmp_path / "statistics.safetensors")
    (tmp_path / "text.txt").write_text("hello")
    for kind in (Basis, Statistics):
        with pytest.raises(ValueError, match=r"text\.txt was not written by"):
            kind.load(tmp_path / "text.txt")
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="holds no pca_components"):
            read_published(folder)


def test_files_of_before_name_their_source_otherwise() -> None:
    """As the first version tagged it, and as the second did."""
    facts = {"model": "a", "corpora": ["b"], "tokens": 1}
    expected = CalibrationSource(model="a", corpora=("b",), tokens=1)
    for tag in ("fourfold_loki.provenance:Calibrated", "loki/Calibrated", "loki/CalibrationSource"):
        assert from_json({"type": tag, **facts}) == expected
    published = from_json({"type": "fourfold_loki.provenance:Imported", "folder": "a/b"})
    assert published == PublishedSource(folder="a/b")


def test_statistics_of_two_models_do_not_add_up(
    statistics: Statistics,
    make_llama: Callable[..., PreTrainedModel],
    tokens: Callable[..., Tensor],
) -> None:
    other = make_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="do not add up"):
        statistics + calibrate_tokens(other, tokens(1, 32))


def test_a_model_and_its_bfloat16_copy_share_a_basis(
    llama: PreTrainedModel, make_llama: Callable[..., PreTrainedModel]
) -> None:
    from fourfold_loki.moments import fingerprint

    assert fingerprint(llama) == fingerprint(make_llama().bfloat16())
    assert fingerprint(llama) != fingerprint(make_llama(layers=3))
