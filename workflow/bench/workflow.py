"""The whole benchmark of a profile: Snakemake runs its notebooks, then the table is shown."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench import cluster, marks
from bench.folder import environment
from bench.grid import Grid, GridError
from nnc_utils import processes, provenance
from nnc_utils.provenance import root
from nnc_utils.rows import run_name

AGAIN = "Call the same command again to go on: what is finished stays."
FULL = 2**20  # bytes: with fewer a disk is full


def benchmark(
    profile: str, *, cores: str = "all", rerun: str = "", only: Sequence[str] = (), on_cluster: str = ""
) -> int:
    """Run what is missing or changed, and print the headline table; the exit status.

    `rerun` "" keeps results of older code (the tables mark them), "stale" measures those again, "all"
    everything. `only` are patterns of runs, such as ``01_baseline/seed=2`` or ``*/seed=2*``: these and what
    they build on. The tables then get them beside what is committed of other runs. `on_cluster` "slurm" makes
    each run a job of the cluster that this machine submits to.
    """
    profiles = {file.stem: file for file in sorted((root() / "workflow/profiles").glob("*.yaml"))}
    if profile not in profiles:
        print(f"unknown profile {profile!r}: one of {', '.join(profiles)}")
        return 2
    try:
        planned = plan(profiles[profile], only)
        if on_cluster:
            cluster.check()
    except (GridError, cluster.ClusterError) as error:
        print(error)
        return 1
    folder, tables = root() / "results/runs" / profile, root() / "results" / profile
    _wait_for_others(folder)
    begin, log = time.time(), folder / "workflow.log"
    if on_cluster:
        cluster.cancel(profile)  # what is left of a benchmark that was killed
        print(f"Slurm runs them; how far they are: {log}", flush=True)
    options = snakemake_options(profiles[profile], cores=cores, rerun=rerun, only=only, on_cluster=on_cluster)
    if first := longest(profiles[profile], planned):
        options += ["--prioritize", *first]
    more = {} if cores == "all" else {"OMP_NUM_THREADS": str(cores)}  # what PyTorch goes by
    more["NNC_PLAN"] = json.dumps(planned)
    with open(log, "w", encoding="utf-8") as stream:
        command = [sys.executable, "-m", "bench.workflow", *options]
        status = subprocess.run(command, cwd=root(), env=environment() | more, stderr=stream).returncode
    if status != 0:
        _tell_failure(folder, log, begin)
        return 1
    what = " and ".join(only) + " of " if only else ""
    print(f"\n{what}profile {profile} is complete ({time.time() - begin:.0f} s)\n")
    if only:  # 10_report, which makes the tables, is not among them
        publish = [sys.executable, "-m", "bench", "publish", "--profile", profile]
        if subprocess.run(publish, cwd=root(), env=environment()).returncode != 0:
            return 1
    if not (tables / "compression.csv").is_file():
        return 0
    from bench import audit, readme, report  # not before: the child that is Snakemake needs none of it

    if not only:
        print(report.text(tables, "headline"))
    if (root() / "README.md").is_file():
        readme.update(root())
    print(f"\nThe report: {tables / 'report.md'}")
    if problems := audit.problems(tables, rescore=False):
        print("\n".join(["\nThese tables do not hold what they say:", *problems]))
    return 1 if problems else 0


def plan(profile: Path, only: Sequence[str] = ()) -> dict[str, float]:
    """The run folders of a profile, and the seconds that each took when its tables were made (or 0).

    Of runs that share the cores it is their part of them: the sum is what the whole takes.
    """
    config = yaml.safe_load(profile.read_text(encoding="utf-8"))
    grid = Grid(config | {"profile": profile.stem, "only": only})
    file = root() / "results" / profile.stem / "provenance.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    runs = {cell: run_name(grid.profile, cell.notebook, cell.seed, cell.shard) for cell in grid.wanted}
    seconds = {cell: known.get(run, {}).get("wall_seconds", 0) for cell, run in runs.items()}
    return {grid.folder(c): took * grid.threads(c, grid.jobs) / grid.jobs for c, took in seconds.items()}


def longest(profile: Path, planned: dict[str, float]) -> list[str]:
    """The results of the runs that took longest of those that share the cores: begun last, they end alone."""
    if not any(planned.values()):
        return []
    grid = Grid(yaml.safe_load(profile.read_text(encoding="utf-8")) | {"profile": profile.stem})
    shared = [grid.folder(cell) for cell in grid.cells if grid.threads(cell, grid.jobs) < grid.jobs]
    known = [folder for folder in shared if planned.get(folder)]
    return [f"{folder}/result.json" for folder in sorted(known, key=planned.get)[-grid.jobs :]]


def snakemake_options(
    profile: Path, *, cores: str, rerun: str, only: Sequence[str], on_cluster: str = ""
) -> list[str]:
    """What `benchmark` tells Snakemake about a profile's file."""
    settings = [f"profile={profile.stem}", *([f"rerun={rerun}"] if rerun else [])]
    settings += [f"only={json.dumps(only)}"] if only else []
    options = ["--snakefile", str(root() / "workflow/Snakefile"), "--directory", str(root())]
    options += cluster.options(profile.stem) if on_cluster else ["--cores", str(cores), "--quiet", "all"]
    options += ["--scheduler", "greedy", "--keep-going"]
    # the lock of Snakemake would survive a SIGKILL; run folders have their own, which do not
    options += ["--nolock", "--rerun-incomplete", "--rerun-triggers", "input", "params", "mtime"]
    again = stale(profile.stem) if rerun == "stale" else []
    options += ["--forceall"] if rerun == "all" else []
    options += ["--forcerun", *again] if again else []
    return [*options, "--configfile", str(profile), "--config", *settings]


def stale(profile: str) -> list[str]:
    """The results of a profile's finished runs that used a module which has changed since."""
    again = []
    for result in sorted((root() / "results/runs" / profile).glob("*/*/result.json")):
        if marks.is_stale(json.loads(result.read_text(encoding="utf-8")).get("code")):
            again.append(provenance.relative(result))
    return again


def _wait_for_others(folder: Path) -> None:
    lock, what = folder / ".benchmark.lock", "this profile's benchmark"
    try:
        processes.lock(lock, wait=1, what=what)
    except processes.LockedError as error:
        print(f"{error}\nwaiting for it ...", flush=True)
        processes.lock(lock, wait=-1, what=what)


def _tell_failure(folder: Path, log: Path, begin: float) -> None:
    errors = [file for file in folder.glob("*/seed=*/error.txt") if file.stat().st_mtime >= begin - 1]
    for file in errors:
        run = file.parent
        print(f"\n{run.parent.name} ({run.name}) failed; {run / 'executed.ipynb'} shows where:")
        print(file.read_text(encoding="utf-8"))
    if not errors:
        said = log.read_text(encoding="utf-8").splitlines()[-15:]
        print("\n".join(["\nthe workflow was ended" if not said else "\nthe workflow failed:", *said]))
    if shutil.disk_usage(folder).free < FULL:
        print(f"\nNo space left on the disk of {folder}: make room")
    jobs = [file for file in cluster.logs(folder.name).rglob("*.log") if file.stat().st_mtime >= begin - 1]
    if jobs:
        print("\nSlurm's logs of the jobs that failed:", *jobs, sep="\n  ")
    print(f"\n{AGAIN}")


def main(arguments: list[str]) -> int:
    """``python -m bench benchmark``"""
    parser = argparse.ArgumentParser(prog="python -m bench benchmark", description=__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--cores", default="all")
    parser.add_argument("--rerun", default="", choices=["", "stale", "all"])
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="such as '06_pipeline/seed=1,*'")
    kinds = {"choices": ["", *cluster.CLUSTERS], "help": "each run a job there; no --cores"}
    parser.add_argument("--cluster", dest="on_cluster", default="", **kinds)
    given = parser.parse_args(arguments)

    def end(number: int, frame: object) -> None:
        processes.end_tree()  # nobody submits any more
        if given.on_cluster:
            print(f"\nJobs cancelled in Slurm's queue: {cluster.cancel(given.profile)}. {AGAIN}", flush=True)
        processes.end_on_signal(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        return benchmark(**vars(given))
    except OSError as error:  # a full disk, or one that is read-only
        print(f"{error}\n{AGAIN}")
        return 1


if __name__ == "__main__":  # Snakemake, as a child that cannot outlive the benchmark
    processes.die_with_parent(gently=True)
    from snakemake.cli import main as snakemake

    snakemake(sys.argv[1:])
