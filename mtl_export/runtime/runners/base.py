"""What every runtime looks like to those who compare or time it.

A runner is a context manager with one method. Nothing heavy happens before it is
entered: no weights are read, no GPU is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from mtl_export.checkpoint.tensors import Array


class Runner(Protocol):
    """One model on one runtime.

    Attributes:
        name: Runtime and kind of artefact, as reports print it.
    """

    name: str

    def __enter__(self) -> Self:
        """Load the model.

        Raises:
            BackendMissingError: The runtime or its device is not there.
            EngineRunError: The runtime refuses the file.
        """
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Free the model."""
        ...

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name for one batch; inputs the model lacks are an error."""
        ...


class AroundRunner:
    """What runners around another have in common: its name, and that it is loaded with them.

    Args:
        runner: The other one.
    """

    def __init__(self, runner: Runner) -> None:
        self.name = runner.name
        self._runner = runner

    def __enter__(self) -> Self:
        """Load the model; see ``Runner``."""
        self._runner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Free the model."""
        self._runner.__exit__(kind, error, trace)
