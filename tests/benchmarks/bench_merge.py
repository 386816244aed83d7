"""How long merging takes, beside copying the same bytes and beside PEFT.

    python tests/benchmarks/bench_merge.py --cache DIR       (make bench-merge)

Builds once, in DIR: a LLaMA of 1.1 billion parameters (and one twice as deep) with normal
weights, in files of 500 MB, in bfloat16 and float32; MTL-LoRA checkpoints of eight tasks,
r 16, on the attention or on all seven projections; the same tasks as PEFT folders; and an
environment with PEFT. Then runs, in turns, each in a fresh process and followed by ``sync``:

    cp        cp -r of the base
    copy x8   the base read once and written eight times
    peft      from_pretrained, merge_and_unload, save_pretrained; for eight tasks in a loop
    merge     mtl-export merge, the base's hash being known from an earlier command
    merge 1st the same, the very first time: the base is hashed as well

and prints wall time, processor time, peak memory, and the quotients. Nothing drops the
page cache: all of them read the base from memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
# Blocks: the 1.1 B model, and one twice as deep.
LLAMA, DEEP = 22, 44
TASKS = 8
PEFT_PACKAGES = ("peft==0.21.2", "transformers==5.23.0", "torch==2.13.0")

# Inputs are built in processes of their own, so that this one stays small.
# argv: folder, dtype, layers
BUILD_BASE = """
import sys
from pathlib import Path
from tests.merge import bases
folder, dtype, layers = sys.argv[1:]
shape = bases.Shape(2048, 5632, 32, 4, int(layers), 32000)
dtype = {"bf16": "BF16", "fp32": "F32"}[dtype]
bases.write_base(Path(folder), shape, dtype=dtype, shard_bytes=500_000_000)
"""
# argv: folder, targets, layers, tasks
BUILD_CHECKPOINT = """
import sys
from pathlib import Path
from tests.merge import bases
folder, targets, layers, tasks = sys.argv[1:]
shape = bases.Shape(2048, 5632, 32, 4, int(layers), 32000)
projections = {"qkvo": bases.ATTENTION, "all": bases.PROJECTIONS}[targets]
bases.write_checkpoint(
    Path(folder), shape, tasks=int(tasks), rank=16, ups=3, projections=projections
)
"""
# argv: base, output folder, max shard size, adapters
PEFT_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, size, *adapters = sys.argv[1:]
for number, adapter in enumerate(adapters):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(f"{out}/{number}", max_shard_size=size)
"""
# argv: base, output folder, copies
COPY_MANY = """
import os, sys
base, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
block = bytearray(4 << 20)
for name in sorted(os.listdir(base)):
    targets = []
    for number in range(count):
        os.makedirs(f"{out}/{number}", exist_ok=True)
        targets.append(os.open(f"{out}/{number}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    source = os.open(f"{base}/{name}", os.O_RDONLY)
    while size := os.readv(source, [block]):
        for target in targets:
            os.write(target, memoryview(block)[:size])
    for file in (source, *targets):
        os.close(file)
"""


@dataclass(frozen=True)
class Run:
    """One measured process.

    Attributes:
        wall_s: From start to exit, ``sync`` included.
        cpu_s: User and system time of it and its children.
        peak_bytes: Most memory of it and its children at one time, what they share counted
            once (the sum of PSS, looked at five times a second).
        written_bytes: What it left on the disk, hard links counted once.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    written_bytes: int


class Bench:
    """The inputs in the cache folder, and the commands that are measured.

    Args:
        cache: Holds what is built, and the outputs while they are measured.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._out = cache / "out"
        cache.mkdir(parents=True, exist_ok=True)

    def base(self, dtype: str, layers: int) -> Path:
        """Return the base, built if need be."""
        return self._built(f"base-{dtype}-{layers}", BUILD_BASE, dtype, str(layers))

    def checkpoint(self, targets: str, layers: int) -> Path:
        """Return the eight-task checkpoint, built if need be."""
        name = f"adapter-{targets}-{layers}"
        return self._built(name, BUILD_CHECKPOINT, targets, str(layers), str(TASKS))

    def _built(self, name: str, program: str, *arguments: str) -> Path:
        folder = self._cache / name
        if not folder.is_dir():
            _say(f"writing {folder}")
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run(
                [sys.executable, "-c", program, str(partial), *arguments],
                check=True, env=self._environment("known"),
            )  # fmt: skip
            partial.rename(folder)
        return folder

    def peft_folders(self, dtype: str, targets: str) -> list[Path]:
        """Return the same tasks as PEFT folders, converted if need be."""
        folder = self._cache / f"peft-{targets}"
        if not folder.is_dir():
            subprocess.run(
                [
                    *_ours(), "inspect", "-c", str(self.checkpoint(targets, LLAMA)),
                    "-b", str(self.base(dtype, LLAMA)), "--convert", str(folder),
                    "--convert-format", "peft",
                ],
                check=True, stdout=subprocess.DEVNULL, env=self._environment("known"),
            )  # fmt: skip
        return [folder / f"task{index}" for index in range(TASKS)]

    def peft_python(self) -> Path:
        """Return the interpreter of PEFT's own environment, made if need be."""
        venv = self._cache / "peft-venv"
        if not (venv / "ready").is_file():
            _say(f"installing {', '.join(PEFT_PACKAGES)}")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *PEFT_PACKAGES], check=True)
            (venv / "ready").touch()
        return venv / "bin" / "python"

    def command(
        self, name: str, base: Path, checkpoint: Path, targets: str, tasks: int
    ) -> list[str]:
        """Return the command line of one case."""
        if name == "cp":
            return ["cp", "-r", str(base), str(self._out)]
        if name == "copy":
            return [sys.executable, "-c", COPY_MANY, str(base), str(self._out), str(tasks)]
        if name == "peft":
            dtype = base.name.split("-")[1]
            adapters = [str(path) for path in self.peft_folders(dtype, targets)[:tasks]]
            return [str(self.peft_python()), "-c", PEFT_MERGE, str(base), str(self._out), "500MB",
                    *adapters]  # fmt: skip
        which = ["--all-tasks"] if tasks == TASKS else [
            word for index in range(tasks) for word in ("--task", f"task{index}")
        ]  # fmt: skip
        layout = ["--layout", "shared"] if name == "merge shared" else []
        return [*_ours(), "merge", "-c", str(checkpoint), "-b", str(base), "-o", str(self._out),
                "-q", *which, *layout]  # fmt: skip

    def run(self, command: Sequence[str], hash_of_base: str) -> Run:
        """Run ``command`` and ``sync`` in a fresh process, then remove what it wrote."""
        shutil.rmtree(self._out, ignore_errors=True)
        if hash_of_base == "unknown":
            shutil.rmtree(self._cache / "xdg-unknown", ignore_errors=True)
        os.sync()
        begun = time.perf_counter()
        process = subprocess.Popen(
            ["/bin/sh", "-c", '"$@" && sync', "sh", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=self._environment(hash_of_base), text=True,
        )  # fmt: skip
        assert process.stderr is not None
        ended = threading.Event()
        peaks: list[int] = [0]
        watch = threading.Thread(target=_watch, args=(process.pid, ended, peaks))
        watch.start()
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        ended.set()
        watch.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{errors}")
        written = {
            path.stat().st_ino: path.stat().st_size
            for path in self._out.rglob("*")
            if path.is_file()
        }
        shutil.rmtree(self._out)
        cpu = usage.ru_utime + usage.ru_stime
        return Run(wall, cpu, max(peaks), sum(written.values()))

    def _environment(self, hash_of_base: str) -> dict[str, str]:
        return {
            **os.environ,
            "XDG_CACHE_HOME": str(self._cache / f"xdg-{hash_of_base}"),
            "HF_HUB_OFFLINE": "1",
            # The project need not be installed.
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "cli", ROOT / "calibration"))),
        }


@dataclass
class Case:
    """One row of the table.

    Attributes:
        title: As it is printed.
        command: What is run.
        rounds: How often; cases take turns.
        hash_of_base: ``known`` or ``unknown`` at the start.
        runs: The results.
    """

    title: str
    command: list[str]
    rounds: int
    hash_of_base: str
    runs: list[Run]

    @property
    def wall_s(self) -> float:
        """Return the median wall time."""
        return median(run.wall_s for run in self.runs)


def measured(
    bench: Bench, dtype: str, targets: str, tasks: int, rounds: int, *, peft: bool
) -> dict[str, Case]:
    """Measure everything about one base, one choice of layers and one number of tasks."""
    base, checkpoint = bench.base(dtype, LLAMA), bench.checkpoint(targets, LLAMA)
    names = {
        "copy": ("cp" if tasks == 1 else "copy", "known"),
        "merge": ("merge", "known"),
        "merge 1st": ("merge", "unknown"),
    }
    if peft:
        names["peft"] = ("peft", "known")
    cases = {
        title: Case(title, bench.command(name, base, checkpoint, targets, tasks),
                    1 if title == "peft" and tasks > 1 else rounds, known, [])
        for title, (name, known) in names.items()
    }  # fmt: skip
    bench.run(cases["merge"].command, "known")  # warms the page cache, and hashes the base
    for number in range(rounds):
        for case in cases.values():
            if number < case.rounds:
                _say(f"{dtype} {targets} T={tasks} round {number + 1}: {case.title}")
                case.runs.append(bench.run(case.command, case.hash_of_base))
    return cases


def print_cases(title: str, cases: dict[str, Case]) -> None:
    """Print the rows and, for every row, its quotients by copying and of PEFT by it."""
    print(f"\n{title}")
    print(f"{'':12}{'wall s (min..max)':>22}{'CPU s':>8}{'peak MB':>9}{'/ copy':>8}{'peft /':>8}")
    copy = cases["copy"].wall_s
    for case in cases.values():
        walls = [run.wall_s for run in case.runs]
        peft = f"{cases['peft'].wall_s / case.wall_s:.1f}" if "peft" in cases else ""
        print(
            f"{case.title:12}{case.wall_s:8.2f} ({min(walls):.2f}..{max(walls):.2f})".ljust(34)
            + f"{median(run.cpu_s for run in case.runs):8.1f}"
            f"{max(run.peak_bytes for run in case.runs) / 1e6:9.0f}"
            f"{case.wall_s / copy:8.2f}{peft:>8}"
        )


def print_depth(bench: Bench) -> None:
    """Print peak memory for the base and for one twice as deep."""
    print("\npeak memory by depth, bf16, all projections")
    for tasks in (1, TASKS):
        peaks = []
        for layers in (LLAMA, DEEP):
            base, checkpoint = bench.base("bf16", layers), bench.checkpoint("all", layers)
            command = bench.command("merge", base, checkpoint, "all", tasks)
            peaks.append(bench.run(command, "known").peak_bytes / 1e6)
        print(f"T={tasks}: {LLAMA} layers {peaks[0]:.0f} MB, {DEEP} {peaks[1]:.0f} MB")


def print_shared(bench: Bench, dtype: str) -> None:
    """Print how much less eight tasks take with --layout shared."""
    base, checkpoint = bench.base(dtype, LLAMA), bench.checkpoint("qkvo", LLAMA)
    sizes = [
        bench.run(bench.command(name, base, checkpoint, "qkvo", TASKS), "known").written_bytes
        for name in ("merge", "merge shared")
    ]
    print(
        f"\n--layout shared, {dtype}, q/k/v/o, T={TASKS}: {sizes[1] / 1e9:.2f} GB of"
        f" {sizes[0] / 1e9:.2f} GB standalone ({sizes[1] / sizes[0]:.1%})"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure merging; see the module's docstring.")
    parser.add_argument("--cache", type=Path, default=_default_cache())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--targets", default="all,qkvo")
    parser.add_argument("--tasks", default="1,8")
    parser.add_argument("--no-peft", action="store_true", help="Leave PEFT out.")
    parser.add_argument("--no-depth", action="store_true", help="Leave the deep base out.")
    arguments = parser.parse_args()
    bench = Bench(arguments.cache.resolve())
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds")
    for dtype, targets, tasks in _combinations(arguments):
        cases = measured(bench, dtype, targets, tasks, arguments.rounds, peft=not arguments.no_peft)
        print_cases(f"{dtype}, {targets} projections, T={tasks}", cases)
    if not arguments.no_depth:
        print_depth(bench)
        print_shared(bench, arguments.dtypes.split(",")[0])


def _combinations(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    for dtype in arguments.dtypes.split(","):
        for targets in arguments.targets.split(","):
            for tasks in arguments.tasks.split(","):
                yield dtype, targets, int(tasks)


def _watch(pid: int, ended: threading.Event, peaks: list[int]) -> None:
    """Note the memory of ``pid`` and all below it until ``ended``."""
    while not ended.wait(0.2):
        peaks.append(sum(_pss_bytes(one) for one in _tree(pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0


def _ours() -> list[str]:
    script = Path(sys.executable).with_name("mtl-export")
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-c", "from mtl_export_cli.main import main; main()"]


def _default_cache() -> Path:
    variable = os.environ.get("MTL_EXPORT_BENCH_CACHE")
    return Path(variable) if variable else Path.home() / ".cache" / "mtl-export" / "bench-merge"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
