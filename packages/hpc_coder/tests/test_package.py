"""The package installs and states its paper."""

from importlib.metadata import metadata

import fourfold_hpc_coder


def test_the_installed_package_states_its_paper() -> None:
    """Its metadata and its module name the same paper."""
    assert metadata("fourfold-hpc-coder")["License-Expression"] == "Apache-2.0"
    assert fourfold_hpc_coder.__doc__
