from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import FLOAT_DTYPES, NUMPY_DTYPES, Tensor


@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPES))
def test_sizes_follow_from_dtype_and_shape(dtype: str) -> None:
    """A tensor's size is its element count times the dtype's width, 1 for a scalar."""
    array = np.ones((3, 5), NUMPY_DTYPES[dtype])
    assert Tensor("x", dtype, (3, 5), lambda: array).size_bytes == array.nbytes
    assert Tensor("x", dtype, (), lambda: array).size_bytes == array.itemsize


@pytest.mark.parametrize("dtype", sorted(FLOAT_DTYPES))
def test_widening_loses_nothing(dtype: str) -> None:
    """float64 stays, every other float becomes float32 with the same values."""
    array = np.array([1 / 3, -2.5, 6e-5]).astype(NUMPY_DTYPES[dtype])
    wide = Tensor("x", dtype, (3,), lambda: array).widened()
    assert wide.dtype == (np.float64 if dtype == "F64" else np.float32)
    np.testing.assert_array_equal(wide.astype(np.float64), array.astype(np.float64))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    """Name, dtype, shape and size are known without the values."""

    def load() -> np.ndarray:
        raise AssertionError("read")

    tensor = Tensor("x", "F32", (2,), load)
    assert tensor.size_bytes == 8
    with pytest.raises(AssertionError, match="read"):
        tensor.numpy()
