from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mtl_export.bench.candidates import Batches
from mtl_export.bench.measure import (
    BatchShape,
    Footprint,
    Measurement,
    Timing,
    call_count,
    measure,
    peak_bytes,
    pss_bytes,
)
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, UsageError
from mtl_export.runtime.rows import Field
from tests.bench.fake_candidates import FIELDS, Fake

ONE, EIGHT = BatchShape(1, 4), BatchShape(8, 16)
BATCHES = Batches(vocabulary=50, task_ids=(2, 0))


def measured(*subjects: Fake, rounds: int = 3) -> Measurement:
    """Measure fakes on two shapes."""
    return measure(subjects, [ONE, EIGHT], BATCHES, rounds=rounds)


def test_what_calls_claim_is_what_is_reported() -> None:
    """Percentiles, throughput and ratios follow from the seconds, per shape and subject."""
    said: list[str] = []
    fakes = [Fake("merged", 0.001), Fake("slow", 0.004, takes=None), Fake("big", megabytes=200)]
    result = measure(fakes, [ONE, EIGHT], BATCHES, rounds=3, progress=said.append)
    assert said == ["load merged", "load slow", "load big", "measure 1x4", "measure 8x16"]
    assert [(t.subject, str(t.shape), t.phase) for t in result.timings] == [
        (fake.name, shape, "forward") for shape in ("1x4", "8x16") for fake in fakes
    ]
    slow, base = (result.timing(name, EIGHT, "forward") for name in ("slow", "merged"))
    assert slow is not None
    assert base is not None
    assert slow.percentile_ms(50) == pytest.approx(32.0)
    assert slow.rows_per_s == pytest.approx(250.0)
    assert slow.tokens_per_s == pytest.approx(4000.0)
    assert slow.ratio_to(base) == pytest.approx(4.0)
    assert len(slow.blocks) == 3
    assert len(slow.calls) >= 20
    assert result.timing("slow", EIGHT, "decode") is None
    small, _, big = result.footprints
    assert small.load_s >= 0.05
    assert small.before_bytes > 10_000_000
    assert 150_000_000 < big.peak_bytes - small.peak_bytes < 250_000_000
    assert big.pss_bytes is None or big.pss_bytes > 150_000_000


def test_a_language_model_has_two_phases() -> None:
    """A decoding step makes one token for each row, a prompt as many as it is long."""
    result = measured(Fake("model", 0.01, "generates"), rounds=1)
    prefill, decode = (result.timing("model", EIGHT, phase) for phase in ("prefill", "decode"))
    assert prefill is not None
    assert decode is not None
    assert len(decode.calls) == 3 * len(prefill.calls)
    assert prefill.tokens_per_s == pytest.approx(8 * 16 / 0.08)
    assert decode.tokens_per_s == pytest.approx(8 / 0.01)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("refuses", EngineRunError, "fake: no. Expected yes, because so. Do."),
        ("dies", EngineRunError, "its process ended with code 9"),
        ("bug", RuntimeError, "a bug in a call, with 0 bytes held"),
        ("memory", EngineRunError, r"bad: memory ran out \(Unable to allocate 9 GiB\)"),
        ("tensors", EngineRunError, r"bad: memory ran out \(DefaultCPUAllocator: can't allocate"),
    ],
)
def test_what_happens_in_the_process_is_told(
    fault: str, error: type[Exception], message: str
) -> None:
    """Our errors arrive as themselves, a death with its code, a bug with its traceback."""
    with pytest.raises(error, match=message):
        measured(Fake("good"), Fake("bad", fault=fault))


def test_a_shape_beyond_memory_is_refused() -> None:
    """Before it is made: a system that lends more than it has would end processes."""
    with pytest.raises(UsageError, match=r"shape 99999999999x40: its inputs take 64000\.0 GB"):
        BATCHES(BatchShape(99999999999, 40), FIELDS)


def test_images_have_no_tokens() -> None:
    """Rows a second, and nothing made up from the shape."""
    images = Fake("vision", takes=(Field("pixel_values", ("batch", 3, 4, 4), "float32"),))
    timing = measured(images, rounds=1).timing("vision", EIGHT, "forward")
    assert timing is not None
    assert timing.rows_per_s > 0
    assert timing.tokens_per_s is None


def test_a_ratio_compares_blocks_of_one_round() -> None:
    """A machine that slows down for one round does not change it."""
    own = Timing("own", ONE, "forward", ((1.1, 1.1), (11.0, 11.0), (2.2, 2.2)))
    other = Timing("other", ONE, "forward", ((1.0,), (10.0,), (2.0,)))
    assert own.ratio_to(other) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("seconds", "rounds", "calls"), [(0.1, 5, 5), (1e-9, 5, 200), (3.0, 5, 4), (3.0, 20, 1)]
)
def test_blocks_are_short_and_there_are_twenty_calls(
    seconds: float, rounds: int, calls: int
) -> None:
    """Half a second each, but never fewer than twenty calls in all."""
    assert call_count(seconds, rounds) == calls


def test_memory_of_this_process_is_known() -> None:
    """The peak is at least what a hundred megabytes add."""
    held = np.ones(100_000_000, np.uint8)
    assert peak_bytes() > held.nbytes
    pss = pss_bytes()
    assert pss is None or pss > 10_000_000
    assert Footprint("x", 1.0, 1, 2, None).pss_bytes is None


def batch_of(*fields: Field, shape: BatchShape = EIGHT) -> dict[str, Array]:
    """Return a batch for a graph with these inputs."""
    chosen: Sequence[Field] = fields
    return BATCHES(shape, chosen)


def test_batches_fit_the_graph() -> None:
    """Ids inside the vocabulary, full rows, tasks in turn, images of the graph's own size."""
    batch = batch_of(*FIELDS, Field("task_ids", ("batch",), "int64"))
    assert batch["input_ids"].shape == (8, 16)
    assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < 50
    assert len(np.unique(batch["input_ids"])) > 20
    assert batch["attention_mask"].all()
    np.testing.assert_array_equal(batch["task_ids"], [2, 0] * 4)
    np.testing.assert_array_equal(batch["input_ids"], batch_of(*FIELDS)["input_ids"])
    scalar = batch_of(Field("task_ids", (), "int64"))["task_ids"]
    assert scalar.shape == ()
    assert scalar == 2
    images = batch_of(Field("pixel_values", ("batch", 3, 4, 4), "float16"))["pixel_values"]
    assert images.shape == (8, 3, 4, 4)
    assert images.dtype == np.float16
    assert not batch_of(Field("token_type_ids", ("batch", "sequence"), "int32"))[
        "token_type_ids"
    ].any()
