"""Every JSON file that is read, with every other kind of JSON value at every place in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mtl_export.adapters.family import read_adapters
from mtl_export.bundle.manifest import damage, read_manifest
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import tasks_of
from mtl_export.checkpoint.formats.mtlora_swin_settings import settings_of
from mtl_export.checkpoint.formats.own_folder import store_checkpoint
from mtl_export.checkpoint.model_class import concrete_class
from mtl_export.checkpoint.model_inputs import (
    has_position_table,
    image_shape,
    longest_sequence,
    placed_by,
)
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.data.rows import load_rows
from mtl_export.errors import MtlExportError
from mtl_export.graph.origins import EditedGraph, origins_of
from mtl_export.runtime.golden import read_golden
from mtl_export.runtime.texts import TextFiles
from mtl_export.runtime.token_rules import TokenRules
from mtl_export.tensorrt.manifest import EngineManifest
from tests.checkpoint import adapterhub_toys, mtlora_toys, own_toys, peft_toys
from tests.checkpoint.wrong_values import variants
from tests.factories import toy_base, toy_checkpoint, toy_tokenizer

Reader = Callable[[Path], object]


def checkpoint(folder: Path) -> None:
    """Read a checkpoint as far as it goes without a base."""
    found = open_checkpoint(folder)
    if found.path.name != IN_MEMORY:
        read_adapters(found)


def own(folder: Path) -> Path:
    """Write our folder as a trainer does."""
    return toy_checkpoint(folder, toy_base(folder.with_name("base"))) / "adapter_config.json"


def own_whole(folder: Path) -> Path:
    """Write our folder with one of everything."""
    store_checkpoint(folder, own_toys.checkpoint_of())
    return folder / "adapter_config.json"


def own_members(folder: Path) -> Path:
    """Write our folder with an adapter for each task."""
    store_checkpoint(folder, own_toys.with_members())
    return folder / "adapter_config.json"


def peft(folder: Path) -> Path:
    """Write a PEFT adapter with every optional field that is read."""
    fields = {
        "rank_pattern": {"query": 2}, "alpha_pattern": {"query": 3.0},
        "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"},
        "trainable_token_indices": {"word_embeddings": [1, 2]},
    }  # fmt: skip
    tensors = {**peft_toys.lora(peft_toys.QUERY), **peft_toys.head(2)}
    return peft_toys.write(folder, tensors, fields) / "adapter_config.json"


def hub_adapter(folder: Path) -> Path:
    """Write AdapterHub's tasks; the first one's config is changed."""
    return adapterhub_toys.write_mtl(folder) / "zeta" / "adapter_config.json"


def hub_head(folder: Path) -> Path:
    """The same; the head's config is changed."""
    return adapterhub_toys.write_mtl(folder) / "zeta" / "head_config.json"


def hub_setup(folder: Path) -> Path:
    """The same; the setup is changed."""
    return adapterhub_toys.write_mtl(folder) / "adapter_setup.json"


def hub_model(folder: Path) -> Path:
    """Write a whole model with one adapter inside."""
    state = adapterhub_toys.mtl_states(["zeta"])["zeta"]
    head = adapterhub_toys.head_config(2)
    weights = {**state, **adapterhub_toys.head_state("zeta", head)}
    adapterhub_toys.write_state(folder_made(folder), "pytorch_model", weights, is_safetensors=False)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bert", "architectures": ["BertAdapterModel"], "label2id": {"a": 0, "b": 1},
        "adapters": {"adapters": {"zeta": "hash"}, "config_map": {
            "hash": adapterhub_toys.MTL_CONFIG}},
        "prediction_heads": {"zeta": head},
    }))  # fmt: skip
    return folder / "config.json"


def folder_made(folder: Path) -> Path:
    """Return the folder once it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Has one of everything, which no family has.
IN_MEMORY = "of no family"
CHECKPOINTS = (own, own_whole, own_members, peft, hub_adapter, hub_head, hub_setup, hub_model)


def _refusal(read: Reader, folder: Path, text: str) -> str:
    """Return our error's message; "" where the variant is read."""
    try:
        read(folder)
    except MtlExportError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{error!r} of {text[:3_000]}") from error
    return ""


def refused_count(path: Path, read: Reader, folder: Path) -> int:
    """Return how many variants of a file are refused; anything but our errors is raised."""
    original = path.read_text(encoding="utf-8")
    read(folder)
    refused = 0
    for text in variants(json.loads(original)):
        path.write_text(text, encoding="utf-8")
        message = _refusal(read, folder, text)
        refused += bool(message)
        assert len(message) < 2_000
    return refused


@pytest.mark.parametrize("write", CHECKPOINTS, ids=lambda write: write.__name__)
def test_checkpoints(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """A config of a checkpoint is read, or refused by name."""
    folder = tmp_path / (IN_MEMORY if write in {own_whole, own_members} else "adapter")
    assert refused_count(write(folder), checkpoint, folder) > 30


CONFIG: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30, "hidden_size": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 2, "n_positions": 64,
    "is_encoder_decoder": False, "tie_word_embeddings": True, "text_config": {"vocab_size": 30},
}  # fmt: skip


def base(folder: Path) -> None:
    """Read a base, and what is told from its config."""
    config = open_base(str(folder)).config
    longest_sequence(config)
    has_position_table(config)
    placed_by(config)
    image_shape(config)
    concrete_class("AutoModel", config)


@pytest.mark.parametrize("changes", [{}, {"vocab_size": None, "image_size": [32, 32]}])
def test_config_of_a_base(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What is told from a config is of the type that it is used as."""
    save_file({"w": np.zeros(2)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes | {"num_channels": 3}))
    assert refused_count(tmp_path / "config.json", base, tmp_path) > 50


def test_index_of_shards(tmp_path: Path) -> None:
    """Names of files are texts."""
    save_file({"w": np.zeros(2)}, str(tmp_path / "a.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}))
    assert refused_count(path, base, tmp_path) > 15


def manifest(folder: Path) -> None:
    """Read a manifest, its hash made to fit, and compare the folder with it."""
    path = folder / "mtl-export.json"
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        rest = json.loads(path.read_text(encoding="utf-8"))
        rest.pop("manifest_sha256", None)
        text = json.dumps(rest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps({**rest, "manifest_sha256": digest}), encoding="utf-8")
    found = read_manifest(folder)
    assert found is not None
    damage(folder, found)
    found.recipe.differences(found.recipe)


def test_manifest(tmp_path: Path) -> None:
    """Sizes, hashes, options and paths."""
    entry = {"sha256": "0" * 64, "size_bytes": 3}
    path = tmp_path / "mtl-export.json"
    path.write_text(json.dumps({
        "schema": "mtl-export.output/1", "tool_version": "1", "command": "merge",
        "options": {"tasks": ["a"], "alpha": 1.5, "force": True, "shared": {"a": "b"}},
        "sources": {"base_sha256": "0"}, "files": {"config.json": entry},
        "beside": {"../x/y": entry},
    }))  # fmt: skip
    assert refused_count(path, manifest, tmp_path) > 100


def test_manifest_of_an_engine(tmp_path: Path) -> None:
    """Shapes and profiles too."""
    tensor = {"name": "x", "dtype": "int64", "shape": ["batch", 3]}
    path = tmp_path / "model.engine.json"
    path.write_text(json.dumps({
        "schema": "mtl-export.engine/1",
        "engine": {"file": "m", "sha256": "0", "size_bytes": 3, "graph_sha256": ""},
        "source": {"file": "m", "sha256": {"m": "0"}}, "provenance": {"family": "lora"},
        "layout": "merged", "tasks": [{"name": "a", "index": 0}], "inputs": [tensor],
        "outputs": [tensor], "profiles": [{"x": {"min": [1], "opt": [2], "max": [3]}}],
        "precision": ["float32"], "tf32": False,
        "builder": {"name": "tensorrt", "version": "1", "options": {}}, "libraries": {"a": "1"},
        "targets": ["8.6"], "validated": [{"check": "a", "verdict": "passed", "reason": ""}],
    }))  # fmt: skip
    read: Reader = lambda folder: EngineManifest.read(path).as_dict()  # noqa: E731
    assert refused_count(path, read, tmp_path) > 300


def texts(folder: Path) -> None:
    """Read what a served folder says of texts, and encode one."""
    files = TextFiles(folder)
    assert isinstance(files.pad_token_id, int)
    assert isinstance(files.longest, int | None)
    assert isinstance(files.most_tokens, int | None)
    files.encode(["a text", ("of", "two")], truncate=True)
    files.decode([[0, 1]])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_texts(tmp_path: Path, name: str) -> None:
    """Neither the library's bare exceptions nor its panics come through."""
    toy_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert refused_count(tmp_path / name, texts, tmp_path) > 15


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_generation_settings(tmp_path: Path, name: str) -> None:
    """Rules that were read can be applied."""
    settings = {
        "eos_token_id": [2, 3], "decoder_start_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
        "min_length": 1, "min_new_tokens": 1, "forced_bos_token_id": 4, "forced_eos_token_id": [5],
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "suppress_tokens": [6],
        "begin_suppress_tokens": [7],
    }  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(settings))

    def rules(folder: Path) -> None:
        found = TokenRules.from_folder(folder)
        tokens = np.array([[0, 1, 2]], np.int64)
        for begin in (1, 3):
            found.applied(np.zeros((1, 9), np.float32), tokens, begin=begin, last=True)

    assert refused_count(tmp_path / name, rules, tmp_path) > 80


def test_golden_index(tmp_path: Path) -> None:
    """The index inside the archive."""
    vector = {"name": "t", "model": "m.onnx", "atol": 1e-5, "rtol": 0.0}
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"schema": "mtl-export.golden/1", "vectors": [vector]}))

    def golden(folder: Path) -> None:
        arrays: dict[str, Any] = {"0.inputs.x": np.ones(1), "0.outputs.y": np.ones(1)}
        np.savez(folder / "golden.npz", golden=np.array(path.read_text()), **arrays)
        for one in read_golden(folder / "golden.npz"):
            assert one.widest >= 0 or one.atol < 0 or one.rtol < 0
            one.difference({"y": np.zeros(1)})

    assert refused_count(path, golden, tmp_path) > 60


def test_rows_of_data(tmp_path: Path) -> None:
    """One line of JSON."""
    row = {"task": "a", "text": "b", "text_pair": "c", "label": ["x", 1], "query": 3}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert refused_count(path, lambda folder: load_rows(path), tmp_path) > 30


TABLES: Mapping[str, tuple[Any, Callable[[str], object]]] = {
    "tasks": (
        [{"name": "a", "index": 0, "labels": ["x"], "kind": "regression", "output": "y"}],
        lambda text: tasks_of(text, "tasks"),
    ),
    "edits": (["rename a b"], lambda text: edited({"mtl_export.edits": text})),
    "origins": (
        [{"checkpoint_sha256": "0", "name": "a", "index": 0}],
        lambda text: edited({"mtl_export.edits": '["add a"]', "mtl_export.origins": text}),
    ),
    "embedding": ({"pooling": "mean", "normalize": True}, SentenceEmbedding.from_json),
}


def edited(metadata: dict[str, str]) -> None:
    """Read what an edited graph says of itself."""
    found = EditedGraph.from_metadata(metadata)
    if found is not None:
        assert found.text
        found.others("0")
    origins_of(metadata)


@pytest.mark.parametrize("name", TABLES)
def test_metadata_of_graphs(tmp_path: Path, name: str) -> None:
    """Texts inside an ONNX file are JSON like any other."""
    document, read = TABLES[name]
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(document))
    assert refused_count(path, lambda folder: read(path.read_text()), tmp_path) > 15


def test_settings_of_mtlora() -> None:
    """A configuration that was pickled, or read from YAML."""
    refused = 0
    for text in variants(mtlora_toys.config()):
        document = json.loads(text)
        try:
            found = settings_of("cfg.yaml", document) if isinstance(document, dict) else None
            if found is not None:
                found.described(found.tasks)
        except MtlExportError:
            refused += 1
    assert refused > 50


def test_header_of_safetensors(tmp_path: Path) -> None:
    """The library refuses most; what it lets pass must fit numpy."""
    source = tmp_path / "w.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(0, np.int8)}, str(source))
    content = source.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    shapes = ([1] * 64 + [6], [0, 2**40, 2**40], [0, 2**63], [0] * 33)
    header |= {f"none{n}": {"dtype": "I8", "shape": s, "data_offsets": [24, 24]}
               for n, s in enumerate(shapes)}  # fmt: skip

    from mtl_export.checkpoint.files.safetensors import open_safetensors

    def load(text: str) -> None:
        written = text.encode()
        source.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
        for tensor in open_safetensors(source).tensors.values():
            tensor.numpy()

    for name in list(header):
        alone = {key: value for key, value in header.items() if key in {"a", "b", name}}
        for text in (json.dumps(alone), *(variants(alone) if name == "b" else ())):
            try:
                load(text)
            except MtlExportError:
                continue
