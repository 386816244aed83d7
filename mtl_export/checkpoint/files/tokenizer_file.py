"""A ``tokenizer.json`` -> its content, once its ids and what it multiplies are within limits.

The library does what the file says, in memory that no Python error can save: five replacements
of a letter by thirty make 24 million letters of each, a template may repeat the text, and a
broken table of characters is asked for 4 GB.

Source: tokenizers 0.23, https://github.com/huggingface/tokenizers; the table's first four bytes
are its size: sentencepiece, ``src/normalizer.cc``, ``Normalizer::DecodePrecompiledCharsMap``.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.errors import EngineRunError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER: Shape = {"added_tokens?": [{"id": int, "content": str}], "model": {}}
EXPORT_AGAIN = "Export again with --force"
# The library keeps a table as long as the largest id: 8.5 GB for 2**31. The largest vocabulary
# known has a million tokens.
MOST_ID = 2**24
# A space becomes "▁", three bytes, once or twice.
MOST_GROWTH = 64
MOST_ADDED = 4096
_TIMES_OF_TEXT = 4


def tokenizer_document(path: Path, *, unused: Collection[str] = ()) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json``, its ids and what it adds within limits.

    Args:
        path: The file.
        unused: Parts that the caller has no use for, which are left out.

    Raises:
        EngineRunError: It is no JSON object, has an id beyond any vocabulary, or multiplies
            texts or tokens.
    """
    content = read_json(path, TOKENIZER, error=EngineRunError, fix=EXPORT_AGAIN)
    document = {name: part for name, part in content.items() if name not in unused}
    largest = max(_whole_numbers(document), default=0)
    if largest > MOST_ID:
        raise EngineRunError(
            f"{path}: the id {largest:,}",
            expected=f"ids up to {MOST_ID:,}, because the memory it takes grows with the largest",
            fix=EXPORT_AGAIN,
        )
    problem = growth_problem(document)
    if problem:
        raise EngineRunError(
            f"{path}: {problem}",
            expected=(
                "a tokenizer whose texts and tokens are about as long as what it is given, "
                "because a short text must not fill the memory"
            ),
            fix=EXPORT_AGAIN,
        )
    return document


def growth_problem(document: Mapping[str, Any]) -> str:
    """Return by what a parsed ``tokenizer.json`` multiplies texts; empty if by little."""
    growth, added, repeats = 1.0, 0, 0
    for node in _objects(document):
        kind = node.get("type")
        if kind == "Replace":
            pattern = node.get("pattern")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            length = len(old) if isinstance(old, str) else 1
            growth *= max(1.0, len(str(node.get("content"))) / max(length, 1))
        elif kind == "Prepend":
            added += len(str(node.get("prepend")))
        elif kind == "TemplateProcessing":
            tokens, texts = _of_template(node)
            added, repeats = added + tokens, repeats + texts
        elif kind == "Precompiled" and _is_broken(node.get("precompiled_charsmap")):
            return "a table of characters that announces more than it holds"
    if growth > MOST_GROWTH:
        return f"replacements that make a text {growth:.3g} times as long"
    if added > MOST_ADDED:
        return f"{added:,} letters or tokens that it adds to a text"
    return f"{repeats:,} repeats of a text" if repeats > _TIMES_OF_TEXT else ""


def _objects(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every object outside the vocabulary."""
    pending: list[Any] = [part for name, part in document.items() if name != "model"]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _of_template(node: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many tokens a template adds, and how often it repeats one text."""
    known = node.get("special_tokens")
    known = known if isinstance(known, dict) else {}
    tokens, texts = 0, 0
    for name in ("single", "pair"):
        pieces = node.get(name)
        one = [piece for piece in (pieces if isinstance(pieces, list) else ())
               if isinstance(piece, dict)]  # fmt: skip
        texts = max(texts, sum("Sequence" in piece for piece in one))
        added = 0
        for piece in one:
            special = piece.get("SpecialToken")
            entry = known.get(str(special.get("id"))) if isinstance(special, dict) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            added += len(ids) if isinstance(ids, list) else 0
        tokens = max(tokens, added)
    return tokens, texts


def _is_broken(table: Any) -> bool:
    """Return whether a table of characters is shorter than its first number says."""
    try:
        raw = base64.b64decode(table, validate=True)
    except (ValueError, TypeError):
        return False  # the library says what is wrong with it
    return int.from_bytes(raw[:4], "little") > len(raw) - 4


def _whole_numbers(document: dict[str, Any]) -> Iterator[int]:
    """Yield every whole number in a JSON object."""
    pending: list[Any] = [document]
    while pending:
        node = pending.pop()
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                pending.append(child)
            elif type(child) is int:
                yield child
