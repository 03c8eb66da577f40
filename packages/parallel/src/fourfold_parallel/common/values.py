"""Frozen values to JSON and back, so that a record's first line rebuilds its run exactly.

A value is tagged `package/Name` (`loki/Perplexity`), so that its class may move within its package. A class
that was renamed, or came from another package, says so itself (`formerly`). Records of the first version
tag `module:Name`; they are read too.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

Value = TypeVar("Value")
Kind = TypeVar("Kind", bound=type)

_PREFIX = "fourfold_"
_WITHOUT: dict[type, tuple[str, ...]] = {}
"""Fields that records of a class may hold and the class no longer has."""


def formerly(*tags: str, without: tuple[str, ...] = ()) -> Callable[[Kind], Kind]:
    """Say under which tags (`package/Name`) records hold a class, and which fields it no longer has.

    Written directly above the dataclass, with its tags as they are: records find the class by this text.
    """
    del (
        tags
    )  # `_kind` reads them in the source, so that no module need be imported to find the right one

    def declared(kind: Kind) -> Kind:
        _WITHOUT[kind] = without
        return kind

    return declared


def tag_of(kind: type) -> str:
    """`package/Name` of a fourfold class, whatever its module; `module:Name` of any other."""
    root = kind.__module__.partition(".")[0]
    if root.startswith(_PREFIX):
        return f"{root.removeprefix(_PREFIX)}/{kind.__qualname__}"
    return f"{kind.__module__}:{kind.__qualname__}"


def to_json(value: object) -> Json:
    """A dataclass as its fields under the tag `type` (`tag_of`), tuples as lists, the rest as is.

    A whole number in a field of type float is given as a float, so that equal values have one digest.

    Raises:
        TypeError: It holds something that no record could rebuild (open files, tensors, functions).
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
        return {"type": tag_of(kind), **fields}
    raise TypeError(
        f"a run holds {value!r} of type {type(value).__name__}, which no record can rebuild; "
        "use numbers, strings, tuples and frozen dataclasses"
    )


def _as_declared(field: dataclasses.Field[Any], value: object) -> object:
    if field.type in (float, "float") and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


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
        ValueError: A tag names something other than a dataclass of a `fourfold_` module.
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
    kind = _kind(tag)
    fields = {
        key: from_json(item)
        for key, item in json_value.items()
        if key != "type" and key not in _WITHOUT.get(kind, ())
    }
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(
            f"type={tag!r} is not of the installed version ({error}); "
            "install the version that the record's first line names"
        ) from error


@functools.cache
def _kind(tag: str) -> Any:
    """The dataclass of a tag, sought by its name in the sources of its package, then of the runtime."""
    root, name = re.split("[/:]", tag, maxsplit=1) if re.search("[/:]", tag) else (tag, "")
    package = root.partition(".")[0].removeprefix(_PREFIX)
    if not (root.startswith(_PREFIX) if ":" in tag else _is_installed(package)):
        raise ValueError(f"type={tag!r} is not a fourfold type; a record may rebuild only those")
    defined = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    renamed = re.compile(
        rf'^@formerly\([^@]*"{re.escape(package)}/{re.escape(name)}".*?^class (\w+)',
        re.MULTILINE | re.DOTALL,
    )
    for home in (package, "parallel") if name.isidentifier() and _is_installed(package) else ():
        for module, text in _sources(home):
            there = renamed.search(text)
            if there is None and not (home == package and defined.search(text)):
                continue
            kind = getattr(importlib.import_module(module), there[1] if there else name)
            if dataclasses.is_dataclass(kind):
                return kind
    raise ValueError(
        f"type={tag!r} is not a dataclass of the installed version; "
        "install the version that the record's first line names"
    )


def _is_installed(package: str) -> bool:
    return package.isidentifier() and importlib.util.find_spec(_PREFIX + package) is not None


@functools.cache
def _sources(package: str) -> tuple[tuple[str, str], ...]:
    """(module, text) of every module of a package: reading them is fast, importing them all is not."""
    spec = importlib.util.find_spec(_PREFIX + package)
    assert spec is not None
    modules = []
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([_PREFIX + package, *(part for part in parts if part != "__init__")])
            modules.append((name, path.read_text(encoding="utf-8")))
    return tuple(modules)


def digest(value: object) -> str:
    """sha256 (hex) of a value's canonical JSON: two runs are the same run iff these agree."""
    canonical = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def describes(json_value: Json, value: object) -> bool:
    """True where a description is of a value: it rebuilds an equal one.

    Where classes are a user's own, which no record may rebuild, the two must agree word by word.
    """
    return not differences(json_value, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A place at which a description and a value differ."""

    path: str
    """Names of the fields on the way, such as `optimizer.learning_rate`; empty where all differs."""
    described: str
    asked: str

    def told(self, place: str) -> str:
        """`seed: 3 in the checkpoint, 4 asked for`, where `place` is "the checkpoint"."""
        subject = f"{self.path}: " if self.path else ""
        return f"{subject}{self.described} in {place}, {self.asked} asked for"


def differences(
    json_value: Json, value: object, *, apart_from: Mapping[str, Collection[str]] | None = None
) -> tuple[Difference, ...]:
    """All places at which a description and a value differ, in the order of the value's fields.

    Descriptions of an earlier version are compared by the values that they rebuild; those of a user's own
    classes, which no record may rebuild, by their words.

    Args:
        json_value: as `to_json` gave it, made `strict` or not.
        value: what it is compared with.
        apart_from: fields that may differ, by the tag of their class (`tag_of`), at any depth.
    """
    return tuple(_differences("", _renewed(json_value), to_json(value), apart_from or {}))


def _renewed(json_value: Json) -> Json:
    """A description in the words of the installed version, as far as its classes can be rebuilt."""
    try:
        return to_json(from_json(json_value))
    except ValueError:
        if isinstance(json_value, dict):
            return {key: _renewed(item) for key, item in json_value.items()}
        assert isinstance(json_value, list)
        return [_renewed(item) for item in json_value]


def _differences(
    path: str, there: Json, asked: Json, apart_from: Mapping[str, Collection[str]]
) -> Iterator[Difference]:
    if (
        isinstance(there, dict)
        and isinstance(asked, dict)
        and there.get("type") == asked.get("type")
    ):
        free = apart_from.get(str(asked.get("type")), ())
        for name in [*asked, *(name for name in there if name not in asked)]:
            if name not in free:
                below = f"{path}.{name}" if path else name
                yield from _differences(
                    below, there.get(name, _ABSENT), asked.get(name, _ABSENT), apart_from
                )
    elif isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        for index, (left, right) in enumerate(zip(there, asked, strict=True)):
            yield from _differences(f"{path}[{index}]", left, right, apart_from)
    elif json.dumps(there) != json.dumps(asked):  # nan is nan, 1 is not 1.0, and True is not 1
        yield Difference(path=path, described=shown(there), asked=shown(asked))


def overridden(value: Value, settings: Sequence[str]) -> Value:
    """The value with fields set by words such as `run.optimizer.learning_rate=1e-3`.

    Raises:
        ValueError: A word names no field, or a value that the field cannot have.
    """
    for setting in settings:
        path, _, text = setting.partition("=")
        value = _set(value, path.split("."), text, setting)
    return value


def _set(value: Any, path: Sequence[str], text: str, setting: str) -> Any:
    names = [field.name for field in dataclasses.fields(value) if field.init]
    name, *below = path
    if name not in names:
        raise ValueError(
            f"{setting!r}: {type(value).__name__} has no field {name!r}; it has {', '.join(names)}"
        )
    inner = getattr(value, name)
    if dataclasses.is_dataclass(inner) and below:
        return dataclasses.replace(value, **{name: _set(inner, below, text, setting)})
    if dataclasses.is_dataclass(inner) or below:
        raise ValueError(
            f"{setting!r}: {name} is {shown(to_json(inner))}; write the path of a number, text or truth "
            f"value, such as horizon.count=50"
        )
    return dataclasses.replace(value, **{name: _read(text, inner, setting)})


def _read(text: str, former: object, setting: str) -> object:
    """The value of a word, of the type of the value that it replaces."""
    if isinstance(former, str):
        return text
    try:
        word = from_json(json.loads(text.lower() if isinstance(former, bool) else text))
    except json.JSONDecodeError:
        word = text
    if isinstance(former, float) and isinstance(word, int) and not isinstance(word, bool):
        word = float(word)
    if type(word) is not type(former):
        kind = type(former).__name__
        raise ValueError(f"{setting!r}: {text!r} is no {kind}; it was {shown(to_json(former))}")
    return word


_ABSENT: Json = {"type": "nothing"}
_SHOWN = 80
"""Characters of a value in a message."""


def shown(json_value: Json) -> str:
    """A described value as its class is written, shortened: `Steps(count=6)`."""
    text = _written(json_value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _written(json_value: Json) -> str:
    if json_value == _ABSENT:
        return "nothing"
    if isinstance(json_value, list):
        return f"({', '.join(map(_written, json_value))})"
    if isinstance(json_value, dict):
        kind = re.split("[/:.]", str(json_value.get("type", "")))[-1]
        fields = [f"{key}={_written(item)}" for key, item in json_value.items() if key != "type"]
        return f"{kind}({', '.join(fields)})"
    return repr(json_value)
