from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from mtl_export.checkpoint.hashing import sha256_of_file, sha256_of_files


def files(folder: Path) -> list[Path]:
    """Write three files whose sizes straddle the block size, out of name order."""
    contents = {"b.bin": b"x" * (2**20 + 7), "a.bin": b"", "c.bin": b"\x00\xff" * 1000}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def shell(command: str, folder: Path) -> str:
    """Return the first word that ``command`` prints in ``folder``."""
    run = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.split()[0]


def test_one_file_hashes_as_sha256sum(tmp_path: Path) -> None:
    """The hash of one file is what sha256sum prints."""
    for path in files(tmp_path):
        assert sha256_of_file(path) == shell(f"sha256sum {path.name}", tmp_path)
        assert sha256_of_files([path]) == sha256_of_file(path)


def test_several_files_hash_as_sha256sum_of_the_list(tmp_path: Path) -> None:
    """The hash of several is that of sha256sum's output, in whatever order they are given."""
    paths = files(tmp_path)
    expected = shell("sha256sum $(ls | sort) | sha256sum", tmp_path)
    assert sha256_of_files(paths) == expected
    assert sha256_of_files(paths[::-1]) == expected


def test_python_without_file_digest_hashes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.10 takes another path to the same hash."""
    paths = files(tmp_path)
    expected = [sha256_of_file(path) for path in paths]
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert [sha256_of_file(path) for path in paths] == expected
