"""What bad input gets: one message, the documented exit code, nothing half-written."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Run, files_below
from tests.factories import edit_config, edit_numbers, edit_tensors, toy_base

LAYER = "bert.encoder.layer.1.intermediate.dense"
ENTRY = "from mtl_export_cli.main import main; main()"


class Exploit:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        """Ask the unpickler to call os.system."""
        return os.system, ("touch /tmp/mtl-export-was-exploited",)


def nothing(project: Path) -> None:
    """Change nothing."""


def other_shapes(project: Path) -> None:
    """Put a wider base in place."""
    shutil.rmtree(project / "base")
    toy_base(project / "base", hidden=15)


def other_weights(project: Path) -> None:
    """Put a base of the same shapes in place."""
    shutil.rmtree(project / "base")
    toy_base(project / "base", seed=7)


def no_config(project: Path) -> None:
    """Leave weights without a config."""
    (project / "adapter" / "adapter_config.json").unlink()


def truncate(*parts: str) -> Callable[[Path], None]:
    """Return a change that cuts the last bytes off a file."""

    def change(project: Path) -> None:
        path = project.joinpath(*parts)
        path.write_bytes(path.read_bytes()[:-7])

    return change


def exploit(project: Path) -> None:
    """Replace the adapter by a pickle with code in it."""
    shutil.rmtree(project / "adapter")
    (project / "adapter").mkdir()
    (project / "adapter" / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Exploit()}))


def tensors(**changes: np.ndarray | None) -> Callable[[Path], None]:
    """Return a change of the adapter's tensors."""
    return lambda project: edit_tensors(project / "adapter", **changes)


def config(**changes: object) -> Callable[[Path], None]:
    """Return a change of the adapter's config."""
    return lambda project: edit_config(project / "adapter", **changes)


def numbers(**changes: float | None) -> Callable[[Path], None]:
    """Change or remove training numbers of the adapter's layers."""
    return lambda project: edit_numbers(project / "adapter", **changes)


NAN = np.full((3, 2), np.nan, np.float32)
NAN[0] = 0.5
MIXING = f"layers.{LAYER}.mixing".replace(".", "__")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        code: The exit code.
        said: What the message must hold: where, found, expected and what to do.
        change: What is done to the project.
        words: What is typed after ``--task spam``.
    """

    code: int
    said: tuple[str, ...]
    change: Callable[[Path], None] = nothing
    words: tuple[str, ...] = ()


CASES = {
    "wrong checkpoint path": Case(
        2, ("checkpoint nowhere", "no such file or folder", "--checkpoint"), words=("-c", "nowhere")
    ),
    "wrong base path": Case(
        2, ("base ./nowhere", "no such folder", "--base"), words=("-b", "./nowhere")
    ),
    "no such package": Case(
        2, ("no_such_package", "not installed", "pip install"),
        words=("-b", "package:no_such_package/model"),
    ),
    "base of other shapes": Case(
        5, ("base ./base", "'encoder.layer.0.attention.self.query.weight' is [15, 15]",
            "the adapter needs [12, 12]", "5 of 8 shown", "--base"), other_shapes,
    ),
    "base of other weights": Case(7, ("base ./base", "SHA-256", "--base"), other_weights),
    "truncated base": Case(5, ("base/model.safetensors", "not a whole safetensors file"),
                           truncate("base", "model.safetensors")),
    "unknown task": Case(
        2, ("task 'span'", "ads_rel, topic, spam", "Did you mean --task spam"),
        words=("--task", "span"),
    ),
    "no temperature": Case(5, ("temperature", "does not carry it", "--temperature"),
                           numbers(temperature=None)),
    "no alpha": Case(5, ("alpha", "does not carry it", "--alpha"), numbers(alpha=None)),
    "temperature of zero": Case(5, ("temperature", "above 0"), numbers(temperature=0.0)),
    "another alpha than the checkpoint's": Case(
        2, ("--alpha 6", "the checkpoint itself says 5", "Leave out --alpha"),
        words=("--alpha", "6"),
    ),
    "NaN in a tensor": Case(
        5, ("NaN or Inf", f"{LAYER}.mixing", "first at [1, 0]", "4 values"),
        tensors(**{MIXING: NAN}),
    ),
    "an extra tensor": Case(
        5, ("unknown 'bert.surplus'", "adapter_config.json"),
        tensors(bert__surplus=np.ones(3, np.float32)),
    ),
    "a missing tensor": Case(5, (f"missing 'layers.{LAYER}.mixing'",), tensors(**{MIXING: None})),
    "a tensor of another shape": Case(
        5, (f"{LAYER}: ", "mixing [4, 2]"),
        tensors(**{MIXING: np.ones((4, 2), np.float32)}),
    ),
    "truncated adapter": Case(
        5, ("adapter_model.safetensors", "not a whole safetensors file"),
        truncate("adapter", "adapter_model.safetensors"),
    ),
    "no config": Case(5, ("checkpoint adapter", "no known checkpoint", "adapter_config.json"),
                      no_config),
    "a family of the future": Case(
        5, ("mtl_lora_2", "no family of that name"), config(adapter_type="mtl_lora_2")
    ),
    "a pickle with code": Case(
        7, ("pytorch_model.bin", "system", "safetensors"), exploit
    ),
    "an output folder below a file": Case(
        2, ("a part of its path is a file", "--output"), words=("-o", "mtl-export.toml/x")
    ),
    "--task and --all-tasks": Case(2, ("both were given", "Leave one out"), words=("--all-tasks",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in ("merge", "onnx", "trt")
        for name in CASES
        # trt writes its graph first, and that to a place that is fine.
        if (command, name) != ("trt", "an output folder below a file")
    ],
)
def test_bad_input_gets_one_message_and_its_code(
    project: Path, run: Run, command: str, name: str
) -> None:
    """Where, found, expected and what to do; the exit code; no traceback, no new file."""
    case = CASES[name]
    case.change(project)
    before = files_below(project)
    task = () if "--task" in case.words else ("--task", "spam")
    outcome = run(command, *task, *case.words)
    assert outcome.code == case.code, outcome.stderr
    assert outcome.stdout == ""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in outcome.stderr
    for part in case.said:
        assert part in errors[0]
    assert files_below(project) == before
    assert not Path("/tmp/mtl-export-was-exploited").exists()


def test_existing_output_without_force_stays(project: Path, run: Run) -> None:
    """A result of another recipe is refused by name of what changed, and not touched."""
    assert run("merge", "--task", "spam").code == 0
    before = (project / "out/merged/spam/model.safetensors").read_bytes()
    outcome = run("merge", "--task", "spam", "--dtype", "bf16")
    assert outcome.code == 2
    assert "--force" in outcome.stderr
    assert (project / "out/merged/spam/model.safetensors").read_bytes() == before


def test_a_folder_of_others_stays(project: Path, run: Run) -> None:
    """Files that mtl-export did not write are not written among, either."""
    (project / "out/merged/spam").mkdir(parents=True)
    (project / "out/merged/spam/thesis.tex").write_text("mine")
    outcome = run("merge", "--task", "spam")
    assert outcome.code == 2
    assert "thesis.tex" in outcome.stderr
    assert files_below(project / "out") == ["merged/spam/thesis.tex"]


def test_a_tampered_manifest_exits_7(project: Path, run: Run) -> None:
    """A manifest that lies about its folder is an integrity error."""
    assert run("merge", "--task", "spam").code == 0
    (project / "out/merged/spam/mtl-export.json").write_text("{}")
    assert run("merge", "--task", "spam").code == 7


def test_an_unwritable_output_folder(project: Path, run: Run) -> None:
    """No permission is a usage error that names the folder."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        _open_to_all(project)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            outcome = run("merge", "--task", "spam", "-o", name)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            Path(name).chmod(0o755)
        assert outcome.code == 2, outcome.stderr
        assert f"{name}/spam: it cannot be written" in outcome.stderr
        assert not list(Path(name).iterdir())


def _open_to_all(folder: Path) -> None:
    """Let another user reach ``folder`` through pytest's private parents."""
    for parent in (folder, *folder.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a 4 KiB file system, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    try:
        subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root; the next test fills up without one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_is_refused_before_the_first_byte(
    project: Path, run: Run, tiny_disk: Path
) -> None:
    """The estimate is compared with what is free."""
    outcome = run("merge", "--task", "spam", "-o", str(tiny_disk))
    assert outcome.code == 2
    assert "B are free" in outcome.stderr
    assert not list(tiny_disk.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(project: Path) -> None:
    """A write the system refuses half-way ends in exit code 2 and no rest."""
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "merge", "--all-tasks"],
        cwd=project, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "out/merged/ads_rel: " in done.stderr
    assert "nothing was changed there" in done.stderr
    assert files_below(project / "out") == []


def test_the_console_script_has_the_same_codes(project: Path) -> None:
    """A real process exits as the tests in this process do."""
    for words, code in ((["merge"], 2), (["merge", "--task", "spam"], 0), (["inspect"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", ENTRY, *words], cwd=project, capture_output=True, check=False
        )
        assert done.returncode == code, done.stderr.decode()
