from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.files.npz_file import read_npz
from mtl_export.errors import CalibrationError, IntegrityError, UsageError

PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def npy(header: str, values: bytes = bytes(8), version: int = 1) -> bytes:
    """Return an array with this header."""
    text = header.encode("latin-1")
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + values


def archive(path: Path, **members: bytes) -> Path:
    """Write members as a zip file."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    "array",
    [
        np.array([None]), np.array(["x"]), np.array([b"x"]), np.zeros(2, "M8[s]"),
        np.zeros(2, "m8[s]"), np.zeros(2, [("a", "i4")]), np.zeros(2, complex),
        np.zeros((1,) * 33), np.zeros(2, "V2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, array: Any) -> None:
    """Objects would be unpickled; the others have no place in a model."""
    np.savez(tmp_path / "a.npz", values=array)
    with pytest.raises(CalibrationError, match="'values'"):
        read_npz(tmp_path / "a.npz", error=CalibrationError, fix="Fix it")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{",
        npy(PLAIN, bytes(7)), npy(PLAIN, version=3),
        npy("{"), npy("[]"), npy("{}"),
        npy("(" * 5_000), npy("x" * 20_000), npy("\0"), npy("9" * 9_000),
        npy(PLAIN.replace("(2,)", "(-2,)")), npy(PLAIN.replace("(2,)", "2")),
        npy(PLAIN.replace("(2,)", "(True, 2)")), npy(PLAIN.replace("(2,)", "(0, 10**30)")),
        npy(PLAIN.replace("(2,)", f"(0, {2**63})")),
        npy(PLAIN.replace("(2,)", f"(0, {2**62}, 9)")), npy(PLAIN.replace("(2,)", f"({2**62},)")),
        npy(PLAIN.replace("'<f4'", "'<f3'")), npy(PLAIN.replace("'<f4'", "'<U999999999'")),
        npy(PLAIN.replace("'<f4'", "None")), npy(PLAIN.replace("'<f4'", "['<f4']")),
    ],
)  # fmt: skip
def test_a_broken_member_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever stands where the header should."""
    with pytest.raises(CalibrationError, match="'x'"):
        read_npz(archive(tmp_path / "a.npz", x=content), error=CalibrationError, fix="Fix it")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "damaged"), (b"PK\x03\x04 and no more", "damaged"), (b"text", "damaged"),
        (npy(PLAIN), r"one array \(.npy\), not an archive"),
    ],
)  # fmt: skip
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    """An array that was renamed is said to be one."""
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=found):
        read_npz(path, error=CalibrationError, fix="Fix it")


def test_every_cut_and_flipped_byte_ends_in_one_error(tmp_path: Path) -> None:
    """A damaged download is never a bug; where a flip changes nothing that counts, it is read."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(5), y=np.ones((2, 3), np.float32))
    whole, path, refused = buffer.getvalue(), tmp_path / "a.npz", 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        for content in (whole[:place], bytes(flipped)):
            path.write_bytes(content)
            try:
                read_npz(path, error=CalibrationError, fix="Fix it")
            except (CalibrationError, IntegrityError):
                refused += 1
    assert refused > 1.5 * len(whole)


def test_a_bomb_is_refused_before_it_is_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory says how large it is."""
    monkeypatch.setattr("mtl_export.checkpoint.files.npz_file.MOST_INFLATED_BYTES", 2**20)
    path = archive(tmp_path / "a.npz", x=npy(PLAIN))
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("x.npy", "w") as member,
    ):
        for _ in range(2):
            member.write(bytes(2**20))
    with pytest.raises(CalibrationError, match="bytes when inflated"):
        read_npz(path, error=CalibrationError, fix="Fix it")


def test_arrays_of_every_number_are_read(tmp_path: Path) -> None:
    """Values, shapes and dtypes are numpy's own, in native order, and may be written to."""
    arrays: dict[str, Any] = {
        str(dtype): np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("?", "i1", "u8", "<i8", ">i4", "<f2", ">f4", "f8")
    }
    arrays |= {
        "fortran": np.asfortranarray(arrays["f8"]),
        "none": np.zeros((0, 4)),
        "0d": np.array(3),
    }
    np.savez(tmp_path / "a.npz", **arrays, text=np.array("grün"))
    text, found = read_npz(tmp_path / "a.npz", "text", fix="Fix it")
    assert text == "grün"
    assert found.keys() == arrays.keys()
    for name, values in found.items():
        assert values.dtype == arrays[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(values, arrays[name])
        assert values.flags.writeable


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, nothing, and a name that is too long."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CalibrationError):
            read_npz(path, error=CalibrationError, fix="Fix it")
    with pytest.raises(UsageError, match="the system refused it"):
        read_npz(tmp_path / ("a" * 300), fix="Fix it")
