"""Bytes changed without knowing what they are, and the values that wrong files hold."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

# What paths that leave a folder name; see ``guard``. From one, two and three folders below.
BAITS = (*(f"{'../' * up}outside/bait" for up in (1, 2, 3)), "/etc/hostname", "..", ".", "a/b")
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63,
    2**64,
    -(2**63),
)
TEXTS = (
    *BAITS, "", " ", "x", "\x00", "\ud800", "é\u2028", "x" * 5000, "0", "true", "nan", "F32",
    "F8_E8M0",
    "~nobody/x", "../" * 40, "-", "con", "lora", "single_label_classification", "x/../y",
)  # fmt: skip
MANIFEST = "mtl-export.json"
# Files that are refused where they are links out of their folder.
HELD = (".safetensors", ".bin", ".pt", ".pth", ".data")
DEEP = "@deep@"
PLAIN: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": 1}, {"x": []}, ["x"], [0, 1, 2], [1.5, "x"], 0.5,
    1e308,
    -0.0, float("nan"), float("inf"), float("-inf"), 10**30, 10**400, DEEP, *NUMBERS, *TEXTS,
)  # fmt: skip


def damaged(content: bytes, random: Random) -> bytes:
    """Change bytes without knowing what they are."""
    data = bytearray(content)
    at = random.randrange(len(data) + 1)
    size = random.choice((1, 2, 4, 8, 64, len(data) // 4 + 1))
    kind = random.randrange(9)
    if kind == 0:
        for _ in range(random.choice((1, 1, 2, 8))) if data else ():
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + size]
    elif kind == 3:
        data[at:at] = random.randbytes(size % 4096)
    elif kind == 4:
        begin = random.randrange(len(data) + 1)
        data[at:at] = data[begin : begin + size]
    elif kind == 5:
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == 6:
        return integers(content, random)
    elif kind == 7:
        begin = random.randrange(len(data) + 1)
        data[at : at + size] = data[begin : begin + size]
    else:
        return random.choice((b"", content * 2, b"\xff\xfe" + content, b"\xef\xbb\xbf" + content,
                              b"[" * 200_000,
                              b'{"a":' * 100_000, b"\x00", content.replace(b"\x00", b""),
                              b"0" * 6000))  # fmt: skip
    return bytes(data)


def integers(content: bytes, random: Random) -> bytes:
    """Write an extreme number where a length or an offset may be: most are in the first bytes."""
    form = random.choice(("<Q", "<I", "<H", ">I"))
    size = struct.calcsize(form)
    most = max(1, len(content) - size)
    at = random.choice(
        (random.randrange(most), random.randrange(min(most, 128)), 8 * random.randrange(8))
    )
    number = random.choice(NUMBERS) % (1 << 8 * size)
    return content[:at] + struct.pack(form, number) + content[at + size :]


def replace_file(file: Path, others: Sequence[Path], random: Random) -> None:
    """Put something else than a changed file in its place."""
    kind = random.randrange(7)
    content = file.read_bytes()
    file.unlink()
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        # Hub caches link to files elsewhere; what a folder's own files name must be in it.
        out = BAITS if file.name.endswith(HELD) else ()
        file.symlink_to(random.choice((*out, file.name, "absent")))
    elif kind == 3:
        file.with_name("other").write_bytes(content)
        file.symlink_to("other")
    elif kind == 4 and file.suffix != ".jsonl":  # rows may come through a pipe
        os.mkfifo(file)
    elif kind == 5:
        file.write_bytes(b"")
    elif kind == 6 and len(others) > 1:
        file.write_bytes(random.choice([one for one in others if one != file]).read_bytes())


def reseal(folder: Path, file: Path) -> None:
    """Have the manifest of the folder list ``file`` as it is, and be whole itself."""
    from mtl_export.bundle.manifest import _DIGEST, _digest

    manifest = folder / MANIFEST
    if not (manifest.is_file() and file.is_file()):
        return
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
        if file != manifest:
            content = file.read_bytes()
            entry = {"sha256": sha256(content).hexdigest(), "size_bytes": len(content)}
            document["files"][file.relative_to(folder).as_posix()] = entry
        document[_DIGEST] = _digest(document)
        manifest.write_text(json.dumps(document), encoding="utf-8")
    except (ValueError, RecursionError, TypeError, AttributeError):
        return  # the manifest is what was changed, beyond repair
