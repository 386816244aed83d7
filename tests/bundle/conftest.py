from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel
from tests.merge import bases

SHARD = 40_000


@pytest.fixture
def bound(tmp_path: Path) -> BoundModel:
    """Return a toy over a base in several files, its attention adapted."""
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    return bases.bound_model(base, adapter)
