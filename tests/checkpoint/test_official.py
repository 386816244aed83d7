"""Checkpoints of the MTL-LoRA authors' repository: every class, every fault, every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import family_named, read_adapters
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    CheckpointError,
    HyperparameterError,
    IntegrityError,
    MtlExportError,
    UsageError,
)
from tests.adapters.toys import memory_tensor
from tests.checkpoint import official_toys as toys
from tests.checkpoint.messages import assert_whole
from tests.checkpoint.official_toys import Drawer, State

Make = Callable[[Drawer, int, int], State]


def case(make: Callable[..., State], dtype: str = "F32", **options: Any) -> tuple[Make, str]:
    """Return a generator of one layer's state with its options fixed, and its dtype."""
    return lambda draw, outputs, inputs: make(draw, outputs, inputs, **options), dtype


CASES = {
    "mtl_lora": case(toys.mtl_lora),
    "mtl_lora diagonal": case(toys.mtl_lora, diagonal=True),
    "mtl_lora scaler": case(toys.mtl_lora, scaler=True),
    "mtl_lora one task": case(toys.mtl_lora, tasks=1),
    "mtl_lora one B": case(toys.mtl_lora, ups=1),
    "mtl_lora bf16": case(toys.mtl_lora, "BF16"),
    "mtl_lora fp16": case(toys.mtl_lora, "F16", scaler=True),
    "mtl_lora_fused": case(toys.mtl_lora_fused),
    "mtl_lora_fused diagonal": case(toys.mtl_lora_fused, diagonal=True, scaler=True),
    "mtl_lora_fused without k": case(toys.mtl_lora_fused, enabled="qv", mixed="qv"),
    "mtl_lora_fused only k": case(toys.mtl_lora_fused, enabled="k", mixed="k"),
    "mtl_lora_fused one B for k": case(toys.mtl_lora_fused, mixed="qv"),
    "moe_lora": case(toys.moe_lora),
    "moe_lora bf16": case(toys.moe_lora, "BF16"),
    "multi_lora": case(toys.multi_lora),
    "multi_lora unused scaler": case(toys.multi_lora, scaler=True),
    "lora": case(toys.lora),
    "dora": case(toys.dora),
}
FOR_TASKS = [name for name in CASES if name.partition(" ")[0] not in {"multi_lora", "lora", "dora"}]


def layer_states(name: str) -> dict[str, State]:
    """Return the case's state of every toy module."""
    make, dtype = CASES[name]
    modules = toys.FUSED_MODULES if "fused" in name else toys.MODULES
    return {
        module: make(Drawer(seed, dtype), *shape)
        for seed, (module, shape) in enumerate(modules.items(), start=3)
    }


def base_of(modules: Any) -> BaseModel:
    """Return a base in memory that has these modules."""
    weights = {f"{module}.weight": toys.base_weight(module) for module in modules}
    return BaseModel(
        reference="toy",
        folder=Path("toy"),
        config=MappingProxyType({"architectures": ["LlamaForCausalLM"]}),
        tensors=MappingProxyType({n: memory_tensor(n, value) for n, value in weights.items()}),
        weight_files=(),
    )


def opened(path: Path, **given: Any) -> Checkpoint:
    """Return the checkpoint at ``path`` with the toys' alpha and temperature."""
    return open_checkpoint(path, **{"alpha": toys.ALPHA, "temperature": toys.TEMPERATURE, **given})


def written(folder: Path, states: dict[str, State], prefix: str = "") -> Path:
    """Write ``states`` where the trainer does and return the run's folder."""
    toys.write(folder / "checkpoint" / "final_checkpoint.pt", toys.flat(states, prefix))
    return folder


def deltas(checkpoint: Checkpoint) -> dict[tuple[str, int], Array]:
    """Return the delta of every module and task, from the normal form."""
    adapters = read_adapters(checkpoint, base_of(checkpoint.layers))
    found = {}
    for module, layer in adapters.layers.items():
        weight = toys.base_weight(module).astype(np.float64)
        for task in adapters.tasks:
            merged = weight + layer.delta(task.index)
            if layer.gain is not None:
                merged = layer.gain[task.index][:, None] * merged
            found[module, task.index] = merged - weight
    return found


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


def test_task_names_must_be_as_many_as_tasks(tmp_path: Path) -> None:
    """Three names for four tasks are refused."""
    run = written(tmp_path, layer_states("mtl_lora"))
    with pytest.raises(UsageError, match="4 tasks"):
        opened(run, task_names=["a", "b", "c"])


Q, DOWN = toys.MODULES
TWO = next(iter(toys.MODULES.items()))


def broken(name: str, changes: dict[str, Array | None]) -> State:
    """Return the case's whole state dict with keys added, replaced, or (None) removed."""
    state = {**toys.flat(layer_states(name)), **changes}
    return {key: value for key, value in state.items() if value is not None}


def zeros(*shape: int, dtype: str = "float32") -> Array:
    """Return zeros."""
    return np.zeros(shape, dtype)


REFUSALS: dict[str, tuple[str, dict[str, Array | None], str, str]] = {
    "unknown name": ("mtl_lora", {f"{Q}.lora_C": zeros(2, 2)}, f"unknown '{Q}.lora_C'",
                     "adapter tensors"),
    "base weight": ("mtl_lora", {f"{Q}.weight": zeros(6, 5)}, f"unknown '{Q}.weight'",
                    "adapter tensors"),
    "integers": ("mtl_lora", {f"{Q}.lora_A": zeros(1, 3, 5, dtype="int64")}, "has dtype I64",
                 "adapter tensors"),
    "empty": ("mtl_lora", {f"{Q}.lora_B": zeros(0, 6, 3)}, "is empty (a ZeRO-3 run saves it so)",
              "adapter tensors"),
    "A per task": ("mtl_lora", {f"{Q}.lora_A": zeros(4, 3, 5)}, "shape [4, 3, 5]", "[1, r, I]"),
    "two families": ("lora", {f"{DOWN}.lora_scaling": zeros(2, 5)}, "lora, multi_lora",
                     "one family"),
    "A alone": ("lora", {f"{Q}.lora_B.weight": None}, "tensors down", "one adapter layer"),
    "task counts": ("mtl_lora", {f"{Q}.lora_lambdas": zeros(3, 3, 3),
                                 f"{Q}.lora_B_w": zeros(3, 2)}, "layers for 3, 4 tasks",
                    "one number of tasks"),
    "alias differs": ("moe_lora", {f"{Q}.lora_A.loraA.0.weight": zeros(3, 5)},
                      "differs from its .mlp twin", "2 experts"),
    "alias without twin": ("moe_lora", {f"{Q}.lora_A.loraA.1.mlp.weight": None},
                           "1 A and 2 B for 2 experts", "2 experts"),
    "expert too many": ("moe_lora", {f"{Q}.lora_A.loraA.2.mlp.weight": zeros(3, 5)},
                        "unknown expert_A_2", "2 experts"),
    "expert ranks differ": ("moe_lora", {f"{Q}.lora_A.loraA.1.mlp.weight": zeros(2, 5),
                                         f"{Q}.lora_A.loraA.1.weight": zeros(2, 5)},
                            "is [2, 5]", "2 experts"),
    "gate and embedding": ("moe_lora", {f"{Q}.lora_gate.GateL.weight": zeros(2, 6)},
                           "gate [2, 6], embedding [5, 7]", "2 experts"),
    "twice": ("mtl_lora", {f"module.{Q}.lora_A": zeros(1, 3, 5)}, f"{Q}.lora_A' twice",
              "each tensor once"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_while_reading(tmp_path: Path, name: str) -> None:
    """A tensor that is not understood, or does not fit the others, is refused with its name."""
    case_name, changes, found, expected = REFUSALS[name]
    file = toys.write(tmp_path / "final_checkpoint.pt", broken(case_name, changes))
    with pytest.raises(CheckpointError) as caught:
        opened(file)
    assert_whole(caught.value, where=str(file), found=found, expected=expected)


SHAPES: dict[str, tuple[str, dict[str, Array | None]]] = {
    "rank of B": ("mtl_lora", {f"{Q}.lora_B": zeros(2, 6, 2)}),
    "mixing without B": ("mtl_lora", {f"{Q}.lora_B_w": zeros(4, 3)}),
    "Lambda not square": ("mtl_lora", {f"{Q}.lora_lambdas": zeros(4, 3, 2)}),
    "scaler a vector": ("mtl_lora", {f"{Q}.lora_scaler": zeros(1)}),
    "MultiLoRA rows": ("multi_lora", {f"{Q}.lora_scaling": zeros(2, 5)}),
    "LoRA rank": ("lora", {f"{Q}.lora_B.weight": zeros(6, 2)}),
    "DoRA magnitude": ("dora", {f"{Q}.lora_weight_m_wdecomp.weight": zeros(5, 1)}),
    "DoRA without A": ("dora", {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_contradict_each_other_are_refused(tmp_path: Path, name: str) -> None:
    """The layer is named, with the shapes found and the shapes its equation needs."""
    case_name, changes = SHAPES[name]
    file = toys.write(tmp_path / "final_checkpoint.pt", broken(case_name, changes))
    with pytest.raises(CheckpointError) as caught:
        deltas(opened(file))
    assert_whole(caught.value, where=Q, found="[", expected="[")


def test_not_finite_values_are_refused(tmp_path: Path) -> None:
    """A diverged run is refused with the tensor's name."""
    states = layer_states("mtl_lora")
    states[Q]["lora_B"][1, 2, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"lora_B'.*first at \[1, 2, 0\]"):
        deltas(opened(written(tmp_path, states)))


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


def test_code_in_the_pickle_is_refused_unexecuted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle that imports anything is exit 7, and nothing of it runs."""
    file = tmp_path / "final_checkpoint.pt"
    torch.save({f"{Q}.lora_A": torch.zeros(1), "x.lora_lambdas": _Code()}, file)
    with pytest.raises(IntegrityError, match="print"):
        opened(file)
    assert "code ran" not in capsys.readouterr().out


def test_foreign_files_are_not_taken_for_it(tmp_path: Path) -> None:
    """PEFT's own keys, a plain model, and another suffix are some other format's business."""
    from mtl_export.checkpoint.official import is_official

    state = toys.flat(layer_states("lora"))
    peft = toys.write(tmp_path / "peft.bin", {f"base_model.model.{k}": v for k, v in state.items()})
    plain = toys.write(tmp_path / "plain.pt", {"model.norm.weight": zeros(3)})
    other = toys.write(tmp_path / "adapter.data", state)
    assert [is_official(path) for path in (peft, plain, other, tmp_path)] == [False] * 4


def test_fused_block_must_fit_the_base(tmp_path: Path) -> None:
    """A base that is no whole number of blocks is refused; more blocks than adapted are fine."""
    module = next(iter(toys.FUSED_MODULES))
    checkpoint = opened(written(tmp_path, layer_states("mtl_lora_fused without k")))
    base = base_of([module])

    def with_rows(rows: int) -> BaseModel:
        weight = memory_tensor("w", np.zeros((rows, 5), np.float32))
        return replace(base, tensors=MappingProxyType({f"{module}.weight": weight}))

    wide = read_adapters(checkpoint, with_rows(16)).layers[module]
    assert wide.delta(0).shape == (16, 5)
    assert not wide.delta(0)[4:8].any()
    assert not wide.delta(0)[12:].any()
    for rows in (14, 8):
        with pytest.raises(MtlExportError, match="at least 12") as caught:
            read_adapters(checkpoint, with_rows(rows))
        assert_whole(caught.value, where=module, found=f"base layer of {rows}")
