"""Manifests on disk, and the few bytes of an engine that can be read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from mtl_export.errors import EngineBuildError, IntegrityError, OutputError
from mtl_export.tensorrt import BuildCheck, EngineManifest, Profile, manifest_path
from mtl_export.tensorrt.available import BuilderInfo
from mtl_export.tensorrt.header import read_header, sha256_of_graph
from mtl_export.tensorrt.manifest import describe_engine, partial_path
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.source import TensorInfo, read_source
from tests.tensorrt.models import write_merged

GRAPH, WEIGHTS = b"graph and kernels", b"weights"
RTX = BuilderInfo("tensorrt_rtx", "1.7.1.116", "", "no GPU")
FULL = BuilderInfo("tensorrt", "11.4.0.106", "9.0", "")


def manifest() -> EngineManifest:
    """Return a manifest with every field filled."""
    return EngineManifest(
        engine="model.engine",
        engine_sha256="a" * 64,
        engine_size_bytes=12,
        graph_sha256="b" * 64,
        source="model.onnx",
        source_sha256={"model.onnx": "c" * 64},
        provenance={"family": "mtl-lora"},
        layout="single-graph",
        tasks=({"name": "ads_rel", "index": 0, "labels": 2, "kind": "größer"},),
        inputs=(TensorInfo("x", "int64", ("batch", 3)),),
        outputs=(TensorInfo("y", "float32", ("batch",)),),
        profiles=(Profile({"x": ((1, 3), (2, 3), (4, 3))}),),
        precision=("float32",),
        tf32=False,
        builder="tensorrt_rtx",
        builder_version="1.7.1.116",
        options={"optimization_level": 3},
        libraries={"onnx": "1.23.2"},
        targets=("8.6",),
        validated=(BuildCheck("it opens", "not-run", "no GPU"),),
    )


def engine_bytes(*, version: bytes = bytes((1, 7, 1, 116)), mask: int = 0x7E) -> bytes:
    """Return an engine file as TensorRT-RTX lays it out, around ``GRAPH`` and ``WEIGHTS``."""
    start = 64 + 2 * 24
    size = start + len(GRAPH) + len(WEIGHTS)
    head = struct.pack("<4s4xQQ4s4sI", b"vtrt", 2, size, version, b"vtrt", mask)
    table = struct.pack("<4s4xQQ", b"NGNE", start, len(GRAPH))
    table += struct.pack("<4s4xQQ", b"THGW", start + len(GRAPH), len(WEIGHTS))
    return head.ljust(64, b"\0") + table + GRAPH + WEIGHTS


def describe(folder: Path, content: bytes, info: BuilderInfo, **options: object) -> EngineManifest:
    """Return the manifest of an engine file with ``content``."""
    path = folder / "model.engine"
    partial_path(path).write_bytes(content)
    return describe_engine(
        path,
        sha256="0" * 64,
        source=read_source(write_merged(folder)),
        info=info,
        options=BuildOptions(profiles=(), **options),  # type: ignore[arg-type]
        precision=("float32",),
    )


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    """What is read equals what was written, and nothing else is left in the folder."""
    path = manifest_path(tmp_path / "model.engine")
    manifest().write(path)
    assert EngineManifest.read(path) == manifest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.engine.json"]
    assert json.loads(path.read_text())["schema"] == "mtl-export.engine/1"


def test_same_manifest_gives_the_same_bytes(tmp_path: Path) -> None:
    """It ends in one newline and is UTF-8, so that it can be diffed."""
    for name in ("a.json", "b.json"):
        manifest().write(tmp_path / name)
    content = (tmp_path / "a.json").read_bytes()
    assert content == (tmp_path / "b.json").read_bytes()
    assert content.endswith(b"}\n")
    assert "größer".encode() in content


def test_manifest_never_overwrites_an_engine(tmp_path: Path) -> None:
    """Passing the engine's own path is a bug of the caller."""
    with pytest.raises(ValueError, match="manifest_path"):
        manifest().write(tmp_path / "model.engine")


def test_unwritable_manifest_is_an_output_error(tmp_path: Path) -> None:
    """The folder is missing."""
    with pytest.raises(OutputError, match="cannot be written"):
        manifest().write(tmp_path / "absent" / "model.engine.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ('{"schema": "mtl-export.engine/2"}', "schema is 'mtl-export.engine/2'"),
        ('{"schema": "mtl-export.engine/1"}', "no 'engine'"),
    ],
)
def test_broken_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    """Missing, cut, foreign, of a later schema, or incomplete."""
    path = tmp_path / "model.engine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(IntegrityError, match=message):
        EngineManifest.read(path)


def test_header_is_read(tmp_path: Path) -> None:
    """Size, version, targets and parts."""
    path = tmp_path / "model.engine"
    path.write_bytes(engine_bytes(mask=2 | 8 | 64))
    header = read_header(path)
    assert header is not None
    assert header.size_bytes == path.stat().st_size
    assert header.version == "1.7.1.116"
    assert header.capabilities == ("8.0", "8.9", ">12.1")
    assert list(header.parts) == ["ENGN", "WGHT"]


def test_graph_hash_ignores_weights(tmp_path: Path) -> None:
    """Engines that differ in weights only have one graph hash."""
    path = tmp_path / "model.engine"
    hashes = set()
    for content in (engine_bytes(), engine_bytes().replace(WEIGHTS, b"WEIGHTS")):
        path.write_bytes(content)
        hashes.add(sha256_of_graph(path, read_header(path)))
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


@pytest.mark.parametrize("content", [b"", b"ptrt" * 32, engine_bytes()[:70], engine_bytes()[:63]])
def test_foreign_or_cut_headers_give_nothing(tmp_path: Path, content: bytes) -> None:
    """An unknown layout is not an error: the layout is not documented."""
    path = tmp_path / "model.engine"
    path.write_bytes(content)
    assert read_header(path) is None
    assert sha256_of_graph(path, None) == ""


def test_graph_part_that_is_cut_has_no_hash(tmp_path: Path) -> None:
    """A short file is told by its size; no hash of half a part is given."""
    path = tmp_path / "model.engine"
    path.write_bytes(engine_bytes()[:120])
    assert sha256_of_graph(path, read_header(path)) == ""


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (engine_bytes()[:-1], {}, "gives the file's size: no, its header says 136"),
        (engine_bytes(version=b"\x01\x06\x00\x00"), {}, r"builder's version: no.*1\.6\.0\.0"),
        (engine_bytes(mask=4), {"compute_capabilities": ["12.0"]}, r"GPUs asked for: no.*8\.6"),
    ],
)
def test_engine_that_contradicts_its_build_is_refused(
    tmp_path: Path, content: bytes, options: dict[str, object], message: str
) -> None:
    """Cut, of another version, or for other GPUs."""
    with pytest.raises(EngineBuildError, match=message):
        describe(tmp_path, content, RTX, **options)


def test_unknown_layout_is_not_run_with_the_reason(tmp_path: Path) -> None:
    """``tensorrt`` engines: the GPU is the target, and header checks say why they did not run."""
    found = describe(tmp_path, b"ftrt" + bytes(200), FULL)
    assert found.targets == ("9.0",)
    assert found.graph_sha256 == ""
    headers = [check for check in found.validated if "header" in check.check]
    assert [check.verdict for check in headers] == ["not-run"] * 3
    assert all("tensorrt 11.4.0.106" in check.reason for check in headers)


@pytest.mark.parametrize(("offset", "size"), [(2**63, 1), (0, 2**62), (64, 2**40), (2**64 - 1, 1)])
def test_graph_part_beyond_the_file_has_no_hash(tmp_path: Path, offset: int, size: int) -> None:
    """A header may say anything: nothing is read that the file does not have."""
    path = tmp_path / "model.engine"
    content = bytearray(engine_bytes())
    struct.pack_into("<QQ", content, 64 + 8, offset, size)
    path.write_bytes(content)
    assert sha256_of_graph(path, read_header(path)) == ""
