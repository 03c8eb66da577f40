"""How much of one token sequence is in another: exact, in word operations, on token ids.

The bit-parallel methods keep a column of the textbook table in the bits of one integer, so a comparison
with `n` tokens costs `n` operations on integers as wide as the other sequence.
"""

from collections.abc import Sequence


def rouge_l(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """ROUGE-L F1 (Lin 2004): twice the longest common subsequence over the sum of the lengths."""
    if not ours or not theirs:
        return 0.0
    return 2 * longest_common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def longest_common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence (Hyyrö 2004).

    Bit i of `row` is 0 where the subsequence grows by matching a[i].
    """
    places = _places(a)
    everything = (1 << len(a)) - 1
    row = everything
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def longest_common_substring(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands in both.

    Bit i of `runs[j]` is 1 where a run that begins at b[j] ends at a[i]; a run is two shorter ones end to
    end, so the length is found by doubling and then adding the halves that still fit.
    """
    places = _places(a)
    powers = [[places.get(token, 0) for token in b]]
    if not any(powers[0]):
        return 0

    def joined(first: list[int], length: int, second: list[int], more: int) -> list[int]:
        """Runs of `first`, `length` tokens each, that go on with one of `second`, of `more`."""
        pairs = zip(first, second[length:], strict=False)
        return [(left << more) & right for left, right in pairs]

    length = 1
    while any(grown := joined(powers[-1], length, powers[-1], length)):
        powers.append(grown)
        length *= 2
    runs = powers[-1]
    for exponent in reversed(range(len(powers) - 1)):
        grown = joined(runs, length, powers[exponent], 1 << exponent)
        if any(grown):
            runs, length = grown, length + (1 << exponent)
    return length


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements from one to the other (Myers 1999; Hyyrö 2003).

    Bits of `up` and `down` are 1 where the table's column rises or falls by one.
    """
    if not a:
        return len(b)
    places = _places(a)
    everything, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = everything, 0, len(a)
    for token in b:
        matches = places.get(token, 0)
        diagonal = (((matches & up) + up) ^ up) | matches | down
        across_up = down | ~(diagonal | up)
        across_down = up & diagonal
        if across_up & last:
            distance += 1
        elif across_down & last:
            distance -= 1
        across_up = (across_up << 1) | 1
        across_down <<= 1
        up = (across_down | ~(diagonal | across_up)) & everything
        down = across_up & diagonal & everything
    return distance


def edit_similarity(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """One minus the edit distance over the longer length: 1 for equal sequences."""
    longer = max(len(ours), len(theirs))
    return 1.0 if longer == 0 else 1 - edit_distance(ours, theirs) / longer


def _places(tokens: Sequence[int]) -> dict[int, int]:
    """For each token, the bits of the places where it stands."""
    places: dict[int, int] = {}
    for index, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << index
    return places
