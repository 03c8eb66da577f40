"""The journal of a scoring: its verdicts on disk, one line each, from which a killed scoring goes on."""

import fcntl
import hashlib
import json
import os
import secrets
import threading
from pathlib import Path

from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.pareval.files import Fields, null, number
from fourfold_hpc_coder.vocabulary import Execution, Processors, Sample
from fourfold_parallel.common.files import append_line

SCHEMA = 1


class Journal:
    """Append-only verdicts of one scoring; its first line says of what. One process holds it at a time.

    Raises:
        ValueError: where it is of another file, damaged, or held by another scoring.
    """

    def __init__(self, outputs: Path, folder: Path) -> None:
        self.path = folder / "verdicts.jsonl"
        self.verdicts: dict[str, Judgement] = {}
        self._lock = threading.Lock()
        self._of = hashlib.sha256(outputs.read_bytes()).hexdigest()
        self.secret = secrets.randbits(63)
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = self._read(outputs)
        except BlockingIOError:
            os.close(self._handle)
            raise ValueError(
                f"another scoring is writing to {folder}; wait for it, or name another folder with --out"
            ) from None
        except ValueError:
            os.close(self._handle)
            raise
        os.ftruncate(self._handle, len(whole))
        if not whole:
            self._append({"schema": SCHEMA, "outputs_sha256": self._of, "secret": self.secret})

    def _read(self, outputs: Path) -> bytes:
        """Take the lines that are whole; refuse the journal of another file."""
        content = self.path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        for place, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                fields = json.loads(line)
                if place > 1:
                    self.verdicts[fields["key"]] = judgement_of(fields)
                    continue
                is_ours = fields["outputs_sha256"] == self._of and fields["schema"] == SCHEMA
                self.secret = fields["secret"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {place} is damaged; remove the line and its answer is judged again, "
                    "or the folder to start over"
                ) from None
            if not is_ours:
                raise ValueError(
                    f"{self.path.parent} holds the scores of another file than {outputs}; "
                    "name another folder with --out, or remove that one"
                )
        return content

    def write(self, key: str, judgement: Judgement) -> None:
        """Append a verdict."""
        with self._lock:
            self._append({"key": key, **judgement_fields(judgement)})

    def _append(self, fields: Fields) -> None:
        append_line(self._handle, json.dumps(fields))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._handle)
        os.close(self._handle)


def judgement_fields(judgement: Judgement) -> Fields:
    """A judgement as plain JSON; what is not a number is null."""
    sample = judgement.sample
    return {
        "verdict": judgement.verdict,
        "because": judgement.because,
        "proof": judgement.proof,
        "output": judgement.output,
        "built": sample.built,
        "parallel": sample.parallel,
        "best_sequential_s": null(sample.best_sequential_s),
        "runs": [
            {
                "ranks": run.processors.ranks,
                "threads": run.processors.threads,
                "ran": run.ran,
                "valid": run.valid,
                "runtime_s": null(run.runtime_s),
            }
            for run in sample.runs
        ],
    }


def judgement_of(fields: Fields) -> Judgement:
    """The judgement that `judgement_fields` wrote."""
    runs = tuple(
        Execution(
            processors=Processors(ranks=run["ranks"], threads=run["threads"]),
            ran=run["ran"],
            valid=run["valid"],
            runtime_s=number(run["runtime_s"]),
        )
        for run in fields["runs"]
    )
    sample = Sample(
        built=fields["built"],
        parallel=fields["parallel"],
        runs=runs,
        best_sequential_s=number(fields["best_sequential_s"]),
    )
    return Judgement(
        verdict=fields["verdict"],
        because=fields["because"],
        sample=sample,
        output=fields["output"],
        proof=fields["proof"],
    )
