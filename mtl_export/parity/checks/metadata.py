"""What lies beside the numbers and decides what they mean: names, types, configs, tokenizers.

    inputs and outputs   a graph gives what is compared, in its own dtype, and nothing else; a
                         step's caches are the ones that the first part hands on
    config               config.json is what the base and the checkpoint make it: label names in
                         logit order, the decoder's first token, every size
    stored dtype         weights are stored in the dtype that is declared (``stored_dtype``)
    companions           tokenizer, generation settings and sentence-transformers pipeline are the
                         base's, byte by byte

None of it changes a logit that is compared, so no comparison of logits tells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import companion_files
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.checkpoint.sentence_embedding import OUTPUT, SentenceEmbedding
from mtl_export.errors import EngineRunError, MtlExportError, shortened
from mtl_export.names import MODEL_FILE, PAST_PREFIX, PRESENT_PREFIX
from mtl_export.parity.checks.stored_dtype import folder_problem, graph_problem
from mtl_export.parity.outputs import Subject
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
# ONNX's numbers for element types.
TYPES = {1: "float32", 7: "int64", 10: "float16", 11: "float64", 16: "bfloat16"}
NARROW = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def beside_cells(
    cell: Cell,
    bound: BoundModel,
    path: Path,
    task: Task | None,
    dtype: str,
    subjects: Collection[Subject],
) -> list[Cell]:
    """Return the cells of an artefact in PyTorch or ONNX.

    Args:
        cell: Says whose they are; ``passed``.
        bound: What it was made from.
        path: Its folder, or its first ONNX file.
        task: The task of a merged artefact.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what it computes in.
        subjects: What is compared of it.

    Raises:
        EngineRunError: An ONNX file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    outputs = {one.output if task is None else one.merged_output for one in subjects}
    embedding = next((subject.embedding for subject in subjects), None)
    found = {
        CONFIG: _config_problems(bound, folder, task),
        COMPANIONS: _companion_problems(bound, folder, embedding),
    }
    if path.suffix == ".onnx":
        found[INTERFACE] = _interface_problems(path, dtype, outputs)
        stored = [graph_problem(part, dtype) for part in _parts(path)]
    else:
        stored = [folder_problem(folder, dtype, bound.base)]
    found[DTYPE] = [problem for problem in stored if problem]
    return [
        replace(cell, case=name, verdict="failed", reason=shortened(problems))
        if problems
        else replace(cell, case=name)
        for name, problems in found.items()
    ]


def _interface_problems(path: Path, dtype: str, outputs: Collection[str]) -> list[str]:
    is_whole, parts = path.name == MODEL_FILE, _parts(path)
    known = {*outputs} if is_whole else {*outputs, HIDDEN, SOURCE_MASK}
    known |= {HIDDEN} if OUTPUT in known else set()  # see PoolStatesPass
    problems: list[str] = []
    begun: dict[str, set[str]] = {}
    read: set[str] = set()
    own_type = NARROW.get(dtype, "float32")
    for part in parts:
        inputs, results = _values(part)
        for name, number in results.items():
            found = TYPES.get(number, f"of type {number}")
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
    from mtl_export.merge.writer import task_config

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
    from mtl_export.graph.writer import pipeline_beside

    problems = []
    for original in companion_files(bound.base):
        copy = folder / original.name
        if not copy.is_file():
            problems.append(f"{original.name} is missing")
        elif copy.read_bytes() != original.read_bytes():
            problems.append(f"{original.name} is not the base's")
    pipeline = pipeline_beside(bound, embedding)
    return problems + ([] if pipeline is None else pipeline.problems(folder))
