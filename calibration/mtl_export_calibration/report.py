"""What calibrating one graph found, as JSON that lies beside the quantised graph.

    {"schema": "mtl-export.quantisation/1", "graph", "format", "method", "engine", "combine",
     "data", "gate", "half", "excluded", "deltas_apart", "notes", "layers", "activations", "tasks"}

A task pays where ``inflation`` is above 1 (its steps are that much coarser than they need
be) or below (its values are cut), and where ``cut`` is large: the share of its values, on
the rows that accuracy is counted on, beyond the range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from mtl_export.api.written import Written
from mtl_export.checkpoint.files.json_file import Shape
from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.evaluate import TaskScore
from mtl_export_calibration.ranges import CUT_FACTOR, Cut

SCHEMA = "mtl-export.quantisation/1"
FILE = "calibration.json"

_BY_NAME: Shape = {str: {str: Real}}
# ``GraphRanges.as_dict`` as JSON.
MEASURED: Shape = {
    "amax": {str: Real},
    "own": _BY_NAME,
    "sqnr_db": _BY_NAME,
    "cut": {str: {"activation": str, "share": Real, "usual": Real, "values": Real}},
    "swallowed": _BY_NAME,
}


@dataclass(frozen=True)
class GraphRanges:
    """What one graph's data say, before anything is quantised.

    Attributes:
        amax: Range of every activation, by its name.
        own: What each task alone would get, by task, then by activation.
        sqnr_db: What quantising each layer alone costs, by layer, then by task.
        cut: Where most of a task's values lie beyond a range, on the rows that accuracy is
            counted on, by task.
        swallowed: Share of rows whose step exceeds a task's change, by layer, then by task.
        rows: Some rows of every activation, by its name, that int4 weights are rounded for.
    """

    amax: Mapping[str, float]
    own: Mapping[str, Mapping[str, float]]
    sqnr_db: Mapping[str, Mapping[str, float]]
    cut: Mapping[str, Cut]
    swallowed: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, Array] = field(default_factory=dict, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON's types, without the rows."""
        return {
            "amax": dict(self.amax),
            "own": {task: dict(by_name) for task, by_name in self.own.items()},
            "sqnr_db": {layer: dict(by_task) for layer, by_task in self.sqnr_db.items()},
            "cut": {task: asdict(cut) for task, cut in self.cut.items()},
            "swallowed": {layer: dict(by_task) for layer, by_task in self.swallowed.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], rows: Mapping[str, Array]) -> GraphRanges:
        """Return the record that ``as_dict`` made, with the rows."""
        cut = {
            task: Cut(one["activation"], one["share"], one["usual"], one["values"])
            for task, one in value["cut"].items()
        }
        return cls(value["amax"], value["own"], value["sqnr_db"], cut, value["swallowed"], rows)

    def inflation(self, task: str) -> tuple[float, str]:
        """Return the range that costs ``task`` most: how much wider than its own, and whose.

        Narrower by some factor counts as much as wider by the same.
        """
        factors = {
            name: self.amax[name] / own
            for name, own in self.own.get(task, {}).items()
            if own > 0.0 and self.amax.get(name, 0.0) > 0.0
        }
        if not factors:
            return 1.0, ""
        name = max(factors, key=lambda one: max(factors[one], 1.0 / factors[one]))
        return factors[name], name

    def worst_layer(self, task: str) -> tuple[float, str]:
        """Return the smallest SQNR that ``task`` has in a layer, and the layer."""
        own = {name: by_task[task] for name, by_task in self.sqnr_db.items() if task in by_task}
        name = min(own, key=lambda one: own[one], default="")
        return (own[name], name) if name else (0.0, "")


@dataclass(frozen=True)
class GraphReport:
    """The verdict on one quantised graph.

    Attributes:
        graph: ``single graph``, or the task of a merged graph.
        number: Name of the format.
        method: The calibrator.
        engine: Whose.
        combine: How tasks' ranges became one.
        measured: What the data say.
        scores: What quantising costs each task.
        excluded: Layers left unquantised, by name.
        apart: Layers whose delta is added in high precision.
        notes: Layers that cannot be quantised, and why.
        max_drop: Points the worst task may lose.
        trials: How many sets of excluded layers were tried.
        data: Hashes and counts of the rows used.
        max_cut: Times as often as is usual that a task's values may lie beyond a range.
        half: What half precision costs each task, in its place; empty where the graph has none.
        latency_ms: Of the float, the half-precision and the quantised graph, by format; empty
            where it failed.
        latency_length: Tokens of the rows that were timed.
    """

    graph: str
    number: str
    method: str
    engine: str
    combine: str
    measured: GraphRanges
    scores: tuple[TaskScore, ...]
    excluded: tuple[str, ...]
    apart: tuple[str, ...]
    notes: tuple[str, ...]
    max_drop: float
    trials: int
    data: Mapping[str, Any]
    max_cut: float = CUT_FACTOR
    half: tuple[TaskScore, ...] = ()
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    latency_length: int = 0

    @property
    def worst_drop(self) -> float:
        """Return the points that the worst task loses."""
        return max((score.drop for score in self.scores), default=0.0)

    @property
    def passed(self) -> bool:
        """Return whether no task loses more than it may, and none is cut."""
        return not any(self.failure(score) for score in self.scores)

    def failure(self, score: TaskScore) -> str:
        """Return why a task does not pass; empty if it does."""
        cut = self.cut(score.task)
        if not score.drop <= self.max_drop:  # nor does NaN pass
            return f"it loses {score.drop:.2f} points; allowed is {self.max_drop:g}"
        if cut.passes(self.max_cut):
            return ""
        return (
            f"{_percent(cut.share)} of its values in {cut.activation} lie beyond the range;"
            f" allowed is {_percent(cut.allowed(self.max_cut))}: the rows that ranges were taken"
            f" from are not like this task's"
        )

    def cut(self, task: str) -> Cut:
        """Return where a task's values are cut most."""
        return self.measured.cut.get(task, Cut())

    def as_dict(self) -> dict[str, Any]:
        """Return the report without latencies, which no two runs share."""
        measured = self.measured
        return {
            "schema": SCHEMA,
            "graph": self.graph,
            "format": self.number,
            "method": self.method,
            "engine": self.engine,
            "combine": self.combine,
            "data": dict(self.data),
            "gate": {
                "max_drop": self.max_drop,
                "max_cut": self.max_cut,
                "worst_drop": self.worst_drop,
                "passed": self.passed,
                "trials": self.trials,
            },
            "half": {score.task: score.as_dict() for score in self.half},
            "excluded": list(self.excluded),
            "deltas_apart": list(self.apart),
            "notes": list(self.notes),
            "layers": {
                name: {
                    "sqnr_db": dict(by_task),
                    "swallowed": dict(measured.swallowed.get(name, {})),
                }
                for name, by_task in measured.sqnr_db.items()
            },
            "activations": {
                name: {
                    "amax": amax,
                    "own": {task: own[name] for task, own in measured.own.items() if name in own},
                }
                for name, amax in measured.amax.items()
            },
            "tasks": {score.task: self._task(score) for score in self.scores},
        }

    def _task(self, score: TaskScore) -> dict[str, Any]:
        inflation, activation = self.measured.inflation(score.task)
        worst_db, layer = self.measured.worst_layer(score.task)
        cut = self.cut(score.task)
        return {
            **score.as_dict(),
            "passed": not self.failure(score),
            "inflation": {"factor": inflation, "activation": activation},
            "cut": {
                "share": cut.share,
                "allowed": cut.allowed(self.max_cut),
                "activation": cut.activation,
            },
            "worst_layer": {"sqnr_db": worst_db, "layer": layer},
        }


@dataclass(frozen=True)
class Outcome:
    """One graph.

    Attributes:
        report: The verdict.
        written: Its folder; None where it failed.
    """

    report: GraphReport
    written: Written | None

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        return {
            **self.report.as_dict(),
            "latency_ms": dict(self.report.latency_ms),
            "latency_length": self.report.latency_length,
            "output": self.written.as_dict() if self.written else None,
        }


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"
