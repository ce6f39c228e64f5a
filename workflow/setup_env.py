"""Make .venv with the exact versions of constraints.txt; a second call sees that all is there.

Runs with the system's Python and its standard library only: `python3 workflow/setup_env.py [--peers]`.
`--nncodec` makes, instead, the environment of that peer, which wants an older NumPy and compiles itself;
`--flower` that of Flower, which wants other versions than constraints.txt, and takes torch from .venv.
Written so that an older Python can still read it and say that it is too old.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
NNCODEC_VENV = Path(os.environ.get("NNCODEC_VENV") or ROOT / ".venv-nncodec").absolute()
# what it needs to code arrays, not all that its metadata ask for (torch, pandas, opencv)
NNCODEC = ("numpy==1.26.4", "setuptools==84.2.1", "wheel==0.48.0", "pybind11==3.1.0", "nncodec==2.1.3")
FLOWER_VENV = Path(os.environ.get("FLOWER_VENV") or ROOT / ".venv-flower").absolute()
FLOWER = ("flwr==1.42.0",)
OLDEST, NEWEST = (3, 11), (3, 13)
# bytes that an installation takes at its fullest; 6 GB stay on Linux
NEEDED = 9 * 10**9


class SetupError(Exception):
    """Something is missing; the message is one line and says what to do."""


def python_in(venv):
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check_machine(free=None):
    """Raise a SetupError for the first thing missing: Python's version, its venv module, disk space."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        good = [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
        found = [name for name in good if _quiet([name, "-c", ""])]
        hint = f"try PYTHON={found[-1]}" if found else "install one, or name it with PYTHON="
        raise SetupError(
            f"Python {version[0]}.{version[1]} cannot be used: 3.11, 3.12 or 3.13 is needed; {hint}"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            package = f"python{version[0]}.{version[1]}-venv"
            raise SetupError(
                f"{sys.executable} has no module '{module}': "
                f"install it (Debian, Ubuntu: apt-get install {package})"
            )
    free = shutil.disk_usage(str(ROOT)).free if free is None else free
    needed = NEEDED - sum(file.lstat().st_size for file in VENV.rglob("*"))  # an interrupted one goes on
    if free < needed:
        raise SetupError(
            f"{free / 1e9:.1f} GB are free on the disk of {ROOT}: the set-up needs {needed / 1e9:.1f} GB; "
            "make room or clone elsewhere"
        )


def fingerprint():
    """What an environment depends on: the two files, and the folder it was made in."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv=None):
    """The mark of a finished set-up, or {} where there is none or its interpreter has gone."""
    venv = venv or VENV
    try:
        stamp = json.loads((venv / STAMP.name).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and python_in(venv).exists() else {}


def write_stamp(venv, stamp):
    """Mark a set-up as finished, at once or not at all."""
    partial = venv / "setup.partial"
    partial.write_text(json.dumps(stamp, indent=1))
    os.replace(str(partial), str(venv / STAMP.name))


def make_venv(venv=None):
    """A virtual environment that works, kept if it is there already, made anew if it is broken or moved."""
    venv = venv or VENV
    python, config = python_in(venv), venv / "pyvenv.cfg"
    # what pip and venv write names the folder: a copied or moved one runs what is in the old place
    here = config.exists() and config.read_text(errors="replace").rstrip().endswith(f" {venv}")
    intact = here and python.exists() and _quiet([str(python), "-m", "pip", "--version"])
    if not intact and venv.is_symlink():
        raise SetupError(
            f"{venv} links to {venv.resolve()}, which is not emptied: remove the link, then try again"
        )
    if not intact and not _quiet([sys.executable, "-m", "venv", "--clear", str(venv)]):
        raise SetupError(f"{sys.executable} -m venv {venv} failed: run it yourself to see why")
    for packages in venv.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"):
        _drop_half_made(packages)


def _drop_half_made(packages):
    """Make pip see what a killed pip left unfinished as not installed: RECORD is what it writes last."""
    for info in packages.glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(str(info))
    for leftover in packages.glob("~*"):  # an old version that was being replaced
        shutil.rmtree(str(leftover)) if leftover.is_dir() else leftover.unlink()


def _quiet(command):
    try:
        silent = subprocess.DEVNULL
        return subprocess.run(command, stdout=silent, stderr=silent, close_fds=False).returncode == 0
    except OSError:
        return False


def install(*wanted):
    """pip install with the constraints; what pip says goes to the log. Returns its first error or ''."""
    return _pip(VENV, LOG, "-c", str(ROOT / "constraints.txt"), *wanted)


def _pip(venv, log_file, *wanted):
    command = [str(python_in(venv)), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--root-user-action", "ignore", "--no-warn-script-location"]
    # modules are compiled when they are first imported: most never are
    command += ["--no-compile"]
    error = unreachable = ""
    with log_file.open("a") as log:
        log.write(f"\n$ pip install {' '.join(wanted)}\n")
        with subprocess.Popen(
            command + list(wanted),
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            close_fds=False,  # the lock of `alone`
            universal_newlines=True,
            errors="replace",
        ) as pip:
            for line in pip.stdout:
                log.write(line)
                if "after connection broken" in line:  # it goes on, and may name another fault in the end
                    unreachable = "; the package index could not be reached: is there a network?"
                if not error and line.startswith("ERROR:") and "Ignored the following" not in line:
                    error = line[len("ERROR:") :].strip()
                if sys.stdout.isatty():
                    print(
                        "\r\033[K" + line.strip()[: shutil.get_terminal_size().columns - 1],
                        end="",
                        flush=True,
                    )
            if sys.stdout.isatty():
                print("\r\033[K", end="", flush=True)
    return "" if pip.returncode == 0 else (error or f"exit code {pip.returncode}") + unreachable


def install_all(peers):
    """Install the project, with the peers or without; peer -> why it could not be installed."""
    if peers:
        if not install("-e", ".[dev,peers]"):
            return {}
        print("the peers do not install together: trying one after another", flush=True)
    error = install("-e", ".[dev]")
    if error:
        raise SetupError(f"pip failed: {error} (all it said: {LOG})")
    failed = {}
    for requirement in peer_requirements() if peers else []:
        error = install(requirement)
        if error:
            failed[requirement.partition(">")[0]] = error
    return failed


def peer_requirements():
    """The extra `peers` of pyproject.toml."""
    import tomllib  # not there before Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]["peers"]


@contextlib.contextmanager
def alone():
    """Let a second set-up in the same folder wait for the first, or for the pip of one that was killed."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)  # pip holds it too, and so outlives its parent safely
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up of this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def done(stamp, peers):
    """Whether a stamp stands for what is asked for."""
    return stamp.get("fingerprint") == fingerprint() and (stamp.get("peers") or not peers)


def set_up(peers=False, again=False):
    """Do what is missing; returns the stamp."""
    stamp = read_stamp()
    if done(stamp, peers) and not (again and stamp["missing"]):
        return stamp
    with alone():
        stamp = read_stamp()  # another set-up may have finished while this one waited
        if done(stamp, peers) and not (again and stamp["missing"]):
            return stamp
        check_machine()
        peers = peers or bool(stamp.get("peers"))
        started = time.time()
        print(f"setting up {VENV}: a few minutes, about 6 GB on Linux (details: {LOG})", flush=True)
        make_venv()
        if STAMP.exists():
            STAMP.unlink()
        stamp = {"peers": peers, "missing": install_all(peers), "fingerprint": fingerprint()}
        write_stamp(VENV, stamp)
        print(f"set up in {time.time() - started:.0f} seconds", flush=True)
    return stamp


def install_nncodec():
    """Compile and install NNCodec in its environment; '' or why that cannot be."""
    if sys.version_info[:2] > (3, 12):
        return "its NumPy needs Python 3.11 or 3.12"
    if os.name != "nt" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler; Debian, Ubuntu: apt-get install g++"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        package = "python{}.{}-dev".format(*sys.version_info)
        return f"no headers of {sys.executable}; Debian, Ubuntu: apt-get install {package}"
    log = NNCODEC_VENV / LOG.name
    return _pip(NNCODEC_VENV, log, "--no-deps", *NNCODEC[:-1]) or _pip(
        NNCODEC_VENV, log, "--no-deps", "--no-build-isolation", NNCODEC[-1]
    )


def install_flower():
    """Install Flower in its environment, which looks for what it lacks in .venv; '' or why that cannot be."""
    layout = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
    ours = list(VENV.glob(layout))
    if not ours:
        return f"{VENV} is not there: run workflow/setup_env.py first"
    for packages in FLOWER_VENV.glob(layout):
        (packages / "suite.pth").write_text(f"{ours[0]}\n")
    return _pip(FLOWER_VENV, FLOWER_VENV / LOG.name, *FLOWER)


def set_up_apart(venv, wanted, install, again=False):
    """Do what is missing in the environment of a peer that has one of its own; returns its stamp."""

    def is_done(stamp):
        return stamp.get("wanted") == list(wanted) and not (again and stamp["failed"])

    if not is_done(read_stamp(venv)):
        with alone():
            if not is_done(read_stamp(venv)):
                started = time.time()
                print(f"setting up {venv}: a minute or two", flush=True)
                make_venv(venv)
                (venv / ".gitignore").write_text("*\n")
                write_stamp(venv, {"wanted": list(wanted), "failed": install()})
                print(f"set up in {time.time() - started:.0f} seconds", flush=True)
    return read_stamp(venv)


def main(arguments=None):
    """Set up .venv; every failure is one line and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also the other runtimes and libraries")
    parser.add_argument("--nncodec", action="store_true", help="only the environment of the peer NNCodec")
    parser.add_argument("--flower", action="store_true", help="only the environment of the peer Flower")
    parser.add_argument("--again", action="store_true", help="try again to install peers that failed")
    options = parser.parse_args(arguments)
    try:
        apart = "nncodec" if options.nncodec else "flower" if options.flower else ""
        if apart:
            venv = FLOWER_VENV if options.flower else NNCODEC_VENV
            made = (FLOWER, install_flower) if options.flower else (NNCODEC, install_nncodec)
            failed = set_up_apart(venv, *made, again=options.again)["failed"]
            stamp = {"missing": {apart: failed} if failed else {}}
        else:
            stamp = set_up(peers=options.peers, again=options.again)
    except (SetupError, OSError) as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the next call goes on from here", file=sys.stderr)
        return 130
    for name, why in stamp["missing"].items():
        option = f"--{apart or 'peers'}"
        print(f"not installed: {name} ({why}); `setup_env.py {option} --again` tries again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
