"""The commands as a stranger runs them: data, tuning, answers, scores; stopped, continued, and bounded."""

import importlib.metadata
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fourfold_hpc_coder.__main__ import main
from fourfold_hpc_coder.finetune import finetuning
from fourfold_hpc_coder.generate.local import open_local
from fourfold_hpc_coder.instruct.format import RESPONSE, CodePairs, FileRows
from fourfold_hpc_coder.instruct.pipeline import make_samples, templates
from fourfold_hpc_coder.instruct.samples import read_samples, write_samples
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import IGNORE, TARGET_MASKS, announced_mask

AVERAGE = "27_reduce_average"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers reads: a model of a few thousand weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    CodePairs(vocabulary=300, samples=20).fast().save_pretrained(folder)
    Llama(
        width=16, depth=1, heads=2, kv_heads=2, hidden=24, vocabulary=300, context=2048, tied=True
    ).build(seed=1).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What a command says; it must end well."""
    main([*map(str, words)])
    return " ".join(capsys.readouterr().err.split())


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What a command says that ends with code 2."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_from_data_to_scores(
    sandbox, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Made and verified data tune a model, whose answers are scored."""
    data, tuned = tmp_path / "data", tmp_path / "tuned"
    making = ["make-data", "--models", "omp", "--categories", "programming", "--out", data]
    said = run(capsys, *making, "--samples", 2, "--most-taught", 2)
    assert "0 tokens were bought" in said
    made = read_samples(data / "samples.jsonl")
    assert [one.verdict for one in made] == ["correct"] * 2
    # Ten are needed, of which one validates; making them would take ten compilations.
    write_samples(data / "ten.jsonl", made * 5)
    tuning = ["finetune", "--model", tiny, "--data", data / "ten.jsonl", "--response", RESPONSE]
    small = ["--steps", 2, "--batch", 2, "--microbatch", 2, "--sequence", 1024, "--seed", 3]
    assert "2 steps, held-out loss" in run(capsys, *tuning, *small, "--out", tuned)
    prompts = tmp_path / "prompts.json"
    problem = own_problems()[AVERAGE]
    prompts.write_text(
        json.dumps(
            [
                {
                    "problem_type": "reduce",
                    "language": "cpp",
                    "name": AVERAGE,
                    "parallelism_model": "omp",
                    "prompt": problem.prompt("omp"),
                }
            ]
        )
    )
    outputs = tmp_path / "outputs.json"
    asking = ["generate", "--model", tuned / "model", "--prompts", prompts, "--models", "omp"]
    run(capsys, *asking, "--max-new-tokens", 4, "--out", outputs)
    [answered] = json.loads(outputs.read_text())
    assert len(answered["outputs"]) == 1
    said = run(capsys, "score", outputs, "--models", "omp", "--out", tmp_path / "scores")
    assert f"{AVERAGE} (omp) answer 0: no" in said
    assert (tmp_path / "scores" / "report.html").is_file()


def test_a_published_models_scores_are_one_command_that_goes_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The second time nothing is generated and nothing judged."""
    out = tmp_path / "paper"
    words = ["paper-scores", "--model", tiny, "--models", "serial", "--only", "27_", "--samples", 2]
    words += ["--max-new-tokens", 4, "--out", out]
    said = run(capsys, *words)
    assert "build@1 0.00 [0.00, 0.66] over 2 samples" in said
    [outputs] = out.glob("*/outputs.json")
    rates = (outputs.parent / "scores" / "rates.csv").read_text().splitlines()
    assert rates[0].startswith("execution model,problem type,rate,value,wilson low")
    before = outputs.read_bytes()
    again = run(capsys, *words)
    assert outputs.read_bytes() == before
    assert "2 verdicts reused" in again


@pytest.mark.parametrize("rank", [0, 2])
def test_a_tuned_model_is_asked_in_the_words_of_its_training(
    rank: int, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Whole and low-rank updates alike end as plain weights, with the token that ended prompts."""
    from transformers import AutoModelForCausalLM

    data = tmp_path / "data.jsonl"
    write_samples(data, make_samples(templates(20, verified=False)).samples)
    words = ["--data", data, "--response", RESPONSE, "--lora-rank", rank, "--learning-rate", 0.01]
    small = ["--steps", 3, "--batch", 2, "--microbatch", 2, "--sequence", 512]
    out = tmp_path / "out"
    run(capsys, "finetune", "--model", tiny, *words, *small, "--out", out)
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert before.keys() == after.keys()
    assert any((before[key] != after[key]).any() for key in before)
    backend = open_local(str(out / "model"), max_new_tokens=8)
    assert backend.after == RESPONSE
    tokens = backend._encode("int f() {")
    assert tokens[-1] == backend.tokenizer.convert_tokens_to_ids(RESPONSE)
    # The same command again has nothing left to do, and says the same.
    record = (out / "record.jsonl").read_bytes()
    run(capsys, "finetune", "--model", tiny, *words, *small, "--out", out)
    assert (out / "record.jsonl").read_bytes().startswith(record)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_of_another_package_decides_sample_by_sample(
    masked: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A sample's left-out targets are those that goldfish leaves out of it alone, wherever it is packed;
    prompts stay out as they were, ends stay in, and a model trains so."""
    if "goldfish" not in importlib.metadata.entry_points(group=TARGET_MASKS).names:
        pytest.skip("fourfold-goldfish is not installed")
    data = tmp_path / "data.jsonl"
    write_samples(data, make_samples(templates(20, verified=False)).samples)
    plain = partial(
        finetuning, data, model=str(tiny), response=RESPONSE, masked=masked, sequence=1024
    )
    fishy = plain(leave_out="goldfish", leave_out_one_in=3)
    batch = fishy.data.open(sequence=1024, seed=0).batch(0, batch=2)
    kept = fishy.objective.targets(batch) != IGNORE
    before = plain().objective.targets(batch) != IGNORE
    assert isinstance(fishy.data, FileRows)
    end = fishy.data.marks().end
    alone = announced_mask("goldfish", k=3, exempt=(end,))
    several = 0
    for row, documents in enumerate(batch.document_ids):
        for document in documents.unique():
            [places] = torch.nonzero(documents == document, as_tuple=True)
            several += row == 0 and len(places) > 1
            if len(places) <= 13:
                continue
            dropped = alone.drop(batch.tokens[row, places][None])[0]
            if places[0] == 0:
                places, dropped = places[1:], dropped[1:]
            assert torch.equal(kept[row, places - 1], before[row, places - 1] & ~dropped)
    assert several > 1
    assert not (before ^ kept)[batch.tokens[:, 1:] == end].any()
    assert 1 / 4 < 1 - kept.sum() / before.sum() < 5 / 12
    words = ["finetune", "--model", tiny, "--data", data, "--response", RESPONSE]
    words += ["--leave-out", "goldfish", "--steps", 2, "--batch", 2, "--microbatch", 2]
    words += ["--masked" if masked else "--no-masked", "--sequence", 512]
    assert "2 steps, held-out loss" in run(capsys, *words, "--out", tmp_path / "out")


def test_what_does_not_fit_is_refused_in_a_sentence(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = tmp_path / "few.jsonl"

    write_samples(few, make_samples(templates(3, verified=False)).samples)
    tuning = ["finetune", "--model", tiny, "--out", tmp_path / "out"]
    cases = [
        ([*tuning, "--data", tmp_path / "none.jsonl"], "make one with make-data"),
        ([*tuning, "--data", few, "--response", RESPONSE], "make at least 10"),
        ([*tuning, "--data", few, "--response", "<|nothing|>"], "is no token of"),
        (
            [*tuning, "--data", few, "--response", RESPONSE, "--leave-out", "nobody"],
            "install fourfold-nobody",
        ),
        (["generate", "--model", tiny, "--prompts", tmp_path / "none.json"], "no JSON list"),
        (["generate", "--model", tiny, "--models", "hip"], "name other models"),
        (["generate", "--model", tmp_path / "nowhere"], "no such folder"),
        (["make-data", "--url", "http://localhost:1/v1"], "needs --teacher"),
        (["make-data", "--url", "http://localhost:1/v1", "--teacher", "m"], "gave no answer"),
        (["make-data", "--trees", tmp_path], "say the licence"),
        (["make-data", "--trees", f"{tmp_path}/none:MIT"], "no folder or archive"),
        (["make-data", "--trees", f"{tmp_path}:GPL-3.0"], "not one of"),
    ]
    for words, message in cases:
        extra = ["--out", tmp_path / "made"] if words[0] == "make-data" else []
        assert message in refused(capsys, *words, *extra), words


def test_data_of_other_options_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The budget stops the first command before it teaches; the second asks for another model."""
    making = ["make-data", "--out", tmp_path, "--most-taught", 0, "--samples", 2]
    assert "The budget ended before 2 were made" in run(capsys, *making, "--models", "omp")
    assert "other options" in refused(capsys, *making, "--models", "mpi")


def test_help_mistakes_and_the_public_names_need_no_heavy_library(tmp_path: Path) -> None:
    """Neither torch nor transformers nor matplotlib, which may be missing or slow."""
    script = f"""
import sys
from fourfold_hpc_coder.__main__ import main
for words in (["--help"], ["score", "--help"], ["score", "x", "--models", "cobol"],
              ["generate", "--model", "m", "--models", "cobol"], ["make-data", "--url", "http://x/v1"],
              ["finetune", "--data", {str(tmp_path / "none")!r}]):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == (0 if "--help" in words else 2), words
import fourfold_hpc_coder
fourfold_hpc_coder.pass_at_k, fourfold_hpc_coder.Scoring
heavy = {{"torch", "transformers", "matplotlib", "peft", "datasketch", "tree_sitter"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_tuning_and_asking_need_no_library_of_making_data() -> None:
    """The extra `data` is for making data; what was made can be trained on without it."""
    script = """
import sys
for name in ("datasketch", "rapidfuzz", "tree_sitter", "tree_sitter_cpp", "peft", "matplotlib"):
    sys.modules[name] = None
import fourfold_hpc_coder.finetune, fourfold_hpc_coder.generate.local
import fourfold_hpc_coder.generate.outputs
import fourfold_hpc_coder.reproduce.experiment, fourfold_hpc_coder.score.report
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
