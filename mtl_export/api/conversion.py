"""``mtl-export inspect --convert``: a checkpoint as a folder of another format."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from mtl_export.api import sources
from mtl_export.api.settings import Settings
from mtl_export.api.written import Written

if TYPE_CHECKING:
    from mtl_export.adapters.normal_form import AdapterSet
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.checkpoint.base_model import BaseModel
    from mtl_export.checkpoint.checkpoint import Checkpoint

OWN, PEFT = "mtl-export", "peft"
FORMATS = (OWN, PEFT)


def convert(
    settings: Settings,
    checkpoint: Checkpoint,
    base: BaseModel | None,
    *,
    target: Path,
    form: str,
) -> Written:
    """Write ``checkpoint`` to ``target``, with whatever was given beside it.

    Args:
        settings: For ``--force``.
        checkpoint: With alpha, temperature and task names filled in.
        base: If given, it must fit, and its name and SHA-256 are written in.
        target: The folder to create.
        form: A member of ``FORMATS``.

    Raises:
        UsageError: ``target`` lies in the checkpoint or base.
        HyperparameterError: A number is still missing: the folder would need a flag again.
        BaseModelError: The base does not fit, or PEFT's format needs one.
        IntegrityError: The checkpoint was trained on another base.
        AdapterError: The format cannot hold it.
    """
    from mtl_export.bundle.output import output_folder
    from mtl_export.checkpoint.convert import write_checkpoint
    from mtl_export.merge.peft_folders import write_peft_folders

    started = perf_counter()
    where, fix = f"--convert {target}", "Pass another folder to --convert"
    sources.refuse_in_source(target, checkpoint, base, where=where, fix=fix)
    checkpoint, adapters = _checked(checkpoint, base, needs_adapters=form == PEFT)
    with output_folder(
        target,
        recipe=_recipe(checkpoint, base, form),
        force=settings.force,
        estimated_size_bytes=_size_bytes(checkpoint),
        option="--convert",
    ) as plan:
        if plan.up_to_date:
            pass
        elif form == OWN:
            write_checkpoint(plan.folder, checkpoint)
        elif adapters is not None:
            write_peft_folders(plan.folder, checkpoint, adapters)
    names = [task.name for task in checkpoint.tasks]
    return Written.from_plan(plan, names, perf_counter() - started)


def _checked(
    checkpoint: Checkpoint, base: BaseModel | None, *, needs_adapters: bool
) -> tuple[Checkpoint, AdapterSet | None]:
    """Return the checkpoint with its base named, and its normal form if it has one."""
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.checkpoint import BaseReference
    from mtl_export.checkpoint.convert import with_base
    from mtl_export.errors import AdapterError, BaseModelError

    try:
        adapters = read_adapters(checkpoint, base)
    except AdapterError:
        if needs_adapters:
            raise
        return checkpoint, None  # what cannot be exported yet can still be kept
    except BaseModelError:
        if needs_adapters or base is not None:
            raise
        return checkpoint, None  # only the normal form needs the base, not the folder
    if base is None:
        return checkpoint, adapters
    bound = bind(checkpoint, adapters, base)
    reference = BaseReference(base.reference, base.sha256)
    return with_base(checkpoint, reference, bound.adapters.model_class), bound.adapters


def _recipe(checkpoint: Checkpoint, base: BaseModel | None, form: str) -> Recipe:
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.version import VERSION

    return Recipe(
        command="inspect",
        options={
            **sources.hyper_parameters(checkpoint),
            "tasks": [task.name for task in checkpoint.tasks],
            "format": form,
        },
        sources={
            "checkpoint_sha256": checkpoint.sha256,
            **({"base_sha256": base.sha256} if base is not None else {}),
        },
        tool_version=VERSION,
    )


def _size_bytes(checkpoint: Checkpoint) -> int:
    parts = checkpoint.members or (checkpoint,)
    tensors = [t for part in parts for la in part.layers.values() for t in la.tensors.values()]
    tensors += [tensor for part in parts for tensor in part.replaced.values()]
    return sum(tensor.size_bytes for tensor in tensors)
