"""The public face: its names, that they exist, and that it costs no heavy import."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mtl_export
import mtl_export_calibration
import mtl_export_cli

PACKAGES = (mtl_export, mtl_export_calibration, mtl_export_cli)
# Importing any of these takes from a tenth of a second to several seconds.
HEAVY = {
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "rich",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "transformers",
}


def modules() -> list[str]:
    """Return the dotted name of every module of the three packages."""
    return [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    return set(run.stdout.split())


def test_all_is_sorted_and_unique() -> None:
    """``__all__`` lists every public name once, in order."""
    assert mtl_export.__all__ == sorted(set(mtl_export.__all__))


@pytest.mark.parametrize("name", mtl_export.__all__)
def test_every_public_name_exists(name: str) -> None:
    """Every name of ``__all__`` can be imported."""
    assert getattr(mtl_export, name) is not None


def test_every_lazy_name_is_public() -> None:
    """The table of lazy imports and ``__all__`` name the same things."""
    assert {*mtl_export._LAZY, "__version__"} == set(mtl_export.__all__)


def test_dir_shows_names_before_first_use() -> None:
    """``dir`` lists the public names, for completion."""
    assert set(mtl_export.__all__) <= set(dir(mtl_export))


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that is not public gives Python's usual error."""
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mtl_export.nonsense


@pytest.mark.parametrize("package", [package.__name__ for package in PACKAGES])
def test_import_is_light(package: str) -> None:
    """Importing a package imports none of the heavy libraries."""
    assert loaded_by(f"import {package}") & HEAVY == set()


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name: str) -> None:
    """Every module imports, and its ``__all__``, where it has one, is true."""
    module = import_module(name)
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public!r}, which is not there"


def test_every_folder_is_a_package() -> None:
    """No folder with code lacks ``__init__.py``, or tools would silently skip it."""
    missing = [
        str(folder)
        for package in PACKAGES
        for folder in {file.parent for file in Path(package.__path__[0]).rglob("*.py")}
        if not (folder / "__init__.py").is_file()
    ]
    assert sorted(missing) == []
