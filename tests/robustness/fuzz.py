"""Seeded wrong files through every reader: each is accepted or refused by an error of ours.

    python -m tests.robustness.fuzz --inputs 100000 --workers 2     make fuzz
    python -m tests.robustness.fuzz --target golden --input 17      one input again, with traceback

Input k of a target is the same in every run with the same ``--seed``. A finding is an exception
that is no ``MtlExportError``, a reader that takes longer or more memory than ``guard`` allows,
that kills its process, or that writes or reads outside of its folder.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from mtl_export.errors import MtlExportError
from tests.robustness import guard
from tests.robustness.damage import replace_file, reseal
from tests.robustness.mutators import mutated
from tests.robustness.seeds import Good
from tests.robustness.targets import TARGETS, Target

KINDS = ("untyped", "hang", "memory", "outside", "crash")
# A process that hangs below Python cannot stop itself.
KILL_S = guard.TIME_LIMIT_S + 5


@dataclass(frozen=True)
class Finding:
    """A reader that did what it may not.

    Attributes:
        target: Its name.
        number: Which input.
        kind: One of ``KINDS``.
        site: Where in the product, and what was raised.
        said: The message.
    """

    target: str
    number: int
    kind: str
    site: str
    said: str


@dataclass
class Result:
    """What came of the inputs of one target.

    Attributes:
        accepted: How many were read.
        refused: How many ended in one of our errors.
        findings: The others.
    """

    accepted: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return how many inputs there were."""
        return self.accepted + self.refused + len({one.number for one in self.findings})


class Fuzzer:
    """Makes the inputs of targets and hands them to the readers.

    Args:
        root: Where whole files are made, once.
        seed: Decides every input.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self._root, self._seed, self._good = root, seed, Good(root)
        self._files = lru_cache(maxsize=None)(self._files_of)

    def make(self, target: Target) -> None:
        """Write the target's whole files; its reader must accept each of their folders."""
        folder = self._root / target.name
        if folder.exists():
            return
        target.make(self._good, folder)
        for form in sorted(folder.iterdir()):
            with tempfile.TemporaryDirectory() as place:
                shutil.copytree(form, Path(place) / "in" / "case")
                target.read(self._good, Path(place) / "in" / "case")

    def attempt(self, target: Target, number: int, place: Path) -> list[Finding] | bool:
        """Read input ``number``; return whether it was accepted, or what was found.

        Args:
            target: Its reader.
            number: Which input.
            place: An empty folder; what is written elsewhere is a finding.
        """
        folder = place / "in" / "case"
        (place / "outside").mkdir()
        (place / "outside" / "bait").write_bytes(b"{}")
        self.write(target, number, folder)
        resident = guard.reset_peak()
        error: BaseException | None = None
        with guard.watched(place / "in") as outside, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                target.read(self._good, folder)
            except KeyboardInterrupt:
                raise
            except BaseException as raised:
                error = raised
        found = [Finding(target.name, number, "outside", "", one) for one in outside]
        taken = guard.peak_bytes() - resident
        if taken > guard.MEMORY_LIMIT_BYTES or _is_out_of_memory(error):
            found.append(Finding(target.name, number, "memory", _site(error), f"{taken >> 20} MiB"))
        elif guard.has_hung():
            found.append(Finding(target.name, number, "hang", _site(error), ""))
        elif error is not None and not isinstance(error, MtlExportError):
            found.append(Finding(target.name, number, "untyped", _site(error), str(error)[:300]))
        if error is not None and __name__ == "__main__" and not multiprocessing.parent_process():
            traceback.print_exception(error)
        return found or error is None

    def write(self, target: Target, number: int, folder: Path) -> None:
        """Write input ``number`` as ``folder``: whole files of one form, one of them changed."""
        random = Random(f"{self._seed}/{target.name}/{number}")
        form, files = random.choice(self._files(target))
        shutil.copytree(form, folder)
        file = folder / random.choice(files)
        if random.random() < 0.06:
            replace_file(file, [folder / one for one in files], random)
        else:
            file.write_bytes(mutated(file.read_bytes(), file.name, random))
        if target.is_resealed and random.random() < 0.7:
            reseal(folder, file)

    def _files_of(self, target: Target) -> list[tuple[Path, list[str]]]:
        return [
            (form, sorted(path.relative_to(form).as_posix() for path in form.rglob("*")
                          if path.is_file() and path.name.endswith(target.endings)))
            for form in sorted((self._root / target.name).iterdir())
        ]  # fmt: skip


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _site(error: BaseException | None) -> str:
    """Return what was raised, and the last line of ours that it passed."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "/mtl_export" in one.filename and "/tests/" not in one.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"


def shares(targets: Sequence[Target], total: int) -> dict[str, int]:
    """Return how many of ``total`` inputs each target gets, by its share."""
    weight = sum(target.share for target in targets)
    counts = {target.name: total * target.share // weight for target in targets}
    for target in targets[: total - sum(counts.values())]:
        counts[target.name] += 1
    return counts


def run_inputs(fuzzer: Fuzzer, target: Target, numbers: Iterable[int], place: Path) -> Result:
    """Read inputs in this process, in the empty folder ``place``."""
    result = Result()
    with guard.bounded_memory():
        for number in numbers:
            _count(result, fuzzer.attempt(target, number, place))
            empty(place)
    return result


def _count(result: Result, outcome: list[Finding] | bool) -> None:
    if isinstance(outcome, list):
        result.findings += outcome
    elif outcome:
        result.accepted += 1
    else:
        result.refused += 1


@contextmanager
def fresh_place() -> Iterator[Path]:
    """Give an empty folder, in memory where there is such: folders are made and removed a lot."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        yield Path(place)


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


Work = Sequence[tuple[Target, int]]


class Worker:
    """A process that reads inputs and is begun anew where one of them has killed it."""

    def __init__(self, fuzzer: Fuzzer, work: Work) -> None:
        self._fuzzer, self._work, self._done = fuzzer, work, 0
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe(duplex=False)
        self._begun_s = time.monotonic()
        self._process = context.Process(
            target=_work, args=(self._fuzzer, self._work[self._done :], there)
        )
        self._process.start()
        there.close()

    def outcomes(self) -> Iterator[tuple[Target, list[Finding] | bool]]:
        """Yield what has come meanwhile."""
        while self._done < len(self._work):
            target, number = self._work[self._done]
            try:
                if not self.pipe.poll(0):
                    if time.monotonic() - self._begun_s < KILL_S + 60 * (self._done == 0):
                        return
                    outcome, kind = None, "hang"
                else:
                    outcome, kind = self.pipe.recv(), ""
            except EOFError:
                self._process.join()
                outcome, kind = None, "crash"
            self._done += 1
            self._begun_s = time.monotonic()
            if outcome is None:
                self._process.kill()
                self._process.join()
                yield (
                    target,
                    [Finding(target.name, number, kind, f"exit {self._process.exitcode}", "")],
                )
                self._begin()
            else:
                yield target, outcome
        self._process.join()


def _work(fuzzer: Fuzzer, work: Work, pipe: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.dup2(silent, 1)
    with fresh_place() as place, guard.bounded_memory():
        for target, number in work:
            pipe.send(fuzzer.attempt(target, number, place))
            empty(place)


def run(fuzzer: Fuzzer, targets: Sequence[Target], total: int, workers: int) -> dict[str, Result]:
    """Return what came of ``total`` inputs, by target, read by so many processes."""
    for target in targets:
        fuzzer.make(target)
    counts = shares(targets, total)
    work = [(target, number) for target in targets for number in range(counts[target.name])]
    results = {target.name: Result() for target in targets}
    gc.freeze()
    running = {Worker(fuzzer, work[start::workers]) for start in range(workers)}
    pending = len(work)
    while pending:
        multiprocessing.connection.wait([worker.pipe for worker in running], timeout=1)
        for worker in running:
            for target, outcome in worker.outcomes():
                _count(results[target.name], outcome)
                pending -= 1
    return results


def told(results: dict[str, Result], total: int, seconds: float) -> str:
    """Return a table by target, every place of a finding with one of its inputs, and the sum."""
    lines = [
        f"{'target':28}{'inputs':>8}{'read':>8}{'refused':>9}"
        + "".join(f"{kind:>9}" for kind in KINDS)
    ]
    everything = [one for result in results.values() for one in result.findings]
    for name, result in results.items():
        kinds = Counter(one.kind for one in result.findings)
        lines.append(f"{name:28}{result.count:8}{result.accepted:8}{result.refused:9}"
                     + "".join(f"{kinds[kind]:9}" for kind in KINDS))  # fmt: skip
    sites = Counter((one.target, one.kind, one.site) for one in everything)
    firsts = {(one.target, one.kind, one.site): one for one in reversed(everything)}
    for key, count in sites.most_common():
        one = firsts[key]
        lines.append(f"{count:6} {one.kind:8} {one.site}")
        lines.append(f"       --target '{one.target}' --input {one.number}: {one.said[:120]!r}")
    kinds = Counter(one.kind for one in everything)
    found = (
        f"{total:,} inputs",
        f"{kinds['untyped']} untyped exceptions",
        f"{kinds['hang']} hangs over {guard.TIME_LIMIT_S} s",
        f"{kinds['memory']} above 2 GB",
        f"{kinds['outside']} files outside",
        *([f"{kinds['crash']} crashes"] if kinds["crash"] else []),
    )
    lines += [f"{total / max(seconds, 1e-9):.0f} inputs/s", ", ".join(found)]
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Seeded wrong files through every reader.")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="one of the targets; may be repeated")
    parser.add_argument("--input", type=int, help="read this input of --target again")
    parser.add_argument("--keep", type=Path, help="with --input: write it to this folder instead")
    parser.add_argument("--whole", type=Path, help="keep the whole files here for the next run")
    options = parser.parse_args()
    targets = [
        target
        for target in TARGETS
        if options.target in (None, []) or target.name in options.target
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "TMPDIR": folder,
            "XDG_CACHE_HOME": folder,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
        }
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        fuzzer = Fuzzer(options.whole or Path(folder) / "seeds", options.seed)
        if options.input is not None:
            fuzzer.make(targets[0])
            if options.keep:
                fuzzer.write(targets[0], options.input, options.keep)
                return 0
            with fresh_place() as place:
                print(run_inputs(fuzzer, targets[0], [options.input], place))
            return 0
        started = time.monotonic()
        for target in targets:
            fuzzer.make(target)
        print(f"whole files written and read in {time.monotonic() - started:.1f} s", flush=True)
        started = time.monotonic()
        results = run(fuzzer, targets, options.inputs, options.workers)
        print(told(results, options.inputs, time.monotonic() - started))
    return int(any(result.findings for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
