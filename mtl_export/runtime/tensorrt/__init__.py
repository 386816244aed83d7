"""TensorRT and TensorRT-RTX: ONNX files -> engines, manifests, and a runner.

    graph ─ default_profile / parse_shapes ─> Profile ─┐
      └──────────────── build_engine ──────────────────┴─> engine + EngineManifest
                                                              └─ TensorRTBackend ─> outputs

Importing this loads neither onnx, torch nor TensorRT.
"""

from mtl_export.runtime.tensorrt.available import BuilderInfo, available_builder
from mtl_export.runtime.tensorrt.build import build_engine
from mtl_export.runtime.tensorrt.job import EngineOrder, EngineOutcome, EnginePart, run_job
from mtl_export.runtime.tensorrt.manifest import Check, EngineManifest, manifest_path
from mtl_export.runtime.tensorrt.restore import restore_weights
from mtl_export.runtime.tensorrt.runner import TensorRTBackend
from mtl_export.runtime.tensorrt.shapes import Profile, default_profile, parse_shapes

__all__ = [
    "BuilderInfo",
    "Check",
    "EngineManifest",
    "EngineOrder",
    "EngineOutcome",
    "EnginePart",
    "Profile",
    "TensorRTBackend",
    "available_builder",
    "build_engine",
    "default_profile",
    "manifest_path",
    "parse_shapes",
    "restore_weights",
    "run_job",
]
