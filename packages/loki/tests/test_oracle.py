"""Algorithm 1 and PCAAttn as loops over single numbers, straight from the paper."""

import math

import pytest
import torch

from fourfold_loki import Statistics, fit
from fourfold_loki.attention import Rotation, attend, loki_attention
from fourfold_loki.selectors import Candidates, PcaAttention


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_algorithm_1_in_loops(heads: int, kv_heads: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    width, tokens, leading = 8, 9, 3
    queries = torch.randn(1, heads, 1, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(1, kv_heads, tokens, width, generator=generator, dtype=torch.float64)
    values = torch.randn(1, kv_heads, tokens, 5, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(kv_heads, width, width, dtype=torch.float64)).Q
    output = loki_attention(
        queries,
        keys,
        values,
        rotation=Rotation(basis, basis),
        width=leading,
        counts=torch.tensor([[[count]]]),
        visible=torch.ones(1, 1, 1, tokens, dtype=torch.bool),
        scaling=0.5,
        selection="per head",
    )
    for head in range(heads):
        mine = head // (heads // kv_heads)
        q = queries[0, head, 0].tolist()
        p = basis[mine].tolist()
        qr = [sum(q[i] * p[i][j] for i in range(width)) for j in range(width)]
        ranked = []
        for token in range(tokens):
            k = keys[0, mine, token].tolist()
            kr = [sum(k[i] * p[i][j] for i in range(width)) for j in range(width)]
            approximate = sum(qr[j] * kr[j] for j in range(leading))
            exact = sum(a * b for a, b in zip(q, k, strict=True))
            ranked.append((approximate, exact, token))
        best = sorted(ranked, reverse=True)[:count]
        weights = [math.exp(0.5 * exact) for _, exact, _ in best]
        for place in range(5):
            expected = sum(
                weight * float(values[0, mine, token, place])
                for weight, (_, _, token) in zip(weights, best, strict=True)
            ) / sum(weights)
            assert float(output[0, head, 0, place]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [3, 16])
def test_pca_attention_in_loops(statistics: Statistics, width: int) -> None:
    """softmax over c (q P)[:d] · (k P)[:d], all values, in the first layer of a model."""
    basis = fit(statistics, "pca")
    selector = PcaAttention(basis=basis, widths=(width,) * basis.layers)
    generator = torch.Generator().manual_seed(width)
    queries = torch.randn(1, 6, 1, 16, generator=generator)
    keys, values = torch.randn(2, 1, 2, 7, 16, generator=generator)
    visible = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    among = Candidates(
        queries=queries,
        keys=keys,
        visible=visible,
        scaling=0.25,
        layer=0,
        turned=False,
        past_mass=torch.zeros(1, 6, 7),
        allowance=visible.sum(-1),
    )
    output = attend(*selector.compared(among), values, visible.expand(1, 2, 1, 7), scaling=0.25)
    for head in range(6):
        p = basis.key_maps[0, head // 3].tolist()
        q = queries[0, head, 0].tolist()
        weights = []
        for token in range(7):
            k = keys[0, head // 3, token].tolist()
            score = sum(
                sum(q[i] * p[i][j] for i in range(16)) * sum(k[i] * p[i][j] for i in range(16))
                for j in range(width)
            )
            weights.append(math.exp(0.25 * score))
        for place in range(16):
            expected = sum(
                weight * float(values[0, head // 3, token, place])
                for token, weight in enumerate(weights)
            ) / sum(weights)
            assert float(output[0, head, 0, place]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
