"""The model and the batches that fake artefacts are judged on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.parity.cases import Case, RowLimits, build_cases, seeded_rows
from tests.graph import marked
from tests.parity.planted import Exported, exported


@pytest.fixture
def bound(tmp_path: Path) -> BoundModel:
    """Return three tasks of widths 2, 4 and 1 on a base that is one small file."""
    model = marked.bound()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    adapters = replace(model.adapters, checkpoint_sha256="c" * 64)
    return replace(model, base=replace(model.base, weight_files=(file,)), adapters=adapters)


@pytest.fixture
def cases() -> list[Case]:
    """Return the usual cases of seeded rows."""
    rows = seeded_rows(RowLimits(3, 31), ("input_ids", "attention_mask"), per_task=5)
    return build_cases(rows, RowLimits(3, 31, 40))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return an exported toy whose graphs faults are planted in: one trace, one load each."""
    return exported(tmp_path_factory.mktemp("planted"))
