import hashlib
import json
from pathlib import Path

import pytest

from mtl_export.bundle.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Recipe,
    add_to_manifest,
    damage,
    read_manifest,
    write_manifest,
)
from mtl_export.errors import IntegrityError

RECIPE = Recipe("merge", {"dtype": "fp16", "tasks": ["a", "b"]}, {"base_sha256": "ab"}, "1.2")


def sealed(**changes: object) -> str:
    """Return the text of a manifest with these values, its own hash made to fit."""
    document: dict[str, object] = {
        "schema": "mtl-export.output/1", "tool_version": "", "command": "", "options": {},
        "sources": {}, "files": {}, **changes,
    }  # fmt: skip
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    return json.dumps({**document, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_a_written_manifest_reads_back_unchanged(tmp_path: Path) -> None:
    """What is written is what is read, nested files included."""
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more").write_bytes(b"5")
    written = write_manifest(tmp_path, RECIPE)
    assert read_manifest(tmp_path) == written
    assert list(written.files) == ["sub/more", "weights"]
    assert written.files["weights"].sha256 == hashlib.sha256(b"1234").hexdigest()
    assert written.files["weights"].size_bytes == 4


def test_the_document_has_the_documented_keys_and_nothing_of_this_machine(tmp_path: Path) -> None:
    """The file holds the schema's keys, no absolute path and the same bytes every time."""
    (tmp_path / "weights").write_bytes(b"1234")
    write_manifest(tmp_path, RECIPE)
    first = (tmp_path / MANIFEST_FILE).read_bytes()
    write_manifest(tmp_path, RECIPE)
    assert (tmp_path / MANIFEST_FILE).read_bytes() == first
    document = json.loads(first)
    assert sorted(document) == [
        "command", "files", "manifest_sha256", "options", "schema", "sources", "tool_version",
    ]  # fmt: skip
    assert document["schema"] == "mtl-export.output/1"
    assert str(tmp_path).encode() not in first


def test_outputs_nested_inside_are_not_listed(tmp_path: Path) -> None:
    """A folder with its own manifest is another output, not a part of this one."""
    nested = tmp_path / "task"
    nested.mkdir()
    (nested / "model").write_bytes(b"1")
    write_manifest(nested, RECIPE)
    assert not write_manifest(tmp_path, RECIPE).files


def test_damage_names_every_file_that_changed(tmp_path: Path) -> None:
    """Missing, resized and altered files are all told."""
    for name in ("gone", "longer", "other", "same"):
        (tmp_path / name).write_bytes(b"1234")
    manifest = write_manifest(tmp_path, RECIPE)
    (tmp_path / "gone").unlink()
    (tmp_path / "longer").write_bytes(b"12345")
    (tmp_path / "other").write_bytes(b"1235")
    assert damage(tmp_path, manifest) == [
        "gone is missing", "longer has 5 bytes, not 4", "other has changed",
    ]  # fmt: skip


def test_a_link_out_of_the_folder_is_damage(tmp_path: Path) -> None:
    """The file elsewhere may have the right bytes now; links inside, and the hub cache's, may."""
    folder, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1",
        tmp_path / "models--a--b" / "blobs",
    )
    folder.mkdir(parents=True)
    blobs.mkdir()
    (folder / "weights").write_bytes(b"1234")
    manifest = write_manifest(folder, RECIPE)
    for place, problems in (
        (folder / "other", []), (blobs / "abc", []),
        (tmp_path / "elsewhere", ["weights is a link to a file elsewhere"]),
    ):  # fmt: skip
        place.write_bytes(b"1234")
        (folder / "weights").unlink()
        (folder / "weights").symlink_to(place)
        assert damage(folder, manifest) == problems


def test_files_beside_the_folder_are_listed_apart(tmp_path: Path) -> None:
    """What a folder needs from beside it is checked with its own files, and kept by edits."""
    folder = tmp_path / "task"
    folder.mkdir()
    (tmp_path / "weights").write_bytes(b"1234")
    entry = FileEntry(hashlib.sha256(b"1234").hexdigest(), 4)
    written = write_manifest(folder, RECIPE, beside={"../weights": entry})
    assert read_manifest(folder) == written
    (folder / "more").touch()
    assert add_to_manifest(folder, "more").beside == {"../weights": entry}
    assert not damage(folder, written)
    (tmp_path / "weights").unlink()
    assert damage(folder, written) == ["../weights is missing"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dtype": "fp16"', '"dtype": "fp32"'), ('"ab"', '"ba"'), ('"merge"', '"onnx"'),
        ('"size_bytes": 4', '"size_bytes": 5'), ('"1.2"', '"1.3"'), ('"b"', '"B"'),
    ],
)  # fmt: skip
def test_an_edit_of_any_value_is_told(tmp_path: Path, old: str, new: str) -> None:
    """Options, sources, files, command and version are all covered by the manifest's own hash."""
    (tmp_path / "weights").write_bytes(b"1234")
    write_manifest(tmp_path, RECIPE)
    text = (tmp_path / MANIFEST_FILE).read_text()
    assert text.count(old) == 1
    (tmp_path / MANIFEST_FILE).write_text(text.replace(old, new))
    with pytest.raises(IntegrityError, match="manifest_sha256 is not that of the rest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        sealed(schema="mtl-export.output/2"),
        sealed(beside={"../../etc/passwd": {"sha256": "", "size_bytes": 0}}),
        sealed(files={"../../etc/passwd": {"sha256": "", "size_bytes": 0}}),
    ],
)  # fmt: skip
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str) -> None:
    """A manifest that is not ours, or that points outside its folder, is an integrity error."""
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(IntegrityError, match=r"mtl-export\.json: .* run again with --force"):
        read_manifest(tmp_path)


def test_differences_say_what_changed() -> None:
    """Every option and source that changed is named with both values."""
    other = Recipe("merge", {"dtype": "fp32", "tasks": ["a", "b"]}, {"base_sha256": "ab"}, "1.1")
    assert RECIPE.differences(other) == [
        "dtype was 'fp32', is 'fp16'", "tool_version was '1.1', is '1.2'",
    ]  # fmt: skip
    assert not RECIPE.differences(RECIPE)
