"""A model as the graphs it runs as: one for most, several for models that generate.

    encoders, classifiers, vision      model

Every part is traced once and serves all tasks and layouts.
"""

from __future__ import annotations

from mtl_export.adapters.binding import BoundModel
from mtl_export.graph.trace import TracedModel, trace


def trace_parts(bound: BoundModel) -> tuple[TracedModel, ...]:
    """Return the graphs that ``bound`` runs as, each with its own ``stem``.

    Raises:
        GraphError: The exporter cannot trace the model, or a marker got lost.
        BaseModelError: The heads do not fit the model's features.
    """
    return (trace(bound),)
