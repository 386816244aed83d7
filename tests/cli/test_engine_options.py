"""Options of a build: flags, environment and settings file -> record -> ``BuildOptions``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from onnx import TensorProto, helper

from mtl_export.api.engine_shapes import ShapeTexts, profiles_from_options
from mtl_export.errors import UsageError
from mtl_export.tensorrt.api import load_library
from mtl_export.tensorrt.options import BuildOptions, check_options
from mtl_export_cli.engine_options import ENGINE, size_in_bytes, with_engine_choices
from tests.tensorrt.models import write_decode, write_graph, write_routed


def choices_of(
    *words: str, env: dict[str, str] | None = None, settings: dict[str, object] | None = None
) -> tuple[BuildOptions, tuple[ShapeTexts, ...]]:
    """Return record and shapes for ``words``, and one option that is none of the builder's."""
    received: list[tuple[BuildOptions, tuple[ShapeTexts, ...]]] = []

    @with_engine_choices
    def callback(
        *, choices: BuildOptions, shapes: tuple[ShapeTexts, ...], other: str | None, **rest: Any
    ) -> None:
        assert (other, rest) == ("mine", {})
        received.append((choices, shapes))

    command: Any = click.command(click.option("--other")(callback))
    for decorator in ENGINE:
        command = decorator(command)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        command.main(
            ["--other", "mine", *words], "trt", standalone_mode=False, default_map=settings
        )
    return received[0]


def test_nothing_given_is_the_default_record() -> None:
    """No option means no choice, and nothing in recipe and manifest."""
    assert choices_of() == (BuildOptions(), ())
    assert BuildOptions().given() == {}


def test_every_flag_arrives_in_the_record() -> None:
    """Each option has its field, the timing cache by its name alone; level 0 is a choice."""
    choices, shapes = choices_of(
        *("--workspace", "2G", "--optimization-level", "0", "--tf32", "--version-compatible"),
        *("--compute-capability", "8.6", "--compute-capability", "12.0", "--strip-weights"),
        *("--hardware-compatible", "ampere-plus", "--timing-cache", "kernels.bin", "--refit"),
        *("--max-shapes", "input_ids:8x16"),
    )
    assert choices == BuildOptions(
        workspace_bytes=1 << 31,
        optimization_level=0,
        tf32=True,
        compute_capabilities=("8.6", "12.0"),
        version_compatible=True,
        hardware_compatibility="ampere-plus",
        timing_cache=Path("kernels.bin"),
        strip_weights=True,
        refit=True,
    )
    assert shapes == ((None, None, "input_ids:8x16"),)
    assert choices.given() == {
        "timing_cache": "kernels.bin",
        "workspace_bytes": 1 << 31,
        "optimization_level": 0,
        "tf32": True,
        "compute_capabilities": ["8.6", "12.0"],
        "version_compatible": True,
        "hardware_compatibility": "ampere-plus",
        "strip_weights": True,
        "refit": True,
    }


def test_repeated_shapes_are_several_profiles() -> None:
    """The first of each belong together, then the second of each."""
    _, found = choices_of(
        *("--min-shapes", "x:1", "--max-shapes", "x:2", "--min-shapes", "x:3"),
        *("--max-shapes", "x:4"),
    )
    assert found == (("x:1", None, "x:2"), ("x:3", None, "x:4"))


def test_unequal_repetition_is_refused() -> None:
    """Which minimum belongs to the second maximum would be a guess."""
    with pytest.raises(UsageError, match="--min-shapes 1 times, --opt-shapes 0 times, --max-shap"):
        choices_of("--min-shapes", "x:1", "--max-shapes", "x:2", "--max-shapes", "x:4")


@pytest.mark.parametrize("value", ["x:2,y:3", ["x:2,y:3"]])
def test_settings_file_gives_one_text_or_a_list(value: object) -> None:
    """A text is one profile and not one per character."""
    choices, found = choices_of(settings={"max_shapes": value, "compute_capability": "8.6"})
    assert found == ((None, None, "x:2,y:3"),)
    assert choices.compute_capabilities == ("8.6",)


def test_environment_gives_several_separated_by_spaces() -> None:
    """As click reads every option that may be repeated."""
    env = {"MTL_EXPORT_MAX_SHAPES": "x:1 x:2", "MTL_EXPORT_WORKSPACE": "1M"}
    choices, found = choices_of(env=env)
    assert found == ((None, None, "x:1"), (None, None, "x:2"))
    assert choices.workspace_bytes == 1 << 20


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64KiB", 1 << 16), ("512M", 1 << 29), ("2 g", 1 << 31)]
)
def test_sizes_count_in_powers_of_1024(text: str, size: int) -> None:
    """As trtexec's memory pools do."""
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2.5G", "2GB", "much"])
def test_other_sizes_are_refused(text: str) -> None:
    """A decimal unit or a fraction is asked back, not rounded."""
    with pytest.raises(UsageError, match="512M or 2G"):
        size_in_bytes(text)


def test_shapes_become_profiles(tmp_path: Path) -> None:
    """Every one is resolved against the graph."""
    path = write_routed(tmp_path)
    shapes = ((None, None, "input_ids:2x4"), (None, None, "input_ids:16x8"))
    profiles = profiles_from_options(path, shapes)
    assert [profile.shapes["input_ids"][2] for profile in profiles] == [(2, 4), (16, 8)]
    assert [profile.shapes["task_ids"][2] for profile in profiles] == [(2,), (16,)]


def test_fixed_graph_has_no_profile(tmp_path: Path) -> None:
    """Where nothing is dynamic there is nothing to profile."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    path = write_graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], value[:1], value[1:])
    assert profiles_from_options(path, ()) == ()


def test_dimension_without_a_default_can_be_given(tmp_path: Path) -> None:
    """The refusal says to give shapes; then they are taken."""
    shape: list[int | str | None] = ["batch", 3, "height", "width"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    path = write_graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], values[:1], values[1:])
    with pytest.raises(UsageError, match=r"no default: .*width in float32 x"):
        profiles_from_options(path, ())
    shapes = ("x:1x3x8x8", "x:2x3x8x8", "x:4x3x16x16")
    (profile,) = profiles_from_options(path, [shapes])
    assert profile.shapes == {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 16, 16))}


def test_shapes_of_another_part_give_their_sizes(tmp_path: Path) -> None:
    """``prefill``'s input_ids bounds the batch of ``decode``, whose own has one token."""
    prefill, decode = write_routed(tmp_path / "a"), write_decode(tmp_path / "b")
    shapes = (None, None, "input_ids:2x9,task_ids:2")
    (profile,) = profiles_from_options(decode, [shapes], beside=[prefill])
    assert profile.shapes["input_ids"][2] == (2, 1)
    assert profile.shapes["past_key_values.0.key"] == (
        (1, 2, 1, 4),
        (2, 2, 128, 4),
        (2, 2, 2047, 4),
    )
    with pytest.raises(UsageError, match="task_ids is not an input"):
        profiles_from_options(decode, [shapes])


@pytest.mark.parametrize("given", ["past_key_values.0.key:2x2x9x4", "attention_mask:2x10"])
def test_dimension_one_more_follows(tmp_path: Path, given: str) -> None:
    """``past + 1`` follows ``past``, and the other way round."""
    (profile,) = profiles_from_options(write_decode(tmp_path), [(None, None, given)])
    assert profile.shapes["attention_mask"] == ((1, 2), (2, 10), (2, 10))
    assert profile.shapes["past_key_values.0.key"] == ((1, 2, 1, 4), (2, 2, 9, 4), (2, 2, 9, 4))


def test_what_the_library_cannot_do_is_refused_before_there_is_a_graph() -> None:
    """Refit needs no weights named to be refused; what it can do passes."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    library = load_library("tensorrt_rtx")
    check_options(library, BuildOptions(tf32=True, compute_capabilities=("8.6",)))
    with pytest.raises(UsageError, match="it refits only on a GPU"):
        check_options(library, BuildOptions(refit=True))
