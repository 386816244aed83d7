"""No file runs code or takes the machine down, whichever reader opens it."""

from __future__ import annotations

import copyreg
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_export.errors import BaseModelError, CheckpointError, IntegrityError
from tests.checkpoint.messages import assert_whole
from tests.robustness.hostile_pickles import BOMBS, VARIANTS
from tests.robustness.readers import FOLDERS, Reader, prepare, readers

LIMIT_S, LIMIT_BYTES = 20, 2 << 30


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """Give every reader, its folder prepared."""
    root = tmp_path_factory.mktemp("hostile")
    prepare(root)
    return readers(root)


@pytest.fixture(autouse=True)
def extension() -> Iterator[None]:
    """Register ``os.mkdir`` as an extension, which pickles may name by number."""
    copyreg.add_extension(os.mkdir.__module__, "mkdir", 240)
    yield
    copyreg.remove_extension(os.mkdir.__module__, "mkdir", 240)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_reader_refuses(variant: str, there: dict[str, Reader], tmp_path: Path) -> None:
    """It ends in our error, exit 5 or 7, and nothing has run."""
    flag = tmp_path / "ran"
    content = VARIANTS[variant](str(flag))
    for name, (file, read) in there.items():
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        with pytest.raises((CheckpointError, IntegrityError, BaseModelError)):
            read()
        assert not flag.exists(), name
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *((f"protocol {number}", f"{os.mkdir.__module__} mkdir") for number in (0, 1)),
        ("protocol 4", "the instruction EXT1"),  # mkdir is registered here
        ("GLOBAL and REDUCE", "os mkdir"),
        ("INST", "os mkdir"),
        ("STACK_GLOBAL", "os mkdir"),
        ("STACK_GLOBAL from the memo", "os mkdir"),
        ("second pickle", "os mkdir"),
        ("fifth pickle", "os mkdir"),
        ("code in data.pkl", "os mkdir"),
        ("DATA.PKL", "os mkdir"),
        ("eval", "builtins eval"),
        ("torch.load", "torch load"),
        ("EXT1", "the instruction EXT1"),
        ("DATA.PKL of TorchScript", "constants.pkl"),
    ],
)
def test_what_it_asks_for_is_named(
    variant: str, name: str, there: dict[str, Reader], tmp_path: Path
) -> None:
    """The message says what would have been imported, and the exit code is 7."""
    for file, read in (there["mtlora"], there["base"]):
        file.write_bytes(VARIANTS[variant](str(tmp_path / "ran")))
        with pytest.raises(IntegrityError) as caught:
            read()
        file.unlink()
        assert_whole(caught.value, where=str(file), found=name)


PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from mtl_export.errors import MtlExportError
from tests.checkpoint.messages import assert_whole
from tests.robustness.hostile_pickles import BOMBS
from tests.robustness.readers import readers
root, flag, bomb, *names = sys.argv[1:]
content = BOMBS[bomb](flag)
all_readers = readers(Path(root))
for name in names:
    all_readers[name][0].write_bytes(content)
del content
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
for name in names:
    began = time.monotonic()
    try:
        all_readers[name][1]()
    except MtlExportError as error:
        print(name, type(error).__name__, error.problem[:400], sep="|")
    else:
        print(name, "accepted", "", sep="|")
    assert time.monotonic() - began < {seconds}, name
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(bomb: str, tmp_path: Path) -> None:
    """Each ends in our error within 20 s and 2 GB of address space."""
    root = tmp_path / "root"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    (root / "base" / "config.json").write_text("{}")
    flag = tmp_path / "ran"
    program = PROGRAM.format(limit=LIMIT_BYTES, seconds=LIMIT_S)
    names = ["mtlora", "base"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(root), str(flag), bomb, *names],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [line.split("|")[:2] for line in done.stdout.splitlines()]
    assert [name for name, _ in kinds] == names
    assert {kind for _, kind in kinds} <= {"CheckpointError", "IntegrityError"}
    assert not flag.exists()


def test_there_are_enough() -> None:
    """At least forty variants, against every reader that opens a pickle."""
    assert len(VARIANTS) >= 40
    assert len(FOLDERS) >= 9
