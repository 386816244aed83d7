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

from mtl_export.errors import UsageError
from mtl_export.parity.cases import Case

Preset = Literal["quick", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("quick", "standard", "full")
NOTHING: Mapping[str, str] = MappingProxyType({})
# Checks beside the cases that take long; all others belong to every preset.
PADDING_ONLY = "padding only"
ONE_BY_ONE, FURTHER = "rows one by one", "padded further"
LAYERS, ZEROED = "every layer counts", "zeroed adapters"
STANDARD_CHECKS = (ONE_BY_ONE, FURTHER, PADDING_ONLY, LAYERS, ZEROED)


def preset_of(quick: bool, full: bool) -> Preset:
    """Return what the two switches ask for.

    Raises:
        UsageError: Both are on.
    """
    if quick and full:
        raise UsageError("--quick and --full: both", expected="one of them", fix="Leave one out")
    return "quick" if quick else "full" if full else "standard"


def choose(cases: Sequence[Case], preset: Preset) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of ``preset``, and why each other case or check is left out, by name."""
    most = PRESETS.index(preset)
    taken = [case for case in cases if PRESETS.index(case.preset) <= most]
    left_out: dict[str, str] = {}
    if preset == "quick":
        names = [case.name for case in cases if case.preset == "standard"]
        left_out = dict.fromkeys([*names, *STANDARD_CHECKS], "left out by --quick")
    more = sum(case.preset == "full" for case in cases)
    if preset != "full" and more:
        left_out[f"{more} more batches"] = "left out without --full"
    return taken, left_out
