"""One notebook as a job: what is refused, what is kept, and that nothing stays behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nnc_utils import notebook, processes, provenance, run
from nnc_utils.parameters import ParameterError
from nnc_utils.tables import ResultError, read_run

UPSTREAM = "upstream: list = []  # run folders\n"
START = "from nnc_utils.run import start\nrun = start({name!r}, globals(), needs={needs!r})"


def small(place, name, *cells, needs=(), parameters=""):
    from conftest import PARAMETERS

    start = START.format(name=name, needs=needs)
    return place.notebook(name, start, *cells, parameters=PARAMETERS + parameters)


def runner(path, folder, given="{}", *options, **environment):
    command = [sys.executable, "-m", "nnc_utils.run", str(path), str(folder), given, *options]
    return subprocess.Popen(
        command,
        env=notebook.environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_is_wrong_with_parameters_is_told_before_anything_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(processes, "die_with_parent", lambda: None)
    path, out = small(place, "n"), place.root / "out"
    with pytest.raises(ParameterError, match="Did you mean 'seed'"):
        run.execute(path, out, {"sed": 1})
    with pytest.raises(ParameterError, match="seconds is 101"):
        run.execute(path, out, {"seconds": 101})
    for text in ("[1]", "nothing.json", "{"):
        assert run.main([str(path), str(out), text]) == 1
        assert "JSON" in capsys.readouterr().out
    assert not out.exists()


def test_upstream_runs_are_checked_before_anything_runs(published):
    root = published.parents[1]
    from conftest import PARAMETERS, write_notebook

    path = write_notebook(root, "n", "raise SystemExit", parameters=PARAMETERS + UPSTREAM)
    folder = root / "results/runs/quick/01_baseline/seed=1"
    with pytest.raises(ResultError, match="no finished run"):
        run.execute(path, root / "out", {"upstream": ["results/runs/quick/nowhere"]})
    file = folder / "artifacts/network.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResultError, match="differs from the one that was measured"):
        run.execute(path, root / "out", {"upstream": [provenance.relative(folder)]})
    assert not (root / "out").exists()


def test_a_run_uses_this_interpreter_and_leaves_a_result(place, tmp_path):
    """Another kernel called python3 does not matter, nor does the caller's folder."""
    impostor = tmp_path / "jupyter/kernels/python3"
    impostor.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}
    (impostor / "kernel.json").write_text(json.dumps(spec))
    look = "import os, sys\nprint('epoch 1: loss 0.5')\n"
    look += "found = [sys.executable, os.getcwd(), os.environ['TQDM_DISABLE']]"
    path = small(place, "n", look, "run.finish(extra={'found': found, 'seconds': seconds})")
    out = place.root / "results/runs/smoke/n/seed=3"
    process = runner(path, out, '{"seconds": 1, "seed": 3}', JUPYTER_PATH=str(tmp_path / "jupyter"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert [line.strip() for line in output.splitlines()][:2] == [
        "n (seed=3): started",
        "n | epoch 1: loss 0.5",
    ]
    assert "encryption" not in output + errors
    finished = read_run(out)
    assert finished.extra == {"found": [sys.executable, str(path.parent), "1"], "seconds": 1.0}
    assert finished.record.parameters == {"seconds": 1.0, "profile": "smoke", "seed": 3}
    assert finished.record.run == "smoke/n/seed=3" and (out / "executed.ipynb").is_file()

    # the same again is kept, and a copy does for a result that Snakemake deleted in an untimely moment
    (out / "result.json").unlink()
    keep = {"seconds": 1, "seed": 3}
    assert run.execute(path, out, keep, keep=finished.record.code_sha256) is False
    assert read_run(out).record == finished.record
    wanted = notebook.hashes(path) | {"parameters_sha256": finished.record.parameters_sha256, "upstream": {}}
    assert run._kept(out, wanted)
    for changed in ("code_sha256", "notebook_sha256", "parameters_sha256"):
        assert not run._kept(out, wanted | {changed: "0" * 64})
    assert not run._kept(out, wanted | {"upstream": {"a": "0" * 64}})


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("run.finish()\nprint('before')\n1 / 0", [], "ZeroDivisionError"),
        ("import time\nfor _ in range(600): time.sleep(0.1)", ["--timeout", "1"], "timed out"),
        ("import os\nos._exit(9)", [], "died"),
        ("x = 1", [], "run.finish"),
    ],
)
def test_a_failure_keeps_the_notebook_and_leaves_no_result(place, cell, options, message):
    out = place.root / "out"
    process = runner(small(place, "n", cell), out, "{}", *options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and message in output, output
    assert (out / "executed.ipynb").is_file() and message in (out / "error.txt").read_text()
    assert not (out / "result.json").exists() and not (out / notebook.COPY).exists()


WORK = """import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
run.path('pids').write_text(f'{os.getpid()} {child.pid}')
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_ends_the_runner_with_all_below_it(place, number):
    process = runner(small(place, "n", WORK), place.root / "out")
    pids = place.root / "out/pids"
    wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    process.send_signal(number)
    assert process.wait(10) != 0
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 10)


def test_a_second_runner_is_refused_and_a_killed_one_is_no_hindrance(place):
    path, out = small(place, "n", WORK), place.root / "out"
    first = runner(path, out)
    wait_for((out / "pids").is_file)
    second = runner(path, out)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"in use by process {first.pid} on" in output
    kernel = int((out / "pids").read_text().split()[0])
    first.kill()
    first.wait()
    wait_for(lambda: not alive(kernel), 10)
    for child in (out / "pids").read_text().split()[1:]:
        if alive(int(child)):
            os.kill(int(child), signal.SIGTERM)  # what a notebook starts itself must follow the kernel itself
    path = small(place, "n", "run.finish()")
    assert run.execute(path, out, {}) is True


def test_a_writer_waits_for_a_dying_one(tmp_path, monkeypatch):
    path = tmp_path / "folder/.writer.lock"
    hold = f"from nnc_utils import processes\nimport time\nprocesses.lock({str(path)!r}, wait=1, what='it')\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True)\ntime.sleep(2)"],
        stdout=subprocess.PIPE,
        env=notebook.environment(),
    )
    holder.stdout.readline()
    with pytest.raises(processes.LockedError, match=f"process {holder.pid} on"):
        processes.lock(path, wait=0.1, what="it")
    processes.lock(path, wait=20, what="it")
    assert holder.wait(5) == 0
    processes.lock(path, wait=0, what="it")  # its own lock stands in nobody's way
    processes.unlock(path)


def test_a_notebook_alone_makes_what_it_needs_once(place, monkeypatch, capsys):
    small(place, "first", "import time\nrun.finish(extra={'n': time.time()})")
    second = small(place, "second", "run.finish()", needs=("first",), parameters=UPSTREAM)
    values = {"seconds": 0.0, "profile": "smoke", "seed": 1, "run_dir": "", "upstream": []}

    current = notebook.start("second", dict(values), needs=("first",))
    assert "first is needed first" in capsys.readouterr().out
    assert current.folder == place.root / "results/smoke/second"
    assert current.upstream[0].folder == place.root / "results/smoke/first"
    made = (current.upstream[0].folder / "result.json").stat().st_mtime
    current.finish()
    again = notebook.start("second", dict(values), needs=("first",))
    assert capsys.readouterr().out == ""
    assert (again.upstream[0].folder / "result.json").stat().st_mtime == made
    # other parameters have a folder of their own, so that the small run stays for others
    other = notebook.start("second", values | {"seed": 5}, needs=("first",))
    assert other.folder.name.startswith("second-") and other.folder != again.folder
    with pytest.raises(ParameterError, match="seed is -1"):
        notebook.start("second", values | {"seed": -1})
    for one in (again, other):
        processes.unlock(one.folder / ".writer.lock")
    # the run it was built on was made again: so is it
    again.finish()
    assert notebook._smoke_run("second").folder == again.folder
    assert capsys.readouterr().out == ""
    shutil.rmtree(place.root / "results/smoke/first")
    run.execute(place.root / "notebooks/first.ipynb", place.root / "results/smoke/first", {})
    small(place, "third", parameters=UPSTREAM)
    current = notebook.start("third", dict(values), needs=("first", "second"))
    assert "second is needed first" in capsys.readouterr().out
    assert current.upstream[1].record.upstream == notebook.upstream_hashes(current.upstream[:1])
    processes.unlock(current.folder / ".writer.lock")
    # changed code: it is made again
    monkeypatch.setattr(
        notebook, "hashes", lambda path: {"notebook_sha256": "0" * 64, "code_sha256": "0" * 64}
    )
    monkeypatch.setattr(notebook.subprocess, "Popen", lambda *a, **k: pytest.fail("made again"))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        notebook.start("second", dict(values), needs=("first",))
    assert second.is_file()


def test_rows_that_break_the_protocol_do_not_become_a_result(place):
    small(place, "n")
    values = {"seconds": 0.0, "profile": "smoke", "seed": 1, "run_dir": "results/x"}
    current = notebook.start("n", values)
    with pytest.raises(ResultError, match="technique"):
        current.finish(latency=[{"technique": "magic"}])
    assert not (current.folder / "result.json").exists()
    processes.unlock(current.folder / ".writer.lock")


def test_only_an_interrupted_run_of_the_same_is_gone_on_with(place):
    """A checkpoint or predictions of other parameters, or of a finished run, must not be taken up."""
    path = place.notebook("first", START.format(name="first", needs=()))
    folder = place.root / "out"
    leave = ("checkpoint.pt", "artifacts/a.safetensors", "predictions/b.npy")

    def started(seconds: float, finish: bool = False) -> set[str]:
        code = f"seconds = {seconds}\nrun_dir = {str(folder)!r}\nfrom nnc_utils import notebook\n"
        code += "run = notebook.start('first', globals())\n"
        code += "found = [n for n in LEAVE if (run.folder / n).exists()]\n"
        code += "[run.path(n).write_text('x') for n in LEAVE if n not in found]\n"
        code += "finish and (run.path(LEAVE[1]).unlink(), run.finish())\nprint(json.dumps(found))"
        code = f"import json\nLEAVE = {leave!r}\nfinish = {finish}\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(json.loads(done.stdout.splitlines()[-1]))

    assert path.is_file()
    assert started(1.0) == set()
    assert started(1.0) == set(leave)  # interrupted, and the same again
    assert started(2.0) == set()  # another parameter
    assert started(2.0, finish=True) == set(leave)
    assert started(2.0) == set()  # the same, but it was finished
