"""Killed and concurrent runs: what lies at the target, and who clears up."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtl_export.bundle.manifest import Recipe, damage, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.errors import OutputError
from tests.bundle.outputs import OTHER, RECIPE, ROOT, tree, write

KILL = """
import os, signal, sys
from pathlib import Path
from mtl_export.bundle import output, staging
from tests.bundle.outputs import OTHER, write

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

moment, target = sys.argv[1], Path(sys.argv[2])
renames = iter([staging.os.rename, killed])
if moment == "writing":
    Path.write_text = killed
elif moment == "hashing":
    output.write_manifest = killed
elif moment == "carrying over":
    output._link_or_copy = killed
elif moment == "before the swap":
    output.put_in_place = killed
elif moment == "after the exchange":
    output.shutil.rmtree = staging.shutil.rmtree = killed
elif moment == "between the renames":
    staging._exchange = lambda first, second: False
    staging.os.rename = lambda a, b: next(renames)(a, b)
elif moment == "after the renames":
    staging._exchange = lambda first, second: False
    staging.shutil.rmtree = killed
write(target, "new", recipe=OTHER, force=True)
"""
OLD_OR_NONE = {
    "writing": "old",
    "hashing": "old",
    "carrying over": "old",
    "before the swap": "old",
    "after the exchange": "new",
    "between the renames": None,
    "after the renames": "new",
}


@pytest.mark.parametrize(("moment", "content"), OLD_OR_NONE.items())
def test_a_killed_run_leaves_the_old_result_or_none(
    tmp_path: Path, moment: str, content: str | None
) -> None:
    """SIGKILL at any moment leaves a whole result or none, and the next run clears up."""
    out = tmp_path / "out"
    write(out, "old")
    (out / "README").write_text("mine")
    killed = subprocess.run(
        [sys.executable, "-c", KILL, moment, str(out)], cwd=ROOT, check=False, capture_output=True
    )
    assert killed.returncode == -9, killed.stderr.decode()
    if content is None:
        assert not out.exists()
    else:
        assert tree(out) == {"README": "mine", "model": content}
        manifest = read_manifest(out)
        assert manifest is not None
        assert not damage(out, manifest)
    assert write(out, "newest", recipe=Recipe("merge", {}, {}, "2.0"), force=True)
    assert tree(tmp_path) == {"out/README": "mine", "out/model": "newest"}


def test_a_killed_first_run_leaves_none(tmp_path: Path) -> None:
    """Nothing lies at the target, and the next run clears up without force."""
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILL, "hashing", str(out)], cwd=ROOT, check=False
    )
    assert killed.returncode == -9
    assert not out.exists()
    assert list(tmp_path.iterdir())
    assert write(out, "new")
    assert tree(tmp_path) == {"out/model": "new"}


def test_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    """Clearing up does not touch the folder of a run that is alive."""
    with output_folder(tmp_path / "slow", recipe=RECIPE) as plan:
        assert write(tmp_path / "quick", "new")
        (plan.folder / "model").write_text("slow")
    assert tree(tmp_path) == {"quick/model": "new", "slow/model": "slow"}


def test_a_folder_is_not_swapped_while_another_run_writes_inside(tmp_path: Path) -> None:
    """The outer output waits for nobody: it says that another run is at work."""
    out = tmp_path / "onnx"
    write(out, "single graph")
    with output_folder(out / "spam", recipe=RECIPE) as inner:
        with pytest.raises(OutputError, match="another run is writing inside it"):
            write(out, "new", recipe=OTHER, force=True)
        (inner.folder / "model").write_text("per task")
    assert tree(tmp_path) == {"onnx/model": "single graph", "onnx/spam/model": "per task"}
