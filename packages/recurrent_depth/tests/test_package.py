"""The package installs and states its paper."""

from importlib.metadata import metadata

import fourfold_recurrent_depth


def test_the_installed_package_states_its_paper() -> None:
    """Its metadata and its module name the same paper."""
    assert metadata("fourfold-recurrent-depth")["License-Expression"] == "Apache-2.0"
    assert fourfold_recurrent_depth.__doc__
