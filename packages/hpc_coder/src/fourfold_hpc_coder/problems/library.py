"""This package's own problems, a file each beside this one.

Names and signatures are those of ParEval, so that outputs generated for its prompts are scored here without
its files; wording, references, inputs and drivers are ours. A problem's sequential reference and its answers
in the parallel models come from one kernel.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fourfold_hpc_coder.problems import kernels
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.problems.signature import linked, parse_signature
from fourfold_hpc_coder.vocabulary import Model


@lru_cache(maxsize=1)
def own_problems() -> Mapping[str, Problem]:
    """Every problem of this package, by name, in order of the names."""
    files = sorted(Path(__file__).parent.glob("*.toml"))
    return {file.stem: read_problem(file.stem, file.read_text(encoding="utf-8")) for file in files}


_SHAPES = {
    "map": kernels.Map,
    "reduce": kernels.Reduce,
    "accumulate": kernels.Accumulate,
    "scan": kernels.Scan,
}


def read_problem(name: str, text: str) -> Problem:
    """A problem from its file.

    Raises:
        ValueError: where the file does not describe every parameter.
    """
    described = tomllib.loads(text)
    signature = parse_signature(described["signature"], described.get("structures", {}))
    lacking = [
        parameter.name
        for parameter in signature.parameters
        if parameter.name not in described["inputs"]
    ]
    if lacking:
        raise ValueError(f"problem {name} has no inputs for {', '.join(lacking)}; describe them")
    fields = {key: value for key, value in described["kernel"].items() if key != "shape"}
    if "writes" in fields:
        fields["writes"] = tuple(fields["writes"])
    stored, returned = described.get("stored"), described.get("returned")
    return Problem(
        name=name,
        problem_type=re.sub(r"^\d+_(sparse_la|dense_la|[a-z]+).*", r"\1", name),
        task=described["task"],
        signature=signature,
        prelude=described.get("prelude", ""),
        kernel=_SHAPES[described["kernel"]["shape"]](**fields),
        inputs=described["inputs"],
        check_size=described["sizes"]["check"],
        timing_size=described["sizes"]["timing"],
        minimum_size=described.get("minimum", 1),
        is_power_of_two=described["sizes"].get("power_of_two", False),
        held=described["held"],
        answered=f"Store the result in {stored} on rank 0." if stored else f"Return {returned}.",
        has_kokkos=described.get("kokkos", True),
        example=described.get("example", {}),
    )


def find_problem(name: str, prompt: str, model: Model) -> Problem:
    """The problem that a prompt asks for: by name, with the same parameters.

    ParEval's Kokkos prompts often have other types than ours, whose answers our drivers could not call.

    Raises:
        ValueError: where there is none, or the prompt declares the function otherwise.
    """
    problem = own_problems().get(name)
    if problem is None:
        raise ValueError(
            f"{name} is not among the {len(own_problems())} built-in problems "
            f"({', '.join([*own_problems()][:3])}, ...); outputs of other problems need their drivers"
        )
    function = problem.signature.function
    if not re.search(rf"\b{function}\s*\(", _last_line(prompt)):
        raise ValueError(
            f"the prompt of {name} does not end by opening {function}(...); "
            f"its last line must declare {problem.signature.text}"
        )
    if not fits(problem, prompt, model):
        declared, ours = _last_line(prompt), problem.declaration(model)
        raise ValueError(
            f"the prompt of {name} declares `{declared.strip()}`, but the built-in {model} driver calls "
            f"`{ours}`; have the built-in prompt answered, as `generate` does"
        )
    return problem


def fits(problem: Problem, prompt: str, model: Model) -> bool:
    """Whether a prompt declares a problem's function in types that our driver can call."""
    function = problem.signature.function
    if model in ("cuda", "hip"):
        return True
    declared, ours = (
        linked(_last_line(prompt), function),
        linked(problem.declaration(model), function),
    )
    return declared == ours


def _last_line(prompt: str) -> str:
    return prompt.rstrip().rpartition("\n")[2]
