"""An exported ONNX folder -> answers: what a service imports.

    names or ids of tasks + rows of tokens -> padded batches -> ONNX Runtime -> one Answer per row

Works on the single graph, on a merged graph (of one task) and on graphs whose task is chosen for
the whole batch, by an input or by an adapter; which it is stands in the file. Needs numpy and
onnxruntime; neither torch nor onnx is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import TaskNotFoundError, UsageError, shortened
from mtl_export.names import (
    ADAPTER_INPUT,
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    LAYOUT_KEY,
    PREFILL_FILE,
    PRESENT_PREFIX,
    TASK_IDS,
)
from mtl_export.runtime.answers import Answer, answer_of
from mtl_export.runtime.arguments import count_of, listed, whole_number
from mtl_export.runtime.images import ImageGraph, image_size_of
from mtl_export.runtime.model_files import PARTS, graph_file
from mtl_export.runtime.ort import OrtPart, metadata_of, open_session, run_session, task_table
from mtl_export.runtime.rows import RowBatch, fields_of, joined, own_part, rows_from
from mtl_export.runtime.texts import TextFiles

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array
    from mtl_export.runtime.onnx_adapters import ActiveAdapter

TaskLike = str | int | np.integer[Any]


@dataclass(frozen=True)
class TaskOutputs:
    """What one call gave.

    Attributes:
        outputs: By name, ``[B, ...]``, rows in the order they were passed; logits as wide as
            the widest task (others' columns are -inf), tokens padded. Where heads differ in
            kind each has an output, and rows of tasks with another are -inf in it.
        answers: The same row by row, cut to the row's own task and length.
    """

    outputs: Mapping[str, Array]
    answers: tuple[Answer, ...]


class TaskSession:
    """Serves the tasks of one exported folder.

        >>> from mtl_export.runtime import TaskSession
        >>> session = TaskSession("out/onnx")
        >>> [task.name for task in session.tasks]
        ['ads_rel', 'topic', 'spam']
        >>> rows = session.encode([("nurse", "night shift"), "where", "free money"])
        >>> results = session.run(rows, ["ads_rel", "topic", "spam"])
        >>> for answer in results.answers:
        ...     print(answer.task.name, answer.decision, answer.probabilities.round(2))
        ads_rel yes [0.32 0.68]
        topic when [0.02 0.4  0.08 0.5 ]
        spam ham [0.82 0.14 0.05]

    One session may be used by many threads at once: nothing in it changes after it was made.

    Args:
        path: What ``mtl-export onnx`` wrote: a folder, or a graph in it. Of a language model the
            first of its graphs answers to ``run``, all of them together to ``generate``.
        providers: Where it runs: ``cpu``, ``cuda`` or ONNX Runtime's names, the best first;
            None: cpu.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.

    Attributes:
        tasks: The tasks served, in id order.
        layout: How the file was exported: ``merged``, ``single-graph`` and so on.

    Raises:
        UsageError: There is no such graph, or it is none of ours.
        BackendMissingError: onnxruntime is not installed, or lacks a provider.
        EngineRunError: onnxruntime refuses the file.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] | None = None, threads: int = 0
    ) -> None:
        self._path = graph_file(Path(path))
        self._session = open_session(self._path, providers=providers, threads=threads)
        metadata = metadata_of(self._session)
        self.tasks = task_table(metadata)
        if not self.tasks:
            raise UsageError(
                f"{self._path}: the file names no tasks",
                expected="a graph that mtl-export wrote, with mtl_export.tasks in its metadata",
                fix="Export it with mtl-export onnx",
            )
        self.layout = metadata.get(LAYOUT_KEY, "")
        self._images = ImageGraph(self._session, self._path, image_size_of(metadata))
        self._texts = TextFiles(self._path.parent)
        fields = fields_of(self._session.get_inputs())
        self._inputs = tuple(field for field in fields if field.name != TASK_IDS)
        self._task_input = next((field for field in fields if field.name == TASK_IDS), None)
        self._outputs = tuple(
            field
            for field in fields_of(self._session.get_outputs())
            if not field.name.startswith(PRESENT_PREFIX)
        )
        others = [self._path.with_name(name) for name in PARTS.get(self._path.name, ())]
        self._files = [self._path, *others]
        self._sessions = [self._session] + [
            open_session(file, providers=providers, threads=threads) for file in others
        ]
        self._adapters = {task.index: self._active(task) for task in self.tasks}

    def encode(
        self, texts: Sequence[str | tuple[str, str]], *, truncate: bool = False
    ) -> dict[str, list[list[int]]]:
        """Return the inputs of texts, or pairs of texts, by the folder's own tokenizer.

        Args:
            texts: A list with one for each row; two texts in a tuple are a pair, one row.
            truncate: Cut rows to the most tokens that the tokenizer states, else to the model's
                positions; without it, longer rows are refused.

        Raises:
            BackendMissingError: The package tokenizers is not installed.
            UsageError: The folder has no ``tokenizer.json``, a single text was passed, or a row
                is too long.
        """
        taken = {field.name for field in self._inputs}
        encoded = self._texts.encode(texts, truncate=truncate)
        return {name: rows for name, rows in encoded.items() if name in taken}

    def encode_images(self, images: Sequence[Any] | Array) -> Array:
        """Return the input of a graph of dense tasks: ``[B, 3, H, H]`` float32.

        Args:
            images: Arrays ``[h, w, 3]``, RGB from 0 to 255, of any sizes, or paths of files (which
                need Pillow); resized and normalised as in training, see ``runtime.images``.

        Raises:
            UsageError: The graph takes no images, or an image is none.
            BackendMissingError: A path was given and Pillow is not installed.
        """
        return self._images.encode(images)

    @overload
    def run(
        self,
        inputs: Array,
        tasks: None = None,
        *,
        max_batch: int | None = None,
    ) -> dict[str, Array]: ...

    @overload
    def run(
        self,
        inputs: Mapping[str, Any],
        tasks: TaskLike | Sequence[TaskLike] | Array | None = None,
        *,
        max_batch: int | None = None,
    ) -> TaskOutputs: ...

    def run(
        self,
        inputs: Mapping[str, Any] | Array,
        tasks: TaskLike | Sequence[TaskLike] | Array | None = None,
        *,
        max_batch: int | None = None,
    ) -> TaskOutputs | dict[str, Array]:
        """Return the answers to a batch whose rows may be of any tasks and lengths.

        Given the images of a graph of dense tasks, ``[B, 3, H, H]``, every task answers every
        image: a dictionary of maps by task.

        Args:
            inputs: By name, an array or a sequence of rows; rows of tokens may differ in length,
                images may not. A missing attention mask is ones, missing token types are zeros.
                A row whose mask is all zeros is computed like any other, and its answer is that
                of no text.
            tasks: A name or id for each row, or one for all; None where there is one task only.
            max_batch: Split into batches of at most so many rows.

        Raises:
            TaskNotFoundError: A name or id is unknown.
            UsageError: The inputs do not fit the graph, there are not as many tasks as rows, or
                ``max_batch`` is no whole number of at least 1.
            EngineRunError: The graph failed, on an id beyond the vocabulary too, or a row's
                logits are NaN, which is no answer.
        """
        if self._images.size or isinstance(inputs, np.ndarray):
            return self._images.run(inputs, max_batch)
        rows = self._rows(inputs, self._texts.pad_token_id)
        served = self._served(tasks, rows.count)
        parts: dict[str, list[tuple[Sequence[int], Array]]] = {}
        answers: dict[int, Answer] = {}
        for chosen in self._batches(served, max_batch):
            values = self._run_batch(rows, chosen, served)
            for name, value in values.items():
                parts.setdefault(name, []).append((chosen, value))
            for position, row in enumerate(chosen):
                own = {name: value[position] for name, value in values.items()}
                answers[row] = self._answer(served[row], rows.sizes[row], row, own)
        outputs = {name: joined(found) for name, found in parts.items()}
        return TaskOutputs(outputs, tuple(answers[row] for row in range(rows.count)))

    def generate(
        self,
        inputs: Mapping[str, Any] | Sequence[Sequence[int]],
        tasks: TaskLike | Sequence[TaskLike] | Array | None = None,
        *,
        max_new_tokens: int,
        max_batch: int | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each row, the one that ended it included.

        Decoding is greedy, by the settings in the folder's ``generation_config.json``: the
        tokens of transformers' ``generate(do_sample=False, num_beams=1)``. Beams that the
        settings ask for are not searched.

        Args:
            inputs: The prompts' token ids, or inputs by name as for ``run``.
            tasks: As for ``run``.
            max_new_tokens: A row ends here at the latest.
            max_batch: Split into batches of at most so many rows.

        Raises:
            UsageError: The folder holds no language model, the inputs do not fit it, a prompt is
                masked as a whole or too long, a number is none of at least 1, or its settings ask
                for what is not done here.
            TaskNotFoundError: A name or id is unknown.
            EngineRunError: The graph failed, or a row's logits are NaN.
        """
        if len(self._files) == 1:
            raise UsageError(
                f"{self._path}: it does not generate",
                expected=(
                    "a folder with prefill.onnx and decode.onnx, or with encoder.onnx, because "
                    "tokens come from the graphs of a language model"
                ),
                fix="Use run",
            )
        from mtl_export.runtime.seq2seq_generation import generated
        from mtl_export.runtime.token_rules import TokenRules

        rules = TokenRules.from_folder(self._path.parent)
        by_name = inputs if isinstance(inputs, Mapping) else {INPUT_IDS: inputs}
        rows = self._rows(by_name, rules.pad)
        served = self._served(tasks, rows.count)
        found: dict[int, list[int]] = {}
        for chosen in self._batches(served, max_batch):
            ids = np.array([served[row].index for row in chosen], np.int64)
            # Without an input for tasks all rows of a batch are of one.
            parts = self._parts(served[chosen[0]])
            batch = rows.batch(chosen)
            tokens = generated(
                parts, batch, None if self._task_input is None else ids, rules,
                max_new_tokens=max_new_tokens, limit=self._texts.most_tokens,
            )  # fmt: skip
            found.update(zip(chosen, (_ended(row, rules.eos) for row in tokens), strict=True))
        return [found[row] for row in range(rows.count)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of rows of tokens, special tokens left out."""
        return self._texts.decode(tokens)

    def task(self, name_or_id: TaskLike) -> Task:
        """Return the task of that name or id.

        Raises:
            TaskNotFoundError: There is none; the message names those there are.
        """
        wanted = name_or_id if isinstance(name_or_id, str) else whole_number(name_or_id)
        for task in self.tasks:
            if wanted in (task.name, task.index):
                return task
        served = shortened((f"{task.name} ({task.index})" for task in self.tasks), 12)
        raise TaskNotFoundError(
            f"task {name_or_id!r}: {self._path} does not serve it",
            expected=f"one of {served}",
            fix="Pass one of these names or ids",
        )

    def _rows(self, inputs: Mapping[str, Any], pad_token_id: int) -> RowBatch:
        # A language model's graphs count positions from the mask.
        is_counted = self._path.name == PREFILL_FILE
        return rows_from(
            inputs,
            self._inputs,
            pad_token_id=pad_token_id,
            where=str(self._path),
            longest=self._texts.most_tokens,
            placed_by=ATTENTION_MASK if is_counted else self._texts.placed_by,
        )

    def _served(
        self, tasks: TaskLike | Sequence[TaskLike] | Array | None, count: int
    ) -> tuple[Task, ...]:
        if tasks is None and len(self.tasks) == 1:
            return self.tasks * count
        one: Any = tasks
        if getattr(tasks, "ndim", None) == 0:
            one = one.item()  # of numpy or torch
        entries = [] if one is None else listed(one)
        if entries is None and (isinstance(one, str) or not hasattr(one, "__iter__")):
            return (self.task(one),) * count
        named = tuple(self.task(task) for task in entries or ())
        if entries is None or len(named) != count:
            given = type(one).__name__ if entries is None else str(len(named))
            raise UsageError(
                f"tasks: {given} for {count} rows of {shortened(task.name for task in self.tasks)}",
                expected="a task for each row, in order, or one for all",
                fix="Pass as many tasks as rows",
            )
        return named

    def _batches(self, served: Sequence[Task], max_batch: int | None) -> Iterator[Sequence[int]]:
        """Yield the row numbers of each batch; mixed only where each row has its own task."""
        is_mixed = self._task_input is not None and self._task_input.is_batched
        most = None if max_batch is None else count_of("max_batch", max_batch)
        groups: dict[int, list[int]] = {}
        for row, task in enumerate(served):
            groups.setdefault(-1 if is_mixed else task.index, []).append(row)
        for rows in groups.values():
            size = most or len(rows)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _run_batch(
        self, rows: RowBatch, chosen: Sequence[int], served: Sequence[Task]
    ) -> dict[str, Array]:
        inputs = rows.batch(chosen)
        if self._task_input is not None:
            ids = np.array([served[row].index for row in chosen], np.int64)
            is_mixed = self._task_input.is_batched
            inputs[TASK_IDS] = ids if is_mixed else ids[:1].reshape(self._task_input.dims)
        names = [field.name for field in self._outputs]
        active = self._adapters[served[chosen[0]].index]
        options = active[0].options if active else None
        return run_session(self._session, self._path, inputs, names, options)

    def _active(self, task: Task) -> list[ActiveAdapter]:
        """Return the task's adapters, one for each graph; none where the graphs hold all tasks."""
        if self.layout != ADAPTER_INPUT:
            return []
        from mtl_export.runtime.onnx_adapters import active, adapter_file

        names = [(file, adapter_file(file.stem, task.name)) for file in self._files]
        return [active(file.with_name(name)) for file, name in names]

    def _parts(self, task: Task) -> list[OrtPart]:
        adapters = self._adapters[task.index]
        return [
            OrtPart(self._sessions[at], file, adapters[at] if adapters else None)
            for at, file in enumerate(self._files)
        ]

    def _answer(
        self, task: Task, sizes: Mapping[str, int], row: int, values: Mapping[str, Array]
    ) -> Answer:
        counted = {
            str(field.dims[1]): values[field.name]
            for field in self._outputs
            if field.name == ENCODER_ATTENTION_MASK
        }
        own = {
            field.name: own_part(values[field.name], field, sizes, counted)
            for field in self._outputs
            if task.output in {"", field.name}
        }
        return answer_of(task, own, row=row)


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return ``tokens`` up to the first that ends the row; padding follows it."""
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
