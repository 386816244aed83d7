"""One vector for a text, from the hidden states of its tokens: what is asked of the graph.

mean      sum_s mask_s h_s / sum_s mask_s
cls       h_0
normalize the vector divided by its Euclidean length
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from mtl_export.checkpoint.files.json_file import parse_json

Pooling = Literal["mean", "cls"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls")
HIDDEN_STATES = "last_hidden_state"
# The output's name in sentence-transformers and in the graphs that it and optimum write.
OUTPUT = "sentence_embedding"
METADATA_KEY = "mtl_export.embedding"


@dataclass(frozen=True, slots=True)
class SentenceEmbedding:
    """How tokens become one vector.

    Attributes:
        pooling: ``mean`` over the tokens that are not padding, or ``cls``, the first one.
        normalize: Bring the vector to length 1.
    """

    pooling: Pooling
    normalize: bool = False

    def to_json(self) -> str:
        """Return it as the value of ``METADATA_KEY``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SentenceEmbedding | None:
        """Return what ``to_json`` wrote; None for an empty text.

        Raises:
            CheckpointError: It wrote something else.
        """
        if not text:
            return None
        shape = {"pooling": frozenset(POOLINGS), "normalize?": bool}
        found = parse_json(text, METADATA_KEY, shape, fix="Export the graph again")
        return cls(found["pooling"], found.get("normalize") or False)
