"""The frozen base as a transformers model, every weight accounted for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.naming import own_tensor
from mtl_export.adapters.modules.readout import with_readouts
from mtl_export.checkpoint.hidden_biases import SWITCHES
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.errors import AdapterError, BaseModelError, MtlExportError, shortened

# Of heads, and of tables that are computed: masks, rotations. 0.4 GB as float32.
_NOT_STORED = 10**8


def base_model(bound: BoundModel, dtype: torch.dtype) -> Any:
    """Return the model class of the checkpoint with the base's weights, in eval mode.

    Tensors that the checkpoint trained for all tasks take the place of the base's; head
    modules keep random weights: the caller replaces them.

    Raises:
        AdapterError: The checkpoint names no model class, or an unknown one.
        BaseModelError: The class has a weight that neither the base nor the checkpoint
            provides, or transformers cannot build it from the base's config and weights.
    """
    model_class = _class_of(bound)
    if own_class(bound.adapters.model_class) is not None:
        return model_class.from_tensors(bound.base.config, bound.base.tensors, dtype)
    with _built_by_transformers(model_class, bound):
        settings: dict[str, Any] = {"config": _config(model_class, bound)}
    if dtype is torch.float64:
        # The kernel that mixtures of experts have by default takes no float64.
        settings["experts_implementation"] = "eager"
    with _built_by_transformers(model_class, bound):
        _refuse_larger(model_class, settings["config"], bound)
        model, info = load_with_info(
            model_class, bound.base.folder, dtype=dtype, ignore_mismatched_sizes=True, **settings
        )
    _refuse_mismatched(info, model_class, bound)
    heads = tuple(f"{module}." for module in bound.adapters.heads)
    in_no_file = bound.base.tensors.keys() - bound.base.file_of.keys()
    added = {bound.prefix + name for name in in_no_file} & set(info["missing_keys"])
    missing = sorted(
        key for key in info["missing_keys"] if not key.startswith(heads) and key not in added
    )
    if missing:
        raise BaseModelError(
            f"base {bound.base.reference}: {model_class.__name__} has weights that are nowhere: "
            f"{shortened(missing)}",
            expected="every weight in the base or in the checkpoint",
            fix="Pass the base the adapter was trained on, or save these modules with the adapter",
        )
    _replace(model, bound, dtype, added)
    return model.eval()


def model_of_shapes(bound: BoundModel) -> Any:
    """Return the model of ``bound`` without numbers, in eval mode; no weight is read.

    To be called, and the model run, in torch's ``FakeTensorMode``.

    Raises:
        AdapterError: The checkpoint names no model class, or an unknown one.
        BaseModelError: transformers cannot build it from the base's config.
    """
    model_class = _class_of(bound)
    with _built_by_transformers(model_class, bound):
        return model_class(_config(model_class, bound)).eval()


def _class_of(bound: BoundModel) -> Any:
    """Return the model's class, answering as the checkpoint says."""
    model_class = class_named(bound.adapters.model_class)
    readouts = bound.checkpoint.readouts
    if not readouts:
        return model_class
    # A task whose answer is another output has a head without labels.
    shapes = {
        module: max(head.weight.shape for head in heads)
        for module, heads in bound.adapters.heads.items()
    }
    return with_readouts(model_class, readouts, shapes)


def load_with_info(model_class: Any, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model and what ``from_pretrained`` says of its weights.

    A bare encoder whose folder has no pooler (it was saved with another head) is loaded
    without one: its hidden states need none.
    """
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **settings)
    missing = info["missing_keys"]
    has_choice = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if missing and has_choice and all(key.startswith("pooler.") for key in missing):
        settings["add_pooling_layer"] = False
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **settings)
    return model, info


def _config(model_class: Any, bound: BoundModel) -> Any:
    """Return the config in the base's folder, with what the bound base's says beyond it."""
    config = model_class.config_class.from_pretrained(bound.base.folder)
    for name in SWITCHES.get(str(bound.base.config.get("model_type")), {}):
        if bound.base.config.get(name):
            setattr(config, name, True)
    if "quantization_config" not in bound.base.config and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


@contextmanager
def _built_by_transformers(model_class: Any, bound: BoundModel) -> Iterator[None]:
    """Turn what transformers and torch raise for a config that fits no model into our error.

    Raises:
        BaseModelError: They raised.
    """
    try:
        with quiet_transformers():
            yield
    except (MtlExportError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error) or getattr(error, "errno", None):
            raise  # the system's fault, not the file's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _unfit(model_class, bound, f"cannot be built by transformers ({reason[:300]})") from (
            error
        )


def _refuse_larger(model_class: Any, config: Any, bound: BoundModel) -> None:
    """Refuse a model much larger than its files: the rest would be filled with random numbers.

    Raises:
        BaseModelError: It is.
    """
    with torch.device("meta"):
        model = model_class(config)
    tensors = (*bound.base.tensors.values(), *bound.checkpoint.replaced.values())
    stored = sum(prod(tensor.shape) for tensor in tensors)
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if values > 4 * stored + _NOT_STORED:
        raise _unfit(model_class, bound, f"has {values:,} numbers, the files {stored:,}")


def _refuse_mismatched(info: dict[str, Any], model_class: Any, bound: BoundModel) -> None:
    wrong = [
        f"{name} is {list(found)}, not {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
        if not name.startswith(tuple(f"{head}." for head in bound.adapters.heads))
    ]
    if wrong:
        raise _unfit(model_class, bound, f"has other shapes than the files: {shortened(wrong)}")


def _unfit(model_class: Any, bound: BoundModel, found: str) -> BaseModelError:
    return BaseModelError(
        f"base {bound.base.reference}: {model_class.__name__} of its config.json {found}",
        expected="the config.json that was saved with the weights",
        fix="Pass the whole base that the adapter was trained on",
    )


def _replace(model: Any, bound: BoundModel, dtype: torch.dtype, added: Iterable[str]) -> None:
    """Put the tensors that the checkpoint trained for all tasks in place of the base's.

    Before, ``added`` ones get the values that the bound base has and its folder has not.
    """
    for own, name in bound.base.untied.items():
        module, _, kind = own.rpartition(".")
        stored = bound.base_tensor(name).widened()
        weight = torch.nn.Parameter(torch.from_numpy(stored).to(dtype), requires_grad=False)
        setattr(model.get_submodule(module), kind, weight)
    state: dict[str, torch.Tensor] = model.state_dict()
    with torch.no_grad():
        for name in added:
            value = torch.from_numpy(bound.base_tensor(name).widened())
            state[name].copy_(value.to(dtype))
        for name, tensor in bound.checkpoint.replaced.items():
            own = own_tensor(model, name)
            state[own].copy_(torch.from_numpy(tensor.widened()).to(dtype))
        for name, rows in bound.checkpoint.rows.items():
            values = torch.from_numpy(rows.values.widened()).to(dtype)
            state[own_tensor(model, name)][list(rows.indices)] = values


def class_named(name: str) -> Any:
    """Return the class called ``name``: transformers', or one of ours.

    Raises:
        AdapterError: There is none, or it is no model.
    """
    import transformers

    own = own_class(name)
    if own is not None:
        module, _, attribute = own.path.partition(":")
        return getattr(import_module(module), attribute)
    model_class = getattr(transformers, name, None) if name else None
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise AdapterError(
            f"model class {name!r}: transformers {transformers.__version__} has no model of that "
            "name",
            expected="a class such as BertForSequenceClassification",
            fix=(
                "Correct the class that the checkpoint names, or architectures in the base's "
                "config.json"
            ),
        )
    return model_class


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and progress bars: we check and report ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
