"""Every name that crosses a border: between stages, into a file, or to a user.

A name that one stage writes and another reads stands here and nowhere else. What only one
stage knows (the markers of ``graph/``, the keys of one checkpoint format) stays there.
"""

from __future__ import annotations

# Inputs and outputs of a graph.
TASK_IDS = "task_ids"
INPUT_IDS = "input_ids"
IMAGE = "image"
ATTENTION_MASK = "attention_mask"
ENCODER_ATTENTION_MASK = "encoder_attention_mask"
DECODER_INPUT_IDS = "decoder_input_ids"
LOGITS = "logits"
# Prefixes of the states that a decoding step takes and returns.
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."

# Files.
DENSE_FORMAT = "mtl_export.dense/1"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
PREFILL_FILE, ENCODER_FILE = "prefill.onnx", "encoder.onnx"

# Layouts of an export: what --layout takes, what the metadata of a graph and the manifest of an
# engine say, and how reports call its artefacts.
SINGLE_GRAPH, PER_TASK, ADAPTER_INPUT = "single-graph", "per-task", "adapter-input"
LAYOUTS = (SINGLE_GRAPH, PER_TASK)

# Artefacts, as reports call them.
MERGED_MODEL = "merged pytorch"
PER_TASK_ONNX, PER_TASK_ENGINE = f"{PER_TASK} onnx", f"{PER_TASK} engine"
SINGLE_ONNX, SINGLE_ENGINE = f"{SINGLE_GRAPH} onnx", f"{SINGLE_GRAPH} engine"
ADAPTER_INPUT_ONNX = f"{ADAPTER_INPUT} onnx"

# What a model computes in, and what it can be quantised to.
DTYPES = ("fp32", "fp16", "bf16")
QUANTISED_DTYPES = ("int8", "fp8", "int4")
# TensorRT's HardwareCompatibilityLevel, as users write it.
HARDWARE_LEVELS = ("ampere-plus", "same-compute-capability")

# Keys in the metadata_props of a graph.
VERSION_KEY = "mtl_export.version"
LAYOUT_KEY = "mtl_export.layout"
FAMILY_KEY = "mtl_export.family"
TASKS_KEY = "mtl_export.tasks"
TASK_INPUT_KEY = "mtl_export.task_input"
BASE_KEY = "mtl_export.base_sha256"
CHECKPOINT_KEY = "mtl_export.checkpoint_sha256"
DENSE_KEY = "mtl_export.dense"
SIZES_KEY = "mtl_export.sizes"
DTYPE_KEY = "mtl_export.dtype"
QUANTISATION_KEY = "mtl_export.quantisation"

# A base given as "package:NAME" is the model that an installed Python package carries.
PACKAGE_PREFIX = "package:"
