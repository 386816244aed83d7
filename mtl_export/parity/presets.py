"""How much is compared: three presets, each with all that the one before it has.

    quick      a batch of each task, one of all tasks mixed (of language models also the steps
               and tokens that follow); ids that no task has, neighbours, permuted rows, other
               tasks' tensors, stored tensors
    standard   also single rows, small, odd, long and full-length batches, padding on the left,
               rows of nothing but padding, rows one by one, every layer, zeroed adapters
    full       also batches and lengths around powers of two, and more seeds

What a preset leaves out is not run, and is said: by name, under every artefact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from mtl_export.parity.cases import Case

Preset = Literal["quick", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("quick", "standard", "full")
NOTHING: Mapping[str, str] = MappingProxyType({})
# Checks beside the cases that take long; all others belong to every preset.
PADDING_ONLY = "padding only"
ONE_BY_ONE, FURTHER = "rows one by one", "padded further"
LAYERS, ZEROED = "every layer counts", "zeroed adapters"
STANDARD_CHECKS = (ONE_BY_ONE, FURTHER, PADDING_ONLY, LAYERS, ZEROED)


def choose(cases: Sequence[Case], preset: Preset) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of ``preset``, and why each other case or check is left out, by name."""
    most = PRESETS.index(preset)
    taken = [case for case in cases if PRESETS.index(case.preset) <= most]
    left_out = {
        case.name: _reason(preset, case.preset)
        for case in cases
        if PRESETS.index(case.preset) > most
    }
    if preset == "quick":
        left_out |= dict.fromkeys(STANDARD_CHECKS, _reason(preset, "standard"))
    return taken, left_out


def _reason(preset: Preset, needed: Preset) -> str:
    if needed == "full":
        return "only --full runs it"
    return f"left out by --{preset}"
