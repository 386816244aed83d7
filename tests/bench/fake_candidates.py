"""Subjects for ``measure`` that take no time, refuse, die or have a bug; sent to processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from time import sleep

import numpy as np

from mtl_export.bench.measure import Opened, Timings
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.runtime.rows import Field

FIELDS = (
    Field("input_ids", ("batch", "sequence"), "int64"),
    Field("attention_mask", ("batch", "sequence"), "int64"),
)


@dataclass(frozen=True)
class Fake:
    """Claims that its calls take ``seconds`` times the number of its inputs' rows."""

    name: str
    seconds: float = 0.001
    fault: str = ""
    megabytes: int = 0
    takes: tuple[Field, ...] | None = FIELDS

    def prepare(self) -> None:
        """Import nothing."""

    def open(self) -> Opened:
        """Open, or show the fault."""
        if self.fault == "refuses":
            raise EngineRunError("fake: no", expected="yes, because so", fix="Do")
        if self.fault == "dies":
            os._exit(9)
        held = np.ones(self.megabytes * 1_000_000, np.uint8)
        sleep(0.05)

        def call(inputs: Mapping[str, Array]) -> Timings:
            if self.fault == "bug":
                raise ValueError(f"a bug in a call, with {len(held)} bytes held")
            if self.fault == "memory":
                raise MemoryError("Unable to allocate 9 GiB")
            if self.fault == "tensors":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
            rows = len(next(iter(inputs.values())))
            wanted = {field.name for field in self.takes or FIELDS}
            wanted |= {"task_ids"} if self.takes is None else set()
            assert set(inputs) == wanted
            if self.fault == "generates":
                return {"prefill": [rows * self.seconds], "decode": [self.seconds] * 3}
            return {"forward": [rows * self.seconds]}

        return Opened(call, self.takes)
