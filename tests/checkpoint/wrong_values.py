"""A JSON document -> the same one with every other kind of value at every place in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# As they stand in a file: 1e999 is read as infinity, the long ones are beyond a float and 64 bits.
WRONG = ("null", "true", "-1", "0", "1.5", "1e999", "NaN", "9" * 400, str(2**63), '"x"', '""',
         '"../x"', "[]", "[null]", "{}", '{"x": {}}', '[["x"]]')  # fmt: skip
# Entries of a long list or table that stand for all.
MOST = 12
MARK = "a place that is replaced"


def variants(document: Any) -> Iterator[str]:
    """Yield the document's text with each value replaced in turn, and with each key left out."""
    for path in _paths(document):
        text = json.dumps(_changed(document, path, MARK))
        for wrong in WRONG:
            yield text.replace(json.dumps(MARK), wrong)
        if path and isinstance(path[-1], str):
            yield json.dumps(_changed(document, path, None, is_gone=True))


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in list(items)[:MOST]:
            yield from _paths(child, (*at, key))


def _changed(document: Any, path: tuple[Any, ...], new: Any, *, is_gone: bool = False) -> Any:
    if not path:
        return new
    copy = json.loads(json.dumps(document))
    node = copy
    for key in path[:-1]:
        node = node[key]
    if is_gone:
        del node[path[-1]]
    else:
        node[path[-1]] = new
    return copy
