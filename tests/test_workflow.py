"""The whole workflow, killed and started again: finished stages stay, and each folder has one writer."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import yaml

from nnc_utils import benchmark, notebook, provenance
from nnc_utils.tables import artifact_name, committed_runs

PROFILES = provenance.PACKAGE.parent / "workflow" / "profiles"
WORK = """import os, time
from nnc_utils import encoding
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
        start = f"from nnc_utils.run import start\nrun = start({name!r}, globals())"
        place.notebook(name, start, WORK, "run.finish()", parameters=PARAMETERS + more)
    (place.root / "workflow/profiles").mkdir(parents=True)
    (place.root / "workflow/Snakefile").write_bytes((PROFILES.parent / "Snakefile").read_bytes())
    place.profile = place.root / "workflow/profiles/tiny.yaml"
    place.profile.write_text(yaml.safe_dump({"seeds": [1], "stages": STAGES}))
    place.folder = {name: place.root / f"results/runs/tiny/{name}/seed=1" for name in STAGES}
    return place


def seconds(place, **stages):
    content = {"seeds": [1], "stages": STAGES, "parameters": {n: {"seconds": s} for n, s in stages.items()}}
    place.profile.write_text(yaml.safe_dump(content))


def launch():
    command = [sys.executable, "-m", "nnc_utils.run", "benchmark", "--profile", "tiny", "--cores", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=notebook.environment(), **pipes)


def complete():
    process = launch()
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def started(output):
    return [line.split()[0] for line in output.splitlines() if line.endswith(": started")]


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


def dry_run(rerun="", package=None, *options, only=()):
    """What Snakemake says about what it would do, with this package or a copy of it in another folder."""
    profile = provenance.root() / "workflow/profiles/tiny.yaml"
    given = benchmark._snakemake(profile, "tiny", "2", rerun, only)
    given = [option for option in given if option not in ("--quiet", "all")]
    command = [sys.executable, "-m", "nnc_utils.benchmark", "--dry-run", *options, *given]
    environment = notebook.environment() | ({"PYTHONPATH": str(package)} if package else {})
    place = package or provenance.PACKAGE.parent  # Python looks into the working folder first
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    return text


def jobs(rerun="", package=None):
    """The notebooks that the workflow would run now."""
    lines = dry_run(rerun, package).splitlines()
    return [line.split("notebook=")[1].split(",")[0] for line in lines if "wildcards: " in line]


def test_killed_and_started_again(two_stages):
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
    assert status == 0 and started(output) == ["second"], output
    assert (first / "result.json").read_bytes() == result and len(set(writers(first))) == 1
    killed, finished = set(before), writers(second)[len(before) :]
    assert len(killed) == 1 and len(set(finished)) == 1 and not killed & set(finished)

    begin = time.time()
    status, output = complete()
    assert (status, started(output)) == (0, []) and "complete" in output
    assert time.time() - begin < 30
    what_reruns_what(two_stages)


def test_a_divided_notebook_builds_on_its_first_part(two_stages):
    parts = {"first": {"once": {"seconds": 0.2, "runs": "first seed"}, "small": {"seconds": 0.1}}}
    parts["second"] = {"all": {"others": True}, "more": {}}
    parts["second"]["last"] = {"runs": "first seed", "after": "more", "alone": True}
    parts["third"] = {"plain": {}, "both": {"with": {"first": "once", "second": "more"}}}
    parts["third"]["others"] = {"with": {"second": ["all", "more"]}, "others": True}
    parts["second"]["small"] = {"runs": "first seed", "with": {"third": "plain"}}  # a later notebook
    stages = {name: about | {"runs": "each seed"} for name, about in STAGES.items()}
    stages["third"] = {"upstream": [], "runs": "each seed"}  # but for what its parts name
    shutil.copy(two_stages.root / "notebooks/second.ipynb", two_stages.root / "notebooks/third.ipynb")
    divided = {"seeds": [1, 2], "stages": stages, "parts": parts}
    two_stages.profile.write_text(yaml.safe_dump(divided, sort_keys=False))
    for name in stages:
        path = two_stages.root / f"notebooks/{name}.ipynb"
        about = 'upstream: list = []  # run folders\npart: str = ""  # of a divided benchmark\n'
        content = json.loads(path.read_text())
        [given] = [c for c in content["cells"] if c["metadata"].get("tags") == ["parameters"]]
        given["source"] = [
            *"".join(given["source"]).replace("upstream: list = []  # run folders\n", "").splitlines(True),
            about,
        ]
        path.write_text(json.dumps(content))
    found = {}
    planned = dry_run("", None, "--printshellcmds")
    assert planned.count("--exclusive") == 1  # the part that is timed
    for line in planned.splitlines():
        if "-m nnc_utils.run " not in line:
            continue
        words = shlex.split(line)  # ... -m nnc_utils.run NOTEBOOK FOLDER PARAMETERS ...
        folder, values = words[words.index("nnc_utils.run") + 2 :][:2]
        values = json.loads(values)
        assert folder == f"results/runs/tiny/{folder.split('/')[3]}/seed={values['seed']},{values['part']}"
        assert not {"runs", "others", "after", "with", "alone"} & set(values)
        upstream = [path.removeprefix("results/runs/tiny/") for path in values["upstream"]]
        found[folder.removeprefix("results/runs/tiny/")] = upstream
    assert found == {
        "first/seed=1,once": [],
        "first/seed=1,small": ["first/seed=1,once"],
        "first/seed=2,small": ["first/seed=1,once"],
        "second/seed=1,all": ["first/seed=1,once", "first/seed=1,small", "first/seed=2,small"],
        "second/seed=2,all": ["first/seed=2,small", "first/seed=1,once", "first/seed=1,small"],
        "second/seed=1,more": ["first/seed=1,once", "first/seed=1,small", "second/seed=1,all"],
        "second/seed=2,more": ["first/seed=2,small", "second/seed=2,all"],
        "second/seed=1,last": [
            "first/seed=1,once",
            "first/seed=1,small",
            "second/seed=1,all",
            "second/seed=1,more",
        ],
        "third/seed=1,plain": [],
        "third/seed=2,plain": [],
        "third/seed=1,both": ["first/seed=1,once", "second/seed=1,more", "third/seed=1,plain"],
        "third/seed=2,both": ["first/seed=1,once", "second/seed=2,more", "third/seed=2,plain"],
        "third/seed=1,others": [
            *(f"second/seed={seed},{part}" for part in ("all", "more") for seed in (1, 2)),
            "third/seed=1,plain",
        ],
        "third/seed=2,others": [
            *(f"second/seed={seed},{part}" for part in ("all", "more") for seed in (2, 1)),
            "third/seed=2,plain",
        ],
        "second/seed=1,small": [
            "first/seed=1,once",
            "first/seed=1,small",
            "third/seed=1,plain",
            "second/seed=1,all",
        ],
    }
    assert planned.count("threads: 2") == len(found)
    asked = dry_run(only=["second/seed=2*"], package=None).split("wildcards: notebook=")[1:]
    asked = sorted(text.split()[0] + text.split()[1].removeprefix("cell=") for text in asked)
    needed = ["first,seed=1,once", "first,seed=1,small", "first,seed=2,small"]
    assert asked == [*needed, "second,seed=2,all", "second,seed=2,more"]
    two_stages.profile.write_text(yaml.safe_dump(divided | {"jobs": 2}, sort_keys=False))
    assert dry_run().count("threads: 2") == 1  # what is timed still has the machine to itself
    two_stages.profile.write_text(yaml.safe_dump(divided | {"jobs": 0}, sort_keys=False))
    status, output = complete()
    assert status and "jobs is 0: how many trainings share the cores" in output
    for part, option, value, said in (
        ("once", "runs", "first", "`runs` is 'first seed' or left out"),
        ("small", "alone", "yes", "`alone` is true or left out"),
        ("once", "after", "small", "`after` names a part that stands before it, not 'small'"),
        ("once", "with", {"second": ["all", "none"]}, "`with` maps other notebooks to parts of each"),
        ("once", "with", {"first": "small"}, "`with` maps other notebooks to parts of each"),
        ("once", "with", ["second"], "`with` maps other notebooks to parts of each"),
    ):
        wrong = {**divided, "parts": {**parts, "first": {**parts["first"], part: {option: value}}}}
        two_stages.profile.write_text(yaml.safe_dump(wrong, sort_keys=False))
        status, output = complete()
        assert status and f"part {part} of first: {said}" in output
    wrong = {**parts, "first": {**parts["first"], "small": {"with": {"second": "all"}}}}
    two_stages.profile.write_text(yaml.safe_dump(divided | {"parts": wrong}, sort_keys=False))
    status, output = complete()
    assert status and "`with` makes runs build on each other: results/runs/tiny/" in output


def what_reruns_what(place):
    """Dry runs on the finished workflow."""
    first, second = (place.root / f"notebooks/{name}.ipynb" for name in STAGES)
    assert jobs() == []
    os.utime(first)
    content = json.loads(first.read_text())
    content["cells"][2]["source"] = content["cells"][2]["source"] + ["# because\n"]
    first.write_text(json.dumps(content))
    assert jobs() == []  # neither time nor wording counts
    seconds(place, first=0.2, second=2)
    assert jobs() == ["second"]
    seconds(place, first=0.3, second=3)
    assert sorted(jobs()) == ["first", "second"]
    seconds(place, first=0.2, second=3)
    content = second.read_text()
    second.write_text(content.replace("time.sleep(0.05)", "time.sleep(0.06)"))
    assert jobs() == ["second"]
    second.write_text(content)
    # changed code costs nothing until its results are wanted again
    package = place.root / "nnc_utils"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert jobs("stale", place.root) == []
    with open(package / "encoding.py", "a") as stream:
        stream.write("CHANGED = True\n")
    assert jobs("", place.root) == []
    assert sorted(jobs("stale", place.root)) == ["first", "second"]
    assert sorted(jobs("all")) == ["first", "second"]


def test_a_failing_notebook_is_named_with_its_last_lines(two_stages):
    start = "from nnc_utils.run import start\nrun = start('first', globals())"
    two_stages.notebook("first", start, "raise ValueError('the loss is not finite')", "run.finish()")
    status, output = complete()
    assert status != 0
    assert "ValueError: the loss is not finite" in output.split("first (seed=1) failed")[-1]
    assert "executed.ipynb" in output and started(output) == ["first", "first"]  # tried twice
    assert not (two_stages.folder["first"] / "result.json").exists()


def test_an_unknown_profile_or_run_is_named(two_stages, capsys):
    assert benchmark.benchmark("tyni") == 2
    assert "unknown profile 'tyni': one of tiny" in capsys.readouterr().out
    assert benchmark.benchmark("tiny", only=["frist/*"]) == 1
    assert "'frist/*' is none of the runs of tiny: first/seed=1, second/seed=1" in capsys.readouterr().out


def test_tables_that_do_not_hold_are_a_failure(published, monkeypatch, capsys):
    (published.parents[1] / "workflow/profiles").mkdir(parents=True)
    (published.parents[1] / "workflow/profiles/quick.yaml").write_text("seeds: [1]")
    finished = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0))
    monkeypatch.setattr(benchmark, "subprocess", finished)
    assert benchmark.benchmark("quick") == 0
    table = published / "latency.csv"
    table.write_text(table.read_text().replace("0.5,", "0.4,", 1))
    assert benchmark.benchmark("quick") == 1
    assert "do not hold what they say" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_give_only_parameters_that_notebooks_declare(path):
    from nnc_utils.parameters import check, declared

    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert profile["seeds"] and all(isinstance(seed, int) for seed in profile["seeds"])
    given = list((profile.get("parameters") or {}).items())
    given += [
        (name, values) for name, parts in (profile.get("parts") or {}).items() for values in parts.values()
    ]
    for name, values in given:
        options = ("runs", "others", "after", "with", "alone")  # the Snakefile's
        values = {key: value for key, value in values.items() if key not in options}
        notebook_file = provenance.PACKAGE.parent / "notebooks" / f"{name}.ipynb"
        assert check(declared(notebook_file), values, notebook=name) == values


def test_who_teaches_is_made_by_what_a_part_builds_on():
    profile = yaml.safe_load((PROFILES / "standard.yaml").read_text(encoding="utf-8"))
    seeds = set(profile["seeds"])
    parts, found, names = profile["parts"], [], set()
    for name in ("04_distillation", "05_architecture_search"):
        for part, about in parts[name].items():
            given = profile["parameters"][name] | about
            if "teaches" in given and (name.startswith("04") or "taught" in str(given["arms"])):
                found.append(part)
                made = about["with"]["06_pipeline"]
                points = [
                    p
                    for own in ([made] if isinstance(made, str) else made)
                    for p in parts["06_pipeline"][own]["points"]
                ]
                files = [re.sub("[:,]", "_", point).replace("=", "") for point in points]
                assert given["teaches"] in files, part
                names |= {given["teaches"]}
    assert {*parts["04_distillation"], "taught", "winner_taught"} == set(found)
    committed = provenance.PACKAGE.parent / "results/standard"
    for run in committed_runs(committed):
        for entry in run.record.artifacts:
            kept = committed / "artifacts" / artifact_name(entry.artifact_sha256)
            if run.record.notebook == "06_pipeline" and Path(entry.path).stem in names and kept.is_file():
                seeds.discard(run.record.seed)
    assert not seeds  # of each seed it lies in this repository


@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_the_part_with_the_searched_network_builds_on_the_search(name):
    profile = yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))
    given, parts = profile["parameters"], profile.get("parts") or {}
    found = {}
    for part, about in (parts.get("06_pipeline") or {"": {}}).items():
        values = given["06_pipeline"] | about
        found[part] = any(point.startswith("searched") for point in values["controls"])
        assert found[part] == ("with" in about), part  # and no other part waits for it
        for other, its in about.get("with", {}).items():
            assert other == "05_architecture_search"
            declared = {"steps": ["search"]} | given[other] | (parts[other][its] if its else {})
            assert "search" in declared["steps"]
    assert any(found.values()) == (name != "quick")
