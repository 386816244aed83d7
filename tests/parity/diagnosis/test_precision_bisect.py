"""The least set of layers that must compute in float32, and where float16 overflows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.graph.passes.precision import PrecisionPass, narrowed
from mtl_export.graph.taps import layer_taps
from mtl_export.graph.widen import parts_of, widen
from mtl_export.parity.cases import MIXED
from mtl_export.parity.diagnosis.activations import graph_session
from mtl_export.parity.diagnosis.layer_errors import Bisection
from mtl_export.parity.diagnosis.localise import localise, looked_at
from mtl_export.parity.diagnosis.precision_bisect import smallest
from mtl_export.parity.report import Cell, ParityReport
from tests.adapters import toys
from tests.parity.planted import NARROW, WIDE, Exported, faulty, spoilt

ORT_FLOAT, ORT_HALF = "tensor(float)", "tensor(float16)"


@pytest.fixture(scope="module")
def half(toy: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the single graph in float16."""
    folder = shutil.copytree(toy.single, tmp_path_factory.mktemp("half") / "single")
    model = ir.load(toy.single / "model.onnx")
    PrecisionPass("fp16")(model)
    (folder / "model.onnx").unlink()
    ir.save(model, folder / "model.onnx")
    return folder


def bisected(toy: Exported, folder: Path, limit: float) -> Bisection:
    """Return the bisect of a float16 graph of whose tasks each failed at ``limit``."""
    artefact = toy.artefact(folder, is_merged=False, dtype="fp16")
    cells = tuple(
        Cell(artefact.name, "x", t.name, MIXED, "failed", "e", 1.0, limit / 8, limit, None)
        for t in toy.bound.adapters.tasks
    )
    report = ParityReport(cells, "", {}, {}, {})
    (found,) = localise(
        toy.bound, [artefact], toy.cases, report, oracle=toy.oracles.__getitem__, threads=1,
        bisect=True,
    )  # fmt: skip
    assert found.bisection is not None
    return found.bisection


@pytest.mark.parametrize("needed", [(0,), (9,), (4, 5), (0, 3, 9), (2, 6, 7, 8)])
def test_the_search_finds_what_is_needed(needed: Sequence[int]) -> None:
    """Every set is found, in few tries, and one that needs nothing too."""
    parts = [f"p{index}" for index in range(10)]
    wanted = [parts[index] for index in needed]
    tried = 0

    def passes(chosen: Sequence[str]) -> bool:
        nonlocal tried
        tried += 1
        return set(wanted) <= set(chosen)

    assert smallest(parts, passes) == (wanted, True)
    assert tried <= 5 * len(needed) + 2
    assert smallest(parts, lambda chosen: True) == ([], True)
    cut, is_sure = smallest(parts, passes, lambda: True)
    assert not is_sure
    assert set(wanted) <= set(cut)


def test_all_parts_in_float32_are_the_graph_in_float32(
    toy: Exported, half: Path, tmp_path: Path
) -> None:
    """Wide, the float16 graph is the float32 one with its weights rounded; one layer is less."""
    modules = looked_at(toy.bound)
    model = ir.load(half / "model.onnx")
    parts = list(parts_of(model, modules))
    assert [name for name in parts if name in modules] == [
        tap.module for tap in layer_taps(model, modules)
    ]
    inputs = toy.cases[-1].inputs
    logits = {}
    for chosen in ((), parts, (WIDE,)):
        changed = ir.load(half / "model.onnx")
        widen(changed, modules, chosen)
        session = graph_session(changed, half / "model.onnx", 1)
        assert [value.type for value in session.get_outputs()] == [ORT_FLOAT]
        logits[len(chosen)] = session.run(None, dict(inputs))[0]
        casts = [node for node in changed.graph if "/bisect_" in str(node.name)]
        assert bool(casts) == bool(chosen)

    def rounded(tensors: dict[str, np.ndarray]) -> None:
        for values in tensors.values():
            if values.dtype == np.float32:
                values[...] = narrowed(values, ir.DataType.FLOAT16)

    folder = spoilt(toy.single, tmp_path / "rounded", rounded)
    with toy.artefact(folder, is_merged=False).runner as runner:
        wanted = runner.infer(inputs)["logits"]
    seen = np.isfinite(wanted)
    errors = {key: np.abs(value[seen] - wanted[seen]).max() for key, value in logits.items()}
    assert errors[0] > 1e-4
    assert errors[len(parts)] < 1e-5
    assert not np.array_equal(logits[1], logits[0], equal_nan=True)


def test_one_layer_that_overflows_is_the_set(toy: Exported, half: Path, tmp_path: Path) -> None:
    """Only its own range is too small: it alone must compute in float32."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        # The same product, by way of numbers that float16 does not have.
        tensors[f"{WIDE}.down"] *= 256
        tensors[f"{WIDE}.core"] *= 256
        tensors[f"{WIDE}.up"] /= 256
        tensors[f"{WIDE}.up"] /= 256

    folder = spoilt(half, tmp_path / "overflow", change)
    found = bisected(toy, folder, limit=0.5)
    assert found.error is None
    assert found.layers == (WIDE,)
    assert found.error_wide is not None
    assert found.error_wide <= 1
    assert found.text == f"in float32 these are enough: {WIDE}"


def test_a_tolerance_between_both_dtypes_needs_some_layers(toy: Exported, half: Path) -> None:
    """As it is too much, all wide enough: some parts are found, and they are enough."""
    tight = bisected(toy, half, limit=1e-9)
    assert tight.layers == ()
    assert tight.error is not None
    assert tight.error_wide is not None
    assert tight.error_wide > 1
    assert "it is in the weights" in tight.text
    errors = (tight.error * 1e-9, tight.error_wide * 1e-9)
    between = bisected(toy, half, limit=(errors[0] + errors[1]) / 2)
    assert between.layers
    assert between.runs > 2
    loose = bisected(toy, half, limit=10 * errors[0])
    assert (loose.layers, loose.error_wide) == ((), None)
    assert "nothing to widen" in loose.text


def test_a_float32_graph_is_not_bisected(toy: Exported) -> None:
    """There is nothing to widen."""
    artefact = toy.artefact(toy.single, is_merged=False)
    cells = (Cell(artefact.name, "x", toys.TASKS[0].name, MIXED, "failed", "e"),)
    (found,) = localise(
        toy.bound, [artefact], toy.cases, ParityReport(cells, "", {}, {}, {}),
        oracle=toy.oracles.__getitem__, bisect=True,
    )  # fmt: skip
    assert found.bisection is None


def test_a_right_float16_graph_localises_nothing(toy: Exported, half: Path) -> None:
    """Its layers are within the floors of float16, which are wider."""
    found = toy.localised(toy.artefact(half, is_merged=False, dtype="fp16"))
    assert {e.verdict for e in found.layers} == {"within"}
    narrow = replace(toy.artefact(half, is_merged=False), dtype="fp32")
    assert {e.verdict for e in toy.localised(narrow).layers} != {"within"}


def test_an_overflow_is_named(toy: Exported, half: Path, tmp_path: Path) -> None:
    """A layer whose sums no float16 has: the cause is overflow, with the number reached."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{NARROW}.weight_t"] *= 60000

    found = toy.localised(
        toy.artefact(spoilt(half, tmp_path / "big", change), is_merged=False, dtype="fp16")
    )
    assert {layer for layer, _, _ in faulty(found)} == {NARROW}
