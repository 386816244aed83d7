"""An ONNX file -> its graph, external data beside it looked at and not yet read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mtl_export.checkpoint.files.external_files import external_files
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.errors import GraphError, IntegrityError, LinkedDataError, shortened


def open_graph(path: Path) -> ir.Model:
    """Return the graph at ``path``; weights are mapped when they are asked for.

    Raises:
        GraphError: It is no whole ONNX file, or its external data is missing or cut off.
        LinkedDataError: Its external data is shared with another folder by a hard link.
        IntegrityError: Its external data lies outside its folder.
    """
    names, problems = external_files(path, read_onnx(path))
    _refuse_links(path, names)
    if not problems:
        try:
            return ir.load(path)
        except Exception as error:  # whatever its steps happen to raise
            problems = [f"no ONNX graph ({str(error)[:200]})"]
    raise GraphError(
        f"{path}: {shortened(problems)}",
        expected="a whole graph, with its external data beside it",
        fix=f"Copy {path.parent} as one folder, or export it again",
    )


def _refuse_links(path: Path, names: tuple[str, ...]) -> None:
    """Refuse files that onnx-ir does not open: it cannot tell whose they are."""
    for name in names:
        file = path.parent / name
        copy = f"Copy the folder (cp -rL {path.parent} COPY) and use the copy"
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise IntegrityError(
                f"{path}: its external data {name!r} is a link",
                expected=(
                    "a file of its own, because through a link it may be any file of this machine"
                ),
                fix=copy,
            )
        if file.is_file() and file.stat().st_nlink > 1:
            raise LinkedDataError(
                f"{path}: its external data {name!r} has a second hard link",
                expected="a file of its own, as graph tools ask for",
                fix=copy,
            )
