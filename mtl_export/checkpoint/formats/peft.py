"""PEFT LoRA checkpoints: one adapter, a folder of adapters, or one model with several.

    FOLDER/adapter_config.json  FOLDER/adapter_model.safetensors      one adapter: one task
    FOLDER/<task>/adapter_config.json ...                             one folder per task
    both                                                              a PeftModel with several
                                                                      adapters: "default" and
                                                                      the named ones

``adapter_model.bin`` is read where there is no safetensors file. Folders say nothing of an
order, and a task's id is its place in one: several adapters need ``--tasks``.
``checkpoint-<step>`` folders beside an adapter are the trainer's, not tasks.

Source: https://github.com/huggingface/peft, release 0.21.2, ``peft_model.py``
(save_pretrained), and files that it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mtl_export.checkpoint.checkpoint import (
    LOGIT_LAYERS,
    TASK_NAME,
    BaseReference,
    Checkpoint,
    HeadTensors,
    LayerTensors,
    LedgerEntry,
    RowTensors,
    Task,
    TaskKind,
    check_task_names,
)
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.checkpoint.files.torch_pickle import load_state_dict
from mtl_export.checkpoint.formats.peft_config import (
    CONFIG_FILE,
    PeftConfig,
    peft_fields,
    read_config,
)
from mtl_export.checkpoint.formats.peft_keys import SortedKeys, sorted_keys
from mtl_export.checkpoint.hashing import sha256_of_digests, sha256_of_files
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import AdapterError, CheckpointError, UsageError, shortened

FORMAT = "peft"
SAFETENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
DEFAULT_ADAPTER = "default"
# task_type of a classifier -> whether its last linear layer is the task's head.
CLASSIFIERS = frozenset({"SEQ_CLS", "TOKEN_CLS"})
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")


def is_peft(path: Path) -> bool:
    """Return whether ``path`` is a PEFT adapter or holds some."""
    return path.is_dir() and bool(_adapter_folders(path))


def read_peft(path: Path) -> Checkpoint:
    """Return the only adapter in ``path``; tensors stay on disk.

    Raises:
        AdapterError: It is not LoRA, or a kind of LoRA that cannot be exported.
        CheckpointError: The adapter is broken, or there are several and nothing says their order.
    """
    folders = _adapter_folders(path)
    if len(folders) == 1:
        name, folder = next(iter(folders.items()))
        return _read_adapter(folder, name)
    raise CheckpointError(
        f"checkpoint {path}: {len(folders)} adapters: {shortened(sorted(folders), 8)}",
        expected="their order, because a task's id is its place in it, and folders have none",
        fix=f"Pass --tasks {','.join(sorted(folders))} in the order of the ids",
    )


def read_peft_in_order(path: Path, names: Sequence[str]) -> Checkpoint:
    """Return the adapters in ``path`` as tasks, ``names`` in id order.

    Raises:
        UsageError: ``names`` are not the adapters' names.
        AdapterError: As for ``read_peft``.
        CheckpointError: An adapter is broken, or they are of different model classes.
    """
    folders = _adapter_folders(path)
    if len(folders) == 1 and len(names) == 1:
        return _read_adapter(next(iter(folders.values())), names[0])
    if sorted(names) != sorted(folders):
        raise UsageError(
            f"--tasks {','.join(names)}: the checkpoint has the adapters "
            f"{shortened(sorted(folders), 8)}",
            expected="each of them once, in the order of the ids",
            fix="Correct --tasks (or tasks in mtl-export.toml)",
        )
    check_task_names(str(path), list(names))
    members = tuple(_read_adapter(folders[name], name) for name in names)
    return _joined(path, members)


def _adapter_folders(path: Path) -> dict[str, Path]:
    """Return the adapters in ``path`` by task name, the root's first."""
    folders = {
        child.name: child
        for child in sorted(path.iterdir())
        if child.is_dir() and peft_fields(child) is not None
    }
    if peft_fields(path) is None:
        return folders
    folders = {
        name: child for name, child in folders.items() if not _TRAINER_FOLDER.fullmatch(name)
    }
    own = path.resolve().name
    alone = own if TASK_NAME.fullmatch(own) else "task0"
    return {DEFAULT_ADAPTER if folders else alone: path, **folders}


def _joined(path: Path, members: tuple[Checkpoint, ...]) -> Checkpoint:
    classes = list(dict.fromkeys(member.model_class for member in members))
    if len(classes) > 1:
        raise CheckpointError(
            f"checkpoint {path}: adapters of different models: {shortened(map(repr, classes))}",
            expected="one model class for all tasks, because they are exported as one model",
            fix="Export each kind of model from a folder of its own",
        )
    families = list(dict.fromkeys(member.family for member in members))
    bases = list(dict.fromkeys(member.base.id for member in members))
    names = [member.tasks[0].name for member in members]
    return Checkpoint(
        path=path,
        format=FORMAT,
        # LoRA is what all families of this format extend.
        family=families[0] if len(families) == 1 else "lora",
        tasks=tuple(
            Task(name, index, member.tasks[0].labels, member.tasks[0].kind)
            for index, (name, member) in enumerate(zip(names, members, strict=True))
        ),
        layers=MappingProxyType({}),
        heads=MappingProxyType({}),
        base=BaseReference(" or ".join(base for base in bases if base)),
        model_class=classes[0],
        sha256=sha256_of_digests(
            {name: member.sha256 for name, member in zip(names, members, strict=True)}
        ),
        members=members,
        ledger=tuple(
            LedgerEntry(f"{name}/{entry.tensor}", entry.fate, entry.reason)
            for name, member in zip(names, members, strict=True)
            for entry in member.ledger
        ),
        notes=tuple(_notes(members)),
    )


def _notes(members: tuple[Checkpoint, ...]) -> Iterator[str]:
    """Yield what the user should know: of each adapter, and of all where they differ in kind."""
    if len({member.family for member in members}) > 1:
        kinds = (f"{member.tasks[0].name} {member.family}" for member in members)
        yield f"the adapters are of several families: {shortened(kinds, 8)}"
    for member in members:
        for note in member.notes:
            yield f"{member.tasks[0].name}: {note}"


def _read_adapter(folder: Path, name: str) -> Checkpoint:
    """Return the adapter in ``folder`` as a checkpoint of the one task ``name``."""
    check_task_names(str(folder), [name])
    config = read_config(folder)
    weights, tensors = _open_weights(folder)
    found = sorted_keys(str(weights), tensors)
    layers = _layers(weights, config, found)
    heads, replaced = _heads_and_replaced(config, found)
    labels, kind = _labels(weights, heads)
    ledger = [
        LedgerEntry(entry.tensor, "head")
        if entry.fate == "copied" and _is_of(heads, entry.tensor)
        else entry
        for entry in found.ledger
    ]
    unknown = config.unknown_fields
    notes = (f"{CONFIG_FILE} sets {shortened(unknown)}, which PEFT 0.21 does not know: ignored",)
    return Checkpoint(
        path=folder,
        format=FORMAT,
        family=config.family,
        tasks=(Task(name, 0, labels, kind),),
        layers=MappingProxyType(layers),
        heads=MappingProxyType({module: (head,) for module, head in heads.items()}),
        base=BaseReference(str(config.fields.get("base_model_name_or_path") or "")),
        model_class=config.model_class,
        sha256=sha256_of_files([config.path, weights]),
        replaced=MappingProxyType(replaced),
        rows=MappingProxyType(_rows(weights, config, found)),
        base_copies=MappingProxyType(found.base_copies),
        ledger=tuple(ledger),
        notes=notes if unknown else (),
    )


def _open_weights(folder: Path) -> tuple[Path, Mapping[str, Tensor]]:
    file = folder / SAFETENSORS_FILE
    if file.is_file():
        return file, open_safetensors(file).tensors
    file = folder / PICKLE_FILE
    if file.is_file():
        return file, load_state_dict(file)
    raise CheckpointError(
        f"{folder}: no {SAFETENSORS_FILE} and no {PICKLE_FILE}",
        expected=f"one of them beside {CONFIG_FILE}",
        fix="Copy the whole folder",
    )


def _layers(weights: Path, config: PeftConfig, found: SortedKeys) -> dict[str, LayerTensors]:
    """Return the adapted layers, once every rank is what the config says.

    Raises:
        AdapterError: A convolution is adapted.
        CheckpointError: There is no layer, or a rank contradicts the config.
    """
    convolutions, problems = [], []
    for module, tensors in found.layers.items():
        down = tensors.get("down")
        if down is not None and len(down.shape) > 2:
            convolutions.append(module)
        elif down is not None and down.shape[0] != config.rank(module):
            problems.append(f"{module} has rank {down.shape[0]}, not {config.rank(module)}")
    if convolutions:
        raise AdapterError(
            f"{weights}: adapted convolutions: {shortened(convolutions)}",
            expected="linear layers and embeddings, because the normal form holds matrices",
            fix="Merge it with PEFT's merge_and_unload and export that model",
        )
    if problems or not found.layers:
        raise CheckpointError(
            f"{weights}: {shortened(problems) if problems else 'no adapted layer'}",
            expected=(
                f"the ranks that r and rank_pattern of {CONFIG_FILE} give, because alpha is "
                "divided by the rank"
            ),
            fix="Copy both files of one save",
        )
    return {
        module: LayerTensors(
            module,
            MappingProxyType(_with_bias(found, module, tensors)),
            MappingProxyType({"scaling": config.scaling(module), "alpha": config.alpha(module)}),
            embedding=module in found.embeddings,
        )
        for module, tensors in found.layers.items()
    }


def _with_bias(found: SortedKeys, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors``, with the base layer's trained bias where one is added to it."""
    trained = found.whole.get(f"{module}.bias")
    if trained is None or "up_bias" not in tensors:
        return dict(tensors)
    return {**tensors, "bias": trained}


def _heads_and_replaced(
    config: PeftConfig, found: SortedKeys
) -> tuple[dict[str, HeadTensors], dict[str, Tensor]]:
    """Return the saved modules outside the adapted part as heads, the other tensors by name."""
    inside = {module.partition(".")[0] for module in [*found.layers, *found.rows]}
    heads = {}
    for name, tensor in found.whole.items():
        module, _, kind = name.rpartition(".")
        if (
            config.fields.get("task_type") in CLASSIFIERS
            and kind == "weight"
            and len(tensor.shape) == 2
            and module.partition(".")[0] not in inside
        ):
            heads[module] = HeadTensors(tensor, found.whole.get(f"{module}.bias"))
    replaced = {
        name: tensor
        for name, tensor in found.whole.items()
        if name.rpartition(".")[0] not in heads
        and "up_bias" not in found.layers.get(name.rpartition(".")[0], {})
    }
    return heads, replaced


def _labels(weights: Path, heads: Mapping[str, HeadTensors]) -> tuple[tuple[str, ...], TaskKind]:
    """Return the label names, which PEFT does not store, as transformers numbers them."""
    if not heads:
        return (), "headless"
    last = [module for module in heads if module.rpartition(".")[2] in LOGIT_LAYERS]
    candidates = last if len(heads) > 1 else list(heads)
    if len(candidates) != 1:
        raise CheckpointError(
            f"{weights}: the saved modules {shortened(heads)}",
            expected=(
                f"one that is called {' or '.join(sorted(LOGIT_LAYERS))}, because its rows are the "
                "task's labels"
            ),
            fix="Save the head's layers only (modules_to_save)",
        )
    count = heads[candidates[0]].weight.shape[0]
    kind: TaskKind = "regression" if count == 1 else "single_label_classification"
    return tuple(f"LABEL_{index}" for index in range(count)), kind


def _rows(weights: Path, config: PeftConfig, found: SortedKeys) -> dict[str, RowTensors]:
    rows = {}
    for module, values in found.rows.items():
        indices = config.token_indices(module)
        if indices is None or len(indices) != values.shape[0]:
            raise CheckpointError(
                f"{weights}: {values.shape[0]} trained rows of {module}",
                expected=(
                    f"{'no' if indices is None else len(indices)} rows, because "
                    f"trainable_token_indices in {CONFIG_FILE} says which they are"
                ),
                fix="Copy both files of one save",
            )
        rows[f"{module}.weight"] = RowTensors(indices, values)
    return rows


def _is_of(heads: Mapping[str, HeadTensors], key: str) -> bool:
    return any(key in {head.weight.name, head.bias and head.bias.name} for head in heads.values())
