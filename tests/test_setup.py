"""The set-up: the files that say what is installed agree, and setup_env.py survives what users do to it."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "workflow" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


freeze, setup_env = load("freeze"), load("setup_env")


# --- The files agree ------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {}
    for requirement in requirements:
        [specifier] = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is no exact pin"
        assert canonicalize_name(requirement.name) not in found, f"{requirement} is there twice"
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)])
def test_every_requirement_is_pinned_within_its_bounds(text):
    requirement = Requirement(text)
    assert requirement.specifier, f"{text} has no floor"
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)], prereleases=True)


def test_what_the_pinned_packages_need_is_pinned_too():
    """Walk the installed packages from the project's requirements, as pip does."""
    pinned, seen = pins(), set()
    queue = [Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["peers"]]]
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, *extras) not in seen:
            seen.add((name, *extras))
            assert name in pinned, f"{requirement} is needed but not pinned: run `make constraints`"
            assert requirement.specifier.contains(pinned[name], prereleases=True), (
                f"{requirement}: {pinned[name]}"
            )
            with contextlib.suppress(metadata.PackageNotFoundError):  # a peer that is not installed here
                needs = map(Requirement, metadata.requires(name) or [])
                queue += [
                    n for n in needs if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)
                ]
    assert len(seen) > 100


def test_the_environment_that_runs_this_has_the_pins_and_they_suit_every_patch_release():
    """Debian 12 has 3.11.2: a pin that needs 3.11.5 breaks the set-up there."""
    pinned, unfit = pins(), []
    for text in [*PROJECT["dependencies"], *EXTRAS["dev"]]:
        name = Requirement(text).name
        installed = Version(metadata.version(name)).public
        assert installed == str(pinned[canonicalize_name(name)]), f"{name}: run workflow/setup_env.py again"
    for package in metadata.distributions():
        needs = SpecifierSet(package.metadata.get("Requires-Python") or "")
        if pinned.get(canonicalize_name(package.name)) == Version(package.version):
            firsts = [f"3.{m}.0" for m in range(setup_env.OLDEST[1], setup_env.NEWEST[1] + 1)]
            unfit += [f"{package.name}=={package.version} needs {needs}" for v in firsts if v not in needs]
    assert not unfit


def test_conda_users_get_the_same_two_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [python] = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])
    [through_pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert through_pip == ["-c constraints.txt", "-e .[dev,peers]"]
    assert "pip" in environment["dependencies"], "conda warns without it"


def test_the_same_pythons_everywhere():
    allowed = SpecifierSet(PROJECT["requires-python"])
    versions = [v for minor in range(20) if (v := f"3.{minor}") in allowed]
    assert versions == [f"3.{m}" for m in range(setup_env.OLDEST[1], setup_env.NEWEST[1] + 1)]
    named = f"{versions[0]}, {versions[1]} or {versions[2]}"
    assert named in (ROOT / "Makefile").read_text() and named in (ROOT / "workflow/setup_env.py").read_text()


def test_committed_files_name_no_machine():
    for name in ("constraints.txt", "pyproject.toml", "environment.yml", "Makefile", "workflow/setup_env.py"):
        text = (ROOT / name).read_text()
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|opt|Users)/|@ file:|https?://", text), name


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def commands(markdown: str) -> list[str]:
    """The lines of the code blocks that start a program of the repository."""
    blocks = re.findall(r"^```(?:sh|bash|console|)\n(.*?)^```", markdown, re.M | re.S)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|python\d?|py|\S*[/\\](python|papermill))\b", line)]


def missing(command: str) -> list[str]:
    """What a command of the README names and the repository has not."""
    words = command.partition("#")[0].split()
    if words[0] == "make":
        return [w for w in words[1:2] if w not in makefile_targets()]
    if "-m" in words and (module := words[words.index("-m") + 1]).startswith("nnc_utils"):
        path = ROOT / module.replace(".", "/")
        return [] if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() else [module]
    paths = [w.replace("\\", "/") for w in words[1:]]
    return [p for p in paths if re.match(r"(workflow|notebooks|tests)\b", p) and not (ROOT / p).exists()]


def test_the_readmes_commands_name_what_is_there():
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"make benchmark", "make test"} <= {c.partition("#")[0].strip() for c in shown}
    for part in ("workflow/setup_env.py", "-m bench benchmark", "-m pytest"):
        assert any(part in command for command in shown if not command.startswith("make")), f"no-make {part}"
    assert {c: missing(c) for c in shown if missing(c)} == {}
    for command in ("make nothing", "python workflow/nothing.py", ".venv/bin/python -m nnc_utils.nothing"):
        assert commands(f"```\n{command}\n```") == [command] and missing(command)


# --- Make's own lines -----------------------------------------------------------------------------------


def make(*arguments, cwd=ROOT):
    if shutil.which("make") is None:
        pytest.skip("make is not on this machine")
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_make_says_in_one_line_what_is_wrong_and_what_there_is():
    done = make("test", "PYTHON=no-such-python")
    assert done.returncode and "no 'no-such-python' here" in done.stderr and "Traceback" not in done.stderr
    done = make("benchmark", "PROFILE=fast")
    assert done.returncode and "one of cifar federated full headline medium" in done.stderr
    for file in (ROOT / "workflow/profiles").glob("*.yaml"):
        assert not make("profile", f"PROFILE={file.stem}").returncode, file
    listed = make("help").stdout
    assert all(t in listed for t in makefile_targets() - {"python", "profile"})


@pytest.mark.parametrize(
    ("arguments", "expected", "absent"),
    [
        ([], "benchmark --profile quick --cores all", "--rerun"),
        (["PROFILE=smoke", "CORES=1"], "benchmark --profile smoke --cores 1", "nnc_utils.data"),
        (["PROFILE=full", "RERUN=stale"], "--rerun stale", "--only"),
        (["PROFILE=full", "ONLY=*/seed=2* 01_*"], "--only */seed=2* 01_*", "smoke"),
        (["PROFILE=cifar"], "nnc_utils.data cifar10", "fashion_mnist"),
    ],
)
def test_make_hands_its_variables_on(arguments, expected, absent):
    planned = make("--dry-run", "benchmark", *arguments).stdout
    assert "setup_env.py --peers" in planned
    assert ("setup_env.py --nncodec" in planned) == ("PROFILE=smoke" not in arguments), "it takes its time"
    planned = planned[planned.index("setup_env.py --peers") :]
    assert expected in planned and absent not in planned


def test_make_hands_on_what_your_own_images_take(monkeypatch):
    given = ["DATA=/my images", "WEIGHTS=/a.pth", "MODEL=resnet34", "SIZE=96", "GOAL=20x smaller"]
    planned = make("--dry-run", "benchmark", *given).stdout
    options = "--weights '/a.pth' --model 'resnet34' --size '96' --goal '20x smaller'"
    assert f"own --data '/my images' {options}" in planned and "bench benchmark" not in planned
    assert r"--data '/Bob'\''s'" in make("--dry-run", "benchmark", "DATA=/Bob's").stdout
    for name, value in {"DATA": "/data", "MODEL": "gpt2"}.items():  # as clusters have them
        monkeypatch.setenv(name, value)
    planned = make("--dry-run", "benchmark").stdout
    assert "bench benchmark --profile quick" in planned and "bench own" not in planned


def test_make_clean_says_what_goes_and_keeps_the_rest(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["data/a", ".venv/lib/__pycache__/a", "results/quick/summary.csv"]
    gone = ["results/runs/quick/a", "results/smoke/a", ".pytest_cache/a", "nnc_utils/__pycache__/a"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    said = make("clean", cwd=tmp_path).stdout
    assert "removing results/runs" in said and "kept .venv, data" in said
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)


# --- setup_env.py ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A real new environment, made once; the tests get copies of it."""
    venv = tmp_path_factory.mktemp("fresh") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv


@pytest.fixture
def clone(fresh, tmp_path, monkeypatch):
    """An empty clone, what pip was asked to install in it, and what it shall refuse."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    place = types.SimpleNamespace(folder=tmp_path, asked=[], refused=[])
    really, venv = setup_env._quiet, tmp_path / ".venv"

    def install(*wanted):
        place.asked.append(wanted[-1])
        return next((f"no {part}" for part in place.refused if part in wanted[-1]), "")

    def pip(venv, log, *wanted):
        return install(" ".join(wanted))

    def quiet(command):
        if command[1:3] != ["-m", "venv"]:
            return really(command)
        shutil.rmtree(command[-1], ignore_errors=True)
        shutil.copytree(fresh, command[-1], symlinks=True)
        config = Path(command[-1]) / "pyvenv.cfg"
        config.write_text(config.read_text().replace(str(fresh), command[-1]))
        return True

    changed = {"_quiet": quiet, "install": install, "_pip": pip, "ROOT": tmp_path, "VENV": venv, "NEEDED": 0}
    changed |= {"STAMP": venv / "setup.json", "LOG": venv / "setup.log"}
    changed |= {f"{peer.upper()}_VENV": tmp_path / f".venv-{peer}" for peer in ("nncodec", "flower")}
    for name, value in changed.items():
        monkeypatch.setattr(setup_env, name, value)
    return place


def test_everything_is_installed_once_and_again_when_a_file_changes(clone):
    assert setup_env.main([]) == setup_env.main([]) == 0
    assert clone.asked == [".[dev]"]
    assert setup_env.main(["--peers"]) == setup_env.main(["--peers"]) == setup_env.main([]) == 0
    assert clone.asked == [".[dev]", ".[dev,peers]"]
    for name in ("pyproject.toml", "constraints.txt"):
        with (clone.folder / name).open("a") as file:
            file.write("\n")
        clone.asked.clear()
        assert setup_env.main([]) == 0
        assert clone.asked == [".[dev,peers]"], "peers that were there stay up to date"


def test_a_peer_that_cannot_be_installed_is_reported_and_the_rest_goes_on(clone, capsys):
    clone.refused += ["peers]", "nncf"]
    assert setup_env.main(["--peers"]) == 0
    assert clone.asked == [".[dev,peers]", ".[dev]", *EXTRAS["peers"]]
    assert "not installed: nncf (no nncf)" in capsys.readouterr().out
    clone.asked.clear()
    assert setup_env.main(["--peers"]) == 0 and not clone.asked
    assert "not installed: nncf" in capsys.readouterr().out, "said again, not tried again"
    clone.refused.clear()
    assert setup_env.main(["--peers", "--again"]) == 0 and clone.asked == [".[dev,peers]"]
    assert "not installed" not in capsys.readouterr().out


def test_a_failure_or_a_killed_set_up_is_not_taken_as_done(clone, capsys):
    clone.refused.append("dev")
    assert setup_env.main([]) == 1
    assert re.fullmatch(r"set-up: pip failed: no dev \(all it said: .*\)\n", capsys.readouterr().err)
    assert not setup_env.STAMP.exists()  # as where it is killed before the last step
    clone.refused.clear()
    [packages] = setup_env.VENV.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages")
    for name, files in (("half", ["METADATA"]), ("whole", ["METADATA", "RECORD"])):
        (packages / f"{name}-1.dist-info").mkdir()
        for file in files:
            (packages / f"{name}-1.dist-info" / file).touch()
    (packages / "~alf").mkdir()
    assert setup_env.main([]) == 0 and len(clone.asked) == 2 and setup_env.STAMP.exists()
    names = {p.name for p in packages.iterdir()}
    assert "whole-1.dist-info" in names and not names & {"half-1.dist-info", "~alf"}


@pytest.mark.parametrize("damage", ["no interpreter", "no pip", "moved", "no stamp's sense"])
def test_a_broken_environment_is_made_anew(clone, damage):
    setup_env.main([])
    mark, python = setup_env.VENV / "from the first", setup_env.python_in(setup_env.VENV)
    mark.touch()
    if damage == "no interpreter":
        python.unlink()
    elif damage == "no pip":
        for pip in setup_env.VENV.rglob("site-packages/pip"):
            shutil.rmtree(pip)
        setup_env.STAMP.unlink()
    elif damage == "moved":
        setup_env.STAMP.write_text(setup_env.STAMP.read_text().replace(setup_env.fingerprint(), "elsewhere"))
        config = setup_env.VENV / "pyvenv.cfg"
        config.write_text(config.read_text().replace(str(setup_env.VENV), "/elsewhere/.venv"))
    else:
        setup_env.STAMP.write_text("[1, ")
    assert setup_env.main([]) == 0 and len(clone.asked) == 2
    assert mark.exists() == (damage == "no stamp's sense"), "what is whole is kept"
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_what_a_link_leads_to_is_not_emptied(clone, tmp_path, capsys):
    """The environment of another clone says that it stands there, which looks moved from here."""
    others = tmp_path / "other/.venv"
    others.mkdir(parents=True)
    (others / "pyvenv.cfg").touch()
    setup_env.VENV.symlink_to(others)
    assert setup_env.main([]) == 1 and "remove the link" in capsys.readouterr().err
    assert (others / "pyvenv.cfg").exists() and not clone.asked


def test_too_little_disk_an_old_python_and_no_venv_module_are_one_line_each(clone, monkeypatch, capsys):
    def refused(message):
        assert setup_env.main([]) == 1 and re.fullmatch(f"set-up: {message}\n", capsys.readouterr().err)

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "NEEDED", 10**18)
        refused(r"[\d.]+ GB are free .* make room or clone elsewhere")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "ensurepip" else find(n, *a))
    refused(r".* has no module 'ensurepip': .*apt-get install python3.*-venv\)")
    for version in ((3, 10, 1), (3, 14, 0)):
        monkeypatch.setattr(sys, "version_info", version)
        refused(r"Python 3\.1[04] cannot be used: .* is needed; .*")
    assert not setup_env.VENV.exists() and not clone.asked


def test_nncodec_gets_an_environment_of_its_own(clone, capsys, monkeypatch):
    def said(*options, version=(3, 11, 2)):
        monkeypatch.setattr(setup_env.sys, "version_info", version)
        assert setup_env.main(["--nncodec", *options]) == 0
        return capsys.readouterr().out

    assert "its NumPy needs Python 3.11 or 3.12" in said(version=(3, 13, 1))
    with monkeypatch.context() as patch:
        patch.setattr(setup_env.shutil, "which", lambda name: None)
        assert os.name == "nt" or "no C++ compiler; Debian, Ubuntu: apt-get install g++" in said("--again")
    assert not clone.asked
    clone.refused.append("nncodec")
    for options in (["--again"], []):
        assert "not installed: nncodec (no nncodec); `setup_env.py --nncodec --again`" in said(*options)
    *tools, codec = setup_env.NNCODEC
    once = [f"--no-deps {' '.join(tools)}", f"--no-deps --no-build-isolation {codec}"]
    assert clone.asked == once and all("==" in package for package in setup_env.NNCODEC)
    clone.refused.clear()
    assert "not installed" not in said("--again") + said("--again")
    assert clone.asked == 2 * once
    assert (clone.folder / ".venv-nncodec" / ".gitignore").read_text() == "*\n"
    assert not setup_env.VENV.exists()


def test_flower_gets_an_environment_of_its_own_that_takes_torch_from_the_first(clone, capsys):
    def said(*options):
        assert setup_env.main(["--flower", *options]) == 0
        return capsys.readouterr().out

    assert f"not installed: flower ({setup_env.VENV} is not there: run workflow/setup_env.py first)" in said()
    assert setup_env.main([]) == 0
    assert "not installed" not in said("--again") + said()
    assert clone.asked == [".[dev]", *setup_env.FLOWER]
    [paths] = setup_env.FLOWER_VENV.rglob("suite.pth")
    assert Path(paths.read_text().strip()).is_relative_to(setup_env.VENV)


def test_freezing_gives_what_pip_says_and_keeps_other_systems_pins(tmp_path, monkeypatch):
    # a compiler that ran in this process may have imported setuptools, which puts what it brings along there
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "_vendor" not in place])
    target = tmp_path / "constraints.txt"
    target.write_text("# old\nonly-on-windows==1.5\nnumpy==0.1\nnnc-utils==9\n")
    count = freeze.write_pins(target)
    command = [sys.executable, "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    installed = {canonicalize_name(p["name"]): p["version"].partition("+")[0] for p in listed}
    needs = {name: metadata.metadata(name)["Requires-Python"] or "" for name in installed}
    expected = {  # a version that refuses an early Python is not taken
        name: version for name, version in installed.items() if Version("3.11.0") in SpecifierSet(needs[name])
    }
    written = freeze.read_pins(target)
    assert written == {"only-on-windows": "1.5"} | {
        name: version for name, version in expected.items() if name not in ("pip", "nnc-utils")
    }
    assert count == len(written) and list(written) == sorted(written)


def test_pip_without_a_network_says_so_whatever_it_says_last(tmp_path, monkeypatch):
    pip = tmp_path / "pip"
    pip.write_text(
        "#!/bin/sh\necho 'Retrying after connection broken by ...'\necho 'ERROR: versions conflict'\nexit 1\n"
    )
    pip.chmod(0o755)
    monkeypatch.setattr(setup_env, "python_in", lambda venv: pip)
    said = setup_env._pip(tmp_path, tmp_path / "log", "torch")
    assert said == "versions conflict; the package index could not be reached: is there a network?"
