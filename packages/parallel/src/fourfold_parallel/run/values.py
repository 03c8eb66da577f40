"""Frozen values to JSON and back, so that a record's first line rebuilds its run exactly."""

import dataclasses
import hashlib
import importlib
import json
import math
from pathlib import PurePath
from typing import Any, TypeVar

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

Value = TypeVar("Value")


def to_json(value: object) -> Json:
    """A dataclass as its fields under the tag `type` ("module:Name"), tuples as lists, the rest as is.

    A whole number in a field of type float is given as a float, so that equal values have one digest.

    Raises:
        TypeError: for anything a record could not rebuild (open files, tensors, functions).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {
            field.name: to_json(_as_declared(field, getattr(value, field.name)))
            for field in dataclasses.fields(value)
            if field.init
        }
        return {"type": f"{kind.__module__}:{kind.__qualname__}", **fields}
    raise TypeError(
        f"a run holds {value!r} of type {type(value).__name__}, which no record can rebuild; "
        "use numbers, strings, tuples and frozen dataclasses"
    )


def _as_declared(field: dataclasses.Field[Any], value: object) -> object:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and field.type in (float, "float") else value


def strict(json_value: Json) -> Json:
    """The same value with numbers that JSON lacks (inf, nan) tagged: `from_json` gives them back.

    A digest is taken of the value without the tags.
    """
    if isinstance(json_value, float) and not math.isfinite(json_value):
        return {"type": "float", "value": str(json_value)}
    if isinstance(json_value, list):
        return [strict(item) for item in json_value]
    if isinstance(json_value, dict):
        return {key: strict(item) for key, item in json_value.items()}
    return json_value


def from_json(json_value: Json) -> object:
    """The value that `to_json` described, made `strict` or not; lists come back as tuples.

    Raises:
        ValueError: where a tag names something other than a dataclass of a `fourfold_` module.
    """
    if isinstance(json_value, list):
        return tuple(from_json(item) for item in json_value)
    if not isinstance(json_value, dict):
        return json_value
    tag = json_value.get("type")
    if not isinstance(tag, str):
        return {key: from_json(item) for key, item in json_value.items()}
    if tag == "float":
        return float(str(json_value["value"]))
    module, _, name = tag.partition(":")
    if not module.startswith("fourfold_"):
        raise ValueError(f"type={tag!r} is not a fourfold type; a record may rebuild only those")
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(
            f"type={tag!r} is not a dataclass of the installed version; "
            "install the version that the record's first line names"
        )
    fields = {key: from_json(item) for key, item in json_value.items() if key != "type"}
    return kind(**fields)


def digest(value: object) -> str:
    """sha256 (hex) of a value's canonical JSON: two runs are the same run iff these agree."""
    canonical = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
