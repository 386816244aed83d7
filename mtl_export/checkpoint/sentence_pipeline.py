"""The pipeline of a sentence-transformers base: what turns its hidden states into one vector.

    modules.json  ->  Transformer, Pooling, [Dense, ...], [Normalize]: each with a folder

It is part of the model: a base whose vectors are CLS-pooled gives others under a mean. So every
export of a bare encoder carries it, and ``SentenceTransformer(folder)`` gives the base's kind of
vectors. Only what is listed here is copied, and nothing outside the pipeline's own folder.

Source of names and keys: sentence-transformers 5.7.0, ``base/model.py``,
``base/modules/transformer.py`` and ``sentence_transformer/modules/pooling.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.files.contained import contained
from mtl_export.checkpoint.files.json_file import OBJECT, Shape, read_json
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.errors import BaseModelError, UsageError, shortened

MODULES_FILE = "modules.json"
LIBRARY = "sentence_transformers"
# Truncation, prompts and similarity; the library names the first after some architectures.
SETTINGS = ("config_sentence_transformers.json", *(f"sentence_{name}_config.json" for name in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
)))  # fmt: skip
CARRIED = frozenset({"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout"})
WITH_WEIGHTS = frozenset({"Dense", "LayerNorm"})
# Of Pooling's config.json, before it had the key pooling_mode.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
_MODULES: Shape = [{"type": str, "path": str}]
SAVE_AGAIN = "Save the base again with SentenceTransformer(base).save_pretrained(folder)"
_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")


@dataclass(frozen=True)
class Pipeline:
    """One pipeline, checked.

    Attributes:
        steps: The modules' kinds in order, the first one ``Transformer``.
        pooling: How tokens become one vector: ``mean``, ``cls``, another word of the library, or
            several joined by "+"; empty without a Pooling module.
        max_tokens: Where texts are cut; None where the tokenizer decides.
        files: What is copied: by its place in an export, where it lies.
        documents: What is written anew: its text by its place.
    """

    steps: tuple[str, ...]
    pooling: str
    max_tokens: int | None = None
    files: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    documents: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        words = [f"{self.pooling} pooling" if one == "Pooling" else one for one in self.steps[1:]]
        cut = [f"at most {self.max_tokens} tokens"] if self.max_tokens else []
        return ", ".join([*words, *cut]) or "hidden states"

    def write(self, folder: Path) -> None:
        """Write it into the export ``folder``."""
        for name in (*self.files, *self.documents):
            (folder / name).parent.mkdir(exist_ok=True)
        for name, file in self.files.items():
            shutil.copyfile(file, folder / name)
        for name, text in self.documents.items():
            (folder / name).write_text(text, encoding="utf-8")

    def problems(self, folder: Path) -> list[str]:
        """Return what differs in the export ``folder``."""
        expected = {name: file.read_bytes() for name, file in self.files.items()}
        expected |= {name: text.encode() for name, text in self.documents.items()}
        found = {name: folder / name for name in expected}
        return [
            f"{name} is not the pipeline's" if file.is_file() else f"{name} is missing"
            for name, file in found.items()
            if not file.is_file() or file.read_bytes() != expected[name]
        ]


def read_pipeline(folder: Path) -> Pipeline | None:
    """Return the pipeline of the base in ``folder``; None if it has none.

    The base may be the pipeline's folder, or the folder ``0_Transformer`` in it.

    Raises:
        BaseModelError: A module is of a kind that is not carried, or a file of it is missing or
            broken.
        IntegrityError: A file of it lies elsewhere.
    """
    root = folder if (folder / MODULES_FILE).is_file() else folder.resolve().parent
    if not (root / MODULES_FILE).is_file():
        return None
    modules = _modules(root)
    places = [path for kind, path in modules if kind == "Transformer"]
    if root != folder and places != [folder.name]:
        return None  # the folder above has another model
    own = "" if root == folder else folder.name
    if not modules or modules[0] != ("Transformer", own) or len(places) != 1:
        raise _broken(root, f"modules {shortened(kind for kind, _ in modules)}",
                      "a Transformer first, in the base's own folder")  # fmt: skip
    files = {MODULES_FILE: root / MODULES_FILE}
    files |= {name: place / name for place in (root, folder) for name in SETTINGS
              if (place / name).is_file()}  # fmt: skip
    pooling = []
    for kind, path in modules[1:]:
        wanted = ("config.json",) if kind != "Normalize" else ()
        if kind in WITH_WEIGHTS:
            wanted = (*wanted, "model.safetensors")
        files.update({f"{path}/{name}": root / path / name for name in wanted})
        if kind == "Pooling":
            pooling.append(root / path / "config.json")
    for name, file in files.items():
        if not file.is_file():
            raise _broken(root, f"no {name}", "every file of its modules, weights as safetensors")
        home = folder if file == folder / name else root
        contained(home, name, where=f"base {root / MODULES_FILE}")
    documents = {}
    if own:
        del files[MODULES_FILE]
        entries = _json(root / MODULES_FILE, _MODULES)
        documents[MODULES_FILE] = _text([{**entries[0], "path": ""}, *entries[1:]])
    lengths = [_json(files[name]).get("max_seq_length") for name in SETTINGS if name in files]
    return Pipeline(
        steps=tuple(kind for kind, _ in modules),
        pooling="+".join(_mode(_json(config)) for config in pooling),
        max_tokens=next((length for length in lengths if isinstance(length, int)), None),
        files=MappingProxyType(files),
        documents=MappingProxyType(documents),
    )


def pooled_pipeline(
    pipeline: Pipeline | None, embedding: SentenceEmbedding, config: Mapping[str, Any]
) -> Pipeline:
    """Return the pipeline beside a graph that pools by itself, and still gives its states.

    Args:
        pipeline: The base's.
        embedding: What the graph does.
        config: The base's ``config.json``.

    Raises:
        UsageError: The base's own vectors are others.
        BaseModelError: The config does not say how wide hidden states are.
    """
    refuse_other_pooling(pipeline, embedding)
    steps = ["Transformer", "Pooling", *(["Normalize"] if embedding.normalize else [])]
    if pipeline is not None and ("Normalize" in pipeline.steps or not embedding.normalize):
        return pipeline
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)
    if width is None:
        raise BaseModelError(
            f"base config.json: none of {', '.join(_WIDTHS)}",
            expected="the width of hidden states, because sentence-transformers asks for it",
            fix="Leave out --pooling",
        )
    modules = [
        {"idx": number, "name": str(number), "path": f"{number}_{kind}" if number else "",
         "type": f"{LIBRARY}.models.{kind}"}
        for number, kind in enumerate(steps)
    ]  # fmt: skip
    modes = {key: mode == embedding.pooling for key, mode in list(_OLD_MODES.items())[:4]}
    settings = {} if pipeline is None else pipeline.files
    return Pipeline(
        steps=tuple(steps),
        pooling=embedding.pooling,
        max_tokens=None if pipeline is None else pipeline.max_tokens,
        files=MappingProxyType({name: file for name, file in settings.items() if name in SETTINGS}),
        documents=MappingProxyType({
            MODULES_FILE: _text(modules),
            "1_Pooling/config.json": _text({"word_embedding_dimension": width, **modes}),
        }),
    )  # fmt: skip


def refuse_other_pooling(pipeline: Pipeline | None, embedding: SentenceEmbedding) -> None:
    """Refuse to pool otherwise than the base does.

    Raises:
        UsageError: The base pools in another way, or does more than pool and normalise.
    """
    if pipeline is None:
        return
    more = set(pipeline.steps) - {"Transformer", "Pooling", "Normalize", "Dropout"}
    if pipeline.pooling != embedding.pooling or more:
        raise UsageError(
            f"--pooling {embedding.pooling}: a base whose own pipeline is: {pipeline}",
            expected=(
                "the pooling that the base was trained with, and no more modules, because the "
                "vectors would be others than the base's"
            ),
            fix="Leave out --pooling: the export carries the base's pipeline, and"
            " SentenceTransformer(folder) applies it"
            + (f"; or pass --pooling {pipeline.pooling}" if not more else ""),
        )


def _modules(root: Path) -> list[tuple[str, str]]:
    """Return kind and path of every module, all known and inside ``root``."""
    entries = _json(root / MODULES_FILE, _MODULES)
    modules = []
    for entry in entries:
        kind, path = entry["type"], entry["path"]
        library, name = kind.partition(".")[0], kind.rpartition(".")[2]
        if library != LIBRARY or name not in CARRIED:
            raise BaseModelError(
                f"base {root / MODULES_FILE}: a module of type {kind!r}",
                expected=(
                    f"{', '.join(sorted(CARRIED))} of {LIBRARY}, because its vectors need all of "
                    "its pipeline, and other modules are not carried"
                ),
                fix=f"Remove {MODULES_FILE} from a copy of the base to export hidden states alone",
            )
        parts = Path(path).parts
        if path.startswith("/") or "\\" in path or len(parts) > 1 or ".." in parts:
            raise _broken(root, f"the path {path!r}", "the name of a folder beside it")
        if not path and name not in {"Transformer", "Normalize"}:
            raise _broken(root, f"a {name} without a path", "a folder of its own")
        modules.append((name, path))
    return modules


def _mode(config: Mapping[str, Any]) -> str:
    """Return the pooling that a Pooling module's config asks for."""
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [word for key, word in _OLD_MODES.items() if config.get(key)] or "mean"
    return mode if isinstance(mode, str) else "+".join(map(str, mode or ["unknown"]))


def _json(path: Path, shape: Shape = OBJECT) -> Any:
    return read_json(path, shape, error=BaseModelError, fix=SAVE_AGAIN)


def _text(document: object) -> str:
    return json.dumps(document, indent=2) + "\n"


def _broken(root: Path, found: str, expected: str) -> BaseModelError:
    return BaseModelError(
        f"base {root / MODULES_FILE}: {found}",
        expected=f"{expected}, because an export carries the base's sentence-transformers pipeline",
        fix=SAVE_AGAIN,
    )
