"""What memory a process has taken and may take, and one error where it runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl_export.errors import EngineRunError, MtlExportError, UsageError

# A batch is made, packed and received by another process.
BATCH_COPIES = 3
# What numpy, ONNX Runtime, PyTorch and CUDA say.
OUT_OF_MEMORY = ("unable to allocate", "failed to allocate", "can't allocate", "out of memory")


def refuse_larger(where: str, size_bytes: int) -> None:
    """Refuse a batch of ``size_bytes`` that this machine cannot hold.

    A system that grants more memory than it has ends processes later, and not always ours.

    Raises:
        UsageError: It takes more than the machine's memory.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if BATCH_COPIES * size_bytes > memory:
        raise UsageError(
            f"{where}: its inputs take {size_bytes / 1000000000.0:.1f} GB",
            expected=(
                f"at most {memory / BATCH_COPIES / 1000000000.0:.1f} GB, because they are held "
                f"{BATCH_COPIES} times, in {memory / 1000000000.0:.1f} GB of memory"
            ),
            fix="Measure a smaller shape",
        )


@contextmanager
def within_memory(where: str) -> Iterator[None]:
    """Say that memory ran out, whichever library's words it has; all else passes.

    Raises:
        EngineRunError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        said = error.problem if isinstance(error, MtlExportError) else str(error).strip()
        is_known = any(words in said.lower() for words in OUT_OF_MEMORY)
        if not is_known and not isinstance(error, MemoryError):
            raise
        raise EngineRunError(
            f"{where}: memory ran out ({(said or type(error).__name__).splitlines()[0]})",
            expected="memory for the batch and all that is computed from it",
            fix="Measure fewer models or smaller shapes at once",
        ) from error


def peak_bytes() -> int:
    """Return the most resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux it begins with what the parent had.
        return 1024 * _number(status, "VmHWM:")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pss_bytes() -> int | None:
    """Return this process's proportional share of memory, None where the system does not say."""
    rollup = Path("/proc/self/smaps_rollup")
    return 1024 * _number(rollup, "Pss:") if rollup.is_file() else None


def _number(path: Path, key: str) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
