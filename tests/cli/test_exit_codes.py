"""Exit codes as a shell sees them: what a CI job lives by; and the scripts of example 4."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from mtl_export_cli.main import cli

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "04_ci_gate"
ENTRY = "from mtl_export_cli.main import main; main()"


@dataclass(frozen=True)
class Ended:
    """What one line in a shell gave."""

    code: int
    stdout: str
    stderr: str


Shell = Callable[[str, Path], Ended]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Give a function that runs a line with ``sh`` in a folder, ``mtl-export`` on the path."""
    bin_folder = tmp_path_factory.mktemp("bin")
    command = bin_folder / "mtl-export"
    command.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(ENTRY)} "$@"\n'
    )
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(line: str, folder: Path) -> Ended:
        done = subprocess.run(
            ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def gated(graphs: Path, tmp_path_factory: pytest.TempPathFactory, shell: Shell) -> Path:
    """Return a project with merged folders and the single graph that the gate has passed."""
    folder = tmp_path_factory.mktemp("gate") / "project"
    shutil.copytree(graphs, folder, ignore=shutil.ignore_patterns("topic", "spam"))
    words = ["merge", "--task", "topic", "--config", str(folder / "mtl-export.toml")]
    assert CliRunner().invoke(cli, words).exit_code == 0
    done = shell(f"{EXAMPLE / 'gate.sh'} {folder} reports", ROOT)
    assert done.code == 0, done.stdout + done.stderr
    return folder


def test_the_gate_passes_and_leaves_every_report(gated: Path) -> None:
    """Exit 0, and each format says the same."""
    reports = gated / "reports"
    assert sorted(path.name for path in reports.iterdir()) == [
        "parity.html", "parity.json", "parity.md", "parity.sarif", "parity.xml",
    ]  # fmt: skip
    document = json.loads((reports / "parity.json").read_text())
    counts = document["counts"]
    assert document["verdict"] == "passed"
    suites = ElementTree.parse(reports / "parity.xml").getroot()
    assert sum(int(one.get("tests", "")) for one in suites) == sum(counts.values())
    assert sum(int(one.get("skipped", "")) for one in suites) == counts["not-run"]
    assert (
        f"parity passed: {counts['passed']} passed, 0 failed" in (reports / "parity.md").read_text()
    )
    assert json.loads((reports / "parity.sarif").read_text())["runs"][0]["results"] == []


def test_the_report_holds_the_evidence(gated: Path) -> None:
    """Hashes of base, checkpoint, inputs and of every file that was judged."""
    document = json.loads((gated / "reports" / "parity.json").read_text())
    for name in ("base_sha256", "checkpoint_sha256", "cases_sha256"):
        assert len(document["sources"][name]) == 64
    assert {"numpy", "python", "onnxruntime", "torch"} <= set(document["versions"])
    files = {one["path"]: one["sha256"] for one in document["artefacts"]}
    listed = json.loads((gated / "out" / "onnx" / "mtl-export.json").read_text())["files"]
    assert files["out/onnx/model.onnx"] == {name: one["sha256"] for name, one in listed.items()}
    assert "golden.npz" in listed
    assert "out/merged/topic" in files


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stale", "export it again"),
        ("edited", "error 0.01"),
    ],
)
def test_a_planted_fault_exits_3(
    gated: Path, tmp_path: Path, shell: Shell, fault: str, reason: str
) -> None:
    """The example fails on purpose, says why, and leaves the project as it was."""
    before = {path: path.read_bytes() for path in gated.rglob("*") if path.is_file()}
    words = [sys.executable, str(EXAMPLE / "fail_on_purpose.py"), fault]
    words += ["--project", str(gated), "--copy", str(tmp_path / "copy")]
    done = shell(f"{shlex.join(words)}; code=$?; exit $code", ROOT)
    assert done.code == 3, done.stdout + done.stderr
    assert reason in done.stdout
    assert reason in (tmp_path / "copy" / "reports" / f"{fault}.md").read_text()
    suites = ElementTree.parse(tmp_path / "copy" / "reports" / f"{fault}.xml").getroot()
    assert sum(int(one.get("failures", "")) for one in suites) > 0
    assert {path: path.read_bytes() for path in gated.rglob("*") if path.is_file()} == before


def test_a_damaged_copy_is_known_by_its_files_alone(
    gated: Path, tmp_path: Path, shell: Shell
) -> None:
    """The example's third fault, which parity exits 3 for too, needs no comparison."""
    spec = spec_from_file_location("fail_on_purpose", EXAMPLE / "fail_on_purpose.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    script.copy_of(gated, tmp_path / "copy")
    script.FAULTS["damaged"](tmp_path / "copy")
    done = shell("mtl-export verify out", tmp_path / "copy")
    assert done.code == 7
    assert "model.onnx.data has" in done.stdout


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("mtl-export verify out", 0),
        ("mtl-export verify out --require-run --json", 0),
        ("mtl-export verify out && printf x >> out/onnx/model.onnx; mtl-export verify out", 7),
        ("mtl-export verify out/merged --require-run", 6),
        ("mtl-export verify typo", 2),
        ("mtl-export verify adapter", 7),
        ("mtl-export parity --report parity.txt", 2),
        ("mtl-export parity --onnx typo --report p.xml", 2),
        ("mtl-export inspect --checkpoint base", 5),
        ("mtl-export verify out | head -1", 0),
    ],
)
def test_the_shell_sees_the_documented_code(
    gated: Path, tmp_path: Path, shell: Shell, line: str, code: int
) -> None:
    """Each meaning has its number."""
    copy = tmp_path / "project"
    shutil.copytree(gated, copy)
    done = shell(line, copy)
    assert done.code == code, done.stdout + done.stderr


def test_an_old_report_does_not_outlive_an_error(gated: Path, tmp_path: Path, shell: Shell) -> None:
    """What kept the comparison from being made replaces yesterday's pass."""
    copy = tmp_path / "project"
    shutil.copytree(gated, copy)
    line = "mtl-export parity --onnx typo --report reports/parity.xml --report reports/parity.json"
    assert shell(line, copy).code == 2
    (suite,) = ElementTree.parse(copy / "reports" / "parity.xml").getroot()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    document = json.loads((copy / "reports" / "parity.json").read_text())
    assert document["verdict"] == "not-run"
    assert document["error"]["error"] == "UsageError"


def test_verify_needs_neither_torch_nor_onnx(gated: Path) -> None:
    """Golden vectors are replayed with numpy and onnxruntime; nothing else of weight is there."""
    absent = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes")
    script = (
        "import sys\n"
        f"for name in {absent!r}:\n"
        "    sys.modules[name] = None\n"
        "from mtl_export_cli.main import cli\n"
        "try:\n"
        "    cli(['verify', 'out/onnx', '--require-run'])\n"
        "finally:\n"
        "    assert 'onnxruntime' in sys.modules\n"
        f"    assert not any(sys.modules[name] for name in {absent!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gated, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verify passed" in done.stdout


def test_verify_exits_3_when_an_answer_differs(gated: Path, tmp_path: Path, shell: Shell) -> None:
    """Saved answers that the model does not give, under right hashes."""
    from dataclasses import replace

    from mtl_export.bundle.manifest import add_to_manifest
    from mtl_export.runtime.golden import GOLDEN_FILE, golden_bytes, read_golden

    folder = tmp_path / "onnx"
    shutil.copytree(gated / "out" / "onnx", folder)
    vectors = read_golden(folder / GOLDEN_FILE)
    wrong = replace(vectors[0], outputs={"logits": vectors[0].outputs["logits"] + 0.01})
    (folder / GOLDEN_FILE).write_bytes(golden_bytes((wrong, *vectors[1:])))
    add_to_manifest(folder, GOLDEN_FILE)
    done = shell("mtl-export verify onnx", tmp_path)
    assert done.code == 3, done.stdout + done.stderr
    assert "FAILED ., model.onnx, ads_rel: " in done.stdout
    assert "values of logits differ" in done.stdout
