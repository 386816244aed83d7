"""Faults of files: cut, mixed up, out of date, or with other inputs and outputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tests.benchmarks.gate import precision
from tests.benchmarks.gate.fault import ALL, HF, ONE, REFUSED, Fault
from tests.benchmarks.gate.models import DECODER, ENCODER, write_adapter, write_base
from tests.benchmarks.gate.project import WEIGHTS, Project, edit_graph, edit_graphs
from tests.benchmarks.gate.routing import constant, found


def cut(path: str) -> Callable[[Project], None]:
    """Return a fault: a file ends early."""

    def plant(project: Project) -> None:
        file = project.out / path
        file.write_bytes(file.read_bytes()[:-97])

    return plant


def swapped(*paths: str) -> Callable[[Project], None]:
    """Return a fault: two files change places."""

    def plant(project: Project) -> None:
        one, other = (project.out / path for path in paths)
        kept = one.read_bytes()
        shutil.copyfile(other, one)
        other.write_bytes(kept)

    return plant


def copied(source: str, target: str) -> Callable[[Project], None]:
    """Return a fault: the files of one task's folder are another's."""

    def plant(project: Project) -> None:
        for path in (project.out / source).iterdir():
            shutil.copyfile(path, project.out / target / path.name)

    return plant


def renamed(project: Project) -> None:
    """The output has another name."""

    def change(model: ir.Model) -> None:
        found(model, "logits").name = "scores"

    edit_graphs(project.out / "onnx", change)


def output_missing(project: Project) -> None:
    """A cache output of the first graph is gone."""

    def change(model: ir.Model) -> None:
        kept = [v for v in model.graph.outputs if v.name != "present.1.value"]
        model.graph.outputs[:] = kept

    edit_graph(project.out / "onnx" / "summary" / "prefill.onnx", change)


def output_extra(project: Project) -> None:
    """A hidden state is an output, too."""

    def change(model: ir.Model) -> None:
        value = found(model, "layer_norm_1")
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)

    edit_graphs(project.out / "onnx", change)


def other_output(project: Project) -> None:
    """The logits are gone, and what they are made of is the output."""

    def change(model: ir.Model) -> None:
        value = found(model, "tanh")
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs[:] = [value]

    edit_graphs(project.out / "onnx" / "topic", change)


def row_order(project: Project) -> None:
    """The rows of the answer are in reverse."""

    def change(model: ir.Model) -> None:
        numbers = {"start": -1, "end": -(2**31), "axis": 0, "step": -1}
        ends = [constant(model, f"fault/{n}", np.array([v], np.int64)) for n, v in numbers.items()]
        precision.behind(
            model, "logits", lambda value: [ir.node("Slice", [value, *ends])], end=True
        )

    edit_graphs(project.out / "onnx" / "ads_rel", change)


def new_checkpoint(project: Project) -> None:
    """The adapter is trained again; what was exported is from the old one."""
    shutil.rmtree(project.folder / "adapter")
    write_adapter(ENCODER, project.folder, seed=5)


def new_base(project: Project) -> None:
    """The base in the folder is another one than the adapter was trained on."""
    shutil.rmtree(project.folder / "base")
    write_base(DECODER, project.folder / "base", seed=5)


def old_weights(project: Project) -> None:
    """Weights from before the last training, under a manifest that names the new one."""
    old = Project(project.folder / "old", "old " + project.name)
    shutil.copytree(project.folder / "base", old.folder / "base")
    shutil.copy(project.folder / "mtl-export.toml", old.folder)
    write_adapter(ENCODER, old.folder, seed=6)
    old.export(("merge", "--all-tasks"))
    for task in ("ads_rel", "topic", "spam"):
        shutil.copyfile(
            old.out / "merged" / task / WEIGHTS, project.out / "merged" / task / WEIGHTS
        )
    shutil.rmtree(old.folder)


DATA = "model.onnx.data"
FAULTS = (
    Fault("external data truncated", "roberta", ALL, cut(f"onnx/{DATA}"),
          r"model\.onnx\.data has \d+ bytes, not", sealed=False),
    Fault("external data truncated, manifest rewritten", "llama", ALL, cut(f"onnx/{DATA}"),
          r"cannot open it|outside|external|whole ONNX"),
    Fault("external data swapped between tasks", "llama", ONE,
          swapped(f"onnx/summary/{DATA}", f"onnx/title/{DATA}"), "task (summary|title).*error"),
    Fault("a task's graph is another's", "roberta", ONE, copied("onnx/spam", "onnx/ads_rel"),
          "task ads_rel"),
    Fault("weights changed after the export", "t5", HF,
          swapped(f"merged/reply/{WEIGHTS}", f"merged/title/{WEIGHTS}"),
          f"task (reply|title).*{WEIGHTS} has changed", sealed=False),
    Fault("weights truncated, manifest rewritten", "llama", HF, cut(f"merged/title/{WEIGHTS}"),
          "task title.*cannot load"),
    Fault("output renamed", "roberta", ALL, renamed, "no output 'logits'|scores"),
    Fault("output missing", "llama", ONE, output_missing, r"task summary.*present\.1\.value"),
    Fault("output replaced by another", "roberta", ONE, other_output, "task topic.*'?logits"),
    Fault("output extra", "roberta", ALL, output_extra, "layer_norm_1"),
    Fault("rows of the answer reversed", "roberta", ONE, row_order, "task ads_rel.*error"),
    Fault("old artefacts, new checkpoint", "roberta", "", new_checkpoint,
          "not from this checkpoint"),
    Fault("old weights, new manifest", "roberta", HF, old_weights, "task .*error"),
    Fault("base is not the adapter's", "llama", "", new_base, "trained on", code=REFUSED),
)  # fmt: skip
