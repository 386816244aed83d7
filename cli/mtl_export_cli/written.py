"""What a command wrote, as a table for people or JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mtl_export.api.written import Written
from mtl_export_cli import render


def print_written(
    command: str,
    outputs: Sequence[Written],
    *,
    as_json: bool,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Print the result of a command that writes folders.

    Args:
        command: The verb.
        outputs: What it wrote.
        as_json: One JSON object; else a table.
        more: What else the JSON object says.
    """
    if as_json:
        listed = [output.as_dict() for output in outputs]
        render.print_json({"ok": True, "command": command, "outputs": listed, **more})
        return
    render.print_table(
        ("output", "tasks", "size", "seconds", "status"),
        [
            (
                str(output.path),
                ", ".join(output.tasks),
                render.size_text(output.size_bytes),
                f"{output.seconds:.1f}",
                output.status,
            )
            for output in outputs
        ],
        right=("size", "seconds"),
    )
