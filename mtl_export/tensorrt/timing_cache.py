"""A file of kernel timings <-> TensorRT's timing cache, so that builds need not time again.

A cache belongs to one GPU and one release: another one's is refused, not ignored. It is
read before the build and written afterwards, joined with what other builds have written
meanwhile, so that several jobs may share one file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mtl_export.errors import OutputError, UsageError
from mtl_export.tensorrt.api import TrtObject


def load_timing_cache(config: TrtObject, path: Path, errors: list[str]) -> None:
    """Have ``config`` use the timings in ``path``; a missing file is an empty cache.

    Args:
        config: Of the build.
        path: The file.
        errors: Fills with what the library logs.

    Raises:
        UsageError: The file cannot be read, or its timings are not for this library and GPU.
    """
    timings = config.create_timing_cache(_stored(path))
    taken = timings is not None and config.set_timing_cache(timings, False)
    if errors or not taken:
        reasons = ": " + "; ".join(errors) if errors else ""
        errors.clear()
        raise UsageError(
            f"{path}: its timings are not taken{reasons}",
            expected=(
                "a timing cache of this TensorRT release and this GPU, or no file yet, because "
                "timings of another GPU choose slower kernels"
            ),
            fix="Give another --timing-cache",
        )


def save_timing_cache(config: TrtObject, path: Path) -> None:
    """Write the timings that the build has used to ``path``, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    timings = config.get_timing_cache()
    # What another build has added since; a file that is no longer ours is left alone.
    if not timings.combine(config.create_timing_cache(_stored(path)), False):
        raise OutputError(
            f"{path}: during the build it became the cache of another GPU or release",
            expected="a file that only builds for one GPU write",
            fix="Give each GPU and release a --timing-cache of its own",
        )
    data = memoryview(timings.serialize()).tobytes()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(
            f"{path}: the timing cache cannot be written ({error.strerror or error})",
            expected="a writable folder",
            fix="Give another --timing-cache",
        ) from error


def _stored(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UsageError(
            f"{path}: it cannot be read ({error.strerror or error})",
            expected="a timing cache, or no file yet",
            fix="Correct --timing-cache",
        ) from error
