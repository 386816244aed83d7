"""What every message must have."""

from __future__ import annotations

from mtl_export.errors import MtlExportError


def assert_whole(error: MtlExportError, *, where: str, found: str, expected: str = "") -> None:
    """Check that ``error`` says where, what was found, what was expected, and what to do."""
    assert where in error.problem
    assert found in error.problem
    assert error.problem.index(where) <= error.problem.rindex(found)
    assert expected in error.expected
    assert error.expected
    assert error.fix
    assert not error.fix.endswith(".")
    for part in (error.problem, error.expected, error.fix):
        assert part in str(error)
