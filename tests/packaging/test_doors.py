from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mtl_export", "cli/mtl_export_cli", "calibration/mtl_export_calibration")
CHECKPOINT = "mtl_export/checkpoint/files"
# What parses a kind of file -> the one module that may use it.
DOORS = {
    "json.load": f"{CHECKPOINT}/json_file.py",
    "json.loads": f"{CHECKPOINT}/json_file.py",
    "json.JSONDecoder": f"{CHECKPOINT}/json_file.py",
    "tomllib": f"{CHECKPOINT}/toml_file.py",
    "tomli": f"{CHECKPOINT}/toml_file.py",
    "yaml": f"{CHECKPOINT}/yaml_file.py",
    "numpy.load": f"{CHECKPOINT}/npz_file.py",
    "zipfile": f"{CHECKPOINT}/zip_file.py",
    "safetensors.safe_open": f"{CHECKPOINT}/safetensors.py",
    "safetensors.numpy.load": "",
    "safetensors.numpy.load_file": "",
    "safetensors.torch": "",
    "pickle": "",
    "pickletools": f"{CHECKPOINT}/restricted_pickle.py",
    "marshal": "",
    "shelve": "",
    "tarfile": "",
    "torch.load": "",
    "torch.jit.load": "",
    "torch.serialization": "",
}


def uses(tree: ast.Module) -> set[str]:
    """Return the full names of everything that a module imports, or takes from an import."""
    aliases: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found |= {node.module, f"{node.module}.{alias.name}"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.insert(0, inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in aliases:
                found.add(".".join([aliases[inner.id], *parts]))
    return found


@pytest.mark.parametrize("use", DOORS)
def test_each_kind_of_file_has_one_door(use: str) -> None:
    """A second reader would miss the limits and raise what nobody catches."""
    users = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if any(
            one == use or one.startswith(f"{use}.")
            for one in uses(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert users <= {DOORS[use]}


def test_a_use_is_seen_under_every_name() -> None:
    """Aliases, imports of one name and imports inside functions are all found."""
    source = """
import numpy as np, json
from json import loads as parse
def f():
    import torch.serialization
    return np.load, json.load
"""
    assert {"numpy.load", "json.load", "json.loads", "torch.serialization"} <= uses(
        ast.parse(source)
    )
