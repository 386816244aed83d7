"""Files that try to run code, to read what they should not, or to take the machine down.

Each asks for ``os.mkdir`` of a flag folder wherever it can: if that folder is there
afterwards, something ran. ``VARIANTS`` are quick to refuse, ``BOMBS`` cost time or memory.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable

MODULE = b"os"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PROTOCOL = pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
EMPTY = pickle.dumps({}, 2)
NO_KEYS = pickle.dumps([], 2)


def call(flag: str, name: bytes = b"os\nmkdir") -> bytes:
    """Return the instructions that call ``name`` with the flag folder."""
    return b"c" + name + b"\n(V" + flag.encode() + b"\ntR"


class _Call:
    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, (self.flag,)


def dumped(protocol: int) -> Callable[[str], bytes]:
    """Return a maker of what Python itself pickles."""
    return lambda flag: pickle.dumps({"weight": _Call(flag)}, protocol)


def text(value: str) -> bytes:
    """Return the instruction that pushes a text of at most 255 bytes (protocol 4)."""
    return b"\x8c" + struct.pack("<B", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """Return the instructions that import by two texts (protocol 4)."""
    return text(module) + text(name) + b"\x93"


def stream(*, magic: bytes = MAGIC, protocol: bytes = PROTOCOL, system: bytes = SYSTEM,
           content: bytes = EMPTY, keys: bytes = NO_KEYS) -> bytes:  # fmt: skip
    """Return torch's container of before 1.6."""
    return magic + protocol + system + content + keys


def archive(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file; names may repeat."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as opened:
        warnings.simplefilter("ignore")  # of a name that repeats
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            opened.writestr(info, content)
    return buffer.getvalue()


def torch_zip(pickle_bytes: bytes, *others: tuple[str, bytes], name: str = "a/data.pkl") -> bytes:
    """Return torch's container since 1.6."""
    return archive([(name, pickle_bytes), ("a/version", b"3\n"), *others])


def in_tar(flag: str) -> bytes:
    """Return torch's container of before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name in ("storages", "tensors", "pickle"):
            content = call(flag) + b"."
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    """Return ``content`` with ``old``, which is there, replaced everywhere."""
    assert old in content
    return content.replace(old, new)


def tensor_call(arguments: bytes, name: bytes = b"torch._utils\n_rebuild_tensor_v2") -> bytes:
    """Return a zip file whose pickle calls one of torch's own functions."""
    return torch_zip(b"\x80\x02}X\x01\x00\x00\x00wc" + name + b"\n" + arguments + b"Rs.")


def overlapping() -> bytes:
    """Return a zip file whose two members are the same bytes."""
    content = archive([("a/data.pkl", EMPTY), ("a/data/0", EMPTY)])
    second = content.index(b"PK\x03\x04", 4)
    return content.replace(struct.pack("<L", second) + b"a/data/0", bytes(4) + b"a/data/0")


Maker = Callable[[str], bytes]
END = b"."
VARIANTS: dict[str, Maker] = {
    **{f"protocol {number}": dumped(number) for number in range(6)},
    "GLOBAL and REDUCE": lambda flag: call(flag) + END,
    "hexadecimal INT": lambda flag: b"I0x1\n0" + call(flag) + END,
    "hexadecimal LONG": lambda flag: b"L0x1L\n0" + call(flag) + END,
    "INT with an underscore": lambda flag: b"I1_0\n0" + call(flag) + END,
    "INT with blanks": lambda flag: b"I 1 \n0" + call(flag) + END,
    "INST": lambda flag: b"(V" + flag.encode() + b"\nios\nmkdir\n.",
    "OBJ": lambda flag: b"(cos\nmkdir\nV" + flag.encode() + b"\no.",
    "NEWOBJ": lambda flag: b"\x80\x02cos\nmkdir\n(V" + flag.encode() + b"\nt\x81.",
    "NEWOBJ_EX": lambda flag: b"\x80\x04" + named("os", "mkdir") + b"(" + text(flag) + b"t}\x92.",
    "EXT1": lambda flag: b"\x80\x02\x82\xf0(V" + flag.encode() + b"\ntR.",
    "EXT2": lambda flag: b"\x80\x02\x83\xf0\x00(V" + flag.encode() + b"\ntR.",
    "EXT4": lambda flag: b"\x80\x02\x84\xf0\x00\x00\x00(V" + flag.encode() + b"\ntR.",
    "STACK_GLOBAL": lambda flag: b"\x80\x04" + named("os", "mkdir") + text(flag) + b"\x85R.",
    "STACK_GLOBAL from the memo": lambda flag: (
        b"\x80\x04" + text("os") + b"\x94" + text("mkdir") + b"\x94"
        + text("torch._utils") + text("_rebuild_tensor_v2") + b"00h\x00h\x01\x93"
        + text(flag) + b"\x85R."
    ),
    "STACK_GLOBAL of no text": lambda flag: b"\x80\x04N" + text("mkdir") + b"\x93.",
    "a dotted name": lambda flag: (
        b"\x80\x04" + named("collections", "OrderedDict.__init__.__globals__") + END
    ),
    "a name with a blank": lambda flag: b"\x80\x04" + named("collections OrderedDict", "") + END,
    "eval": lambda flag: (
        b"cbuiltins\neval\n(V__import__('os').mkdir('" + flag.encode() + b"')\ntR."
    ),
    "__builtin__ eval": lambda flag: (
        b"c__builtin__\neval\n(V__import__('os').mkdir('" + flag.encode() + b"')\ntR."
    ),
    "getattr": lambda flag: b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nV__init__\ntR.",
    "partial": lambda flag: b"cfunctools\npartial\n(cos\nmkdir\nV" + flag.encode() + b"\ntR.",
    "_reconstructor": lambda flag: b"ccopy_reg\n_reconstructor\n(c__builtin__\nset\nNNtR.",
    "torch.load": lambda flag: b"ctorch\nload\n(V" + flag.encode() + b"\ntR.",
    "torch.hub": lambda flag: b"ctorch.hub\nload\n(V" + flag.encode() + b"\ntR.",
    "_import_dotted_name": lambda flag: b"ctorch._utils\n_import_dotted_name\n(Vos.mkdir\ntR.",
    "numpy scalar": lambda flag: b"cnumpy.core.multiarray\nscalar\n(NNtR.",
    "PERSID": lambda flag: b"P" + flag.encode() + b"\n.",
    "BINPERSID of a text": lambda flag: b"V" + flag.encode() + b"\nQ.",
    "BINPERSID of a callable": lambda flag: b"(Vstorage\ncos\nmkdir\nV0\nVcpu\nI1\ntQ.",
    "BINPERSID of nonsense": lambda flag: torch_zip(b"(Vstorage\nNV0\nVcpu\nI1\ntQ."),
    "BUILD of a class": lambda flag: b"ccollections\nOrderedDict\n}V__new__\ncos\nmkdir\nsb.",
    "BUILD of a function": lambda flag: (
        b"ctorch._utils\n_rebuild_tensor_v2\n}V__code__\nNsb" + call(flag) + END
    ),
    "BUILD of a list": lambda flag: b"]}V__class__\nNsb.",
    "code in the attributes": lambda flag: (
        b"ccollections\nOrderedDict\n)R}V__reduce__\n" + call(flag) + b"sb."
    ),
    "code as a hook": lambda flag: tensor_call(b"(NI0\n(t(tI00\n" + call(flag) + b"t"),
    "REDUCE of a text": lambda flag: b"Vx\n)R.",
    "REDUCE of a storage kind": lambda flag: b"ctorch\nFloatStorage\n(I9\ntR.",
    "REDUCE without a tuple": lambda flag: b"ccollections\nOrderedDict\nNR.",
    "a tensor of nothing": lambda flag: tensor_call(b"(t"),
    "a tensor of a function": lambda flag: tensor_call(b"(cos\nmkdir\nI0\n(t(tI00\n}t"),
    "a parameter of a text": lambda flag: tensor_call(
        b"(Vx\nI00\n}t", b"torch._utils\n_rebuild_parameter"
    ),
    "a sparse tensor": lambda flag: tensor_call(b"(t", b"torch._utils\n_rebuild_sparse_tensor"),
    "a set as a key": lambda flag: b"\x80\x04}\x8fNs.",
    "a set of lists": lambda flag: b"\x80\x04\x8f(]\x90.",
    "items of a number": lambda flag: b"I1\nVa\nVb\ns.",
    "an odd number of items": lambda flag: b"}(Va\nu.",
    "pop of nothing": lambda flag: b"000" + call(flag) + END,
    "a mark too few": lambda flag: b"t.",
    "an empty memo": lambda flag: b"\x80\x02h\x07.",
    "no end": lambda flag: b"}",
    "NEXT_BUFFER": lambda flag: b"\x80\x05\x97.",
    "READONLY_BUFFER": lambda flag: b"\x80\x05C\x01x\x98.",
    "BYTEARRAY8 of 2**40": lambda flag: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + END,
    "BINBYTES8 of 2**40": lambda flag: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + END,
    "BINUNICODE8 of 2**62": lambda flag: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + END,
    "LONG4 of -1": lambda flag: b"\x80\x02\x8b" + struct.pack("<i", -1) + END,
    "LONG4 of 2**31": lambda flag: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + END,
    "a number of 800 bits": lambda flag: b"\x80\x02\x8a\x64" + b"\x7f" * 100 + END,
    "LONG of 9,999 digits": lambda flag: b"L" + b"9" * 9999 + b"L\n.",
    "FRAME of 2**62": lambda flag: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + call(flag) + END,
    "a memo index of 2**32": lambda flag: b"\x80\x02}r\xff\xff\xff\xff0" + call(flag) + END,
    "mixed protocols": lambda flag: b"\x80\x05(dp0\n\x80\x00" + call(flag) + b"\x94\x80\x02.",
    "protocol 255": lambda flag: b"\x80\xff" + call(flag) + END,
    "a byte before": lambda flag: b"\xef\xbb\xbf" + call(flag) + END,
    "an unknown instruction": lambda flag: b"\xff" + call(flag) + END,
    "code behind the first pickle": lambda flag: EMPTY + call(flag) + END,
    "code behind a broken text": lambda flag: b"X\x02\x00\x00\x00\xff\xff0" + call(flag) + END,
    "a tar": in_tar,
    "magic number": lambda flag: stream(magic=call(flag) + END),
    "second pickle": lambda flag: stream(protocol=call(flag) + END),
    "third pickle": lambda flag: stream(system=call(flag) + END),
    "fourth pickle": lambda flag: stream(content=call(flag) + END),
    "fifth pickle": lambda flag: stream(keys=call(flag) + END),
    "keys of nothing": lambda flag: stream(keys=pickle.dumps(["0", "1"], 2)),
    "keys of lists": lambda flag: stream(keys=pickle.dumps([[], {}], 2)),
    "code in data.pkl": lambda flag: torch_zip(call(flag) + END),
    "hexadecimal INT in data.pkl": lambda flag: torch_zip(b"I0x1\n0" + call(flag) + END),
    "DATA.PKL": lambda flag: torch_zip(call(flag) + END, name="a/DATA.PKL"),
    "DATA.PKL of TorchScript": lambda flag: torch_zip(
        call(flag) + END, ("a/constants.pkl", b")."), ("a/code/x.py", b""), name="a/DATA.PKL"
    ),
    "constants.pkl": lambda flag: torch_zip(EMPTY, ("a/constants.pkl", call(flag) + END)),
    "Constants.PKL": lambda flag: torch_zip(EMPTY, ("a/Constants.PKL", call(flag) + END)),
    "code/": lambda flag: torch_zip(EMPTY, ("a/code/__torch__.py", b"import os")),
    "a second data.pkl": lambda flag: torch_zip(EMPTY, ("a/data.pkl", call(flag) + END)),
    "a second Data.pkl": lambda flag: torch_zip(EMPTY, ("a/Data.pkl", call(flag) + END)),
    "two folders": lambda flag: torch_zip(EMPTY, ("b/data.pkl", call(flag) + END)),
    "no data.pkl": lambda flag: torch_zip(call(flag) + END, name="a/extra.pkl"),
    "a zip in a zip": lambda flag: torch_zip(torch_zip(call(flag) + END)),
    "code as byte order": lambda flag: torch_zip(EMPTY, ("a/byteorder", call(flag) + END)),
    "bytes before": lambda flag: b"PK\x03\x04" + torch_zip(EMPTY),
    "two zips": lambda flag: torch_zip(call(flag) + END) + torch_zip(EMPTY),
    "bytes behind": lambda flag: torch_zip(EMPTY) + call(flag) + END,
    "..": lambda flag: torch_zip(EMPTY, ("a/../../b", b"")),
    "an absolute name": lambda flag: archive([("/data.pkl", EMPTY)]),
    "another name in front": lambda flag: patched(
        torch_zip(EMPTY), b"a/version", b"a/versioN"
    ).replace(b"a/versioN", b"a/version", 1),
    "encrypted": lambda flag: patched(
        torch_zip(EMPTY), b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"
    ),
    "bzip2": lambda flag: archive([("a/data.pkl", EMPTY)], zipfile.ZIP_BZIP2),
    "overlapping members": lambda flag: overlapping(),
    "a directory of 2**32 bytes": lambda flag: (
        torch_zip(EMPTY)[:-22] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 2**32 - 2, 0, 0)
    ),
}  # fmt: skip


def _many_members() -> bytes:
    return archive([(f"a/{number}", b"") for number in range(100_001)])


def _doubled_tuples(depth: int) -> bytes:
    """Return a dictionary whose key has 2**depth items once it is hashed."""
    return b"\x80\x02}(K\x01\x85" + b"q\x00h\x00\x86" * depth + b"Nu."


BOMBS: dict[str, Maker] = {
    "zip bomb": lambda flag: archive(
        [("a/data.pkl", b"\x80\x02X" + struct.pack("<L", 300 << 20) + b"x" * (300 << 20) + END)],
        zipfile.ZIP_DEFLATED,
    ),
    "tuples nested as a key": lambda flag: b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"Ns.",
    "tuples doubled as a key": lambda flag: _doubled_tuples(60),
    "lists doubled": lambda flag: b"\x80\x02]" + b"2\x86" * 200_000 + END,
    "lists nested": lambda flag: b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + END,
    "marks": lambda flag: b"(" * 2_500_000 + END,
    "sets": lambda flag: b"\x80\x04" + b"\x8f" * 2_500_000 + END,
    "many members": lambda flag: _many_members(),
    "a long text without its end": lambda flag: b"V" + b"x" * (40 << 20),
    "a tensor repeated": lambda flag: torch_zip(
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
        b"K\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89}tRs.",
        ("a/data/0", bytes(4)),
    ),
}  # fmt: skip
