"""``mtl-export verify``: is a folder still what was written, without torch or the sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.settings import Settings
from mtl_export.api.verify import Verification, is_sha256, verify
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.bundle.verify import VerifiedItem

VERDICTS = ("passed", "failed", "not-run")
WORDS = {"files": "not run:", "golden": "not run:", "remark": "remark:"}
EPILOG = """\b
Example:
  mtl-export verify out/onnx
  mtl-export verify out --require-run
  mtl-export verify out/onnx/spam --expect "$(cat spam.sha256)"
"""


def _digests(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> tuple[str, ...]:
    wrong = [one for one in value if not is_sha256(one)]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is no SHA-256, 64 hex digits")
    return tuple(value)


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
    messages = render.Messages.from_settings(settings)
    found = verify(
        folder,
        require_run=require_run,
        require_all_tasks=require_all_tasks,
        expect=expect,
        threads=threads,
        progress=render.Steps(0, messages),
    )
    if found.missing:
        messages.note(f"--require-run: {found.missing}")
    if settings.json:
        render.print_json(found.as_dict())
    else:
        _print(found)
    return found.exit_code


def _print(found: Verification) -> None:
    checks = found.checks
    for check in checks:
        if check.verdict != "passed":
            word = WORDS[check.kind] if check.verdict == "not-run" else "FAILED"
            render.print_line(f"{word} {check.folder}, {check.what}: {check.reason}")
    verdict = "passed" if found.passed else "not-run" if found.missing else "failed"
    render.print_table(
        ("folder", "files", "golden vectors"),
        [
            (folder, _summary(checks, folder, "files"), _summary(checks, folder, "golden"))
            for folder in dict.fromkeys(one.folder for one in checks if one.kind != "remark")
        ],
        title=f"verify {verdict}",
    )


def _summary(checks: Sequence[VerifiedItem], folder: str, kind: str) -> str:
    own = [check for check in checks if check.folder == folder and check.kind == kind]
    if len(own) == 1 and (kind == "files" or own[0].verdict == "not-run"):
        return f"{own[0].what} {own[0].verdict}" if kind == "files" else own[0].verdict
    counts = {word: sum(check.verdict == word for check in own) for word in VERDICTS}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    allowed = [check.within for check in own if check.within is not None]
    return f"{told}, errors up to {max(allowed):.1e} allowed" if allowed else told
