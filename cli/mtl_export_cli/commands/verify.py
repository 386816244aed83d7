"""``mtl-export verify``: is a folder still what was written, without torch or the sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.settings import Settings
from mtl_export.errors import shortened
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.bundle.verify import Check

EXIT_FAILED, EXIT_MISSING, EXIT_DAMAGED = 3, 6, 7
VERDICTS = ("passed", "failed", "not-run")
WORDS = {"files": "not run:", "golden": "not run:", "remark": "remark:"}
EPILOG = """\b
Example:
  mtl-export verify out/onnx
  mtl-export verify out --require-run
  mtl-export verify out/onnx/spam --expect "$(cat spam.sha256)"
"""


def _digests(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    wrong = [one for one in value if not re.fullmatch("[0-9a-fA-F]{64}", one)]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is no SHA-256, 64 hex digits")
    return tuple(one.lower() for one in value)


@click.command(short_help="Check a finished folder again, also on the device.", epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@with_settings(options.TALK)
@option("--require-run", is_flag=True,
        help=options.REQUIRE_RUN_HELP)  # fmt: skip
@option("--require-all-tasks", is_flag=True,
        help="Exit 7 if a task of the checkpoint has no folder where others have one.")  # fmt: skip
@option("--expect", multiple=True, metavar="SHA256", callback=_digests,
        help="SHA-256 of a manifest that is to be there, and no other; repeat it where FOLDER holds"
        " several outputs. sha256sum mtl-export.json prints it, as --json does when a folder is"
        " written; saving golden vectors or editing tasks changes it.")  # fmt: skip
@options.THREADS
def command(
    settings: Settings,
    folder: Path,
    *,
    require_run: bool,
    require_all_tasks: bool,
    expect: tuple[str, ...],
    threads: int,
) -> int:
    """Check a finished folder again, also on the device.

    Every file must have the SHA-256 of the folder's manifest, and no file of it may be missing
    or added: exit code 7. Then the inputs that mtl-export parity --golden saved are run again:
    exit code 3 if an output differs, and with --require-run 6 if a graph or engine has none or
    could not be run on them. The checkpoint is not needed, and for graphs nothing but
    numpy and onnxruntime. Folders inside are checked too, by their own manifests: a task's
    folder that was deleted whole is only a remark, for no manifest says that it was ever
    written; --require-all-tasks makes it exit code 7.

    Files are held against what the folder itself says. That shows damage, not who wrote it:
    whoever can change a file can write a manifest that fits. --expect, with a digest that came
    another way than the folder, shows that too.
    """
    from mtl_export.bundle.verify import verify_folder

    talk = render.Talk.from_settings(settings)
    checks = verify_folder(
        folder,
        threads=threads,
        all_tasks=require_all_tasks,
        expected=expect,
        progress=talk.detail,
    )
    failed = {check.kind for check in checks if check.verdict == "failed"}
    code = EXIT_DAMAGED if "files" in failed else EXIT_FAILED if failed else 0
    if code == 0 and require_run and (missing := _not_run(checks)):
        code = EXIT_MISSING
        talk.note(f"--require-run: {missing}")
    _print(checks, settings, code)
    return code


def _not_run(checks: Sequence[Check]) -> str:
    """Return what should have been run and was not; "" if nothing."""
    from mtl_export.bundle.verify import NO_TORCH

    golden = [check for check in checks if check.kind == "golden" and check.reason != NO_TORCH]
    absent = [f"{check.folder}: {check.reason}" for check in golden if check.verdict == "not-run"]
    if absent:
        return shortened(absent)
    return "" if golden else "there is no graph or engine to run"


def _print(checks: Sequence[Check], settings: Settings, code: int) -> None:
    if settings.json:
        listed = [asdict(check) for check in checks]
        render.print_json({"ok": code == 0, "exit_code": code, "checks": listed})
        return
    for check in checks:
        if check.verdict != "passed":
            word = WORDS[check.kind] if check.verdict == "not-run" else "FAILED"
            render.print_line(f"{word} {check.folder}, {check.what}: {check.reason}")
    render.print_table(
        ("folder", "files", "golden vectors"),
        [
            (folder, _summary(checks, folder, "files"), _summary(checks, folder, "golden"))
            for folder in dict.fromkeys(one.folder for one in checks if one.kind != "remark")
        ],
        title=f"verify {'not-run' if code == EXIT_MISSING else 'failed' if code else 'passed'}",
    )


def _summary(checks: Sequence[Check], folder: str, kind: str) -> str:
    own = [check for check in checks if check.folder == folder and check.kind == kind]
    if len(own) == 1 and (kind == "files" or own[0].verdict == "not-run"):
        return f"{own[0].what} {own[0].verdict}" if kind == "files" else own[0].verdict
    counts = {word: sum(check.verdict == word for check in own) for word in VERDICTS}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    allowed = [check.within for check in own if check.within is not None]
    return f"{told}, errors up to {max(allowed):.1e} allowed" if allowed else told
