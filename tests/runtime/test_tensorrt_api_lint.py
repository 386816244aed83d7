"""The backend uses what ``API`` declares, and every supported TensorRT has it.

The second half imports the real binding wheels. It needs the package index and a C
compiler, so it is opt-in: ``pytest -m other_env tests/runtime/test_tensorrt_api_lint.py``.
The wheels link against libraries of hundreds of MB that only matter when something is
called, so libraries of the same names with empty functions are compiled in their place.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mtl_export.runtime import tensorrt as backend
from mtl_export.runtime.tensorrt.api import API, HANDLES, OPTIONAL

SOURCES = sorted(Path(backend.__file__).parent.glob("*.py"))
# package, version: the ends and the middle of the supported range, for both CUDA lines
WHEELS = [
    ("tensorrt_cu12_bindings", "10.13.3.9"),
    ("tensorrt_cu12_bindings", "10.16.1.11"),
    ("tensorrt_cu12_bindings", "11.4.0.106"),
    ("tensorrt_cu13_bindings", "10.13.3.9"),
    ("tensorrt_cu13_bindings", "10.16.1.11"),
    ("tensorrt_cu13_bindings", "11.4.0.106"),
    ("tensorrt_rtx_cu13_bindings", "1.7.1.116"),
]
# What the binding modules take from those libraries when they are loaded.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = (
    "libnvinfer.so.10",
    "libnvinfer.so.11",
    "libnvinfer_plugin.so.10",
    "libnvinfer_plugin.so.11",
    "libnvonnxparser.so.10",
    "libnvonnxparser.so.11",
    "libtensorrt_onnxparser_rtx.so.1",
    "libtensorrt_rtx.so.1",
)
# Prints the names of the table that the module of that name lacks.
PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
missing = []
for owner, attributes in json.load(sys.stdin).items():
    held = trt if owner == "" else getattr(trt, owner, None)
    missing += [f"{owner}.{name}" for name in attributes if not hasattr(held, name)]
print(json.dumps({"version": trt.__version__, "missing": missing}))
"""


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


def test_installed_rtx_has_every_attribute() -> None:
    """The library that builds engines in this environment."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    command = [sys.executable, "-c", PROBE, "tensorrt_rtx"]
    assert missing_from(command, API) == set()
    planted = {"": {"Nonsense": ""}, "Builder": {"reset": "", "nonsense": ""}}
    assert missing_from(command, planted) == {".Nonsense", "Builder.nonsense"}


@pytest.fixture(scope="module")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shared libraries that the bindings link to, empty."""
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed to stand in for TensorRT's libraries"
    folder = tmp_path_factory.mktemp("lib")
    code = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    (folder / "empty.c").write_text(code)
    for library in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "empty.c"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture(params=WHEELS, ids=lambda wheel: "-".join(wheel), scope="module")
def wheel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Yield the folder of an unpacked binding wheel for this Python."""
    package, version = request.param
    folder = tmp_path_factory.mktemp(package)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{package}=={version} cannot be fetched: {done.stderr}"
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.other_env
def test_wheel_has_every_attribute(wheel: Path, empty_libraries: Path) -> None:
    """All of the table but what is optional; the guard of what is missing is missing too."""
    (module,) = (path.name for path in wheel.glob("*_bindings") if path.is_dir())
    environment = {"PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(empty_libraries)}
    missing = missing_from([sys.executable, "-S", "-c", PROBE, module], API, environment)
    assert missing - set(OPTIONAL) == set()
    unguarded = {name for name in missing if OPTIONAL[name] not in missing}
    assert unguarded == set()


def missing_from(
    command: list[str],
    table: Mapping[str, Mapping[str, str]],
    environment: dict[str, str] | None = None,
) -> set[str]:
    """Return what of ``table`` the module that ``command`` probes does not have."""
    done = subprocess.run(
        command,
        input=json.dumps(table),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout)["missing"])
