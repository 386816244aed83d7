"""Where a wrong map begins: stage by stage, the shared stream and each task's.

A graph keeps these values under ``stage<s>.shared`` and ``stage<s>.<task>`` (the map a head reads);
a folder's model has them as they are. Each is compared with the float64 model's, and, to tell the
stage itself from what it was given, with what that model's stage makes of the export's own input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin, StageFeatures
from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.merged import load_dense
from mtl_export.dense.model import DenseModel
from mtl_export.errors import MtlExportError
from mtl_export.names import IMAGE
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.diagnosis.layer_errors import Finding, LayerError, LayerVerdict, Localisation
from mtl_export.parity.tolerance import noise_floor
from mtl_export.runtime.ort import load_onnxruntime

SHARED = "shared"


def localised(
    model: DenseModel, artefact: Artefact, inputs: Mapping[str, Array], factor: float
) -> Localisation:
    """Return in which stage and stream the error of an artefact begins.

    Args:
        model: As trained.
        artefact: What failed.
        inputs: A batch that shows it.
        factor: Errors beyond so many noise floors count.
    """
    name = artefact.task.name if artefact.task else "*"
    tasks = [artefact.task.name] if artefact.task else [task.name for task in model.tasks]
    path = artefact.path
    if path is None or artefact.defect or not (path.is_dir() or path.suffix == ".onnx"):
        reason = artefact.defect or "an engine shows nothing of its inside; its graph does"
        return Localisation(artefact.name, name, reason=reason)
    try:
        found = _of_folder(path, inputs) if path.is_dir() else _of_graph(path, inputs)
    except (MtlExportError, RuntimeError) as error:
        return Localisation(artefact.name, name, reason=str(error))
    exact, coarse = _Oracle(model, torch.float64), _Oracle(model, torch.float32)
    wanted, rough = exact.values(inputs[IMAGE]), coarse.values(inputs[IMAGE])
    layers = []
    for layer in wanted:
        stream = layer.partition(".")[2]
        if layer not in found or (stream != SHARED and stream not in tasks):
            continue
        floor = noise_floor(wanted[layer], rough[layer], "fp32")
        size = _error(wanted[layer], found[layer])
        own = _error(exact.own(layer, found, inputs[IMAGE]), found[layer])
        is_within = size is not None and size <= factor * floor
        is_own = own is None or own > factor * floor
        verdict: LayerVerdict = "within" if is_within else "faulty" if is_own else "propagated"
        layers.append(LayerError(layer, stream, "batch", size, floor, own, floor, verdict))
    findings = [_finding(task, layers) for task in tasks]
    unseen = tuple(layer for layer in wanted if layer not in found
                   and (layer.partition(".")[2] in tasks))  # fmt: skip
    return Localisation(artefact.name, name, tuple(findings), tuple(layers), unseen=unseen)


def _finding(task: str, layers: Sequence[LayerError]) -> Finding:
    own = [one for one in layers if one.task in {task, SHARED}]
    wrong = next((one for one in own if one.verdict != "within"), None)
    before = [one.layer for one in own[: own.index(wrong)]] if wrong else []
    after = before[-1] if before else ""
    if wrong is None:
        text = "every stage is within its floor: the error begins in the head"
        return Finding(task, "batch", f"decoders.{task}", after, "", text)
    text = f"the error begins in {wrong.layer}" + (f", after {after}" if after else "")
    return Finding(task, "batch", wrong.layer, after, "", text)


def _error(wanted: Array, found: Array) -> float | None:
    if wanted.shape != found.shape or not np.isfinite(found).all():
        return None
    return float(np.abs(found - wanted).max(initial=0.0))


@dataclass(frozen=True)
class _Oracle:
    """The unmerged model in one dtype.

    Attributes:
        model: As trained.
        dtype: What it computes in.
    """

    model: DenseModel
    dtype: torch.dtype

    def values(self, image: Array) -> dict[str, Array]:
        """Return shared tokens and maps by name, stage by stage."""
        module = self.model.trained(self.dtype)
        with torch.inference_mode():
            return named(module, module.backbone(torch.from_numpy(image).to(self.dtype)))

    def own(self, layer: str, found: Mapping[str, Array], image: Array) -> Array:
        """Return what this model's stage makes of the input that the export's stage had."""
        module = self.model.trained(self.dtype)
        stage = int(layer.partition(".")[0].removeprefix("stage"))
        before = found.get(f"stage{stage - 1}.{SHARED}")
        with torch.inference_mode():
            if before is None:
                features = module.backbone(torch.from_numpy(image).to(self.dtype))[: stage + 1]
            else:
                blank = StageFeatures(torch.zeros(()), ())
                given = torch.from_numpy(before).to(self.dtype)
                features = [blank] * stage + [module.backbone.layers[stage](given)]
            return named(module, features, only=stage)[layer]


def named(
    module: MTLoRASwin, features: Sequence[StageFeatures], only: int | None = None
) -> dict[str, Array]:
    """Return shared tokens and maps by the names that graphs give them, float64."""
    found = {}
    for stage, one in enumerate(features):
        if only is not None and stage != only:
            continue
        found[f"stage{stage}.{SHARED}"] = one.shared.double().numpy()
        for place, task in enumerate(module.model.tasks):
            value = module.downsampler[task](stage, one.tasks[place])
            found[f"stage{stage}.{task}"] = value.double().numpy()
    return found


def _of_folder(folder: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    module = load_dense(folder)
    dtype = next(module.parameters()).dtype
    with torch.inference_mode():
        return named(module, module.backbone(torch.from_numpy(inputs[IMAGE]).to(dtype)))


def _of_graph(path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the values that a graph keeps under these names, as outputs of a copy in memory."""
    onnxruntime = load_onnxruntime()
    model = ir.load(path)
    shown = [
        value
        for node in model.graph
        for value in node.outputs
        if value.name and value.name.startswith("stage") and "." in value.name
    ]
    model.graph.outputs.extend(shown)
    ir.external_data.load_to_model(model)
    content = ir.serde.serialize_model(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in shown]
    values = session.run(names, dict(inputs))
    return {name: value.astype(np.float64) for name, value in zip(names, values, strict=True)}
