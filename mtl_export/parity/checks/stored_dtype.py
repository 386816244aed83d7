"""Are an artefact's weights stored in the dtype that it declares? It sets its own noise floor.

A graph's metadata and a folder's config.json say in which dtype they compute, and a wide floor
would hide a wrong weight: 1.02 times a matrix is within what bfloat16 costs. So more than half of
the numbers in the matrices of what declares fp16 or bf16 must be stored in it. What is rightly
stored otherwise stays below half: norms and biases are no matrices, and what a half-precision
graph computes in float32 (statistics, positions) reads hardly any. Nothing is asked of fp32, the
least floor that there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.base_model import BaseModel, open_base
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.errors import MtlExportError

# How config.json, ONNX and safetensors call what we do.
WORDS = {"fp16": "float16", "bf16": "bfloat16"}
_ONNX = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_SAFETENSORS = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})


def graph_problem(path: Path, dtype: str) -> str:
    """Return what is wrong with the dtypes of an ONNX file's matrices; "" if nothing.

    Args:
        path: The file.
        dtype: What it declares: ``fp32``, ``fp16`` or ``bf16``.
    """
    if dtype not in WORDS:
        return ""
    graph = read_onnx(path).graph
    scales = {name for node in graph.node if node.op_type in _SCALED for name in node.input[1:2]}
    sizes: Counter[str] = Counter()
    for tensor in graph.initializer:
        if tensor.data_type in _ONNX and len(tensor.dims) > 1 and tensor.name not in scales:
            sizes[_ONNX[tensor.data_type]] += prod(tensor.dims)
    return _problem(path.name, WORDS[dtype], sizes)


def folder_problem(folder: Path, dtype: str, base: BaseModel) -> str:
    """Return what is wrong with the dtypes of a merged folder's matrices; "" if nothing.

    A base that is itself stored otherwise than its config.json says is merged as it is.

    Args:
        folder: The folder.
        dtype: What it declares: ``fp32``, ``fp16`` or ``bf16``.
        base: What it was made from.
    """
    if dtype not in WORDS:
        return ""
    try:
        tensors = open_base(str(folder)).tensors
    except MtlExportError as error:
        return str(error)
    declared = WORDS[dtype]
    as_base = declared == config_dtype(base.config)
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        own = _SAFETENSORS.get(tensor.dtype, "")
        if not own or len(tensor.shape) < 2:
            continue
        if as_base and name in base.tensors and base.tensors[name].dtype == tensor.dtype:
            own = declared
        sizes[own] += prod(tensor.shape)
    return _problem("config.json", declared, sizes)


def config_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a config.json declares."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _problem(where: str, declared: str, sizes: Counter[str]) -> str:
    total = sizes.total()
    if not total or 2 * sizes[declared] > total:
        return ""
    found, most = sizes.most_common(1)[0]
    return (
        f"{where} declares {declared}, but {most / total:.0%} of the numbers in matrices are"
        f" {found}, whose noise floor is another"
    )
