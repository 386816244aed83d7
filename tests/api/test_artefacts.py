from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtl_export.api.artefacts import Places, find_artefacts
from mtl_export.bundle.manifest import Recipe, write_manifest
from mtl_export.names import ADAPTER_INPUT_ONNX
from mtl_export.tensorrt.manifest import EngineManifest, manifest_path
from tests.adapters import toys
from tests.graph import language

ENGINE = EngineManifest(
    engine="model.engine", engine_sha256="a" * 64, engine_size_bytes=6, graph_sha256="b" * 64,
    source="model.onnx", source_sha256={}, provenance={}, layout="per-task", tasks=(), inputs=(),
    outputs=(), profiles=(), precision=("float32",), tf32=False, builder="tensorrt_rtx",
    builder_version="1.7", options={}, libraries={}, targets=("8.6",), validated=(),
)  # fmt: skip


def test_adapters_of_a_language_model_are_said_not_to_run(tmp_path: Path) -> None:
    """What parity has no runner for is not passed over in silence; what was not asked for is."""
    bound = language.language_bound(tmp_path, "GPT2LMHeadModel")
    places = Places(tmp_path / "per-task", tmp_path / "onnx", tmp_path / "engines")
    _, missing = find_artefacts(bound, places, threads=1)
    assert ADAPTER_INPUT_ONNX not in {cell.artefact for cell in missing}
    (places.onnx / "adapter-input").mkdir(parents=True)
    found, missing = find_artefacts(bound, places, threads=1)
    (cell,) = (one for one in missing if one.artefact == ADAPTER_INPUT_ONNX)
    assert (cell.verdict, cell.task) == ("not-run", "*")
    assert "TaskSession" in cell.reason
    assert not found


@pytest.mark.parametrize(
    ("layout", "served", "dtype", "problem"),
    [
        ("per-task", [0], "fp32", ""),
        ("", [], "fp32", ""),
        ("per-task", [1], "fp32", "not task"),
        ("single-graph", [0, 1], "fp32", "of layout single-graph, not task"),
        ("per-task", [0], "bf16", "it declares bfloat16"),
        ("per-task", [0], "junk", "it declares the dtype 'junk'"),
    ],
)
def test_an_engine_is_what_its_place_and_recipe_say(
    tmp_path: Path, layout: str, served: list[int], dtype: str, problem: str
) -> None:
    """Its manifest contradicts them where no GPU can run it."""
    bound = toys.toy_bound(tmp_path)
    names = [task.name for task in bound.adapters.tasks]
    folder = tmp_path / "engines" / names[0]
    folder.mkdir(parents=True)
    (folder / "model.engine").write_bytes(b"engine")
    tasks = tuple({"name": names[place], "index": place} for place in served)
    replace(ENGINE, layout=layout, tasks=tasks).write(manifest_path(folder / "model.engine"))
    write_manifest(folder, Recipe("trt", {"dtype": dtype}, {}, "0"))
    places = Places(tmp_path / "per-task", tmp_path / "onnx", tmp_path / "engines")
    (artefact,), _ = find_artefacts(bound, places, threads=1)
    assert artefact.dtype in {"fp32", "bf16"}
    assert problem in artefact.defect
    assert bool(problem) is bool(artefact.defect)
    for file in list(folder.iterdir()):
        file.rename(folder.parent / file.name)
    (artefact,), _ = find_artefacts(bound, places, threads=1)
    assert ("not that of all tasks" in artefact.defect) is (
        layout == "per-task" and dtype != "junk"
    )


def test_an_engine_is_of_the_checkpoint_that_its_graph_names(tmp_path: Path) -> None:
    """A folder's recipe says what was asked for, which a stale graph is not."""
    bound = toys.toy_bound(tmp_path)
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "model.engine").write_bytes(b"engine")
    now = {
        "base_sha256": bound.base.sha256,
        "checkpoint_sha256": bound.adapters.checkpoint_sha256,
    }
    stale = replace(ENGINE, layout="", provenance={**now, "checkpoint_sha256": "0" * 64})
    stale.write(manifest_path(folder / "model.engine"))
    write_manifest(folder, Recipe("trt", {}, now, "0"))
    (artefact,), _ = find_artefacts(bound, Places(tmp_path, tmp_path, folder), threads=1)
    assert artefact.base_sha256 == now["base_sha256"]
    assert artefact.checkpoint_sha256 == "0" * 64
