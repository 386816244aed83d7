"""What parity finds out about the tensors of a single graph, on the traced toy model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import (
    LAYERS,
    MIXED,
    ZEROED,
    Case,
    RowLimits,
    build_cases,
    seeded_rows,
)
from mtl_export.parity.checks.stored_tensors import STORED, TABLE, stored_cell, table_cell
from mtl_export.parity.checks.task_tensors import OTHERS, weight_cells
from mtl_export.parity.judged import Judged
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import ExtraChecks, Reference, with_zeroed, without_adapters
from mtl_export.parity.report import Cell
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.ort import OrtRunner
from tests.adapters import toys
from tests.factories import VOCABULARY

CELL = Cell("single-graph onnx", "onnxruntime", "*", "weights", "passed")


@pytest.fixture(scope="module")
def mixed(bound: BoundModel) -> Case:
    """Return a batch of all tasks."""
    count = len(bound.adapters.tasks)
    text = ("input_ids", "attention_mask", "token_type_ids")
    rows = seeded_rows(RowLimits(count, VOCABULARY), text)
    cases = build_cases(rows, RowLimits(count, VOCABULARY, 16))
    return next(case for case in cases if case.name == MIXED)


def record(path: Path, mixed: Case, bound: BoundModel) -> Judged:
    """Return what the file's checks get."""
    runner = OrtRunner(path, threads=1)
    artefact = Artefact(CELL.artefact, "single-graph", runner, None, "fp32", "", "", path=path)
    reference = Reference(mixed, Subject("logits"), np.zeros(1), mixed.name)
    floors = {reference.subject: 0.0}
    return Judged(bound, artefact, [reference], floors, Tolerance(atol=1e-4, rtol=0.0), 1)


def judged(path: Path, mixed: Case, bound: BoundModel) -> dict[str, Cell]:
    """Return the cells by check."""
    return {cell.case: cell for cell in weight_cells(record(path, mixed, bound))}


def test_a_right_graph_passes(routed_folder: Path, mixed: Case, bound: BoundModel) -> None:
    """Every layer counts for every task, and no task's tensors reach another's rows."""
    cells = judged(routed_folder / "model.onnx", mixed, bound)
    assert {name: (cell.verdict, cell.reason) for name, cell in cells.items()} == {
        OTHERS: ("passed", ""),
        LAYERS: ("passed", ""),
    }


def looked_at(path: Path, mixed: Case, bound: BoundModel) -> dict[str, Cell]:
    """Return the cells on the file and on adapters of zero, by check."""
    from mtl_export.runtime.runners.pytorch import OracleRunner

    base = without_adapters(bound)
    assert isinstance(base, BoundModel)
    reference = Reference(mixed, Subject("logits"), np.empty(0), mixed.name)
    left_out = ExtraChecks({LAYERS: "for time"})
    extra = with_zeroed(left_out, [reference], lambda dtype: OracleRunner(base, dtype))
    cells = weight_cells(replace(record(path, mixed, bound), extra=extra))
    cells += [table_cell(CELL, path, bound.adapters.tasks), stored_cell(CELL, path, bound.adapters)]
    return {cell.case: cell for cell in cells}


def test_a_right_file_holds_what_it_says(
    routed_folder: Path, mixed: Case, bound: BoundModel
) -> None:
    """Table and tensors are the checkpoint's; with adapters of zero it is the base."""
    cells = looked_at(routed_folder / "model.onnx", mixed, bound)
    assert {name: (cell.verdict, cell.reason) for name, cell in cells.items()} == dict.fromkeys(
        (OTHERS, ZEROED, TABLE, STORED), ("passed", "")
    )
    assert cells[ZEROED].max_abs_error is not None


def rename_a_label(model: ir.Model) -> str:
    """The metadata calls a label by another name."""
    table = json.loads(model.metadata_props["mtl_export.tasks"])
    table[1]["labels"][0] = "other"
    model.metadata_props["mtl_export.tasks"] = json.dumps(table)
    return f"labels of {table[1]['name']}"


def lose_a_task(model: ir.Model) -> str:
    """The metadata has a task less."""
    table = json.loads(model.metadata_props["mtl_export.tasks"])
    model.metadata_props["mtl_export.tasks"] = json.dumps(table[:-1])
    return f"{len(table) - 1} tasks, not {len(table)}"


def swap_cores(model: ir.Model) -> str:
    """Two tasks have each other's core in one layer."""
    module = list(toys.MODULES)[1]
    core = model.graph.initializers[names.part(module, "core")]
    assert core.const_value is not None
    values = core.const_value.numpy().copy()
    values[[0, 1]] = values[[1, 0]]
    core.const_value = ir.tensor(values, name=core.name)
    return f"{module}.core of"


def change_the_base(model: ir.Model) -> str:
    """One bias of the base is another."""
    bias = next(
        value for name, value in model.graph.initializers.items()
        if name.endswith("output.dense.bias")
    )  # fmt: skip
    assert bias.const_value is not None
    bias.const_value = ir.tensor(-bias.const_value.numpy(), name=bias.name)
    return "off the base"


@pytest.mark.parametrize(
    ("edit", "check"),
    [(rename_a_label, "task table"), (lose_a_task, "task table"),
     (swap_cores, "stored tensors"), (change_the_base, "zeroed adapters")],
)  # fmt: skip
def test_a_file_that_is_not_what_it_says_fails(
    routed_folder: Path,
    tmp_path: Path,
    mixed: Case,
    bound: BoundModel,
    edit: Callable[[ir.Model], str],
    check: str,
) -> None:
    """The check that is there for it fails, and no other."""
    path, expected = edited(routed_folder, tmp_path, edit)
    cells = looked_at(path, mixed, bound)
    assert {name for name, cell in cells.items() if cell.verdict == "failed"} == {check}
    assert expected in cells[check].reason


def guarded(model: ir.Model) -> ir.Value:
    """Return the task ids that all gathers read."""
    return next(node.outputs[0] for node in model.graph if node.name == "task_ids/guarded")


def freeze_routing(model: ir.Model) -> str:
    """Every row gets the tensors of the first task."""
    ids = guarded(model)
    frozen = ir.node("Mul", [ids, _zero(model)], name="frozen")
    made_by = ids.producer()
    assert made_by is not None
    model.graph.insert_after(made_by, frozen)
    for node, position in list(ids.uses()):
        if node is not frozen:
            node.replace_input_with(position, frozen.outputs[0])
    return "first's reach other tasks' rows"


def drop_a_layer(model: ir.Model) -> str:
    """One layer's way up is zero: its tensors are there, and nothing comes of them."""
    module = list(toys.MODULES)[1]
    up = model.graph.initializers[names.part(module, "up")]
    assert up.const_value is not None
    up.const_value = ir.tensor(np.zeros_like(up.const_value.numpy()), name=up.name)
    return module


def _zero(model: ir.Model) -> ir.Value:
    return _constant(model, np.array(0, np.int64), "test/zero")


def _constant(model: ir.Model, values: Array, name: str) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([]))
    value.type = ir.TensorType(tensor.dtype)
    model.graph.initializers[name] = value
    return value


def edited(source: Path, target: Path, edit: Callable[[ir.Model], str]) -> tuple[Path, str]:
    """Write an edited copy; return its file and what the check should say."""
    model = ir.load(source / "model.onnx")
    expected = edit(model)
    ir.save(model, target / "model.onnx", external_data="model.onnx.data")
    return target / "model.onnx", expected


def test_frozen_routing_is_seen(
    routed_folder: Path, tmp_path: Path, mixed: Case, bound: BoundModel
) -> None:
    """The first task's tensors reach every row, the others' reach none."""
    path, _ = edited(routed_folder, tmp_path, freeze_routing)
    first, second = (task.name for task in bound.adapters.tasks[:2])
    reason = judged(path, mixed, bound)[OTHERS].reason
    assert f"{first}'s reach other tasks' rows" in reason
    assert f"{second}'s own rows do not use them" in reason


def test_a_layer_that_does_nothing_is_named(
    routed_folder: Path, tmp_path: Path, mixed: Case, bound: BoundModel
) -> None:
    """Its tensors are in the file, but nothing comes of them."""
    path, module = edited(routed_folder, tmp_path, drop_a_layer)
    cells = judged(path, mixed, bound)
    assert cells[LAYERS].verdict == "failed"
    assert module in cells[LAYERS].reason


def test_what_cannot_be_looked_into_is_not_run(
    routed_folder: Path, tmp_path: Path, mixed: Case, bound: BoundModel
) -> None:
    """Weights with a second hard link are read by no graph tool; that is no pass."""
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(routed_folder / name, tmp_path / name)
    os.link(tmp_path / "model.onnx.data", tmp_path / "again")
    cells = judged(tmp_path / "model.onnx", mixed, bound)
    assert {cell.verdict for cell in cells.values()} == {"not-run"}
    assert "hard link" in cells[OTHERS].reason
