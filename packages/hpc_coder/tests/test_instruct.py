"""Laws of the data pipeline: what is kept, what is refused, and what the loss sees."""

import json
import tarfile
import threading
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold_hpc_coder.generate.endpoint import Endpoint
from fourfold_hpc_coder.instruct import pipeline
from fourfold_hpc_coder.instruct.decontaminate import Screen
from fourfold_hpc_coder.instruct.dedup import TextMemory
from fourfold_hpc_coder.instruct.format import (
    OURS,
    InstructionLoss,
    Marks,
    blind_logits,
    encode,
    is_answer,
    is_padding,
    packed,
    sample_positions,
)
from fourfold_hpc_coder.instruct.grammar import SHAPES, all_tasks
from fourfold_hpc_coder.instruct.pipeline import (
    HELD_OUT_EVERY,
    Budget,
    Instructions,
    benchmark_prompts,
    held_out,
    make_samples,
    templates,
)
from fourfold_hpc_coder.instruct.samples import ANY, read_samples, write_samples
from fourfold_hpc_coder.instruct.seeds import compiled, harvest, restoration
from fourfold_hpc_coder.instruct.sources import Tree, parallel_files
from fourfold_hpc_coder.instruct.teachers import ModelTeacher, Templates, shuffled_tasks, split
from fourfold_hpc_coder.instruct.verify import verify
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.reproduce.experiment import pupil
from fourfold_hpc_coder.reproduce.recipes import tuned
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import IGNORE, KeepAll

ROUNDING = 1e-5  # float32 logits of a small model, summed in another order

samples = st.lists(
    st.tuples(
        st.lists(st.integers(2, 20), min_size=1, max_size=6),
        st.lists(st.integers(2, 20), min_size=0, max_size=6),
    ),
    min_size=1,
    max_size=8,
)


def ids(pair) -> list[int]:
    prompt, answer = pair
    return [*prompt, OURS.response, *answer, OURS.end]


@given(samples)
def test_the_loss_sees_exactly_the_answers(pairs) -> None:
    """Every token of every answer and its end is a target, nothing else, however samples share rows."""
    rows = torch.from_numpy(np.stack(packed([ids(pair) for pair in pairs], row=24)))
    seen = sorted(rows[is_answer(rows)].tolist())
    assert seen == sorted(token for _, answer in pairs for token in [*answer, OURS.end])
    batch = Batch(tokens=rows, document_ids=rows, addresses=())
    whole = InstructionLoss(masked=False, also=KeepAll()).targets(batch)
    supervised = int((whole != IGNORE).sum())
    first_tokens = len(rows)  # of each row: nothing comes before them
    assert supervised == sum(len(ids(pair)) for pair in pairs) - first_tokens


@given(samples)
def test_rows_hold_whole_samples_and_padding(pairs) -> None:
    rows = packed([ids(pair) for pair in pairs], row=24)
    found = []
    for row in rows:
        assert len(row) == 24
        pieces = " ".join(map(str, row)).split(f" {OURS.end}")
        found += [tuple(map(int, piece.split())) for piece in pieces if piece.strip()]
    assert sorted(found) == sorted(tuple(ids(pair)[:-1]) for pair in pairs)
    stacked = torch.from_numpy(np.stack(rows))
    total = sum(len(ids(pair)) for pair in pairs)
    assert int(is_padding(stacked).sum()) == stacked.numel() - total


def test_a_sample_longer_than_a_row_is_refused_with_the_length_that_fits() -> None:
    with pytest.raises(ValueError, match="use a sequence of 9"):
        packed([[5] * 10], row=4)


@settings(max_examples=10, deadline=None)
@given(samples)
def test_packing_changes_no_logit(pairs) -> None:
    """Each sample's logits in a shared row equal those of the sample alone."""
    model = Llama(
        width=32, depth=2, heads=2, kv_heads=2, hidden=48, vocabulary=24, context=64, tied=True
    ).build(seed=0)
    rows = torch.from_numpy(np.stack(packed([ids(pair) for pair in pairs], row=24)))
    logits = blind_logits(model, rows)
    number, place = sample_positions(rows)
    for pair in pairs[:3]:
        alone = torch.tensor([ids(pair)])
        expected = model(input_ids=alone, use_cache=False).logits[0]
        matches = []
        for row in range(len(rows)):
            for which in range(int(number[row].max()) + 1):
                inside = number[row] == which
                if rows[row][inside].tolist() == ids(pair):
                    matches.append(logits[row][inside])
        assert matches
        assert all(torch.allclose(found, expected, atol=ROUNDING) for found in matches)
    assert int(place.min()) == 0


@dataclass(frozen=True)
class DropEven:
    """Stands for a goldfish mask."""

    def drop(self, tokens, document_ids=None):
        return tokens % 2 == 0


def test_a_further_mask_leaves_out_what_it_says() -> None:
    rows = torch.tensor([[3, OURS.response, 4, 5, 7, 8, OURS.end]])
    batch = Batch(tokens=rows, document_ids=rows, addresses=())
    targets = InstructionLoss(masked=True, also=DropEven()).targets(batch)
    assert targets.tolist() == [[IGNORE, IGNORE, 5, 7, IGNORE, IGNORE]]


def test_marks_of_another_tokenizer_work_the_same() -> None:
    marks = Marks(end=9, response=8)
    rows = torch.tensor([[3, 8, 4, 5, 9, 6, 8, 7, 9, 9]])
    assert rows[is_answer(rows, marks)].tolist() == [4, 5, 9, 7, 9]


def test_held_out_tasks_are_never_taught() -> None:
    taught = {one.provenance.task for one in make_samples(templates(150, verified=False)).samples}
    assert taught.isdisjoint(task.name for task in held_out(24, seed=0))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_split_is_of_tasks_and_does_not_depend_on_their_order(seed: int) -> None:
    parts = [split(shuffled_tasks(s, SHAPES), "held-out", every=HELD_OUT_EVERY) for s in (0, seed)]
    assert {task.name for task in parts[0]} == {task.name for task in parts[1]}
    both = split(shuffled_tasks(seed, SHAPES), "train", every=HELD_OUT_EVERY)
    assert len(both) + len(parts[0]) == len(all_tasks())


def test_two_runs_make_the_same_bytes_and_a_stopped_one_goes_on(tmp_path: Path) -> None:
    recipe = templates(40, verified=False)
    make_samples(recipe, folder=tmp_path / "a")
    whole = (tmp_path / "a" / "samples.jsonl").read_text()
    make_samples(recipe, folder=tmp_path / "b")
    assert (tmp_path / "b" / "samples.jsonl").read_text() == whole
    (tmp_path / "c").mkdir()
    cut = whole[: whole.index("\n", len(whole) // 2) + 30]
    (tmp_path / "c" / "samples.jsonl").write_text(cut)
    assert len(make_samples(recipe, folder=tmp_path / "c").samples) == 40
    assert (tmp_path / "c" / "samples.jsonl").read_text() == whole


def test_a_kill_between_two_files_shifts_nothing(tmp_path: Path, monkeypatch) -> None:
    """The refused are written first: those of a batch whose kept ones never came are made again."""
    known = {"every fourth": "x"}
    seen: list[str] = []

    def refusing(sample, memory, screen) -> str:
        seen.append(sample.provenance.task)
        return "wrong" if hash_of(sample) % 4 == 0 else ""

    def hash_of(sample) -> int:
        return sum(sample.answer.encode())

    monkeypatch.setattr(pipeline, "_refusal", refusing)
    recipe = templates(40, verified=False)
    whole = make_samples(recipe, folder=tmp_path / "whole", against=known)
    assert whole.refused
    cut = tmp_path / "cut"
    make_samples(recipe, folder=cut, against=known, budget=Budget(taught=16))
    kept, mark = (cut / "samples.jsonl").read_bytes(), (cut / "saved.json").read_bytes()
    make_samples(recipe, folder=cut, against=known, budget=Budget(taught=32))
    (cut / "samples.jsonl").write_bytes(kept)
    (cut / "saved.json").write_bytes(mark)
    assert make_samples(recipe, folder=cut, against=known) == whole
    for name in ("samples.jsonl", "refused.jsonl", "saved.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (cut / "refused.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds 0 of"):
        make_samples(recipe, folder=cut, against=known)


def test_another_benchmarks_prompts_are_kept_out_too(tmp_path: Path) -> None:
    recipe = templates(4, verified=False)
    first = make_samples(recipe, folder=tmp_path / "free").samples[0]
    prompts = tmp_path / "theirs.json"
    prompts.write_text(json.dumps([{"name": "p1", "prompt": first.instruction}]))
    against = pipeline.prompts_of(prompts)
    assert against == {"theirs p1": first.instruction}
    made = make_samples(recipe, folder=tmp_path / "screened", against=against)
    assert "contaminated: theirs p1" in made.reasons()
    assert first.instruction not in [sample.instruction for sample in made.samples]
    with pytest.raises(ValueError, match="other options"):
        make_samples(recipe, folder=tmp_path / "free", against=against)
    prompts.write_text('{"prompt": "one"}\n{"task_id": 7, "prompt": "two"}\n')
    assert pipeline.prompts_of(prompts) == {"theirs 0": "one", "theirs 7": "two"}
    prompts.write_text('[{"text": "one"}]')
    with pytest.raises(ValueError, match="needs the text `prompt`"):
        pipeline.prompts_of(prompts)


def test_samples_survive_reading_and_writing(tmp_path: Path) -> None:
    made = make_samples(templates(5, verified=False)).samples
    write_samples(tmp_path / "x.jsonl", made)
    assert read_samples(tmp_path / "x.jsonl") == made
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text().rstrip("\n"))
    assert read_samples(tmp_path / "x.jsonl") == made
    assert read_samples(tmp_path / "x.jsonl", is_being_made=True) == made[:-1]
    (tmp_path / "x.jsonl").write_text('{"category": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_samples(tmp_path / "x.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\v", "\f"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    """JSON need not escape what Python calls the end of a line; the rest of the file was once left out."""
    made = make_samples(templates(3, verified=False)).samples
    spoken = replace(made[1], instruction=f"/* one{separator}two */")
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps(asdict(sample), ensure_ascii=False) for sample in (made[0], spoken, made[2])
    ]
    # A strict parser wants control characters escaped; the others it takes as they are.
    path.write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8", newline="")
    assert read_samples(path) == (made[0], spoken, made[2])


def test_only_right_answers_are_kept(bench) -> None:
    """Of a teacher that spoils half of its answers, the kept half is right, and the rest says why."""
    workbench = bench
    spoiling = Templates(corrupted=1.0)
    verdicts = []
    for task in all_tasks()[2:200:90]:
        for teacher in (Templates(), spoiling):
            sample = teacher.teach(task, "serial", "programming")
            prompt = f"{task.problem().declaration('serial')} {{"
            [found] = verify(workbench, task, "serial", prompt, [sample.answer])
            verdicts.append((teacher is spoiling, found.verdict == "correct"))
    assert all(right for spoiled, right in verdicts if not spoiled)
    assert sum(right for spoiled, right in verdicts if spoiled) <= 1


@pytest.mark.parametrize("category", ANY)
def test_every_category_has_an_instruction_that_opens_the_function(category) -> None:
    task = all_tasks()[7]
    sample = Templates().teach(task, "omp", category)
    assert sample.instruction.endswith("{")
    assert sample.answer.rstrip().endswith("}")
    assert len({Templates().teach(task, "omp", one).instruction for one in ANY}) == len(ANY)


def test_an_impossible_recipe_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Instructions(
            samples=0,
            models=("omp",),
            categories=("programming",),
            teacher=Templates(),
            verified=False,
            seed=0,
        )


def test_near_duplicates_are_seen() -> None:
    text = " ".join(f"word{i}" for i in range(60))
    seen = TextMemory.of([text], threshold=0.7)
    assert not seen.add(text.replace(" ", "\n"))
    assert not seen.add(text + " more")
    assert seen.add(" ".join(f"other{i}" for i in range(60)))


def test_a_planted_benchmark_prompt_is_caught() -> None:
    """Verbatim, and reworded; an honest sample is let through."""
    screen = Screen.of(benchmark_prompts())
    prompts = benchmark_prompts()
    name = "53_stencil_2d_jacobi_5-point_stencil omp"
    assert screen.hit(f"// from a blog\n{prompts[name]}\nreturn;").startswith(
        name.split(maxsplit=1)[0]
    )
    words = prompts[name].split("/*")[1].split("*/")[0].split()
    swapped = " ".join(words[::-1])
    assert screen.hit(f"/* {swapped} */").startswith(name.split(maxsplit=1)[0])
    assert (
        screen.hit("/* Write a web server that listens on a port and greets everyone by name */")
        == ""
    )
    assert screen.report([prompts[name], "nothing"]) == {screen.hit(prompts[name]): 1}


SOURCE = """
#include <omp.h>
double total(const double *x, long n) {
    double sum = 0;
    #pragma omp parallel for \\
        reduction(+:sum)
    for (long i = 0; i < n; ++i) sum += x[i];
    return sum;
}
int plain(int a) { return a + 1; }
void broken(unknown_type q) {
    #pragma omp parallel
    q.run();
}
"""


def _tree(folder: Path, licence: str = "MIT") -> Tree:
    return Tree(name="made", licence=licence, path=str(folder))


def test_seeds_are_whole_parallel_functions_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.cpp").write_text(SOURCE)
    (tmp_path / "src" / "copy.cpp").write_text(SOURCE)
    (tmp_path / "notes.txt").write_text("#pragma omp")
    found = harvest(parallel_files([_tree(tmp_path)])).seeds
    assert [seed.origin for seed in found] == ["made/src/a.cpp:3-9", "made/src/a.cpp:11-14"]
    assert found[0].text.startswith("double total")
    assert {seed.licence for seed in found} == {"MIT"}


FOREIGN = {
    "a lambda of Kokkos'": (
        "void f(V x) { Kokkos::parallel_for(n, KOKKOS_LAMBDA(const int i) { x(i) = 0; }); }\n",
        "kokkos",
    ),
    "a function of Kokkos'": (
        'KOKKOS_INLINE_FUNCTION void g(int i) { Kokkos::abort(i ? "a" : "b"); }\n',
        "kokkos",
    ),
    "a kernel": ("__global__ void h(float *__restrict__ x) { x[threadIdx.x] = 0; }\n", "cuda"),
    "a kernel with bounds": (
        "__global__ void __launch_bounds__(256, 2) k(int *x) {\n    __shared__ int y[8];\n"
        "    y[threadIdx.x] = x[0];\n}\n",
        "cuda",
    ),
    "a launch": (
        "void l(int *x) { auto i = threadIdx.x; h<<<dim3(1, 2),\n    64>>>(x + i); }\n",
        "cuda",
    ),
    "a lambda of CUDA's": (
        "void m(int n) { each(n, [=] __device__ (int i) { return threadIdx.x + i; }); }\n",
        "cuda",
    ),
    "a lambda of C++": (
        "void o(V x) { Kokkos::parallel_for(n, [=](const int i) { x(i) = 0; }); }\n",
        "kokkos",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_words_that_are_no_cpp_lose_no_function(kind: str, tmp_path: Path) -> None:
    """Of Kokkos' functions they lost half, of CUDA's nearly all."""
    text, construct = FOREIGN[kind]
    (tmp_path / "a.cu").write_text(f"int plain;\n{text}")
    found = harvest(parallel_files([_tree(tmp_path)]))
    assert [seed.text for seed in found.seeds] == [text.rstrip("\n")]
    assert found.seeds[0].constructs == (construct,)
    assert not found.unread


def test_functions_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(f"{SOURCE}\nvoid f(V x) {{\n#pragma omp parallel\n  x.(1; }}\n")
    found = harvest(parallel_files([_tree(tmp_path)]))
    assert len(found.seeds) == 2
    assert found.unread == {"openmp": 1}


def test_archives_are_read_like_folders(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(SOURCE)
    archive = tmp_path / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as packed_file:
        packed_file.add(tmp_path / "a.cpp", "pkg-1.0/a.cpp")
    [file] = parallel_files([Tree(name="sdist", licence="MIT", path=str(archive))])
    assert (file.path, file.constructs) == ("pkg-1.0/a.cpp", ("openmp",))


def test_other_licences_and_absent_trees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GPL-3\.0"):
        parallel_files([_tree(tmp_path, "GPL-3.0")])
    with pytest.raises(ValueError, match="no folder"):
        parallel_files([Tree(name="x", licence="MIT", path=str(tmp_path / "none"))])


def test_a_real_function_is_asked_for_without_its_directives(tmp_path: Path, sandbox) -> None:
    """And kept only if it compiles by itself."""
    (tmp_path / "a.cpp").write_text(SOURCE)
    found = [restoration(seed) for seed in harvest(parallel_files([_tree(tmp_path)])).seeds]
    assert "pragma" not in found[0].instruction
    assert "reduction" not in found[0].instruction
    assert "reduction(+:sum)" in found[0].answer
    judged = compiled(found, sandbox, tmp_path / "jobs")
    assert [one.verdict for one in judged] == ["compiles", "no build"]


REFUSALS: dict[str, object] = {
    "openai": {"error": {"message": "max_tokens is too large: 512", "type": "invalid"}},
    "vllm": {"object": "error", "message": "max_tokens is too large: 512"},
    "fastapi": {"detail": "max_tokens is too large: 512"},
    "plain": {"error": "max_tokens is too large: 512"},
    "text": "max_tokens is too large: 512",
    "other": {"why": "max_tokens is too large: 512"},
}
"""How servers say why they refuse."""


@pytest.fixture
def endpoint():
    """A server that speaks the completions protocol and answers with a fenced function."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][0]["content"]
            if "broken" in body["model"]:
                reply = {"error": "no such model"}
            elif "mute" in body["model"]:
                reply = {"choices": [{"message": {"content": None}}], "usage": None}
            elif "parts" in body["model"]:
                parts = [{"type": "text", "text": "return "}, {"type": "text", "text": "7; }"}]
                reply = {"choices": [{"message": {"content": parts}}]}
            elif "refused" in body["model"]:
                reply = REFUSALS[body["model"].split()[1]]
            else:
                opened = asked[asked.rindex("*/\n") + 3 :]
                text = f"Sure:\n```cpp\n{opened}\n    return 7;\n}}\n```\nDone."
                reply = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 30}}
            data = b"<html>" if "page" in body["model"] else json.dumps(reply).encode()
            self.send_response(400 if "refused" in body["model"] else 200)
            if "cut" in body["model"]:
                self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_served_teacher_answers_like_any_other(endpoint: str) -> None:
    task = next(task for task in all_tasks() if task.shape == "count")
    teacher = ModelTeacher(model=Endpoint(url=endpoint, model_name="m"))
    sample = teacher.teach(task, "omp", "programming")
    assert sample.answer.strip() == "return 7;\n}"
    assert sample.provenance.teacher == "m"


def test_a_budget_ends_the_teaching_and_a_larger_one_goes_on(endpoint: str, tmp_path: Path) -> None:
    """Nothing is bought twice; every sample knows its tokens; a wrong answer costs as much as a right one."""
    recipe = Instructions(
        samples=9,
        models=("serial",),
        categories=("programming",),
        teacher=ModelTeacher(model=Endpoint(url=endpoint, model_name="m")),
        verified=False,
        seed=0,
    )
    first = make_samples(recipe, folder=tmp_path, budget=Budget(tokens=80))
    taught = [*first.samples, *first.refused]
    assert [one.provenance.tokens for one in taught] == [30] * 3
    more = make_samples(recipe, folder=tmp_path, budget=Budget(taught=5))
    assert len(more.samples) + len(more.refused) == 5
    assert more.samples[: len(first.samples)] == first.samples


def test_an_error_of_the_teacher_loses_no_answer(tmp_path: Path) -> None:
    """What was paid for is on disk, also where the batch was not full."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Failing:
        name: str = "failing"

        def teach(self, task, model, category):
            if len(read_samples(tmp_path / "count.jsonl")) == 3:
                raise ValueError("no more")
            sample = Templates().teach(task, model, category)
            write_samples(
                tmp_path / "count.jsonl", [*read_samples(tmp_path / "count.jsonl"), sample]
            )
            return sample

    write_samples(tmp_path / "count.jsonl", [])
    recipe = replace(templates(9, verified=False), teacher=Failing())
    with pytest.raises(ValueError, match="no more"):
        make_samples(recipe, folder=tmp_path)
    assert len(read_samples(tmp_path / "samples.jsonl")) == 3


def test_a_server_that_answers_otherwise_is_named(endpoint: str) -> None:
    with pytest.raises(ValueError, match="no completion"):
        Endpoint(url=endpoint, model_name="broken").complete_many(["x"])
    with pytest.raises(ValueError, match="<html>, which is no completion"):
        Endpoint(url=endpoint, model_name="broken page").complete_many(["x"])
    with pytest.raises(ValueError, match="gave no answer"):
        Endpoint(url=endpoint, model_name="broken, cut").complete_many(["x"])
    assert Endpoint(url=endpoint, model_name="parts").complete_many(["x"]) == ["return 7; }"]
    assert Endpoint(url=endpoint, model_name="mute").complete_many(["x"]) == [""]
    with pytest.raises(ValueError, match="no http address"):
        Endpoint(url="ftp://x", model_name="m").complete_many(["x"])


@pytest.mark.parametrize("form", REFUSALS)
def test_a_servers_refusal_is_quoted(endpoint: str, form: str) -> None:
    with pytest.raises(ValueError, match=r"refused .*400.*max_tokens is too large: 512"):
        Endpoint(url=endpoint, model_name=f"refused {form}").complete_many(["x"])


def test_the_tokenizer_never_merges_across_the_end_of_the_prompt() -> None:
    """The same ids for a prompt, whatever its answer: what is trained on is what is generated from."""
    study = tuned("full", 0, "smoke")
    fast = study.rows.tokenizer.fast()
    asking = pupil(cast("Any", None), study)
    for sample in pipeline.make_samples(templates(6, verified=False)).samples:
        whole = encode(fast, sample)
        asked = asking._encode(sample.instruction)
        assert whole[: len(asked)] == asked
        assert asked[-1] == OURS.response
        assert fast.decode(whole[len(asked) : -1]) == f"\n{sample.answer}"


def test_compilers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "g++" in toolchain.missing("serial")
    assert "hipcc" in toolchain.missing("hip")
