"""What the command line does beside scoring: make data, fine-tune on a file of it, generate outputs."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from fourfold_hpc_coder.bases import LowRank
from fourfold_hpc_coder.generate import Backend, Local, Sampling, generate_file
from fourfold_hpc_coder.instruct.decontaminate import Screen
from fourfold_hpc_coder.instruct.format import FileRows, InstructionLoss
from fourfold_hpc_coder.instruct.pipeline import Budget, Instructions, benchmark_prompts, make
from fourfold_hpc_coder.instruct.samples import read_samples, write_samples
from fourfold_hpc_coder.instruct.seeds import compiled, restoration, seeds
from fourfold_hpc_coder.instruct.sources import DEBIAN, WHEELS, Tree, parallel_files
from fourfold_hpc_coder.instruct.teachers import (
    FUNCTION_ONLY,
    Endpoint,
    Teacher,
    Templates,
    Transformers,
)
from fourfold_hpc_coder.options import Finetune, Generate, MakeData, chosen_models
from fourfold_hpc_coder.problems import own_problems
from fourfold_hpc_coder.sandbox.process import find_sandbox, scratch_folder
from fourfold_parallel.common.files import sha256_of, write_text
from fourfold_parallel.common.progress import Progress
from fourfold_parallel.common.records import read_record
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Published, SmolLM2
from fourfold_parallel.run.objective import KeepAll, TargetMask, announced_mask
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train, trained_model

RESPONSE_FILE = "prompt.json"
"""Beside a tuned model's weights: the token that ended prompts in training, which generation repeats."""


def make_data(options: MakeData, target: Console, progress: Progress) -> None:
    """Make the data and say what was refused, and why, and what it cost."""
    if options.url and not options.teacher:
        raise ValueError(f"--url {options.url} needs --teacher, the name of the model it serves")
    trees = [tree for name in options.trees for tree in _trees(name)]
    teacher: Teacher = Templates()
    if options.url:
        teacher = Endpoint(url=options.url, model_name=options.teacher, key_file=options.key_file)
    elif options.teacher:
        teacher = Transformers(model_name=options.teacher)
    recipe = Instructions(
        samples=options.samples,
        models=chosen_models(options.models),
        categories=options.categories,
        teacher=teacher,
        verified=True,
        seed=options.seed,
    )
    began_s = time.perf_counter()
    made = make(
        recipe,
        progress=progress,
        folder=options.out,
        budget=Budget(taught=options.most_taught, tokens=options.most_tokens),
    )
    tokens = sum(one.provenance.tokens for one in (*made.samples, *made.refused))
    cost = f" at {options.price:g} a million: {tokens * options.price / 1e6:.2f}" if tokens else ""
    short = len(made.samples) < options.samples
    target.print(
        f"{len(made.samples)} samples in {options.out / 'samples.jsonl'}; "
        f"{made.accepted_share:.0%} of those taught were kept; {tokens} tokens were bought{cost}; "
        f"{time.perf_counter() - began_s:.0f} s"
        + (f". The budget ended before {options.samples} were made" if short else ""),
        markup=False,
        soft_wrap=True,
    )
    for reason, count in made.reasons().items():
        target.print(f"refused, {reason}: {count}", markup=False)
    if trees:
        restore(trees, options.out, options.samples, target, progress)


def restore(
    trees: Sequence[Tree], out: Path, most: int, target: Console, progress: Progress
) -> None:
    """Samples from real functions: directives taken out, to be put back; kept if they compile alone."""
    screen = Screen.of(benchmark_prompts())
    sources = [one for one in parallel_files(trees) if "openmp" in one.constructs]
    found = [seed for seed in seeds(sources) if "openmp" in seed.constructs]
    asked = [restoration(seed) for seed in found if not screen.hit(seed.text)]
    files = (out / "restored.jsonl", out / "restored-refused.jsonl")
    kept, refused = ([*read_samples(file)] if file.exists() else [] for file in files)
    known = {one.provenance.task for one in (*kept, *refused)}
    sandbox = find_sandbox(allow_none=False)
    try:
        with scratch_folder() as folder:
            for done, sample in enumerate(asked):
                if len(kept) == most:
                    break
                if sample.provenance.task not in known:
                    [judged] = compiled([sample], sandbox, folder / str(done))
                    (kept if judged.verdict == "compiles" else refused).append(judged)
                progress(done + 1, len(asked), f"{len(kept)} kept")
    finally:
        write_samples(files[0], kept)
        write_samples(files[1], refused)
    target.print(
        f"{len(found)} real functions use OpenMP, near-duplicates counted once; "
        f"{len(found) - len(asked)} resemble a benchmark's prompt; of {len(kept) + len(refused)} "
        f"that were tried {len(kept)} compile alone: {files[0]}",
        soft_wrap=True,
        markup=False,
    )


def _trees(name: str) -> tuple[Tree, ...]:
    if name == "installed":
        return tuple(tree for tree in (*WHEELS, *DEBIAN) if tree.is_here())
    path, separator, licence = name.rpartition(":")
    if not separator:
        raise ValueError(f"--trees {name}: say the licence, as in {name}:MIT, or `installed`")
    return (Tree(name=Path(path).name, licence=licence, path=path),)


def generate(options: Generate, target: Console, progress: Progress) -> None:
    """Generate the file."""
    sampling = Sampling(
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        batch=options.batch,
        model=options.model,
        chat=options.chat or bool(options.url),
    )
    records = [
        one
        for one in _prompts(options.prompts)
        if one["parallelism_model"] in chosen_models(options.models) and options.only in one["name"]
    ]
    if not records:
        named = f" named like {options.only!r}" if options.only else ""
        raise ValueError(
            f"{options.prompts} has no prompt for {options.models}{named}; name other models"
        )
    path = generate_file(records, _backend(options), sampling, options.out, progress)
    target.print(f"{len(records)} prompts answered: {path}; now: score {path}", markup=False)


def _prompts(source: str) -> list[dict[str, str]]:
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
        return [{**one, **{key: one[key] for key in needed}} for one in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--prompts {source}: no JSON list of prompts ({error})") from None


def _backend(options: Generate) -> Backend:
    if options.url:
        return Endpoint(
            url=options.url,
            model_name=options.model,
            key_file=options.key_file,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
        )
    if options.model.startswith(("/", ".", "~")) and not Path(options.model).is_dir():
        raise ValueError(f"--model {options.model}: no such folder; name one, or a hub id")
    from transformers import AutoModelForCausalLM

    note = Path(options.model, RESPONSE_FILE)
    return Local(
        model=AutoModelForCausalLM.from_pretrained(options.model).eval(),
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        before=FUNCTION_ONLY if options.chat else "",
        after=json.loads(note.read_text(encoding="utf-8"))["response"] if note.is_file() else "",
        chat=options.chat,
    )


def finetune(options: Finetune, target: Console, progress: Progress) -> None:
    """Train, and leave a folder that `from_pretrained` reads."""
    run = finetuning(options)
    options.out.mkdir(parents=True, exist_ok=True)
    last = train(
        run,
        record=options.out / "record.jsonl",
        checkpoints=options.out / "checkpoints",
        progress=progress,
    )
    model = trained_model(run, last)
    merged = model.merge_and_unload() if options.lora_rank else model  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(options.out / "model")
    AutoTokenizer.from_pretrained(_folder(options)).save_pretrained(options.out / "model")
    write_text(
        options.out / "model" / RESPONSE_FILE, json.dumps({"response": options.response}) + "\n"
    )
    loss = read_record(options.out / "record.jsonl").last("validation")
    target.print(
        f"{options.steps} steps, held-out loss {loss.number('validation_loss_nats'):.3f} nats per token: "
        f"{options.out / 'model'}",
        markup=False,
    )


def _folder(options: Finetune) -> str:
    return str(SmolLM2().folder()) if options.model == "smollm2" else options.model


def finetuning(options: Finetune) -> Run:
    """The run that the options ask for; the paper's optimizer and schedule (section 1.4 of its scripts).

    What `--leave-out` leaves out is decided sample by sample. A mask that looks at the tokens before a
    target, as goldfish does, sees the prompt before an answer, and never the neighbour in the row: the first
    targets of a sample, whose window would reach there, are kept. The end of a sample is always learnt.

    Raises:
        ValueError: where the data or the tokenizer do not fit, or no installed package has the mask.
    """
    if not options.data.is_file():
        raise ValueError(f"--data {options.data}: no such file; make one with make-data")
    rows = FileRows(
        path=str(options.data),
        sha256=sha256_of(options.data),
        tokenizer=_folder(options),
        response=options.response,
    )
    plain = (
        SmolLM2()
        if options.model == "smollm2"
        else Published(name=options.model, revision="main", licence=options.licence)
    )
    marks = rows.marks()
    also: TargetMask = KeepAll()
    if options.leave_out:
        also = announced_mask(options.leave_out, k=options.leave_out_one_in, exempt=(marks.end,))
    return Run(
        name="tuned",
        model=LowRank(model=plain, rank=options.lora_rank) if options.lora_rank else plain,
        data=rows,
        objective=InstructionLoss(masked=options.masked, also=also, marks=marks),
        optimizer=AdamW(
            learning_rate=options.learning_rate,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-5,
        ),
        schedule=Cosine(warmup_steps=max(1, options.steps // 60), floor=0.0),
        horizon=Steps(count=options.steps),
        batch=options.batch,
        microbatch=options.microbatch,
        sequence=options.sequence,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=options.seed,
        validate_every=10_000,
        checkpoint_every=100,
    )
