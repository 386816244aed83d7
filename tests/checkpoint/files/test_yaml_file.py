from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.checkpoint.files.yaml_file import MOST_BYTES, read_yaml
from mtl_export.errors import CheckpointError

# Ten lists of ten of the one before: a billion values in a few hundred bytes.
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: [", "no YAML"),
        ("a: !!python/object/apply:os.system [x]", "no YAML"),
        ("!!timestamp x", "no YAML"),
        ("!!int ''", "no YAML"),
        ("a: 2020-13-45", "no YAML"),
        ("? {a: 1}\n: 3", "no YAML"),
        ("a: &a [*a]", "nested more than 100 deep"),
        ("[" * 5_000, "nested more than 100 deep"),
        (LAUGHS, "lists and objects"),
        ("a: 0x" + "f" * 9_000, "thousands of digits"),
        ("#" * (MOST_BYTES + 1), "bytes, more than"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str, found: str) -> None:
    """Other types, bombs of aliases and the parser's own errors end in one error."""
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_yaml(path)
    assert caught.value.problem.startswith(str(path))


def test_a_configuration_is_read(tmp_path: Path) -> None:
    """Numbers, texts, lists and aliases that do not multiply."""
    path = tmp_path / "cfg.yaml"
    path.write_text("MODEL: &m {R: [1, 2.5]}\nCOPY: *m\nTASKS: [a]\n")
    assert read_yaml(path) == {
        "MODEL": {"R": [1, 2.5]},
        "COPY": {"R": [1, 2.5]},
        "TASKS": ["a"],
    }


def test_merge_keys_that_multiply_are_refused(tmp_path: Path) -> None:
    """A kilobyte of them takes all memory before the first value is there."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="merge keys"):
        read_yaml(file)
