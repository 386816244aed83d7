"""The published schema of engine manifests, and real manifests against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from mtl_export.tensorrt import (
    BuildOptions,
    EngineManifest,
    build_engine,
    default_profile,
    manifest_path,
)
from mtl_export.tensorrt.manifest import SCHEMA, SCHEMA_FILE
from tests.tensorrt import fake_tensorrt
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.models import write_merged, write_routed

DOCUMENT: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def problems_of(value: object) -> list[str]:
    """Return what the schema has against ``value``."""
    errors: Iterator[ValidationError] = Draft202012Validator(DOCUMENT).iter_errors(value)
    return [error.json_path for error in errors]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON value of a real engine's manifest."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    folder = tmp_path_factory.mktemp("manifest")
    path, engine = write_routed(folder), folder / "model.engine"
    profiles = [default_profile(path, max_batch=1), default_profile(path, max_batch=4)]
    build_engine(
        path,
        engine,
        BuildOptions(profiles, optimization_level=2, compute_capabilities=["8.6", "12.0"]),
        library_name="tensorrt_rtx",
    ).write(manifest_path(engine))
    value: dict[str, Any] = json.loads(manifest_path(engine).read_text(encoding="utf-8"))
    return value


def test_the_schema_is_itself_valid_and_of_the_written_version() -> None:
    """A manifest names the schema that describes it."""
    Draft202012Validator.check_schema(DOCUMENT)
    assert DOCUMENT["properties"]["schema"] == {"const": SCHEMA}
    assert DOCUMENT["$id"].endswith(SCHEMA.replace("mtl-export.", "").replace("/", ":"))


def test_a_real_manifest_follows_the_schema(written: dict[str, Any], tmp_path: Path) -> None:
    """And has no key that the schema does not speak of, nor lacks one."""
    assert problems_of(written) == []
    assert set(written) == set(DOCUMENT["properties"]) == set(DOCUMENT["required"])
    for name in ("engine", "source", "builder"):
        assert set(written[name]) == set(DOCUMENT["properties"][name]["properties"])
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(written), encoding="utf-8")
    assert EngineManifest.read(copy).as_dict() == written


def test_every_option_follows_the_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What only TensorRT with a GPU can do, by its stand-in."""
    fake_tensorrt.install(monkeypatch, FakeTensorRT())
    path = write_merged(tmp_path)
    options = {
        "workspace_bytes": 1 << 30,
        "optimization_level": 5,
        "version_compatible": True,
        "hardware_compatibility": "ampere-plus",
        "timing_cache": tmp_path / "kernels.bin",
    }
    profile = default_profile(path, max_batch=2)
    known = set(DOCUMENT["properties"]["builder"]["properties"]["options"]["properties"])
    seen: set[str] = set()
    for more in ({"strip_weights": True}, {"refit": True, "refittable": ("head.weight",)}):
        chosen = BuildOptions(profiles=(profile,), **options, **more)  # type: ignore[arg-type]
        manifest = build_engine(path, tmp_path / "model.engine", chosen)
        assert problems_of(json.loads(json.dumps(manifest.as_dict()))) == []
        seen |= set(manifest.options)
    assert seen == known - {"compute_capabilities"}


def spoilt(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets the key at ``path`` of a manifest to ``value``."""

    def spoil(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        held: Any = manifest
        for parent in parents:
            held = held[int(parent) if parent.isdigit() else parent]
        held[last] = value

    return spoil


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "mtl-export.engine/2"),
        ("engine.sha256", "abc"),
        ("engine.file", "/home/me/model.engine"),
        ("engine.size_bytes", 0),
        ("source.sha256", {}),
        ("tasks.0.index", -1),
        ("inputs", []),
        ("profiles.0.input_ids", {"min": [1, 1], "max": [2, 2]}),
        ("tf32", "no"),
        ("builder.name", "trtexec"),
        ("builder.options.timing_cache", "/tmp/kernels.bin"),
        ("targets", ["sm_86"]),
        ("validated.0.verdict", "failed"),
        ("validated.0.verdict", "not-run"),
    ],
)
def test_the_schema_refuses_what_no_manifest_says(
    written: dict[str, Any], path: str, value: object
) -> None:
    """Paths, other versions, cut hashes, a check that was not run for no reason."""
    manifest = json.loads(json.dumps(written))
    spoilt(path, value)(manifest)
    assert problems_of(manifest) != []
