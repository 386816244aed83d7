from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export_calibration.cache import read_cache, versions, write_cache

KEY = {"data_sha256": "a", "onnx_sha256": {"single graph": {"model.onnx": "b"}}, "method": "max"}


def test_a_result_is_used_for_the_same_question(tmp_path: Path) -> None:
    """What was written comes back, in a folder that need not exist."""
    path = tmp_path / "calibration" / "ranges.json"
    write_cache(path, KEY, {"amax": {"x": 1.5}})
    assert read_cache(path, {**KEY, "onnx_sha256": {"single graph": {"model.onnx": "b"}}}) == {
        "amax": {"x": 1.5}
    }
    assert [file.name for file in path.parent.iterdir()] == ["ranges.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"data_sha256": "c"},
        {"onnx_sha256": {"single graph": {"model.onnx": "c"}}},
        {"method": "mse"},
        {"versions": versions()},
    ],
)
def test_another_question_has_no_answer(tmp_path: Path, changes: dict[str, object]) -> None:
    """Other data, another graph, method or version: measured again."""
    write_cache(tmp_path / "ranges.json", KEY, {})
    assert read_cache(tmp_path / "ranges.json", {**KEY, **changes}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other"}'])
def test_a_broken_file_counts_as_absent(tmp_path: Path, text: str) -> None:
    """A file cut short by a kill, or of another kind, is no error."""
    (tmp_path / "ranges.json").write_text(text)
    assert read_cache(tmp_path / "ranges.json", KEY) is None
    assert read_cache(tmp_path / "nowhere.json", KEY) is None
