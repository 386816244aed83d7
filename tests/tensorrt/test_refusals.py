"""Every way a build is refused: graphs, files, options, disks; nothing is left behind."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mtl_export.errors import EngineBuildError, OutputError, UsageError
from mtl_export.tensorrt import BuildOptions, Profile, build_engine
from tests.tensorrt.models import (
    DOMAIN,
    RTX,
    build_rtx,
    graph_value,
    merged_and_nothing_new,
    names_in,
    write_graph,
    write_merged,
    write_routed,
)

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")


def test_every_unsupported_node_is_named(tmp_path: Path) -> None:
    """Node, operator and reason of each, in one error, and no file."""
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain="com.acme"),
        helper.make_node("Riddle", ["a"], ["y"], name="second", domain="com.acme"),
    ]
    path = write_graph(
        tmp_path, nodes, [graph_value("x", ["batch"])], [graph_value("y", ["batch"])]
    )
    with pytest.raises(EngineBuildError) as refusal:
        build_rtx(path, tmp_path / "model.engine")
    assert "refuses 2 of its nodes" in refusal.value.problem
    assert "node first (Mystery)" in refusal.value.problem
    assert "node second (Riddle)" in refusal.value.problem
    assert "cudaError 35" not in str(refusal.value)
    assert names_in(tmp_path) == ["model.onnx"]


def test_node_inside_a_function_is_named_with_it(tmp_path: Path) -> None:
    """The function on the way to the bad node is part of the message."""
    path = write_routed(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.functions[0].node[-1].op_type = "MatMulButBetter"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineBuildError, match=r"node .*up.* \(MatMulButBetter\)") as refusal:
        build_rtx(path, tmp_path / "model.engine")
    assert "in function" in refusal.value.problem
    assert "TaskLowRank" in refusal.value.problem


def test_mixed_types_are_refused_not_cast(tmp_path: Path) -> None:
    """Strong typing: half times single is the exporter's mistake."""
    weights = {"w": np.ones((4, 4), np.float16)}
    path = write_graph(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [graph_value("x", ["batch", 4])],
        [graph_value("y", ["batch", 4])],
        weights,
    )
    with pytest.raises(EngineBuildError, match="product"):
        build_rtx(path, tmp_path / "model.engine")


def test_type_that_would_change_silently_is_refused(tmp_path: Path) -> None:
    """TensorRT reads float64 inputs as float32 and says nothing."""
    path = write_graph(
        tmp_path,
        [helper.make_node("Relu", ["x"], ["y"])],
        [graph_value("x", ["batch"], TensorProto.DOUBLE)],
        [graph_value("y", ["batch"], TensorProto.DOUBLE)],
    )
    with pytest.raises(EngineBuildError, match="float64"):
        build_rtx(path, tmp_path / "model.engine")


@contextmanager
def refused_and_clean(folder: Path, message: str) -> Iterator[None]:
    """Expect an ``EngineBuildError`` and no new file in ``folder``."""
    before = names_in(folder)
    with pytest.raises(EngineBuildError, match=message):
        yield
    assert names_in(folder) == before


def profile() -> Profile:
    """Return the profile of merged graphs, without reading one."""
    return Profile({"input_ids": ((1, 1), (1, 4), (2, 8))})


@pytest.mark.parametrize("kept", [0, 1, 40, 700])
def test_truncated_graph_is_refused(tmp_path: Path, kept: int) -> None:
    """Wherever it is cut."""
    path = write_merged(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused_and_clean(tmp_path, r"model\.onnx"):
        build_engine(path, tmp_path / "m.engine", BuildOptions([profile()]), library_name=RTX)


def test_missing_graph_is_refused(tmp_path: Path) -> None:
    """The path is named."""
    with refused_and_clean(tmp_path, r"absent\.onnx: not an ONNX file \(No such file"):
        build_engine(tmp_path / "absent.onnx", tmp_path / "m.engine", BuildOptions([profile()]))


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    """The weight file is named."""
    path = write_merged(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with refused_and_clean(tmp_path, r"model\.onnx\.data is missing"):
        build_engine(path, tmp_path / "m.engine", BuildOptions([profile()]), library_name=RTX)


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    """Its size and what was needed are given."""
    path = write_merged(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with refused_and_clean(tmp_path, r"model\.onnx\.data has 100 bytes of \d+"):
        build_engine(path, tmp_path / "m.engine", BuildOptions([profile()]), library_name=RTX)


def test_target_that_cannot_run_the_graph_is_the_builders_word(tmp_path: Path) -> None:
    """A build that only logs its reason becomes an error with that reason."""
    with merged_and_nothing_new(tmp_path) as path, pytest.raises(EngineBuildError) as refusal:
        build_rtx(path, tmp_path / "model.engine", compute_capabilities=["7.5"])
    assert "the build failed" in refusal.value.problem
    assert "gave no reason" not in refusal.value.problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization_level": 9}, "0 to 5"),
        ({"workspace_bytes": 0}, "at least 1 byte"),
        ({"compute_capabilities": ["9.0"]}, "9.0 is unknown.*8.6"),
        ({"compute_capabilities": ["8.6", "8.6"]}, "given twice"),
    ],
)
def test_options_that_would_be_rounded_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """The builder takes the nearest value, or none, without a word."""
    with merged_and_nothing_new(tmp_path) as path, pytest.raises(UsageError, match=message):
        build_rtx(path, tmp_path / "model.engine", **options)


def test_full_disk_keeps_the_old_engine(tmp_path: Path) -> None:
    """The bindings lose the writer's exception; here it is an ``OutputError``."""
    path = write_merged(tmp_path)
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            build_rtx(path, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert engine.read_bytes() == b"old"
    assert names_in(tmp_path) == ["model.engine", "model.onnx", "model.onnx.data"]


def test_file_in_the_place_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    """The path that cannot be written is named."""
    path = write_merged(tmp_path)
    with pytest.raises(OutputError, match=r"model\.onnx/model\.engine"):
        build_rtx(path, path / "model.engine")


def test_missing_function_is_named_by_its_domain(tmp_path: Path) -> None:
    """A call into ``mtl_export`` without the function is refused at its node."""
    node = helper.make_node("TaskLowRank", ["x"], ["y"], name="low_rank", domain=DOMAIN)
    path = write_graph(
        tmp_path, [node], [graph_value("x", ["batch"])], [graph_value("y", ["batch"])]
    )
    with pytest.raises(EngineBuildError, match=r"node low_rank \(TaskLowRank\)"):
        build_rtx(path, tmp_path / "model.engine")
