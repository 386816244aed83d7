from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

import mtl_export.errors
from mtl_export.errors import MtlExportError
from mtl_export.version import VERSION
from mtl_export_cli import main
from tests.cli.conftest import Run, files_below

HEAVY = (
    "huggingface_hub", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "safetensors",
    "tensorrt", "tensorrt_rtx", "torch", "transformers",
)  # fmt: skip
HELPS = [["--help"], *([name, "--help"] for name in main.COMMANDS)]
ENTRY = "from mtl_export_cli.main import main; main()"


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """The group's and every command's help come without torch and its like."""
    script = (
        "import sys\n"
        "from mtl_export_cli.main import cli\n"
        "try:\n"
        "    cli(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: mtl-export ")
    assert done.stdout.endswith("[] 0\n")


def test_group_help_imports_no_command() -> None:
    """The list of commands is answered from the table alone."""
    script = (
        "import sys\n"
        "from mtl_export_cli.main import cli\n"
        "try:\n"
        "    cli(['--help'])\n"
        "except SystemExit:\n"
        "    print([name for name in sys.modules if name.startswith('mtl_export_cli.commands')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_table_agrees_with_the_command(name: str) -> None:
    """The short help in the table is the command's own, and its docstring's first line."""
    module, short = main.COMMANDS[name]
    command = import_module(module).command
    assert command.short_help == short
    assert (command.help or "").splitlines()[0] == short


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_shows_an_example(name: str, run: Run) -> None:
    """Each help ends in lines that can be typed."""
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert "Example:" in outcome.stdout
    assert f"  mtl-export {name}" in outcome.stdout


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_has_an_environment_variable_and_help(name: str) -> None:
    """What a flag can say, MTL_EXPORT_... can say, and the help shows it."""
    command = import_module(main.COMMANDS[name][0]).command
    for parameter in command.params:
        if isinstance(parameter, click.Argument) or parameter.hidden:
            continue
        long = next(opt for opt in parameter.opts if opt.startswith("--"))
        word = long[2:].replace("-", "_").upper()
        # merge's layout is not that of graphs and engines, nor its report parity's file.
        own = "MERGE_" if name == "merge" and long in {"--layout", "--report"} else ""
        assert parameter.envvar == f"MTL_EXPORT_{own}{word}"
        assert parameter.show_envvar
        assert parameter.help


def test_shared_options_are_spelled_the_same_everywhere() -> None:
    """An option that two commands have has one spelling, one variable and one help."""
    seen: dict[str, tuple[list[str], str]] = {}
    for module, _ in main.COMMANDS.values():
        for parameter in import_module(module).command.params:
            if isinstance(parameter, click.Argument):
                continue
            facts = (parameter.opts, parameter.help)
            key = parameter.envvar or parameter.name
            assert seen.setdefault(key, facts) == facts


def test_version() -> None:
    """--version names the version."""
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mtl-export, version {VERSION}\n"


def test_no_command_shows_help_as_a_usage_error(run: Run) -> None:
    """A bare mtl-export explains itself on stderr and exits 2."""
    outcome = run()
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Commands:" in outcome.stderr


def test_a_group_alone_explains_itself_too(run: Run) -> None:
    """A bare mtl-export tasks is like a bare mtl-export: help, not an error made of help."""
    outcome = run("tasks")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("Usage: mtl-export tasks ")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["merg"], "Type mtl-export merge"),
        (["frobnicate"], "See mtl-export --help"),
        (["merge", "--tsk", "a"], "--tsk"),
        (["--frobnicate"], "--frobnicate"),
        (["merge", "--dtype", "fp64"], "fp32"),
        (["merge", "--alpha", "much"], "--alpha"),
        (["merge", "surplus"], "surplus"),
        (["merge", "--tasks", "a,,b"], "empty name"),
    ],
)
def test_a_mistyped_command_line_exits_2(run: Run, words: list[str], fragment: str) -> None:
    """What click finds and what we find look the same: one message, exit code 2."""
    outcome = run(*words)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert fragment in outcome.stderr


def test_a_mistyped_command_line_with_json_is_json(run: Run) -> None:
    """Even arguments that do not parse answer in JSON when --json is among them."""
    outcome = run("merge", "--tsk", "a", "--json")
    assert outcome.code == 2
    assert outcome.stderr == ""
    assert not outcome.json["ok"]
    assert outcome.json["exit_code"] == 2
    assert outcome.json["error"]["error"] == "UsageError"
    assert outcome.json["error"]["problem"].startswith("mtl-export merge: ")


def subclasses(kind: type[MtlExportError]) -> list[type[MtlExportError]]:
    """Return every class below ``kind``."""
    below = kind.__subclasses__()
    return [*below, *(deep for one in below for deep in subclasses(one))]


DOCUMENTED = {
    "UsageError": 2, "TaskNotFoundError": 2, "OutputError": 2,
    "CheckpointError": 5, "HyperparameterError": 5, "BaseModelError": 5, "AdapterError": 5,
    "UnusableBaseError": 5, "GraphError": 5,
    "BackendError": 6, "BackendMissingError": 6, "EngineBuildError": 6, "EngineRunError": 6,
    "ParityError": 2, "CalibrationError": 2,
    "IntegrityError": 7, "LinkedDataError": 7,
}  # fmt: skip


def test_the_exit_code_of_every_error_is_decided() -> None:
    """The table covers the whole tree of errors, and with the documented codes."""
    ours = [
        kind for kind in subclasses(MtlExportError) if kind.__module__ == mtl_export.errors.__name__
    ]
    found = {kind.__name__: main.exit_code(kind.__new__(kind, "x: y")) for kind in ours}
    assert found == DOCUMENTED


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Make ``doctor`` raise what is put into the list."""
    errors: list[BaseException] = []

    @click.command()
    @click.option("--json", is_flag=True)
    def command(json: bool) -> None:
        raise errors[0]

    monkeypatch.setattr("mtl_export_cli.commands.doctor.command", command)
    return errors


def test_a_bug_keeps_its_traceback(raising: list[BaseException], run: Run) -> None:
    """Anything that is not one of our errors is reported as our bug, exit code 1."""
    raising.append(ZeroDivisionError("oops"))
    outcome = run("doctor")
    assert outcome.code == 1
    assert outcome.stdout == ""
    assert "Traceback" in outcome.stderr
    assert "ZeroDivisionError: oops" in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last == (
        f"This is a bug in mtl-export {VERSION}. Please report it with the lines above."
    )


def test_a_bug_with_json_is_json(raising: list[BaseException], run: Run) -> None:
    """Stdout still holds one object, the traceback goes to stderr."""
    raising.append(ZeroDivisionError("oops"))
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    assert outcome.json["exit_code"] == 1
    assert "oops" in outcome.json["error"]["problem"]
    assert "Traceback" in outcome.stderr


def test_ctrl_c_exits_130(raising: list[BaseException], run: Run) -> None:
    """An interrupt is no bug: no traceback, the shell's code."""
    raising.append(KeyboardInterrupt())
    outcome = run("doctor")
    assert outcome.code == 130
    assert "Traceback" not in outcome.stderr


def test_our_error_is_one_message(raising: list[BaseException], run: Run) -> None:
    """Where, found, expected, why and what to do, on one line of stderr."""
    raising.append(
        mtl_export.errors.AdapterError("[bold]w[/bold]: f", expected="e, because y", fix="x")
    )
    outcome = run("doctor")
    assert outcome.code == 5
    assert outcome.stdout == ""
    assert outcome.stderr == "error: [bold]w[/bold]: f. Expected e, because y. x.\n"


@pytest.mark.parametrize("asked", ["flag", "environment"])
def test_our_error_with_json_is_an_object(
    raising: list[BaseException], run: Run, asked: str
) -> None:
    """The parts come separately, with the exit code."""
    raising.append(mtl_export.errors.IntegrityError("w: f", fix="x"))
    outcome = (
        run("doctor", "--json") if asked == "flag" else run("doctor", env={"MTL_EXPORT_JSON": "1"})
    )
    assert outcome.code == 7
    assert outcome.stderr == ""
    assert outcome.json == {
        "ok": False,
        "error": {
            "error": "IntegrityError", "problem": "w: f", "expected": "", "fix": "x",
        },
        "exit_code": 7,
    }  # fmt: skip


def test_a_closed_pipe_is_no_bug() -> None:
    """``mtl-export doctor | true`` leaves no traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "doctor"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("merge", "--all-tasks", "-o", ""), "-o"),
        (("merge", "--all-tasks", "--output="), "--output"),
        (("onnx", "--all-tasks", "--output", " "), "--output"),
        (("trt", "--all-tasks", "-o", ""), "-o"),
        (("calibrate", "--data", "rows.jsonl", "-o", ""), "-o"),
        (("calibrate", "--data", ""), "--data"),
        (("inspect", "-c", ""), "-c"),
        (("inspect", "--convert", ""), "--convert"),
        (("plan", "-b", ""), "-b"),
        (("parity", "--inputs", ""), "--inputs"),
        (("parity", "--report="), "--report"),
        (("verify", ""), "the word after verify"),
        (("tasks", "remove", "", "spam"), "the word after remove"),
        (("bench", "--onnx", "a\0b"), "--onnx"),
    ],
)
def test_an_empty_value_is_never_the_current_folder(
    project: Path, run: Run, words: tuple[str, ...], where: str
) -> None:
    """A shell variable that is not set ends in exit 2, whatever the command writes or reads."""
    before = files_below(project)
    outcome = run(*words)
    assert outcome.code == 2
    assert f"error: {where}: its value is empty, or has a null byte" in outcome.stderr
    assert run(*words, "--json").json["error"]["problem"].startswith(f"{where}: ")
    assert files_below(project) == before


def test_an_empty_variable_is_never_the_current_folder(project: Path, run: Run) -> None:
    """It was meant to hold something."""
    outcome = run("merge", "--all-tasks", env={"MTL_EXPORT_OUTPUT": ""})
    assert (outcome.code, "MTL_EXPORT_OUTPUT: its value is empty" in outcome.stderr) == (2, True)
    assert not (project / "spam").exists()


@pytest.mark.parametrize("command", ["merge", "onnx", "trt", "calibrate"])
@pytest.mark.parametrize("given", ["flag", "variable", "file"])
def test_nothing_is_written_to_the_root(project: Path, run: Run, command: str, given: str) -> None:
    """``-o $UNSET/`` would give every task a folder there."""
    if given == "file":
        with (project / "mtl-export.toml").open("a") as file:
            file.write('[output]\ndir = "/."\n')
    words = ["-o", "/"] if given == "flag" else []
    outcome = run(command, *words, env={"MTL_EXPORT_OUTPUT": "//"} if given == "variable" else {})
    assert outcome.code == 2
    assert "is the root of the file system" in outcome.stderr


def test_an_interrupt_while_it_starts_is_quiet(tmp_path: Path) -> None:
    """Exit 130 and no traceback, where imports take most of the time."""
    slow = tmp_path / "click.py"
    slow.write_text("import time; print('importing', flush=True); time.sleep(60)")
    entry = "from mtl_export_cli.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", entry],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "importing\n"
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=30)
    assert (started.returncode, said) == (130, "")
