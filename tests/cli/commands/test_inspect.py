from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.factories import TASKS, edit_numbers, edit_tensors, toy_base, toy_checkpoint


def test_everything_about_a_checkpoint_is_said(project: Path, run: Run) -> None:
    """Format, family and paper, tasks, numbers, sizes and the base's match."""
    found = run("inspect", "--json").json
    assert found["ok"]
    assert found["format"] == "mtl-export"
    assert found["family"]["title"] == "MTL-LoRA"
    assert found["family"]["paper"].startswith("https://")
    assert found["tasks"] == [
        {"id": task.index, "name": task.name, "kind": task.kind, "labels": list(task.labels)}
        for task in TASKS
    ]
    assert (found["rank"], found["up_projections"], found["lambda"]) == ([3], [2], ["full"])
    assert (found["alpha"], found["temperature"]) == (5.0, 0.7)
    assert found["adapted_modules"] == 8
    assert found["adapted_shapes"] == {"[12, 12]": 4, "[12, 20]": 2, "[20, 12]": 2}
    # Per layer r (I + n O) + T r r + T n; heads sum (L I + L).
    layers = 4 * 3 * (12 + 2 * 12) + 2 * 3 * (12 + 2 * 20) + 2 * 3 * (20 + 2 * 12)
    assert found["parameters"] == {"adapter": layers + 8 * (27 + 6), "heads": 9 * 13}
    assert found["size_bytes"] == 4 * sum(found["parameters"].values())
    assert found["base"]["hash"] == "match"
    assert found["base"]["shapes"] == "fit"
    assert found["missing"] == []


def test_people_get_the_same_facts(project: Path, run: Run) -> None:
    """The plain output names them, too, on stdout."""
    outcome = run("inspect")
    assert outcome.code == 0
    assert outcome.stderr == ""
    for fact in (
        "MTL-LoRA, https://doi.org/", "r 3, n 2, Lambda full, alpha 5, temperature 0.7",
        "8: 4 x [12, 12]", "the SHA-256 matches; all shapes fit", "who, what, where, when",
    ):  # fmt: skip
        assert fact in outcome.stdout


def test_no_base_is_needed(project: Path, run: Run) -> None:
    """A checkpoint alone is described; the base is listed as missing."""
    outcome = run("inspect", "-c", "adapter", "--json", "--config", str(empty_toml(project)))
    assert outcome.code == 0
    assert outcome.json["base"]["hash"] == "not given"
    assert outcome.json["base"]["trained_on"] == "base"
    assert [line.partition(":")[0] for line in outcome.json["missing"]] == ["base"]


def empty_toml(folder: Path) -> Path:
    """Write a configuration that sets nothing."""
    path = folder / "empty.toml"
    path.write_text("")
    return path


def test_missing_numbers_are_listed_with_the_flag_that_gives_them(project: Path, run: Run) -> None:
    """What the checkpoint does not carry is no error here; it is said how to give it."""
    edit_numbers(project / "adapter", alpha=None, temperature=None)
    outcome = run("inspect", "--json")
    assert outcome.code == 0
    assert [line.partition(":")[0] for line in outcome.json["missing"]] == ["alpha", "temperature"]
    assert "--alpha" in outcome.json["missing"][0]
    given = run("inspect", "--json", "--alpha", "5", "--temperature", "0.7").json
    assert given["missing"] == []
    assert given["alpha"] == 5.0


@pytest.mark.parametrize(
    ("seed", "hidden", "match", "shapes"),
    [(9, 12, "mismatch", "fit"), (0, 15, "mismatch", "do not fit")],
)
def test_another_base_is_told_apart(
    project: Path, run: Run, seed: int, hidden: int, match: str, shapes: str
) -> None:
    """A base with other weights, or other shapes, is said to be another."""
    toy_base(project / "other", seed=seed, hidden=hidden)
    outcome = run("inspect", "-b", "other", "--json")
    assert outcome.code == 0
    assert outcome.json["base"]["hash"] == match
    assert shapes in outcome.json["base"]["shapes"]
    assert "MISMATCH" in run("inspect", "-b", "other").stdout


def test_a_checkpoint_that_names_no_base_is_said_to_be_unknown(project: Path, run: Run) -> None:
    """Without a hash to compare, no match is claimed."""
    toy_checkpoint(project / "anonymous")
    outcome = run("inspect", "-c", "anonymous", "--json")
    assert outcome.json["base"]["hash"] == "unknown"
    assert "no SHA-256 to compare" in run("inspect", "-c", "anonymous").stdout


def test_diagonal_lambda_and_headless_biases(project: Path, run: Run) -> None:
    """Other shapes of the family are described as what they are."""
    toy_checkpoint(
        project / "other", lambda_format="diagonal", learn_scale=True, rank=2, up_projections=1,
        head_bias=False,
    )  # fmt: skip
    found = run("inspect", "-c", "other", "--json").json
    assert (found["rank"], found["up_projections"], found["lambda"]) == ([2], [1], ["diagonal"])
    assert found["parameters"]["heads"] == 9 * 12


def test_a_broken_checkpoint_is_an_error(project: Path, run: Run) -> None:
    """Inspecting does not gloss over NaN."""
    import numpy as np

    edit_tensors(
        project / "adapter",
        layers__bert__encoder__layer__0__output__dense__mixing=np.full((3, 2), np.nan, np.float32),
    )
    outcome = run("inspect")
    assert outcome.code == 5
    assert outcome.stdout == ""
