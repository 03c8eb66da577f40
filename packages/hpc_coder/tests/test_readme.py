"""The README does what it says: its commands run, and its figures are the record's."""

import json
import re
import shlex
from pathlib import Path

import pytest

from fourfold_hpc_coder.__main__ import main
from fourfold_hpc_coder.judges.suite import cases

PACKAGE = Path(__file__).parents[1]
README = (PACKAGE / "README.md").read_text()
JUDGES = PACKAGE.parents[1] / "benchmarks" / "hpc_coder_judges.jsonl"
BENCHMARK = PACKAGE.parents[1] / "benchmarks" / "hpc_coder_score.jsonl"


def test_the_first_commands_and_the_ten_lines_score_the_example(
    sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a reader would type them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m fourfold_hpc_coder ((?:example|score) ?.*)$", README, re.M)
    for words in commands[:2]:
        main(shlex.split(words))
    said = " ".join(capsys.readouterr().err.split())
    assert "serial: 1 correct, 1 wrong" in said
    assert "omp: 1 correct, 1 race, 1 not parallel" in said
    assert (tmp_path / "scores" / "report.html").is_file()
    with pytest.raises(SystemExit):
        main(["example"])
    assert "outputs.json exists" in capsys.readouterr().err
    scoring, judging = re.findall(r"```py\n(.*?)```", README, re.S)
    exec(compile(scoring, "README.md", "exec"), {})
    *verdicts, score = capsys.readouterr().out.splitlines()
    assert len(verdicts) == 5
    assert float(score) == pytest.approx((1 / 2 + 1 / 3) / 2)
    exec(compile(judging, "README.md", "exec"), {})
    first, others = capsys.readouterr().out.splitlines()
    assert first.startswith("wrong the returned value is 0.0")
    assert others == "['wrong', 'not finite']"


def test_the_example_of_the_format_holds_what_a_file_must(tmp_path: Path) -> None:
    from fourfold_hpc_coder.pareval.files import read_outputs

    [entry] = re.findall(r"```json\n(.*?)```", README, re.S)
    (tmp_path / "outputs.json").write_text(f"[{entry}]")
    questions, omissions = read_outputs(str(tmp_path / "outputs.json"))
    assert [question.name for question in questions] == ["27_reduce_average"]
    assert not omissions


def judges_table() -> str:
    """The cases of the last record in which a judge errs, and the number of each one's errors."""
    record = json.loads(JUDGES.read_text().splitlines()[-1])
    words = {case.name: case.words for case in cases()}
    judges = [*record["findings"]]
    head = [f"| a program that | {' | '.join(judges)} |", "|---|" + "---|" * len(judges)]
    rows = []
    for of_case in zip(*record["findings"].values(), strict=True):
        assert len({one["case"] for one in of_case}) == 1
        if any(one["counted"] != one["may_count"] for one in of_case):
            said = [f"{'counts' if one['counted'] else 'no'} ({one['verdict']})" for one in of_case]
            rows.append(f"| {words[of_case[0]['case']]} | {' | '.join(said)} |")
    errors = [
        f"{sum(one['counted'] and not one['may_count'] for one in findings)} let through, "
        f"{sum(one['may_count'] and not one['counted'] for one in findings)} refused"
        for findings in record["findings"].values()
    ]
    return "\n".join([*head, *rows, f"| errors on {len(words)} | {' | '.join(errors)} |"]) + "\n"


@pytest.mark.skipif(not JUDGES.is_file(), reason="the benchmarks are not beside this package")
def test_the_judges_are_the_record_s() -> None:
    [table] = re.findall(r"<!-- judges -->\n(.*?)<!-- /judges -->", README, re.S)
    assert table == judges_table()


def speed_table() -> str:
    """The last line of the benchmark's record as the README's table."""
    record = json.loads(BENCHMARK.read_text().splitlines()[-1])
    best = {
        name: min(rounds, key=lambda one: one["elapsed_s"])
        for name, rounds in record["rounds"].items()
    }
    theirs = best["ParEval's runner"]
    rows = [
        f"| {name} | {one['elapsed_s']:.3g} s | {theirs['elapsed_s'] / one['elapsed_s']:.3g} | "
        f"{theirs['cpu_s'] / one['cpu_s']:.3g} |"
        for name, one in best.items()
    ]
    head = ["| round | wall time | times faster | in processor time |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows]) + "\n"


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="the benchmarks are not beside this package")
def test_the_speeds_are_the_record_s() -> None:
    [table] = re.findall(r"<!-- speed -->\n(.*?)<!-- /speed -->", README, re.S)
    assert table == speed_table()
