"""Every error a user can cause, as one tree.

    MtlExportError                   root; never raised itself
    +-- UsageError                   the command cannot be carried out as typed
    |   +-- TaskNotFoundError        a task name that the checkpoint or graph does not have
    |   +-- OutputError              an output folder that exists, is full, or cannot be written
    +-- CheckpointError              the checkpoint is broken, incomplete or of an unknown kind
    |   +-- HyperparameterError      a number the checkpoint does not carry and nobody gave
    +-- BaseModelError               the base is missing, broken, or does not fit the checkpoint
    |   +-- UnusableBaseError        it fits, and what was trained cannot be folded into it
    +-- AdapterError                 the algebra cannot be held by the normal form
    +-- GraphError                   the model cannot be traced or lowered
    +-- BackendError                 a runtime or builder
    |   +-- BackendMissingError      its package or device is not there
    |   +-- EngineBuildError         it refused to build
    |   +-- EngineRunError           it refused to run
    +-- ParityError                  the comparison itself could not be set up
    +-- CalibrationError             the calibration data cannot be used
    +-- IntegrityError               a hash differs, or a file asks to run code
        +-- LinkedDataError          a data file with a second hard link: graph tools read none

Bugs are not in the tree: they keep their traceback. Which exit code each branch
gets is one table in ``mtl_export_cli.main``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MtlExportError(Exception):
    """An error with the five parts a user needs.

    Args:
        where: File, tensor, task or option that the error is about.
        found: What was there.
        expected: What should have been there.
        why: Why that was expected.
        fix: What to do, ideally the command to type.
    """

    def __init__(
        self, *, where: str, found: str, expected: str = "", why: str = "", fix: str = ""
    ) -> None:
        self.where = where
        self.found = found
        self.expected = expected
        self.why = why
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        """Return the whole message as one paragraph."""
        sentences = [f"{self.where}: {self.found}."]
        if self.expected:
            because = f", because {self.why}" if self.why else ""
            sentences.append(f"Expected {self.expected}{because}.")
        elif self.why:
            sentences.append(f"{self.why[0].upper()}{self.why[1:]}.")
        if self.fix:
            sentences.append(f"{self.fix}.")
        return " ".join(sentences)

    def as_dict(self) -> dict[str, str]:
        """Return the parts for ``--json``."""
        return {
            "error": type(self).__name__,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "why": self.why,
            "fix": self.fix,
        }


class UsageError(MtlExportError):
    """The command cannot be carried out as typed."""


class TaskNotFoundError(UsageError):
    """A task name that the checkpoint or graph does not have."""

    @classmethod
    def from_name(
        cls, name: str, known: Iterable[str], *, of: str = "checkpoint", option: str = "--task"
    ) -> TaskNotFoundError:
        """Return the error for ``name``, naming the nearest known task.

        Args:
            name: What was typed.
            known: The tasks there are.
            of: What has them.
            option: What was typed before the name; empty for an argument.
        """
        names = list(known)
        near = get_close_matches(name, names, n=1)
        meant = " ".join(filter(None, ("Did you mean", option, *near)))
        other = f"Pass one of these to {option}" if option else "Name one of these"
        return cls(
            where=f"task {name!r}",
            found=f"the {of} has no task of that name",
            expected=f"one of {shortened(names)}",
            fix=meant if near else other,
        )


class OutputError(UsageError):
    """An output folder that exists, is full, or cannot be written."""


class CheckpointError(MtlExportError):
    """The checkpoint is broken, incomplete or of an unknown kind."""


class HyperparameterError(CheckpointError):
    """A number the checkpoint does not carry and nobody gave."""


class BaseModelError(MtlExportError):
    """The base model is missing, broken, or does not fit the checkpoint."""


class UnusableBaseError(BaseModelError):
    """The base fits, and what was trained cannot be folded into it: quantised, never called."""


class AdapterError(MtlExportError):
    """The algebra cannot be held by the normal form."""


class GraphError(MtlExportError):
    """The model cannot be traced or lowered."""


class BackendError(MtlExportError):
    """A runtime or builder failed."""


class BackendMissingError(BackendError):
    """A runtime's package or device is not there."""


class EngineBuildError(BackendError):
    """A builder refused to build."""


class EngineRunError(BackendError):
    """A runtime refused to run."""


class ParityError(MtlExportError):
    """The comparison itself could not be set up."""


class CalibrationError(MtlExportError):
    """The calibration data cannot be used."""


class IntegrityError(MtlExportError):
    """A hash differs, or a file asks to run code."""


class LinkedDataError(IntegrityError):
    """External data with a second hard link: ONNX Runtime reads it, graph tools do not."""


def shortened(items: Iterable[str], limit: int = 5) -> str:
    """Return ``items`` in order, cut to ``limit`` with the total said."""
    listed = list(items)
    if len(listed) <= limit:
        return ", ".join(listed) if listed else "none"
    return f"{', '.join(listed[:limit])} ({limit} of {len(listed)} shown)"
