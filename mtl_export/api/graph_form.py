"""What graphs take and give and are written in: one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtl_export.checkpoint.sentence_embedding import METADATA_KEY, Pooling, SentenceEmbedding
from mtl_export.errors import UsageError
from mtl_export.graph.names import OPSET
from mtl_export.names import DTYPE_KEY, TASK_INPUT_KEY

if TYPE_CHECKING:
    from mtl_export.bundle.manifest import OptionValue
    from mtl_export.graph.passes.routing import TaskInput

GRAPH_DTYPE = "fp32"
# In the metadata of graphs that are not as usual.
INLINE_KEY, OPSET_KEY = "mtl_export.inline", "mtl_export.opset"


@dataclass(frozen=True, slots=True)
class Form:
    """What graphs take and give.

    Attributes:
        task_input: ``rows``: task_ids [batch]; ``scalar``: task_ids [1].
        embedding: How hidden states become one vector a row; None keeps the model's outputs.
        inline: The single graph has no functions of its own, but their nodes.
        opset: What they are written in.
    """

    task_input: TaskInput = "rows"
    embedding: SentenceEmbedding | None = None
    inline: bool = False
    opset: int = OPSET

    def as_words(self) -> list[str]:
        """Return the options that ask for what is not the default."""
        asked = ["--task-input scalar"] if self.task_input != "rows" else []
        asked += ["--pooling"] if self.embedding is not None else []
        asked += ["--inline"] if self.inline else []
        return [*asked, f"--opset {self.opset}"] if self.opset != OPSET else asked

    def as_asked(self, dtype: str | None) -> dict[str, tuple[str, str]]:
        """Return option and value of what was asked for, by its key in a graph's metadata."""
        asked: dict[str, tuple[str, str]] = {}
        if dtype is not None:
            # A graph in float32 does not say so.
            asked[DTYPE_KEY] = ("--dtype", "" if dtype == GRAPH_DTYPE else dtype)
        if self.task_input != "rows":
            asked[TASK_INPUT_KEY] = ("--task-input", self.task_input)
        if self.embedding is not None:
            asked[METADATA_KEY] = ("--pooling", self.embedding.to_json())
        if self.inline:
            asked[INLINE_KEY] = ("--inline", "true")
        if self.opset != OPSET:
            asked[OPSET_KEY] = ("--opset", str(self.opset))
        return asked

    def as_options(self, *, is_merged: bool) -> dict[str, OptionValue]:
        """Return what of it is not the default, for the recipe.

        Args:
            is_merged: The graph is one task's: it has neither ``task_ids`` nor functions.
        """
        options: dict[str, OptionValue] = {}
        if self.task_input != "rows" and not is_merged:
            options["task_input"] = self.task_input
        if self.embedding is not None:
            options["embedding"] = self.embedding.to_json()
        if self.inline and not is_merged:
            options["inline"] = True
        if self.opset != OPSET:
            options["opset"] = self.opset
        return options

    def as_metadata(self, *, is_merged: bool) -> dict[str, str]:
        """Return what the file says of it beside what the passes that made it wrote."""
        options = self.as_options(is_merged=is_merged)
        keys = {INLINE_KEY: "inline", OPSET_KEY: "opset"}
        return {key: str(options[name]).lower() for key, name in keys.items() if name in options}


def form_of(
    task_input: TaskInput, pooling: Pooling | None, *, normalize: bool, inline: bool, opset: int
) -> Form:
    """Return the record of these options.

    Raises:
        UsageError: ``--normalize`` without ``--pooling``.
    """
    if normalize and pooling is None:
        raise UsageError(
            "--normalize: no --pooling",
            expected=(
                "--pooling mean or --pooling cls beside it, because it is the pooled vectors that "
                "are brought to length 1"
            ),
            fix="Add --pooling, or leave out --normalize",
        )
    embedding = SentenceEmbedding(pooling, normalize) if pooling else None
    return Form(task_input, embedding, inline, opset)
