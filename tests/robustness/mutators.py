"""Bytes of a file and a random generator -> bytes that are wrong in one of many ways.

    any file       bits flipped, blocks cut, copied, zeroed or inserted, numbers made extreme
    zip, npz       a member changed and packed again (its CRC is right), renamed, doubled, lost
    .npy           dtype, shape and order in its header
    pickle         arguments of its opcodes, opcodes, names it imports
    safetensors    length of the header, and the header as JSON
    JSON, JSONL    values at random paths by values of other types, keys, deep nesting
    TOML           the same for the right side of its lines
    ONNX           fields of its messages, by reflection; paths of its external data

The same content and the same generator give the same bytes.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random

from tests.robustness.damage import NUMBERS, TEXTS, damaged, integers
from tests.robustness.fields import json_lines, json_values, protobuf, toml

Change = Callable[[bytes, Random], bytes]
NAMES = (
    "os system", "builtins eval", "torch.jit load", "torch._utils _rebuild_tensor_v2",
    "torch LongStorage",
    "torch FloatStorage", "torch._utils _rebuild_parameter", "collections OrderedDict",
    "numpy ndarray",
)  # fmt: skip


def mutated(content: bytes, name: str, random: Random) -> bytes:
    """Return ``content`` of the file ``name``, changed one to three times."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        aware = _aware(content, name)
        change = aware if aware is not None and random.random() < 0.65 else damaged
        content = change(content, random)
    return content


def _aware(content: bytes, name: str) -> Change | None:
    """Return the change that knows the format."""
    if content[:2] == b"PK":
        return rezipped
    if content[:6] == b"\x93NUMPY":
        return npy_header
    if content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05":
        return pickle_opcodes
    suffix = name.rpartition(".")[2]
    known: dict[str, Change] = {
        "safetensors": safetensors, "toml": toml, "jsonl": json_lines, "onnx": protobuf,
        "engine": integers,
    }  # fmt: skip
    if suffix in known:
        return known[suffix]
    return json_values if content.lstrip()[:1] in (b"{", b"[") else None


def rezipped(content: bytes, random: Random) -> bytes:
    """Change a member, or which members there are, and pack them anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # what is changed a second time may be no zip any more
        return damaged(content, random)
    if not members:
        return damaged(content, random)
    pickles = [place for place, (name, _) in enumerate(members) if name.endswith(".pkl")]
    place = (
        random.choice(pickles)
        if pickles and random.random() < 0.6
        else random.randrange(len(members))
    )
    name, data = members[place]
    kind = random.randrange(10)
    if kind < 6:
        members[place] = (name, mutated(data, name, random))
    elif kind == 6:
        del members[place]
    elif kind == 7:
        folder = name.rpartition("/")[0]
        others = (
            "DATA.PKL",
            "constants.pkl",
            "code/x.py",
            "byteorder",
            "version",
            "data.pkl",
            "data/0",
            "../x",
        )
        other = (
            f"{folder}/{random.choice(others)}" if random.random() < 0.6 else random.choice(TEXTS)
        )
        members[place] = (other.replace("\ud800", "") or "x", data)
    elif kind == 8:
        members.insert(random.randrange(len(members) + 1), (name, random.choice(members)[1]))
    else:
        members[place] = (name, random.choice(members)[1])
    packing = random.choice(
        (zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED,) * 3 + (zipfile.ZIP_LZMA,)
    )
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packing) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = packing
            # zipfile warns of doubled names, which is the point.
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, data)
    return target.getvalue()


def npy_header(content: bytes, random: Random) -> bytes:
    """Change dtype, order or shape."""
    dtypes = (
        "|O",
        "<M8[s]",
        "|b1",
        "<U3",
        "|S3",
        "<f8",
        "<i4",
        "<c16",
        "|V5",
        "[('a','<i4')]",
        "<f99",
        ">i2",
        "<U2147483647",
    )
    shapes = ("(1000000000000,)", "(-1,)", "()", "(0,)", f"({'1,' * 70})", "(2,)", "('x',)",
              "(True,)", "(1e3,)",
              f"({2**63},)", f"({2**31},{2**31},{2**31})", "None",
              f"({'(' * 300}{')' * 300})")  # fmt: skip
    text = content[10:].split(b"\n", 1)
    header, values = text[0].decode("latin-1"), text[-1]
    kind = random.randrange(4)
    if kind == 0:
        header = re.sub(
            r"'descr': [^']*'[^']*'", lambda _: f"'descr': {random.choice(dtypes)!r}", header
        )
    elif kind == 1:
        header = re.sub(
            r"'shape': \([^)]*\)", lambda _: f"'shape': {random.choice(shapes)}", header
        )
    elif kind == 2:
        header = header.replace(
            "'fortran_order': False", f"'fortran_order': {random.choice(('True', '1', 'None'))}"
        )
    else:
        header = damaged(header.encode("latin-1"), random).decode("latin-1")
    version = random.choice(
        (b"\x01\x00", b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00")
    )
    raw = header.rstrip().encode("utf-8", "replace") + b"\n"
    size = (
        struct.pack("<H", len(raw) % 65536)
        if version == b"\x01\x00"
        else struct.pack("<I", len(raw))
    )
    return content[:6] + version + size + raw + values


def pickle_opcodes(content: bytes, random: Random) -> bytes:
    """Change an opcode or its argument."""
    try:
        found = [(code, argument, at or 0) for code, argument, at in pickletools.genops(content)]
    except ValueError:
        return damaged(content, random)
    index = random.randrange(len(found))
    ends = [at for _, _, at in found[1:]] + [found[-1][2] + 1]
    named = [
        place for place, (code, _, _) in enumerate(found) if code.name in {"GLOBAL", "BINUNICODE"}
    ]
    if named and random.random() < 0.5:
        index = random.choice(named)
    code, _, at = found[index]
    if code.name == "GLOBAL":
        new = b"c" + random.choice(NAMES).replace(" ", "\n").encode() + b"\n"
    elif code.name == "BINUNICODE":
        text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        new = b"X" + struct.pack("<I", random.choice((len(text), len(text), 2**32 - 1))) + text
    elif code.name in {"BININT1", "BININT", "BININT2"}:
        new = random.choice((b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f",
                             b"I0x1\n", b"L0x1L\n",
                             b"I01\n", b"N", b"]", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
                             b"\x8a\x08" + b"\x7f" * 8))  # fmt: skip
    else:
        new = random.choice((b"", b"N", b")", b"}", b"]", b"0", b"R", b"b", b"Q", b"2" * 50,
                             b"(" * 3000, b"]" * 3000,
                             b"\x93", b"\x85" * 2000, b"h\x00", b"h\xff", b".",
                             bytes([random.randrange(256)])))  # fmt: skip
    return content[:at] + new + content[ends[index] :]


def safetensors(content: bytes, random: Random) -> bytes:
    """Change the header as JSON, with a length that fits it or does not."""
    size = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
    header, data = content[8 : 8 + size], content[8 + size :]
    if random.random() < 0.8:
        header = json_values(header, random)
    length = random.choice((len(header),) * 8 + NUMBERS) % 2**64
    return struct.pack("<Q", length) + header + data
