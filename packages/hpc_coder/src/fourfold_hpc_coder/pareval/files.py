"""ParEval's files, in and out: prompts with outputs, driver results, and its CSV of runs."""

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any, cast

from fourfold_hpc_coder.vocabulary import MODELS, Execution, Model, Processors, Prompt, Sample

GENERATION = ("temperature", "top_p", "do_sample", "max_new_tokens", "prompted")
"""Fields of a prompt that say how its outputs were generated; kept as they are."""

Fields = dict[str, Any]
"""One JSON object of ParEval's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with the outputs that a code model gave: one entry of ParEval's `outputs.json`."""

    name: str
    problem_type: str
    model: Model
    prompt: str
    """Everything up to the `{` that opens the function's body."""
    outputs: tuple[str, ...]
    """Function bodies, closing brace included."""
    fields: Fields
    """The whole entry as read, so that what we do not know is passed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission:
    """An entry that is not scored: its place in the file, and the reason in one sentence."""

    place: str
    because: str


def read_outputs(path: str | PathLike[str]) -> tuple[tuple[Question, ...], tuple[Omission, ...]]:
    """Read a file of model outputs: the entries that make sense, and why the others do not.

    Raises:
        ValueError: where the file as a whole is not a list of entries.
    """
    entries = _entries(Path(path))
    questions, problems = [], []
    for index, entry in enumerate(entries):
        try:
            questions.append(_question(entry))
        except ValueError as error:
            name = entry.get("name", "?") if isinstance(entry, dict) else "?"
            problems.append(Omission(place=f"entry {index} ({name})", because=str(error)))
    return tuple(questions), tuple(problems)


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character of UTF-16, as JSON writes it."""


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
        entries = json.loads(text)
        if _HALF.search(text):  # no file of ours can hold one that stands alone
            whole = json.dumps(entries, ensure_ascii=False).encode("utf-8", "replace")
            entries = json.loads(whole)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a file") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); give the file that a generator wrote"
        ) from None
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} holds {type(entries).__name__}, not a list of prompts; "
            "each entry needs name, parallelism_model, prompt and outputs"
        )
    return entries


def _question(entry: object) -> Question:
    if not isinstance(entry, dict):
        raise ValueError(f"it is {type(entry).__name__}, not an object with name, prompt, outputs")
    missing = [
        key for key in ("name", "parallelism_model", "prompt", "outputs") if key not in entry
    ]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}; ParEval's generator writes them")
    if entry["parallelism_model"] not in MODELS:
        raise ValueError(
            f"parallelism_model={entry['parallelism_model']!r} is none of {', '.join(MODELS)}"
        )
    outputs = entry["outputs"]
    if isinstance(outputs, list):  # a driver's results hold their outputs
        outputs = [
            output.get("generated_output", output) if isinstance(output, dict) else output
            for output in outputs
        ]
        # No answer is an answer that failed: without it, the rates would rise.
        outputs = ["" if output is None else output for output in outputs]
    if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
        raise ValueError("its outputs are not a list of texts; give function bodies")
    if not outputs:
        raise ValueError("it has no outputs; generate at least one sample")
    return Question(
        name=str(entry["name"]),
        problem_type=str(entry.get("problem_type", "unknown")),
        model=cast("Model", entry["parallelism_model"]),
        prompt=str(entry["prompt"]),
        outputs=tuple(map(str, outputs)),
        fields=entry,
    )


def read_results(path: str | PathLike[str]) -> tuple[Prompt, ...]:
    """Read what a driver wrote (ours or ParEval's) as the metrics need it.

    Raises:
        ValueError: where an entry's outputs were not run yet.
    """
    prompts = []
    for entry in _entries(Path(path)):
        if not all(
            isinstance(output, dict) and "did_build" in output for output in entry["outputs"]
        ):
            raise ValueError(
                f"{entry['name']} in {path} has outputs without results; score it first"
            )
        prompts.append(
            Prompt(
                name=entry["name"],
                problem_type=entry["problem_type"],
                model=entry["parallelism_model"],
                samples=tuple(_sample(output) for output in entry["outputs"]),
            )
        )
    return tuple(prompts)


def _sample(output: Fields) -> Sample:
    return Sample(
        built=bool(output["did_build"]),
        parallel=bool(output["is_source_valid"]),
        runs=tuple(
            Execution(
                processors=Processors(
                    ranks=run.get("num_procs", 1), threads=run.get("num_threads", 1)
                ),
                ran=bool(run["did_run"]),
                valid=bool(run["is_valid"]),
                runtime_s=number(run["runtime"]),
            )
            for run in output["runs"] or ()
        ),
        best_sequential_s=number(output["best_sequential_runtime"]),
    )


def number(value: float | None) -> float:
    """NaN where JSON has null."""
    return math.nan if value is None else float(value)


def result_fields(output: str, sample: Sample, model: Model) -> Fields:
    """One output's results, as ParEval's driver writes them; NaN becomes null."""
    ran = [run.ran for run in sample.runs]
    valid = [run.ran and run.valid for run in sample.runs]
    return {
        "generated_output": output,
        "source_write_success": True,
        "did_build": sample.built,
        "is_source_valid": sample.parallel,
        "did_any_run": any(ran),
        "did_all_run": bool(ran) and all(ran),
        "are_any_valid": any(valid),
        "are_all_valid": bool(valid) and all(valid),
        "best_sequential_runtime": null(sample.best_sequential_s),
        "runs": [_run_fields(run, model) for run in sample.runs] if sample.built else None,
    }


def _run_fields(run: Execution, model: Model) -> Fields:
    fields: Fields = {
        "did_run": run.ran,
        "is_valid": run.valid if run.ran else None,
        "runtime": null(run.runtime_s),
    }
    if model in ("mpi", "mpi+omp"):
        fields["num_procs"] = run.processors.ranks
    if model in ("omp", "mpi+omp", "kokkos", "stdpar"):
        fields["num_threads"] = run.processors.threads
    return fields


def null(value: float) -> float | None:
    """None where a number is NaN, which JSON lacks."""
    return None if math.isnan(value) else value


_TEXTS = ("prompt", "generated_output")
_RUN_COLUMNS = ("did_run", "is_valid", "runtime")


def runs_csv(entries: Sequence[Fields]) -> str:
    """One row per run, in the columns of ParEval's `create-dataframe.py`; texts on one line."""
    head = ["prompt", "name", "problem_type", "language", "parallelism_model", *GENERATION]
    per_output = ["generated_output", "did_build", "is_source_valid", "best_sequential_runtime"]
    columns = [
        *head,
        *per_output,
        "output_idx",
        "run_idx",
        *_RUN_COLUMNS,
        "num_threads",
        "num_procs",
    ]
    return table([dict(zip(columns, row, strict=True)) for row in _rows(entries, head, per_output)])


def _rows(
    entries: Sequence[Fields], head: Sequence[str], per_output: Sequence[str]
) -> Iterable[list[Any]]:
    for entry in entries:
        for index, output in enumerate(entry["outputs"]):
            shared = [_cell(entry, key) for key in head] + [
                _cell(output, key) for key in per_output
            ]
            if not output["runs"]:
                yield [*shared, index, *[None] * (3 + len(_RUN_COLUMNS))]
            for number, run in enumerate(output["runs"] or ()):
                values = [run.get(key) for key in (*_RUN_COLUMNS, "num_threads", "num_procs")]
                yield [*shared, index, number, *values]


def _cell(fields: Fields, key: str) -> object:
    value = fields.get(key)
    if key not in _TEXTS or not isinstance(value, str):
        return value
    # A bare carriage return ends a row for whoever reads the table.
    return value.replace("\r", "\\r").replace("\n", "\\n")


def table(rows: Sequence[Fields]) -> str:
    """Rows with the same keys as CSV text; NaN and None are empty."""
    text = StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=[*rows[0]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if _is_absent(v) else v for key, v in row.items()})
    return text.getvalue()


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
