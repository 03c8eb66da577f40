"""Verdicts that all scorings of this machine share, each under a key of everything that decides it."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.score.journal import judgement_fields, judgement_of
from fourfold_hpc_coder.score.schedule import AnyProblem
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import cache_folder, write_text
from fourfold_parallel.common.values import digest

DECISIVE = (
    "evaluation.py",
    "judge",
    "pareval",
    "problems",
    "sandbox",
    "score/schedule.py",
    "vocabulary.py",
)
"""Files and folders of this package that decide a verdict."""


@cache
def sources_sha256(places: tuple[str, ...], package: Path = Path(__file__).parents[1]) -> str:
    """Digest of the names and bytes of every file in some places of this package, compiled ones left out.

    Args:
        places: files and folders, relative to the package.
        package: the package's folder.
    """
    whole = hashlib.sha256()
    for place in places:
        root = package / place
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file() and file.suffix != ".pyc":
                content = file.read_bytes()
                whole.update(f"{file.relative_to(package)}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def answer_key(
    problem: AnyProblem, model: Model, prompt: str, body: str, settings: JudgeSettings
) -> str:
    """Equal keys are equal verdicts, on one machine."""
    facts = (
        sources_sha256(DECISIVE),
        toolchain.identity(model),
        digest(settings),
        repr(problem),
        model,
        prompt,
        body,
        str(len(os.sched_getaffinity(0))),
    )
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()


def equal_answers(
    problem: AnyProblem,
    model: Model,
    prompt: str,
    body: str,
    settings: JudgeSettings,
    fresh: Callable[[str], Judgement],
) -> Judgement:
    """The verdict of an equal answer from the cache, or a fresh one, which is kept."""
    key = answer_key(problem, model, prompt, body, settings)
    judgement = cached(key)
    if judgement is None:
        judgement = fresh(body)
        keep(key, judgement)
    return judgement


def _cache_file(key: str) -> Path:
    return cache_folder() / "hpc_coder" / "verdicts" / key[:2] / f"{key}.json"


def cached(key: str) -> Judgement | None:
    """The verdict that an earlier scoring kept under a key."""
    try:
        return judgement_of(json.loads(_cache_file(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def keep(key: str, judgement: Judgement) -> None:
    """Keep a verdict for later scorings."""
    # A limit that was hit on a busy machine need not be hit again.
    if judgement.verdict != "timeout":
        write_text(_cache_file(key), json.dumps(judgement_fields(judgement)))
