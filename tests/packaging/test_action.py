"""The GitHub Action and the snippets of example 4: their structure, and the gate's script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "04_ci_gate" / "README.md"
# Keys that a step of a composite action may have:
# https://docs.github.com/en/actions/reference/workflows-and-actions/metadata-syntax
STEP_KEYS = {"id", "if", "name", "uses", "with", "run", "shell", "env", "working-directory"}


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    """Return the action's metadata."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return loaded


def steps(action: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps."""
    found: list[dict[str, Any]] = action["runs"]["steps"]
    return found


def test_it_is_a_composite_action(action: dict[str, Any]) -> None:
    """The parts that GitHub demands are there; each step runs or uses something."""
    assert set(action) == {"name", "description", "inputs", "outputs", "runs"}
    assert action["runs"]["using"] == "composite"
    for step in steps(action):
        assert set(step) <= STEP_KEYS
        assert ("run" in step) != ("uses" in step)
        assert ("shell" in step) == ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@v\d+", step["uses"])


def test_inputs_are_described_used_and_never_pasted_into_a_script(action: dict[str, Any]) -> None:
    """Every input has a default and a use; scripts read them from the environment only."""
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"inputs\.([\w-]+)", text))
    assert used == set(action["inputs"])
    for facts in action["inputs"].values():
        assert facts["description"]
        assert isinstance(facts["default"], str)
    ids = {step["id"] for step in steps(action) if "id" in step}
    for facts in action["outputs"].values():
        assert re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.[\w-]+ \}\}", facts["value"])
        assert facts["value"].split(".")[1] in ids
    assert not [step for step in steps(action) if "${{" in step.get("run", "")]


def test_two_uses_in_a_workflow_do_not_collide(action: dict[str, Any]) -> None:
    """Names that must be unique in a workflow may be given, and differ by job and matrix."""
    upload, scan = (
        next(step["with"][key] for step in steps(action) if word in step.get("uses", ""))
        for word, key in (("upload-artifact", "name"), ("upload-sarif", "category"))
    )
    for text, given, name in (
        (upload, "artifact", "parity-reports"),
        (scan, "category", "mtl-export"),
    ):
        default = f"format('{name}-{{0}}-{{1}}', github.job, strategy.job-index)"
        assert text == f"${{{{ inputs.{given} || {default} }}}}"
        assert action["inputs"][given]["default"] == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="the action's scripts are bash")
@pytest.mark.parametrize(
    ("code", "verdict"),
    [(0, "passed"), (3, "failed"), (4, "failed"), (6, "not-run"), (2, "not-run")],
)
def test_the_step_exits_as_parity_does(
    action: dict[str, Any], tmp_path: Path, code: int, verdict: str
) -> None:
    """The verdict is an output, the Markdown the summary, and no code is swallowed."""
    command = tmp_path / "mtl-export"
    command.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > said\nmkdir -p r\necho "# {verdict}" > r/parity.md\n'
        f"exit {code}\n"
    )
    command.chmod(0o755)
    (script,) = (step["run"] for step in steps(action) if step.get("id") == "parity")
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "REPORTS": "r", "GOLDEN": "true",
        "ARGUMENTS": "--atol 1e-5 --rtol 0",
        "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "output").read_text() == f"verdict={verdict}\nexit-code={code}\n"
    assert (tmp_path / "summary").read_text() == f"# {verdict}\n"
    reports = [word for end in ("json", "xml", "sarif", "md", "html")
               for word in ("--report", f"r/parity.{end}")]  # fmt: skip
    said = (tmp_path / "said").read_text().split()
    assert said == ["parity", *reports, "--golden", "--atol", "1e-5", "--rtol", "0"]


def snippets() -> list[dict[str, Any]]:
    """Return the YAML blocks of the example's README."""
    text = README.read_text(encoding="utf-8")
    return [yaml.safe_load(body) for body in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_snippets_pass_inputs_that_the_action_has(action: dict[str, Any]) -> None:
    """What the README shows for GitHub fits the action; GitLab's collects the JUnit file."""
    github, gitlab = snippets()
    (step,) = (
        one for one in github["jobs"]["parity"]["steps"] if "/mtl-export@" in one.get("uses", "")
    )
    assert set(step["with"]) <= set(action["inputs"])
    assert gitlab["parity"]["artifacts"]["when"] == "always"
    assert gitlab["parity"]["artifacts"]["reports"]["junit"] == "parity.xml"


def test_the_snippets_type_commands_that_exist() -> None:
    """Every mtl-export line parses: each command and option in it is one we have."""
    from importlib import import_module

    from mtl_export_cli.main import COMMANDS

    text = README.read_text(encoding="utf-8")
    lines = re.findall(r"mtl-export ((?:onnx|parity|verify)\b[^'`\n]*)", text)
    assert len(lines) >= 7
    for line in lines:
        name, *words = line.split()
        known = {
            option
            for parameter in import_module(COMMANDS[name][0]).command.params
            for option in parameter.opts
        }
        assert {word for word in words if word.startswith("--")} <= known


def test_the_readmes_links_lead_somewhere() -> None:
    """Every relative link names a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert "://" in target or (README.parent / target).exists(), target
