"""No wrong program passes: programs made from right ones by one small change each, where a hand slips.

Bounds, operators, constants, conditions, steps, indices and arguments are changed, and statements dropped.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import pytest
import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

from fourfold_hpc_coder.judge.bench import Bench
from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.judge.reference import Reference, reference
from fourfold_hpc_coder.problems.library import own_problems

LANGUAGE = Language(tree_sitter_cpp.language())

OPERATORS: dict[str, tuple[str, ...]] = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=", "<=", ">="),
    "!=": ("==",),
    "+": ("-", "*"),
    "-": ("+",),
    "*": ("+", "-"),
    "/": ("*", "+"),
    "%": ("/", "*"),
    "&&": ("||",),
    "||": ("&&",),
    "&": ("|", "^"),
    "|": ("&",),
    "^": ("|", "&"),
    "+=": ("-=", "="),
    "-=": ("+=",),
    "*=": ("+=", "="),
    "/=": ("*=",),
    "^=": ("|=",),
    "|=": ("&=",),
    "&=": ("|=",),
    "++": ("--",),
}
NAMES = {
    "min": "max",
    "max": "min",
    "true": "false",
    "false": "true",
    "lower_bound": "upper_bound",
    "cos": "sin",
    "sin": "cos",
}
VARIABLES = {
    "row": "column",
    "column": "row",
    "x": "y",
    "y": "x",
    "i": "j",
    "j": "i",
    "M": "N",
    "N": "K",
}
"""Names that are mistaken for one another; variables only for those that the function knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A body, and what was done to it."""

    body: str
    change: str


def mutants(prompt: str, body: str) -> list[Mutant]:
    """Distinct mutants of a function's body; those of different kinds stand in turn."""
    whole = f"{prompt}{body}".encode()
    first = len(prompt.encode())
    root = Parser(LANGUAGE).parse(whole).root_node
    kinds: dict[str, list[Mutant]] = {}
    seen = {_bare(body)}
    for node in _nodes(root):
        if node.start_byte < first:
            continue
        for kind, begin, end, text in _changes(node, whole):
            changed = (whole[:begin] + text.encode() + whole[end:])[first:].decode()
            if _bare(changed) in seen:
                continue
            seen.add(_bare(changed))
            was = " ".join(whole[begin:end].decode().split())
            line = whole[first:begin].count(b"\n") + 1
            change = f"line {line}: `{was}` becomes `{text}`"
            kinds.setdefault(kind, []).append(Mutant(body=changed, change=change))
    turns = chain.from_iterable(zip_longest(*kinds.values()))
    return [one for one in turns if one is not None]


def _bare(body: str) -> str:
    return re.sub(r"\s+", "", body)


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _nodes(child)


Change = tuple[str, int, int, str]
"""Kind, first and last place, and what is written there instead."""


def _changes(node: Node, whole: bytes) -> Iterator[Change]:
    """Every change that a node offers."""

    def text(one: Node) -> str:
        return whole[one.start_byte : one.end_byte].decode()

    yield from _of_words(node, text(node), whole)
    yield from _of_statements(node, text)
    yield from _of_expressions(node, text)


def _of_words(node: Node, mine: str, whole: bytes) -> Iterator[Change]:
    """Operators, names and numbers."""
    begin, end = node.start_byte, node.end_byte
    above = node.parent.type if node.parent else ""
    if above in ("binary_expression", "assignment_expression", "update_expression"):
        for other in OPERATORS.get(mine, ()):
            yield "operator", begin, end, other
    if mine in NAMES and not node.children:
        yield "name", begin, end, NAMES[mine]
    known = set(re.findall(r"\w+", whole.decode()))
    if mine in VARIABLES and node.is_named and VARIABLES[mine] in known:
        yield "name", begin, end, VARIABLES[mine]
    if node.type == "number_literal" and (match := re.fullmatch(r"(\d+)(\.\d*)?([a-zA-Z]*)", mine)):
        number, rest = int(match[1]), (match[2] or "") + match[3]
        yield "constant", begin, end, f"{number + 1}{rest}"
        if number:
            yield "constant", begin, end, f"{number - 1}{rest}"


def _of_statements(node: Node, text: Callable[[Node], str]) -> Iterator[Change]:
    """Statements dropped, conditions turned, and loops that stop early or skip."""
    begin, end = node.start_byte, node.end_byte
    above = node.parent.type if node.parent else ""
    if node.type in ("expression_statement", "if_statement"):
        yield "statement", begin, end, ";"
    if node.type == "condition_clause" and above == "if_statement":
        yield "condition", begin, end, f"(!{text(node)})"
        yield "condition", begin, end, "(true)"
    if node.type == "for_statement":
        bound = node.child_by_field_name("condition")
        if bound is not None and (right := bound.child_by_field_name("right")) is not None:
            yield "bound", right.start_byte, right.end_byte, f"{text(right)} - 1"
            yield "bound", right.start_byte, right.end_byte, f"{text(right)} / 2"
        step = node.child_by_field_name("update")
        if step is not None and step.type == "update_expression":
            yield "bound", step.start_byte, step.end_byte, f"{text(step).strip('+-')} += 2"


def _of_expressions(node: Node, text: Callable[[Node], str]) -> Iterator[Change]:
    """Values, operands, arguments and indices."""
    begin, end = node.start_byte, node.end_byte
    match node.type:
        case "return_statement" if node.named_children:
            yield from _instead("result", node.named_children[0], text)
        case "assignment_expression":
            yield from _instead("value", node.children[-1], text)
        case "binary_expression" if text(node.children[1]) in ("+", "-", "*", "/", "&&", "||"):
            yield "operand", begin, end, text(node.children[0])
            yield "operand", begin, end, text(node.children[2])
        case "subscript_argument_list":
            yield "index", begin, end, "[0]"
            yield "index", begin, end, f"[({text(node)[1:-1]}) / 2]"
        case "argument_list" if len(node.named_children) == 2:
            left, right = node.named_children
            called = node.prev_sibling
            if called is None or text(called) not in ("std::min", "std::max"):
                yield "arguments", begin, end, f"({text(right)}, {text(left)})"
        case "conditional_expression":
            asked, yes, no = node.named_children[:3]
            yield "condition", begin, end, f"{text(asked)} ? {text(no)} : {text(yes)}"
        case _:
            return


def _instead(kind: str, value: Node, text: Callable[[Node], str]) -> Iterator[Change]:
    for pattern in ("1 + ({})", "{{}}", "-({})", "2 * ({})"):
        yield kind, value.start_byte, value.end_byte, pattern.format(text(value))


ENOUGH = 20
"""Mutants that build, of each problem that has as many."""
SCRATCH_PLACE = "a scratch place more than is used"
NO_PARTNER = "the last element has no partner after it"
ANY_NUMBER = "every number but 0 is true"
ONE_LENGTH = "both are of one length"
EQUIVALENT: dict[str, dict[str, str]] = {
    "02_dense_la_gemm": {
        "line 2: `0` becomes `{}`": "a double made of nothing is 0",
        "line 2: `0` becomes `-(0)`": "an integer's 0 has no sign",
    },
    "03_dense_la_axpy": {"line 1: `x` becomes `y`": ONE_LENGTH},
    "13_geometry_closest_pair_2d": {
        "line 2: `points.size()` becomes `points.size() - 1`": NO_PARTNER,
        "line 2: `<` becomes `<=`": NO_PARTNER,
        "line 3: `(points[i], points[j])` becomes `(points[j], points[i])`": "distance is symmetric",
    },
    "14_geometry_closest_pair_1d": {
        "line 2: `x.size()` becomes `x.size() - 1`": NO_PARTNER,
        "line 2: `<` becomes `<=`": NO_PARTNER,
    },
    "20_histogram_pixel_histogram": {"line 1: `256` becomes `257`": SCRATCH_PLACE},
    "21_histogram_bin_0-100": {"line 1: `10` becomes `11`": SCRATCH_PLACE},
    "22_histogram_count_quadrants": {"line 1: `4` becomes `5`": SCRATCH_PLACE},
    "24_histogram_count_quartile": {"line 1: `4` becomes `5`": SCRATCH_PLACE},
    "29_reduce_sum_of_min_of_pairs": {"line 2: `x` becomes `y`": ONE_LENGTH},
    "36_search_check_if_array_contains_value": {
        "line 3: `1` becomes `1 + (1)`": ANY_NUMBER,
        "line 3: `1` becomes `2`": ANY_NUMBER,
        "line 3: `1` becomes `-(1)`": ANY_NUMBER,
        "line 3: `1` becomes `2 * (1)`": ANY_NUMBER,
        "line 5: `result` becomes `-(result)`": ANY_NUMBER,
        "line 5: `result` becomes `2 * (result)`": ANY_NUMBER,
    },
    "38_search_find_the_first_even_number": {
        "line 2: `<` becomes `<=`": "an even number stands before what is read beyond the end",
    },
    "41_sort_k-th_smallest_element": {
        "line 2: `<` becomes `<=`": "what is read beyond the end is smaller, or has k elements below it",
    },
    "46_sparse_la_spmm": {
        "line 3: `<` becomes `<=`": "the column that is read beyond the end is no row of X",
    },
    "55_transform_relu": {
        "line 2: `0` becomes `{}`": "a double made of nothing is 0",
        "line 2: `0` becomes `-(0)`": "an integer's 0 has no sign",
        "line 2: `0` becomes `2 * (0)`": "twice 0 is 0",
        "line 2: `<` becomes `<=`": "0 becomes 0",
    },
}
"""Changes that change no answer, by problem, each with the reason."""
ONCE_PASSED = [
    ("04_dense_la_gemv", "line 1: `M` becomes `N`"),
    ("14_geometry_closest_pair_1d", "line 2: `x.size()` becomes `x.size() / 2`"),
    ("17_graph_highest_degree", "line 2: `N` becomes `N - 1`"),
    ("17_graph_highest_degree", "line 2: `0` becomes `1`"),
    ("15_graph_edge_count", "line 2: `0` becomes `1`"),
    ("21_histogram_bin_0-100", "line 4: `9` becomes `10`"),
    ("27_reduce_average", "line 2: `<` becomes `<=`"),
    ("36_search_check_if_array_contains_value", "line 2: `++i` becomes `i += 2`"),
    ("52_stencil_1d_jacobi_3-point_stencil", "line 3: `(i > 0)` becomes `(true)`"),
    ("58_transform_squaring", "line 1: `<` becomes `<=`"),
]
"""A wrong program for each way in which inputs once were too kind."""


def of_reference(name: str) -> list[Mutant]:
    """Mutants of a problem's sequential reference."""
    problem = own_problems()[name]
    return mutants(problem.prompt("serial"), problem.answer("serial"))


def hurried(bench: Bench, name: str) -> tuple[Bench, Reference]:
    """A bench without patience for endless loops, and a problem's right answers to small inputs."""
    problem = own_problems()[name]
    size = min(problem.timing_size, 16 * problem.check_size)
    hasty = replace(bench.settings, time_limit_s=5, repetitions=1, sizes=((name, size),))
    bench = replace(bench, settings=hasty)
    return bench, reference(bench, problem)


def survivors(bench: Bench, name: str, most: int) -> tuple[list[str], int]:
    """Changes to the serial reference whose answers are all right, and how many built in all."""
    bench, right = hurried(bench, name)
    prompt = own_problems()[name].prompt("serial")
    alive, count = [], 0
    for one in of_reference(name):
        if one.change in EQUIVALENT.get(name, {}):
            continue
        verdict = judge(bench, right, "serial", prompt, one.body).verdict
        count += verdict != "no build"
        if verdict == "correct":
            alive.append(one.change)
        if count == most:
            break
    return alive, count


def test_what_is_called_equivalent_or_known_is_a_mutant() -> None:
    named = [(name, change) for name, changes in EQUIVALENT.items() for change in changes]
    for name, change in (*named, *ONCE_PASSED):
        assert change in {one.change for one in of_reference(name)}, name


@pytest.mark.parametrize("name", sorted({name for name, _ in ONCE_PASSED}))
def test_what_once_passed_does_so_no_more(bench, name: str) -> None:
    """Extrema at the ends, heights and widths, bounds of intervals, reads and writes beyond an end."""
    bench, right = hurried(bench, name)
    prompt = own_problems()[name].prompt("serial")
    changes = {change for whose, change in ONCE_PASSED if whose == name}
    for one in of_reference(name):
        if one.change in changes:
            found = judge(bench, right, "serial", prompt, one.body)
            assert found.verdict != "correct", one.change


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(own_problems()))
def test_all_mutants_die(bench, name: str) -> None:
    """Twenty that build, or all that there are."""
    there = len(of_reference(name)) - len(EQUIVALENT.get(name, {}))
    assert survivors(bench, name, ENOUGH) == ([], min(ENOUGH, there))
