from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from mtl_export.errors import UsageError
from mtl_export_cli.config import OPTIONS, SECTIONS, read_config
from mtl_export_cli.main import COMMANDS


def config_file(folder: Path, text: str) -> Path:
    """Write ``mtl-export.toml`` in ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mtl-export.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_means_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file, nothing is set and results go to ./out."""
    monkeypatch.chdir(tmp_path)
    config = read_config(None)
    assert config.path is None
    assert config.output_dir == Path("out")
    assert config.defaults("merge") == {}


def test_every_key_is_read(tmp_path: Path) -> None:
    """Each key becomes the option of the same name; a section belongs to its command."""
    path = config_file(
        tmp_path,
        """
        base = "package:some_package/model"
        checkpoint = "adapter"
        tasks = ["a", "b"]
        alpha = 16
        temperature = 0.1
        dtype = "bf16"
        [output]
        dir = "results"
        [onnx]
        layout = "per-task"
        [trt]
        min_shapes = { input_ids = [1, 16], task_ids = [1] }
        max_shapes = ["input_ids:32x256", { input_ids = [1, 512] }]
        layout = "both"
        compute_capability = ["8.6", "8.9"]
        timing_cache = "timings"
        jobs = 2
        tf32 = true
        [parity]
        inputs = "rows.jsonl"
        atol = 1e-5
        rtol = { logits = 0, pooler_output = 1e-3 }
        dataset = "labelled.jsonl"
        max_drop = 0.5
        score = { spam = "auc" }
        threads = 2
        """,
    )
    config = read_config(path)
    common = {
        "base": "package:some_package/model",
        "checkpoint": str(tmp_path / "adapter"),
        "tasks": ["a", "b"],
        "alpha": 16.0,
        "temperature": 0.1,
        "dtype": "bf16",
    }
    assert config.output_dir == tmp_path / "results"
    assert config.defaults("merge") == common
    graphs = {name: value for name, value in common.items() if name != "dtype"}
    assert config.defaults("onnx") == graphs | {"layout": "per-task"}
    assert config.defaults("trt") == graphs | {
        "min_shapes": ["input_ids:1x16,task_ids:1"],
        "max_shapes": ["input_ids:32x256", "input_ids:1x512"],
        "layout": "both",
        "compute_capability": ["8.6", "8.9"],
        "timing_cache": str(tmp_path / "timings"),
        "jobs": 2,
        "tf32": True,
    }
    assert config.defaults("parity") == graphs | {
        "inputs": str(tmp_path / "rows.jsonl"), "atol": ["1e-05"],
        "rtol": ["logits:0.0", "pooler_output:0.001"], "threads": 2,
        "dataset": str(tmp_path / "labelled.jsonl"), "max_drop": 0.5, "score": ["spam:auc"],
    }  # fmt: skip


def test_graphs_have_a_dtype_of_their_own(tmp_path: Path) -> None:
    """How merged weights are stored says nothing of how a graph computes."""
    config = read_config(config_file(tmp_path, 'dtype = "bf16"\n[onnx]\ndtype = "fp16"'))
    found = {name: config.defaults(name).get("dtype") for name in ("merge", "plan", "onnx", "trt")}
    assert found == {"merge": "bf16", "plan": "bf16", "onnx": "fp16", "trt": None}


def test_every_key_of_a_section_is_an_option_of_its_command() -> None:
    """A key that no option listens to would be ignored without a word."""
    for section, keys in SECTIONS.items():
        if section != "output":
            command = import_module(COMMANDS[section][0]).command
            assert set(keys) <= {parameter.name for parameter in command.params}
    merge = import_module(COMMANDS["merge"][0]).command
    assert set(OPTIONS) <= {parameter.name for parameter in merge.params}


def test_a_file_in_the_current_folder_keeps_paths_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages and manifests speak of adapter, not of /home/.../adapter."""
    config_file(tmp_path, 'checkpoint = "adapter"\n')
    monkeypatch.chdir(tmp_path)
    config = read_config(None)
    assert config.options["checkpoint"] == "adapter"
    assert config.output_dir == Path("out")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("package:some_package/model", "package:some_package/model"),
        ("org/name", "org/name"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("base", "{folder}/base"),
        ("./missing", "{folder}/missing"),
        ("../up/missing", "{folder}/../up/missing"),
        ("/absolute/missing", "/absolute/missing"),
    ],
)
def test_only_folders_are_relative_to_the_file(tmp_path: Path, written: str, meant: str) -> None:
    """A base is a folder if it exists or looks like one; packages and hub ids stay."""
    (tmp_path / "base").mkdir()
    config = read_config(config_file(tmp_path, f'base = "{written}"\n'))
    assert config.options["base"] == meant.format(folder=tmp_path)


def test_a_missing_folder_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """./models beside a file in a subfolder must not become the hub id sub/models."""
    config_file(tmp_path / "sub", 'base = "./models"\n')
    monkeypatch.chdir(tmp_path)
    assert read_config(Path("sub/mtl-export.toml")).options["base"] == "./sub/models"


@pytest.mark.parametrize(
    ("text", "where", "rest"),
    [
        ("temprature = 1", "temprature", r"Did you mean temperature\?$"),
        ("zzz = 1", "zzz", "Remove it"),
        ("[parity]\ninput = 'x'", r"parity\.input", r"Did you mean parity\.inputs\?$"),
        ("[pairty]\natol = 1", "pairty", r"Did you mean parity\?$"),
        ("alpha = 'much'", "alpha", "Expected a number"),
        ("alpha = true", "alpha", "Expected a number"),
        ("checkpoint = 3", "checkpoint", "Expected a text in quotes"),
        ("tasks = 'a,b'", "tasks", "Expected a list of texts"),
        ("tasks = [1]", "tasks", "Expected a list of texts"),
        ("dtype = 'fp64'", "dtype", "Expected one of fp32, fp16, bf16"),
        ("output = 'out'", "output", "Expected a section"),
        ("[parity]\nthreads = -1", r"parity\.threads", "a whole number"),
        ("[trt]\nmax_shapes = { x = [1.5] }", r"trt\.max_shapes", "Expected shapes"),
        ("[onnx]\nlayout = 'both'", r"onnx\.layout", "single-graph, per-task"),
    ],
)
def test_what_it_does_not_know_it_refuses(tmp_path: Path, text: str, where: str, rest: str) -> None:
    """A misspelt key or an ill-typed value is named, with the nearest key or the type."""
    path = config_file(tmp_path, text)
    with pytest.raises(UsageError, match=rf"mtl-export\.toml: {where}: .*{rest}"):
        read_config(path)


def test_broken_toml_is_refused(tmp_path: Path) -> None:
    """The message says where the syntax breaks."""
    with pytest.raises(UsageError, match=r"not TOML: .*line 1"):
        read_config(config_file(tmp_path, "base = \n"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A wrong --config is named."""
    with pytest.raises(UsageError, match=r"nowhere\.toml: no such file"):
        read_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha = " + "9" * 400, "below 1e308"),
        ("temperature = -" + "9" * 4000, "below 1e308"),
        ('checkpoint = "~nobody-here/x"', "no such user"),
        ('base = "~nobody-here/x"', "no such user"),
        ('biases = "a\\u0000b"', "a text in quotes"),
        ("dtype = [1]", "one of"),
        ("[calibrate]\ndata = '~nobody-here/x'", "no such user"),
        ("[parity]\natol = { logits = " + "9" * 400 + " }", "below 1e308"),
        ("[output]\ndir = '~nobody-here/x'", "no such user"),
    ],
)
def test_values_beyond_what_can_be_used_are_refused(
    tmp_path: Path, text: str, expected: str
) -> None:
    """Numbers beyond a float and homes of nobody are the file's faults, named with their key."""
    path = tmp_path / "mtl-export.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"mtl-export\.toml: ") as caught:
        read_config(path)
    assert expected in caught.value.expected
    assert len(caught.value.problem) < 500
