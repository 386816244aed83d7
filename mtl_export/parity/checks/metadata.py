"""What lies beside the numbers and decides what they mean: names, types, configs, tokenizers.

    inputs and outputs   a graph gives what is compared, in its own dtype, and nothing else; a
                         step's caches are the ones that the first part hands on
    config               config.json is what the base and the checkpoint make it: label names in
                         logit order, the decoder's first token, every size
    stored dtype         more than half of the numbers in the matrices of what declares fp16 or
                         bf16 are stored in it
    companions           tokenizer, generation settings and sentence-transformers pipeline are the
                         base's, byte by byte

None of it changes a logit that is compared, so no comparison of logits tells.

The declared dtype sets the noise floor, and a wide one would hide a wrong weight: 1.02 times a
matrix is within what bfloat16 costs. What is rightly stored otherwise stays below half: norms and
biases are no matrices, and what a half-precision graph computes in float32 (statistics, positions)
reads hardly any. Nothing is required of fp32, the least floor that there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import BaseModel, companion_files, open_base
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.checkpoint.sentence_embedding import OUTPUT, SentenceEmbedding
from mtl_export.errors import EngineRunError, MtlExportError
from mtl_export.graph.writer import pipeline_beside
from mtl_export.merge.writer import task_config
from mtl_export.names import MODEL_FILE, PAST_PREFIX, PRESENT_PREFIX
from mtl_export.parity.judged import Judged
from mtl_export.parity.report import Cell

INTERFACE, CONFIG, COMPANIONS = "inputs and outputs", "config", "companions"
DTYPE = "stored dtype"
# What an encoder hands to its decoders; the mask only where it reads more than text.
HIDDEN, SOURCE_MASK = "last_hidden_state", "encoder_attention_mask"
# What other dtypes and tied weights change, and what says who wrote the file.
OWN_KEYS = frozenset({
    "dtype", "torch_dtype", "tie_word_embeddings", "text_config", "transformers_version",
    "quantization_config",
})  # fmt: skip
# How config.json, ONNX and safetensors call what we do, and ONNX's numbers.
WORDS = {"fp16": "float16", "bf16": "bfloat16"}
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_SAFETENSORS = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})


def beside_cells(judged: Judged) -> list[Cell]:
    """Return the cells of an artefact in PyTorch or ONNX; engines have manifests for it.

    Raises:
        EngineRunError: An ONNX file cannot be read.
    """
    artefact, bound = judged.artefact, judged.bound
    path, task, dtype = artefact.path, artefact.task, artefact.dtype
    if path is None or not (path.is_dir() or artefact.graph):
        return []
    folder = path if path.is_dir() else path.parent
    found = {
        CONFIG: _config_problems(bound, folder, task),
        COMPANIONS: _companion_problems(bound, folder, artefact.embedding),
    }
    if artefact.graph:
        outputs = {judged.output(one) for one in judged.exact}
        found[INTERFACE] = _interface_problems(path, dtype, outputs)
        found[DTYPE] = [graph_problem(part, dtype) for part in _parts(path)]
    else:
        found[DTYPE] = [folder_problem(folder, dtype, bound.base)]
    return [artefact.cell().judged(name, *problems) for name, problems in found.items()]


def _interface_problems(path: Path, dtype: str, outputs: Collection[str]) -> list[str]:
    is_whole, parts = path.name == MODEL_FILE, _parts(path)
    known = {*outputs} if is_whole else {*outputs, HIDDEN, SOURCE_MASK}
    known |= {HIDDEN} if OUTPUT in known else set()  # see PoolStatesPass
    problems: list[str] = []
    begun: dict[str, set[str]] = {}
    read: set[str] = set()
    own_type = WORDS.get(dtype, "float32")
    for part in parts:
        inputs, results = _values(part)
        for name, number in results.items():
            found = {7: "int64", **_FLOATS}.get(number, f"of type {number}")
            is_cache = not is_whole and name.startswith(PRESENT_PREFIX)
            if name not in known and not is_cache:
                problems.append(f"{part.name} has the output {name!r}, which nobody asked for")
            elif found not in ({"int64"} if name == SOURCE_MASK else {"float32", own_type}):
                problems.append(f"{name!r} of {part.name} is {found}, not {own_type}")
        caches = {n.removeprefix(PRESENT_PREFIX) for n in results if n.startswith(PRESENT_PREFIX)}
        own = {n.removeprefix(PAST_PREFIX) for n in inputs if n.startswith(PAST_PREFIX)}
        read |= own
        if caches and not own:
            begun[part.name] = caches
    for name, caches in begun.items():
        problems += [
            f"{name} has no output '{PRESENT_PREFIX}{one}', which the next step reads"
            for one in sorted(read - caches)
        ]
    return problems


def _parts(path: Path) -> list[Path]:
    """Return the graphs of a model whose first is ``path``."""
    return [path] if path.name == MODEL_FILE else sorted(path.parent.glob("*.onnx"))


def _values(path: Path) -> tuple[list[str], dict[str, int]]:
    """Return a graph's inputs by name, and its outputs' element types."""
    graph = read_onnx(path, error=EngineRunError).graph
    outputs = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    return [value.name for value in graph.input], outputs


def _config_problems(bound: BoundModel, folder: Path, task: Task | None) -> list[str]:
    expected = dict(bound.base.config)
    if task is not None:
        expected = task_config(bound, task, None)
    elif bound.adapters.model_class:
        expected["architectures"] = [bound.adapters.model_class]
    try:
        found: Mapping[str, Any] = read_json(folder / "config.json")
    except MtlExportError as error:
        return [f"config.json cannot be read ({error})"]
    return [
        f"{key} is {found.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if key not in OWN_KEYS and found.get(key) != value
    ]


def _companion_problems(
    bound: BoundModel, folder: Path, embedding: SentenceEmbedding | None
) -> list[str]:
    problems = []
    for original in companion_files(bound.base):
        copy = folder / original.name
        if not copy.is_file():
            problems.append(f"{original.name} is missing")
        elif copy.read_bytes() != original.read_bytes():
            problems.append(f"{original.name} is not the base's")
    pipeline = pipeline_beside(bound, embedding)
    return problems + ([] if pipeline is None else pipeline.problems(folder))


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
        if tensor.data_type in _FLOATS and len(tensor.dims) > 1 and tensor.name not in scales:
            sizes[_FLOATS[tensor.data_type]] += prod(tensor.dims)
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
    of_base = base.config.get("dtype") or base.config.get("torch_dtype") or "float32"
    as_base = declared == str(of_base)
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        own = _SAFETENSORS.get(tensor.dtype, "")
        if not own or len(tensor.shape) < 2:
            continue
        if as_base and name in base.tensors and base.tensors[name].dtype == tensor.dtype:
            own = declared
        sizes[own] += prod(tensor.shape)
    return _problem("config.json", declared, sizes)


def _problem(where: str, declared: str, sizes: Counter[str]) -> str:
    total = sizes.total()
    if not total or 2 * sizes[declared] > total:
        return ""
    found, most = sizes.most_common(1)[0]
    return (
        f"{where} declares {declared}, but {most / total:.0%} of the numbers in matrices are"
        f" {found}, whose noise floor is another"
    )
