"""What the suite stands: harm is noticed by what counts it; mutants; the page shows what was counted."""

import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from nnc_utils import artifact, provenance

ROOT = provenance.PACKAGE.parent
sys.path.insert(0, str(ROOT / "workflow"))
import mutants  # noqa: E402
import reliability  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return mutants.originals(tmp_path_factory.mktemp("originals"))


def test_1000_mutants(files, tmp_path):
    """Each is refused, or what its file says; none crashes, hangs, or takes memory."""
    mutants.read_all(tmp_path, 1000, time.time() + 60)
    count = mutants.Count(tmp_path, "mutants")
    assert count["tried"] == count["stood"] == 1000
    assert count["refused"] > 800 and count["read"] > 20
    mutants.read_all(tmp_path, 1001, time.time() + 60)  # goes on where it was
    assert mutants.Count(tmp_path, "mutants")["stood"] == 1001


def test_a_mutant_is_made_of_its_number(files):
    first, second = ([mutants.mutant(number, files)[0] for number in range(64)] for _ in range(2))
    assert first == second and len(set(first)) > 60 and not set(first) & set(files)


def test_outcomes_are_told_apart(files, tmp_path, monkeypatch):
    place, damaged, forged = tmp_path / "file", 0, mutants.HARMS.index("entry")
    whole = artifact.read

    def told(number, result):
        def read(path):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(artifact, "read", read)
        return mutants.outcome(number, files, place)

    assert told(0, artifact.ArtifactError(f"{place}: short")) == "refused"
    for words in ("without a name", f"{place}: {'9' * 2000}"):
        assert told(0, artifact.ArtifactError(words)) == "unclear"
    assert told(0, KeyError("spec")) == "unclear"
    assert told(0, artifact.ArtifactError(f"{place}: MemoryError()")) == "too_much_memory"
    other = next(file for file in files if file != mutants.mutant(damaged, files)[1])
    place.write_bytes(other)
    good = whole(place)
    for number in (damaged, forged):  # the network of another file
        assert told(number, good) == "wrong"
    assert mutants.holds(good, other)
    fewer = SimpleNamespace(**vars(good) | {"classes": good.classes[1:]})
    assert not mutants.holds(fewer, other)


def test_a_crash_and_a_hang_cost_their_mutant_only(files, tmp_path, monkeypatch):
    def outcome(number, *_):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            time.sleep(60)
        return "refused"

    monkeypatch.setattr(mutants, "outcome", outcome)
    monkeypatch.setattr(mutants, "HANG", 0.3)
    mutants.read_all(tmp_path, 10, time.time() + 60)
    count = mutants.Count(tmp_path, "mutants")
    assert (count["tried"], count["stood"], count["crashed"], count["hung"]) == (10, 8, 1, 1)


RUN = """
import os, pathlib, sys, time
place = pathlib.Path("results/runs/smoke/01/seed=1/result.json")
place.parent.mkdir(parents=True, exist_ok=True)
if not place.exists() or {again}:
    place.write_text(str(time.time()))
time.sleep(0.4)
pathlib.Path("results/table").write_text("{table}")
"""


@pytest.mark.parametrize(
    ("again", "table", "clear", "stood"),
    [(0, "same", True, 4), (1, "same", True, 0), (0, "other", True, 0), (0, "same", False, 0)],
)
def test_what_a_disturbed_run_does_wrong_is_counted(tmp_path, monkeypatch, again, table, clear, stood):
    def start(root, *command, **_):
        return subprocess.Popen([sys.executable, "-c", RUN.format(again=again, table=table)], cwd=root)

    def harm(root, process, chance):
        reliability.kill(root, process, chance)
        return clear

    monkeypatch.setattr(reliability, "start", start)
    monkeypatch.setattr(reliability, "SETTLE", 0)
    monkeypatch.setattr(reliability, "undisturbed", lambda out: ("same", 1.0))
    monkeypatch.setattr(reliability, "tables", lambda root: (root / "results/table").read_text())
    chance = random.Random(1)
    monkeypatch.setattr(reliability.random, "Random", lambda: chance)
    reliability.disturb(tmp_path, tmp_path / "clone", "kills", harm, 4, time.time() + 60)
    count = mutants.Count(tmp_path, "kills")
    assert (count["tried"], count["stood"]) == (4, stood)
    assert bool(count["stages_run_again"]) == bool(again)


def test_the_page_shows_what_was_counted_and_all_of_it_stood():
    table = pd.read_csv(ROOT / "docs/reliability.csv")
    assert list(table["part"]) == list(reliability.PARTS)
    assert (table["tried"] == table["stood"]).all() and table["tried"].sum() > 10_000
    assert reliability.shown(table) in (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
