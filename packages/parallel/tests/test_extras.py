"""A missing library is named with a line that is enough to install it."""

import importlib.metadata

import pytest

from fourfold_parallel.common.extras import remedy


def missing(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize(
    ("distribution", "module"),
    [("fourfold-goldfish", "matplotlib"), ("fourfold-loki", "lm_eval.api")],
)
def test_the_line_is_of_the_package_that_asked_and_names_no_package_of_ours(
    distribution: str, module: str
) -> None:
    said = remedy(missing(module), distribution=distribution)
    assert f"of the extra {distribution}[" in said
    line = said.partition("pip install ")[2]
    assert module.partition(".")[0].replace("_", "-") in line
    assert "fourfold" not in line


@pytest.mark.parametrize(
    "distribution",
    sorted(
        {
            name
            for found in importlib.metadata.distributions()
            if (name := found.metadata["Name"] or "").startswith("fourfold-")
        }
    ),
)
def test_every_library_of_every_extra_has_a_line(distribution: str) -> None:
    """Whatever the extras name is found by the module that one imports."""
    for text in importlib.metadata.requires(distribution) or ():
        if "extra ==" in text and not text.startswith("fourfold-"):
            library = text.partition(";")[0].strip()
            name = library.split(">")[0].split("=")[0].strip()
            assert f"'{library}'" in remedy(
                missing(name.replace("-", "_")), distribution=distribution
            )


def test_an_unknown_module_is_said_to_be_missing() -> None:
    assert "pip install nowhere" in remedy(missing("nowhere"), distribution="fourfold-loki")
