"""Every known fault, planted in a graph, is named: its layer, its tasks, its cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from mtl_export.merge.writer import write_merged
from mtl_export.parity.cases import Case
from mtl_export.parity.diagnosis.localise import chosen_cases, localise, looked_at
from mtl_export.parity.report import Cell
from mtl_export.parity.run import RunOptions, run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.pytorch import MergedRunner
from tests.adapters import toys
from tests.parity.fakes import FakeRunner
from tests.parity.planted import (
    GROUPS,
    MERGED_TASK,
    NARROW,
    POOLER,
    QUERY,
    RECIPES,
    VALUE,
    WIDE,
    Exported,
    Tensors,
    faulty,
    plant,
    spoilt,
)

NAMES = [task.name for task in toys.TASKS]
LAYOUTS = pytest.mark.parametrize("is_merged", [False, True], ids=["single", "merged"])


@LAYOUTS
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_faults_of_the_formula_are_named(
    toy: Exported, tmp_path: Path, group: int, is_merged: bool
) -> None:
    """Every layer has another fault; each is named, for every task, though all follow others."""
    planted = GROUPS[group]

    def change(tensors: Tensors) -> None:
        for module, fault in planted.items():
            plant(toy.bound, module, RECIPES[fault][0], is_merged=is_merged)(tensors)

    found = toy.planted(tmp_path, change, is_merged=is_merged)
    tasks = [NAMES[MERGED_TASK]] if is_merged else NAMES
    named = faulty(found)
    assert [name[:2] for name in named] == [(m, task) for m in planted for task in tasks]
    for module, task, cause in named:
        said = RECIPES[planted[module]][1]
        other = NAMES[(NAMES.index(task) + 1) % 3] if said.endswith("task ") else ""
        assert cause.startswith(said + other)
    assert found.unseen == ()


@LAYOUTS
def test_an_error_that_came_in_is_told_from_a_fault(
    toy: Exported, tmp_path: Path, is_merged: bool
) -> None:
    """The first wrong layer is the finding; what follows is propagated, what precedes within."""
    recipe, said = RECIPES["lambda transposed"]
    found = toy.planted(
        tmp_path, plant(toy.bound, WIDE, recipe, is_merged=is_merged), is_merged=is_merged
    )
    tasks = [NAMES[MERGED_TASK]] if is_merged else NAMES
    assert faulty(found) == [(WIDE, task, said) for task in tasks]
    by_layer = {(e.layer, e.task): e for e in found.layers}
    for task in tasks:
        finding = found.finding(task)
        assert finding is not None
        assert (finding.layer, finding.cause, finding.after) == (WIDE, said, "")
        assert finding.text == f"{WIDE} is wrong: {said}"
        assert by_layer[QUERY, task].verdict == "within"
        assert by_layer[NARROW, task].verdict == "propagated"
        assert by_layer[NARROW, task].ratio > 1e3 > 8 > by_layer[NARROW, task].own_ratio


def bias_missing(module: str) -> Callable[[Tensors], None]:
    """Return a fault."""
    return lambda tensors: tensors[f"{module}.bias"].fill(0.0)


def bias_twice(tensors: Tensors) -> None:
    """Double a bias."""
    tensors[f"{POOLER}.bias"] *= 2


def other_layer(tensors: Tensors) -> None:
    """Give a layer the tensors of another of its shape."""
    for name in [name for name in tensors if name.startswith(f"{QUERY}.")]:
        tensors[name] = tensors[name.replace(QUERY, VALUE)]


@LAYOUTS
@pytest.mark.parametrize(
    ("change", "layer", "said"),
    [
        (bias_missing(QUERY), QUERY, "the bias is missing"),
        (bias_missing(NARROW), NARROW, "the bias is missing"),
        (bias_twice, POOLER, "the bias is added twice"),
        (other_layer, QUERY, f"the weights of layer {VALUE}"),
    ],
    ids=["bias, joint", "bias, apart", "bias twice", "other layer"],
)
def test_a_fault_beside_the_adapter_is_named(
    toy: Exported, tmp_path: Path, change: Callable[[Tensors], None], layer: str, said: str,
    is_merged: bool,
) -> None:  # fmt: skip
    """A bias that is lost or added twice, a layer in another's place."""
    found = toy.planted(tmp_path, change, is_merged=is_merged)
    assert {(name, cause) for name, _, cause in faulty(found)} == {(layer, said)}


def test_one_task_of_many_is_named(toy: Exported, tmp_path: Path) -> None:
    """Where one task's core is wrong, the others are within their floors in every layer."""

    def change(tensors: Tensors) -> None:
        core = tensors[f"{VALUE}.core"]
        core[2] = core[0]

    found = toy.planted(tmp_path, change, is_merged=False)
    assert faulty(found) == [(VALUE, NAMES[2], f"the adapter of task {NAMES[0]}")]
    assert {e.task for e in found.layers if e.verdict != "within"} == {NAMES[2]}
    clean = found.finding(NAMES[0])
    assert clean is not None
    assert clean.layer == ""
    assert "no layer" in clean.text
    assert found.finding("*") == found.finding(NAMES[2])


def test_heads_of_two_tasks_swapped_are_named(toy: Exported, tmp_path: Path) -> None:
    """Each of the two is said to have the other's head, or the weight of it."""

    def weights(tensors: Tensors) -> None:
        stack = tensors["classifier.weights"]
        stack[[0, 1]] = stack[[1, 0]]

    def whole(tensors: Tensors) -> None:
        weights(tensors)
        stack = tensors["classifier.biases"]
        stack[[0, 1]] = stack[[1, 0]]

    found = toy.planted(tmp_path / "whole", whole, is_merged=False)
    assert faulty(found) == [
        ("classifier", NAMES[0], f"the head of task {NAMES[1]}"),
        ("classifier", NAMES[1], f"the head of task {NAMES[0]}"),
    ]
    found = toy.planted(tmp_path / "weights", weights, is_merged=False)
    assert [cause for _, _, cause in faulty(found)] == [
        f"the weight of the head of task {NAMES[1]}, with its own bias",
        f"the weight of the head of task {NAMES[0]}, with its own bias",
    ]


def test_labels_of_a_merged_head_reversed_are_named(toy: Exported, tmp_path: Path) -> None:
    """Weight and bias rows in reverse."""

    def change(tensors: Tensors) -> None:
        tensors["classifier.weight_t"] = tensors["classifier.weight_t"][:, ::-1]
        tensors["classifier.bias"] = tensors["classifier.bias"][::-1]

    found = toy.planted(tmp_path, change, is_merged=True)
    assert faulty(found) == [
        ("classifier", NAMES[MERGED_TASK], "the labels of the head are reversed")
    ]


@LAYOUTS
def test_an_unknown_fault_claims_no_cause(toy: Exported, tmp_path: Path, is_merged: bool) -> None:
    """One wrong row of a matrix: the layer and the output are named, no cause is."""

    def change(tensors: Tensors) -> None:
        tensors[f"{NARROW}.weight_t"][4, 7] += 0.5

    found = toy.planted(tmp_path, change, is_merged=is_merged)
    wrong = [e for e in found.layers if e.verdict == "faulty"]
    assert {(e.layer, e.cause, e.detail) for e in wrong} == {(NARROW, "", "only outputs [7] of 12")}
    finding = found.finding("*")
    assert finding is not None
    assert (
        finding.text == f"{NARROW} is wrong, the cause is not a known one (only outputs [7] of 12)"
    )


def test_two_faults_in_one_layer_claim_no_cause(toy: Exported, tmp_path: Path) -> None:
    """Neither explains the output alone."""

    def change(tensors: Tensors) -> None:
        plant(toy.bound, WIDE, RECIPES["lambda transposed"][0], is_merged=False)(tensors)
        tensors[f"{WIDE}.bias"].fill(0.0)

    found = toy.planted(tmp_path, change, is_merged=False)
    assert faulty(found) == [(WIDE, name, "") for name in NAMES]


def test_faults_in_two_layers_are_both_named(toy: Exported, tmp_path: Path) -> None:
    """The second is judged on what it is given, so the first does not hide it."""

    def change(tensors: Tensors) -> None:
        plant(toy.bound, QUERY, RECIPES["mean"][0], is_merged=False)(tensors)
        plant(toy.bound, VALUE, RECIPES["not merged"][0], is_merged=False)(tensors)

    found = toy.planted(tmp_path, change, is_merged=False)
    causes = {layer: cause for layer, _, cause in faulty(found)}
    assert causes[QUERY].startswith("the mean of")
    assert causes[VALUE].startswith("the adapter is not merged")
    assert {one.layer for one in found.findings} == {QUERY}


@LAYOUTS
def test_a_fault_between_layers_is_put_between_them(
    toy: Exported, tmp_path: Path, is_merged: bool
) -> None:
    """A LayerNorm is no layer that tasks change: the error begins after one and before the next."""

    def change(tensors: Tensors) -> None:
        tensors["bert.encoder.layer.0.output.LayerNorm.weight"] *= 1.5

    found = toy.planted(tmp_path, change, is_merged=is_merged)
    assert faulty(found) == []
    for one in found.findings:
        assert (one.layer, one.after, one.cause) == (VALUE, WIDE, "")
        assert one.text.startswith(f"the error begins after {WIDE}, before {VALUE}")


@LAYOUTS
def test_a_right_graph_localises_nothing(toy: Exported, is_merged: bool) -> None:
    """Every layer is within its floor, and the finding says so."""
    folder = toy.merged if is_merged else toy.single
    found = toy.localised(toy.artefact(folder, is_merged=is_merged))
    assert {e.verdict for e in found.layers} == {"within"}
    assert {e.layer for e in found.layers} == set(looked_at(toy.bound))
    assert all(one.layer == "" and "no layer" in one.text for one in found.findings)
    assert found.finding("*") is None
    assert all(e.own_ratio < 8 for e in found.layers)


def test_parity_and_localise_agree(toy: Exported, tmp_path: Path) -> None:
    """From the verdict of a whole run: nothing where it passed, the layer where it failed."""
    change = plant(toy.bound, WIDE, RECIPES["order"][0], is_merged=True)
    bad = toy.artefact(spoilt(toy.merged, tmp_path / "bad", change), is_merged=True)
    oracle = toy.oracles.__getitem__
    report = run_parity(
        toy.bound,
        [bad],
        toy.cases[:5],
        tolerance=Tolerance(),
        oracle=oracle,
        options=RunOptions(threads=1),
    )
    steps: list[str] = []
    (found,) = localise(
        toy.bound, [bad], toy.cases, report, oracle=oracle, threads=1, progress=steps.append
    )
    assert (found.artefact, found.task) == ("per-task onnx", NAMES[MERGED_TASK])
    assert steps == [f"layers of per-task onnx {NAMES[MERGED_TASK]}"]
    failed = next(cell for cell in report.cells if cell.verdict == "failed")
    finding = replace(report, localised=(found,)).finding(failed)
    assert finding is not None
    assert finding.layer == WIDE
    passed = replace(report, cells=tuple(c for c in report.cells if c.verdict == "passed"))
    assert localise(toy.bound, [bad], toy.cases, passed, oracle=oracle) == ()


def test_a_merged_folder_is_looked_into_by_hooks(toy: Exported, tmp_path: Path) -> None:
    """PyTorch's own layers: one that was not merged, another whose bias is lost."""
    task = toy.bound.adapters.tasks[MERGED_TASK]
    write_merged(toy.bound, task, tmp_path, dtype=None)
    artefact = replace(
        toy.artefact(toy.merged, is_merged=True), runner=MergedRunner(tmp_path), path=tmp_path
    )
    assert {e.verdict for e in toy.localised(artefact).layers} == {"within"}
    tensors = load_file(tmp_path / "model.safetensors")
    base = toy.bound.base_tensor(f"{WIDE}.weight").numpy()
    tensors[f"{WIDE}.weight"] = np.ascontiguousarray(base)
    tensors[f"{NARROW}.bias"] = np.zeros_like(tensors[f"{NARROW}.bias"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = toy.localised(artefact)
    assert faulty(found) == [
        (WIDE, task.name, "the adapter is not merged: the base weight alone answers"),
        (NARROW, task.name, "the bias is missing"),
    ]
    assert {e.verdict for e in found.layers if e.layer in {VALUE, POOLER}} == {"propagated"}


def test_what_cannot_be_looked_into_says_why(toy: Exported, tmp_path: Path) -> None:
    """Files that were not run, engines, one of several graphs, renamed nodes: never silence."""
    good = toy.artefact(toy.single, is_merged=False)
    tasks = toy.bound.adapters.tasks

    def reason(artefact: object, case: str = "mixed tasks") -> str:
        return toy.localised(artefact, case).reason  # type: ignore[arg-type]

    assert "was not run" in reason(good, "*")
    assert "engine" in reason(replace(good, path=tmp_path / "model.engine"))
    assert "several graphs" in reason(replace(good, path=tmp_path / "encoder.onnx"))
    assert (
        reason(replace(good, path=None, runner=FakeRunner(lambda inputs: {}))) == "it has no file"
    )

    model = onnx.load(toy.single / "model.onnx")
    for node in model.graph.node:
        node.name = node.name.replace("/", "_")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=False)
    assert "no node of any adapted layer" in reason(replace(good, path=tmp_path / "model.onnx"))
    steps = Case("8 steps, mixed tasks", {**toy.cases[0].inputs, NEW_TOKENS: np.zeros((4, 2))})
    cell = Cell("single-graph onnx", "x", tasks[0].name, steps.name, "failed", "error")
    assert chosen_cases([cell], [steps], tasks) == []


def test_the_fewest_and_smallest_batches_show_all_tasks(toy: Exported) -> None:
    """One batch where it shows every task that failed; more where it does not."""
    tasks = toy.bound.adapters.tasks

    def cell(task: str, case: str) -> Cell:
        return Cell("single-graph onnx", "onnxruntime", task, case, "failed", "error")

    def names(cells: list[Cell]) -> list[tuple[str, list[str]]]:
        return [(c.name, sorted(shown)) for c, shown in chosen_cases(cells, toy.cases, tasks)]

    one = [cell(NAMES[0], "mixed tasks"), cell(NAMES[0], "task 0"), cell(NAMES[1], "mixed tasks")]
    assert names(one) == [("mixed tasks", sorted(NAMES))]
    two = [cell(NAMES[0], "one row of task 0"), cell(NAMES[0], "task 0"), cell(NAMES[1], "task 1")]
    assert names(two) == [
        ("one row of task 0", sorted([NAMES[0], NAMES[2]])), ("task 1", [NAMES[1]])
    ]  # fmt: skip
    assert names([cell("*", "bad task ids")]) == [("mixed tasks", sorted(NAMES))]
    assert names([cell(NAMES[2], "mixed tasks, logits")])[0][0] == "mixed tasks"
