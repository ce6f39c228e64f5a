"""On a cluster: what is asked of Slurm; and a real one of two nodes on this machine, one of them killed."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from test_workflow import PROFILES

from bench import cluster, workflow
from bench.folder import environment
from nnc_utils import provenance
from nnc_utils.provenance import file_sha256

sys.path.insert(0, str(PROFILES.parent))
import slurm_try  # noqa: E402

STAGES = {
    "01_baseline": {"upstream": [], "runs": "each seed"},
    "03_pruning": {"upstream": ["01_baseline"], "runs": "each seed", "alone": True},
}
PRUNED = {"method": "weights", "sparsity": 0.9, "train": "finetune"}
PROFILE = {  # smoke's first stages, but smaller, on one core
    "seeds": [1],
    "stages": STAGES,
    "parameters": {
        "01_baseline": {"epochs": 1, "width": 0.25},
        "03_pruning": {"train_epochs": 0.5, "configurations": [PRUNED]},
    },
    "slurm": {"threads": 1, "mem_mb": 3000, "runtime": 20, "slurm_partition": "cpu"},
}


def clone(root):
    """A folder with what the workflow reads, in the clone's place."""
    for path in ("workflow/Snakefile", *(f"notebooks/{name}.ipynb" for name in STAGES)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(provenance.PACKAGE.parent / path, root / path)
    (root / "workflow/profiles").mkdir()
    (root / "workflow/profiles/tiny.yaml").write_text(yaml.safe_dump(PROFILE))
    return root


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """``tools(sacct="exit 1", ...)``: programs of Slurm's that do no more than these lines of shell."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def write(**scripts):
        usual = {"sbatch": "", "squeue": "", "scancel": "", "scontrol": "echo 'MinJobAge = 300 sec'"}
        for name, script in (usual | scripts).items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o755)

    return write


def test_how_jobs_ended_is_asked_where_it_is_known(tools, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    tools(sacct="exit 0", scontrol="echo 'MinJobAge = 20 sec'")
    cluster.check()
    assert cluster.status_command() == "sacct"
    tools(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    cluster.check()
    assert cluster.status_command() == "squeue" and "--slurm-status-command=squeue" in cluster.options("tiny")
    tools(sacct="exit 1", scontrol="echo 'MinJobAge               = 20 sec'")
    with pytest.raises(cluster.ClusterError, match="forgets a job 20 s after its end.*MinJobAge=300"):
        cluster.check()
    tools(scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(cluster.ClusterError, match="Slurm does not answer: Unable to contact"):
        cluster.check()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(
        cluster.ClusterError, match="no sbatch, squeue, scancel, scontrol here: call this on a login"
    ):
        cluster.check()
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cluster.ClusterError, match=r"is not installed: .*pip install .*\[cluster\]"):
        cluster.check()


def test_only_the_jobs_of_this_benchmark_are_cancelled(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    ours = cluster.name("tiny")
    monkeypatch.setenv("NNC_ROOT", "/elsewhere")
    queue = [f"{ours}_a 1", f"{cluster.name('tiny')}_b 2", "my job 3", f"{ours}_c 4", "5"]
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    tools(squeue="\n".join(f"echo '{line}'" for line in queue), scancel=f'echo "$@" > {tmp_path}/cancelled')
    cluster.cancel("tiny")
    assert (tmp_path / "cancelled").read_text().split() == ["1", "4"]


def test_a_job_gets_what_the_profile_says(tools, tmp_path, monkeypatch, capfd):
    """Slurm's part is played by a script that writes down what it is asked for and says that it is done."""
    pytest.importorskip(cluster.PLUGIN)
    root = clone(tmp_path / "clone")
    monkeypatch.setenv("NNC_ROOT", str(root))
    monkeypatch.setattr(cluster, "FIRST_LOOK", 1)
    profile = PROFILE | {"slurm": PROFILE["slurm"] | {"threads": 3}}
    (root / "workflow/profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    submit = f"""echo "$@" >> {root}/asked
        case "$*" in *notebook=03*) n=2 name=03_pruning;; *) n=1 name=01_baseline;; esac
        cd {root}/results/runs/tiny; mkdir -p $name/seed=1; echo {{}} > $name/seed=1/result.json
        echo $n"""
    tools(sbatch=submit, sacct="exit 1", squeue="printf '1|COMPLETED\\n2|COMPLETED\\n'")
    assert workflow.benchmark("tiny", on_cluster="slurm") == 0, capfd.readouterr().out
    first, second = (root / "asked").read_text().splitlines()
    for asked in (first, second):
        for option in ("-p cpu", "-t 20", "--mem 3000", "--cpus-per-task=3", "--requeue"):
            assert f" {option} " in f"{asked} ", asked
        assert (
            f"--job-name {cluster.name('tiny')}_" in asked
            and f"{cluster.logs('tiny')}/rule_notebook" in asked
        )
    assert "--exclusive" not in first and "--exclusive" in second  # what is timed


def test_the_weekly_tests_refuse_a_machine_that_would_skip_them(tmp_path):
    programs = ["chromium", "npm", "slurmctld", "slurmd", "srun", "munged", "slurmdbd", "mariadbd", "make"]
    for name in programs:
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $@"\n')
        (tmp_path / name).chmod(0o755)
    script = provenance.PACKAGE.parent / ".ci/weekly"
    text = script.read_text(encoding="utf-8")
    (tmp_path / "clone/.ci").mkdir(parents=True)
    weekly = tmp_path / "clone/.ci/weekly"
    weekly.write_text(text.replace("$PATH:/usr/sbin", f"{tmp_path}:{tmp_path}/tools"))  # no others
    (tmp_path / "tools").mkdir()
    for tool in ("git", "dirname", "bash"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"]
    git = functools.partial(subprocess.run, cwd=tmp_path / "clone", check=True)
    git(["git", "init", "-q"])

    def run():
        path = f"{tmp_path / 'tools'}"
        return subprocess.run(["bash", weekly], env={"PATH": path}, capture_output=True, text=True)

    git(["git", *commit], env=os.environ | {"GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z"})
    assert "nothing to test" in run().stdout
    git(["git", *commit])
    assert run().stdout.split()[1:] == ["test", "SLOW=1"]
    (tmp_path / "slurmd").unlink()
    done = run()
    assert done.returncode == 1 and "no slurmd here" in done.stderr and "apt-get install" in done.stderr


# --- A real cluster -------------------------------------------------------------------------------


def slurm(monkeypatch, **options):
    """A running cluster that this process submits to; skipped where Slurm is not installed."""
    pytest.importorskip(cluster.PLUGIN)
    if absent := slurm_try.missing(options.get("accounting", False)):
        pytest.skip(f"not installed: {', '.join(absent)}")
    monkeypatch.setattr(cluster, "FIRST_LOOK", 2)
    return slurm_try.cluster(cpus=2, **options)


def join(monkeypatch, running):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, running.environment[name])


def in_time(condition, what, seconds=150):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, what()
        time.sleep(0.2)


def artifacts(root):
    return {
        file.relative_to(root).as_posix(): file_sha256(file)
        for file in (root / "results/runs/tiny").glob("*/*/artifacts/*.safetensors")
    }


@pytest.mark.slow
def test_a_node_is_killed_and_the_networks_are_those_of_a_local_run(tmp_path, monkeypatch, capfd):
    local, remote = clone(tmp_path / "local"), clone(tmp_path / "remote")
    monkeypatch.setenv("NNC_ROOT", str(local))
    command = [sys.executable, "-m", "bench", "benchmark", "--profile", "tiny", "--cores", "1"]
    here = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    monkeypatch.setenv("NNC_ROOT", str(remote))
    log = remote / "results/runs/tiny/workflow.log"
    status = []
    with slurm(monkeypatch) as running:
        join(monkeypatch, running)
        submit = threading.Thread(
            target=lambda: status.append(workflow.benchmark("tiny", on_cluster="slurm"))
        )
        submit.start()
        # in the middle of the second stage, which is alone on its node
        begun = remote / "results/runs/tiny/03_pruning/seed=1"
        in_time((begun / "artifacts/dense_finetuned.safetensors").exists, log.read_text)
        [node] = running.ask("squeue", "--noheader", "--states=running", "--format=%N").split()
        assert running.ask("squeue", "--noheader", "--format=%C").split() == ["2"]  # all of the node's
        first = json.loads((begun / ".runner.owner").read_text())
        running.kill(node)
        in_time(lambda: not os.path.exists(f"/proc/{first['pid']}"), lambda: "the job outlived its node", 5)
        submit.join()
        said = log.read_text()
        assert status == [0], said
        assert running.ask("sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%t").startswith(
            "down"
        )
    assert json.loads((begun / ".runner.owner").read_text())["pid"] != first["pid"]
    assert said.count("submitted with SLURM jobid") == 2, said  # Slurm itself ran the second again
    assert here.wait() == 0
    ours = artifacts(remote)
    assert len(ours) == 3 and ours == artifacts(local)


@pytest.fixture
def one_stage(tmp_path, monkeypatch):
    """A clone whose profile has the first notebook alone."""
    root = clone(tmp_path)
    monkeypatch.setenv("NNC_ROOT", str(root))
    profile = PROFILE | {"stages": {"01_baseline": STAGES["01_baseline"]}}
    (root / "workflow/profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    return root


def command():
    """The README's, as a process."""
    called = [sys.executable, "-m", "bench", "benchmark", "--profile", "tiny", "--cluster", "slurm"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(called, env=environment(), **pipes)


def succeeds(root):
    done = command()
    said = done.communicate()[0]
    assert done.returncode == 0 and "profile tiny is complete" in said, said
    assert len(artifacts(root)) == 1


@pytest.mark.slow
def test_with_accounting_a_failed_job_is_named_with_its_log_and_once_mended_it_succeeds(
    one_stage, monkeypatch
):
    cells = one_stage / "notebooks/01_baseline.ipynb"
    whole = cells.read_text()
    cells.write_text(whole.replace("from bench", "import os; os._exit(3)\\nfrom bench", 1))
    with slurm(monkeypatch, accounting=True) as running:
        join(monkeypatch, running)
        assert cluster.status_command() == "sacct"
        failed = command()
        said = failed.communicate()[0]
        logs = list(cluster.logs("tiny").rglob("*.log"))
        assert failed.returncode == 1 and len(logs) == 2, said  # tried twice
        assert all(str(log) in said for log in logs), said
        cells.write_text(whole)
        succeeds(one_stage)


@pytest.mark.slow
def test_a_stopped_benchmark_cancels_its_jobs_and_goes_on(one_stage, monkeypatch):
    with slurm(monkeypatch) as running:
        join(monkeypatch, running)
        stopped = command()
        in_time(lambda: running.ask("squeue", "--noheader", "--states=running"), lambda: "no job runs")
        stopped.send_signal(signal.SIGINT)  # Ctrl-C
        said = stopped.communicate(timeout=60)[0]
        assert "Jobs cancelled in Slurm's queue: 1. Call the same command again to go on" in said
        in_time(lambda: not running.ask("squeue", "--noheader"), lambda: "the job goes on", 30)
        succeeds(one_stage)
