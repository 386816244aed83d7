from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import optimizer

from tests.factories import LAYERS

# What ONNX Runtime makes of a bias, a residual or a scale and their neighbours.
FUSED = {
    "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "Gelu",
    "LayerNormalization", "MultiHeadAttention", "QuickGelu", "SkipLayerNormalization",
}  # fmt: skip


def fused(path: Path, folder: Path) -> Counter[str]:
    """Return how many fused nodes ONNX Runtime's own optimised graph has, by type."""
    optimised = folder / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(optimised), load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes if node.op_type in FUSED)


def test_the_single_graph_is_fused_as_a_merged_one_is(
    routed_folder: Path, merged_folders: list[Path], tmp_path: Path
) -> None:
    """Attention, GELU and residual fusions: as many as without adapters."""
    single = fused(routed_folder / "model.onnx", tmp_path)
    assert single == fused(merged_folders[0] / "model.onnx", tmp_path)
    assert single["BiasGelu"] == LAYERS
    assert single["SkipLayerNormalization"] == 2 * LAYERS


def test_the_transformer_optimiser_fuses_as_much(
    routed_folder: Path, merged_folders: list[Path], tmp_path: Path
) -> None:
    """ONNX Runtime's own tool: every residual with its norm, as in a merged graph."""
    counts = []
    for number, folder in enumerate((routed_folder, merged_folders[0])):
        path = folder / "model.onnx"
        made = optimizer.optimize_model(str(path), model_type="bert", num_heads=0, hidden_size=0)
        made.save_model_to_file(str(tmp_path / f"{number}.onnx"))
        counts.append(made.get_fused_operator_statistics()["SkipLayerNormalization"])
    assert counts == [2 * LAYERS, 2 * LAYERS]
    onnxruntime.InferenceSession(str(tmp_path / "0.onnx"))


def test_the_quantisers_preparation_takes_the_single_graph(
    routed_folder: Path, tmp_path: Path
) -> None:
    """Symbolic shape inference knows every node, in functions too."""
    target = tmp_path / "prepared.onnx"
    quant_pre_process(str(routed_folder / "model.onnx"), str(target), auto_merge=True)
    onnxruntime.InferenceSession(str(target))
