"""Shapes and profiles: what users type, what models suggest, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from mtl_export.errors import EngineBuildError, IntegrityError, UsageError
from mtl_export.tensorrt import Profile, default_profile, parse_shapes
from mtl_export.tensorrt.shapes import base_and_offset, check_profiles
from mtl_export.tensorrt.source import read_source
from tests.tensorrt.models import write_decode, write_graph, write_merged, write_routed


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("input_ids:1x16,task_ids:1", {"input_ids": (1, 16), "task_ids": (1,)}),
        (" x:0:2x3 , y:7", {"x:0": (2, 3), "y": (7,)}),
        ("past:1x12x0x64", {"past": (1, 12, 0, 64)}),
        ("step:scalar,other", {"step": (), "other": ()}),
    ],
)
def test_shapes_follow_trtexec(text: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Names may hold colons, sizes may be 0, scalars have no sizes."""
    assert parse_shapes(text) == shapes


@pytest.mark.parametrize("text", ["", "x:1x", "x:1,", "x:-1", "x:1x²", "x:axb", "x:1,x:2", ":3x4"])
def test_malformed_shapes_are_refused(text: str) -> None:
    """Anything else is a usage error that repeats what was typed."""
    with pytest.raises(UsageError) as refusal:
        parse_shapes(text)
    assert repr(text) in str(refusal.value)


def test_default_profile_gives_one_batch_to_every_input(tmp_path: Path) -> None:
    """``task_ids`` has the same range as the rows it labels."""
    profile = default_profile(write_routed(tmp_path))
    assert profile == Profile(
        {"input_ids": ((1, 1), (8, 64), (32, 512)), "task_ids": ((1,), (8,), (32,))}
    )


def test_default_profile_obeys_small_maxima(tmp_path: Path) -> None:
    """The size to be fast at never exceeds the maximum."""
    profile = default_profile(write_routed(tmp_path), max_batch=4, max_sequence=16)
    assert profile.shapes["input_ids"] == ((1, 1), (4, 16), (4, 16))


@pytest.mark.parametrize(
    ("config", "tokenizer", "limit"),
    [
        ({"max_position_embeddings": 128}, None, 128),
        ({"max_position_embeddings": 514}, {"model_max_length": 512}, 512),
        ({"max_position_embeddings": 130}, {"model_max_length": 128}, 128),
        ({"n_positions": 256}, {"model_max_length": 1e30}, 256),
        ({"max_position_embeddings": 32768}, None, 512),
        ({}, None, 512),
    ],
)
def test_sequence_limit_comes_from_the_model(
    tmp_path: Path, config: dict[str, int], tokenizer: dict[str, float] | None, limit: int
) -> None:
    """The smaller of what model and tokenizer allow, and never more than 512."""
    path = write_merged(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert default_profile(path).shapes["input_ids"][2] == (32, limit)


@pytest.mark.parametrize(
    ("config", "longest"), [({"max_position_embeddings": 300}, 300), ({}, 2048)]
)
def test_default_profile_of_a_cache_follows_the_positions(
    tmp_path: Path, config: dict[str, int], longest: int
) -> None:
    """The mask is one longer than the cache, and never longer than the model's positions."""
    path = write_decode(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert default_profile(path).shapes == {
        "input_ids": ((1, 1), (8, 1), (32, 1)),
        "attention_mask": ((1, 2), (8, 129), (32, longest)),
        "past_key_values.0.key": ((1, 2, 1, 4), (8, 2, 128, 4), (32, 2, longest - 1, 4)),
    }


def test_mask_that_does_not_follow_the_cache_is_refused(tmp_path: Path) -> None:
    """A full cache could not be served: the builder takes both without a word."""
    shapes = dict(default_profile(write_decode(tmp_path)).shapes)
    shapes["attention_mask"] = ((1, 2), (8, 129), (32, 512))
    with pytest.raises(UsageError, match=r"max of dimension past \+ 1 is 512, of past 2047"):
        check_profiles(read_source(tmp_path / "model.onnx"), [Profile(shapes)])


@pytest.mark.parametrize(
    ("dimension", "parts"),
    [("past + 1", ("past", 1)), ("1 + past", ("past", 1)), ("past", ("past", 0))],
)
def test_dimension_is_counted_from_another(dimension: str, parts: tuple[str, int]) -> None:
    """Exporters write the sum either way."""
    assert base_and_offset(dimension) == parts


def test_default_profile_refuses_other_dimensions_by_name(tmp_path: Path) -> None:
    """A dimension nobody knows a range for is named, with its input."""
    value = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", "height"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "height"])
    path = write_graph(tmp_path, [helper.make_node("Relu", ["pixels"], ["y"])], [value], [out])
    with pytest.raises(UsageError, match=r"height in float32 pixels\[batch, height\]"):
        default_profile(path)


@pytest.mark.parametrize("limits", [(0, None, None), (32, 0, None), (32, None, 0)])
def test_default_profile_refuses_empty_ranges(
    tmp_path: Path, limits: tuple[int, int | None, int | None]
) -> None:
    """A maximum below 1 admits nothing."""
    batch, sequence, past = limits
    with pytest.raises(UsageError, match="at least 1"):
        default_profile(
            write_routed(tmp_path), max_batch=batch, max_sequence=sequence, max_past=past
        )


def test_broken_config_is_named(tmp_path: Path) -> None:
    """A config.json that is no JSON is the user's to repair."""
    path = write_merged(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        default_profile(path)


GOOD = {"input_ids": ((1, 1), (8, 64), (32, 512)), "task_ids": ((1,), (8,), (32,))}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_idz": ((1, 1), (1, 1), (1, 1))}, "input_idz is not an input"),
        ({"task_ids": None}, "task_ids is missing"),
        ({"task_ids": ((1, 1), (8, 1), (32, 1))}, "task_ids min 1x1 has not the rank"),
        (
            {"task_ids": ((9,), (8,), (32,))},
            "task_ids is not 1 <= min <= opt <= max (9, 8, 32)",
        ),
        (
            {"input_ids": ((0, 0), (0, 0), (0, 0))},
            "input_ids is not 1 <= min <= opt <= max (0x0, 0x0, 0x0)",
        ),
        (
            {"task_ids": ((1,), (8,), (64,))},
            "max of dimension batch differs: 32 in input_ids, 64 in task_ids",
        ),
        (
            {"task_ids": ((1,), (4,), (32,))},
            "opt of dimension batch differs: 8 in input_ids, 4 in task_ids",
        ),
    ],
)
def test_profiles_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, tuple[tuple[int, ...], ...] | None], message: str
) -> None:
    """Unknown, missing and misshaped inputs, and unequal sizes under one name."""
    shapes = {name: shape for name, shape in {**GOOD, **changed}.items() if shape is not None}
    source = read_source(write_routed(tmp_path))
    with pytest.raises(UsageError) as refusal:
        check_profiles(source, [Profile(GOOD), Profile(shapes)])  # type: ignore[arg-type]
    assert message in str(refusal.value)
    assert "profile 2" in refusal.value.problem


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "llama", "max_position_embeddings": 256}, None),
        ({"max_position_embeddings": 256}, None),
        (None, None),
    ],
)
def test_more_tokens_than_positions_are_refused(
    tmp_path: Path, config: dict[str, object] | None, limit: int | None
) -> None:
    """Where the model is known to end at them; the default never has more."""
    path = write_routed(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    source = read_source(path)
    longest = limit or 100_000
    task_ids = ((1,), (8,), (32,))
    check_profiles(source, [default_profile(path)])
    fits = Profile({"input_ids": ((1, 1), (8, 64), (32, longest)), "task_ids": task_ids})
    check_profiles(source, [fits])
    if limit:
        wide = Profile({"input_ids": ((1, 1), (8, 64), (32, limit + 1)), "task_ids": task_ids})
        reason = f"max of input_ids has {limit + 1} tokens, the model {limit} positions"
        with pytest.raises(UsageError, match=reason):
            check_profiles(source, [wide])


def test_every_profile_mistake_is_reported_at_once(tmp_path: Path) -> None:
    """One run names all of them."""
    source = read_source(write_routed(tmp_path))
    with pytest.raises(UsageError) as refusal:
        check_profiles(source, [Profile({"typo": ((1,), (1,), (1,))})])
    for part in ("typo is not an input", "input_ids is missing", "task_ids is missing"):
        assert part in refusal.value.problem


def test_fixed_sizes_may_not_change(tmp_path: Path) -> None:
    """A profile may name a fixed size, and only that size."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    path = write_graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [value], [out])
    check_profiles(read_source(path), [Profile({"x": ((1, 3), (2, 3), (4, 3))})])
    with pytest.raises(UsageError, match="x max 4x5 changes a fixed size"):
        check_profiles(read_source(path), [Profile({"x": ((1, 3), (2, 3), (4, 5))})])


def test_dynamic_inputs_need_a_profile(tmp_path: Path) -> None:
    """Without one the builder would only log."""
    with pytest.raises(UsageError, match="no profile for its dynamic inputs input_ids, task_ids"):
        check_profiles(read_source(write_routed(tmp_path)), [])


def test_source_describes_the_graph(tmp_path: Path) -> None:
    """Inputs, outputs, metadata and external files, without reading a weight."""
    source = read_source(write_routed(tmp_path))
    assert [str(tensor) for tensor in source.inputs] == [
        "int64 input_ids[batch, sequence]",
        "int64 task_ids[batch]",
    ]
    assert [str(tensor) for tensor in source.outputs] == ["float32 logits[batch, 5]"]
    assert source.external_files == ("model.onnx.data",)
    assert source.structured("tasks", [object])[1]["name"] == "sentiment"
    assert source.structured("absent", [object]) is None


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    """The key is named."""
    source = read_source(write_routed(tmp_path))
    with pytest.raises(EngineBuildError, match=r"mtl_export\.layout: not JSON"):
        source.structured("layout", str)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "a/../../secret", "C:\\secret"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    """A graph from elsewhere cannot point at other files of this machine."""
    import onnx

    path = write_merged(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="lies outside"):
        read_source(path)
