"""Draw held-out scenes with what each task answers: scenes.png, for the README.

python draw.py                     # after mtl-export onnx --all-tasks
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import scenes

from mtl_export.runtime import TaskSession

FOLDER = Path(__file__).parent
COLOURS = np.array([[60, 60, 70], [230, 120, 60], [80, 170, 230], [150, 200, 90]], np.uint8)
COUNT, GAP = 3, 4


def picture(images: np.ndarray, maps: dict[str, np.ndarray]) -> np.ndarray:
    """Return rows of an image and its four predictions, uint8 [h, w, 3]."""
    far, near = maps["depth"].max(), maps["depth"].min()
    depth = 255 * (far - maps["depth"][:, 0]) / (far - near)
    normals = maps["normals"] / np.linalg.norm(maps["normals"], axis=1, keepdims=True)
    edge = 255 / (1 + np.exp(-maps["edge"][:, 0]))
    columns = [
        images,
        COLOURS[maps["semseg"].argmax(1)],
        np.repeat(depth[..., None], 3, -1),
        ((normals + 1) * 127.5).transpose(0, 2, 3, 1),
        np.repeat(edge[..., None], 3, -1),
    ]
    tall = [np.concatenate([np.pad(one, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)
                            for one in column]) for column in columns]  # fmt: skip
    return np.concatenate(tall, 1).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write [h, w, 3] uint8 as a PNG (ISO/IEC 15948: one IHDR, one IDAT, filter 0)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def main() -> None:
    """Answer a few held-out scenes and draw them."""
    session = TaskSession(FOLDER / "out" / "onnx")
    images = scenes.held_out()["images"][:COUNT]
    maps = session.run(session.encode_images(images))
    write_png(FOLDER / "scenes.png", picture(images, maps))
    print(FOLDER / "scenes.png")


if __name__ == "__main__":
    main()
