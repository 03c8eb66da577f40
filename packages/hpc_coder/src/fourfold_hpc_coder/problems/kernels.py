"""A kernel described once, written in every parallel model: the sequential loop and its parallel forms.

The four shapes cover what ParEval asks for: every output element by itself (`Map`), one value from all
(`Reduce`), sums into places that the data decide (`Accumulate`), and a running value (`Scan`). Statements
are C++ that reads the same over `std::vector`, `Kokkos::View` and pointers; `i` is the loop's index.
"""

import re
from dataclasses import dataclass
from typing import Literal, assert_never

from fourfold_hpc_coder.vocabulary import Model

MPI_KIND = {
    "double": "MPI_DOUBLE",
    "float": "MPI_FLOAT",
    "int": "MPI_INT",
    "size_t": "MPI_UNSIGNED_LONG",
    "std::complex<double>": "MPI_CXX_DOUBLE_COMPLEX",
}

Operation = Literal["+", "*", "min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """Each iteration writes elements that no other reads or writes."""

    count: str
    each: str
    writes: tuple[str, ...]
    """Arrays written, `width` elements from `i * width` on."""
    kind: str
    """Their element type."""
    width: str = "1"
    setup: str = ""
    index: str = "i"
    """Name of the loop's index, where a parameter is called `i`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Each iteration folds something into `result`."""

    count: str
    each: str
    kind: str
    operation: Operation
    initial: str
    finish: str
    """Statements after the loop, such as `return result;`."""
    setup: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulate:
    """Each iteration adds to places of a scratch array: written `sums[index] += value;`."""

    count: str
    each: str
    kind: str
    places: str
    finish: str
    """Statement per place `p` that stores `sums[p]`."""
    setup: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A running sum or minimum: element i of the output folds inputs 0 to i."""

    count: str
    source: str
    """Expression of `i`: what is folded."""
    target: str
    """Array written at `i`."""
    kind: str
    operation: Literal["+", "min"]
    initial: str


Kernel = Map | Reduce | Accumulate | Scan


def body(kernel: Kernel, model: Model) -> str:
    """The function's body in a model, closing brace included, as a generator would return it.

    Raises:
        ValueError: where the shape has no form in the model.
    """
    match model:
        case "serial":
            text = _sequential(kernel)
        case "omp":
            text = _openmp(kernel)
        case "mpi":
            text = _mpi(kernel, pragma="")
        case "mpi+omp":
            text = _mpi(kernel, pragma="#pragma omp parallel for")
        case "kokkos":
            text = _kokkos(kernel)
        case "stdpar":
            text = _stdpar(kernel)
        case "cuda" | "hip":
            text = _cuda(kernel)
        case _:
            assert_never(model)
    return _indented(text) + "\n}"


def _indented(text: str) -> str:
    """Four spaces per open brace; pragmas stay with their loop."""
    lines, depth = [], 1
    for raw in text.strip().splitlines():
        line = raw.strip()
        depth -= line.startswith("}")
        lines.append("    " * depth + line if line else "")
        depth += line.count("{") - line.count("}") + line.startswith("}")
    return "\n".join(lines)


def _loop(count: str, each: str, *, first: str = "0", pragma: str = "", index: str = "i") -> str:
    head = f"for (size_t {index} = {first}; {index} < {count}; ++{index}) {{"
    return "\n".join(filter(None, [pragma, head, each, "}"]))


def _fold(operation: str, left: str, right: str) -> str:
    if operation in ("min", "max"):
        return f"std::{operation}({left}, {right})"
    return f"{left} {operation} {right}"


def _sequential(kernel: Kernel, pragma: str = "") -> str:
    match kernel:
        case Map():
            loop = _loop(kernel.count, kernel.each, pragma=pragma, index=kernel.index)
            return f"{kernel.setup}\n{loop}"
        case Reduce():
            start = f"{kernel.kind} result = {kernel.initial};"
            loop = _loop(kernel.count, kernel.each, pragma=pragma)
            return f"{kernel.setup}\n{start}\n{loop}\n{kernel.finish}"
        case Accumulate():
            return "\n".join(
                [
                    kernel.setup,
                    f"std::vector<{kernel.kind}> held({kernel.places});",
                    f"{kernel.kind} *sums = held.data();",
                    _loop(kernel.count, kernel.each, pragma=pragma),
                    f"for (size_t p = 0; p < {kernel.places}; ++p) {kernel.finish}",
                ]
            )
        case Scan():
            if pragma:
                return _blocked_scan(kernel)
            start = f"{kernel.kind} running = {kernel.initial};"
            return f"{start}\n{_loop(kernel.count, _running(kernel))}"
        case _:
            assert_never(kernel)


def _clause(kernel: Reduce | Accumulate) -> str:
    if isinstance(kernel, Reduce):
        return f" reduction({kernel.operation}:result)"
    return f" reduction(+:sums[:{kernel.places}])"


def _openmp(kernel: Kernel) -> str:
    clause = _clause(kernel) if isinstance(kernel, Reduce | Accumulate) else ""
    return _sequential(kernel, pragma=f"#pragma omp parallel for{clause}")


def _running(kernel: Scan) -> str:
    fold = _fold(kernel.operation, "running", f"({kernel.source})")
    return f"running = {fold};\n{kernel.target}[i] = running;"


def _shifted(kernel: Scan) -> str:
    return f"{kernel.target}[i] = {_fold(kernel.operation, 'before', f'{kernel.target}[i]')};"


def _blocked_scan(kernel: Scan) -> str:
    """Each thread scans its block; then adds what the blocks before it came to."""
    kind, initial = kernel.kind, kernel.initial
    before = _fold(kernel.operation, "before", "totals[t]")
    return f"""
size_t n = {kernel.count};
std::vector<{kind}> totals(omp_get_max_threads(), {initial});
#pragma omp parallel
{{
int mine = omp_get_thread_num(), threads = omp_get_num_threads();
size_t first = n * mine / threads, last = n * (mine + 1) / threads;
{kind} running = {initial};
{_loop("last", _running(kernel), first="first")}
totals[mine] = running;
#pragma omp barrier
{kind} before = {initial};
for (int t = 0; t < mine; ++t) before = {before};
{_loop("last", _shifted(kernel), first="first")}
}}
"""


_RANKS = """int rank, processes;
MPI_Comm_rank(MPI_COMM_WORLD, &rank);
MPI_Comm_size(MPI_COMM_WORLD, &processes);
size_t n = {count}, first = n * rank / processes, last = n * (rank + 1) / processes;"""

_MPI_OPERATION = {"+": "MPI_SUM", "*": "MPI_PROD", "min": "MPI_MIN", "max": "MPI_MAX"}


def _gather(array: str, kind: str) -> str:
    return f"""if (rank == 0)
MPI_Gatherv(MPI_IN_PLACE, 0, {kind}, &{array}[0], counts.data(), starts.data(), {kind}, 0, MPI_COMM_WORLD);
else
MPI_Gatherv(counts[rank] ? &{array}[starts[rank]] : nullptr, counts[rank], {kind}, nullptr, nullptr, nullptr,
{kind}, 0, MPI_COMM_WORLD);"""


def _blocks(width: str) -> str:
    return f"""std::vector<int> counts(processes), starts(processes);
for (int r = 0; r < processes; ++r) {{
starts[r] = n * r / processes * {width};
counts[r] = n * (r + 1) / processes * {width} - starts[r];
}}"""


def _mpi(kernel: Kernel, *, pragma: str) -> str:
    ranks = _RANKS.format(count=kernel.count)
    kind = MPI_KIND[kernel.kind]
    match kernel:
        case Map():
            loop = _loop("last", kernel.each, first="first", pragma=pragma, index=kernel.index)
            gathers = [_gather(array, kind) for array in kernel.writes]
            return "\n".join([kernel.setup, ranks, _blocks(kernel.width), loop, *gathers])
        case Reduce():
            start = f"{kernel.kind} result = {kernel.initial};"
            clause = pragma and pragma + _clause(kernel)
            loop = _loop("last", kernel.each, first="first", pragma=clause)
            operation = _MPI_OPERATION[kernel.operation]
            reduce = (
                f"MPI_Allreduce(MPI_IN_PLACE, &result, 1, {kind}, {operation}, MPI_COMM_WORLD);"
            )
            return f"{kernel.setup}\n{ranks}\n{start}\n{loop}\n{reduce}\n{kernel.finish}"
        case Accumulate():
            clause = pragma and pragma + _clause(kernel)
            return "\n".join(
                [
                    kernel.setup,
                    ranks,
                    f"std::vector<{kernel.kind}> held({kernel.places});",
                    f"{kernel.kind} *sums = held.data();",
                    _loop("last", kernel.each, first="first", pragma=clause),
                    f"MPI_Allreduce(MPI_IN_PLACE, sums, {kernel.places}, {kind}, MPI_SUM, MPI_COMM_WORLD);",
                    f"for (size_t p = 0; p < {kernel.places}; ++p) {kernel.finish}",
                ]
            )
        case Scan():
            return _mpi_scan(kernel, ranks, kind, pragma)
        case _:
            assert_never(kernel)


def _mpi_scan(kernel: Scan, ranks: str, kind: str, pragma: str) -> str:
    operation = _MPI_OPERATION[kernel.operation]
    return "\n".join(
        [
            ranks,
            _blocks("1"),
            f"{kernel.kind} running = {kernel.initial}, before = {kernel.initial};",
            _loop("last", _running(kernel), first="first"),
            f"MPI_Exscan(&running, &before, 1, {kind}, {operation}, MPI_COMM_WORLD);",
            f"if (rank == 0) before = {kernel.initial};",
            _loop("last", _shifted(kernel), first="first", pragma=pragma),
            _gather(kernel.target, kind),
        ]
    )


_KOKKOS_OPERATION = {"+": "Sum", "*": "Prod", "min": "Min", "max": "Max"}
_ADDING = re.compile(r"\bsums\[(.+?)\] \+= (.+?);")


def _kokkos(kernel: Kernel) -> str:
    match kernel:
        case Map():
            return f"""{kernel.setup}
Kokkos::parallel_for({kernel.count}, KOKKOS_LAMBDA(const size_t {kernel.index}) {{
{kernel.each}
}});"""
        case Reduce():
            reducer = f"Kokkos::{_KOKKOS_OPERATION[kernel.operation]}<{kernel.kind}>(total)"
            return f"""{kernel.setup}
{kernel.kind} total = {kernel.initial};
Kokkos::parallel_reduce({kernel.count}, KOKKOS_LAMBDA(const size_t i, {kernel.kind} &result) {{
{kernel.each}
}}, {reducer});
{kernel.kind} result = {_fold(kernel.operation, f"{kernel.kind}({kernel.initial})", "total")};
{kernel.finish}"""
        case Accumulate():
            adding = rf"Kokkos::atomic_add(&sums(\1), {kernel.kind}(\2));"
            each = _ADDING.sub(adding, kernel.each)
            return f"""{kernel.setup}
Kokkos::View<{kernel.kind} *> sums("sums", {kernel.places});
Kokkos::parallel_for({kernel.count}, KOKKOS_LAMBDA(const size_t i) {{
{each}
}});
Kokkos::parallel_for({kernel.places}, KOKKOS_LAMBDA(const size_t p) {{
{kernel.finish}
}});"""
        case Scan():
            if kernel.operation != "+":
                raise ValueError(
                    "a running minimum has no lambda form in Kokkos' parallel_scan; use a sum"
                )
            takes = f"const size_t i, {kernel.kind} &running, const bool last"
            return f"""
Kokkos::parallel_scan({kernel.count}, KOKKOS_LAMBDA({takes}) {{
running += {kernel.source};
if (last) {kernel.target}[i] = running;
}});"""
        case _:
            assert_never(kernel)


_POLICY = "std::execution::par, every.begin(), every.end()"
_FIRST, _LAST = "n * block / blocks", "n * (block + 1) / blocks"
_STANDARD = {"+": "a + b", "*": "a * b", "min": "b < a ? b : a", "max": "a < b ? b : a"}
BLOCKS = 64
"""Into which work is cut: C++17 has no range of numbers, and filling one takes longer than most work."""
HELD_BLOCKS = 8
"""The same where each block has places of its own, which are added up after."""


def _every(count: str) -> str:
    return f"std::vector<size_t> every({count});\nstd::iota(every.begin(), every.end(), size_t(0));"


def _blocks_of(count: str, blocks: int = BLOCKS) -> str:
    return f"size_t n = {count}, blocks = {blocks};\n{_every('blocks')}"


def _stdpar(kernel: Kernel) -> str:
    match kernel:
        case Map():
            loop = _loop(_LAST, kernel.each, first=_FIRST, index=kernel.index)
            return f"""{kernel.setup}
{_blocks_of(kernel.count)}
std::for_each({_POLICY}, [&](size_t block) {{
{loop}
}});"""
        case Reduce():
            return f"""{kernel.setup}
{_blocks_of(kernel.count)}
auto fold = []({kernel.kind} a, {kernel.kind} b) {{ return {_STANDARD[kernel.operation]}; }};
auto part = [&](size_t block) {{
{kernel.kind} result = {kernel.initial};
{_loop(_LAST, kernel.each, first=_FIRST)}
return result;
}};
{kernel.kind} result = std::transform_reduce({_POLICY}, {kernel.kind}({kernel.initial}), fold, part);
{kernel.finish}"""
        case Accumulate():
            return f"""{kernel.setup}
{_blocks_of(kernel.count, HELD_BLOCKS)}
std::vector<std::vector<{kernel.kind}>> held(blocks);
std::for_each({_POLICY}, [&](size_t block) {{
held[block].resize({kernel.places});
{kernel.kind} *sums = held[block].data();
{_loop(_LAST, kernel.each, first=_FIRST)}
}});
{kernel.kind} *sums = held[0].data();
for (size_t block = 1; block < blocks; ++block)
for (size_t p = 0; p < {kernel.places}; ++p) sums[p] += held[block][p];
for (size_t p = 0; p < {kernel.places}; ++p) {kernel.finish}"""
        case Scan():
            # `transform_inclusive_scan` would do, but GCC 12's folds zeros in: a minimum is then wrong.
            kind, before = kernel.kind, _fold(kernel.operation, "before", "totals[b]")
            return f"""
{_blocks_of(kernel.count)}
std::vector<{kind}> totals(blocks, {kernel.initial});
std::for_each({_POLICY}, [&](size_t block) {{
{kind} running = {kernel.initial};
{_loop(_LAST, _running(kernel), first=_FIRST)}
totals[block] = running;
}});
std::for_each({_POLICY}, [&](size_t block) {{
{kind} before = {kernel.initial};
for (size_t b = 0; b < block; ++b) before = {before};
{_loop(_LAST, _shifted(kernel), first=_FIRST)}
}});"""
        case _:
            assert_never(kernel)


def _cuda(kernel: Kernel) -> str:
    if not isinstance(kernel, Map) or "std::" in kernel.each + kernel.setup:
        raise ValueError(
            f"a {type(kernel).__name__} has no one-kernel form here; use a Map without the C++ library"
        )
    count = re.sub(r"\w+\.size\(\)", "N", kernel.count)
    each = re.sub(r"\w+\.size\(\)", "N", kernel.each)
    return f"""{kernel.setup}
size_t {kernel.index} = blockIdx.x * blockDim.x + threadIdx.x;
if ({kernel.index} < {count}) {{
{each}
}}"""
