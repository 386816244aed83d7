import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mtl_export.bundle import staging
from mtl_export.bundle.manifest import MANIFEST_FILE, damage, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.errors import IntegrityError, OutputError
from tests.bundle.outputs import OTHER, RECIPE, ROOT, tree, write


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the atomic exchange, and with the two renames other systems get."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    return str(request.param)


def test_a_finished_folder_is_in_place_with_its_manifest(tmp_path: Path) -> None:
    """The result lies at the target, is listed, and nothing else is left beside it."""
    target = tmp_path / "deep" / "merged"
    assert write(target, "new")
    assert tree(tmp_path) == {"deep/merged/model": "new"}
    manifest = read_manifest(target)
    assert manifest is not None
    assert manifest.recipe == RECIPE
    assert not damage(target, manifest)


def test_the_same_recipe_again_does_nothing(tmp_path: Path) -> None:
    """A repeated command is up to date and touches no byte."""
    write(tmp_path / "out", "new")
    before = (tmp_path / "out" / "model").stat()
    assert not write(tmp_path / "out", "never written")
    after = (tmp_path / "out" / "model").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_recipe_needs_force(tmp_path: Path, swap: str) -> None:
    """A different result is refused by name of what changed, and replaced with force."""
    write(tmp_path / "out", "old", name="old_model")
    with pytest.raises(OutputError, match=r"dtype was 'fp32', is 'fp16'.*--force"):
        write(tmp_path / "out", "new", recipe=OTHER)
    assert tree(tmp_path) == {"out/old_model": "old"}
    assert write(tmp_path / "out", "new", recipe=OTHER, force=True)
    assert tree(tmp_path) == {"out/model": "new"}


def test_a_damaged_result_is_not_up_to_date(tmp_path: Path) -> None:
    """A file that was altered since makes the folder differ."""
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "model").write_text("odd")
    with pytest.raises(OutputError, match="model has changed"):
        write(tmp_path / "out", "new")
    assert write(tmp_path / "out", "new", force=True)
    assert tree(tmp_path) == {"out/model": "new"}


def test_files_of_others_survive_a_replacement(tmp_path: Path, swap: str) -> None:
    """Nested outputs, plain files, links and empty folders are carried over; old files go."""
    out = tmp_path / "onnx"
    write(out, "single graph", name="model.onnx")
    write(out / "spam", "per task", name="model.onnx")
    (out / "README").write_text("mine")
    (out / "link").symlink_to("README")
    (out / "empty").mkdir()
    inode = (out / "spam" / "model.onnx").stat().st_ino
    assert write(out, "new graph", recipe=OTHER, name="model2.onnx", force=True)
    assert tree(tmp_path) == {
        "onnx/README": "mine",
        "onnx/link": "mine",
        "onnx/model2.onnx": "new graph",
        "onnx/spam/model.onnx": "per task",
    }
    assert (out / "empty").is_dir()
    assert os.readlink(out / "link") == "README"
    assert (out / "spam" / "model.onnx").stat().st_ino == inode
    assert not write(out / "spam", "", name="model.onnx")


def test_copies_take_over_where_links_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links, the files of others are copied."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "README").write_text("mine")
    assert write(tmp_path / "out", "new", recipe=OTHER, force=True)
    assert tree(tmp_path) == {"out/README": "mine", "out/model": "new"}


def test_old_files_in_a_subfolder_go_with_it(tmp_path: Path) -> None:
    """A subfolder that held only old files is not left behind empty."""
    with output_folder(tmp_path / "out", recipe=RECIPE) as plan:
        (plan.folder / "sub").mkdir()
        (plan.folder / "sub" / "old").write_text("old")
    write(tmp_path / "out", "new", recipe=OTHER, force=True)
    assert not (tmp_path / "out" / "sub").exists()


def test_a_folder_of_nested_outputs_needs_no_force(tmp_path: Path) -> None:
    """The single graph may be added where per-task graphs already lie."""
    write(tmp_path / "onnx" / "spam", "per task")
    assert write(tmp_path / "onnx", "single graph")
    assert tree(tmp_path) == {"onnx/model": "single graph", "onnx/spam/model": "per task"}


@pytest.mark.parametrize("foreign", ["notes.txt", "photos/cat.jpg"])
def test_a_folder_of_others_needs_force(tmp_path: Path, foreign: str) -> None:
    """Files mtl-export did not write are named, and kept even with force."""
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(OutputError, match=f"files of others: {foreign.partition('/')[0]}"):
        write(tmp_path / "out", "new")
    assert tree(tmp_path) == {f"out/{foreign}": "mine"}
    assert write(tmp_path / "out", "new", force=True)
    assert tree(tmp_path) == {f"out/{foreign}": "mine", "out/model": "new"}


def test_an_empty_folder_needs_no_force(tmp_path: Path) -> None:
    """An empty target is as good as none."""
    (tmp_path / "out").mkdir()
    assert write(tmp_path / "out", "new")


def test_a_strangers_folder_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    """A folder that has the name of a new file stops even force."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="a folder that mtl-export did not write"):
        write(tmp_path / "out", "new", force=True)
    assert tree(tmp_path) == {"out/model/mine": "mine"}


def test_a_tampered_manifest_needs_force(tmp_path: Path) -> None:
    """A manifest that cannot be read decides nothing."""
    write(tmp_path / "out", "old")
    (tmp_path / "out" / MANIFEST_FILE).write_text("{}")
    with pytest.raises(IntegrityError):
        write(tmp_path / "out", "new")
    assert write(tmp_path / "out", "new", force=True)
    assert tree(tmp_path) == {"out/model": "new"}


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_an_error_in_the_block_changes_nothing(tmp_path: Path, there: bool) -> None:
    """The old result or none is what remains, and no temporary folder."""
    if there:
        write(tmp_path / "out", "old")
    before = tree(tmp_path)

    def fail_half_way() -> None:
        with output_folder(tmp_path / "out", recipe=OTHER, force=True) as plan:
            (plan.folder / "model").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] * there


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    """The folder a link points at is replaced, not the link."""
    write(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to("real")
    write(tmp_path / "out", "new", recipe=OTHER, force=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model").read_text() == "new"


def test_a_file_at_the_target_is_refused(tmp_path: Path) -> None:
    """A file is not replaced by a folder, not even with force."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="it is a file"):
        write(tmp_path / "out", "new", force=True)


def test_a_file_in_the_path_is_refused(tmp_path: Path) -> None:
    """A target below a file is a usage error."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="part of its path is a file"):
        write(tmp_path / "file" / "deep" / "out", "new")


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder the shell stands in, or one above it, is not swapped away."""
    monkeypatch.chdir(tmp_path)
    for target in (Path(), tmp_path.parent):
        with pytest.raises(OutputError, match="current folder"):
            write(target, "new", force=True)


def test_little_space_is_told_in_kilobytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free and what is needed do not both read 0.0 MB."""
    usage = type("Usage", (), {"free": 4096})
    monkeypatch.setattr("mtl_export.bundle.output.shutil.disk_usage", lambda folder: usage)
    with (
        pytest.raises(OutputError, match=r"4\.1 kB are free.*about 23\.0 kB") as raised,
        output_folder(tmp_path / "o", recipe=RECIPE, estimated_size_bytes=23_000),
    ):
        pass
    assert "MB" not in str(raised.value)


def test_space_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    """An estimate above the free space is refused before anything is made."""
    with (
        pytest.raises(OutputError, match="MB are free"),
        output_folder(tmp_path / "a" / "out", recipe=RECIPE, estimated_size_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_a_closed_folder_is_an_output_error() -> None:
    """A parent without write permission gives one clear error."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        parent.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(OutputError, match="it cannot be written"):
                write(parent / "out", "new")
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            parent.chmod(0o755)
        assert not list(parent.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a 256 KiB file system, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_is_an_output_error(tiny_disk: Path) -> None:
    """A really full disk ends in one error, the old result, and no rest."""
    write(tiny_disk / "out", "old")
    before = tree(tiny_disk)
    with pytest.raises(OutputError, match="the disk or its quota is full"):
        write(tiny_disk / "out", "x" * 400_000, recipe=OTHER, force=True)
    assert tree(tiny_disk) == before


def test_a_mount_point_is_refused(tiny_disk: Path) -> None:
    """A mount point cannot be renamed; the message says where to write instead."""
    with pytest.raises(OutputError, match=r"mount point.*--output .*disk/export"):
        write(tiny_disk, "new")


FILLERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_bytes(bytes(400_000)),
    "numpy": lambda path: np.zeros(400_000, np.uint8).tofile(path),
    "safetensors": lambda path: save_file({"x": np.zeros(400_000, np.uint8)}, str(path)),
}


@pytest.mark.parametrize("library", FILLERS)
def test_every_library_that_writes_is_understood(tmp_path: Path, library: str) -> None:
    """A write that the system refuses is an output error, whoever was writing."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.bundle.test_output import FILLERS, RECIPE\n"
        "from mtl_export.bundle.output import output_folder\n"
        "from mtl_export.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with output_folder(Path(sys.argv[1]), recipe=RECIPE) as plan:\n"
        "        FILLERS[sys.argv[2]](plan.folder / 'model')\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), library],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "nothing was changed there" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_failing_source_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    """An error about another file passes through untouched."""
    with (
        pytest.raises(PermissionError),
        output_folder(tmp_path / "out", recipe=RECIPE),
    ):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "checkpoint"))


def test_a_writers_own_complaint_names_the_target(tmp_path: Path) -> None:
    """A stage that cannot write speaks of a temporary folder; the user never typed that."""

    def refuse() -> None:
        with output_folder(tmp_path / "out", recipe=RECIPE) as plan:
            raise OutputError(f"{plan.folder / 'model'}: no room")

    with pytest.raises(OutputError, match=r"^/.*/out: no room\.$"):
        refuse()


def test_the_same_result_has_the_same_bytes(tmp_path: Path) -> None:
    """Two folders from one recipe are equal byte by byte, manifests included."""
    write(tmp_path / "a", "same")
    write(tmp_path / "b", "same")
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")
    assert (tmp_path / "a" / MANIFEST_FILE).read_bytes() == (
        tmp_path / "b" / MANIFEST_FILE
    ).read_bytes()


def test_too_many_open_files_are_told_and_nothing_is_left(tmp_path: Path) -> None:
    """It is the limit that must be raised, and the folder beside the target is removed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []

    def open_all() -> None:
        with output_folder(tmp_path / "out", recipe=RECIPE) as plan:
            (plan.folder / "deep").mkdir()
            (plan.folder / "deep" / "model").touch()
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            while True:
                opened.append(os.open(plan.folder / "deep" / "model", os.O_RDONLY))

    try:
        with pytest.raises(OutputError, match=r"too many files are open.*Raise ulimit -n"):
            open_all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)
    assert list(tmp_path.iterdir()) == []
