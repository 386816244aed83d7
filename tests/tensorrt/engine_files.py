"""What two builds of one graph have in common, where the builder's own numbers differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mtl_export.tensorrt.header import GRAPH_PART, read_header, sha256_of_graph

WEIGHTS_PART = "WGHT"


def fingerprint(path: Path) -> tuple[int, str, str, str]:
    """Return an engine's size and the hashes of its head, its graph and its weights.

    Builds of one graph have the same; their files differ in the numbers, and the order, that
    TensorRT-RTX gives some internal values (``mtl_export.tensorrt.header``).
    """
    header = read_header(path)
    assert header is not None
    content = path.read_bytes()
    start, size = header.parts[WEIGHTS_PART]
    head = content[: header.parts[GRAPH_PART][0]]
    weights = content[start : start + size]
    assert len(weights) == size
    graph = sha256_of_graph(path, header)
    assert graph
    return (
        len(content),
        hashlib.sha256(head).hexdigest(),
        graph,
        hashlib.sha256(weights).hexdigest(),
    )


def without_engine_hashes(path: Path) -> Any:
    """Return a manifest's JSON value without the SHA-256 of engine files, and its own."""

    def cleaned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            # an output's manifest lists the engine's manifest, whose hash depends on it too
            hides = key == "engine" or key.endswith((".engine", ".engine.json"))
            return {
                name: cleaned(inner, name)
                for name, inner in value.items()
                if not (hides and name == "sha256")
            }
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    document = cleaned(json.loads(path.read_text(encoding="utf-8")))
    return {name: value for name, value in document.items() if name != "manifest_sha256"}
