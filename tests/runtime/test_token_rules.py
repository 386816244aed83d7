"""What generation settings force and forbid, beside transformers' own processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from mtl_export.errors import EngineRunError, UsageError
from mtl_export.runtime.token_rules import TokenRules

VOCABULARY, EOS, LENGTH = 9, 2, 8
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(4, VOCABULARY))
TOKENS = GENERATOR.integers(3, 6, (4, LENGTH))

# name -> settings, transformers' processor for an input of so many tokens
PROCESSORS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "repetition": (
        {"repetition_penalty": 1.7},
        lambda: theirs.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "ngrams": ({"no_repeat_ngram_size": 2}, lambda: theirs.NoRepeatNGramLogitsProcessor(2)),
    "trigrams": ({"no_repeat_ngram_size": 3}, lambda: theirs.NoRepeatNGramLogitsProcessor(3)),
    "length": (
        {"min_length": 4, "eos_token_id": EOS},
        lambda: theirs.MinLengthLogitsProcessor(4, torch.tensor([EOS])),
    ),
    "new tokens": (
        {"min_new_tokens": 3, "eos_token_id": [EOS, 7]},
        lambda: theirs.MinNewTokensLengthLogitsProcessor(1, 3, torch.tensor([EOS, 7])),
    ),
    "first": ({"forced_bos_token_id": 4}, lambda: theirs.ForcedBOSTokenLogitsProcessor(4)),
    "last": (
        {"forced_eos_token_id": EOS},
        lambda: theirs.ForcedEOSTokenLogitsProcessor(LENGTH + 1, EOS),
    ),
    "suppressed": (
        {"suppress_tokens": [1, 5]},
        lambda: theirs.SuppressTokensLogitsProcessor([1, 5]),
    ),
    "suppressed at first": (
        {"begin_suppress_tokens": [1, 5]},
        lambda: theirs.SuppressTokensAtBeginLogitsProcessor([1, 5], 1),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("length", range(1, LENGTH + 1))
def test_each_rule_is_transformers_own(name: str, length: int) -> None:
    """After any number of tokens, the logits are those that transformers' processor gives."""
    settings, processor = PROCESSORS[name]
    tokens = TOKENS[:, :length]
    expected = processor()(torch.from_numpy(tokens), torch.from_numpy(LOGITS.copy()))
    rules = TokenRules.from_settings(settings)
    found = rules.applied(LOGITS, tokens, begin=1, last=length == LENGTH)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_a_row_without_a_task_stays_poisoned() -> None:
    """A forced token must not hide that the logits are NaN."""
    rules = TokenRules.from_settings({"forced_bos_token_id": 4, "repetition_penalty": 2.0})
    logits = LOGITS.copy()
    logits[1] = np.nan
    found = rules.applied(logits, TOKENS[:, :1], begin=1, last=False)
    assert np.isnan(found[1]).all()
    assert found[[0, 2, 3]].argmax(axis=1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "setting",
    [
        {"bad_words_ids": [[3]]}, {"encoder_no_repeat_ngram_size": 3}, {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.2}, {"sequence_bias": [[[3], 1.0]]},
        {"exponential_decay_length_penalty": [4, 1.2]}, {"stop_strings": ["."]},
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(setting: dict[str, Any]) -> None:
    """A setting that would change the tokens is named, not ignored."""
    with pytest.raises(UsageError, match=next(iter(setting))):
        TokenRules.from_settings(setting)


def test_settings_come_from_their_own_file_first(tmp_path: Path) -> None:
    """generation_config.json decides; what begins and pads may come from config.json.

    What ends a row does not, where it is there: transformers goes on, too.
    """
    config = {"no_repeat_ngram_size": 3, "eos_token_id": 2, "pad_token_id": 1,
              "decoder_start_token_id": 5}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = TokenRules.from_folder(tmp_path)
    assert (rules.no_repeat_ngram_size, rules.start, rules.eos, rules.pad) == (3, 5, (2,), 1)
    own = {"eos_token_id": [6, 7], "pad_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    rules = TokenRules.from_folder(tmp_path)
    assert (rules.no_repeat_ngram_size, rules.start, rules.eos, rules.pad) == (0, 5, (6, 7), 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 8}))
    rules = TokenRules.from_folder(tmp_path)
    assert (rules.start, rules.eos, rules.pad) == (8, (), 1)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineRunError, match=r"config\.json"):
        TokenRules.from_folder(tmp_path)
