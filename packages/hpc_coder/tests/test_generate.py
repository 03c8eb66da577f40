"""What is taken from a model's words, and files of outputs that can be stopped and continued."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from fourfold_hpc_coder.generate.local import Local, open_local
from fourfold_hpc_coder.generate.outputs import Sampling, generate_file
from fourfold_hpc_coder.instruct.format import OURS, CodePairs, encode
from fourfold_hpc_coder.instruct.samples import InstructionSample, Provenance
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.files import read_outputs
from fourfold_parallel.common.progress import silent
from fourfold_parallel.run.models import Llama

LINEAR_S = 10
"""Ten times what a linear scan takes here, on a busy machine; a quadratic one takes minutes."""
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
    "a fence of the prompt's closed": ("\n  return 1;\n}\n```\nIt adds one.", "\n  return 1;\n}"),
    "a fence closed before a usage example": (
        "return 1; }\n```\nUse it so:\n```cpp\nint main() { f(1); }\n```",
        "return 1; }",
    ),
    "the function again, and a fence closed": (
        "int f(int x) { return 1; }\n```\nUsage:\n```cpp\nf(1);\n```",
        " return 1; }",
    ),
    "prose with a brace before a fence": (
        "The set {x} is closed:\n```cpp\nreturn 1; }\n```",
        "return 1; }",
    ),
    "a call before it is defined": (
        "int g() { return f(1); }\nint f(int x) { return 2; }",
        " return 2; }",
    ),
    "a name that it begins with": (
        "int f2(int x) { return 1; }\n",
        "int f2(int x) { return 1; }\n",
    ),
    "a type on its own line": ("static int\nf(int x)\n{ return 1; }", " return 1; }"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_body_is_found(case: str) -> None:
    text, body = CASES[case]
    assert body_of(text, PROMPT) == body


def test_a_fence_that_the_prompt_opened_needs_no_closing_brace_before_it() -> None:
    text = "return 1;\n```\nThis adds one to `x`."
    assert body_of(text, f"Complete:\n```cpp\n{PROMPT}") == "return 1;\n"


@pytest.mark.parametrize(
    "piece",
    [
        "\n",
        "f(",
        "f (x)\n",
        "/*",
        "```",
        '"',
        "int f(int x)\n",
        "f\n\n(",
        "{",
        "' ",
        "```\n",
        "f();\n",
    ],
)
def test_a_reply_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    """Some hundred blank lines once took time that grew with their cube."""
    began_s = time.process_time()
    body_of(piece * 50_000, PROMPT)
    assert time.process_time() - began_s < LINEAR_S


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


def test_a_translation_is_asked_for_with_its_source(tmp_path: Path) -> None:
    """Once the prompt alone was asked, which says nothing of what to translate."""
    [record] = records(1)
    sources = [f"// {model}\nint f0(int x) {{ return 1; }}\n{record['prompt']}\n" for model in "ab"]
    translations = [{**record, "translation_prompt": source} for source in sources]
    seen = Counting(99)
    generate_file(translations, seen, SAMPLING, tmp_path / "o.json", silent)
    assert seen.seen == [source for source in sources for _ in range(2)]
    questions, _ = read_outputs(tmp_path / "o.json")
    assert [question.prompt for question in questions] == [record["prompt"]] * 2
    again = Counting(0)
    generate_file(translations, again, SAMPLING, tmp_path / "o.json", silent)


BEGIN, TURN_END = "<|begin|>", "<|turn_end|>"


@pytest.fixture
def begun() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before every text, and has one that ends a turn."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(
            CodePairs(vocabulary=300, samples=20).fast().backend_tokenizer.to_str()
        ),
        eos_token="<|end|>",
        bos_token=BEGIN,
    )
    fast.add_tokens([AddedToken(TURN_END, special=True)], special_tokens=True)
    begin = fast.convert_tokens_to_ids(BEGIN)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    return fast


class Scripted:
    """In the place of a model: writes what it is told to, and keeps what it is asked."""

    device = torch.device("cpu")

    def __init__(self, script: list[int], ends: int | list[int] | None) -> None:
        self.script, self.asked = script, {}
        self.generation_config = GenerationConfig(eos_token_id=ends)

    def generate(self, **asked: Any) -> torch.Tensor:
        self.asked = asked
        told = torch.tensor([self.script] * len(asked["input_ids"]))
        return torch.cat([asked["input_ids"], told], dim=1)


def scripted(fast: PreTrainedTokenizerFast, words: str, ends: int | list[int] | None) -> Local:
    model: Any = Scripted(fast.encode(words, add_special_tokens=False), ends)
    return Local(model=model, tokenizer=fast, max_new_tokens=9)


def test_a_prompt_begins_as_the_tokenizer_begins_every_text(begun: PreTrainedTokenizerFast) -> None:
    """Base models do badly without; what the prompt spells is data, what ends it is not."""
    local = replace(scripted(begun, "x", None), after="<|response|>")
    asked = f"{BEGIN} // {TURN_END}\nint f() {{"
    local.complete_many([asked])
    [row] = local.model.asked["input_ids"].tolist()
    begin, response = begun.convert_tokens_to_ids([BEGIN, "<|response|>"])
    assert (row[0], row[-1]) == (begin, response)
    assert begun.decode(row[1:-1]) == asked
    assert {begin, response, begun.convert_tokens_to_ids(TURN_END)}.isdisjoint(row[1:-1])
    sample = InstructionSample(
        category="programming",
        model="omp",
        instruction=asked,
        answer=f"return 1; }} // {TURN_END}<|end|>",
        provenance=Provenance(teacher="me", task="t", seed_origin="", licence="MIT"),
        verdict="correct",
    )
    trained = encode(begun, sample)
    assert trained[: len(row)] == row
    assert begun.decode(trained[len(row) : -1]) == f"\n{sample.answer}"
    assert trained.count(OURS.end) == 1


def test_a_chats_prompt_is_data_within_its_template(begun: PreTrainedTokenizerFast) -> None:
    begun.chat_template = (
        f"{BEGIN}{{% for m in messages %}}{{{{ m['content'] }}}}{TURN_END}{{% endfor %}}"
    )
    local = replace(scripted(begun, "x", None), chat=True)
    local.complete_many([f"say {TURN_END}"])
    [row] = local.model.asked["input_ids"].tolist()
    begin, end = begun.convert_tokens_to_ids([BEGIN, TURN_END])
    assert (row[0], row[-1], row.count(begin), row.count(end)) == (begin, end, 1, 1)
    assert begun.decode(row[1:-1]) == f"say {TURN_END}"


@pytest.mark.parametrize("ends", ["the text's", "the turn's", "both", "none"])
def test_a_model_stops_at_each_of_its_own_ends(begun: PreTrainedTokenizerFast, ends: str) -> None:
    """A chat model has two; a tokenizer may know none of them."""
    text, turn = begun.convert_tokens_to_ids(["<|end|>", TURN_END])
    own: int | list[int] | None = {
        "the text's": text,
        "the turn's": turn,
        "both": [text, turn],
        "none": None,
    }[ends]
    if ends in ("the turn's", "none"):
        begun.eos_token = None
    local = scripted(begun, f"a{TURN_END}b<|end|>c", own)
    [said] = local.complete_many(["int f() {"])
    assert (
        said
        == {
            "the text's": f"a{TURN_END}b",
            "the turn's": "a",
            "both": "a",
            "none": f"a{TURN_END}b<|end|>c",
        }[ends]
    )
    stops = local.model.asked["eos_token_id"]
    assert (
        stops
        == {"the text's": [text], "the turn's": [turn], "both": [text, turn], "none": None}[ends]
    )


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
