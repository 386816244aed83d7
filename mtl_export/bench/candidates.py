"""What ``measure`` measures: graphs in ONNX Runtime, language models, engines, eager PyTorch.

Each is a record of paths and numbers that opens its model in the process it is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mtl_export.bench.measure import Opened, Shape, Timings
from mtl_export.bench.memory import refuse_larger
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS
from mtl_export.runtime.rows import Field, fields_of

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.runtime.ort import OrtPart

FORWARD, PREFILL, DECODE = "forward", "prefill", "decode"


@dataclass(frozen=True)
class OnnxModel:
    """One ONNX file in ONNX Runtime, on the CPU.

    Attributes:
        name: As tables print it.
        path: The file.
        threads: Threads inside one operator; 0: ONNX Runtime's choice.
        adapter: For graphs that take adapters as input: the ``.onnx_adapter`` file.
    """

    name: str
    path: Path
    threads: int = 0
    adapter: Path | None = None

    def prepare(self) -> None:
        """Import onnxruntime."""
        from mtl_export.runtime.ort import load_onnxruntime

        load_onnxruntime()

    def open(self) -> Opened:
        """Open a session."""
        from mtl_export.runtime.onnx_adapters import active
        from mtl_export.runtime.ort import open_session, run_session

        session = open_session(self.path, threads=self.threads)
        adapter = active(self.adapter) if self.adapter else None

        def call(inputs: Mapping[str, Array]) -> Timings:
            options = adapter.options if adapter else None
            begun = perf_counter()
            run_session(session, self.path, inputs, options=options)
            return {FORWARD: [perf_counter() - begun]}

        return Opened(call, fields_of(session.get_inputs()))


@dataclass(frozen=True)
class OnnxLanguageModel:
    """A causal language model as ``prefill.onnx`` and ``decode.onnx``, on the CPU.

    Attributes:
        name: As tables print it.
        folder: Holds both.
        threads: Threads inside one operator; 0: ONNX Runtime's choice.
        new_tokens: Decoding steps of one call.
        task: For graphs that take adapters as input: whose adapters; "" for all others.
    """

    name: str
    folder: Path
    threads: int = 0
    new_tokens: int = 16
    task: str = ""

    def prepare(self) -> None:
        """Import onnxruntime."""
        from mtl_export.runtime.ort import load_onnxruntime

        load_onnxruntime()

    def open(self) -> Opened:
        """Open both sessions."""
        from mtl_export.runtime.generation import Decoding
        from mtl_export.runtime.ort import open_session

        paths = [self.folder / f"{stem}.onnx" for stem in (PREFILL, DECODE)]
        sessions = [open_session(path, threads=self.threads) for path in paths]
        prefill, decode = _parts(sessions, paths, self.task)

        def call(inputs: Mapping[str, Array]) -> Timings:
            ids, mask, tasks = inputs[INPUT_IDS], inputs[ATTENTION_MASK], inputs.get(TASK_IDS)
            return _timed_steps(
                lambda: Decoding(prefill, decode, ids, mask, tasks), self.new_tokens
            )

        return Opened(call, fields_of(sessions[0].get_inputs()))


@dataclass(frozen=True)
class OnnxSeq2Seq:
    """An encoder-decoder as its three graphs, on the CPU; its encoder counts as ``prefill``.

    Attributes:
        name: As tables print it.
        folder: Holds them.
        threads: Threads inside one operator; 0: ONNX Runtime's choice.
        new_tokens: Decoding steps of one call.
        task: For graphs that take adapters as input: whose adapters; "" for all others.
    """

    name: str
    folder: Path
    threads: int = 0
    new_tokens: int = 16
    task: str = ""

    def prepare(self) -> None:
        """Import onnxruntime."""
        from mtl_export.runtime.ort import load_onnxruntime

        load_onnxruntime()

    def open(self) -> Opened:
        """Open the three sessions."""
        from mtl_export.runtime.ort import open_session
        from mtl_export.runtime.seq2seq_generation import Seq2SeqDecoding, Seq2SeqParts
        from mtl_export.runtime.token_rules import TokenRules

        stems = ("encoder", "decoder", "decoder_with_past")
        paths = [self.folder / f"{stem}.onnx" for stem in stems]
        sessions = [open_session(path, threads=self.threads) for path in paths]
        parts = Seq2SeqParts(*_parts(sessions, paths, self.task))
        start = TokenRules.from_folder(self.folder).start or 0

        def call(inputs: Mapping[str, Array]) -> Timings:
            own = {name: value for name, value in inputs.items() if name != TASK_IDS}
            first = np.full((len(inputs[INPUT_IDS]), 1), start, np.int64)
            tasks = inputs.get(TASK_IDS)
            return _timed_steps(lambda: Seq2SeqDecoding(parts, own, tasks, first), self.new_tokens)

        return Opened(call, fields_of(sessions[0].get_inputs()))


def _parts(sessions: Sequence[Any], paths: Sequence[Path], task: str) -> list[OrtPart]:
    """Return the graphs ready to run, under the adapters of ``task`` where one is named."""
    from mtl_export.runtime.onnx_adapters import active, adapter_file
    from mtl_export.runtime.ort import OrtPart

    files = [path.with_name(adapter_file(path.stem, task)) for path in paths]
    adapters = [active(file) if task else None for file in files]
    return list(map(OrtPart, sessions, paths, adapters))


class _Decoding(Protocol):
    """What decodes step by step; ``logits`` end with those of the last token, ``[..., L]``."""

    logits: Array

    def feed(self, tokens: Array) -> None:
        """Go on by one token a row."""


def _timed_steps(start: Callable[[], _Decoding], new_tokens: int) -> Timings:
    """Return the seconds that the prompts take, and each of the steps after them."""
    from mtl_export.runtime.generation import next_tokens

    begun = perf_counter()
    decoding = start()
    times: Timings = {PREFILL: [perf_counter() - begun], DECODE: []}
    for _ in range(new_tokens):
        begun = perf_counter()
        logits = decoding.logits
        decoding.feed(next_tokens(logits if logits.ndim == 2 else logits[:, -1]))
        times[DECODE].append(perf_counter() - begun)
    return times


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine on the GPU.

    Attributes:
        name: As tables print it.
        path: The engine; its manifest lies beside it.
    """

    name: str
    path: Path

    def prepare(self) -> None:
        """Import TensorRT, and torch, which holds the device memory."""
        import torch  # noqa: F401

        from mtl_export.tensorrt import available_builder

        available_builder()

    def open(self) -> Opened:
        """Load the engine onto the GPU."""
        from mtl_export.tensorrt import TensorRTBackend

        backend = TensorRTBackend(self.path).__enter__()

        def call(inputs: Mapping[str, Array]) -> Timings:
            begun = perf_counter()
            backend.infer(inputs)
            return {FORWARD: [perf_counter() - begun]}

        inputs = backend.manifest.inputs
        fields = tuple(Field(value.name, tuple(value.shape), value.dtype) for value in inputs)
        return Opened(call, fields)


@dataclass(frozen=True)
class EagerModel:
    """The unmerged model in PyTorch, float32: every layer as its paper writes it.

    Attributes:
        name: As tables print it.
        checkpoint: The trained adapter.
        base: The reference of its base.
        given: What the checkpoint does not carry, as ``open_checkpoint`` takes it.
        threads: PyTorch's threads; 0: its own choice.
        new_tokens: Decoding steps of one call of a language model; 0 for any other model.
    """

    name: str
    checkpoint: Path
    base: str
    given: Mapping[str, Any]
    threads: int = 0
    new_tokens: int = 0

    def prepare(self) -> None:
        """Import torch and transformers."""
        import transformers  # noqa: F401

        from mtl_export.runtime.runners.pytorch import use_threads

        use_threads(self.threads)

    def open(self) -> Opened:
        """Load the base and adapt it."""
        import torch

        from mtl_export.runtime.runners.pytorch import OracleRunner, member_models, oracle_model

        bound = self._bound()
        call: Any
        if member_models(bound):
            # One model per task: the runner splits the batch.
            call = partial(_forward, OracleRunner(bound, "fp32").__enter__().infer)
        elif self.new_tokens:
            model = oracle_model(bound, torch.float32)
            call = partial(_generated, model, new_tokens=self.new_tokens)
        else:
            model = oracle_model(bound, torch.float32)
            call = partial(_forward, lambda inputs: model(**_tensors(inputs)))
        return Opened(call, None)

    def _bound(self) -> BoundModel:
        from mtl_export.adapters.binding import bind
        from mtl_export.adapters.family import read_adapters
        from mtl_export.checkpoint.base_model import open_base
        from mtl_export.checkpoint.reader import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, **self.given)
        base = open_base(self.base)
        # Timing is the same on any base of these shapes; the command has checked the hash.
        return bind(checkpoint, read_adapters(checkpoint, base), base, check_hash=False)


def _tensors(inputs: Mapping[str, Array]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _forward(run: Any, inputs: Mapping[str, Array]) -> Timings:
    import torch

    begun = perf_counter()
    with torch.inference_mode():
        run(inputs)
    return {FORWARD: [perf_counter() - begun]}


def _generated(model: Any, inputs: Mapping[str, Array], *, new_tokens: int) -> Timings:
    """Run the prompt and ``new_tokens`` greedy steps with transformers' own cache."""
    import torch

    times: Timings = {PREFILL: [], DECODE: []}
    tensors = _tensors(inputs)
    config = model.model.config
    is_seq2seq = bool(config.is_encoder_decoder)
    mask = tensors[ATTENTION_MASK]
    kept = {TASK_IDS: tensors[TASK_IDS], "use_cache": True}
    first = {}
    if is_seq2seq:
        start = config.decoder_start_token_id or 0
        first = {"decoder_input_ids": torch.full((len(mask), 1), start)}
    with torch.inference_mode():
        begun = perf_counter()
        out = model(**tensors, **first, use_cache=True)
        times[PREFILL].append(perf_counter() - begun)
        if is_seq2seq:
            kept["encoder_outputs"] = (out.encoder_last_hidden_state,)
        for _ in range(new_tokens):
            begun = perf_counter()
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            mask = mask if is_seq2seq else torch.cat([mask, torch.ones_like(tokens)], dim=1)
            step = {"decoder_input_ids" if is_seq2seq else INPUT_IDS: tokens, ATTENTION_MASK: mask}
            out = model(**step, **kept, past_key_values=out.past_key_values)
            times[DECODE].append(perf_counter() - begun)
    return times


@dataclass(frozen=True)
class Batches:
    """Makes seeded batches: rows of full length, tasks in turn.

    Attributes:
        vocabulary: Token ids lie below.
        task_ids: The tasks that rows take in turn.
    """

    vocabulary: int
    task_ids: tuple[int, ...]

    def __call__(self, shape: Shape, fields: Sequence[Field]) -> dict[str, Array]:
        """Return a batch of ``shape`` for a graph with the inputs ``fields``.

        Raises:
            UsageError: It is larger than this machine's memory.
        """
        sizes = {
            field.name: [
                dim if isinstance(dim, int) else shape.sequence if at else shape.batch
                for at, dim in enumerate(field.dims)
            ]
            for field in fields
        }
        counts = (prod(sizes[field.name]) * np.dtype(field.dtype).itemsize for field in fields)
        refuse_larger(f"shape {shape}", sum(counts))
        generator = np.random.default_rng(0)
        return {field.name: self._values(field, sizes[field.name], generator) for field in fields}

    def _values(self, field: Field, sizes: list[int], generator: np.random.Generator) -> Array:
        if field.name == TASK_IDS:
            count = sizes[0] if sizes else 1
            ids = np.resize(np.array(self.task_ids, field.dtype), count)
            return ids if sizes else ids[0].reshape(())
        if field.name == INPUT_IDS:
            return generator.integers(0, self.vocabulary, sizes).astype(field.dtype)
        if np.dtype(field.dtype).kind == "f":
            return generator.normal(size=sizes).astype(field.dtype)
        return np.full(sizes, field.name == ATTENTION_MASK, field.dtype)
