from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.robustness import guard
from tests.robustness.fuzz import Fuzzer, fresh_place, run_inputs, shares
from tests.robustness.targets import TARGETS, Target

# In every run of the tests; make fuzz tries fifty times as many.
INPUTS = 2000
COUNTS = shares(TARGETS, INPUTS)


@pytest.fixture(scope="session")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """Give what makes inputs; whatever libraries keep for themselves stays in its folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield Fuzzer(folder / "seeds")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_wrong_files_are_read_or_refused(target: Target, fuzzer: Fuzzer) -> None:
    """No exception but ours, no hang, little memory, and nothing done outside of the folder."""
    fuzzer.make(target)
    with fresh_place() as place:
        result = run_inputs(fuzzer, target, range(COUNTS[target.name]), place)
    assert not result.findings, result.findings
    assert result.count == COUNTS[target.name]
    # As many wrong files as this cannot all be right; verify tells by its verdicts.
    assert result.refused > 0 or target.name == "verify"


def test_an_input_is_the_same_every_time(fuzzer: Fuzzer, tmp_path: Path) -> None:
    """What --target and --input name can be tried again, byte by byte."""
    target = next(one for one in TARGETS if one.name == "peft")
    fuzzer.make(target)
    for number in range(30):
        found = []
        for place in (tmp_path / f"{number} once", tmp_path / f"{number} again"):
            fuzzer.write(target, number, place)
            files = sorted(path for path in place.rglob("*") if path.is_file())
            found.append([(path.relative_to(place), path.read_bytes()) for path in files])
        assert found[0] == found[1]


def _writes(place: Path) -> None:
    (place / "outside.txt").write_text("x")


def _starts(place: Path) -> None:
    os.system("true")


def _opens(place: Path) -> None:
    (place / "outside" / "bait").read_bytes()


def _hogs(place: Path) -> None:
    b"x" * (200 << 20)


def _breaks(place: Path) -> None:
    raise RecursionError


FAULTS: dict[Callable[[Path], None], str] = {
    _writes: "outside", _starts: "outside", _opens: "outside", _hogs: "memory", _breaks: "untyped",
}  # fmt: skip


@pytest.mark.parametrize(("fault", "kind"), FAULTS.items())
def test_the_harness_sees_what_it_is_for(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None], kind: str
) -> None:
    """A reader that does what it may not is found."""
    monkeypatch.setattr(guard, "MEMORY_LIMIT_BYTES", 100 << 20)
    good = next(one for one in TARGETS if one.name == "golden vectors")
    fuzzer.make(good)
    bad = Target(
        "golden vectors", good.make, lambda _, folder: fault(folder.parent.parent), good.endings
    )
    with fresh_place() as place:
        result = run_inputs(fuzzer, bad, [0], place)
    assert {one.kind for one in result.findings} == {kind}
