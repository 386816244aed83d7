"""TensorRT's Python bindings on PyPI -> the names they have, in ``tensorrt_api.json``.

    python -m tests.tensorrt.wheels      writes the file anew

It needs the package index and a C compiler. The bindings link against libraries of hundreds
of MB that only matter when something is called, so libraries of the same names with empty
functions are compiled in their place. The file holds one object for each release: class ->
its public attributes, "" for the module itself; both CUDA lines of a release have the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

# class -> its public attributes, sorted; "" is the module
Surface: TypeAlias = Mapping[str, list[str]]

FILE = Path(__file__).with_name("tensorrt_api.json")
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
# Prints the public names of the module given, and of its classes.
PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
kept = {"__members__", "__version__"}
def names(held):
    return sorted(name for name in dir(held) if name[0] != "_" or name in kept)
classes = {name: names(held) for name, held in vars(trt).items() if isinstance(held, type)}
print(json.dumps({"": names(trt), **classes}))
"""


def release_of(package: str, version: str) -> str:
    """Return what a release is called in the file: ``tensorrt 10.13.3.9``."""
    return f"{package.split('_cu')[0]} {version}"


def stored_surfaces() -> dict[str, Surface]:
    """Return the file: release -> its surface."""
    stored: dict[str, Surface] = json.loads(FILE.read_text(encoding="utf-8"))
    return stored


def write_empty_libraries(folder: Path) -> Path:
    """Write the shared libraries that the bindings link to, empty; return ``folder``."""
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed to stand in for TensorRT's libraries"
    code = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    (folder / "empty.c").write_text(code)
    for library in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "empty.c"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


def surface_of_wheel(package: str, version: str, libraries: Path) -> Surface:
    """Return the names in a binding wheel for this Python, fetched and unpacked for it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", name, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{package}=={version} cannot be fetched: {done.stderr}"
        (file,) = folder.glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
        (module,) = (path.name for path in folder.glob("*_bindings") if path.is_dir())
        environment = {"PYTHONPATH": name, "LD_LIBRARY_PATH": str(libraries)}
        return probed([sys.executable, "-S", "-c", PROBE, module], environment)


def probed(command: list[str], environment: dict[str, str] | None = None) -> Surface:
    """Return what a Python that was given ``PROBE`` prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    surface: Surface = json.loads(done.stdout)
    return surface


def main() -> None:
    """Fetch every wheel and write the file, a line for each class."""
    surfaces: dict[str, Surface] = {}
    with TemporaryDirectory() as folder:
        libraries = write_empty_libraries(Path(folder))
        for package, version in WHEELS:
            release = release_of(package, version)
            surface = surface_of_wheel(package, version, libraries)
            assert surfaces.setdefault(release, surface) == surface, f"{release}: CUDA lines differ"
    blocks = []
    for release, surface in surfaces.items():
        lines = (f"    {json.dumps(name)}: {json.dumps(surface[name])}" for name in sorted(surface))
        body = ",\n".join(lines)
        blocks.append(f"  {json.dumps(release)}: {{\n{body}\n  }}")
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
