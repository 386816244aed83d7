"""Verbs that are called like a package of the library, in every order of import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import mtl_export
from mtl_export.api.bench import bench
from mtl_export.api.merge import merge
from mtl_export.api.parity import parity

VERB = "import mtl_export as mx; verb = mx.{0}"
MODULE = "import mtl_export.{0}.{1}"
FROM = "from mtl_export import {0} as imported"


@pytest.mark.parametrize(
    ("name", "module"), [("parity", "report"), ("bench", "measure"), ("merge", "base_files")]
)
def test_one_object_whatever_is_imported_first(name: str, module: str) -> None:
    """The verb stays callable after a submodule's import, and submodules can be reached by it."""
    for order in ((VERB, MODULE, FROM), (MODULE, VERB, FROM), (FROM, MODULE, VERB)):
        program = "\n".join(line.format(name, module) for line in order)
        program += f"\nassert verb is mx.{name} is imported and callable(verb)"
        program += f"\nassert verb.{module}.__name__ == 'mtl_export.{name}.{module}'"
        environment = {"PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_help_shows_the_verb_s_parameters() -> None:
    """Editors and ``inspect`` see what may be given."""
    assert inspect.signature(mtl_export.parity) == inspect.signature(parity)
    assert inspect.signature(mtl_export.bench) == inspect.signature(bench)
    assert inspect.signature(mtl_export.merge) == inspect.signature(merge)


def test_a_wrong_keyword_is_python_s_own_error() -> None:
    """It is not ignored."""
    with pytest.raises(TypeError, match="'beta'"):
        mtl_export.parity("adapter", base="base", beta=1)  # type: ignore[call-arg]
