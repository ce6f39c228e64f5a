"""The whole workflow, killed and started again: finished stages stay, and each folder has one writer."""

import json
import os
import shutil
import subprocess
import sys
import time
import types

import psutil
import pytest
import yaml

from bench import execute, workflow
from bench.folder import environment
from bench.grid import Grid
from bench.parameters import check
from nnc_utils import provenance

PROFILES = provenance.PACKAGE.parent / "workflow" / "profiles"
WORK = """import os, time
from nnc_utils.pruning import schedules
end = time.time() + seconds
with open(run.path("writers"), "a") as stream:
    while time.time() < end:
        stream.write(f"{os.getpid()}\\n")
        stream.flush()
        time.sleep(0.05)
"""
STAGES = {
    "first": {"upstream": [], "runs": "each seed"},
    "second": {"upstream": ["first"], "runs": "over all seeds"},
}


@pytest.fixture
def two_stages(place):
    """Two notebooks in a row, and a profile that runs them with one seed."""
    from conftest import PARAMETERS

    for name, more in (("first", ""), ("second", "upstream: list = []  # run folders\n")):
        start = f"from bench.folder import start\nrun = start({name!r}, globals())"
        place.notebook(name, start, WORK, "run.finish()", parameters=PARAMETERS + more)
    (place.root / "workflow/profiles").mkdir(parents=True)
    (place.root / "workflow/Snakefile").write_bytes((PROFILES.parent / "Snakefile").read_bytes())
    place.profile = place.root / "workflow/profiles/tiny.yaml"
    place.folder = {name: place.root / f"results/runs/tiny/{name}/seed=1" for name in STAGES}
    seconds(place)
    return place


def seconds(place, **stages):
    content = {"seeds": [1], "stages": STAGES, "parameters": {n: {"seconds": s} for n, s in stages.items()}}
    place.profile.write_text(yaml.safe_dump(content | {"lessons": True}))


def launch():
    command = [sys.executable, "-m", "bench", "benchmark", "--profile", "tiny", "--cores", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes)


def complete():
    process = launch()
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def started(output):
    return [line.split()[0] for line in output.splitlines() if ": started" in line]


def kill_when(condition):
    """Start the benchmark, SIGKILL it and it alone; what it started has to end by itself."""
    process = launch()
    end = time.time() + 120
    while not condition():
        assert time.time() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    output, _ = process.communicate(timeout=30)  # ends when nobody below it holds the pipe any more
    gone, left = psutil.wait_procs(family, timeout=10)
    assert not left, [one.cmdline() for one in left]
    return output


def writers(folder):
    path = folder / "writers"
    return path.read_text().split() if path.is_file() else []


def jobs(place, capsys, monkeypatch, rerun="", *options):
    """The notebooks that Snakemake would run now, asked in this process, and what it says."""
    from snakemake.cli import main

    monkeypatch.chdir(place.root)
    given = workflow.snakemake_options(place.profile, cores="2", rerun=rerun, only=[])
    given = [option for option in given if option not in ("--quiet", "all")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", *options, *given])
    said = "\n".join(capsys.readouterr())
    assert ended.value.code == 0, said
    lines = [line for line in said.splitlines() if "wildcards: " in line]
    return sorted(line.split("notebook=")[1].split(",")[0] for line in lines), said


def test_killed_and_started_again(two_stages, capsys, monkeypatch):
    first, second = two_stages.folder["first"], two_stages.folder["second"]
    seconds(two_stages, first=0.2, second=3)
    # in the moment when the first stage is finished, but Snakemake does not know it yet
    assert started(kill_when((first / "result.json").is_file)) == ["first"]
    result = (first / "result.json").read_bytes()
    # in the middle of the second
    assert started(kill_when(lambda: len(writers(second)) > 3)) == ["second"]
    before = writers(second)
    time.sleep(0.3)
    assert writers(second) == before, "somebody goes on writing"

    status, output = complete()
    assert status == 0 and started(output) == ["second"] and "complete" in output, output
    assert "second (seed=1): started, 2 of 2\n" in output
    assert (first / "result.json").read_bytes() == result and len(set(writers(first))) == 1
    killed, finished = set(before), writers(second)[len(before) :]
    assert len(killed) == 1 and len(set(finished)) == 1 and not killed & set(finished)

    # what runs again, and what does not
    def again(rerun=""):
        return jobs(two_stages, capsys, monkeypatch, rerun)[0]

    notebook = two_stages.root / "notebooks/first.ipynb"
    assert again() == []
    os.utime(notebook)
    content = json.loads(notebook.read_text())
    content["cells"][2]["source"] += ["# because\n"]
    notebook.write_text(json.dumps(content))
    assert again() == []  # neither time nor wording counts
    seconds(two_stages, first=0.2, second=2)
    assert again() == ["second"]
    seconds(two_stages, first=0.3, second=3)
    assert again() == ["first", "second"]
    seconds(two_stages, first=0.2, second=3)
    notebook = two_stages.root / "notebooks/second.ipynb"
    content = notebook.read_text()
    notebook.write_text(content.replace("time.sleep(0.05)", "time.sleep(0.06)"))
    assert again() == ["second"]
    notebook.write_text(content)
    # changed code costs nothing until its results are wanted again
    package = two_stages.root / "nnc_utils"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert again("stale") == []
    for name, line in (
        ("models", "CHANGED = 1"),
        ("pruning/schedules", "# a comment"),
    ):  # nobody used the first
        with open(package / f"{name}.py", "a") as stream:
            stream.write(line + "\n")
    assert again("stale") == []
    with open(package / "pruning/schedules.py", "a") as stream:
        stream.write("CHANGED = True\n")
    assert again() == [] and again("all") == ["first", "second"]
    assert again("stale") == ["first", "second"]
    result = json.loads((second / "result.json").read_text())
    assert list(result["code"]) == ["pruning/__init__.py", "pruning/schedules.py"]
    (second / "result.json").write_text(json.dumps(result | {"code": {}}))
    assert workflow.stale("tiny") == ["results/runs/tiny/first/seed=1/result.json"]
    monkeypatch.undo()


def test_jobs_say_what_they_need(two_stages, capsys, monkeypatch):
    stages = {"first": STAGES["first"], "second": STAGES["second"] | {"alone": True}}
    two_stages.profile.write_text(yaml.safe_dump({"seeds": [1, 2], "stages": stages, "jobs": 2}))
    wanted, said = jobs(two_stages, capsys, monkeypatch, "", "--printshellcmds")
    assert wanted == ["first", "first", "second"]
    assert said.count("--exclusive") == 1 and said.count("threads: 2") == 1  # what is timed has the machine
    [command] = [line for line in said.splitlines() if "bench run notebooks/second.ipynb" in line]
    assert "results/runs/tiny/second/seed=1 " in command and command.endswith("--keep any --no-lesson")
    content = yaml.safe_load(two_stages.profile.read_text())
    two_stages.profile.write_text(yaml.safe_dump(content | {"cell_hours": 12}))
    said = jobs(two_stages, capsys, monkeypatch, "", "--printshellcmds")[1]
    assert said.count(" --no-lesson --timeout 43200\n") == 3
    monkeypatch.setattr(sys, "executable", "/a{b}/python")  # a clone may lie in such a folder
    assert "'/a{b}/python' -m bench run" in jobs(two_stages, capsys, monkeypatch, "", "--printshellcmds")[1]


def test_a_failing_notebook_is_named_with_its_last_lines(two_stages):
    start = "from bench.folder import start\nrun = start('first', globals())"
    two_stages.notebook("first", start, "raise ValueError('the loss is not finite')", "run.finish()")
    status, output = complete()
    assert status != 0
    assert "ValueError: the loss is not finite" in output.split("first (seed=1) failed")[-1]
    assert "executed.ipynb" in output and started(output) == ["first", "first"]  # tried twice
    assert not (two_stages.folder["first"] / "result.json").exists()


def test_an_unknown_profile_or_run_is_named(two_stages, capsys):
    assert workflow.benchmark("tyni") == 2
    assert "unknown profile 'tyni': one of tiny" in capsys.readouterr().out
    assert workflow.benchmark("tiny", only=["frist/*"]) == 1
    assert "'frist/*' is none of the runs of tiny: first/seed=1, second/seed=1" in capsys.readouterr().out


def test_a_disk_that_cannot_be_written_to_is_told(two_stages, monkeypatch, capsys):
    monkeypatch.setattr(workflow.signal, "signal", lambda *_: None)
    (two_stages.root / "results").write_text("no folder")
    assert workflow.main(["--profile", "tiny"]) == 1
    assert f"{two_stages.root}/results" in (said := capsys.readouterr().out) and workflow.AGAIN in said
    monkeypatch.setattr(workflow, "FULL", 2**80)
    (two_stages.root / "log").touch()
    workflow._tell_failure(two_stages.root, two_stages.root / "log", 0)
    assert f"No space left on the disk of {two_stages.root}" in capsys.readouterr().out


def test_the_rest_is_told_by_what_the_last_run_took(two_stages, monkeypatch):
    assert workflow.plan(two_stages.profile) == {f"results/runs/tiny/{name}/seed=1": 0 for name in STAGES}
    (two_stages.root / "results/tiny").mkdir(parents=True)
    known = {f"tiny/{name}/seed=1": {"wall_seconds": 300.0} for name in STAGES}
    (two_stages.root / "results/tiny/provenance.json").write_text(json.dumps(known))
    monkeypatch.setenv("NNC_PLAN", json.dumps(workflow.plan(two_stages.profile)))
    assert execute._progress(two_stages.folder["first"]) == ", 1 of 2, about 10 min to go"
    assert execute._progress(two_stages.root / "mine/1") == ""


def test_runs_that_share_the_cores_count_for_their_part():
    took = json.loads((PROFILES.parents[1] / "results/quick/provenance.json").read_text(encoding="utf-8"))
    planned = workflow.plan(PROFILES / "quick.yaml")
    for notebook, part in (("06_pipeline", 2), ("07_deployment", 1)):
        run = f"quick/{notebook}/seed=1"
        assert planned[f"results/runs/{run}"] == took[run]["wall_seconds"] / part > 0


def test_tables_that_do_not_hold_are_a_failure(published, monkeypatch, capsys):
    (published.parents[1] / "workflow/profiles").mkdir(parents=True)
    (published.parents[1] / "workflow/profiles/quick.yaml").write_text("seeds: [1]")
    finished = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0))
    monkeypatch.setattr(workflow, "subprocess", finished)
    monkeypatch.setattr(workflow, "plan", lambda *_: {})
    assert workflow.benchmark("quick") == 0
    table = published / "latency.csv"
    table.write_text(table.read_text().replace("0.5,", "0.4,", 1))
    assert workflow.benchmark("quick") == 1
    assert "do not hold what they say" in capsys.readouterr().out


def test_of_those_that_share_the_cores_the_longest_are_begun_first():
    profile = PROFILES / "quick.yaml"
    planned = workflow.plan(profile)
    names = {folder.split("/")[3]: folder for folder in planned}
    took = {names["04_distillation"]: 9.0, names["06_pipeline"]: 5.0, names["07_deployment"]: 99.0}  # alone
    first = {f"{names[name]}/result.json" for name in ("04_distillation", "06_pipeline")}
    assert set(workflow.longest(profile, took | {names["03_pruning"]: 1.0})) == first
    assert workflow.longest(profile, dict.fromkeys(planned, 0.0)) == []  # nothing is known


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_give_only_parameters_that_notebooks_declare(path):
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert profile["seeds"] and all(isinstance(seed, int) for seed in profile["seeds"])
    grid = Grid(profile | {"profile": path.stem})
    for cell in grid.cells:
        values = grid.parameters(cell)
        assert check(grid.declared[cell.notebook], values, notebook=cell.notebook) == values
