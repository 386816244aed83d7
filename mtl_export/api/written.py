"""What a verb wrote: one record per output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_export.bundle.manifest import FileEntry
    from mtl_export.bundle.output import OutputPlan

WRITTEN, UP_TO_DATE = "written", "up to date"


@dataclass(frozen=True)
class Written:
    """One output folder.

    Attributes:
        path: The folder.
        tasks: The tasks it serves, by name.
        status: ``written`` or ``up to date``.
        seconds: How long it took.
        files: What it holds, by name.
        manifest_sha256: Of its manifest, for ``verify --expect``.
    """

    path: Path
    tasks: tuple[str, ...]
    status: str
    seconds: float
    files: dict[str, FileEntry]
    manifest_sha256: str = ""

    @classmethod
    def from_plan(cls, plan: OutputPlan, tasks: Sequence[str], seconds: float) -> Written:
        """Return the record of a plan whose block has ended well."""
        from mtl_export.bundle.manifest import MANIFEST_FILE, read_manifest
        from mtl_export.checkpoint.hashing import sha256_of_file

        manifest = read_manifest(plan.target)
        return cls(
            path=plan.target,
            tasks=tuple(tasks),
            status=UP_TO_DATE if plan.up_to_date else WRITTEN,
            seconds=seconds,
            files=dict(manifest.files) if manifest else {},
            manifest_sha256=sha256_of_file(plan.target / MANIFEST_FILE) if manifest else "",
        )

    @property
    def size_bytes(self) -> int:
        """Return the size of all its files."""
        return sum(entry.size_bytes for entry in self.files.values())

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        return {
            "path": str(self.path),
            "tasks": list(self.tasks),
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "size_bytes": self.size_bytes,
            "manifest_sha256": self.manifest_sha256,
            "files": {
                name: {"sha256": entry.sha256, "size_bytes": entry.size_bytes}
                for name, entry in self.files.items()
            },
        }
