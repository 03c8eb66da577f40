"""Inputs drawn at random, by a rule per parameter that the problem's file states."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FENCES = np.frombuffer(b"\x41" * 4 + b"\xc1" * 4, "i4")
"""The bytes that `drivers/fences.hpp` puts beyond the ends of arrays, read as integers."""


def length_of(expression: object, n: int) -> int:
    """A product of numbers, `n` and sums with it: `8*n`, `(n+2)*n`."""
    factors = [word.strip("()").split("+") for word in str(expression).split("*")]
    return math.prod(sum(n if term == "n" else int(term) for term in sum_) for sum_ in factors)


def draw(
    rule: Mapping[str, Any],
    dtype: np.dtype,
    n: int,
    drawn: Mapping[str, np.ndarray],
    generator: np.random.Generator,
    *,
    is_scalar: bool,
    decided_at: int | None,
) -> np.ndarray:
    """One parameter's value.

    Args:
        rule: the kind of values; `plant` lists values of which as many as there is room for are put at
            places of their own; `decisive` says what decides the answer if `plant` does not.
        dtype: of an element.
        n: the problem's size, and an array's length unless its rule has another.
        drawn: values of the parameters before this one.
        generator: decides everything else.
        is_scalar: whether it is one number.
        decided_at: place of the decisive elements, or None for none.

    Raises:
        ValueError: for a kind that is not known.
    """
    length = () if is_scalar else (length_of(rule.get("length", "n"), n),)
    match rule["kind"]:
        case "adjacency":
            hub = decided_at if rule.get("decisive") else None
            share = rule.get("share", 0.3)
            edges = _adjacency(n, hub, share, symmetric=rule["symmetric"], generator=generator)
            return edges.astype(dtype)
        case "member":
            arrays = [drawn[name] for name in rule["of"]]
            return _member(arrays, rule, generator, decided_at).astype(dtype)
        case "sparse":
            rows, columns = length_of(rule["rows"], n), length_of(rule["columns"], n)
            return _sparse((rows, columns), length_of(rule["entries"], n), dtype, generator)
        case _:
            values = _independent(rule, dtype, n, length, generator).astype(dtype)
    if decided_at is not None and "decisive" in rule:
        return _planted(values, rule["decisive"], decided_at)
    places = generator.permutation(values.size) if "plant" in rule else ()
    for place, value in zip(places, rule.get("plant", ()), strict=False):
        values[place] = _element(value)
    return values


def _independent(
    rule: Mapping[str, Any],
    dtype: np.dtype,
    n: int,
    length: tuple[int, ...],
    generator: np.random.Generator,
) -> np.ndarray:
    """Values of which none depends on another parameter."""
    match rule["kind"]:
        case "uniform":
            return _uniform(dtype, rule, length, generator)
        case "integers":
            return np.asarray(_integers(rule, n, length, generator))
        case "value":
            return np.asarray(length_of(rule["value"], n))
        case "zeros":
            return np.zeros(length)
        case "garbage":
            # Whatever an answer leaves untouched must be wrong.
            return generator.integers(1 << 20, 1 << 21, size=length)
        case "falling":
            slope = np.linspace(rule["high"], rule["low"], num=math.prod(length))
            return slope + generator.normal(scale=20, size=length)
        case "permutation":
            return generator.permutation(n) * 0.5 + 0.25
        case unknown:
            raise ValueError(f"inputs of kind {unknown!r} are not known; see problems/inputs.py")


def _element(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _planted(values: np.ndarray, decisive: Sequence[object], place: int) -> np.ndarray:
    """The same with the decisive elements side by side, as near to a place as the end allows."""
    if not values.shape:
        return np.asarray(decisive[0], values.dtype)
    first = min(place, len(values) - len(decisive))
    for index, value in enumerate(decisive, start=first):
        values[index] = _element(value)
    return values


def _integers(
    rule: Mapping[str, Any], n: int, length: tuple[int, ...], generator: np.random.Generator
) -> np.ndarray:
    high = length_of(rule["high"], n)
    values = generator.integers(rule["low"], high, size=length, endpoint=True)
    if "step" in rule:
        values = values // 2 * rule["step"] + rule["low"]
    return values


def _uniform(
    dtype: np.dtype,
    rule: Mapping[str, Any],
    length: tuple[int, ...],
    generator: np.random.Generator,
) -> np.ndarray:
    def numbers() -> np.ndarray:
        return np.asarray(generator.uniform(rule["low"], rule["high"], size=length))

    if dtype.names:
        values = np.empty(length, dtype)
        for name in dtype.names:
            values[name] = numbers()
        return values
    return numbers() + 1j * numbers() if np.issubdtype(dtype, np.complexfloating) else numbers()


def _adjacency(
    n: int, hub: int | None, share: float, *, symmetric: bool, generator: np.random.Generator
) -> np.ndarray:
    """Row by row; a hub is joined to every vertex, in a directed graph to itself as well."""
    edges = generator.random((n, n)) < share
    if hub is not None:
        edges[hub, :] = edges[:, hub] = True
    if symmetric:
        edges = np.triu(edges) | np.triu(edges).T
        np.fill_diagonal(edges, val=False)
    return edges.ravel()


def _sparse(
    shape: tuple[int, int], entries: int, dtype: np.dtype, generator: np.random.Generator
) -> np.ndarray:
    cells = shape[0] * shape[1]
    places = generator.choice(cells, size=min(entries, cells), replace=False, shuffle=True)
    values = np.empty(len(places), dtype)
    values["row"], values["column"] = np.divmod(places, shape[1])
    values["value"] = generator.uniform(-1, 1, size=len(places))
    return values


def _member(
    arrays: Sequence[np.ndarray],
    rule: Mapping[str, Any],
    generator: np.random.Generator,
    decided_at: int | None,
) -> np.ndarray:
    """An element, the one that decides where that is asked for; or none, but what stands beyond the end.

    Of several arrays each has its turn; `otherwise` lists values that may be wanted instead.
    """
    if decided_at is not None:
        return arrays[decided_at % len(arrays)][decided_at]
    values = arrays[0]
    if generator.random() < rule["chance"]:
        return values[generator.integers(len(values))]
    return generator.choice(rule.get("otherwise", FENCES))
