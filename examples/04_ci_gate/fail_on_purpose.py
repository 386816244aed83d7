"""A project with one fault planted in it -> the gate's verdict, which must not be 0.

    python fail_on_purpose.py stale      somebody trained on and did not export again
    python fail_on_purpose.py edited     a number of a merged model, its manifest made to match
    python fail_on_purpose.py damaged    a graph's weights were cut short on the way

Works on a copy in ``out/``; the project stays as it is. Exits with the code of
``mtl-export parity``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mtl_export.bundle.manifest import read_manifest, write_manifest

HERE = Path(__file__).resolve().parent
# What the gate does not need, so that the copy is made and judged quickly.
LEFT_OUT = shutil.ignore_patterns("engines", "reports", ".data", ".*_cache", "__pycache__")


def stale(project: Path) -> None:
    """Change one bit of the checkpoint: what was exported is not from it any more."""
    path = project / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x01
    path.write_bytes(content)


def edited(project: Path) -> None:
    """Change one bias of a merged head, and make the manifest agree."""
    folder = sorted((project / "out" / "merged").iterdir())[0]
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    # The file begins with the length of its JSON header: offsets count from behind it.
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + header["classifier.bias"]["data_offsets"][0]
    (bias,) = struct.unpack("<f", content[start : start + 4])
    content[start : start + 4] = struct.pack("<f", bias + 0.01)
    path.write_bytes(content)
    manifest = read_manifest(folder)
    assert manifest is not None
    write_manifest(folder, manifest.recipe)


def damaged(project: Path) -> None:
    """Cut the single graph's weights in half."""
    path = project / "out" / "onnx" / "model.onnx.data"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


FAULTS: dict[str, Callable[[Path], None]] = {"stale": stale, "edited": edited, "damaged": damaged}


def copy_of(project: Path, copy: Path) -> None:
    """Make a copy of ``project``."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(project, copy, ignore=LEFT_OUT)


def main() -> int:
    """Plant a fault and return what the gate says of it."""
    parser = argparse.ArgumentParser(description="Plant a fault and run the gate.")
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--project", type=Path, default=HERE.parent / "01_ads_relevance")
    parser.add_argument("--copy", type=Path, default=HERE / "out" / "faulty")
    options = parser.parse_args()
    copy_of(options.project, options.copy)
    FAULTS[options.fault](options.copy)
    reports = [f"--report=reports/{options.fault}{end}" for end in (".md", ".xml", ".html")]
    return subprocess.run(["mtl-export", "parity", *reports], cwd=options.copy).returncode


if __name__ == "__main__":
    sys.exit(main())
