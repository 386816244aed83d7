"""The wheel holds three packages and nothing else; the sdist can rebuild it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mtl_export.version import VERSION

ROOT = Path(__file__).parents[2]
# import package -> the folder it lies in
SOURCES = {
    "mtl_export": ROOT,
    "mtl_export_cli": ROOT / "cli",
    "mtl_export_calibration": ROOT / "calibration",
}
# Files other than Python that are meant to be shipped, relative to their source root.
DATA_FILES = {f"{package}/py.typed" for package in SOURCES} | {
    "mtl_export/parity/reports/parity.schema.json",
    "mtl_export/parity/reports/plots.svg.j2",
    "mtl_export/parity/reports/report.css",
    "mtl_export/parity/reports/report.html.j2",
    "mtl_export/tensorrt/engine.schema.json",
}
METADATA_FILES = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def build(*arguments: str, source: Path, into: Path) -> Path:
    """Return the one archive that ``python -m build`` makes of ``source``."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *arguments, "-o", str(into), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    (archive,) = into.iterdir()
    return archive


def names_in(wheel: Path) -> set[str]:
    """Return the names of the files in ``wheel``."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel once."""
    return build("--wheel", source=ROOT, into=tmp_path_factory.mktemp("wheel"))


def test_wheel_content_is_exactly_the_three_packages(wheel: Path) -> None:
    """Every module and ``py.typed`` is in the wheel; tests, examples and strays are not."""
    modules = {
        file.relative_to(root).as_posix()
        for package, root in SOURCES.items()
        for file in (root / package).rglob("*.py")
    }
    dist_info = f"mtl_export-{VERSION}.dist-info"
    metadata = {f"{dist_info}/{name}" for name in METADATA_FILES}
    assert names_in(wheel) == modules | DATA_FILES | metadata


def test_wheel_passes_check_wheel_contents(wheel: Path) -> None:
    """The usual mistakes of wheels are not in ours."""
    run = subprocess.run(
        [Path(sys.executable).with_name("check-wheel-contents"), str(wheel)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_wheel_metadata(wheel: Path) -> None:
    """The tag is pure Python 3, the command and the licence are declared."""
    assert wheel.name == f"mtl_export-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        dist_info = f"mtl_export-{VERSION}.dist-info"
        metadata = archive.read(f"{dist_info}/METADATA").decode()
        entry_points = archive.read(f"{dist_info}/entry_points.txt").decode()
    assert "Requires-Python: >=3.10\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "mtl-export = mtl_export_cli.__main__:main" in entry_points


def test_sdist_rebuilds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """The source archive is enough to build the wheel that the repository builds."""
    sdist = build("--sdist", source=ROOT, into=tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(tmp_path / "source", filter="data")
        else:
            archive.extractall(tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    rebuilt = build("--wheel", source=source, into=tmp_path / "wheel")
    assert names_in(rebuilt) == names_in(wheel)
