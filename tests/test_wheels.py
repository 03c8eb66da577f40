"""A wheel brings all that its package needs, and needs nothing that it does not declare."""

import zipfile
from pathlib import Path

import pytest

import release

pytestmark = pytest.mark.skipif(
    release.UV is None or not list((release.ROOT / "wheelhouse").glob("uv_build-*.whl")),
    reason="no uv and no wheelhouse: this environment was not made by scripts/env",
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of every package, by its name, in one folder."""
    folder = tmp_path_factory.mktemp("wheels")
    return {member.name: release.build(member, folder) for member in release.MEMBERS}


@pytest.mark.parametrize("member", release.MEMBERS, ids=lambda member: member.name)
def test_a_wheel_is_as_it_should_be(member: Path, wheels: dict[str, Path]) -> None:
    """It holds what its package holds, the licence, facts that an index takes, and no path of a machine."""
    assert list(release.faults_of_wheel(member, wheels[member.name])) == []


def test_every_fault_of_a_wheel_is_named(wheels: dict[str, Path], tmp_path: Path) -> None:
    """A template is gone, a file too many, a path given away, another licence, a bound forgotten."""
    member = release.ROOT / "packages" / "hpc_coder"
    whole = wheels[member.name]
    with zipfile.ZipFile(whole) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    [metadata] = [name for name in files if name.endswith("/METADATA")]
    [licence] = [name for name in files if name.endswith("/LICENSE")]
    [server] = [name for name in files if name.endswith("/server.hpp")]
    del files[server]
    files["fourfold_hpc_coder/more.py"] = f"HERE = '{release.ROOT}/data'".encode()
    files[licence] += b"."
    files[metadata] = files[metadata].replace(b"fourfold-parallel>=0.1,<0.2", b"fourfold-parallel")
    files[metadata] = files[metadata].replace(b"Classifier: Typing :: Typed\n", b"")
    broken = tmp_path / whole.name
    with zipfile.ZipFile(broken, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    assert list(release.faults_of_wheel(member, broken)) == [
        f"lacks {server}",
        "holds fourfold_hpc_coder/more.py, which is not in src/",
        "its licence is not that of the project",
        f"fourfold_hpc_coder/more.py names {release.ROOT}",
        "metadata does not say that it is typed",
        "fourfold-parallel does not bound and hold 0.1.0",
    ]
    files[metadata] = files[metadata].replace(b"Name: fourfold-hpc-coder", b"Name: -")
    [refusal] = release.faults_of_metadata(member, files[metadata])
    assert "name" in refusal


@pytest.mark.slow  # half a minute each, most of it for torch's wheel
@pytest.mark.timeout(600)
@pytest.mark.parametrize("member", release.MEMBERS, ids=lambda member: member.name)
def test_a_package_works_without_extras(
    member: Path, wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Alone in an empty environment: help, version and every public name, none of it from the checkout."""
    trial = release.Trial.of(release.sys.executable, tmp_path / "venv")
    trial.install(wheels[member.name])
    assert list(trial.faults(member)) == []
