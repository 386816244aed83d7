"""TensorRT's Python package -> a loaded library with one log.

The backend is written against what ``tensorrt`` 10.13 to 11.x and ``tensorrt_rtx`` 1.x
share. Every attribute of theirs that it touches is in ``tests/tensorrt/surface.py``, which
the tests hold against this source and against the releases; for that a TensorRT object is
only ever held under one of the names listed there (``trt``, ``builder``, ``config``, ...).

Traps this file deals with:
    - TensorRT keeps the first logger of the process and ignores later ones, so
      there is one ``Log`` per library, for ever.
    - Many calls never raise: they log and return None, -1 or False. ``Log.collect``
      gathers what was logged while a block ran, so that the caller can fail.
    - Without a driver each error is followed by a second one about cudaError 35,
      which says nothing about the first and is dropped.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

# A TensorRT object: its classes have no type stubs for the versions supported here.
TrtObject: TypeAlias = Any

FULL = "tensorrt"
RTX = "tensorrt_rtx"
NAMES = (FULL, RTX)

_LOGGER = logging.getLogger(__name__)


class Log:
    """The messages of one TensorRT library in this process.

    Attributes:
        handle: The object that TensorRT's constructors take.
    """

    def __init__(self, trt: ModuleType) -> None:
        self._errors: list[str] = []
        # One build or run at a time: messages carry no mark of the call they belong to.
        self._lock = threading.RLock()
        self.handle: TrtObject = _logger(trt, self._receive)

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Yield a list that fills with the errors logged while the block runs."""
        with self._lock:
            outer, self._errors = self._errors, []
            try:
                yield self._errors
            finally:
                self._errors = outer

    def _receive(self, level: int, message: str) -> None:
        if level < logging.ERROR:
            _LOGGER.log(level, "%s", message)
        elif not self._is_echo(message):
            self._errors.append(message)
            # The error becomes an exception with context; the bare line is for -vv.
            _LOGGER.debug("%s", message)

    def _is_echo(self, message: str) -> bool:
        return bool(self._errors) and (
            "checkMacros.cpp::catchCudaError" in message or message == self._errors[-1]
        )


def _logger(trt: ModuleType, receive: Callable[[int, str], None]) -> TrtObject:
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        # Its warnings are about int64 bindings and the like: nothing a user can act on.
        trt.ILogger.WARNING: logging.INFO,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.NOTSET,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def log(self, severity: TrtObject, message: str) -> None:
            level = levels.get(severity, logging.ERROR)
            if level > logging.NOTSET:
                receive(level, message)

    return Logger()


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        trt: The module.
        log: Its only logger.
    """

    name: str
    trt: ModuleType
    log: Log

    @property
    def version(self) -> str:
        """Return its version, such as ``1.7.1.116``."""
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        """Return whether engines are built for named GPUs rather than for the one at hand."""
        return hasattr(self.trt, "ComputeCapability")


_LOGS: dict[str, Log] = {}
_LOGS_LOCK = threading.Lock()


def load_library(name: str) -> Library:
    """Return the TensorRT library ``name``, imported once.

    Raises:
        ImportError: It is not installed, or its shared libraries cannot be loaded.
    """
    trt = importlib.import_module(name)
    with _LOGS_LOCK:
        if name not in _LOGS:
            _LOGS[name] = Log(trt)
    return Library(name=name, trt=trt, log=_LOGS[name])
