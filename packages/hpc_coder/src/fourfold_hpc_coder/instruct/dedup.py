"""Near-duplicates: equal up to white space, or sharing most of their word sequences (MinHash)."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SHINGLE = 5
"""Words in a shingle (Broder 1997), as in Magicoder's and OctoPack's cleaning."""


@dataclass(slots=True)
class TextMemory:
    """Texts seen so far."""

    threshold: float = 0.97
    """Jaccard similarity of shingles from which a text is a duplicate. Instructions made from one grammar
    share most of their words and are not duplicates; scraped text wants 0.7."""
    _exact: set[str] = field(default_factory=set)
    _index: MinHashLSH | None = None
    _sketches: list[MinHash] = field(default_factory=list)

    @classmethod
    def of(cls, texts: Iterable[str], *, threshold: float = 0.97) -> "TextMemory":
        """A memory that holds texts already."""
        seen = cls(threshold=threshold)
        for text in texts:
            seen.add(text)
        return seen

    def add(self, text: str) -> bool:
        """Remember a text; whether it was new."""
        plain = hashlib.sha256("".join(text.split()).encode()).hexdigest()
        if plain in self._exact:
            return False
        if self._index is None:
            # The index needs two bands, so it finds candidates only; the sketches decide.
            self._index = MinHashLSH(threshold=min(self.threshold, 0.9), num_perm=PERMUTATIONS)
        sketch = _sketch(text)
        like = (self._sketches[int(str(candidate))] for candidate in self._index.query(sketch))
        if any(sketch.jaccard(other) >= self.threshold for other in like):
            return False
        self._exact.add(plain)
        self._index.insert(str(len(self._sketches)), sketch)
        self._sketches.append(sketch)
        return True


def _sketch(text: str) -> MinHash:
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update_batch([shingle.encode() for shingle in shingles(text)])
    return sketch


def shingles(text: str) -> Iterator[str]:
    """Runs of words and signs; a short text is one run."""
    words = re.findall(r"\w+|[^\w\s]", text)
    for first in range(max(1, len(words) - SHINGLE + 1)):
        yield " ".join(words[first : first + SHINGLE])
