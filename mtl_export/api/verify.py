"""``mtl_export.verify``: is a folder still what was written, without torch or the sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api.progress import SILENT, Progress
from mtl_export.errors import UsageError, shortened

if TYPE_CHECKING:
    from mtl_export.bundle.verify import VerifiedItem

EXIT_FAILED, EXIT_MISSING, EXIT_DAMAGED = 3, 6, 7


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found of a folder.

    Attributes:
        checks: One by one.
        exit_code: That of ``mtl-export verify``: 0, 3 (an output differs), 6 (something that
            had to run did not) or 7 (a file is not what was written).
        missing: What should have been run and was not; empty without ``require_run``.
    """

    checks: tuple[VerifiedItem, ...]
    exit_code: int
    missing: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the folder is good."""
        return self.exit_code == 0

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        checks = [asdict(check) for check in self.checks]
        return {"ok": self.passed, "exit_code": self.exit_code, "checks": checks}


def verify(
    folder: str | Path,
    *,
    require_run: bool = False,
    require_all_tasks: bool = False,
    expect: str | Sequence[str] = (),
    threads: int = 0,
    progress: Progress = SILENT,
) -> Verification:
    """Check a finished folder, and those inside it, against their manifests and golden vectors.

    Args:
        folder: What mtl-export wrote, or a folder that holds such folders.
        require_run: Fail unless every graph and engine could be run on golden vectors.
        require_all_tasks: Fail if a task has no folder where others have one.
        expect: SHA-256 of the manifests that are to be found, and no other; empty: any.
        threads: Threads of the runtime; 0: all cores.
        progress: Hears which folder is looked at.

    Raises:
        UsageError: There is no such folder, or a digest is none.
        IntegrityError: No manifest is there to check against.

    Example:
        >>> import mtl_export as mx
        >>> mx.verify("out").exit_code
        0
    """
    from mtl_export.bundle.verify import verify_folder

    digests = (expect,) if isinstance(expect, str) else tuple(expect)
    wrong = [one for one in digests if not is_sha256(one)]
    if wrong:
        raise UsageError(
            f"expect: {wrong[0]!r}",
            expected="a SHA-256, 64 hex digits",
            fix="Take it from sha256sum mtl-export.json",
        )
    checks = verify_folder(
        Path(folder),
        threads=threads,
        all_tasks=require_all_tasks,
        expected=[one.lower() for one in digests],
        progress=progress.detail,
    )
    failed = {check.kind for check in checks if check.verdict == "failed"}
    code = EXIT_DAMAGED if "files" in failed else EXIT_FAILED if failed else 0
    missing = _not_run(checks) if code == 0 and require_run else ""
    return Verification(tuple(checks), EXIT_MISSING if missing else code, missing)


def is_sha256(text: str) -> bool:
    """Return whether ``text`` is 64 hex digits."""
    return bool(re.fullmatch("[0-9a-fA-F]{64}", text))


def _not_run(checks: Sequence[VerifiedItem]) -> str:
    """Return what should have been run and was not; "" if nothing."""
    from mtl_export.bundle.verify import NO_TORCH

    golden = [check for check in checks if check.kind == "golden" and check.reason != NO_TORCH]
    absent = [f"{check.folder}: {check.reason}" for check in golden if check.verdict == "not-run"]
    if absent:
        return shortened(absent)
    return "" if golden else "there is no graph or engine to run"
