"""Tokenizers that multiply what they are given."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.files.tokenizer_file import growth_problem
from mtl_export.errors import EngineRunError
from mtl_export.runtime.texts import TextFiles
from tests.factories import toy_tokenizer

A, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}


def replace(old: str, new: str) -> dict[str, Any]:
    """Return one replacement."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def template(*pieces: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    """Return a post-processor whose special token is so many ids."""
    tokens = {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [A],
            "special_tokens": tokens}  # fmt: skip


MULTIPLYING: dict[str, dict[str, Any]] = {
    "replacements": {"normalizer": {"type": "Sequence",
                                    "normalizers": [replace("a", "a" * 20)] * 7}},
    "of nothing": {"normalizer": replace("", "a" * 100)},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [replace("e", "e" * 20)] * 7}},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "special tokens": {"post_processor": template(*[SPECIAL] * 2000, ids=2000)},
    "repeats": {"post_processor": template(*[A] * 2000)},
    "table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap":
                             base64.b64encode(b"\xff" * 9).decode()}},
}  # fmt: skip


@pytest.mark.parametrize("parts", MULTIPLYING.values(), ids=MULTIPLYING)
def test_what_multiplies_texts_or_tokens_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    """The library would take gigabytes for a short text, and abort the process."""
    toy_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    with pytest.raises(EngineRunError, match=r"tokenizer\.json"):
        TextFiles(tmp_path).encode(["nurse"])


def test_what_tokenizers_in_use_do_is_taken() -> None:
    """Gemma's spaces, ALBERT's quotes, LLaMA's prefix, BERT's template, T5's table."""
    table = base64.b64encode((8).to_bytes(4, "little") + b"\0" * 12).decode()
    steps = [replace(" ", "\u2581"), replace("``", '"'), {"type": "Prepend", "prepend": "\u2581"},
             {"type": "Precompiled", "precompiled_charsmap": table}]  # fmt: skip
    post = template(SPECIAL, A, SPECIAL)
    assert not growth_problem({"normalizer": {"normalizers": steps}, "post_processor": post})
