"""The unmerged model in PyTorch, for ``bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from mtl_export.bench.measure import Opened, Timings
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import IMAGE


@dataclass(frozen=True)
class DenseEagerCandidate:
    """A Swin with task streams as trained, float32; a call answers every task of a batch.

    Attributes:
        name: As tables print it.
        checkpoint: The trained file.
        image_size: Side of the images.
        train_config: YAML of the training run, where the file has no configuration in it.
        task_names: In id order, where the configuration lists none.
        threads: PyTorch's threads; 0: its own choice.
    """

    name: str
    checkpoint: Path
    image_size: int
    train_config: Path | None = None
    task_names: Sequence[str] | None = None
    threads: int = 0

    def prepare(self) -> None:
        """Import torch."""
        from mtl_export.runtime.runners.pytorch import use_threads

        use_threads(self.threads)

    def open(self) -> Opened:
        """Load the model."""
        import torch

        from mtl_export.checkpoint.formats.mtlora_swin import read_mtlora
        from mtl_export.dense.model import open_dense

        read = read_mtlora(self.checkpoint, self.task_names, train_config=self.train_config)
        model = open_dense(read).at(self.image_size).trained()

        def call(inputs: Mapping[str, Array]) -> Timings:
            begun = perf_counter()
            with torch.inference_mode():
                model(torch.from_numpy(inputs[IMAGE]))
            return {"forward": [perf_counter() - begun]}

        return Opened(call, None)
