"""Run the blocks of a README that are marked to run, and hold their output against what it says.

A block is marked by a line ``<!-- run: FOLDER -->`` before its fence; FOLDER is relative to
the repository and is copied, so that nothing is written into it. ``console`` blocks hold
``$ command`` lines and their output, ``python`` blocks a script whose prints say their
output in a comment. Numbers are not compared, only that there is one.

    python tests/examples/readme_blocks.py README.md ...     # write the real outputs in
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"<!-- run: (?P<folder>\S+) -->\n```(?P<kind>console|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A marked block.

    Attributes:
        folder: Where it runs, relative to the repository.
        kind: ``console`` or ``python``.
        body: Between the fences.
    """

    folder: str
    kind: str
    body: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """Yield each command of a console block with the output that the README shows."""
        for part in re.split(r"^\$ ", self.body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def blocks_of(text: str) -> list[Block]:
    """Return the marked blocks in order."""
    return [Block(m["folder"], m["kind"], m["body"]) for m in BLOCK.finditer(text)]


def copy_of(folder: str, scratch: Path) -> Path:
    """Return a copy of an example, made once, without what its commands wrote."""
    target = scratch / folder
    if not target.exists():
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("out", ".data"))
    return target


def run(command: list[str], folder: Path) -> str:
    """Return what ``command`` prints on stdout.

    Raises:
        AssertionError: It exits with anything but 0.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} exits {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def masked(output: str) -> list[str]:
    """Return the lines with numbers, padding and rules made equal."""
    lines = []
    for line in output.strip().splitlines():
        text = re.sub(r"─+", "─", NUMBER.sub("#", line))
        lines.append(re.sub(r"\s+", " ", text).strip())
    return lines


def _with_outputs(text: str, scratch: Path) -> str:
    def real(match: re.Match[str]) -> str:
        block = Block(match["folder"], match["kind"], match["body"])
        folder = copy_of(block.folder, scratch)
        if block.kind == "python":
            return match[0]
        shown = []
        for command, _ in block.commands():
            output = "\n".join(line.rstrip() for line in run(command.split(), folder).splitlines())
            shown.append(f"$ {command}\n{output.rstrip()}\n")
        return f"<!-- run: {block.folder} -->\n```console\n{''.join(shown)}```"

    return BLOCK.sub(real, text)


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            written = _with_outputs(Path(name).read_text(encoding="utf-8"), Path(temporary))
        Path(name).write_text(written, encoding="utf-8")
