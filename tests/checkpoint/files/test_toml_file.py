from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.checkpoint.files.toml_file import MOST_BYTES, read_toml
from mtl_export.errors import UsageError


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a", "not TOML"),
        (b"\xff", "not UTF-8"),
        (b"a = " + b"[" * 5_000, "nested more than 100 deep"),
        (b"a = " + b"{a=" * 5_000, "nested more than 100 deep"),
        (b"a." * 3_000 + b"b = 1", "nested more than 100 deep"),
        (b"a = " + b"9" * 5_000, "4300 digits"),
        (b"a = 0x" + b"f" * 9_000, "thousands of digits"),
        (b'a = "\\ud800"', "not TOML"),
        (b"a = 2020-13-01", "not TOML"),
        (b"#" * (MOST_BYTES + 1), "bytes, more than"),
    ],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    """Every failure is a UsageError that names the file."""
    path = tmp_path / "some.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=found) as caught:
        read_toml(path, "--config")
    assert caught.value.problem.startswith(str(path))


def test_a_table_is_read(tmp_path: Path) -> None:
    """With the line ends of either system, and nothing in an empty file."""
    path = tmp_path / "some.toml"
    path.write_bytes(b"a = 1\r\n[b]\r\nc = 'x'\r\n")
    assert read_toml(path, "--config") == {"a": 1, "b": {"c": "x"}}
    path.write_bytes(b"")
    assert read_toml(path, "--config") == {}
    with pytest.raises(UsageError, match="no regular file"):
        read_toml(tmp_path, "--config")
