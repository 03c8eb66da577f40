"""A file of outputs in ParEval's format: prompts in, completions out, kept after each prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.files import Fields
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import Progress


class Backend(Protocol):
    """Something that completes prompts."""

    def complete_many(self, prompts: Sequence[str], *, first: int = 0) -> list[str]:
        """One completion per prompt, in order, without the prompt.

        Args:
            prompts: equal ones are answered anew each.
            first: how many samples of them were drawn before, which these must not repeat.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The options of a file of outputs; kept in ParEval's fields, and the model beside them."""

    model: str = ""
    chat: bool = False
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"samples={self.samples}, batch={self.batch}, max_new_tokens={self.max_new_tokens}, "
                f"temperature={self.temperature}: use 1 or more, and a temperature of 0 or more"
            )


def generate_file(
    prompts: Sequence[Fields],
    backend: Backend,
    sampling: Sampling,
    out: str | PathLike[str],
    progress: Progress,
) -> Path:
    """Complete every prompt and write ParEval's outputs file; what the file has is kept.

    Args:
        prompts: ParEval's prompt records: problem_type, language, name, parallelism_model, prompt; with a
            `translation_prompt`, that is what is asked.
        backend: completes prompts.
        sampling: how many, how hot, how long.
        out: the JSON file, written whole after each prompt.
        progress: told after each prompt.

    Raises:
        ValueError: where the file at `out` holds something else, or outputs of another model or sampling.
    """
    out = Path(out)
    entries = _done(out, sampling)
    for index, record in enumerate(prompts):
        key = _key(record)
        if key not in entries:
            wanted = [_asked(record)] * sampling.samples
            raw: list[str] = []
            for first in range(0, len(wanted), sampling.batch):
                raw += backend.complete_many(wanted[first : first + sampling.batch], first=first)
            entries[key] = {
                **record,
                **_fields(sampling),
                "outputs": [body_of(text, record["prompt"]) for text in raw],
                "raw_outputs": raw,
            }
            write_text(out, json.dumps([*entries.values()], indent=1) + "\n")
        progress(index + 1, len(prompts), record["name"])
    return out


def _fields(sampling: Sampling) -> Fields:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.max_new_tokens,
        "prompted": True,
        "generator": sampling.model,
        "chat": sampling.chat,
    }


def _asked(record: Fields) -> str:
    """The text to complete: of a translation, with the function in another model before the prompt."""
    return record.get("translation_prompt") or record["prompt"]


def _key(record: Fields) -> tuple[str, str, str]:
    return record["name"], record["parallelism_model"], _asked(record)


def _done(out: Path, sampling: Sampling) -> dict[tuple[str, str, str], Fields]:
    if not out.exists():
        return {}
    try:
        entries = json.loads(out.read_text(encoding="utf-8"))
        done = {_key(entry): entry for entry in entries}
        differ = [
            f"{key} {entry.get(key)!r}"
            for entry in entries
            for key, value in _fields(sampling).items()
            if entry.get(key) != value
        ]
        differ += [
            f"{n} samples" for entry in entries if (n := len(entry["outputs"])) != sampling.samples
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{out} holds no outputs of ours; name another file with --out") from None
    if differ:
        raise ValueError(
            f"{out} holds outputs of other options ({differ[0]}); name another file with --out"
        )
    return done


def read_prompts(source: str) -> list[Fields]:
    """ParEval's prompt records.

    Args:
        source: `built-in` for this package's problems, or a JSON file.

    Raises:
        ValueError: where the file is no list of prompts.
    """
    if source == "built-in":
        return [
            {
                "problem_type": problem.problem_type,
                "language": "cpp",
                "name": name,
                "parallelism_model": model,
                "prompt": problem.prompt(model),
            }
            for name, problem in own_problems().items()
            for model in problem.models
        ]
    try:
        records = json.loads(Path(source).read_text(encoding="utf-8"))
        needed = ("name", "prompt", "parallelism_model")
        return [{**record, **{key: record[key] for key in needed}} for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--prompts {source}: no JSON list of prompts ({error})") from None
