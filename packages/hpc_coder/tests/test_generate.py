"""What is taken from a model's words, and files of outputs that can be stopped and continued."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold_hpc_coder.generate.local import Local, open_local
from fourfold_hpc_coder.generate.outputs import Sampling, generate_file
from fourfold_hpc_coder.instruct.format import CodePairs
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.files import read_outputs
from fourfold_parallel.common.progress import silent
from fourfold_parallel.run.models import Llama

PROMPT = "/* Add one. */\nint f(int x) {"

CASES = {
    "a bare body": ("\n    return x + 1;\n}", "\n    return x + 1;\n}"),
    "text after the body": ("return 1; }\n\nint main() { }", "return 1; }"),
    "nested braces": ("if (x) { return 1; } return 2; } more", "if (x) { return 1; } return 2; }"),
    "a brace in a character": ("char c = '}'; return c; } x", "char c = '}'; return c; }"),
    "a brace in a string": ('auto s = "}}"; return 1; } x', 'auto s = "}}"; return 1; }'),
    "a brace in a comment": ("// }\n/* } */ return 1; } x", "// }\n/* } */ return 1; }"),
    "an escaped quote": ('auto s = "\\"}"; return 1; } x', 'auto s = "\\"}"; return 1; }'),
    "no closing brace": ("return 1;", "return 1;"),
    "a fenced body": ("Here:\n```cpp\nreturn 1; }\n```\nbye }", "return 1; }"),
    "a fenced function": ("```c++\nint f(int x) {\n  return 1;\n}\n```", "\n  return 1;\n}"),
    "two fences": (
        "```\nnpm run\n```\nThen:\n```cpp\nint f(int y) { return 1; }\n```",
        " return 1; }",
    ),
    "a helper before it": (
        "```cpp\nint g() { return 1; }\nint f(int x) { return g(); }\n```",
        " return g(); }",
    ),
    "the function again": ("int f(int x) { return 1; }", " return 1; }"),
    "a mention in a comment": ("// f is simple\nreturn 1; }", "// f is simple\nreturn 1; }"),
    "an open fence": ("```cpp\nint f(int x) { return 1; }", " return 1; }"),
    "nothing": ("", ""),
    "a fence of Windows": ("Here:\r\n```cpp\r\nreturn 1; }\r\n```", "return 1; }"),
    "a fence with a title": ("``` cpp title\nreturn 1; }\n```", "return 1; }"),
    "a call in a condition": (
        "if (f(x - 1)) { x += 1; } return x; }",
        "if (f(x - 1)) { x += 1; } return x; }",
    ),
    "a type on its own line": ("static int\nf(int x)\n{ return 1; }", " return 1; }"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_body_is_found(case: str) -> None:
    text, body = CASES[case]
    assert body_of(text, PROMPT) == body


class Counting:
    """A backend that fails on purpose after some prompts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: list[str] = []

    def complete_many(self, prompts, *, first: int = 0) -> list[str]:
        if len(self.seen) + len(prompts) > self.limit:
            raise KeyboardInterrupt
        self.seen += prompts
        return [f"return {len(prompt)}; }} trailing" for prompt in prompts]


def records(count: int) -> list[dict]:
    return [
        {
            "problem_type": "reduce",
            "language": "cpp",
            "name": f"p{index}",
            "parallelism_model": "omp",
            "prompt": f"int f{index}(int x) {{",
        }
        for index in range(count)
    ]


SAMPLING = Sampling(samples=2, temperature=0.0, top_p=1.0, max_new_tokens=8, batch=2)


def test_a_stopped_generation_goes_on_and_keeps_what_it_had(tmp_path: Path) -> None:
    """Also in the file: ParEval's generator leaves cached answers out of it."""
    out = tmp_path / "outputs.json"
    with pytest.raises(KeyboardInterrupt):
        generate_file(records(3), Counting(4), SAMPLING, out, silent)
    again = Counting(99)
    generate_file(records(3), again, SAMPLING, out, silent)
    assert len(again.seen) == 2
    questions, problems = read_outputs(out)
    assert [question.name for question in questions] == ["p0", "p1", "p2"]
    assert not problems
    assert all(len(question.outputs) == 2 for question in questions)
    assert json.loads(out.read_text())[0]["raw_outputs"][0].endswith("trailing")
    assert not questions[0].outputs[0].endswith("trailing")


def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "outputs.json"
    out.write_text('"my thesis"')
    with pytest.raises(ValueError, match="another file"):
        generate_file(records(1), Counting(9), SAMPLING, out, silent)
    assert out.read_text() == '"my thesis"'
    with pytest.raises(ValueError, match="samples=0"):
        Sampling(samples=0, temperature=0.0, top_p=1.0, max_new_tokens=8, batch=2)


def test_outputs_of_other_options_are_neither_taken_nor_lost(tmp_path: Path) -> None:
    """Another model's answers were once taken for this one's, and other prompts' answers dropped."""
    out = tmp_path / "outputs.json"
    generate_file(records(3)[1:], Counting(9), SAMPLING, out, silent)
    before = out.read_text()
    for other in ({"model": "other"}, {"temperature": 0.5}, {"samples": 3}, {"chat": True}):
        with pytest.raises(ValueError, match="other options"):
            generate_file(records(3), Counting(9), replace(SAMPLING, **other), out, silent)
    assert out.read_text() == before
    generate_file(records(3)[:1], Counting(9), SAMPLING, out, silent)
    assert [one["name"] for one in json.loads(out.read_text())] == ["p1", "p2", "p0"]


def test_every_batch_of_samples_is_drawn_anew(tmp_path: Path) -> None:
    """Each batch once began from the same seed: of eight samples four were copies."""
    fast = CodePairs(vocabulary=300, samples=20).fast()
    model = Llama(
        width=32, depth=2, heads=2, kv_heads=2, hidden=48, vocabulary=300, context=256, tied=True
    ).build(seed=3)
    local = Local(model=model.eval(), tokenizer=fast, max_new_tokens=12, temperature=1.0, top_p=1.0)
    sampling = replace(SAMPLING, samples=8, temperature=1.0)
    texts = []
    for name in ("once", "again"):
        generate_file(records(1), local, sampling, tmp_path / name, silent)
        texts.append(json.loads((tmp_path / name).read_text())[0]["raw_outputs"])
    assert len(set(texts[0])) == 8
    assert texts[0] == texts[1]


def test_batching_changes_no_greedy_answer() -> None:
    """Prompts of different lengths answered together and one by one."""
    fast = CodePairs(vocabulary=300, samples=20).fast()
    model = Llama(
        width=32, depth=2, heads=2, kv_heads=2, hidden=48, vocabulary=300, context=256, tied=True
    ).build(seed=3)
    local = Local(model=model.eval(), tokenizer=fast, max_new_tokens=12)
    prompts = ["/* Use OpenMP. */\nint f(", "x", "for (size_t i = 0; i < x.size(); ++i) {"]
    with torch.no_grad():
        assert local.complete_many(prompts) == [local.complete_many([one])[0] for one in prompts]


def test_the_model_of_the_wheel_has_a_name_here_too() -> None:
    """`generate --model smollm2` looked for a hub id of that name."""
    backend = open_local("smollm2", max_new_tokens=2)
    assert backend.model.num_parameters() > 134e6
    assert backend.complete_many(["int f(int x) {"]) != [""]
