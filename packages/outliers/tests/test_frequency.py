"""The link to frequency: each id once, and an interval that holds what it says."""

import numpy as np
import pytest
from scipy import stats

from fourfold_outliers.frequency import Types, counted, frequency, linked, partial, spearman
from fourfold_outliers.resampling import halves, interval, reach

IDS, DOCUMENTS, TOKENS = 150, 30, 50


def language() -> tuple[np.ndarray, np.ndarray]:
    """Chances of ids by Zipf's law, and an effect of each that follows its frequency in part."""
    chances = 1 / np.arange(2.0, IDS + 2)
    chances /= chances.sum()
    logs = np.log(chances)
    noise = np.random.default_rng(0).standard_normal(IDS)
    return chances, 0.8 * (logs - logs.mean()) / logs.std() + 0.6 * noise


def drawn(seed: int) -> Types:
    """Frequent ids recur in every document, rare ones in one; occurrences and documents are noisy."""
    chances, effect = language()
    generator = np.random.default_rng((seed, 1))
    ids = generator.choice(IDS, DOCUMENTS * TOKENS, p=chances)
    document = np.repeat(np.arange(DOCUMENTS), TOKENS)
    noise = (
        generator.standard_normal(len(ids)) + 0.3 * generator.standard_normal(DOCUMENTS)[document]
    )
    return Types.of(ids, document, np.zeros(len(ids), int), (effect[ids] + noise)[:, None])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 500 texts 93 to 97 %, about the mean over texts: noise draws each link towards zero alike."""
    chances, _ = language()
    links = [linked(drawn(seed), chances, documents=DOCUMENTS, times=50) for seed in range(500)]
    values = np.asarray([link.value[0] for link in links])
    widths = np.asarray([reach(link.resampled, DOCUMENTS)[0] for link in links])
    held = float((np.abs(values - values.mean()) < widths).mean())
    assert 0.93 <= held <= 0.97
    assert abs(values.mean()) > 3 * widths.mean()


def test_a_link_is_that_of_means_by_id() -> None:
    """Against loops and scipy; a resample is the text made of its documents."""
    generator = np.random.default_rng(2)
    ids, document = generator.integers(0, 20, 200), np.repeat(np.arange(5), 40)
    values = generator.standard_normal((200, 3)) + 0.1 * ids[:, None]
    frequencies = generator.standard_normal(20)
    position = generator.integers(1, 50, 200)
    types = Types.of(ids, document, position, values)
    for weights in (np.ones(5), np.asarray([1.0, 0.0, 1.0, 0.0, 1.0])):
        kept = weights[document] > 0
        seen = np.unique(ids[kept])
        means = np.stack([values[kept & (ids == number)].mean(0) for number in seen])
        expected = [stats.spearmanr(means[:, s], frequencies[seen]).statistic for s in range(3)]
        np.testing.assert_allclose(types.link(frequencies, weights), expected, atol=1e-12)


def test_duplicates_of_a_token_change_nothing() -> None:
    """A hundred more of the most frequent id, with its own mean, leave the link where it is."""
    ids = np.asarray([0, 0, 1, 2, 3, 4])
    values = np.asarray([5.0, 7.0, 5.0, 4.0, 4.5, 1.0])[:, None]
    more = np.concatenate([ids, np.zeros(100, int)])
    again = np.concatenate([values, np.full((100, 1), 6.0)])
    frequencies = frequency(np.asarray([500, 40, 30, 20, 10]))
    few, many = (
        Types.of(i, np.zeros(len(i), int), np.zeros(len(i), int), v).link(frequencies)[0]
        for i, v in ((ids, values), (more, again))
    )
    assert (
        few == many == pytest.approx(stats.spearmanr([6, 5, 4, 4.5, 1], [5, 4, 3, 2, 1]).statistic)
    )


def test_what_only_position_links_is_gone_given_position() -> None:
    generator = np.random.default_rng(3)
    position = generator.standard_normal(4000)
    against = position + 0.3 * generator.standard_normal(4000)
    values = (position + 0.3 * generator.standard_normal(4000))[:, None]
    assert spearman(values, against)[0] > 0.8
    assert abs(partial(values, against, position)[0]) < 0.1


def test_counts_are_over_all_documents() -> None:
    counts = counted([np.asarray([1, 1, 3]), np.asarray([3], dtype=np.uint16)], 5)
    assert counts.tolist() == [0, 2, 0, 2, 0]
    np.testing.assert_allclose(frequency(counts), np.log([1, 3, 1, 3, 1]))


@pytest.mark.parametrize("documents", [40, 41])
def test_halves_give_the_spread_of_a_mean(documents: int) -> None:
    """Of a mean the spread over halves is known: s / sqrt(n), whatever n."""
    values = np.random.default_rng(0).standard_normal(documents)
    weights = halves(documents, times=6000)
    assert set(weights.sum(1)) == {documents // 2}
    made = interval(float(values.mean()), weights @ values / weights.sum(1), documents)
    expected = stats.t.ppf(0.975, documents - 1) * values.std(ddof=1) / np.sqrt(documents)
    assert made.high - made.value == pytest.approx(expected, rel=0.03)


def test_three_documents_are_too_few() -> None:
    with pytest.raises(ValueError, match="3 documents give no interval; use at least 4"):
        halves(3)
