from __future__ import annotations

from pathlib import Path

from mtl_export_cli.artefacts import ADAPTER_ONNX, Places, find_artefacts
from tests.graph import language


def test_adapters_of_a_language_model_are_said_not_to_run(tmp_path: Path) -> None:
    """What parity has no runner for is not passed over in silence; what was not asked for is."""
    bound = language.language_bound(tmp_path, "GPT2LMHeadModel")
    places = Places(tmp_path / "merged", tmp_path / "onnx", tmp_path / "engines")
    _, missing = find_artefacts(bound, places, threads=1)
    assert ADAPTER_ONNX not in {cell.artefact for cell in missing}
    (places.onnx / "adapter-input").mkdir(parents=True)
    found, missing = find_artefacts(bound, places, threads=1)
    (cell,) = (one for one in missing if one.artefact == ADAPTER_ONNX)
    assert (cell.verdict, cell.task) == ("not-run", "*")
    assert "TaskSession" in cell.reason
    assert not found
