from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import class_named, quiet_transformers
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, GraphError
from mtl_export.graph import causal_lm
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.parts import trace_parts
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graphs
from mtl_export.merge.writer import write_merged
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import RowLimits, build_cases, seeded_rows, step_cases
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.generation import Decoding, GreedyDecoder
from mtl_export.runtime.ort import OrtPart, open_session
from mtl_export.runtime.runners.language import NEW_TOKENS, OrtLanguageRunner
from mtl_export.runtime.runners.pytorch import oracle_model
from mtl_export.runtime.runners.torch_language import MergedLanguageRunner, OracleLanguageRunner
from mtl_export.tensorrt import BuildOptions, build_engine, default_profile
from mtl_export.tensorrt.differences import differing_weights
from tests.graph import language
from tests.graph.constants import short_constants_below
from tests.graph.language import TASKS, VOCABULARY

# Neither is a traced size. Rows of 9 to 13 tokens with 12 new ones are past every window.
BATCH, LENGTH, NEW = 5, 13, 12
IDS = np.array([0, 1, 2, 1, 0])
# Beyond what float32 itself costs the oracle.
TOLERANCE = 1e-5


@dataclass
class Exported:
    """One model, traced once, and its single graph.

    Attributes:
        bound: Base and adapter.
        parts: Its graphs.
        folder: Of the single graph.
        prefill: Runs it.
        decode: Runs it.
    """

    bound: BoundModel
    parts: tuple[TracedModel, ...]
    folder: Path
    prefill: OrtPart
    decode: OrtPart

    def decoder(self, ends: Sequence[int] = ()) -> GreedyDecoder:
        """Return what generates, a row ending at any of ``ends``."""
        return GreedyDecoder(self.prefill, self.decode, eos_token_ids=ends, pad_token_id=0)


def part(path: Path) -> OrtPart:
    """Return a graph, ready to run."""
    return OrtPart(open_session(path, threads=1), path)


def oracle_tokens(
    bound: BoundModel, ids: Array, mask: Array, task_ids: Array, ends: Sequence[int] = ()
) -> Array:
    """Return the new tokens of transformers' ``generate`` on the unmerged float64 model."""
    model = oracle_model(bound, torch.float64)
    model.routing.set(torch.from_numpy(task_ids))
    generate: Any = model.model.generate
    with torch.inference_mode(), quiet_transformers():
        tokens: Array = generate(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            do_sample=False, max_new_tokens=NEW, eos_token_id=[*ends] or None, pad_token_id=0,
        ).numpy()  # fmt: skip
    return tokens[:, ids.shape[1] :]


def oracle_logits(bound: BoundModel, inputs: dict[str, Array], dtype: str) -> Array:
    """Return the logits of one pass over prompts and new tokens, without a cache."""
    with OracleLanguageRunner(bound, dtype) as oracle:
        return oracle.infer(inputs)["logits"]


@pytest.fixture(scope="module", params=list(language.CONFIGS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return each model in turn."""
    bound = language.language_bound(tmp_path_factory.mktemp("language"), request.param)
    parts = trace_parts(bound)
    folder = tmp_path_factory.mktemp("routed")
    write_graphs({one.stem: routed_graph(one, bound) for one in parts}, bound, folder, None)
    return Exported(
        bound, parts, folder, part(folder / "prefill.onnx"), part(folder / "decode.onnx")
    )


def test_two_graphs_with_named_inputs_and_sizes(exported: Exported) -> None:
    """The cache goes in and out under one name for each layer, and every size has a name."""
    prefill, decode = (ir.load(exported.folder / f"{stem}.onnx") for stem in ("prefill", "decode"))
    assert [one.stem for one in exported.parts] == ["prefill", "decode"]
    names = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    ours = ["input_ids", "attention_mask"]
    assert [value.name for value in prefill.graph.inputs] == [*ours, "task_ids"]
    past = [f"past_key_values.{name}" for name in names]
    assert [value.name for value in decode.graph.inputs] == [*ours, *past, "task_ids"]
    for model in (prefill, decode):
        outputs = [value.name for value in model.graph.outputs]
        assert outputs == ["logits", *(f"present.{name}" for name in names)]
    sizes = {value.name: list(map(str, value.shape or ())) for value in decode.graph.inputs}
    assert sizes["input_ids"] == ["batch", "1"]
    assert sizes["attention_mask"] == ["batch", "past + 1"]
    heads = "4" if "GPT2" in exported.bound.adapters.model_class else "2"
    assert sizes["past_key_values.1.value"][:3] == ["batch", heads, "past"]
    after = {value.name: list(map(str, value.shape or ())) for value in decode.graph.outputs}
    assert after["present.1.value"][:3] == ["batch", heads, "past + 1"]


def test_both_graphs_have_their_weights_under_the_same_names(exported: Exported) -> None:
    """A matrix of one is a matrix of the other: nothing is stored twice."""
    prefill, decode = (
        {
            name: value.const_value
            for name, value in one.model.graph.initializers.items()
            if value.shape is not None and len(value.shape) == 2
        }
        for one in exported.parts
    )
    assert prefill.keys() == decode.keys()
    for name, tensor in prefill.items():
        assert tensor is not None
        assert np.array_equal(tensor.numpy(), decode[name].numpy()), name  # type: ignore[union-attr]


def test_graphs_are_whole(exported: Exported) -> None:
    """Both pass the full check of onnx, with shapes inferred."""
    for stem in ("prefill", "decode"):
        onnx.checker.check_model(str(exported.folder / f"{stem}.onnx"), full_check=True)


def test_both_graphs_become_engines(exported: Exported, tmp_path: Path) -> None:
    """TensorRT takes cache, mask and task ids in the ranges that follow from the model."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    paths = {stem: exported.folder / f"{stem}.onnx" for stem in ("prefill", "decode")}
    profiles = {stem: default_profile(path) for stem, path in paths.items()}
    for stem, path in paths.items():
        manifest = build_engine(
            path, tmp_path / stem, BuildOptions([profiles[stem]]), library_name="tensorrt_rtx"
        )
        assert manifest.outputs[0].name == "logits"
    longest, shapes = language.POSITIONS, profiles["decode"].shapes
    low, _, high = shapes["past_key_values.0.key"]
    assert (low[2], high[2]) == (1, longest - 1)
    assert shapes["attention_mask"][2] == (high[0], longest)


def test_tasks_differ_in_the_merged_matrices_alone(exported: Exported, tmp_path: Path) -> None:
    """So their engines share graph and kernels, and refit need change nothing else."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    bound, paths, parts = exported.bound, [], set()
    for task in TASKS[:2]:
        folder = tmp_path / task.name
        folder.mkdir()
        write_graphs({"prefill": merged_graph(exported.parts[0], bound, task)}, bound, folder, task)
        paths.append(folder / "prefill.onnx")
        profile = default_profile(paths[-1])
        manifest = build_engine(
            paths[-1], folder / "engine", BuildOptions([profile]), library_name="tensorrt_rtx"
        )
        parts.add(manifest.graph_sha256)
    assert len(parts) == 1
    (names,) = {*differing_weights(paths).values()}
    assert {name.removesuffix("_t").removesuffix(".weight") for name in names} == {
        *bound.adapters.layers
    }


@pytest.mark.parametrize("is_right", [False, True], ids=["left", "right"])
def test_prompts_answer_as_the_oracle_does(exported: Exported, is_right: bool) -> None:
    """Every token of a mixed batch has the oracle's logits, on whichever side the padding is."""
    ids, mask = language.prompts(BATCH, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if is_right:
        inputs = dict(zip(inputs, language.moved_right(ids, mask), strict=True))
    inputs["task_ids"] = IDS
    counts = inputs["attention_mask"] == 1
    exact, single = (
        oracle_logits(exported.bound, inputs, dtype)[counts] for dtype in ("fp64", "fp32")
    )
    found = exported.prefill(inputs)["logits"][counts]
    assert np.abs(found - exact).max() <= TOLERANCE + np.abs(single - exact).max()


def test_every_step_answers_as_one_pass_without_a_cache(exported: Exported) -> None:
    """Twelve tokens that nobody chose, far beyond the window, give the oracle's logits."""
    ids, mask = language.prompts(BATCH, LENGTH)
    tokens, _ = language.prompts(BATCH, NEW, seed=8)
    inputs = {
        "input_ids": ids, "attention_mask": mask, "task_ids": IDS, NEW_TOKENS: tokens
    }  # fmt: skip
    exact, single = (oracle_logits(exported.bound, inputs, dtype) for dtype in ("fp64", "fp32"))
    runner = OrtLanguageRunner(exported.folder / "prefill.onnx", decode="decode.onnx", threads=1)
    with runner:
        found = runner.infer(inputs)["logits"]
    assert np.abs(found - exact).max() <= TOLERANCE + np.abs(single - exact).max()


def test_generates_what_pytorch_does(exported: Exported) -> None:
    """Token for token: tasks mixed in one batch, rows that end early, padding on either side."""
    ids, mask = language.prompts(BATCH, LENGTH)
    free = exported.decoder().generate(ids, mask, task_ids=IDS, max_new_tokens=NEW)
    assert free.tolist() == oracle_tokens(exported.bound, ids, mask, IDS).tolist()
    ends = [int(free[0, 2]), int(free[1, 4])]
    wanted = oracle_tokens(exported.bound, ids, mask, IDS, ends)
    assert (wanted[0, 3:] == 0).all()
    decoder = exported.decoder(ends)
    left = decoder.generate(ids, mask, task_ids=IDS, max_new_tokens=NEW)
    assert left.tolist() == wanted.tolist()
    right = decoder.generate(*language.moved_right(ids, mask), task_ids=IDS, max_new_tokens=NEW)
    assert right.tolist() == wanted.tolist()


def test_a_window_leaves_old_tokens_out(exported: Exported) -> None:
    """Two layers see twice a window of five; what is older changes nothing, but for others."""
    ids, mask = language.prompts(1, LENGTH)
    other = ids.copy()
    other[0, 0] = 3 if ids[0, 0] != 3 else 4
    steps = []
    for prompt in (ids, other):
        decoding = Decoding(exported.prefill, exported.decode, prompt, mask, IDS[:1])
        first = decoding.logits
        decoding.feed(ids[:, 1])
        steps.append(np.stack([first, decoding.logits]))
    is_blind = np.array_equal(steps[0], steps[1])
    assert is_blind == exported.bound.adapters.model_class.startswith("Mistral")


def test_every_task_says_something_else(exported: Exported) -> None:
    """One prompt under each task gives what that task says alone, and no two say the same."""
    ids, _ = language.prompts(1, LENGTH)
    decoder = exported.decoder()
    together = decoder.generate(
        np.repeat(ids, len(TASKS), axis=0), task_ids=np.arange(len(TASKS)), max_new_tokens=NEW
    )
    assert len({tuple(row) for row in together.tolist()}) == len(TASKS)
    for task, row in zip(TASKS, together, strict=True):
        alone = decoder.generate(ids, task_ids=np.array([task.index]), max_new_tokens=NEW)
        assert alone[0].tolist() == row.tolist()


def test_one_token_prompts(exported: Exported) -> None:
    """The shortest prompt, in a batch of one: sizes of 1 are no special case."""
    ids, mask = language.prompts(1, 2)
    wanted = oracle_tokens(exported.bound, ids[:, :1], mask[:, :1], IDS[1:2])
    found = exported.decoder().generate(ids[:, :1], task_ids=IDS[1:2], max_new_tokens=NEW)
    assert found.tolist() == wanted.tolist()


def test_an_id_without_a_task_gives_nan_in_both_graphs(exported: Exported) -> None:
    """The rows are NaN, the good row beside them is not; generation refuses them."""
    ids, mask = language.prompts(4, LENGTH)
    good, bad = np.array([1, 1, 1, 1]), np.array([1, -1, 3, 2**32 + 1])
    prompts = exported.prefill({"input_ids": ids, "attention_mask": mask, "task_ids": bad})
    rows = np.isnan(prompts["logits"]).reshape(4, -1)
    assert rows.all(axis=1).tolist() == rows.any(axis=1).tolist() == [False, True, True, True]
    decoding = Decoding(exported.prefill, exported.decode, ids, mask, good)
    assert np.isfinite(decoding.logits).all()
    decoding.route(bad)
    decoding.feed(ids[:, 0])
    rows = np.isnan(decoding.logits)
    assert rows.all(axis=1).tolist() == rows.any(axis=1).tolist() == [False, True, True, True]
    with pytest.raises(EngineRunError, match=r"rows \[1, 2, 3\]"):
        exported.decoder().generate(ids, mask, task_ids=bad, max_new_tokens=2)


def test_parity_of_merged_folder_merged_graph_and_single_graph(
    exported: Exported, tmp_path: Path
) -> None:
    """All three pass: prompts, steps and tokens; a graph that decodes as another task fails."""
    bound, task = exported.bound, TASKS[1]
    merged, wrong = tmp_path / "merged", tmp_path / "wrong"
    for folder in (merged, wrong, tmp_path / "pytorch"):
        folder.mkdir()
    graphs = [{p.stem: merged_graph(p, bound, t) for p in exported.parts} for t in TASKS[1:]]
    write_graphs(graphs[0], bound, merged, task)
    write_graphs({**graphs[0], "decode": graphs[1]["decode"]}, bound, wrong, task)
    write_merged(bound, task, tmp_path / "pytorch", dtype="fp32")
    limits = RowLimits(3, VOCABULARY, language.POSITIONS)
    rows = seeded_rows(limits, ("input_ids", "attention_mask"), per_task=2)
    cases = build_cases(rows, limits)
    cases = [case for case in cases if case.name.startswith(("mixed tasks", "batch"))]
    cases += step_cases(cases, limits)

    def graph(name: str, folder: Path, own: bool) -> Artefact:
        runner = OrtLanguageRunner(folder / "prefill.onnx", decode="decode.onnx", threads=1)
        return Artefact(
            name, "per-task" if own else "single-graph", runner, task if own else None, "fp32",
            bound.adapters.checkpoint_sha256, bound.base.sha256,
        )  # fmt: skip

    pytorch = Artefact(
        "pytorch", "per-task", MergedLanguageRunner(tmp_path / "pytorch"), task, "fp32",
        bound.adapters.checkpoint_sha256, bound.base.sha256,
    )  # fmt: skip
    report = run_parity(
        bound,
        [graph("single", exported.folder, False), graph("merged", merged, True), pytorch,
         graph("wrong", wrong, True)],
        cases,
        tolerance=Tolerance(atol=1e-4, rtol=0),
        oracle=lambda dtype: OracleLanguageRunner(bound, dtype),
    )  # fmt: skip
    failed = {(cell.artefact, cell.case) for cell in report.cells if cell.verdict != "passed"}
    assert failed == {
        ("wrong", "8 steps, mixed tasks"), ("wrong", "8 steps, batch 7 x 48"),
        ("wrong", "8 tokens, mixed tasks"),
    }  # fmt: skip
    single = {cell.case for cell in report.cells if cell.artefact == "single"}
    assert {"8 steps, mixed tasks", "8 tokens, mixed tasks", "bad task ids, step"} <= single


def test_positions_that_long_texts_turn_otherwise_are_refused(tmp_path: Path) -> None:
    """Their keys in the cache would be wrong; also where only some layers have such positions."""
    with pytest.raises(GraphError, match="Phi3ForCausalLM: rope_type longrope"):
        trace_parts(language.language_bound(tmp_path, "Phi3ForCausalLM"))
    by_kind = {"sliding": {"rope_type": "default"}, "full": {"rope_type": "dynamic"}}
    model = SimpleNamespace(config=SimpleNamespace(rope_parameters=by_kind))
    with pytest.raises(GraphError, match="rope_type dynamic"):
        causal_lm._refuse_changing_rotation(model)


def test_a_model_with_another_kind_of_state_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state-space model keeps no keys and values: its class and the reason are named."""
    mamba = class_named("MambaForCausalLM")
    model = mamba(mamba.config_class(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    bound = language.language_bound(tmp_path, "LlamaForCausalLM")
    monkeypatch.setattr(causal_lm, "base_model", lambda *_: model)
    with pytest.raises(GraphError) as caught:
        trace_parts(bound)
    assert caught.value.problem.startswith("MambaForCausalLM")
    assert caught.value.problem.endswith("no cache")
    assert "keys and values" in caught.value.expected
    assert "mtl-export merge" in caught.value.fix


def test_constants_of_both_parts_are_tensors(exported: Exported) -> None:
    """Tools read the other spellings each in its own way."""
    assert short_constants_below(exported.folder) == []
