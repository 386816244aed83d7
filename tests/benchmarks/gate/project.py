"""A project with everything exported, and the tools that faults are planted with.

    base/  adapter/  mtl-export.toml  out/merged/TASK/  out/onnx/  out/onnx/TASK/

Exports go through the command line, in this process; a model is traced once for all of them,
those of a wrong export too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from mtl_export.bundle.manifest import MANIFEST_FILE, read_manifest, write_manifest
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import parts
from mtl_export_cli.main import cli

WEIGHTS = "model.safetensors"
ROUTED, PER_TASK = ("onnx", "--all-tasks"), ("onnx", "--all-tasks", "--layout", "per-task")
MERGED = ("merge", "--all-tasks")
Change = Callable[[Array], Array]


@dataclass(frozen=True)
class Project:
    """One exported project.

    Attributes:
        folder: Where it lies.
        name: Of its model; projects of one name share the trace.
    """

    folder: Path
    name: str

    @property
    def out(self) -> Path:
        """Return the output folder."""
        return self.folder / "out"

    def run(self, *words: str) -> Result:
        """Run ``mtl-export`` with ``words`` on this project, in this process."""
        with one_trace(self.name):
            return CliRunner().invoke(
                cli, [*words, "--config", str(self.folder / "mtl-export.toml")]
            )

    def export(self, *commands: tuple[str, ...]) -> None:
        """Export, anew if it is there already."""
        for words in commands or (MERGED, ROUTED, PER_TASK):
            self._clear(words)
            result = self.run(*words, "--force")
            assert result.exit_code == 0, result.output

    def _clear(self, words: tuple[str, ...]) -> None:
        """Delete what ``words`` write: a repeated export would say that it is up to date."""
        parent = self.out / ("merged" if words == MERGED else "onnx")
        for path in parent.iterdir() if parent.is_dir() else ():
            if path.is_file() and words == ROUTED:
                path.unlink()
            elif path.is_dir() and words != ROUTED:
                shutil.rmtree(path)

    def copy(self, folder: Path) -> Project:
        """Return a copy to plant a fault in."""
        shutil.copytree(self.folder, folder)
        return Project(folder, self.name)

    def keep(self, artefact: str) -> None:
        """Delete all artefacts but those that reports call ``artefact``; empty keeps all."""
        single = (self.out / "onnx" / MANIFEST_FILE).is_file()
        if artefact and artefact != "merged pytorch":
            shutil.rmtree(self.out / "merged", ignore_errors=True)
        if artefact == "merged pytorch":
            shutil.rmtree(self.out / "onnx", ignore_errors=True)
        elif artefact == "per-task onnx" and single:
            self._clear(ROUTED)
        elif artefact == "single-graph onnx":
            self._clear(PER_TASK)

    def seal(self) -> None:
        """Rewrite every manifest, so that a fault is not told by a file's hash."""
        for manifest in self.out.rglob(MANIFEST_FILE):
            found = read_manifest(manifest.parent)
            assert found is not None
            write_manifest(manifest.parent, found.recipe)


_TRACES: dict[str, Any] = {}


@contextmanager
def one_trace(name: str) -> Iterator[None]:
    """Trace the model called ``name`` at most once: a trace takes seconds."""
    original = parts.trace_parts

    def cached(bound: Any, opset: int) -> Any:
        if name not in _TRACES:
            _TRACES[name] = original(bound, opset)
        return _TRACES[name]

    with patch.object(parts, "trace_parts", cached):
        yield


def graphs(folder: Path) -> list[Path]:
    """Return the ONNX files of one artefact."""
    return sorted(folder.glob("*.onnx"))


def edit_graph(path: Path, change: Callable[[ir.Model], None]) -> None:
    """Change one ONNX file, which holds its weights itself afterwards."""
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    change(model)
    ir.save(model, path)


def edit_graphs(folder: Path, change: Callable[[ir.Model], None]) -> None:
    """Change every ONNX file of an artefact."""
    for path in graphs(folder):
        edit_graph(path, change)


def set_values(model: ir.Model, name: str, change: Change) -> bool:
    """Change an initializer; return whether the graph has it."""
    value = model.graph.initializers.get(name)
    if value is None:
        return False
    assert value.const_value is not None
    old = value.const_value.numpy()
    changed = np.ascontiguousarray(change(old.copy()))
    value.const_value = ir.tensor(changed, name=name)
    value.shape, value.dtype = ir.Shape(changed.shape), ir.DataType.from_numpy(changed.dtype)
    return True


def edit_values(folder: Path, changes: Mapping[str, Change]) -> None:
    """Change initializers in every ONNX file of an artefact that has them."""
    found: set[str] = set()

    def apply(model: ir.Model) -> None:
        found.update(name for name, change in changes.items() if set_values(model, name, change))

    edit_graphs(folder, apply)
    assert found == set(changes), changes.keys() - found


def edit_weights(folder: Path, changes: Mapping[str, Change]) -> None:
    """Change tensors of a merged folder."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[name] = np.ascontiguousarray(change(tensors[name].copy()))
    save_file(tensors, path, {"format": "pt"})


def base_weight(project: Project, name: str) -> Array:
    """Return a tensor of the base."""
    found: Array = load_file(project.folder / "base" / WEIGHTS)[name]
    return found


def wrong_export(
    commands: tuple[str, ...], target: Any, **replaced: Any
) -> Callable[[Project], None]:
    """Return a fault: an export while names of the module ``target`` mean something else."""

    def plant(project: Project) -> None:
        with ExitStack() as stack:
            for name, value in replaced.items():
                stack.enter_context(patch.object(target, name, value))
            project.export(commands)

    return plant
