"""Where each task of a routed graph came from, once ``mtl-export tasks`` changed the table.

    mtl_export.edits      one phrase for every edit
    mtl_export.origins    of every task, in id order: the checkpoint's SHA-256, its name and its
                          id there

An untouched graph has neither: all its tasks are those of its checkpoint. A graph edited
before there were origins has only the edits, and does not get origins later.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl_export.checkpoint.checkpoint import Task, tasks_of
from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.names import CHECKPOINT_KEY, TASKS_KEY

EDITS_KEY, ORIGINS_KEY = "mtl_export.edits", "mtl_export.origins"
# Of "add NAME SHA-256" the name tells people enough.
_WORDS = {"add": 2}
_ORIGIN = {"checkpoint_sha256": str, "name": str, "index": int}
_FIX = "Export the graph again"


@dataclass(frozen=True, slots=True)
class Origin:
    """One task's.

    Attributes:
        checkpoint_sha256: The checkpoint it came from.
        name: What it is called there.
        index: Its id there.
    """

    checkpoint_sha256: str
    name: str
    index: int


@dataclass(frozen=True, slots=True)
class EditedGraph:
    """What an edited graph says of itself.

    Attributes:
        edits: One phrase for every edit.
        tasks: The tasks it serves, in id order.
        origins: Where they came from; empty if it does not say.
    """

    edits: tuple[str, ...]
    tasks: tuple[Task, ...]
    origins: tuple[Origin, ...]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> EditedGraph | None:
        """Return what ``metadata_props`` say, None of a graph that is as it was exported."""
        edits = edits_of(metadata)
        if not edits:
            return None
        tasks = tasks_of(metadata.get(TASKS_KEY, "[]"), TASKS_KEY)
        return cls(edits, tasks, tuple(origins_of(metadata) or ()))

    @property
    def text(self) -> str:
        """Return what was typed, without hashes."""
        words = (edit.split() for edit in self.edits)
        phrases = (" ".join(one[: _WORDS.get(one[0])]) if one else "" for one in words)
        return f"edited by mtl-export tasks {', '.join(phrases)}"

    def others(self, checkpoint_sha256: str) -> list[str]:
        """Return the names of the tasks that came from another checkpoint."""
        pairs = zip(self.tasks, self.origins, strict=False)
        return [t.name for t, one in pairs if one.checkpoint_sha256 != checkpoint_sha256]


def edits_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the edits that ``metadata_props`` list.

    Raises:
        CheckpointError: They are no list of texts.
    """
    return tuple(parse_json(metadata.get(EDITS_KEY, "[]"), EDITS_KEY, [str], fix=_FIX))


def origins_of(metadata: Mapping[str, str]) -> list[Origin] | None:
    """Return where each task came from, None where the graph does not say."""
    if ORIGINS_KEY in metadata:
        found = parse_json(metadata[ORIGINS_KEY], ORIGINS_KEY, [_ORIGIN], fix=_FIX)
        return [Origin(**{name: one[name] for name in _ORIGIN}) for one in found]
    if EDITS_KEY in metadata:
        return None
    checkpoint = metadata.get(CHECKPOINT_KEY, "")
    tasks = tasks_of(metadata.get(TASKS_KEY, "[]"), TASKS_KEY)
    return [Origin(checkpoint, task.name, task.index) for task in tasks]


def origins_json(origins: Sequence[Origin]) -> str:
    """Return them for the metadata."""
    return json.dumps([dataclasses.asdict(one) for one in origins])
