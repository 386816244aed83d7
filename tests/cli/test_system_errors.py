"""Files and streams that the system refuses end in one message and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_export_cli.system_errors import refusal_of
from tests.cli.conftest import Run

ENTRY = "from mtl_export_cli.main import main; main()"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "chmod"),
        (errno.EIO, "Look at the disk"),
        (errno.ENAMETOOLONG, "Correct the path"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_a_file_that_the_system_refuses_is_told(code: int, said: str) -> None:
    """The file, the system's reason and what to do."""
    refusal = refusal_of(OSError(code, os.strerror(code), "base/config.json"))
    assert refusal is not None
    assert refusal.problem.startswith("base/config.json")
    assert os.strerror(code) in refusal.problem
    assert said in refusal.fix


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no file at all"),
        PermissionError(errno.EACCES, "Permission denied"),  # nobody says of what
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    ],
)
def test_other_errors_stay_bugs(error: Exception) -> None:
    """What names no file, or may be a slip of ours, keeps its traceback."""
    assert refusal_of(error) is None


@pytest.fixture
def refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the system refuse the files named in the list: root, who may test, may read all."""
    names: list[str] = []
    original = Path.open

    def guarded(path: Path, *args: object, **named: object) -> object:
        if path.resolve() in [(exported / name).resolve() for name in names]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", guarded)
    return names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base/config.json", ["inspect"]),
        ("base/config.json", ["merge", "--task", "spam"]),
        ("adapter/adapter_config.json", ["inspect"]),
        ("adapter/adapter_model.safetensors", ["inspect"]),
        ("out/onnx/model.onnx", ["verify", "out"]),
        ("out/onnx/mtl-export.json", ["verify", "out"]),
    ],
)
def test_a_file_of_another_user_is_no_bug(
    run: Run, refused: list[str], name: str, words: list[str]
) -> None:
    """Exit 2 with its name, for people and for programs."""
    refused.append(name)
    outcome = run(*words)
    assert outcome.code == 2, outcome.stderr
    assert f"{name}: the system refused it (Permission denied)" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert run(*words, "--json").json["error"]["error"] == "UsageError"


def test_a_parity_report_tells_it_too(run: Run, refused: list[str]) -> None:
    """The file in the report is that of the message."""
    refused.append("base/config.json")
    assert run("parity", "--report", "p.md").code == 2
    assert "the system refused it" in Path("p.md").read_text()


def shell(folder: Path, line: str, *, unbuffered: str) -> subprocess.CompletedProcess[str]:
    """Run ``line``, in which $M is mtl-export."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": unbuffered,
    }
    words = ["sh", "-c", line.replace("$M", f'{sys.executable} -c "{ENTRY}"')]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "line", ["$M inspect > /dev/full", "$M merge --json > /dev/full", "$M --help > /dev/full"]
)
def test_a_full_stdout_is_said_in_one_line(project: Path, line: str, unbuffered: str) -> None:
    """Exit 2, whether Python buffers or not; no traceback, nothing of the interpreter's."""
    done = shell(project, line, unbuffered=unbuffered)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: stdout")
    assert "No space left on device" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stderr_has_an_exit_code(project: Path, unbuffered: str) -> None:
    """Nobody can be told, and still it is not code 1."""
    done = shell(project, "$M merge --task nope 2> /dev/full", unbuffered=unbuffered)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$M inspect >&-", 0),
        ("$M merge --task nope >&-", 2),
        ("$M merge --task nope 2>&-", 2),
        ("$M inspect <&- >&- 2>&-", 0),
    ],
)
def test_a_closed_stream_is_as_dev_null(project: Path, line: str, code: int) -> None:
    """The command does its work and has its own exit code."""
    done = shell(project, line, unbuffered="")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_of_errors_that_has_gone_is_no_bug(project: Path) -> None:
    """``mtl-export … 2>&1 >/dev/null | true`` ends as what the pipe kills."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "merge", "--task", "nope"],
        cwd=project, stdout=subprocess.PIPE, stderr=write_end, check=False,
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, done.stdout) == (141, b"")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libscipy_openblas.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 GB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_too_little_memory_is_no_bug(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whoever says it, wherever: exit 2, and which limit to raise."""

    def fail(*words: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("mtl_export.checkpoint.reader.open_checkpoint", fail)
    outcome = run("inspect", "-c", "adapter")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: memory: the system gives no more (")
    assert "Raise ulimit -v" in outcome.stderr


def test_a_small_address_space_is_told(project: Path) -> None:
    """The limit that people set, as a shell sets it."""
    done = shell(project, "ulimit -v 120000; $M merge --all-tasks", unbuffered="")
    assert "Traceback" not in done.stderr
    assert not (project / "out" / "merged").exists() or not list((project / "out").rglob("*.*"))


@pytest.mark.parametrize(
    "line", ["$M inspect 1</dev/null", "$M inspect --json 1</dev/null", "$M --help 1</dev/null"]
)
def test_a_stdout_that_is_only_to_be_read_is_said(project: Path, line: str) -> None:
    """It is not full, and still takes nothing."""
    done = shell(project, line, unbuffered="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: stdout: it cannot be written (Bad file descriptor)")


def test_names_that_are_no_text_are_printed(project: Path) -> None:
    """A path's bytes need not be UTF-8; tables and JSON hold them as escapes."""
    name = b"x\xff"
    os.makedirs(os.fsencode(project) + b"/" + name)
    line = "PYTHONIOENCODING=utf-8:strict $M merge --task spam -o x* --json"
    done = shell(project, line, unbuffered="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["path"] == "x\udcff/spam"


def test_a_circle_of_links_is_told(project: Path, run: Run) -> None:
    """As any path that the file system cannot follow."""
    (project / "loop").symlink_to("loop")
    for words in (("merge", "--task", "spam", "-o", "loop"), ("verify", "loop")):
        outcome = run(*words)
        assert outcome.code == 2, outcome.stderr
