"""The candidates of ``measure``: graphs in ONNX Runtime, language models, engines, eager PyTorch.

Each is a record of paths and numbers that opens its model in the process it is sent to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.bench.measure import BatchShape, Opened, Timings
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import UsageError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS
from mtl_export.runtime.generation import Decoding, next_tokens
from mtl_export.runtime.onnx_adapters import active, adapter_file
from mtl_export.runtime.ort import OrtPart, load_onnxruntime, open_session, run_session
from mtl_export.runtime.rows import Field, fields_of
from mtl_export.runtime.runners.seq2seq import encoder_inputs
from mtl_export.runtime.seq2seq_generation import Seq2SeqDecoding, Seq2SeqParts
from mtl_export.runtime.token_rules import TokenRules
from mtl_export.tensorrt import TensorRTBackend, available_builder

# A batch is made, packed and received by another process.
BATCH_COPIES = 3
FORWARD, PREFILL, DECODE = "forward", "prefill", "decode"
# The graph that reads the inputs -> all that the model runs as.
GRAPHS = {
    "model": ("model",),
    PREFILL: (PREFILL, DECODE),
    "encoder": ("encoder", "decoder", "decoder_with_past"),
}


@dataclass(frozen=True)
class OnnxCandidate:
    """The graphs of one model in ONNX Runtime, on the CPU.

    A call of ``model.onnx`` is one run of its session. A call of ``prefill.onnx`` and
    ``decode.onnx`` is the prompts (phase ``prefill``) and then ``new_tokens`` greedy steps; one of
    an encoder-decoder likewise, and its encoder and the decoder's first token are its prompts.
    Outputs stay in the graph's dtype: what runners that compare add to a run is not timed.

    Attributes:
        name: As tables print it.
        folder: Holds the graphs.
        first: The one that reads the inputs: a key of ``GRAPHS``.
        threads: Threads inside one operator; 0: ONNX Runtime's choice.
        new_tokens: Decoding steps of one call.
        task: For graphs that take adapters as input: whose adapters; "" for all others.
    """

    name: str
    folder: Path
    first: str = "model"
    threads: int = 0
    new_tokens: int = 16
    task: str = ""

    def prepare(self) -> None:
        """Import onnxruntime."""
        load_onnxruntime()

    def open(self) -> Opened:
        """Open a session of every graph, under the adapters of ``task`` where one is named."""
        paths = [self.folder / f"{stem}.onnx" for stem in GRAPHS[self.first]]
        sessions = [open_session(path, threads=self.threads) for path in paths]
        files = [path.with_name(adapter_file(path.stem, self.task)) for path in paths]
        adapters = [active(file) if self.task else None for file in files]

        def call(inputs: Mapping[str, Array]) -> Timings:
            options = adapters[0].options if adapters[0] else None
            begun = perf_counter()
            run_session(sessions[0], paths[0], inputs, options=options)
            return {FORWARD: [perf_counter() - begun]}

        fields = fields_of(sessions[0].get_inputs())
        if self.first == "model":
            return Opened(call, fields)
        parts = list(map(OrtPart, sessions, paths, adapters))
        token = 0 if self.first == PREFILL else TokenRules.from_folder(self.folder).start or 0

        def generate(inputs: Mapping[str, Array]) -> Timings:
            return _timed_steps(lambda: _decoding(parts, inputs, token), self.new_tokens)

        return Opened(generate, fields)


def _decoding(
    parts: Sequence[OrtPart], inputs: Mapping[str, Array], token: int
) -> Decoding | Seq2SeqDecoding:
    """Return what decodes with two graphs, or with three whose decoder begins with ``token``."""
    ids, task_ids = inputs[INPUT_IDS], inputs.get(TASK_IDS)
    if len(parts) == len(GRAPHS[PREFILL]):
        prefill, decode = parts
        return Decoding(prefill, decode, ids, inputs[ATTENTION_MASK], task_ids)
    first = np.full((len(ids), 1), token, np.int64)
    return Seq2SeqDecoding(Seq2SeqParts(*parts), encoder_inputs(inputs), task_ids, first)


def _timed_steps(start: Callable[[], Decoding | Seq2SeqDecoding], new_tokens: int) -> Timings:
    """Return the seconds that the prompts take, and each of the steps after them."""
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
class EngineCandidate:
    """A TensorRT engine on the GPU.

    A call is ``TensorRTBackend.infer``: copies to and from the GPU are timed.

    Attributes:
        name: As tables print it.
        path: The engine; its manifest is in the same folder.
    """

    name: str
    path: Path

    def prepare(self) -> None:
        """Import TensorRT, and torch, which holds the device memory."""
        import torch  # noqa: F401

        available_builder()

    def open(self) -> Opened:
        """Load the engine onto the GPU."""
        backend = TensorRTBackend(self.path).__enter__()

        def call(inputs: Mapping[str, Array]) -> Timings:
            begun = perf_counter()
            backend.infer(inputs)
            return {FORWARD: [perf_counter() - begun]}

        inputs = backend.manifest.inputs
        fields = tuple(Field(value.name, tuple(value.shape), value.dtype) for value in inputs)
        return Opened(call, fields)


@dataclass(frozen=True)
class EagerCandidate:
    """The unmerged model in PyTorch, float32: every layer as its paper writes it.

    A call is one forward pass over a batch of mixed tasks; where tasks have a model each, one for
    each task. Language models run the prompts and ``new_tokens`` steps with transformers' cache.

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

        checkpoint = open_checkpoint(self.checkpoint, **self.given)
        base = open_base(self.base)
        # Timing is the same on any base of these shapes; the command has checked the hash.
        bound = bind(checkpoint, read_adapters(checkpoint, base), base, check_hash=False)
        if member_models(bound):
            # One model per task: the runner splits the batch.
            run = OracleRunner(bound, "fp32").__enter__().infer
            return Opened(partial(_forward, run), None)
        model = oracle_model(bound, torch.float32)
        if self.new_tokens:
            return Opened(partial(_generated, model, new_tokens=self.new_tokens), None)
        return Opened(partial(_forward, lambda inputs: model(**_tensors(inputs))), None)


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


def _refuse_larger(where: str, size_bytes: int) -> None:
    """Refuse a batch of ``size_bytes`` that this machine cannot hold.

    A system that grants more memory than it has ends processes later, and not always ours.

    Raises:
        UsageError: It takes more than the machine's memory.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if BATCH_COPIES * size_bytes > memory:
        raise UsageError(
            f"{where}: its inputs take {size_bytes / 1e9:.1f} GB",
            expected=f"at most {memory / 1e9:.1f} GB, held {BATCH_COPIES} times",
            fix="Measure a smaller shape",
        )


@dataclass(frozen=True)
class Batches:
    """Makes seeded batches: rows of full length, tasks in turn.

    Attributes:
        vocabulary: Token ids lie below.
        task_ids: The tasks that rows take in turn.
    """

    vocabulary: int
    task_ids: tuple[int, ...]

    def __call__(self, shape: BatchShape, fields: Sequence[Field]) -> dict[str, Array]:
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
        _refuse_larger(f"shape {shape}", sum(counts))
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
