"""``mtl-export doctor``: what is installed, what is missing, and what that costs."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click

from mtl_export.api.settings import Settings
from mtl_export.errors import BackendMissingError
from mtl_export.version import VERSION
from mtl_export_cli import options, render
from mtl_export_cli.options import with_settings

EPILOG = """\b
Example:
  mtl-export doctor
  mtl-export doctor --json
"""
PRESENT, MISSING = "ok", "missing"
# package -> what does not work without it; these come with mtl-export itself
CORE = {
    "numpy": "nothing works",
    "safetensors": "no checkpoint can be read",
    "torch": "no graph can be traced, no parity reference",
    "transformers": "no graph can be traced, no parity reference",
    "onnx": "no engine can be built",
    "onnx-ir": "no graph can be written",
    "onnxscript": "no graph can be traced",
}
REPAIR = "pip install --force-reinstall mtl-export"
INSTALL_ORT = "pip install 'mtl-export[cpu]'"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that is there or not.

    Attributes:
        name: Package, runtime or device.
        state: ``ok`` or ``missing``.
        found: Version, or what is wrong.
        cost: What does not work without it; empty if it is there.
        fix: The command that mends it; empty likewise.
    """

    name: str
    state: str
    found: str
    cost: str = ""
    fix: str = ""


@click.command(short_help="Say what is installed and what is missing.", epilog=EPILOG)
@with_settings(options.TALK)
def command(settings: Settings) -> None:
    """Say what is installed and what is missing.

    Packages, runtimes, engine builders and the GPU; for each one missing, what does not
    work without it and the command that installs it. Always exits 0: on a machine that
    only merges, a missing GPU is no fault.
    """
    findings = [
        Requirement("mtl-export", PRESENT, VERSION),
        Requirement("python", PRESENT, f"{platform.python_version()} on {platform.platform()}"),
        *(_package(name, cost) for name, cost in CORE.items()),
        _onnxruntime(),
        _gpu(),
        *_builders(),
    ]
    if settings.json:
        listed = [asdict(finding) for finding in findings]
        render.print_json({"ok": True, "command": "doctor", "findings": listed})
        return
    render.print_table(
        ("what", "state", "found"), [(one.name, one.state, one.found) for one in findings]
    )
    for one in findings:
        if one.state == MISSING:
            render.print_line(f"Without {one.name}: {one.cost}. {one.fix}".rstrip())


def _package(name: str, cost: str, fix: str = REPAIR) -> Requirement:
    try:
        return Requirement(name, PRESENT, version(name))
    except PackageNotFoundError:
        return Requirement(name, MISSING, "not installed", cost, fix)


def _onnxruntime() -> Requirement:
    cost = "parity cannot run graphs"
    try:
        import onnxruntime
    except ImportError as error:
        return Requirement("onnxruntime", MISSING, _first_line(error), cost, INSTALL_ORT)
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    return Requirement("onnxruntime", PRESENT, f"{onnxruntime.__version__} ({providers})")


def _gpu() -> Requirement:
    from mtl_export.tensorrt.available import find_gpu

    gpu = find_gpu()
    if not gpu.problem:
        return Requirement("NVIDIA GPU", PRESENT, f"compute capability {gpu.capability}")
    return Requirement(
        "NVIDIA GPU", MISSING, gpu.problem, "engines can be built by tensorrt_rtx, not run"
    )


def _builders() -> list[Requirement]:
    from mtl_export.tensorrt.available import INSTALL_FULL, INSTALL_RTX, available_builder

    findings = []
    for name, cost, fix in (
        ("tensorrt", "no engines for the GPU here", INSTALL_FULL),
        ("tensorrt_rtx", "no engines without a GPU", INSTALL_RTX),
    ):
        try:
            info = available_builder(name)
        except BackendMissingError as error:
            findings.append(Requirement(name, MISSING, error.problem, cost, fix))
        else:
            runs = "" if info.can_run else f"; cannot run here: {info.reason}"
            findings.append(Requirement(name, PRESENT, f"{info.version}, builds engines{runs}"))
    return findings


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
