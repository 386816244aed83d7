"""Where an artefact's error comes from: records, and their JSON.

One ``Localisation`` for each artefact that failed; in it one ``LayerError`` for each layer and
task that were looked at, and one ``Finding`` for each task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LayerVerdict = Literal["within", "propagated", "faulty"]


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer under one task.

    Attributes:
        layer: Its dotted name.
        task: Task name.
        case: The batch.
        error: Largest error of its output against the float64 oracle; None where it is not
            finite or of another shape.
        floor: The noise floor there: the oracle in the artefact's dtype.
        own_error: The same against what the oracle's layer makes of the artefact's own input: what
            the layer itself adds. None likewise.
        own_floor: Its floor.
        verdict: ``within`` its floor, ``propagated`` from what it is given, or ``faulty``:
            the layer itself is wrong.
        cause: The one known fault that explains its output; empty where none or several do.
        detail: What else is known of the error: which outputs, which rows.
    """

    layer: str
    task: str
    case: str
    error: float | None
    floor: float
    own_error: float | None
    own_floor: float
    verdict: LayerVerdict
    cause: str = ""
    detail: str = ""

    @property
    def ratio(self) -> float:
        """Return the error in floors; Inf where it has no number."""
        return math.inf if self.error is None else _ratio(self.error, self.floor)

    @property
    def own_ratio(self) -> float:
        """Return the layer's own error in floors; Inf where it has no number."""
        return math.inf if self.own_error is None else _ratio(self.own_error, self.own_floor)


@dataclass(frozen=True, slots=True)
class Finding:
    """Where the error of one task begins.

    Attributes:
        task: Task name.
        case: The batch.
        layer: The first wrong layer, or the first that is given something wrong; empty where
            nothing looked at is wrong.
        after: Where the layer itself is right: the last right layer before it ("" for none).
        cause: As of the layer's ``LayerError``.
        text: All of it in one clause.
    """

    task: str
    case: str
    layer: str
    after: str
    cause: str
    text: str


@dataclass(frozen=True, slots=True)
class Bisection:
    """Which layers of a half-precision graph must compute in float32.

    Attributes:
        case: The batch.
        error: Largest error as a share of what is allowed there; None where it is not finite.
        error_wide: The same with every layer in float32.
        layers: The smallest set found with which nothing is beyond what is allowed; empty where
            even all are not enough.
        runs: How many graphs were tried.
        text: What came of it, in words.
    """

    case: str
    error: float | None
    error_wide: float | None
    layers: tuple[str, ...]
    runs: int
    text: str


@dataclass(frozen=True)
class Localisation:
    """What was found about one artefact.

    Attributes:
        artefact: Its name, as in the cells.
        task: Its task, as in the cells; "*" where it serves all.
        findings: One for each task that was looked at.
        layers: In the order they run, task by task in each.
        reason: Why nothing could be looked at; empty when it was.
        unseen: Layers that tasks change and that it shows under no name.
        bisection: Of the precision; None where it was not asked for.
        maps: Of tasks whose outputs are maps, 8 x 8 parts of the map, the largest error in each,
            in noise floors; empty of others.
    """

    artefact: str
    task: str
    findings: tuple[Finding, ...] = ()
    layers: tuple[LayerError, ...] = ()
    reason: str = ""
    unseen: tuple[str, ...] = ()
    bisection: Bisection | None = None
    maps: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def finding(self, task: str) -> Finding | None:
        """Return what was found for a task; "*" is given the first that was found."""
        wrong = [one for one in self.findings if one.layer]
        own = [one for one in self.findings if one.task == task]
        chosen = wrong if task == "*" else own
        return chosen[0] if chosen else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "artefact": self.artefact,
            "task": self.task,
            "reason": self.reason,
            "unseen": list(self.unseen),
            "findings": [asdict(one) for one in self.findings],
            "layers": [asdict(one) for one in self.layers],
            "bisection": None if self.bisection is None else asdict(self.bisection),
            "maps": {task: [list(row) for row in rows] for task, rows in self.maps.items()},
        }


def _ratio(error: float, floor: float) -> float:
    if floor > 0:
        return error / floor
    return math.inf if error > 0 else 0.0
