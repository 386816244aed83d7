"""A sentence-transformers base keeps its pipeline through every export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import save_file

from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.checkpoint.sentence_pipeline import pooled_pipeline, read_pipeline
from mtl_export.errors import BaseModelError, IntegrityError, UsageError
from tests.adapters import toys
from tests.checkpoint.messages import assert_whole
from tests.cli.conftest import Run
from tests.factories import HIDDEN, toy_base

QUERY = "encoder.layer.0.attention.self.query"
KINDS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def modules(**kinds: str) -> list[dict[str, Any]]:
    """Return ``modules.json`` of these modules, by kind and path."""
    return [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(kinds.items())
    ]


def write_pipeline(base: Path, *, mode: str = "cls", **kinds: str) -> None:
    """Make ``base`` a sentence-transformers model with these modules and 9 tokens at most."""
    kinds = kinds or KINDS
    (base / "modules.json").write_text(json.dumps(modules(**kinds)))
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    (base / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    config = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": mode == "mean",
              "pooling_mode_cls_token": mode == "cls"}  # fmt: skip
    for path in filter(None, kinds.values()):
        (base / path).mkdir()
        (base / path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project with a CLS-pooled, normalised base and two tasks without heads."""
    base = toy_base(tmp_path / "base")
    write_pipeline(base)
    write_folder(
        tmp_path / "adapter", tasks=(Task("search", 0), Task("cluster", 1)),
        layers={QUERY: toys.layer_values(3, inputs=HIDDEN, outputs=HIDDEN, tasks=2, dtype="F32")},
        heads={}, alpha=7.0, temperature=0.3, model_class="BertModel",
        base=BaseReference("base", open_base(str(base)).sha256),
    )  # fmt: skip
    (tmp_path / "mtl-export.toml").write_text('base = "base"\ncheckpoint = "adapter"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


PARTS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
         "1_Pooling/config.json")  # fmt: skip


def test_every_export_carries_the_pipeline(encoder: Path, run: Run) -> None:
    """Merged folders, per-task graphs and the single graph have its files, hashed."""
    assert run("merge", "--all-tasks").code == 0
    assert run("onnx", "--all-tasks").code == 0
    assert run("onnx", "--task", "search").code == 0
    for folder in ("merged/search", "merged/cluster", "onnx", "onnx/search"):
        for name in PARTS:
            copy = encoder / "out" / folder / name
            assert copy.read_bytes() == (encoder / "base" / name).read_bytes(), copy
        assert run("verify", f"out/{folder}").code == 0
    assert run("parity", "--threads", "1").code == 0
    (encoder / "out/onnx/search/1_Pooling/config.json").write_text("{}")
    assert run("verify", "out/onnx/search").code == 7
    outcome = run("parity", "--threads", "1")
    assert outcome.code == 3
    assert "1_Pooling/config.json" in outcome.stdout
    text = run("inspect").stdout
    assert "cls pooling, Normalize, at most 9 tokens" in text


def vectors(hidden: np.ndarray, mask: np.ndarray, folder: Path) -> np.ndarray:
    """Return what a folder's pipeline makes of hidden states, after the library's formulas."""
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            config = json.loads((folder / module["path"] / "config.json").read_text())
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            hidden = hidden[:, 0] if config["pooling_mode_cls_token"] else mean
        else:
            assert kind == "Normalize"
            hidden = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    return hidden


@pytest.mark.parametrize("has_pipeline", [True, False])
def test_pooled_graphs_give_what_their_pipeline_gives(
    encoder: Path, run: Run, *, has_pipeline: bool
) -> None:
    """The states that optimum asks for are there, and pooled as modules.json says equal it."""
    if not has_pipeline:
        for name in ("modules.json", "sentence_bert_config.json"):
            (encoder / "base" / name).unlink()
    assert run("onnx", "--task", "search", "--pooling", "cls", "--normalize").code == 0
    folder = encoder / "out/onnx/search"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    ids = np.array([[2, 9, 8, 3], [2, 7, 3, 0]])
    mask = (ids > 0) * 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    embedded, hidden = session.run(["sentence_embedding", "last_hidden_state"], given)
    np.testing.assert_allclose(embedded, vectors(hidden, mask, folder), rtol=0, atol=1e-6)
    assert run("parity", "--threads", "1").code == 0


def test_other_vectors_than_the_bases_are_refused(encoder: Path, run: Run) -> None:
    """A mean over a CLS-pooled base is refused before anything is traced."""
    outcome = run("onnx", "--task", "search", "--pooling", "mean")
    assert outcome.code == 2
    assert "cls pooling, Normalize" in outcome.stderr
    assert "or pass --pooling cls" in outcome.stderr
    assert not (encoder / "out/onnx").exists()


def test_a_graph_that_normalises_more_says_so(tmp_path: Path) -> None:
    """--normalize over a base that does not adds Normalize, and keeps the base's settings."""
    write_pipeline(tmp_path, mode="mean", Transformer="", Pooling="1_Pooling")
    pipeline = read_pipeline(tmp_path)
    found = pooled_pipeline(pipeline, SentenceEmbedding("mean", normalize=True), {"dim": HIDDEN})
    out = tmp_path / "out"
    out.mkdir()
    found.write(out)
    kinds = [one["type"].rpartition(".")[2] for one in json.loads((out / PARTS[0]).read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((out / "sentence_bert_config.json").read_text()) == {"max_seq_length": 9}
    config = json.loads((out / "1_Pooling/config.json").read_text())
    assert config["pooling_mode_mean_tokens"] is True
    assert config["word_embedding_dimension"] == HIDDEN


def test_dense_weights_travel(tmp_path: Path) -> None:
    """A trained Dense goes along, and no graph pools as if it were not there."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    write_pipeline(tmp_path, mode="mean", **kinds)
    with pytest.raises(BaseModelError) as caught:
        read_pipeline(tmp_path)
    assert_whole(caught.value, where="modules.json", found="no 2_Dense/model.safetensors")
    save_file({"linear.weight": np.ones((2, HIDDEN))}, tmp_path / "2_Dense/model.safetensors")
    pipeline = read_pipeline(tmp_path)
    assert pipeline is not None
    (tmp_path / "out").mkdir()
    pipeline.write(tmp_path / "out")
    weights = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / weights).read_bytes()
    with pytest.raises(UsageError, match="mean pooling, Dense"):
        pooled_pipeline(pipeline, SentenceEmbedding("mean"), {"hidden_size": HIDDEN})


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """``0_Transformer`` given as base has its pipeline in the folder above, and so moves up."""
    kinds = {"Transformer": "0_Transformer", "Pooling": "1_Pooling"}
    write_pipeline(tmp_path, mode="mean", **kinds)
    shutil.move(tmp_path / "sentence_bert_config.json", tmp_path / "0_Transformer")
    pipeline = read_pipeline(tmp_path / "0_Transformer")
    assert pipeline is not None
    assert str(pipeline) == "mean pooling, at most 9 tokens"
    (tmp_path / "out").mkdir()
    pipeline.write(tmp_path / "out")
    paths = [one["path"] for one in json.loads((tmp_path / "out/modules.json").read_text())]
    assert paths == ["", "1_Pooling"]
    assert (tmp_path / "out/sentence_bert_config.json").is_file()
    assert read_pipeline(tmp_path / "1_Pooling") is None


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown module": (modules(Transformer="", WordWeights="1"), "models.WordWeights'"),
    "code of its own": ([*modules(Transformer=""), {"type": "custom_st.Pooling", "path": "1"}],
                        "custom_st.Pooling"),
    "path upwards": (modules(Transformer="", Pooling="../secret"), "'../secret'"),
    "absolute path": (modules(Transformer="", Pooling="/etc"), "'/etc'"),
    "no transformer": (modules(Pooling="1_Pooling"), "modules Pooling"),
    "no module": ([], "modules none"),
    "no list": ({"a": 1}, "no list, but"),
    "numbers": ([1], "0 is 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_pipelines(tmp_path: Path, name: str) -> None:
    """What would run code, leave the folder or be lost is refused by name."""
    document, found = REFUSED[name]
    write_pipeline(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(document))
    with pytest.raises(BaseModelError) as caught:
        read_pipeline(tmp_path)
    assert_whole(caught.value, where="modules.json", found=found)


def test_links_out_are_refused_and_the_hubs_are_not(tmp_path: Path) -> None:
    """The hub's cache links snapshots to blobs; any other link out of the base is refused."""
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    snapshot.mkdir(parents=True)
    write_pipeline(snapshot)
    config, blobs = snapshot / "1_Pooling/config.json", tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    shutil.move(config, blobs / "f00")
    config.symlink_to("../../../blobs/f00")
    assert str(read_pipeline(snapshot)).startswith("cls pooling")
    shutil.move(blobs / "f00", tmp_path / "secret")
    config.unlink()
    config.symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="lies outside"):
        read_pipeline(snapshot)
