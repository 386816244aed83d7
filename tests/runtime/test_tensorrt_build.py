"""Real engines, built on the CPU by TensorRT-RTX, and every way a build is refused."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mtl_export.errors import EngineBuildError, OutputError, UsageError
from mtl_export.runtime.tensorrt import (
    EngineManifest,
    Profile,
    build_engine,
    default_profile,
    manifest_path,
)
from mtl_export.runtime.tensorrt.header import read_header
from tests.runtime.tensorrt_models import (
    DOMAIN,
    TASKS,
    write_graph,
    write_merged,
    write_routed,
)

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

RTX = "tensorrt_rtx"


def build(path: Path, engine: Path, **options: object) -> EngineManifest:
    """Return the manifest of an engine with the default profile, by TensorRT-RTX."""
    profile = default_profile(path, max_batch=4, max_sequence=16)
    return build_engine(
        path,
        engine,
        profiles=[profile] if profile.shapes else [],
        library_name=RTX,
        **options,  # type: ignore[arg-type]
    )


def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Return a graph input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def rest(folder: Path) -> list[str]:
    """Return the names in ``folder``."""
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_routed_graph_becomes_an_engine(tmp_path: Path, dtype: str, external: bool) -> None:
    """Guarded gather, local function, half and single precision, weights in or out."""
    path = write_routed(tmp_path / "onnx", dtype=dtype, external=external)
    engine = tmp_path / "engines" / "model.engine"
    manifest = build(path, engine)
    assert rest(engine.parent) == ["model.engine"]
    assert manifest.engine_size_bytes == engine.stat().st_size
    assert manifest.engine_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert manifest.precision == (dtype,)
    assert (manifest.builder, manifest.tf32) == (RTX, False)
    assert manifest.layout == "single-graph"
    assert [task["name"] for task in manifest.tasks] == list(TASKS)
    assert [str(tensor) for tensor in manifest.inputs] == [
        "int64 input_ids[batch, sequence]",
        "int64 task_ids[batch]",
    ]
    assert sorted(manifest.source_sha256) == rest(path.parent)
    assert manifest.provenance["base_sha256"] == "0" * 64


def test_checks_without_a_gpu_pass_and_the_others_say_why_not(tmp_path: Path) -> None:
    """What could not be looked at is listed, never left out and never passed."""
    manifest = build(write_merged(tmp_path), tmp_path / "model.engine")
    verdicts = {check.check: check for check in manifest.validated}
    assert [check.verdict for check in manifest.validated] == ["passed"] * 5 + ["not-run"] * 2
    assert verdicts["its outputs equal the graph's"].reason
    assert all(check.reason == "" for check in manifest.validated if check.verdict == "passed")


def test_same_graph_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    """Twice here, from another folder, watched, and in another process: one engine."""
    first = build(write_routed(tmp_path / "a"), tmp_path / "1" / "model.engine")
    second = build(
        write_routed(tmp_path / "b"),
        tmp_path / "2" / "model.engine",
        progress=lambda phase, fraction: None,
    )
    assert first == second
    program = (
        "import sys; from pathlib import Path; from mtl_export.runtime.tensorrt import *\n"
        "graph, engine = map(Path, sys.argv[1:])\n"
        "profile = default_profile(graph, max_batch=4, max_sequence=16)\n"
        f"m = build_engine(graph, engine, profiles=[profile], library_name={RTX!r})\n"
        "m.write(manifest_path(engine))"
    )
    engine = tmp_path / "3" / "model.engine"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a" / "model.onnx"), str(engine)],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert EngineManifest.read(manifest_path(engine)) == first
    first.write(manifest_path(tmp_path / "1" / "model.engine"))
    assert manifest_path(engine).read_bytes() == (tmp_path / "1/model.engine.json").read_bytes()


def test_engine_holds_no_path(tmp_path: Path) -> None:
    """Nothing in the file tells where it was built."""
    build(write_routed(tmp_path), tmp_path / "model.engine")
    assert str(tmp_path).encode() not in (tmp_path / "model.engine").read_bytes()


def test_tf32_is_off_unless_asked(tmp_path: Path) -> None:
    """The switch reaches the builder: float32 engines differ."""
    path = write_merged(tmp_path)
    exact = build(path, tmp_path / "exact.engine")
    rounded = build(path, tmp_path / "rounded.engine", tf32=True)
    assert (exact.tf32, rounded.tf32) == (False, True)
    assert exact.engine_sha256 != rounded.engine_sha256


def test_targets_are_those_asked_for(tmp_path: Path) -> None:
    """The header's targets are checked against the request and reported."""
    path = write_merged(tmp_path)
    manifest = build(path, tmp_path / "model.engine", compute_capabilities=["12.0", "8.6"])
    assert manifest.targets == ("8.6", "12.0")
    assert manifest.options == {"compute_capabilities": ["12.0", "8.6"]}
    header = read_header(tmp_path / "model.engine")
    assert header is not None
    assert header.version == manifest.builder_version
    assert set(header.parts) == {"ENGN", "WGHT"}


def test_options_reach_the_manifest(tmp_path: Path) -> None:
    """Workspace and optimization level, and several profiles."""
    path = write_merged(tmp_path)
    profiles = [default_profile(path, max_batch=1), default_profile(path, max_batch=8)]
    manifest = build_engine(
        path,
        tmp_path / "model.engine",
        profiles=profiles,
        workspace_bytes=1 << 28,
        optimization_level=1,
        library_name=RTX,
    )
    assert manifest.options == {"workspace_bytes": 1 << 28, "optimization_level": 1}
    assert manifest.profiles == tuple(profiles)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_quantised_graph_builds_and_names_its_type(tmp_path: Path, kind: str) -> None:
    """Explicit symmetric Q/DQ, per tensor and per channel, needs no switch."""
    random = np.random.default_rng(0)
    weights = {
        "weight": random.integers(-9, 9, (8, 6)).astype(kind),
        "weight_scale": random.uniform(0.01, 0.02, 6).astype(np.float32),
        "weight_zero": np.zeros(6, kind),
        "scale": np.array(0.05, np.float32),
        "zero": np.zeros((), kind),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node(
            "DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=1
        ),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    inputs, outputs = [value("x", ["batch", 8])], [value("y", ["batch", 6])]
    path = write_graph(tmp_path, nodes, inputs, outputs, weights)
    assert build(path, tmp_path / "model.engine").precision == tuple(sorted(("float32", kind)))


def test_weight_only_int4_builds(tmp_path: Path) -> None:
    """Blocks of 32 rows share a scale."""
    random = np.random.default_rng(0)
    weights = {
        "weight": random.integers(-7, 7, (64, 32)).astype("int4"),
        "scale": random.uniform(0.01, 0.02, (2, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    inputs, outputs = [value("x", ["batch", 64])], [value("y", ["batch", 32])]
    path = write_graph(tmp_path, nodes, inputs, outputs, weights)
    assert "int4" in build(path, tmp_path / "model.engine").precision


def test_if_builds(tmp_path: Path) -> None:
    """Branches on a run-time condition."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_y"])],
            name,
            [],
            [value(f"{name}_y", ["batch", 4])],
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    node = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branches["then"], else_branch=branches["else"]
    )
    inputs = [value("x", ["batch", 4]), value("flag", [], TensorProto.BOOL)]
    path = write_graph(tmp_path, [node], inputs, [value("y", ["batch", 4])])
    assert build(path, tmp_path / "model.engine").engine_size_bytes > 0


def test_fixed_shapes_need_no_profile(tmp_path: Path) -> None:
    """A graph without dynamic inputs builds with none."""
    path = write_graph(
        tmp_path,
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", [2, 3])],
        [value("y", [2, 3])],
    )
    assert build(path, tmp_path / "model.engine").profiles == ()


def test_every_unsupported_node_is_named(tmp_path: Path) -> None:
    """Node, operator and reason of each, in one error, and no file."""
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain="com.acme"),
        helper.make_node("Riddle", ["a"], ["y"], name="second", domain="com.acme"),
    ]
    path = write_graph(tmp_path, nodes, [value("x", ["batch"])], [value("y", ["batch"])])
    with pytest.raises(EngineBuildError) as refusal:
        build(path, tmp_path / "model.engine")
    assert "refuses 2 of its nodes" in refusal.value.found
    assert "node first (Mystery)" in refusal.value.found
    assert "node second (Riddle)" in refusal.value.found
    assert "cudaError 35" not in str(refusal.value)
    assert rest(tmp_path) == ["model.onnx"]


def test_node_inside_a_function_is_named_with_it(tmp_path: Path) -> None:
    """The function on the way to the bad node is part of the message."""
    path = write_routed(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.functions[0].node[-1].op_type = "MatMulButBetter"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineBuildError, match=r"node .*up.* \(MatMulButBetter\)") as refusal:
        build(path, tmp_path / "model.engine")
    assert "in function" in refusal.value.found
    assert "TaskLowRank" in refusal.value.found


def test_mixed_types_are_refused_not_cast(tmp_path: Path) -> None:
    """Strong typing: half times single is the exporter's mistake."""
    weights = {"w": np.ones((4, 4), np.float16)}
    path = write_graph(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [value("x", ["batch", 4])],
        [value("y", ["batch", 4])],
        weights,
    )
    with pytest.raises(EngineBuildError, match="product"):
        build(path, tmp_path / "model.engine")


def test_type_that_would_change_silently_is_refused(tmp_path: Path) -> None:
    """TensorRT reads float64 inputs as float32 and says nothing."""
    path = write_graph(
        tmp_path,
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", ["batch"], TensorProto.DOUBLE)],
        [value("y", ["batch"], TensorProto.DOUBLE)],
    )
    with pytest.raises(EngineBuildError, match="float64"):
        build(path, tmp_path / "model.engine")


@contextmanager
def refused_and_clean(folder: Path, message: str) -> Iterator[None]:
    """Expect an ``EngineBuildError`` and no new file in ``folder``."""
    before = rest(folder)
    with pytest.raises(EngineBuildError, match=message):
        yield
    assert rest(folder) == before


def profile() -> Profile:
    """Return the profile of merged graphs, without reading one."""
    return Profile({"input_ids": ((1, 1), (1, 4), (2, 8))})


@pytest.mark.parametrize("kept", [0, 1, 40, 700])
def test_truncated_graph_is_refused(tmp_path: Path, kept: int) -> None:
    """Wherever it is cut."""
    path = write_merged(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused_and_clean(tmp_path, r"model\.onnx"):
        build_engine(path, tmp_path / "m.engine", profiles=[profile()], library_name=RTX)


def test_missing_graph_is_refused(tmp_path: Path) -> None:
    """The path is named."""
    with refused_and_clean(tmp_path, r"absent\.onnx: it cannot be read \(No such file"):
        build_engine(tmp_path / "absent.onnx", tmp_path / "m.engine", profiles=[profile()])


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    """The weight file is named."""
    path = write_merged(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with refused_and_clean(tmp_path, r"model\.onnx\.data is missing"):
        build_engine(path, tmp_path / "m.engine", profiles=[profile()], library_name=RTX)


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    """Its size and what was needed are given."""
    path = write_merged(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with refused_and_clean(tmp_path, r"model\.onnx\.data has 100 bytes of \d+"):
        build_engine(path, tmp_path / "m.engine", profiles=[profile()], library_name=RTX)


def test_target_that_cannot_run_the_graph_is_the_builders_word(tmp_path: Path) -> None:
    """A build that only logs its reason becomes an error with that reason."""
    with refused_and_clean_after(tmp_path) as path, pytest.raises(EngineBuildError) as refusal:
        build(path, tmp_path / "model.engine", compute_capabilities=["7.5"])
    assert "the build failed" in refusal.value.found
    assert "gave no reason" not in refusal.value.found


@contextmanager
def refused_and_clean_after(folder: Path) -> Iterator[Path]:
    """Yield a merged graph and expect no file beside it afterwards."""
    path = write_merged(folder)
    before = rest(folder)
    yield path
    assert rest(folder) == before


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
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    """The builder takes the nearest value, or none, without a word."""
    with refused_and_clean_after(tmp_path) as path, pytest.raises(UsageError, match=message):
        build(path, tmp_path / "model.engine", **options)


def test_progress_rises_to_one(tmp_path: Path) -> None:
    """Phases have names, and the fraction never falls."""
    seen: list[tuple[str, float]] = []
    build(
        write_merged(tmp_path),
        tmp_path / "model.engine",
        progress=lambda phase, fraction: seen.append((phase, fraction)),
    )
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5
    assert fractions[-1] == 1.0
    assert all(phase for phase, _ in seen)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ZeroDivisionError, BrokenPipeError])
def test_exception_in_progress_stops_the_build(
    tmp_path: Path, problem: type[BaseException]
) -> None:
    """Ctrl-C inside a build arrives, and nothing is left behind."""

    def stop(phase: str, fraction: float) -> None:
        raise problem

    with refused_and_clean_after(tmp_path) as path, pytest.raises(problem):
        build(path, tmp_path / "model.engine", progress=stop)


def test_full_disk_keeps_the_old_engine(tmp_path: Path) -> None:
    """The bindings lose the writer's exception; here it is an ``OutputError``."""
    path = write_merged(tmp_path)
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            build(path, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert engine.read_bytes() == b"old"
    assert rest(tmp_path) == ["model.engine", "model.onnx", "model.onnx.data"]


def test_file_in_the_place_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    """The path that cannot be written is named."""
    path = write_merged(tmp_path)
    with pytest.raises(OutputError, match=r"model\.onnx/model\.engine"):
        build(path, path / "model.engine")


def test_missing_function_is_named_by_its_domain(tmp_path: Path) -> None:
    """A call into ``mtl_export`` without the function is refused at its node."""
    node = helper.make_node("TaskLowRank", ["x"], ["y"], name="low_rank", domain=DOMAIN)
    path = write_graph(tmp_path, [node], [value("x", ["batch"])], [value("y", ["batch"])])
    with pytest.raises(EngineBuildError, match=r"node low_rank \(TaskLowRank\)"):
        build(path, tmp_path / "model.engine")
