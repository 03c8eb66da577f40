"""A function's declaration, taken apart: what a driver sends and what it takes back."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

DTYPES = {
    "double": "f8",
    "float": "f4",
    "int": "i4",
    "size_t": "u8",
    "bool": "?",
    "std::complex<double>": "c16",
}
"""C++ element types as NumPy sees their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a function, or its result (named `result`)."""

    name: str
    declared: str
    """The C++ type as written: `std::vector<double> const&`."""
    dtype: np.dtype
    """Of an element."""
    holds: Literal["one", "many"]
    is_output: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A function's declaration, taken apart."""

    text: str
    """Without the opening brace: `void relu(std::vector<double> &x)`."""
    function: str
    parameters: tuple[Parameter, ...]
    result: tuple[Parameter, ...]
    """The returned value, if any."""

    @property
    def outputs(self) -> tuple[Parameter, ...]:
        """The values that a call gives back, in the order in which a driver sends them."""
        return (*self.result, *(parameter for parameter in self.parameters if parameter.is_output))


def parse_signature(text: str, structures: Mapping[str, Sequence[str]]) -> Signature:
    """Take a declaration apart.

    Args:
        text: `double average(std::vector<double> const& x)`.
        structures: fields of structures that it names, each `type name`.

    Raises:
        ValueError: for a type that no driver can send.
    """
    parts = re.fullmatch(r"\s*([\w:<>]+)\s+(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    if not parts:
        raise ValueError(f"{text!r} is not a function's declaration; write `type name(parameters)`")
    returned, function, inside = parts.groups()
    parameters = tuple(
        _parameter(piece.strip(), structures) for piece in re.split(r",(?![^<]*>)", inside)
    )
    result = () if returned == "void" else (_parameter(f"{returned} result", structures),)
    return Signature(
        text=text.strip(),
        function=function,
        parameters=parameters,
        result=tuple(replace(parameter, is_output=True) for parameter in result),
    )


def _parameter(text: str, structures: Mapping[str, Sequence[str]]) -> Parameter:
    parts = re.fullmatch(r"(.*?)\s*(&?)\s*(\w+)", text)
    assert parts is not None
    declared, reference, name = parts.group(1).strip(), parts.group(2), parts.group(3)
    bare = re.sub(r"\s*\bconst\b\s*", "", declared)
    many = re.fullmatch(r"std::(?:vector|array)<(.+?)(?:, \d+)?>", bare)
    element = many.group(1) if many else bare
    return Parameter(
        name=name,
        declared=declared + reference,
        dtype=_dtype(element, structures),
        holds="many" if many else "one",
        is_output=bool(reference) and "const" not in declared,
    )


def _dtype(element: str, structures: Mapping[str, Sequence[str]]) -> np.dtype:
    if element in structures:
        fields = [field.split() for field in structures[element]]
        return np.dtype([(name, DTYPES[kind]) for kind, name in fields], align=True)
    if element not in DTYPES:
        raise ValueError(
            f"no driver sends elements of type {element!r}; there are {', '.join(DTYPES)}"
        )
    return np.dtype(DTYPES[element])


def linked(declaration: str, function: str) -> str:
    """A declaration's types, however they are spelt: equal ones can call each other."""
    parts = re.search(rf"([\w:<> *]+?)\b{function}\s*\((.*)\)", declaration)
    if parts is None:
        return ""
    types = []
    for parameter in (f"{parts.group(1)} result", *re.split(r",(?![^<]*>)", parts.group(2))):
        unnamed = re.sub(r"^(.*[\s&*>])\w+$", r"\1", parameter.strip())
        trailing = re.sub(r"^const\b(.*?)(&?)\s*$", r"\1 const\2", unnamed)
        # A copy may be const or not.
        types.append(re.sub(r"(?<![&*])\bconst$", "", trailing.strip()))
    return re.sub(r"\s+|\bstd::", "", ",".join(types))
