"""What an exported folder says of texts: its tokenizer, its padding, its longest row.

Read from ``config.json``, ``tokenizer_config.json`` and ``tokenizer.json``; the
library ``tokenizers`` is imported when a text is first encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.checkpoint.files.tokenizer_file import (
    EXPORT_AGAIN,
    TOKENIZER,
    TOKENIZER_FILE,
    tokenizer_document,
)
from mtl_export.checkpoint.model_inputs import (
    CONFIG,
    has_position_table,
    longest_sequence,
    placed_by,
)
from mtl_export.errors import BackendMissingError, EngineRunError, UsageError, shortened
from mtl_export.runtime.arguments import listed, whole_number

# transformers writes 1e30 for "no limit".
_NO_LIMIT = 10**9
_SETTINGS: Shape = {"model_max_length?": float, "pad_token?": (str, {"content?": str})}


@dataclass(frozen=True)
class TextFiles:
    """The files beside a graph that are about texts.

    Attributes:
        folder: Where they lie; any of them may be absent.
    """

    folder: Path

    @cached_property
    def pad_token_id(self) -> int:
        """Return what fills ``input_ids``; 0 where no file says."""
        for number in (self._config.get("pad_token_id"), self._pad_of_tokenizer()):
            if isinstance(number, int):
                return number
        return 0

    @cached_property
    def longest(self) -> int | None:
        """Return the most tokens that a row may have, None where no file says."""
        stated = self._tokenizer_config.get("model_max_length")
        if isinstance(stated, int | float) and 0 < stated < _NO_LIMIT:
            return int(stated)
        return self.positions

    @property
    def positions(self) -> int | None:
        """Return how many positions the model has, None where the config does not say."""
        return longest_sequence(self._config, unlimited=0) or None

    @property
    def most_tokens(self) -> int | None:
        """Return how many tokens a row can have at all: fewer than a table has rows.

        None where positions are computed, by rotation or from distances: such models run on
        longer rows than they were trained on.
        """
        return self.positions if has_position_table(self._config) else None

    @property
    def placed_by(self) -> str:
        """Return the input whose padding takes no position, "" if all padding takes some."""
        return placed_by(self._config)

    def encode(
        self, texts: Sequence[str | tuple[str, str]], *, truncate: bool = False
    ) -> dict[str, list[list[int]]]:
        """Return ``input_ids``, ``attention_mask`` and ``token_type_ids``, not padded.

        Args:
            texts: A text, or a pair of texts, for each row.
            truncate: Cut rows to ``longest`` tokens; else longer ones are refused.

        Raises:
            BackendMissingError: ``tokenizers`` is not installed.
            UsageError: The folder has no ``tokenizer.json``, ``texts`` is a single text or holds
                something else than texts and pairs, or a row is too long.
            EngineRunError: The library ``tokenizers`` refuses the file, or fails on the texts.
        """
        entries = _text_rows(texts)
        tokenizer = self._cutting_tokenizer if truncate else self._tokenizer
        with _in_library(self.folder / TOKENIZER_FILE):
            encodings = tokenizer.encode_batch(entries)
        self._refuse_longer([len(encoding.ids) for encoding in encodings])
        return {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of rows of tokens, special tokens left out.

        Raises:
            UsageError: ``tokens`` are no rows of ids.
            BackendMissingError: ``tokenizers`` is not installed.
            EngineRunError: The library refuses the file, or fails on the tokens.
        """
        rows, tokenizer = _id_rows(tokens), self._tokenizer
        with _in_library(self.folder / TOKENIZER_FILE):
            texts: list[str] = tokenizer.decode_batch(rows)
        return texts

    def _refuse_longer(self, lengths: Sequence[int]) -> None:
        longest = self.longest
        if longest is None or max(lengths, default=0) <= longest:
            return
        longer = [f"row {at} has {n} tokens" for at, n in enumerate(lengths) if n > longest]
        raise UsageError(
            f"texts: {shortened(longer)}",
            expected=(
                f"at most {longest}, because the tokenizer or the config in {self.folder} says so"
            ),
            fix="Shorten them, or pass truncate=True to lose what is beyond",
        )

    @cached_property
    def _cutting_tokenizer(self) -> Any:
        # One of its own: sessions are shared by threads, and the setting is the tokenizer's.
        known, longest = self._tokenizer, self.longest
        with _in_library(self.folder / TOKENIZER_FILE):
            tokenizer = type(known).from_str(known.to_str())
            if longest is not None:
                tokenizer.enable_truncation(longest)
        return tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackendMissingError(
                "tokenizers: not installed",
                expected="the package that turns texts into tokens",
                fix="pip install tokenizers, or pass token ids",
            ) from error
        path = self.folder / TOKENIZER_FILE
        if not path.is_file():
            raise UsageError(
                f"{path}: no such file",
                expected="the tokenizer of the base, as save_pretrained writes it",
                fix="Tokenise elsewhere and pass token ids",
            )
        # The file carries the settings of whoever last used it.
        document = tokenizer_document(path, unused=("padding", "truncation"))
        with _in_library(path):
            # Of the text that was looked at: another parser may read the file otherwise.
            return Tokenizer.from_str(json.dumps(document))

    @cached_property
    def _config(self) -> dict[str, Any]:
        config = self._read("config.json", CONFIG)
        text = config.get("text_config")
        return {**config, **text} if isinstance(text, dict) else config

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        return self._read("tokenizer_config.json", _SETTINGS)

    def _pad_of_tokenizer(self) -> int | None:
        token = self._tokenizer_config.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        if not content:
            return None
        added = self._read(TOKENIZER_FILE, TOKENIZER).get("added_tokens") or []
        return next((entry["id"] for entry in added if entry["content"] == content), None)

    def _read(self, name: str, shape: Shape) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        found: dict[str, Any] = read_json(path, shape, error=EngineRunError, fix=EXPORT_AGAIN)
        return found


@contextmanager
def _in_library(path: Path) -> Iterator[None]:
    """Turn what ``tokenizers`` raises into our error: bare Exception, and panics of Rust.

    Raises:
        EngineRunError: It raised.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are no Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineRunError(
            f"{path}: the library tokenizers cannot use it ({reason[0]})",
            expected="the file that was exported, and texts that it can hold",
            fix=EXPORT_AGAIN,
        ) from error


def _id_rows(tokens: Any) -> list[list[int]]:
    """Return rows of tokens as the library takes them."""
    rows = listed(tokens)
    ids = [[whole_number(one) for one in listed(row) or ()] for row in rows or ()]
    others = [
        f"row {at} is {repr(row)[:80]}"
        for at, (row, own) in enumerate(zip(rows or (), ids, strict=True))
        if listed(row) is None or not all(one is not None and 0 <= one < 2**32 for one in own)
    ]
    if rows is None or others:
        raise UsageError(
            f"tokens: {shortened(others) if others else type(tokens).__name__}",
            expected="a list with a list of ids, 0 or more, for each row",
            fix="Pass what generate returned",
        )
    return [[one for one in own if one is not None] for own in ids]


def _text_rows(texts: Any) -> list[str | tuple[str, str]]:
    """Return what callers pass, a text or a pair for each row."""
    expected = "a list with a text, or a pair of texts, for each row, all of it in UTF-8"
    if isinstance(texts, str):
        raise UsageError(
            f"texts: one text, {texts[:40]!r}",
            expected=(
                f"{expected}, because a text is a sequence too: each of its letters would be a row"
            ),
            fix="Pass [text]",
        )
    entries = listed(texts)
    if entries is None:
        raise UsageError(f"texts: {type(texts).__name__}", expected=expected, fix="Pass a list")
    others = [(at, entry) for at, entry in enumerate(entries) if not _is_text_row(entry)]
    if others:
        rows = shortened(f"row {at} is {repr(entry)[:80]}" for at, entry in others)
        raise UsageError(
            f"texts: {rows}",
            expected=expected,
            fix="Pass texts, and pairs as tuples of two",
        )
    return entries


def _is_text_row(entry: object) -> bool:
    if isinstance(entry, tuple | list):
        return len(entry) == 2 and all(map(_is_text, entry))
    return _is_text(entry)


def _is_text(entry: object) -> bool:
    """Return whether ``entry`` is a text without half of a surrogate pair."""
    try:
        return isinstance(entry, str) and bool(entry.encode() or not entry)
    except UnicodeEncodeError:
        return False
