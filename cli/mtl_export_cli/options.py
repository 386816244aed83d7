"""Every option that more than one command has, once, and the record they become.

A value is taken from the flag, else from the environment (``MTL_EXPORT_`` and the
option's long name), else from ``mtl-export.toml``, else from the default. Commands
receive ``Settings`` and never ask where a value came from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mtl_export.api.settings import TASK_INPUTS, Settings
from mtl_export.checkpoint.sentence_embedding import POOLINGS
from mtl_export.errors import UsageError
from mtl_export.graph import names as graph_names
from mtl_export.names import DTYPES, LAYOUTS
from mtl_export_cli.config import CONFIG_FILE, Config, read_config

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_CONFIG_KEY = "mtl_export_cli.config"
_TRAIN_CONFIG_KEY = "mtl_export_cli.train_config"


def _task_names(value: object) -> tuple[str, ...]:
    """Return ``a,b,c``, or a list from the configuration, as a tuple of names."""
    parts = value.split(",") if isinstance(value, str) else value
    names = tuple(str(part).strip() for part in parts) if isinstance(parts, Sequence) else ()
    if not names or not all(names):
        raise click.BadParameter(f"{value!r} has an empty name")
    return names


def option(*names: str, **attributes: Any) -> Decorator:
    """Return a click option with its environment variable, both shown in the help."""
    long = next(name for name in names if name.startswith("--")).partition("/")[0]
    variable = f"MTL_EXPORT_{long.removeprefix('--').replace('-', '_').upper()}"
    decorator: Decorator = click.option(*names, envvar=variable, show_envvar=True, **attributes)
    return decorator


class FiniteRange(click.FloatRange):
    """A number in a range. NaN, which compares with nothing, and infinity are refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


class TaskInputType(click.Choice[str]):
    """Of what ``task_ids`` are; ``ids``, the input's own name, is each row's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return one of the choices."""
        choice: str = super().convert("rows" if value == "ids" else value, param, ctx)
        return choice


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Read the configuration before any other option looks for its default.

    A YAML file is no settings file but the configuration of a training run.
    """
    is_yaml = value is not None and value.suffix in {".yaml", ".yml"}
    config = read_config(None if is_yaml else value)
    ctx.meta[_CONFIG_KEY] = config
    ctx.meta[_TRAIN_CONFIG_KEY] = value if is_yaml else None
    ctx.default_map = config.defaults(ctx.info_name or "")
    return value


SOURCE: tuple[Decorator, ...] = (
    option(
        "--checkpoint", "-c", type=click.Path(path_type=Path), metavar="PATH",
        help="The trained multi-task adapter: file or folder.",
    ),
    option(
        "--base", "-b", metavar="DIR_OR_HUB_ID",
        help="The base model: a folder, package:NAME/FOLDER, or a hub id.",
    ),
    option(
        "--tasks", type=_task_names, metavar="A,B,C",
        help="Task names in id order, where the checkpoint does not carry them.",
    ),
    option("--alpha", type=float, help="LoRA alpha, where the checkpoint does not carry it."),
    option(
        "--temperature", type=float,
        help="Softmax temperature, where the checkpoint does not carry it.",
    ),
    option(
        "--downsample/--no-downsample", default=None,
        help="Whether a VL-BART was trained with --downsample; its checkpoint does not carry it.",
    ),
    option(
        "--biases", type=click.Path(path_type=Path), metavar="FILE",
        help="Biases that the trainer added to bias-free layers and did not save with them:"
        " a dictionary MODULE.bias, by torch.save.",
    ),
    option(
        "--image-size", type=click.IntRange(1, 8192), metavar="PIXELS",
        help="Side of the images that an MTLoRA model is exported for; by default as trained.",
    ),
    option(
        "--config", type=click.Path(path_type=Path), metavar="FILE", is_eager=True,
        expose_value=False, callback=_load_config,
        help="Settings file; by default mtl-export.toml in the current folder. A .yaml: of the"
        " training run of an MTLoRA file that holds no configuration.",
    ),
)  # fmt: skip
SELECTION: tuple[Decorator, ...] = (
    option("--task", multiple=True, metavar="NAME", help="A task; may be repeated."),
    option("--all-tasks", is_flag=True, help="Every task of the checkpoint."),
)
MAX_DROP: Decorator = option(
    "--max-drop", type=FiniteRange(min=0.0), metavar="POINTS",
    help="Points the worst task may lose; by default 1, of calibrate --quantize fp8 0.5.",
)  # fmt: skip
LAYOUT_HELP = "single-graph (default with --all-tasks) or per-task (default with --task)."
REQUIRE_RUN_HELP = "Exit 6 unless all that should have been run was there and was run."
QUANTIZE_HELP = "What numbers the graphs are quantised to; int4: weights only."
# More than any machine has; a count that a runtime cannot hold would be its TypeError.
THREADS: Decorator = option(
    "--threads", type=click.IntRange(0, 65536), default=0, help="Threads; 0: all cores."
)
LAYOUT: Decorator = option("--layout", type=click.Choice(LAYOUTS), help=LAYOUT_HELP)
FORM: tuple[Decorator, ...] = (
    option(
        "--task-input", type=TaskInputType(TASK_INPUTS), default=TASK_INPUTS[0], show_default=True,
        help="Of the single graph: rows, task_ids [batch], each row's task; or scalar, task_ids"
        " [1], one task for the whole batch.",
    ),
    option(
        "--pooling", type=click.Choice(POOLINGS),
        help="Of a bare encoder: answer with one vector a row, sentence_embedding, the mean over"
        " its tokens or the first token's.",
    ),
    option("--normalize", is_flag=True, help="With --pooling: bring the vectors to length 1."),
    option(
        "--inline", is_flag=True,
        help="Of the single graph: expand its functions, for tools that know none.",
    ),
    option(
        "--opset", type=click.IntRange(graph_names.OLDEST_OPSET, graph_names.NEWEST_OPSET),
        default=graph_names.OPSET, show_default=True, help="What graphs are written in.",
    ),
)  # fmt: skip
OUTPUT: tuple[Decorator, ...] = (
    option(
        "--output", "-o", type=click.Path(path_type=Path), metavar="DIR",
        help="Write exactly here, not under the output folder of mtl-export.toml.",
    ),
    option("--dtype", type=click.Choice(DTYPES), help="Precision of the weights written."),
    option("--force", is_flag=True, help="Replace an old result that is different."),
)  # fmt: skip
TALK: tuple[Decorator, ...] = (
    option("--json", is_flag=True, help="Print the result as JSON."),
    option("-v", "--verbose", count=True, help="Say more."),
    option("-q", "--quiet", count=True, help="Plain lines, no bars; -qq: only errors."),
)


def with_settings(*groups: Sequence[Decorator]) -> Decorator:
    """Return a decorator that adds option groups and passes them on as ``Settings``.

    The command receives the record first; its own options stay keyword arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_record(**values: Any) -> Any:
            context = click.get_current_context()
            return function(_settings(context, values), **values)

        command: Callable[..., Any] = with_record
        for decorator in reversed([one for group in groups for one in group]):
            command = decorator(command)
        return command

    return decorate


def _settings(context: click.Context, values: dict[str, Any]) -> Settings:
    """Return the shared options as a record, and take them out of ``values``."""
    if "task" in values:
        _resolve_selection(context, values)
    if values.get("task") and not _is_typed(context, "layout"):
        # A layout from the file is meant for all tasks; naming some asks for merged graphs.
        values.update({"layout": None} if "layout" in values else {})
    config = context.meta.get(_CONFIG_KEY)
    shared: dict[str, Any] = {
        name: values.pop(name) for name in Settings.__dataclass_fields__ if name in values
    }
    shared["train_config"] = context.meta.get(_TRAIN_CONFIG_KEY)
    shared["verbosity"] = values.pop("verbose") - values.pop("quiet")
    shared["typed"] = frozenset(name for name in context.params if _is_typed(context, name))
    if isinstance(config, Config):
        shared["output_dir"], shared["config_file"] = config.output_dir, CONFIG_FILE
        _refuse_root(config.output_dir, f"{config.path}: output.dir")
    _refuse_root(shared.get("output"), "--output")
    return Settings(**shared)


def _refuse_root(place: Path | None, where: str) -> None:
    if place is not None and place.resolve() == Path(place.resolve().anchor):
        raise UsageError(
            f"{where}: {place} is the root of the file system",
            expected="a folder in it, because every task would get a folder there",
            fix="Pass another folder; a shell variable in the path may be unset",
        )


def _resolve_selection(context: click.Context, values: dict[str, Any]) -> None:
    """Refuse ``--task`` beside ``--all-tasks``, unless one outranks the other."""
    if not (values["task"] and values["all_tasks"]):
        return
    named, everything = _is_typed(context, "task"), _is_typed(context, "all_tasks")
    if named == everything:
        raise UsageError(
            "--task and --all-tasks: both were given", expected="one of them", fix="Leave one out"
        )
    values["task"], values["all_tasks"] = (values["task"], False) if named else ((), True)


def is_typed(name: str) -> bool:
    """Return whether a parameter of the command at work stands in its command line."""
    return _is_typed(click.get_current_context(), name)


def _is_typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE
