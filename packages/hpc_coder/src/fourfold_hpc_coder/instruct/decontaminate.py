"""Keep benchmark prompts out of training data: shared word runs, and likeness of the whole."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

RUN = 13
"""Words in a row that no two texts share by chance (Brown et al. 2020, appendix C)."""
LIKENESS = 90.0
"""Token-set ratio, in percent, from which a comment is a rewording of a prompt's."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Benchmark prompts, ready to be compared with."""

    runs: Mapping[str, str]
    """Run of words to the prompt's name."""
    tasks: Mapping[str, str]
    """Name to the words of the prompt's comment."""

    @classmethod
    def of(cls, prompts: Mapping[str, str]) -> "Screen":
        """A screen against prompts by name."""
        comments = {name: _comment(prompt) for name, prompt in prompts.items()}
        runs = {run: name for name, comment in comments.items() for run in word_runs(comment)}
        return cls(runs=runs, tasks={name: text for name, text in comments.items() if text})

    def hit(self, text: str) -> str:
        """Name of a prompt that the text holds or rewords; empty for none."""
        for run in word_runs(text):
            if run in self.runs:
                return self.runs[run]
        comment = _comment(text)
        # A sentence of three words is contained in everything.
        long = {name: task for name, task in self.tasks.items() if len(task.split()) >= RUN}
        if len(comment.split()) < RUN:
            return ""
        nearest = process.extractOne(
            comment, long, scorer=fuzz.token_set_ratio, score_cutoff=LIKENESS
        )
        return str(nearest[2]) if nearest else ""

    def report(self, texts: Sequence[str]) -> dict[str, int]:
        """Number of texts that hit each prompt."""
        hits: dict[str, int] = {}
        for text in texts:
            if name := self.hit(text):
                hits[name] = hits.get(name, 0) + 1
        return hits


def _comment(text: str) -> str:
    """The words of the comments; of the whole text where it has none."""
    comments = re.findall(r"/\*(.*?)(?:\*/|\Z)", text, re.DOTALL)
    return " ".join(re.findall(r"\w+", " ".join(comments or [text]).lower()))


def word_runs(text: str) -> list[str]:
    """Every run of `RUN` words, lower case, without signs."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[first : first + RUN]) for first in range(len(words) - RUN + 1)]
