"""What is refused of checkpoints of the MTL-LoRA authors' repository, and by which name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    CheckpointError,
    IntegrityError,
    MtlExportError,
    UsageError,
)
from tests.adapters.toys import memory_tensor
from tests.checkpoint import official_toys as toys
from tests.checkpoint.messages import assert_whole
from tests.checkpoint.official_cases import (
    base_of,
    deltas,
    layer_states,
    opened,
    written,
)
from tests.checkpoint.official_toys import State


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
    from mtl_export.checkpoint.formats.mtl_lora_repo import is_official

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
