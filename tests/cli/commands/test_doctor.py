from __future__ import annotations

import builtins
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from mtl_export.version import VERSION
from mtl_export_cli.commands import doctor
from tests.cli.conftest import Run


def test_everything_is_listed(run: Run) -> None:
    """Python, packages, runtimes, builders and the GPU, each with a state."""
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    findings = {finding["name"]: finding for finding in outcome.json["findings"]}
    assert list(findings) == [
        "mtl-export", "python", *doctor.CORE, "onnxruntime", "NVIDIA GPU", "tensorrt",
        "tensorrt_rtx",
    ]  # fmt: skip
    assert findings["mtl-export"]["found"] == VERSION
    assert all(finding["state"] in {"ok", "missing"} for finding in findings.values())
    assert all(finding["cost"] for finding in findings.values() if finding["state"] == "missing")


def test_people_get_a_table(run: Run) -> None:
    """The same as a table on stdout."""
    outcome = run("doctor")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines()[0].split() == ["what", "state", "found"]


def test_what_is_missing_costs_something_and_can_be_mended(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without runtimes and builders it still exits 0, and says what to install."""
    import mtl_export.tensorrt.available as available

    real = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *rest, **named)  # type: ignore[arg-type]

    def no_library(name: str) -> object:
        raise ImportError(f"No module named {name!r}", name=name)

    def no_package(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(available, "load_library", no_library)
    monkeypatch.setattr(doctor, "version", no_package)
    outcome = run("doctor")
    assert outcome.code == 0
    for line in (
        "Without onnxruntime: parity cannot run graphs. pip install 'mtl-export[cpu]'",
        "Without tensorrt_rtx: no engines without a GPU. pip install tensorrt_rtx_cu13",
        "Without torch: no graph can be traced, no parity reference. pip install",
    ):
        assert line in outcome.stdout
