"""The backend uses what ``API`` declares, and every supported TensorRT has it.

What each release has is written in ``tensorrt_api.json``, so ``make check`` needs no
network. That the file tells the truth is proved against the real binding wheels, which
takes the package index and a C compiler: ``pytest -m other_env
tests/tensorrt/test_api_lint.py``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mtl_export import tensorrt as backend
from tests.tensorrt.surface import API, HANDLES, OPTIONAL
from tests.tensorrt.wheels import (
    PROBE,
    WHEELS,
    Surface,
    probed,
    release_of,
    stored_surfaces,
    surface_of_wheel,
    write_empty_libraries,
)

STORED = stored_surfaces()
SOURCES = sorted(Path(backend.__file__).parent.glob("*.py"))


class Uses(ast.NodeVisitor):
    """What one source file takes from TensorRT, and where it takes more than it says.

    Attributes:
        used: "Class.attribute" for every attribute of a TensorRT object.
        guarded: The same, for those asked for with ``hasattr``.
        problems: Undeclared attributes, and objects under a name that hides them.
    """

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.guarded: set[str] = set()
        self.problems: list[str] = []

    def class_of(self, node: ast.expr | None) -> str | None:
        """Return the TensorRT class of an expression, "" for the module, None for others."""
        if isinstance(node, ast.Name):
            return HANDLES.get(node.id.lstrip("_"))
        if isinstance(node, ast.Call):
            return self.class_of(node.func) if isinstance(node.func, ast.Attribute) else None
        if isinstance(node, ast.IfExp):
            return self.class_of(node.body) or self.class_of(node.orelse)
        if isinstance(node, ast.Attribute):
            owner = self.class_of(node.value)
            if owner is None:
                return HANDLES.get(node.attr.lstrip("_"))
            return API[owner].get(node.attr) or None
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note ``handle.attribute``."""
        owner = self.class_of(node.value)
        if owner is not None and node.attr != "__init__":
            self._use(owner, node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Note ``hasattr(handle, "attribute")``."""
        if isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            owner, name = self.class_of(node.args[0]), node.args[1]
            if owner is not None and isinstance(name, ast.Constant):
                asked = str(name.value)
                self.guarded.add(f"{owner}.{asked}")
                self._use(owner, asked, node.lineno)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Note the callbacks of classes that derive from TensorRT's."""
        for base in node.bases:
            owner = self.class_of(base)
            for item in node.body:
                if owner and isinstance(item, ast.FunctionDef) and item.name != "__init__":
                    self._use(owner, item.name, item.lineno)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Refuse a TensorRT object under a name that is no handle of its class."""
        kind = self.class_of(node.value)
        for target in node.targets:
            if kind is not None and self.class_of(target) != kind:
                self.problems.append(
                    f"line {node.lineno}: {ast.unparse(target)} holds a {kind or 'module'}"
                )
        self.generic_visit(node)

    def _use(self, owner: str, name: str, line: int) -> None:
        self.used.add(f"{owner}.{name}")
        if name not in API[owner]:
            self.problems.append(f"line {line}: {owner}.{name} is not in API")


def uses_of(text: str) -> Uses:
    """Return what the source ``text`` takes from TensorRT."""
    uses = Uses()
    uses.visit(ast.parse(text))
    return uses


def declared() -> set[str]:
    """Return "Class.attribute" for everything in ``API``."""
    return {f"{owner}.{name}" for owner, attributes in API.items() for name in attributes}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_uses_nothing_undeclared(source: Path) -> None:
    """Every attribute of a TensorRT object is in the table."""
    assert uses_of(source.read_text()).problems == []


def test_table_declares_nothing_unused() -> None:
    """An attribute that the backend no longer uses leaves the table."""
    used = set().union(*(uses_of(source.read_text()).used for source in SOURCES))
    assert declared() - used == set()


def test_optional_attributes_are_declared_and_guarded() -> None:
    """Each one's guard is asked for with ``hasattr`` somewhere in the backend."""
    guarded = set().union(*(uses_of(source.read_text()).guarded for source in SOURCES))
    assert set(OPTIONAL) <= declared()
    assert set(OPTIONAL.values()) == guarded


def test_table_is_closed() -> None:
    """Every class that an attribute leads to, or a handle holds, is in the table."""
    classes = {kind for attributes in API.values() for kind in attributes.values() if kind}
    assert classes | set(HANDLES.values()) <= set(API)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("builder.build_engine(network)", "line 1: Builder.build_engine is not in API"),
        ("self._library.trt.IInt8Calibrator", "line 1: .IInt8Calibrator is not in API"),
        ("trt.Builder(x).reset()", "line 1: Builder.reset is not in API"),
        ("x = builder.create_network(0)", "line 1: x holds a INetworkDefinition"),
        ("self.net = builder.create_network(0)", "line 1: self.net holds a INetworkDefinition"),
        ("module = library.trt", "line 1: module holds a module"),
        ("hasattr(parser, 'supports_model')", "line 1: OnnxParser.supports_model is not in API"),
        (
            "class W(trt.IStreamWriter):\n    def seek(self): ...",
            "line 2: IStreamWriter.seek is not in API",
        ),
    ],
)
def test_the_check_sees_planted_drift(text: str, problem: str) -> None:
    """Calls, chains, hidden names, guards and callbacks are all seen."""
    assert uses_of(text).problems == [problem]


@pytest.mark.parametrize("release", sorted(STORED))
def test_every_supported_release_has_what_is_used(release: str) -> None:
    """All of the table but what is optional; the guard of what is missing is missing too."""
    missing = missing_from(STORED[release], API)
    assert missing - set(OPTIONAL) == set()
    assert {name for name in missing if OPTIONAL[name] not in missing} == set()


def test_the_ends_of_the_supported_range_are_stored() -> None:
    """10.13, 10.16, 11.4 and TensorRT-RTX; what they lack and gain tells them apart."""
    assert sorted({release_of(*wheel) for wheel in WHEELS}) == sorted(STORED)
    gone = {"": {"IInt8EntropyCalibrator2": ""}, "BuilderFlag": {"FP16": ""}}
    lacking = {release: missing_from(surface, gone) for release, surface in STORED.items()}
    assert lacking["tensorrt 10.13.3.9"] == lacking["tensorrt 10.16.1.11"] == set()
    assert lacking["tensorrt 11.4.0.106"] == {".IInt8EntropyCalibrator2", "BuilderFlag.FP16"}
    assert missing_from(STORED["tensorrt 10.13.3.9"], API) >= {"SerializationFlag.INCLUDE_REFIT"}


def test_installed_rtx_is_as_stored() -> None:
    """The library that builds engines in this environment; another release still has it all."""
    trt = pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    surface = probed([sys.executable, "-c", PROBE, "tensorrt_rtx"])
    assert missing_from(surface, API) == set()
    stored = STORED.get(f"tensorrt_rtx {trt.__version__}", {})
    assert {name: surface[name] for name in stored if name} == {
        name: names for name, names in stored.items() if name
    }


@pytest.fixture(scope="module")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shared libraries that the bindings link to, empty."""
    return write_empty_libraries(tmp_path_factory.mktemp("lib"))


@pytest.mark.other_env
@pytest.mark.parametrize(("package", "version"), WHEELS)
def test_stored_names_are_those_of_the_wheel(
    package: str, version: str, empty_libraries: Path
) -> None:
    """Neither can gain or lose a name alone; ``tensorrt_wheels`` writes the file anew."""
    found = surface_of_wheel(package, version, empty_libraries)
    assert found == STORED[release_of(package, version)]


def missing_from(surface: Surface, table: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return what of ``table`` is not in ``surface``."""
    return {
        f"{owner}.{name}"
        for owner, attributes in table.items()
        for name in attributes
        if name not in surface.get(owner, ())
    }
