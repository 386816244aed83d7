"""The pass in eager mode that gives a trace its samples, and why one failed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mtl_export.errors import GraphError, MtlExportError, shortened

SIMPLE = (bool, int, float, str, type(None))
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def sample_pass(model: Any) -> Iterator[None]:
    """Run ``model`` in the block, without gradients.

    Raises:
        GraphError: The model fails on the samples, or one pass changes what the next does:
            a trace after it would be that of another model.
    """
    before = _settings(model)
    try:
        with torch.no_grad():
            yield
    except MtlExportError:
        raise
    except Exception as error:
        # Models fail on inputs that are not theirs in many unrelated ways.
        raise GraphError(
            f"{type(model).__name__}: it fails on a sample of random tokens: {reason_of(error)}",
            expected=(
                "a model that answers to token ids and their mask alone, because graphs are "
                "traced with such a sample"
            ),
            fix="Merge per task instead (mtl-export merge), or report the model class",
        ) from error
    after = _settings(model)
    changed = [
        f"{name} from {before.get(name, 'nothing')} to {value}"
        for name, value in after.items()
        if before.get(name) != value
    ]
    if changed:
        raise GraphError(
            f"{type(model).__name__}: a model that one short sample changes: "
            f"{shortened(changed, 3)}",
            expected=(
                "a model that computes every input alike, because its trace holds one way only "
                "and would be wrong for other lengths"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )


def vocabulary(model: Any) -> int:
    """Return how many token ids the model knows.

    Raises:
        GraphError: Its config does not say; models of several inputs do not.
    """
    size = getattr(model.config, "vocab_size", None)
    if size is None:
        raise GraphError(
            f"{type(model).__name__}: a config without vocab_size of its own",
            expected=(
                "a model that reads text alone, or images alone, because it is traced with random "
                "token ids or an image"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )
    return int(size)


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error was caused by, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _settings(model: nn.Module) -> dict[str, str]:
    """Return the config and the plain attributes of all modules, as text."""
    config = getattr(model, "config", None)
    found = {
        f"config.{name}": repr(value)
        for name, value in (config.to_dict() if config is not None else {}).items()
    }
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if type(value) in SIMPLE:
                found[f"{name}.{attribute}".lstrip(".")] = repr(value)
    return found
