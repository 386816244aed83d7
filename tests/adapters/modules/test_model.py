from __future__ import annotations

import pytest
import torch
from torch import nn

from mtl_export.adapters.modules.model import MultiTaskModel, TaskHeads, linear_named
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.errors import BaseModelError


def heads(*widths: int) -> list[nn.Linear]:
    """Return seeded heads of these widths on 5 features."""
    torch.manual_seed(0)
    return [nn.Linear(5, width) for width in widths]


@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 5)])
def test_each_row_gets_its_own_head(shape: tuple[int, ...]) -> None:
    """Row b is answered by head task_ids[b]; labels a task lacks are -inf."""
    routing, own = TaskRouting(), heads(2, 4, 1)
    routing.set(torch.tensor([2, 0, 1, 0]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = TaskHeads(own, routing)(x)
        assert logits.shape == (*shape[:-1], 4)
        for row, task in enumerate([2, 0, 1, 0]):
            width = own[task].out_features
            torch.testing.assert_close(logits[row, ..., :width], own[task](x[row]))
            assert torch.isneginf(logits[row, ..., width:]).all()


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.classifier = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.classifier(self.norm(self.dense(x)))
        return result


def adapted(base: nn.Linear, routing: TaskRouting) -> MTLLoRALinear:
    """Return ``base`` adapted for two tasks."""
    return MTLLoRALinear(
        base, routing, tasks=2, rank=3, up_projections=2, alpha=3.0, temperature=0.5, up_std=0.5
    )


def test_a_model_is_adapted_in_place_and_only_adapters_and_heads_train() -> None:
    """Named layers become adapters and heads; everything else is frozen."""
    model = MultiTaskModel(
        _Encoder(), adapters={"dense": adapted}, heads={"classifier": heads(2, 3)}
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"model.dense.{role}" for role in ("down", "lambdas", "up", "mixing")),
        *(f"model.classifier.heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    }
    x = torch.ones(2, 5)
    with torch.inference_mode():
        mixed = model(x=x, task_ids=torch.tensor([0, 1]))
        alone = model(x=x[:1], task_ids=torch.tensor([1]))
    torch.testing.assert_close(mixed[1:], alone)
    assert torch.isneginf(mixed[0, 2])


def test_only_linear_layers_are_adapted() -> None:
    """A layer of another kind is refused with its type; a missing one by name."""
    with pytest.raises(BaseModelError, match="norm: a LayerNorm"):
        linear_named(_Encoder(), "norm")
    with pytest.raises(BaseModelError, match="nowhere"):
        linear_named(_Encoder(), "nowhere")
