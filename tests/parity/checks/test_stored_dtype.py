"""A dtype that an artefact declares must be the one its matrices are stored in."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mtl_export.checkpoint.base_model import BaseModel, open_base
from mtl_export.checkpoint.files.safetensors import write_safetensors
from mtl_export.parity.checks.metadata import folder_problem, graph_problem

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
WORDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def graph(path: Path, large: str, small: str) -> Path:
    """Write a graph of a large and a small matrix, a long bias in float32, and scales."""
    tensors = {
        "large": np.ones((9, 9), DTYPES[large]), "small": np.ones((8, 9), DTYPES[small]),
        "bias": np.ones(999, np.float32), "scale": np.ones((99, 99), np.float32),
        "ids": np.ones((99, 99), np.int64),
    }  # fmt: skip
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    node = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [], initializers)), path)
    return path


def folder(path: Path, stored: str, declared: str, word: str = "dtype") -> BaseModel:
    """Write a model folder of one matrix and one norm."""
    path.mkdir()
    arrays = {"matrix": np.ones((9, 9), DTYPES[stored]), "norm": np.ones(999, np.float32)}
    write_safetensors(path / "model.safetensors", arrays)
    (path / "config.json").write_text(json.dumps({word: WORDS[declared]}))
    return open_base(str(path))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_mostly_stored_in_its_dtype_passes(tmp_path: Path, dtype: str) -> None:
    """Some matrices, biases and scales may be wider; of fp32 nothing is asked."""
    assert graph_problem(graph(tmp_path / "model.onnx", dtype, "fp32"), dtype) == ""
    assert graph_problem(graph(tmp_path / "model.onnx", dtype, dtype), "fp32") == ""
    base = folder(tmp_path / "base", "fp32", "fp32")
    folder(tmp_path / "merged", dtype, dtype)
    assert folder_problem(tmp_path / "merged", dtype, base) == ""


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", "fp32"), ("bf16", "fp32"),
                                               ("bf16", "fp16")])  # fmt: skip
def test_a_dtype_that_is_only_declared_fails(tmp_path: Path, dtype: str, stored: str) -> None:
    """Its noise floor would hide what the stored dtype's does not."""
    problem = graph_problem(graph(tmp_path / "model.onnx", stored, dtype), dtype)
    assert problem.startswith(f"model.onnx declares {WORDS[dtype]}, but 53% of the numbers in")
    assert WORDS[stored] in problem
    base = folder(tmp_path / "base", stored, stored)
    folder(tmp_path / "merged", stored, dtype)
    problem = folder_problem(tmp_path / "merged", dtype, base)
    assert problem.startswith(f"config.json declares {WORDS[dtype]}, but 100% of the numbers in")


def test_a_base_that_declares_what_it_does_not_store_is_merged_as_it_is(tmp_path: Path) -> None:
    """Many published models do; a folder that says more than its base does not pass for it."""
    base = folder(tmp_path / "base", "fp32", "fp16", "torch_dtype")
    folder(tmp_path / "merged", "fp32", "fp16")
    assert folder_problem(tmp_path / "merged", "fp16", base) == ""
    folder(tmp_path / "other", "fp32", "bf16")
    assert "declares bfloat16" in folder_problem(tmp_path / "other", "bf16", base)
