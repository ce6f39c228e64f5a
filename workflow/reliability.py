"""What harm the suite stands: damaged files, kills, full disks, no network. Counted outside CI.

    python workflow/reliability.py OUT                              all parts; a stopped one goes on
    python workflow/reliability.py OUT mutants kills --minutes 15   some of them, for so long each

It works in OUT, on one core, and writes docs/reliability.csv and the table in docs/reliability.md. What is
disturbed is a profile of two small trainings, 01 and 03. Full and read-only disks, and no network, need Linux
and root; elsewhere their parts are left out. Remove OUT after a change of the code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import yaml
from PIL import Image

import mutants
from bench.folder import environment
from mutants import Count
from nnc_utils.provenance import PACKAGE, file_sha256, write_atomically

DISK = "size=96m"
SETTLE = 2  # seconds for what was killed to be gone
PIPS_OWN = r"\.venv|\.egg-info"
PATIENCE = 300  # seconds in which a command has to end by itself
TRAIN = {"epochs": 4, "width": 0.25}
PRUNE = {"train_epochs": 2, "configurations": [{"method": "weights", "sparsity": 0.9, "train": "finetune"}]}
STAGES = {
    "01_baseline": {"upstream": [], "runs": "each seed"},
    "03_pruning": {"upstream": ["01_baseline"], "runs": "each seed"},
}
PROFILE = {"seeds": [1], "stages": STAGES, "parameters": {"01_baseline": TRAIN, "03_pruning": PRUNE}}
BENCHMARK = ("-m", "bench", "benchmark", "--profile", "smoke", "--cores", "1", "--only", "*")
UNLIKE = ["train_seconds", "commit"]  # columns in which two equal runs differ
PARTS = {  # name -> what the table calls it, and how many are tried
    "mutants": ("an artifact is damaged or forged, then read", 1_000_000),
    "kills": ("SIGKILL for a process of a run", 100),
    "full-disk": ("the disk gets full in a run", 20),
    "read-only": ("a command writes to a read-only folder", 4),
    "at-once": ("a command is called twice at once", 3),
    "no-network": ("a download without a network", 6),
}


# --- A workflow that is disturbed -----------------------------------------------------------------------


def clone(root: Path) -> Path:
    """A folder that stands for the clone, with what the commands below read."""
    if not root.is_mount():
        shutil.rmtree(root, ignore_errors=True)
    names = ["workflow/Snakefile", "workflow/setup_env.py", "pyproject.toml", "constraints.txt"]
    for path in (*names, *(f"notebooks/{name}.ipynb" for name in STAGES)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE.parent / path, root / path)
    (root / "workflow/profiles").mkdir(exist_ok=True)
    (root / "workflow/profiles/smoke.yaml").write_text(yaml.safe_dump(PROFILE))
    return root


def start(root: Path, *command: str, log: str = "log", prefix: tuple = (), **more: str) -> subprocess.Popen:
    """Python with these arguments, as in the clone; what it says goes to a file beside it."""
    own = environment() | {"NNC_ROOT": str(root), "OMP_NUM_THREADS": "1"} | more
    with open(root.parent / log, "w") as stream:
        both = {"stdout": stream, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*prefix, sys.executable, *command], env=own, cwd=root, **both)


def results(root: Path) -> dict[str, str]:
    """The marks of finished runs, and what is in them."""
    return {str(file): file_sha256(file) for file in root.glob("results/runs/smoke/*/*/result.json")}


def tables(root: Path) -> str:
    """The tables of a complete run, without timings."""
    place = root / "results/smoke"
    frame = pd.read_csv(place / "compression.csv", dtype=str).drop(columns=UNLIKE)
    return frame.to_csv() + (place / "summary.csv").read_text()


def undisturbed(out: Path) -> tuple[str, float]:
    """Tables and seconds of a run that nobody disturbs."""
    file, begin = out / "undisturbed.json", time.time()
    if not file.is_file():
        root = clone(out / "clone")
        if start(root, *BENCHMARK).wait() != 0:
            raise SystemExit(f"the undisturbed run failed: {out / 'log'}")
        write_atomically(file, json.dumps([tables(root), time.time() - begin]))
    return tuple(json.loads(file.read_text()))


def disturb(out: Path, root: Path, part: str, harm: Callable, total: int, until: float) -> None:
    """Do `harm` at random moments, and call the same command again and again until the run is complete.

    What was done to a run stood if every message was clear (`harm` says that), no finished stage ran again,
    the tables are those of an undisturbed run, and no process is left.
    """
    (expected, seconds), count, chance = undisturbed(out), Count(out, part), random.Random()
    while count["tried"] < total and time.time() < until:
        clone(root)
        shutil.rmtree(root / "results", ignore_errors=True)
        tried, again, is_clear, known, status = 0, 0, True, {}, None
        while status != 0:
            process, before = start(root, *BENCHMARK), tried
            while count["tried"] + tried < total and time.time() < until:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, seconds / 3))
                    break
                is_clear &= harm(root, process, chance)
                tried += 1
                again += _changed(known, root)
            status = process.wait(PATIENCE)
            again += _changed(known, root)
            if status != 0 and tried == before:
                raise SystemExit(f"the run does not end: {out / 'log'}")
        time.sleep(SETTLE)
        left, same = sum(_works_in(one, root) for one in psutil.process_iter()), tables(root) == expected
        stood = tried if is_clear and not again and same and not left else 0
        about = {"stages_run_again": again, "other_tables": int(not same), "processes_left": left}
        count.add(tried=tried, stood=stood, runs=1, **about)


def _changed(known: dict[str, str], root: Path) -> int:
    """How many finished stages are no longer what they were; those that are new become known."""
    return sum(known.setdefault(file, content) != content for file, content in results(root).items())


def _works_in(process: psutil.Process, root: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("NNC_ROOT") == str(root)
    return False


def kill(root: Path, process: subprocess.Popen, chance: random.Random) -> bool:
    """SIGKILL for the command, or for any process below it."""
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(process.pid)
        chance.choice([command, *command.children(recursive=True)]).kill()
    return True


def fill(root: Path, process: subprocess.Popen, chance: random.Random) -> bool:
    """Fill the disk until the command has ended; whether it said why."""
    ballast = root / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    status = process.wait(PATIENCE)
    ballast.unlink(missing_ok=True)
    return status == 0 or says(root, "No space left")


def says(root: Path, words: str, log: str = "log") -> bool:
    """Whether a command said this, and showed no Python of ours."""
    text = (root.parent / log).read_text(errors="replace")
    fine = bool(re.search(words, text)) and "Traceback (most recent call last)" not in text
    if not fine:
        print(f"{words!r} is expected, not:\n{text[-3000:]}", flush=True)
    return fine


@contextlib.contextmanager
def disk(root: Path) -> Iterator[bool]:
    """A small disk in place of a folder; False where none can be mounted."""
    root.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(root)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(root)], check=True)


# --- Commands that have to say what is wrong ------------------------------------------------------------


def run_01(root: Path) -> tuple[str, ...]:
    """The command that runs 01 alone."""
    notebook, folder = root / "notebooks/01_baseline.ipynb", root / "results/runs/smoke/01_baseline/seed=1"
    return "-m", "bench", "run", str(notebook), str(folder), json.dumps(TRAIN)


def own(root: Path, *more: str) -> tuple[str, ...]:
    """The command for one's own images: two classes, drawn here beside the clone."""
    for number in range(40):
        file = root.parent / "images" / ("dark", "light")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 100, (16, 16, 3)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return "-m", "bench", "own", "--data", str(root.parent / "images"), "--size", "16", *more


def refuse(root: Path, count: Count, commands: list[tuple[str, tuple[str, ...]]], **how: object) -> None:
    """Each command has to fail with these words, and to leave every file as it is."""
    for words, command in commands[count["tried"] :]:
        before = _files(root)
        failed = start(root, *command, **how).wait(PATIENCE) != 0
        count.add(tried=1, stood=int(failed and says(root, words) and _files(root) == before))


def _files(root: Path) -> dict[str, str]:
    files = [file for file in root.rglob("*") if file.is_file() and not re.search(PIPS_OWN, str(file))]
    return {str(file): file_sha256(file) for file in files}


def read_only(out: Path, count: Count) -> None:
    """A folder that cannot be written to."""
    export = "-m", "nnc_utils.export", str(out / "dense.safetensors"), "--to", "onnx", "--out"
    with disk(root := out / "disk") as mounted:
        if mounted:
            clone(root)
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
            tried = BENCHMARK, run_01(root), own(root, "--out", str(root / "results/own"))
            commands = [(f"Read-only file system: '{root}/results", command) for command in tried]
            commands.append(("cannot be written", (*export, str(root / "net.onnx"))))
            refuse(root, count, commands)


def no_network(out: Path, count: Count) -> None:
    """Every download, in a process without a network."""
    prefix = ("unshare", "--net", "--map-root-user")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
        root, network = clone(out / "clone"), str(out / "dense.safetensors")
        sets = ("fashion_mnist", "cifar10", "cifar100")
        page = "-m", "nnc_utils.export", network, "--to", "web", "--out", str(root / "page")
        commands = [
            *((f"{name} is not (in|available)", ("-m", "nnc_utils.data", name)) for name in sets),
            ("ImageNet weights cannot be fetched", own(root, "--weights", "imagenet")),
            ("npm could not fetch|no npm here", page),
            ("set-up: pip failed.*is there a network", (str(root / "workflow/setup_env.py"),)),
        ]
        empty = {name: str(out / "empty") for name in ("NNC_DATA", "TORCH_HOME", "npm_config_cache")}
        refuse(root, count, commands, prefix=prefix, **empty)


def at_once(out: Path, count: Count) -> None:
    """The same command a second time while the first works: it waits or is refused; nothing is made twice."""
    root, runs = out / "clone", "results/runs/smoke"
    tries = [
        (BENCHMARK, f"{runs}/.benchmark.owner", 0),
        (run_01(root), f"{runs}/01_baseline/seed=1/.runner.owner", 1),
        (own(root, "--out", str(root / "own")), "own/.own.owner", 2),
    ]
    for command, owner, status in tries[count["tried"] :]:
        clone(root)
        first, end, is_long = start(root, *command), time.time() + PATIENCE, status == 2
        while not (root / owner).exists() and time.time() < end:
            time.sleep(0.1)
        fine = start(root, *command, log="second").wait(PATIENCE) == status
        if is_long:
            first.kill()
        fine &= first.wait(PATIENCE) == (-signal.SIGKILL if is_long else 0)
        fine &= says(root, "is in use by process", "second")
        told = (out / "log").read_text() + (out / "second").read_text()
        fine &= told.count("01_baseline (seed=1): started") <= 1
        fine &= command != BENCHMARK or tables(root) == undisturbed(out)[0]
        count.add(tried=1, stood=int(fine))


# --- The table ------------------------------------------------------------------------------------------


def write(out: Path, docs: Path) -> None:
    """The table, as CSV and in the page."""
    rows = []
    for part in PARTS:
        tried, stood, *others = Count(out, part).items()
        counted = "; ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in others)
        rows.append({"part": part, "tried": tried[1], "stood": stood[1], "counted": counted})
    table, page = pd.DataFrame(rows), docs / "reliability.md"
    table.to_csv(docs / "reliability.csv", index=False)
    before, rest = page.read_text().split("<!-- table:begin -->\n")
    after = rest.split("<!-- table:end -->")[1]
    page.write_text(f"{before}<!-- table:begin -->\n{shown(table)}<!-- table:end -->{after}")


def shown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = ["| what is done | tried | stood | counted |", "| --- | --- | --- | --- |"]
    for row in table.fillna("").itertuples():
        counted = row.counted if row.tried else "not tried here"
        lines.append(f"| {PARTS[row.part][0]} | {row.tried:,} | {row.stood:,} | {counted} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Try the parts, and write what has been counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to work in, where a stopped part goes on")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=1e6, help="at most so long for a part")
    parser.add_argument("--times", type=int, default=0, help="mutants, kills, full disks; 0: the full number")
    parser.add_argument("--docs", type=Path, default=PACKAGE.parent / "docs", help="where the table goes")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: one of {', '.join(PARTS)}")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    mutants.originals(out)
    for part in given.parts or PARTS:
        until, total = time.time() + 60 * given.minutes, given.times or PARTS[part][1]
        if part == "mutants":
            mutants.read_all(out, total, until)
        elif part == "kills":
            disturb(out, out / "clone", part, kill, total, until)
        elif part == "full-disk":
            with disk(out / "disk") as mounted:
                if mounted:
                    disturb(out, out / "disk", part, fill, total, until)
        else:
            refusing = {"read-only": read_only, "at-once": at_once, "no-network": no_network}[part]
            refusing(out, Count(out, part))
        write(out, given.docs)


if __name__ == "__main__":
    main()
