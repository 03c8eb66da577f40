"""Names the extra that brings a missing library, and the line that installs it."""

import importlib.metadata

from packaging.requirements import Requirement


def remedy(missing: ModuleNotFoundError, *, distribution: str) -> str:
    """The line that installs a module that is not there; it is enough.

    The line names the libraries themselves: fourfold's own names need not be on any index.

    Args:
        missing: what the import raised.
        distribution: the package that needed it (`fourfold-loki`), whose extras are looked at first.
    """
    module = (missing.name or "").partition(".")[0]
    ours = [
        candidate
        for candidate in importlib.metadata.distributions()
        if (candidate.metadata["Name"] or "").startswith("fourfold-")
    ]
    for candidate in sorted(ours, key=lambda other: other.metadata["Name"] != distribution):
        name = candidate.metadata["Name"]
        for extra in candidate.metadata.get_all("Provides-Extra") or ():
            needed = _libraries(name, extra)
            if module in {_module(requirement) for requirement in needed}:
                words = " ".join(f"'{requirement}'" for requirement in needed)
                return f"this needs {module}, of the extra {name}[{extra}]: pip install {words}"
    return f"this needs the module {missing.name}, which is not installed: pip install {module}"


def _module(requirement: str) -> str:
    return Requirement(requirement).name.replace("-", "_").lower()


def _libraries(name: str, extra: str) -> tuple[str, ...]:
    """The requirements of an extra, those of sibling packages' extras unfolded."""
    libraries: dict[str, None] = {}
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.startswith("fourfold-"):
            for inner in sorted(requirement.extras):
                libraries.update(dict.fromkeys(_libraries(requirement.name, inner)))
        else:
            libraries[f"{requirement.name}{requirement.specifier}"] = None
    return tuple(libraries)
