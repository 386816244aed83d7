"""A parsed TensorRT network -> its inputs, outputs and element types, in numpy's names."""

from __future__ import annotations

from mtl_export.tensorrt.api import TrtObject
from mtl_export.tensorrt.source import TensorInfo

# TensorRT's DataType -> numpy's (or ml_dtypes') name
NUMPY_NAMES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "E8M0": "float8_e8m0fnu",
    "FLOAT": "float32",
    "FP4": "float4_e2m1fn",
    "FP8": "float8_e4m3fn",
    "HALF": "float16",
    "INT32": "int32",
    "INT4": "int4",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}
# Types of indices and masks, which say nothing about precision.
_NOT_PRECISION = {"bool", "int32", "int64"}


def numpy_name(data_type: TrtObject) -> str:
    """Return numpy's name of a TensorRT element type."""
    name = str(data_type.name)
    return NUMPY_NAMES.get(name, name.lower())


def tensor_info(trt_tensor: TrtObject) -> TensorInfo:
    """Return a network tensor's description; dynamic dimensions have no name."""
    shape = tuple("" if size < 0 else int(size) for size in trt_tensor.shape)
    return TensorInfo(str(trt_tensor.name), numpy_name(trt_tensor.dtype), shape)


def precision_of(network: TrtObject) -> tuple[str, ...]:
    """Return the element types that the network's layers produce, sorted."""
    found = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for position in range(layer.num_outputs):
            trt_tensor = layer.get_output(position)
            if trt_tensor is not None:
                found.add(numpy_name(trt_tensor.dtype))
    return tuple(sorted(found - _NOT_PRECISION))
