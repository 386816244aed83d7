"""Run what comes after an export on a graph, and write what its result answers.

Called with: the tool, the graph, the file to write, inputs.npz, answers.npz.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np


def command(*words: str) -> None:
    """Run a tool of this environment."""
    name, *rest = words
    subprocess.run([str(Path(sys.executable).with_name(name)), *rest], check=True)


def convert(graph: str, target: str, version: int) -> None:
    """Write ``graph`` in another opset, by onnx's own converter."""
    import onnx
    from onnx import version_converter

    onnx.save(version_converter.convert_version(onnx.load(graph), version), target)


def main(tool: str, graph: str, target: str, inputs: str, answers: str) -> None:
    """Run ``tool``, then its result, in OpenVINO or else in ONNX Runtime."""
    with np.load(inputs) as stored:
        feed = {name: stored[name] for name in stored.files}
    if tool == "openvino":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        logits = openvino.Core().compile_model(graph, "CPU", settings)(feed)[0]
    else:
        if tool == "onnxslim":
            command("onnxslim", graph, target)
        elif tool == "onnxsim":
            command("onnxsim", graph, target)
        elif tool == "polygraphy":
            command("polygraphy", "surgeon", "sanitize", graph, "--fold-constants", "-o", target)
        elif tool.startswith("opset"):
            convert(graph, target, int(tool.removeprefix("opset")))
        else:
            raise SystemExit(f"no tool {tool}")
        import onnxruntime

        logits = onnxruntime.InferenceSession(target).run(None, feed)[0]
    np.savez(answers, logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
