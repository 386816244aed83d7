"""``parity`` of kinds beyond text classifiers: a verdict that can fail, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.api.artefacts import Places, find_artefacts
from mtl_export.api.parity_inputs import cases_of, oracle_of
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, MtlExportError, ParityError
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import choose
from mtl_export.parity.report import ParityReport
from mtl_export.parity.run import RunOptions, run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.pytorch import OracleRunner
from mtl_export.runtime.runners.torch_language import OracleLanguageRunner
from mtl_export_cli.main import cli
from tests.parity.kinds import TASKS, change_weight, write_kind

# kind -> the outputs that are judged
JUDGED = {
    "gemma2": ["logits"],
    "bloom": ["logits"],
    "t5gemma": ["logits"],
    "mamba": ["logits"],
    "xlstm": ["logits"],
    "whisper": ["logits"],
    "clip": ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
    "wav2vec2": ["logits"],
    "ast": ["logits"],
    "segformer": ["logits"],
    "detr": ["logits", "pred_boxes"],
    "rtdetr": ["logits", "pred_boxes"],
    "llava": ["logits"],
}
# Layers whose every change is seen: what attention hands on.
VALUES = ("v_proj", "value", "layer.v")
# A batch of each task and one of both mixed, and a merged model has rows in two of these three.
QUICK_CASES = 2
Make = Callable[..., "Project"]


@dataclass(frozen=True)
class Project:
    """A base, an adapter of two tasks, and both tasks merged."""

    folder: Path
    bound: BoundModel

    @property
    def words(self) -> list[str]:
        """Return the options that name base, checkpoint and tasks."""
        sources = ["-b", str(self.folder / "base"), "-c", str(self.folder / "adapters")]
        return [*sources, "--tasks", ",".join(TASKS)]

    def artefacts(self) -> list[Artefact]:
        """Return what was merged."""
        out = self.folder / "out"
        return find_artefacts(self.bound, Places(out, out / "onnx", out / "engines"), threads=1)[0]

    def parity(self, artefacts: list[Artefact], inputs: Path | None = None) -> ParityReport:
        """Return the quick verdict on some of it."""
        cases, left_out = choose(cases_of(self.bound, inputs), "quick")
        return run_parity(
            self.bound, artefacts, cases,
            tolerance=Tolerance(), oracle=oracle_of(self.bound),
            options=RunOptions(left_out, threads=1),
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        """Return exit code and output of a command on it."""
        result = CliRunner().invoke(cli, [*words, *self.words])
        return result.exit_code, result.output


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Give a function that writes the project of a kind."""

    def project(kind: str, **changes: Any) -> Project:
        base, adapters = write_kind(kind, tmp_path, **changes)
        checkpoint = open_checkpoint(adapters, task_names=TASKS)
        opened = open_base(str(base))
        made = Project(tmp_path, bind(checkpoint, read_adapters(checkpoint, opened), opened))
        code, said = made.run("merge", "--all-tasks", "-o", str(tmp_path / "out"))
        assert code == 0, said
        return made

    return project


@pytest.mark.parametrize("kind", list(JUDGED))
def test_a_merge_passes_and_one_changed_weight_fails(make: Make, kind: str) -> None:
    """Every output is judged in every batch; and one column of one layer is seen in each."""
    project = make(kind)
    artefacts = project.artefacts()
    report = project.parity(artefacts)
    assert [cell for cell in report.cells if cell.verdict == "failed"] == []
    judged = [cell for cell in report.cells if cell.output]
    counts = {name: sum(cell.output == name for cell in judged) for name in JUDGED[kind]}
    steps = 2 if kind in {"gemma2", "bloom", "mamba", "xlstm"} else 0
    assert counts == dict.fromkeys(JUDGED[kind], len(TASKS) * QUICK_CASES + steps)
    assert len(judged) == sum(counts.values())
    layers = project.bound.adapters.layers
    layer = min([name for name in layers if name.endswith(VALUES)] or layers)
    change_weight(project.folder / "out" / "alpha", layer)
    spoilt = project.parity([artefacts[0]])
    failed = {cell.output for cell in spoilt.cells if cell.verdict == "failed" and cell.output}
    assert failed == set(JUDGED[kind]) - _blind(kind, layer)


def _blind(kind: str, layer: str) -> set[str]:
    """Return the outputs that a layer has no part in."""
    return {"image_embeds"} if kind == "clip" and layer.startswith("text_model") else set()


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "gpt2", "opt", "llama", "mixtral", "t5gemma"])
def test_the_float64_oracle_answers_a_left_padded_row_as_it_does_alone(
    make: Make, kind: str
) -> None:
    """Padding before the first token is a row of the mask that masks all; no NaN comes of it."""
    bound = make(kind).bound
    generator = np.random.default_rng(0)
    lengths, longest = (9, 4, 1), 9
    ids = generator.integers(3, 40, (3, longest))
    mask = (np.arange(longest) >= longest - np.array(lengths)[:, None]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "task_ids": np.array([0, 1, 1])}
    if kind == "t5gemma":
        inputs[NEW_TOKENS] = generator.integers(3, 40, (3, 5))
    runner: Runner = oracle_of(bound)("fp64")
    with runner:
        together = runner.infer(inputs)["logits"]
        for row, length in enumerate(lengths):
            one = {
                name: value[row : row + 1, longest - length :]
                if name in {"input_ids", "attention_mask"}
                else value[row : row + 1]
                for name, value in inputs.items()
            }
            alone = runner.infer(one)["logits"][0]
            # Softmax is float32 in some of these models, whatever the dtype of the rest.
            np.testing.assert_allclose(together[row][-len(alone) :], alone, atol=2e-6)


def test_rows_that_are_nan_blame_neither_checkpoint_nor_mask(make: Make, tmp_path: Path) -> None:
    """The refusal names the rows first, which is where this NaN is."""
    project = make("ast")
    waves = np.full((4, 32, 16), np.nan, np.float32)
    np.savez(tmp_path / "rows.npz", input_values=waves, task_ids=np.array([0, 1, 0, 1]))
    with pytest.raises(ParityError, match="Look for NaN in the rows, the base and the adapter"):
        project.parity(project.artefacts(), tmp_path / "rows.npz")


def test_a_classifier_without_padding_token_is_refused(make: Make) -> None:
    """Merging has no need of one; parity says what to set."""
    project = make("llama_classifier")
    code, said = project.run("parity", "--merged", str(project.folder / "out"))
    assert code == 5
    assert "Set pad_token_id in config.json of the base" in said


def _save(path: Path, **arrays: Array) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_rows_of_any_argument_come_from_arrays(make: Make, tmp_path: Path) -> None:
    """Whisper's features with the tokens its decoder reads; every task of every batch is judged."""
    project = make("whisper")
    generator = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "input_features": generator.normal(size=(4, 8, 40)),
        "decoder_input_ids": generator.integers(4, 60, (4, 6)),
        "task_ids": np.array([0, 1, 0, 1]),
    }
    report = project.parity(project.artefacts(), _save(tmp_path / "rows.npz", **arrays))
    verdicts = [cell.verdict for cell in report.cells if cell.output]
    assert verdicts == ["passed"] * len(TASKS) * QUICK_CASES
    cases = cases_of(project.bound, tmp_path / "rows.npz")
    # Nothing is cut: six given tokens follow the decoder's own first one.
    assert {case.inputs[NEW_TOKENS].shape[1] for case in cases} == {7}
    arrays["input_features"] = arrays["input_features"][..., :30]
    path = _save(tmp_path / "short.npz", **arrays)
    code, said = project.run(
        "parity", "--merged", str(project.folder / "out"), "--inputs", str(path)
    )
    assert code == 5
    assert "WhisperForConditionalGeneration: it cannot compute input_features [2, 8, 30]" in said
    assert "--inputs arrays.npz" in said


def test_rows_that_miss_an_adapted_layer_are_refused(make: Make, tmp_path: Path) -> None:
    """Text alone reaches no layer of the tower of images, so nothing is known of those."""
    project = make("llava")
    ids = np.random.default_rng(0).integers(3, 40, (4, 6))
    path = _save(tmp_path / "text.npz", input_ids=ids, task_ids=np.array([0, 1, 0, 1]))
    with pytest.raises(ParityError, match=r"no row reaches the adapted layers .*vision_tower"):
        project.parity(project.artefacts(), path)


def test_a_model_whose_rows_cannot_be_made_says_what_to_pass(make: Make) -> None:
    """A sound model whose config gives neither frames nor bins."""
    project = make("ast")
    config = {"model_type": "other", "architectures": ["ASTForAudioClassification"]}
    bound = replace(project.bound, base=replace(project.bound.base, config=config))
    with pytest.raises(ParityError, match=r"Pass --inputs arrays\.npz with input_values \[N"):
        cases_of(bound, None)


def test_whatever_a_forward_pass_raises_is_one_error(make: Make) -> None:
    """Of the merged folder as of the oracle: the model's own words, and what it takes."""
    project = make("clip")
    ids = np.ones((2, 5), np.int64)
    with OracleRunner(project.bound, "fp32") as oracle, pytest.raises(BaseModelError) as caught:
        oracle.infer({"input_ids": ids, "task_ids": np.array([0, 1])})
    assert "pixel_values" in str(caught.value)
    with project.artefacts()[0].runner as merged, pytest.raises(MtlExportError, match="AttributeE"):
        merged.infer({"input_ids": ids})


def test_noise_that_excuses_any_answer_is_refused(make: Make) -> None:
    """A noise floor as large as all answers differ by would pass anything."""
    project = make("llama")
    cases, left_out = choose(cases_of(project.bound, None), "quick")

    class Noisy(OracleLanguageRunner):
        def infer(self, inputs: Any) -> dict[str, Array]:
            logits = super().infer(inputs)["logits"]
            return {"logits": logits + np.sign(logits) * np.abs(logits).max()}

    def oracle(dtype: str) -> Runner:
        return (OracleLanguageRunner if dtype == "fp64" else Noisy)(project.bound, dtype)

    with pytest.raises(ParityError, match="any answer would pass"):
        run_parity(
            project.bound, project.artefacts(), cases,
            tolerance=Tolerance(), oracle=oracle, options=RunOptions(left_out),
        )  # fmt: skip
