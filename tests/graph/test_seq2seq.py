"""T5 and BART as three graphs: every task, mixed batches, untraced sizes, generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.seq2seq import SAMPLE_TOKENS, STEMS, trace_seq2seq
from mtl_export.graph.trace import SAMPLE_BATCH, SAMPLE_SEQUENCE
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import RowLimits, build_cases, decoder_cases, seeded_rows
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.ort import OrtPart, OrtRunner, open_session
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.pytorch import oracle_model
from mtl_export.runtime.runners.seq2seq import FILES, OrtSeq2SeqRunner
from mtl_export.runtime.runners.torch_seq2seq import OracleSeq2SeqRunner
from mtl_export.runtime.seq2seq_generation import Seq2SeqGreedyDecoder, Seq2SeqParts
from mtl_export.runtime.session import TaskSession
from mtl_export.runtime.token_rules import TokenRules
from mtl_export.tensorrt import BuildOptions, build_engine, default_profile
from tests.graph import seq2seq_toys as toys
from tests.graph.constants import short_constants_below
from tests.graph.seq2seq_toys import Exported

# Beyond what float32 itself costs.
ATOL = 1e-5
# Rows, tokens of the encoder, tokens of the decoder; none of them traced.
SHAPES = [(1, 1, 1), (1, 7, 2), (2, 33, 8), (4, 9, 13)]
NEW = 9
T5_LAYER = "decoder.block.0.layer.1.EncDecAttention"


@pytest.fixture(scope="module", params=sorted(toys.MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Give each toy as graphs, made once."""
    return toys.exported_toy(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def oracles(exported: Exported) -> Iterator[tuple[OracleSeq2SeqRunner, OracleSeq2SeqRunner]]:
    """Give the unmerged model in float64 and in float32."""
    with (
        OracleSeq2SeqRunner(exported.bound, "fp64") as exact,
        OracleSeq2SeqRunner(exported.bound, "fp32") as single,
    ):
        yield exact, single


def batch(rows: int, sequence: int, tokens: int, shift: int = 0) -> dict[str, Array]:
    """Return a mixed batch with tokens for the decoder to read."""
    generator = np.random.default_rng(7)
    return {
        **toys.rows(rows, sequence),
        NEW_TOKENS: generator.integers(0, toys.VOCABULARY, (rows, tokens)),
        "task_ids": (np.arange(rows) + shift) % len(toys.TASKS),
    }


def without_ids(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a graph of one task takes."""
    return {name: value for name, value in inputs.items() if name != "task_ids"}


def opened(folder: Path) -> Seq2SeqParts:
    """Return the graphs in ``folder``, ready to run."""
    paths = [folder / name for name in FILES]
    return Seq2SeqParts(*(OrtPart(open_session(path, threads=1), path) for path in paths))


def test_the_shapes_were_not_traced() -> None:
    """The comparison below would prove little on the traced sizes."""
    for rows, sequence, tokens in SHAPES:
        assert rows != SAMPLE_BATCH
        assert sequence != SAMPLE_SEQUENCE
        assert max(1, tokens // 2) != SAMPLE_TOKENS


def test_three_graphs_become_engines(exported: Exported, tmp_path: Path) -> None:
    """TensorRT takes both caches, each in the range of what it keeps."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    paths = {stem: exported.single / f"{stem}.onnx" for stem in STEMS}
    profiles = {stem: default_profile(path, max_past=40) for stem, path in paths.items()}
    for stem, path in paths.items():
        manifest = build_engine(
            path, tmp_path / stem, BuildOptions([profiles[stem]]), library_name="tensorrt_rtx"
        )
        assert manifest.layout == "single-graph"
    shapes = profiles["decoder_with_past"].shapes
    own, encoded = (shapes[f"past_key_values.0.{one}.key"] for one in ("decoder", "encoder"))
    assert (own[0][2], own[2][2]) == (1, 40)
    assert encoded[2][2] == shapes["encoder_attention_mask"][2][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_is_answered_by_its_task(
    exported: Exported,
    oracles: tuple[OracleSeq2SeqRunner, OracleSeq2SeqRunner],
    shape: tuple[int, int, int],
) -> None:
    """All three parts, mixed and merged, equal the oracle that knows no cache."""
    exact, lower = oracles
    inputs = batch(*shape)
    allowed = ATOL + np.abs(lower.infer(inputs)["logits"] - exact.infer(inputs)["logits"]).max()
    for shift in range(len(toys.TASKS)):
        inputs = batch(*shape, shift)
        expected = exact.infer(inputs)["logits"]
        with OrtSeq2SeqRunner(exported.single, threads=1) as runner:
            found = runner.infer(inputs)["logits"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= allowed
    for task, folder in zip(toys.TASKS, exported.merged, strict=True):
        inputs["task_ids"] = np.full(shape[0], task.index)
        expected = exact.infer(inputs)["logits"]
        with OrtSeq2SeqRunner(folder, threads=1) as runner:
            found = runner.infer(without_ids(inputs))["logits"]
        assert np.abs(found - expected).max() <= allowed


def test_generation_says_what_transformers_says(exported: Exported) -> None:
    """Token by token, a mixed batch and each task alone, by the model's own settings."""
    oracle = oracle_model(exported.bound, torch.float32)
    model: Any = oracle.model
    inputs = toys.rows(6, 10, seed=4)
    rules = TokenRules.from_folder(exported.single)
    decoders = [Seq2SeqGreedyDecoder(opened(path), rules) for path in exported.merged]
    mixed = Seq2SeqGreedyDecoder(opened(exported.single), rules)
    said = []
    for ids in (np.arange(6) % 2, np.zeros(6, np.int64), np.ones(6, np.int64)):
        oracle.routing.set(torch.from_numpy(ids))
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.inference_mode():
            expected = model.generate(**tensors, do_sample=False, num_beams=1, max_new_tokens=NEW)[
                :, 1:
            ].numpy()
        found = mixed.generate(inputs, task_ids=ids, max_new_tokens=NEW)
        np.testing.assert_array_equal(found, expected)
        if len(set(ids)) == 1:
            own = decoders[ids[0]].generate(inputs, max_new_tokens=NEW)
            np.testing.assert_array_equal(own, expected)
        said.append(expected)
    assert (said[1] != said[2]).any()


def test_a_task_session_generates_by_name(exported: Exported) -> None:
    """Ragged rows of mixed tasks, by the names of tasks, in one batch or in several."""
    session = TaskSession(exported.single, threads=1)
    inputs, ids = toys.rows(4, 9, seed=5), np.array([1, 0, 0, 1])
    rules = TokenRules.from_folder(exported.single)
    decoder = Seq2SeqGreedyDecoder(opened(exported.single), rules)
    expected = decoder.generate(inputs, task_ids=ids, max_new_tokens=NEW)
    lengths = inputs["attention_mask"].sum(axis=1)
    rows = [row[:length].tolist() for row, length in zip(inputs["input_ids"], lengths, strict=True)]
    names = [toys.TASKS[index].name for index in ids]
    for max_batch in (None, 3):
        found = session.generate(rows, names, max_new_tokens=NEW, max_batch=max_batch)
        for said, wanted in zip(found, expected.tolist(), strict=True):
            assert said == wanted[: len(said)]
            assert len(said) == NEW or said[-1] in rules.eos


def test_rows_repeated_for_beams_keep_their_task(exported: Exported) -> None:
    """States, mask and ids repeated k times, as a beam search does, answer k times alike."""
    beams, parts = 3, opened(exported.single)
    inputs, ids = toys.rows(2, 8), np.array([1, 0])
    mask = inputs["attention_mask"]
    states = parts.encoder({**inputs, "task_ids": ids})["last_hidden_state"]
    tokens = np.full((2, 1), 5)

    def answers(repeats: int) -> list[Array]:
        wide = {
            "encoder_attention_mask": mask.repeat(repeats, axis=0),
            "task_ids": ids.repeat(repeats),
        }
        first = parts.decoder(
            {
                "decoder_input_ids": tokens.repeat(repeats, axis=0),
                "encoder_hidden_states": states.repeat(repeats, axis=0),
                **wide,
            }
        )
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in first.items()
            if name != "logits"
        }
        next_tokens = np.full((2 * repeats, 1), 9)
        second = parts.with_past({"decoder_input_ids": next_tokens, **wide, **past})
        return [first["logits"], second["logits"]]

    for once, wide in zip(answers(1), answers(beams), strict=True):
        np.testing.assert_allclose(wide, once.repeat(beams, axis=0), rtol=0, atol=ATOL)
        assert np.abs(once[0] - once[1]).max() > 1e-2


def test_a_bad_id_is_never_answered(exported: Exported) -> None:
    """Each part alone poisons the row, and only that row."""
    inputs, bad = toys.rows(2, 6), np.array([1, len(toys.TASKS)])
    good = np.array([1, 0])
    parts = opened(exported.single)
    states = parts.encoder({**inputs, "task_ids": bad})["last_hidden_state"]
    assert np.isnan(states[1]).all()
    assert np.isfinite(states[0]).all()
    mask = {"encoder_attention_mask": inputs["attention_mask"]}
    first = {
        "decoder_input_ids": np.full((2, 1), 3),
        "encoder_hidden_states": parts.encoder({**inputs, "task_ids": good})["last_hidden_state"],
        **mask,
    }
    logits = parts.decoder({**first, "task_ids": bad})["logits"]
    begun = parts.decoder({**first, "task_ids": good})
    past = {n.replace("present", "past_key_values"): v for n, v in begun.items() if n != "logits"}
    step = {"decoder_input_ids": np.full((2, 1), 4), **mask, **past, "task_ids": bad}
    for answer in (logits, parts.with_past(step)["logits"]):
        assert np.isnan(answer[1]).all()
        assert np.isfinite(answer[0]).all()


def test_inputs_and_outputs_have_the_names_and_sizes_of_the_format(exported: Exported) -> None:
    """Keys and values by layer and attention; decoder_with_past gives only what changed."""
    encoder, decoder, step = (part.model.graph for part in exported.parts)
    layers = len(decoder.outputs) // 4
    own, cross = (
        [f"{layer}.{kind}.{part}" for layer in range(layers) for part in ("key", "value")]
        for kind in ("decoder", "encoder")
    )
    assert [part.stem for part in exported.parts] == list(STEMS)
    assert sizes(encoder.inputs)["input_ids"] == "[batch,sequence]"
    assert sizes(encoder.outputs) == {"last_hidden_state": f"[batch,sequence,{toys.WIDTH}]"}
    taken = sizes(decoder.inputs)
    assert taken["decoder_input_ids"] == "[batch,decoder_sequence]"
    assert taken["encoder_hidden_states"] == f"[batch,sequence,{toys.WIDTH}]"
    assert taken["encoder_attention_mask"] == "[batch,sequence]"
    names = {"logits", *(f"present.{name}" for name in own + cross)}
    assert set(sizes(decoder.outputs)) == names
    taken = sizes(step.inputs)
    assert taken["decoder_input_ids"] == "[batch,1]"
    assert {n for n in taken if n.startswith("past")} == {
        f"past_key_values.{name}" for name in own + cross
    }
    assert taken["past_key_values.0.decoder.key"].startswith(f"[batch,{toys.HEADS},past,")
    assert taken["past_key_values.0.encoder.key"].startswith(f"[batch,{toys.HEADS},sequence,")
    assert set(sizes(step.outputs)) == {"logits", *(f"present.{name}" for name in own)}
    assert sizes(step.outputs)["logits"] == f"[batch,1,{toys.VOCABULARY}]"


def sizes(values: Iterable[ir.Value]) -> dict[str, str]:
    """Return the shapes of graph inputs or outputs by name."""
    return {str(value.name): str(value.shape) for value in values}


def test_each_layer_is_in_the_parts_that_compute_it(exported: Exported) -> None:
    """Cross-attention's keys and values are made once, so decoder_with_past is without them."""
    encoder, decoder, step = (set(part.modules) for part in exported.parts)
    assert encoder | decoder == set(exported.bound.adapters.layers)
    assert not encoder & decoder
    made_once = {
        name
        for name in decoder
        if ("EncDecAttention" in name and name.endswith((".k", ".v")))
        or ("encoder_attn" in name and name.endswith(("k_proj", "v_proj")))
    }
    assert made_once
    assert decoder - step == made_once
    assert not step - decoder


def test_a_weight_has_one_name_and_one_value_in_all_parts(exported: Exported) -> None:
    """So that the parts can share one data file; tied embeddings have the base's name."""
    _, decoder, step = (part.model.graph.initializers for part in exported.parts)
    shared = [name for name in decoder if name in step and "weight" in name]
    assert any("shared" in name for name in shared)
    assert len(shared) >= len(exported.bound.adapters.layers) // 2 - 4
    for name in shared:
        one, other = decoder[name].const_value, step[name].const_value
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=name)


def test_the_files_pass_the_full_check(exported: Exported) -> None:
    """Onnx's own checker with shape inference; each says which tasks it serves."""
    for folder in (exported.single, *exported.merged):
        for name in FILES:
            onnx.checker.check_model(str(folder / name), full_check=True)
            with OrtRunner(folder / name, threads=1) as runner:
                assert ("task_ids" in runner.inputs) == (folder == exported.single)
                assert "mtl_export.tasks" in runner.metadata


def test_parity_passes_right_graphs_and_fails_wrong_ones(exported: Exported) -> None:
    """Steps, tokens, bad ids and neighbours; another task's graph fails."""
    bound = exported.bound
    limits = RowLimits(len(toys.TASKS), toys.VOCABULARY, toys.POSITIONS)
    rows = seeded_rows(limits, ["input_ids", "attention_mask"], per_task=2)
    cases = build_cases(rows, limits)
    model_class = bound.adapters.model_class
    config = bound.base.config
    cases = decoder_cases(cases, model_class, config, toys.VOCABULARY)
    right = Artefact(
        name="single", kind="single-graph", runner=OrtSeq2SeqRunner(exported.single, threads=1),
        task=None, dtype="fp32", checkpoint_sha256=bound.adapters.checkpoint_sha256,
        base_sha256=bound.base.sha256,
    )  # fmt: skip
    wrong = replace(
        right, name="swapped", kind="per-task", task=toys.TASKS[0],
        runner=OrtSeq2SeqRunner(exported.merged[1], threads=1),
    )  # fmt: skip
    report = run_parity(
        bound, [right, wrong], cases, tolerance=Tolerance(),
        oracle=lambda dtype: OracleSeq2SeqRunner(bound, dtype),
    )  # fmt: skip
    verdicts = {(cell.artefact, cell.case): cell.verdict for cell in report.cells}
    assert {verdict for (name, _), verdict in verdicts.items() if name == "single"} == {"passed"}
    for case in ("task 0", "8 tokens, mixed tasks"):
        assert verdicts["swapped", case] == "failed"
    checked = {case for name, case in verdicts if name == "single"}
    assert {"8 tokens, mixed tasks", "bad task ids, step", "neighbours change task"} <= checked


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [("t5", "shared", "encoder.embed_tokens"), ("bart", "model.shared", "BartScaledWordEmbedding")],
)
def test_a_task_with_its_own_tied_embedding_is_refused(
    tmp_path: Path, kind: str, name: str, found: str
) -> None:
    """Encoder, decoder and output layer share it; the message says so and names the layer."""
    bound = toys.bound_toy(kind, tmp_path)
    own = np.zeros((toys.VOCABULARY, toys.WIDTH), np.float32)
    replaced = MappingProxyType({f"{name}.weight": (own, None)})
    changed = replace(bound, adapters=replace(bound.adapters, task_replaced=replaced))
    with pytest.raises(GraphError, match=found):
        trace_seq2seq(changed)


def test_an_encoder_of_other_inputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whisper listens: the model class and what it reads are named, nothing is traced."""
    import transformers

    bound = toys.bound_toy("bart", tmp_path)
    monkeypatch.setattr(
        transformers.BartForConditionalGeneration, "main_input_name", "input_features"
    )
    with pytest.raises(GraphError, match="input_features") as caught:
        trace_seq2seq(bound)
    assert "BartForConditionalGeneration" in str(caught.value)


def test_constants_of_all_parts_are_tensors(exported: Exported) -> None:
    """Of the single graph and of each task's."""
    assert short_constants_below(exported.single) == []
    assert short_constants_below(exported.merged[0]) == []
