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
    """An error with the three parts a user needs.

    Args:
        problem: What is wrong, behind the file, tensor, task or option it is about.
        expected: What should have been there, and why where that is no matter of course.
        fix: What to do, ideally the command to type.
    """

    def __init__(self, problem: str, *, expected: str = "", fix: str = "") -> None:
        self.problem = problem
        self.expected = expected
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        """Return the whole message as one paragraph."""
        expected = f"Expected {self.expected}" if self.expected else ""
        parts = (self.problem, expected, self.fix)
        return " ".join(part if part.endswith("?") else f"{part}." for part in parts if part)

    def as_dict(self) -> dict[str, str]:
        """Return the parts for ``--json``."""
        return {
            "error": type(self).__name__,
            "problem": self.problem,
            "expected": self.expected,
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
            f"task {name!r}: the {of} has no task of that name",
            expected=f"one of {shortened(names)}",
            fix=f"{meant}?" if near else other,
        )


class OutputError(UsageError):
    """An output folder that exists, is full, or cannot be written."""


class CheckpointError(MtlExportError):
    """The checkpoint is broken, incomplete or of an unknown kind."""


class HyperparameterError(CheckpointError):
    """A number the checkpoint does not carry and nobody gave.

    Args:
        module: The layer that needs it.
        name: The number's name, as in the options.
        state: What is wrong with it.
        expected: As for every error.
        fix: As for every error.
    """

    def __init__(self, module: str, name: str, state: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{module}: {name}: {state}", expected=expected, fix=fix)
        self.name = name


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
