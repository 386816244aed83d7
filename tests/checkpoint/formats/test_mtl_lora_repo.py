"""Checkpoints of the MTL-LoRA authors' repository: every class and every fault."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import family_named
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    HyperparameterError,
)
from tests.checkpoint import official_toys as toys
from tests.checkpoint.official_cases import (
    CASES,
    FOR_TASKS,
    deltas,
    layer_states,
    opened,
    written,
)
from tests.checkpoint.official_toys import State


@pytest.mark.parametrize("name", CASES)
def test_every_class_of_the_repository_gives_its_equation(tmp_path: Path, name: str) -> None:
    """The normal form and the PyTorch module equal the class's equation for every task."""
    states = layer_states(name)
    checkpoint = opened(written(tmp_path, states))
    assert checkpoint.family == name.partition(" ")[0]
    found = deltas(checkpoint)
    assert {module for module, _ in found} == set(states)
    for (module, task), value in found.items():
        weight = toys.base_weight(module)
        expected = toys.delta(states[module], weight, task)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            module_delta(checkpoint, module, task), expected, rtol=0, atol=1e-12
        )


def module_delta(checkpoint: Checkpoint, module: str, task: int) -> Array:
    """Return what the PyTorch module adds to the base weight, in float64."""
    weight = torch.from_numpy(toys.base_weight(module)).double()
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(weight)
    path, _, class_name = family_named(checkpoint.family).oracle.partition(":")
    routing = TaskRouting()
    layer = getattr(import_module(path), class_name).from_tensors(
        base, routing, checkpoint.layers[module]
    )
    # Two rows of the task, and where there are several tasks one of another in between.
    others = [task, (task + 1) % len(checkpoint.tasks), task]
    routing.set(torch.tensor(others))
    inputs = torch.eye(weight.shape[1], dtype=torch.float64).repeat(3, 1, 1)
    with torch.inference_mode():
        rows = layer(inputs) - base(inputs)
    assert torch.equal(rows[0], rows[2])
    return np.asarray(rows[0].T.numpy())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_a_fate(tmp_path: Path, name: str) -> None:
    """The ledger names every key of the file once, and dead ones with a reason."""
    states = layer_states(name)
    checkpoint = opened(written(tmp_path, states))
    assert sorted(entry.tensor for entry in checkpoint.ledger) == sorted(toys.flat(states))
    fates = {entry.fate for entry in checkpoint.ledger}
    assert fates <= {"folded", "stacked", "known-dead"}
    dead = [entry for entry in checkpoint.ledger if entry.fate == "known-dead"]
    assert all(entry.reason for entry in dead)
    assert bool(dead) == (name.startswith("moe_lora") or name == "multi_lora unused scaler")


@pytest.mark.parametrize("where", ["run", "folder", "file"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_run_folder_checkpoint_folder_and_file_are_the_same(
    tmp_path: Path, where: str, prefix: str
) -> None:
    """The path may be any of the three, and a wrapper's ``module.`` is dropped."""
    run = written(tmp_path, layer_states("mtl_lora"), prefix)
    folder = run / "checkpoint"
    path = {"run": run, "folder": folder, "file": folder / "final_checkpoint.pt"}[where]
    checkpoint = opened(path, task_names=["a", "b", "c", "d"])
    assert checkpoint.format == "official"
    assert [task.name for task in checkpoint.tasks] == ["a", "b", "c", "d"]
    assert all(task.kind == "headless" for task in checkpoint.tasks)
    assert set(checkpoint.layers) == set(toys.MODULES)


def test_hidden_bias_is_said_to_be_left_out(tmp_path: Path) -> None:
    """The checkpoint's notes say that the trainer's unsaved random bias is not exported."""
    checkpoint = opened(written(tmp_path, layer_states("mtl_lora")))
    assert any("random" in note and "bias" in note for note in checkpoint.notes)


def transposed(states: dict[str, State]) -> dict[str, State]:
    """Return the states with every full Lambda transposed."""
    return {
        module: {**state, "lora_lambdas": np.swapaxes(state["lora_lambdas"], 1, 2)}
        for module, state in states.items()
    }


def averaged(states: dict[str, State]) -> dict[str, State]:
    """Return the states with all B_i of a projection replaced by their mean."""

    def mean(name: str, value: Array) -> Array:
        if not name.startswith("lora_B") or name.endswith("_w") or value.ndim != 3:
            return value
        return np.broadcast_to(value.mean(axis=0), value.shape).astype(value.dtype)

    return {
        module: {name: mean(name, value) for name, value in state.items()}
        for module, state in states.items()
    }


def permuted(states: dict[str, State]) -> dict[str, State]:
    """Return the states with tasks 0 and 1 exchanged."""

    def swap(name: str, value: Array) -> Array:
        own = name in {"lora_lambdas", "lora_task_embedding.weight"} or name.endswith("_w")
        return value[[1, 0, *range(2, len(value))]] if own else value

    return {
        module: {name: swap(name, value) for name, value in state.items()}
        for module, state in states.items()
    }


def without_scaler(states: dict[str, State]) -> dict[str, State]:
    """Return the states without the learnt scale."""
    return {
        module: {name: value for name, value in state.items() if name != "lora_scaler"}
        for module, state in states.items()
    }


def unchanged(states: dict[str, State]) -> dict[str, State]:
    """Return the states as they are."""
    return states


# fault -> (cases, change of the file, change of the numbers given)
FAULTS: dict[str, tuple[list[str], Callable[..., dict[str, State]], dict[str, float]]] = {
    "Lambda transposed": (["mtl_lora", "mtl_lora_fused", "mtl_lora bf16"], transposed, {}),
    "temperature": (["mtl_lora", "mtl_lora_fused"], unchanged, {"temperature": 0.31}),
    "B averaged": (["mtl_lora", "mtl_lora diagonal", "mtl_lora_fused", "multi_lora"], averaged, {}),
    "alpha": (["mtl_lora", "mtl_lora_fused", "moe_lora", "multi_lora", "lora", "dora"], unchanged,
              {"alpha": toys.RANK}),
    "scaler dropped": (["mtl_lora scaler", "mtl_lora_fused diagonal"], without_scaler, {}),
    "tasks permuted": (["mtl_lora", "mtl_lora diagonal", "mtl_lora_fused", "moe_lora"], permuted,
                       {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, row in FAULTS.items() for name in row[0]]
)
def test_a_fault_shows(tmp_path: Path, fault: str, name: str) -> None:
    """Each way to get the equation wrong moves every module's delta far beyond rounding."""
    _, change, given = FAULTS[fault]
    states = layer_states(name)
    faulty = deltas(opened(written(tmp_path, change(states)), **given))
    for module, state in states.items():
        weight = toys.base_weight(module)
        expected = toys.delta(state, weight, 0)
        difference = np.abs(faulty[module, 0] - expected).max() / np.abs(expected).max()
        assert difference > 1e-3, f"{fault}: {module} moved by {difference:.1e} only"


def test_tasks_differ(tmp_path: Path) -> None:
    """No two tasks of a task-aware class share a delta, so that none can stand for another."""
    for name in FOR_TASKS:
        found = deltas(opened(written(tmp_path / name, layer_states(name))))
        for (module, task), value in found.items():
            for (other, another), compared in found.items():
                if module == other and task < another:
                    assert np.abs(value - compared).max() > 1e-3, f"{name} {module}"


def test_low_temperature_does_not_overflow_in_fp16(tmp_path: Path) -> None:
    """Mixing logits over tau beyond float16's range do no harm: both are float64 by then."""
    states = layer_states("mtl_lora fp16")
    for state in states.values():
        state["lora_B_w"] = (state["lora_B_w"] * 5e4).astype(np.float16)
    found = deltas(opened(written(tmp_path, states), temperature=0.05))
    for (module, task), value in found.items():
        weight = toys.base_weight(module)
        expected = toys.delta(states[module], weight, task, temperature=0.05)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)


def test_numbers_that_are_not_in_the_file_are_asked_for(tmp_path: Path) -> None:
    """Without alpha or the temperature, the flag to pass is named; the temperature is above 0."""
    run = written(tmp_path, layer_states("mtl_lora"))
    for given, flag in [({"alpha": None}, "--alpha"), ({"temperature": None}, "--temperature")]:
        with pytest.raises(HyperparameterError) as caught:
            deltas(opened(run, **given))
        assert flag in caught.value.fix
    with pytest.raises(HyperparameterError, match="above 0"):
        deltas(opened(run, temperature=0.0))


@pytest.mark.parametrize("name", ["lora", "multi_lora", "moe_lora", "dora"])
def test_classes_without_mixing_need_no_temperature(tmp_path: Path, name: str) -> None:
    """Only alpha is asked for."""
    run = written(tmp_path, layer_states(name))
    assert deltas(opened(run, temperature=None))
    with pytest.raises(HyperparameterError, match="--alpha"):
        deltas(opened(run, alpha=None))
