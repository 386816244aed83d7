"""TensorRT and TensorRT-RTX: ONNX files -> engines, manifests, and a runner.

    graph ─ default_profile / parse_shapes ─> Profile ─┐
      └──────────────── build_engine ──────────────────┴─> engine + EngineManifest
                                                              └─ TensorRTBackend ─> outputs

Importing this loads neither onnx, torch nor TensorRT.
"""

from mtl_export.tensorrt.available import BuilderInfo, available_builder
from mtl_export.tensorrt.build import build_engine
from mtl_export.tensorrt.job import EngineOrder, EngineOutcome, EnginePart, run_job
from mtl_export.tensorrt.manifest import BuildCheck, EngineManifest, manifest_path
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.restore import restore_weights
from mtl_export.tensorrt.runner import TensorRTBackend
from mtl_export.tensorrt.shapes import Profile, default_profile, parse_shapes

__all__ = [
    "BuildCheck",
    "BuildOptions",
    "BuilderInfo",
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
