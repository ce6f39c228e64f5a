"""One notebook as a job: what is refused, what is kept, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from bench import execute, folder, marks
from bench.parameters import ParameterError
from bench.tables import ResultError, read_run
from nnc_utils import processes, provenance

UPSTREAM = "upstream: list = []  # run folders\n"
START = "from bench.folder import start\nrun = start({name!r}, globals(), needs={needs!r})"
VALUES = {"seconds": 0.0, "profile": "smoke", "seed": 1, "run_dir": ""}


def small(place, name, *cells, needs=(), parameters=""):
    from conftest import PARAMETERS

    start = START.format(name=name, needs=needs)
    return place.notebook(name, start, *cells, parameters=PARAMETERS + parameters)


def runner(path, out, given="{}", *options, **environment):
    command = [sys.executable, "-m", "bench", "run", str(path), str(out), given, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=folder.environment() | environment, **pipes)


@pytest.fixture
def here(monkeypatch):
    """`execute` in this process, which a runner would have for itself."""
    for name in ("NNC_HEADLESS", "NNC_NOTEBOOK", "TQDM_DISABLE", "PYTHONPATH", "NNC_ROOT", "NNC_CALLER"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(processes, "die_with_parent", lambda **_: None)
    return execute.execute


def end(current):
    """What the end of its process does for a run that has not finished."""
    processes.unlock(current.folder / ".writer.lock")
    os.environ.pop("NNC_MODULES", None)


def wait_for(condition, seconds=60):
    limit = time.time() + seconds
    while not condition():
        assert time.time() < limit, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_is_wrong_with_parameters_is_told_before_anything_runs(place, here, capsys):
    path, out = small(place, "n"), place.root / "out"
    with pytest.raises(ParameterError, match="Did you mean 'seed'"):
        here(path, out, {"sed": 1})
    with pytest.raises(ParameterError, match="seconds is 101"):
        here(path, out, {"seconds": 101})
    for text in ("[1]", "nothing.json", "{"):
        assert execute.main([str(path), str(out), text]) == 1
        assert "JSON" in capsys.readouterr().out
    assert not out.exists()


def test_upstream_runs_are_checked_before_anything_runs(published, here):
    root = published.parents[1]
    from conftest import PARAMETERS, write_notebook

    path = write_notebook(root, "n", "raise SystemExit", parameters=PARAMETERS + UPSTREAM)
    upstream = root / "results/runs/quick/01_baseline/seed=1"
    with pytest.raises(ResultError, match="no finished run"):
        here(path, root / "out", {"upstream": ["results/runs/quick/nowhere"]})
    file = upstream / "artifacts/network.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResultError, match="differs from the one that was measured"):
        here(path, root / "out", {"upstream": [provenance.relative(upstream)]})
    assert not (root / "out").exists()


def test_without_the_lesson_only_what_is_measured_runs(place, here):
    path = small(place, "n", "raise SystemExit('the lesson')", "run.finish(extra={'measured': seed})")
    content = nbformat.read(path, as_version=4)
    for cell, tag in zip(content.cells[1:], ("setup", "", "benchmark"), strict=True):
        cell.metadata["tags"] = [tag]
    nbformat.write(content, path)
    out = place.root / "results/runs/smoke/n/seed=4"
    with pytest.raises(RuntimeError, match="the lesson"):
        here(path, out, {"seed": 4})
    assert here(path, out, {"seed": 4}, lesson=False)
    assert read_run(out).record.extra.model_extra == {"measured": 4}


def test_a_run_uses_this_interpreter_and_leaves_a_result(place, tmp_path, here, monkeypatch):
    """Another kernel called python3 does not matter, nor does the caller's folder."""
    impostor = tmp_path / "jupyter/kernels/python3"
    impostor.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}
    (impostor / "kernel.json").write_text(json.dumps(spec))
    look = "import os, sys\nprint('epoch 1: loss 0.5')\nfrom nnc_utils.pruning import schedules\n"
    look += "found = [sys.executable, os.getcwd(), os.environ['TQDM_DISABLE'], os.environ['NNC_CALLER']]"
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
    assert finished.record.extra.model_extra == {
        "found": [sys.executable, str(path.parent), "1", os.getcwd()],
        "seconds": 1.0,
    }
    assert finished.record.parameters == {"seconds": 1.0, "profile": "smoke", "seed": 3}
    assert finished.record.run == "smoke/n/seed=3" and (out / "executed.ipynb").is_file()
    assert list(finished.record.code) == ["pruning/__init__.py", "pruning/schedules.py"]

    # the same again is kept, and a copy does for a result that Snakemake deleted in an untimely moment
    (out / "result.json").unlink()
    values = {"seconds": 1, "seed": 3}
    for keep in ("any", "current"):
        assert here(path, out, values, keep=keep) is False
    assert read_run(out).record == finished.record
    monkeypatch.setattr(execute, "_papermill", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(provenance, "changed", lambda code: ["pruning/schedules.py"])
    assert here(path, out, values, keep="any") is False
    changed = small(place, "n", look + "\n1 + 1", "run.finish()")
    for given, keep in ((values, "current"), (values, ""), (values | {"seed": 4}, "any"), (values, "any")):
        with pytest.raises(pytest.fail.Exception, match="ran"):
            here(path if keep != "any" else changed, out, given, keep=keep)
        (out / "result.json").write_text(finished.record.model_dump_json())


def test_braces_in_a_path_are_no_parameters(place, here, monkeypatch):
    """papermill takes them for such."""
    root = place.root / "a{b} {seed}"
    monkeypatch.setenv("NNC_ROOT", str(root))
    from conftest import write_notebook

    path = write_notebook(root, "n", START.format(name="n", needs=()), "run.finish()")
    assert here(path, root / "out", {"seed": 2}) is True
    assert read_run(root / "out").record.seed == 2 and (root / "out/executed.ipynb").is_file()


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("run.finish()\nprint('before')\n1 / 0", {}, "ZeroDivisionError"),
        ("import time\nfor _ in range(600): time.sleep(0.1)", {"timeout": 1}, "timed out"),
        ("import os\nos._exit(9)", {}, "died"),
        ("x = 1", {}, "run.finish"),
    ],
)
def test_a_failure_keeps_the_notebook_and_leaves_no_result(place, here, cell, options, message):
    out = place.root / "out"
    with pytest.raises(RuntimeError, match=message):
        here(small(place, "n", cell), out, {}, **options)
    assert (out / "executed.ipynb").is_file() and message in (out / "error.txt").read_text()
    assert not (out / "result.json").exists() and not (out / marks.COPY).exists()


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


def test_a_second_runner_is_refused_and_a_killed_one_is_no_hindrance(place, here):
    path, out = small(place, "n", WORK), place.root / "out"
    first = runner(path, out)
    wait_for((out / "pids").is_file)
    with pytest.raises(processes.LockedError, match=f"in use by process {first.pid} on"):
        here(path, out, {})
    kernel, child = map(int, (out / "pids").read_text().split())
    first.kill()
    first.wait()
    wait_for(lambda: not alive(kernel), 10)
    if alive(child):
        os.kill(child, signal.SIGTERM)  # what a notebook starts itself must follow the kernel itself
    assert here(small(place, "n", "run.finish()"), out, {}) is True


def test_a_writer_waits_for_a_dying_one(tmp_path):
    path = tmp_path / "folder/.writer.lock"
    hold = f"from nnc_utils import processes\nimport time\nprocesses.lock({str(path)!r}, wait=1, what='it')\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True)\ntime.sleep(2)"],
        stdout=subprocess.PIPE,
        env=folder.environment(),
    )
    holder.stdout.readline()
    with pytest.raises(processes.LockedError, match=f"process {holder.pid} on"):
        processes.lock(path, wait=0.1, what="it")
    processes.lock(path, wait=20, what="it")
    assert holder.wait(5) == 0
    processes.lock(path, wait=0, what="it")  # its own lock stands in nobody's way
    processes.unlock(path)


def test_a_notebook_alone_makes_what_it_needs_once(place, here, monkeypatch, capsys):
    small(place, "first", "import time\nrun.finish(extra={'n': time.time()})")
    small(place, "second", "run.finish()", needs=("first",), parameters=UPSTREAM)
    values = VALUES | {"upstream": []}

    def second(**others):
        return folder.start("second", values | others, needs=("first",))

    current = second()
    assert "first is needed first" in capsys.readouterr().out
    assert current.folder == place.root / "results/smoke/second"
    [upstream] = current.upstream
    assert upstream.folder == place.root / "results/smoke/first"
    written = (upstream.folder / "result.json").stat().st_mtime
    current.finish()
    again = second()
    assert capsys.readouterr().out == ""
    assert (again.upstream[0].folder / "result.json").stat().st_mtime == written
    # other parameters have a folder of their own, so that the small run stays for others
    other = second(seed=5)
    assert other.folder.name.startswith("second-") and other.folder != again.folder
    with pytest.raises(ParameterError, match="seed is -1"):
        second(seed=-1)
    end(other)
    # so has what is needed with other parameters than its defaults
    special = folder.start("second", values | {"seed": 6}, needs={"first": {"seed": 4}})
    assert special.upstream[0].seed == 4 and special.upstream[0].folder != upstream.folder
    capsys.readouterr()
    end(special)
    again.finish()
    assert folder.smoke_run("second").folder == again.folder and capsys.readouterr().out == ""
    # made again: where the code it used has changed, and where what it was built on was made again
    begin = subprocess.Popen
    monkeypatch.setattr(folder.subprocess, "Popen", lambda *_, **__: pytest.fail("made again"))
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match="made again"):
        patch.setattr(provenance, "changed", lambda code: ["training.py"])
        folder.smoke_run("first")
    result = upstream.folder / "result.json"
    result.write_text(result.read_text() + "\n")
    assert folder.smoke_run("first").folder == upstream.folder
    with pytest.raises(pytest.fail.Exception, match="made again"):
        folder.smoke_run("second")
    # while another process makes it, one waits
    kept = result.read_text()
    marks.remove(upstream.folder)
    made = f"time.sleep(1.5); open({str(result)!r}, 'w').write({kept!r})"
    lock = f"processes.lock({str(upstream.folder / '.writer.lock')!r}, wait=0, what='it')"
    code = f"import time; from nnc_utils import processes; {lock}; print(1, flush=True); {made}"
    other = begin([sys.executable, "-c", code], stdout=subprocess.PIPE, env=folder.environment())
    assert other.stdout.read(1) == b"1" and not result.exists()
    assert folder.smoke_run("first").folder == upstream.folder and other.wait(5) == 0


def test_rows_that_break_the_protocol_do_not_become_a_result(place):
    small(place, "n")
    current = folder.start("n", VALUES | {"run_dir": "results/x"})
    with pytest.raises(ResultError, match="technique"):
        current.finish(latency=[{"technique": "magic"}])
    assert not (current.folder / "result.json").exists()
    end(current)


def test_only_an_interrupted_run_of_the_same_is_gone_on_with(place, monkeypatch):
    """A checkpoint or predictions of other parameters or code, or of a finished run, must not be taken up."""
    small(place, "n")
    leave = ("checkpoint.pt", "artifacts/a.safetensors", "predictions/b.npy")

    def left(seconds, finish=False):
        """What the run finds; it leaves all of it."""
        current = folder.start("n", VALUES | {"seconds": seconds, "run_dir": str(place.root / "out")})
        found = [name for name in leave if (current.folder / name).exists()]
        for name in leave:
            current.path(name).write_text("x")
        if finish:
            current.path(leave[1]).unlink()
            current.finish()
        end(current)
        return found

    assert left(1.0) == []
    assert left(1.0) == list(leave)  # interrupted, and the same again
    assert left(2.0) == []  # another parameter
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "changed", lambda code: sorted(code)[:1])  # these tests have loaded some
        assert left(2.0) == []
    assert left(2.0, finish=True) == list(leave)
    assert left(2.0) == []  # the same, but it was finished
