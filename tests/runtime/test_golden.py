from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.errors import IntegrityError
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, golden_bytes, read_golden

SAVED = np.array([[1.0, -2.0, -np.inf], [np.nan, np.nan, np.nan]])


def vector(atol: float = 0.01, rtol: float = 0.1) -> Vector:
    """Return a vector with a masked column and a poisoned row."""
    inputs = {
        "input_ids": np.array([[1, 2], [3, 4]]),
        "task_ids": np.array([0, 7]),
        "pixels": np.ones((2, 3), np.float32),
    }
    return Vector("mixed", "model.onnx", inputs, {"logits": SAVED}, atol, rtol)


def written(folder: Path, content: bytes) -> Path:
    """Return a golden file with this content."""
    path = folder / GOLDEN_FILE
    path.write_bytes(content)
    return path


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    """Names, dtypes, values and tolerances come back; the bytes are always the same."""
    both = (vector(), replace(vector(), name="other", model="decode.onnx", atol=1e-7))
    content = golden_bytes(both)
    assert content == golden_bytes(both)
    for found, one in zip(read_golden(written(tmp_path, content)), both, strict=True):
        assert (found.name, found.model, found.atol, found.rtol) == (
            one.name, one.model, one.atol, one.rtol,
        )  # fmt: skip
        for part in ("inputs", "outputs"):
            assert list(getattr(found, part)) == list(getattr(one, part))
            for name, value in getattr(one, part).items():
                assert getattr(found, part)[name].dtype == value.dtype
                np.testing.assert_array_equal(getattr(found, part)[name], value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({(0, 0): 1.109}, ""),  # 0.01 + 0.1 * 1
        ({(0, 0): 1.111}, "1 of 6 values of logits differ; the first, [0, 0], is 1.111, was 1"),
        ({(0, 1): -2.2099}, ""),
        ({(0, 1): np.nan}, "is nan, was -2"),
        ({(0, 1): np.inf}, "is inf, was -2"),
        ({(0, 2): -1e30}, "is -1e+30, was -inf, may differ by 0"),
        ({(0, 2): np.inf}, "is inf, was -inf"),
        ({(0, 2): np.nan}, "is nan, was -inf"),
        ({(1, 1): 0.0}, "is 0, was nan"),  # an id that no task has is answered
    ],
)
def test_an_output_is_held_against_the_saved_one(
    change: dict[tuple[int, int], float], reason: str
) -> None:
    """Finite values within both tolerances; NaN and infinities exactly."""
    found = SAVED.copy()
    for index, value in change.items():
        found[index] = value
    difference = vector().difference({"logits": found})
    assert reason in difference
    assert bool(difference) == bool(reason)


def test_a_missing_or_misshapen_output_differs() -> None:
    """An output that cannot be compared is no pass."""
    assert vector().difference({"other": SAVED}) == "no output 'logits'"
    assert "shape [2, 2], not [2, 3]" in vector().difference({"logits": SAVED[:, :2]})


def npz(**arrays: np.ndarray) -> bytes:
    """Return a numpy archive."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def index(text: str) -> bytes:
    """Return an archive with this index and one vector's arrays."""
    return npz(golden=np.array(text), **{"0.inputs.x": np.ones(1), "0.outputs.y": np.ones(1)})


FORM = '{{"schema": "mtl-export.golden/1", "vectors": [{}]}}'
GOOD = '{"name": "t", "model": "m.onnx", "atol": 1.0, "rtol": 0.0}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK no archive",
        golden_bytes([vector()])[:200],
        npz(x=np.ones(1)),
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (), }".ljust(127)
        + b"\n"
        + bytes(8),
        npz(golden=np.array({"schema": "x"}, dtype=object)),  # would need pickle
        index("{"),
        index('{"schema": "mtl-export.golden/9", "vectors": []}'),
        index(FORM.format(f"{GOOD}, {GOOD}")),
        index(FORM.format(GOOD.replace("m.onnx", "../m"))),
        index(FORM.format(GOOD.replace("1.0", "null"))),
    ],
)
def test_what_is_no_golden_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Damaged, pickled, of another version, or pointing outside the folder."""
    with pytest.raises(IntegrityError, match="parity --golden again"):
        read_golden(written(tmp_path, content))


def test_a_good_index_is_read(tmp_path: Path) -> None:
    """The faults above are what is refused, not the archive around them."""
    text = FORM.format(GOOD)
    (found,) = read_golden(written(tmp_path, index(text)))
    assert (found.name, found.model, found.atol) == ("t", "m.onnx", 1.0)
