"""What a model's generation settings force and forbid, step by step, in numpy.

    logits [B, L], tokens so far [B, N]  ->  logits [B, L] that greedy decoding picks from

B rows, L vocabulary. The settings are those of ``generation_config.json``, else those that
older models keep in ``config.json``, and mean what they mean to transformers' ``generate`` with
``do_sample=False, num_beams=1``: what is about sampling and beams is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.errors import EngineRunError, UsageError

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"
# Settings that change what greedy decoding picks and that are not done here, with the values
# that switch them off.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []), "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0), "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1), "sequence_bias": (None, [], {}), "stop_strings": (None, [], ""),
    "watermarking_config": (None,),
}  # fmt: skip
_IDS = (int, [int])
# Of what is read.
SETTINGS: Shape = {
    **dict.fromkeys(("eos_token_id?", "decoder_start_token_id?", "bos_token_id?"), _IDS),
    **dict.fromkeys(("forced_bos_token_id?", "forced_eos_token_id?"), _IDS),
    **dict.fromkeys(("suppress_tokens?", "begin_suppress_tokens?"), _IDS),
    **dict.fromkeys(("min_length?", "min_new_tokens?", "no_repeat_ngram_size?"), int),
    "pad_token_id?": int,
    "repetition_penalty?": float,
}


@dataclass(frozen=True)
class TokenRules:
    """How generation begins and ends, and what it may not say.

    Attributes:
        start: The decoder's first token; None for models that continue their prompt.
        eos: A row ends after any of these.
        pad: Fills rows that have ended.
        min_length: No row ends with fewer tokens, the first included.
        min_new_tokens: Likewise, new tokens alone.
        forced_first: The first new token, whatever the logits; None: free.
        forced_last: Where a row still goes on at its last token, it is one of these.
        repetition_penalty: Divides positive logits of tokens that occurred, multiplies negative
            ones; 1 changes nothing.
        no_repeat_ngram_size: No n tokens in a row occur twice; 0: they may.
        suppressed: Never said.
        suppressed_first: Never the first new token.
    """

    start: int | None = None
    eos: tuple[int, ...] = ()
    pad: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppressed: tuple[int, ...] = field(default=())
    suppressed_first: tuple[int, ...] = field(default=())

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> TokenRules:
        """Return the rules that ``settings`` set.

        Args:
            settings: By their transformers names.
            config: Names the tokens that begin and pad where ``settings`` do not. What ends a
                row, ``settings`` alone say.

        Raises:
            UsageError: A setting is on that is not done here, or has no meaning.
        """
        _refuse_senseless(settings)
        on = [name for name, off in UNSUPPORTED.items() if settings.get(name) not in off]
        if on:
            raise UsageError(
                f"generation settings: {', '.join(f'{name} = {settings[name]!r}' for name in on)}",
                expected=(
                    "none of them set, because tokens would differ from those of transformers' "
                    "generate"
                ),
                fix=f"Remove them from {GENERATION_FILE}, or generate with transformers",
            )
        eos = _ids(settings.get("eos_token_id"))
        starts = ("decoder_start_token_id", "bos_token_id")
        start = _named(starts, settings, config or {})
        pad = _named(("pad_token_id",), settings, config or {})
        begin_shift = _ids(settings.get("begin_suppress_tokens"))
        return cls(
            start=_first(start),
            eos=eos,
            pad=int(pad) if pad is not None else (eos[0] if eos else 0),
            min_length=int(settings.get("min_length") or 0),
            min_new_tokens=int(settings.get("min_new_tokens") or 0),
            forced_first=_first(settings.get("forced_bos_token_id")),
            forced_last=_ids(settings.get("forced_eos_token_id")),
            repetition_penalty=float(settings.get("repetition_penalty") or 1.0),
            no_repeat_ngram_size=int(settings.get("no_repeat_ngram_size") or 0),
            suppressed=_ids(settings.get("suppress_tokens")),
            suppressed_first=begin_shift,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> TokenRules:
        """Return the rules of the model in ``folder``.

        Raises:
            UsageError: A setting is on that is not done here.
            EngineRunError: A file is no JSON.
        """
        config = read_settings(folder / CONFIG_FILE)
        own = folder / GENERATION_FILE
        return cls.from_settings(read_settings(own) if own.is_file() else config, config)

    def applied(
        self,
        logits: Array,
        tokens: Array,
        *,
        begin: int,
        last: bool,
        padding: Array | None = None,
    ) -> Array:
        """Return the logits as the rules change them.

        Args:
            logits: ``[B, L]``, of the next token.
            tokens: int64 ``[B, N]``, all tokens of the decoder so far.
            begin: How many of them generation began with.
            last: The next token is the last one asked for.
            padding: int ``[B]``, how many tokens at a row's beginning are padding, which is no
                repetition; None: none.
        """
        self._refuse_beyond(logits.shape[1])
        logits = logits.copy()
        length, new = tokens.shape[1], tokens.shape[1] - begin
        if self.repetition_penalty != 1.0:
            said = np.zeros(logits.shape, np.bool_)
            real = np.arange(length) >= (0 if padding is None else padding[:, None])
            rows, places = np.nonzero(np.broadcast_to(real, tokens.shape))
            said[rows, tokens[rows, places]] = True
            penalty = self.repetition_penalty
            penalised = np.where(logits < 0, logits * penalty, logits / penalty)
            logits = np.where(said, penalised, logits)
        if self.no_repeat_ngram_size:
            for row, said in zip(logits, tokens.tolist(), strict=True):
                row[_repeats(said, self.no_repeat_ngram_size)] = -np.inf
        if length < self.min_length or new < self.min_new_tokens:
            logits[:, list(self.eos)] = -np.inf
        if self.forced_first is not None and length == 1:
            logits = _only(logits, (self.forced_first,))
        if self.forced_last and last:
            logits = _only(logits, self.forced_last)
        logits[:, list(self.suppressed)] = -np.inf
        # A forced first token is not the one that these are about.
        first = 1 if begin == 1 and self.forced_first is not None else 0
        if new == first:
            logits[:, list(self.suppressed_first)] = -np.inf
        return logits

    def _refuse_beyond(self, vocabulary: int) -> None:
        """Refuse tokens that the logits do not have."""
        first = () if self.forced_first is None else (self.forced_first,)
        named = (*self.eos, *first, *self.forced_last, *self.suppressed, *self.suppressed_first)
        beyond = [token for token in named if not 0 <= token < vocabulary]
        if beyond:
            raise EngineRunError(
                f"{GENERATION_FILE}: the token {beyond[0]}",
                expected=(
                    f"tokens 0 to {vocabulary - 1}, because the model gives no logit for others"
                ),
                fix="Export again with --force, from a base whose settings are its own",
            )


def _refuse_senseless(settings: Mapping[str, Any]) -> None:
    """Refuse what transformers refuses: a penalty that is not positive, a size below 0."""
    penalty, size = settings.get("repetition_penalty"), settings.get("no_repeat_ngram_size")
    if (penalty is not None and penalty <= 0) or (size or 0) < 0:
        raise UsageError(
            f"generation settings: repetition_penalty {penalty}, no_repeat_ngram_size {size}",
            expected="a penalty above 0, a size of 0 or more",
            fix=f"Correct them in {GENERATION_FILE}",
        )


def _only(logits: Array, tokens: tuple[int, ...]) -> Array:
    """Return logits that leave no choice; NaN, which says that a row has no task, stays."""
    forced = np.full_like(logits, -np.inf)
    forced[:, list(tokens)] = 0
    forced[np.isnan(logits)] = np.nan
    return forced


def _repeats(tokens: list[int], size: int) -> list[int]:
    """Return the tokens that would complete ``size`` tokens that occurred before."""
    if len(tokens) + 1 < size:
        return []
    last = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[at + size - 1] for at in starts if tokens[at : at + size - 1] == last]


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(one) for one in value) if isinstance(value, list | tuple) else (int(value),)


def _named(names: Sequence[str], *sources: Mapping[str, Any]) -> Any:
    """Return what the first of ``sources`` that says one of ``names`` says; None if none does."""
    said = (source.get(name) for source in sources for name in names)
    return next((value for value in said if value is not None), None)


def _first(value: Any) -> int | None:
    found = _ids(value)
    return found[0] if found else None


def read_settings(path: Path) -> dict[str, Any]:
    """Return one of a model's JSON files.

    Raises:
        EngineRunError: It is not there, no JSON, or a setting is of another type.
    """
    fix = "Export again with --force"
    document: dict[str, Any] = read_json(path, SETTINGS, error=EngineRunError, fix=fix)
    return document
