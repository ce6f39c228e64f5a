"""Your own images in one command: what is refused before work, what is planned, and what it ends with."""

import argparse
import functools
import json
import shutil
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import own, own_goal, own_result, parameters, publish
from bench.candidates import TECHNIQUES
from bench.committed import Tables
from bench.own_goal import Goal, GoalError, Offer
from nnc_utils import artifact, configurations, data, evaluation, export, models, provenance

ROOT = provenance.PACKAGE.parent
GOAL = Goal(points=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 20 drawn images; one of them twice, a hidden copy, and a file that is no image."""
    path = tmp_path_factory.mktemp("own") / "photos"
    random = np.random.RandomState(0)
    for label, name in enumerate(("dark", "light")):
        (path / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.randint(0, 100, (24, 20, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{number:02}.png")
    shutil.copy(path / "dark/00.png", path / "dark/again.png")
    shutil.copy(path / "dark/00.png", path / "dark/.hidden.png")
    (path / "dark/notes.txt").write_text("no image")
    return path


def options(folder, **given):
    known = {"data": str(folder), "weights": "", "model": "", "size": 16, "goal": "0.3 points", "epochs": 0.0}
    return argparse.Namespace(**known | {"out": ""} | given)


@pytest.fixture
def narrow(monkeypatch):
    """Each network is tried on a file of weights: in a sixteenth of its width that takes no seconds."""
    monkeypatch.setattr(models, "resnet", functools.partial(models.resnet, width=1 / 16))


@pytest.fixture
def asked(folder, tmp_path):
    return own.check(options(folder, out=str(tmp_path / "out")))


# --- Goals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("20x smaller", Goal(smaller=20)),
        ("10× faster", Goal(faster=10)),
        ("2.5 times Faster", Goal(faster=2.5)),
        ("0.5 points", Goal(points=0.5)),
        ("1 percentage point", Goal(points=1)),
        ("20x smaller, 3x faster and 1 pp", Goal(20, 3, 1)),
        ("20x smaller,3x faster", Goal(20, 3)),
        ("0 points", Goal(points=0)),
    ],
)
def test_a_goal_is_read(text, goal):
    assert own_goal.parse(text) == goal


@pytest.mark.parametrize(
    "text", ["", "small", "20x", "20 smaller", "1x smaller", "0.5x faster", "-1 points", "101 points"]
)
def test_what_is_no_goal_is_refused_with_how_to_write_one(text):
    with pytest.raises(GoalError, match="20x smaller|more than 1x"):
        own_goal.parse(text)
    with pytest.raises(GoalError, match="each once"):
        own_goal.parse("2x smaller, 3x smaller")


OFFERS = [
    Offer("int8", "a", 1000, 5.0, 4.0, 0.0),
    Offer("masks", "b", 400, 12.0, 1.0, 0.0),
    Offer("pipeline", "c", 200, 25.0, 8.0, 1.0),
    Offer("ruined", "d", 50, 100.0, 20.0, 40.0),
    Offer("untimed", "e", 190, 26.0, None, 3.0),
]


@pytest.mark.parametrize(
    ("goal", "name", "missed"),
    [
        (Goal(points=0.5), "masks", set()),
        (Goal(points=50), "ruined", set()),
        (Goal(smaller=20), "pipeline", set()),  # the smaller ones lose more
        (Goal(smaller=2), "masks", set()),  # of equals the smallest
        (Goal(faster=3), "int8", set()),
        (Goal(smaller=20, points=1), "pipeline", set()),
        (Goal(smaller=20, points=0.5), "pipeline", {"points"}),
        (Goal(faster=30), "ruined", {"faster"}),
        (Goal(smaller=20, faster=9, points=2), "pipeline", {"faster"}),
    ],
)
def test_the_goal_is_answered_by_the_right_network(goal, name, missed):
    offer = own_goal.best(goal, OFFERS)
    assert offer.name == name and set(own_goal.shortfalls(goal, offer)) == missed
    told = own_goal.verdict(goal, offer, 1234)
    assert name in told[0] and " on 1,234 validation images" in told[0]
    assert told[0].startswith("No network" if missed else "Chosen")
    for part in missed:
        assert own_goal.HELPS[part] in told[1]


def test_the_test_images_say_yes_no_or_how_many_would_be_needed():
    assert "say: at most 0.5" in own_goal.can_tell(0.5, -0.4, 0.4, 1000)
    assert "say: more than 0.5" in own_goal.can_tell(0.5, -3.0, -0.6, 1000)
    assert "48 test images cannot tell: at least 600" in own_goal.can_tell(0.5, -6.25, 6.25, 48)
    assert "cannot tell" in own_goal.can_tell(0, -6.25, 6.25, 48)


def test_that_the_uncompressed_network_only_guesses_is_told_first(asked):
    told = own_result.verdict(asked, OFFERS[0], 50.0)
    assert told[0].startswith("Beware: the uncompressed network is right on 50.00 %") and len(told) == 2
    assert own_result.verdict(asked, OFFERS[0], 75.0) == own_goal.verdict(asked.goal, OFFERS[0], 4)


# --- Before any work -----------------------------------------------------------------------------------


def test_what_was_found_is_told(asked):
    told = "\n".join(own.found(asked))
    images = asked.images
    assert f"2 classes; {len(images.train)} train, {len(images.validation)} validation" in told
    assert "coloured, read as 16 x 16 pixels" in told and "class light: " in told
    assert "1 in 5 of each class of train" in told and "1, no suffix of an image" in told
    assert "1, hidden" in told and "identical images: 2 files of 1" in told
    assert "ResNet-18, small stem, starts from new weights" in told and "at most 0.3 points lost" in told


def test_nothing_is_warned_of_twice(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.check(options(folder))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"goal": "tiny"}, "no goal in 'tiny'"),
        ({"model": "resnet19"}, "one of resnet18, resnet34, resnet50"),
        ({"size": "4"}, "from 8 to 1024"),
        ({"epochs": "-1"}, "at most 1000"),
        ({"data": "/nowhere"}, "no folder /nowhere"),
        ({"weights": "/nowhere.pth"}, "no weights /nowhere.pth"),
        ({"weights": __file__}, "truncated, damaged, or of another program"),
        ({"out": "DATA/out"}, "lies in the folder of images"),
        ({"out": "FULL"}, "holds files of something else"),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_what_is_wrong_is_told_before_any_work(folder, tmp_path, monkeypatch, capsys, given, says):
    def nothing(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr(subprocess, "run", nothing)
    monkeypatch.setattr(own, "estimate", nothing)
    monkeypatch.setattr(own.signal, "signal", lambda *_: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("not ours")
    words = {"data": str(folder), "size": "16", "out": str(tmp_path / "out")} | given
    words["out"] = words["out"].replace("DATA", str(folder)).replace("FULL", str(tmp_path / "full"))
    assert own.main([word for name, value in words.items() for word in (f"--{name}", value)]) == 2
    told = capsys.readouterr().err
    assert says in told and len(told.strip().splitlines()) == 1 and "Traceback" not in told
    assert not (tmp_path / "out").exists() and (tmp_path / "full/precious.txt").is_file()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.usefixtures("narrow")
def test_a_checkpoint_says_which_network_it_is_of(folder, tmp_path, wrapped):
    """Depth and stem are those that its weights fit; another number of classes starts anew, and is told."""
    stem, classes = ("small", 2) if wrapped else ("imagenet", 5)
    state = models.build(models.resnet(34, channels=3, size=32, classes=classes, stem=stem)).state_dict()
    state = {"state_dict": {f"module.{name}": value for name, value in state.items()}} if wrapped else state
    torch.save(state, tmp_path / "net.pth")
    given = options(folder, weights=str(tmp_path / "net.pth"), size=40)
    asked = own.check(given)
    assert (asked.depth, asked.stem, asked.fresh) == (34, stem, () if wrapped else ("fc",))
    assert (
        "new, since the weights have another shape there: the classifier" in str(own.found(asked))
    ) is not wrapped
    assert asked.epochs < own.check(options(folder)).epochs
    with pytest.raises(own.OwnError, match="weights of another network"):
        own.check(options(folder, weights=given.weights, model="resnet18"))
    next(iter((state["state_dict"] if wrapped else state).values())).fill_(torch.nan)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(own.OwnError, match="conv1.weight holds NaN"):  # of the depth that it fits
        own.check(given)


def test_fewer_images_get_more_epochs_within_bounds():
    few, many, most = (own.length(count, trained=False) for count in (168, 3000, 1_000_000))
    assert few == 60 > many > most == 10
    assert own.length(168, trained=True) == few / 3


# --- What is planned -----------------------------------------------------------------------------------


def test_the_notebooks_accept_what_they_get(asked):
    planned = own.notebooks(replace(asked, goal=Goal(faster=20)))
    measured = []
    for name, given in planned.items():
        notebook = ROOT / f"notebooks/{name}.ipynb"
        parameters.check(parameters.declared(notebook), given | {"profile": "own"}, notebook=name)
        mappings = given.get("configurations", []) + given.get("controls", [])
        configurations.read(mappings, *TECHNIQUES[name][1])
        measured += mappings
    timed = planned["07_deployment"]["networks"]
    assert all(network in measured for network in timed)
    assert any(c.get("macs") == 20 for c in timed)  # as many times fewer as times faster are asked
    beyond = own.notebooks(replace(asked, goal=Goal(faster=500)))["06_pipeline"]["configurations"]
    assert max(c["macs"] for c in beyond) == own.MOST_MACS  # where pruning ends, 06 would refuse


def test_runs_are_kept_below_the_folder_and_a_failure_ends_them(asked, monkeypatch):
    commands = []

    def recorded(command, **about):
        commands.append((command, json.loads(about["env"]["NNC_PLAN"])))
        return types.SimpleNamespace(returncode=int(len(commands) > 5))

    monkeypatch.setattr(subprocess, "run", recorded)
    planned = own.notebooks(asked)
    seconds = dict.fromkeys(planned, 60.0)
    folders = own.run(asked, planned, seconds)
    assert folders[0] == asked.out / "runs/01_baseline/seed=1"
    upstream = [json.loads(command[6]).get("upstream", []) for command, _ in commands]
    assert upstream[0] == [] and upstream[1] == upstream[3] == [str(folders[0])]
    assert upstream[4] == [str(folder) for folder in folders[:4]]
    assert all(command[7:10] == ["--keep", "current", "--no-lesson"] for command, _ in commands)
    assert list(commands[0][1].values()) == [60.0] * 5
    with pytest.raises(own.ResultError, match="Call the same command again"):
        own.run(asked, planned, seconds)
    assert len(commands) == 6  # what builds on a failure does not begin


def test_other_images_or_weights_measure_everything_again(asked, capsys, monkeypatch):
    monkeypatch.setattr(own.processes, "lock", lambda *_, **__: None)
    own.claim_folder(asked)
    (asked.out / "runs").mkdir()
    own.claim_folder(asked)
    assert (asked.out / "runs").is_dir() and capsys.readouterr().out == ""
    images = replace(asked.images, test=data.Split(asked.images.test.images + 1, asked.images.test.labels))
    own.claim_folder(replace(asked, images=images))
    assert not (asked.out / "runs").exists() and "measured again" in capsys.readouterr().out
    assert len(list(asked.out.glob("runs-before-*"))) == 1  # hours of work are not removed
    with pytest.raises(own.OwnError, match="is about imagefolder:"):
        own.claim_folder(replace(asked, images=replace(images, name="imagefolder:/elsewhere")))
    renamed = replace(images, classes=[name.upper() for name in images.classes])
    own.claim_folder(replace(asked, images=renamed))
    assert "measured again" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", "mine", '{"data": 1}'])
def test_a_file_of_somebody_else_is_no_mark(asked, content):
    asked.out.mkdir(parents=True)
    (asked.out / own.INPUTS).write_text(content)
    with pytest.raises(own.OwnError, match="files of something else"):
        own.claim_folder(asked)
    assert (asked.out / own.INPUTS).read_text() == content


# --- What it ends with ---------------------------------------------------------------------------------


def test_the_program_is_the_one_of_the_readme():
    program = own_result.PROGRAM.read_text(encoding="utf-8")
    assert f"```python\n{program}```" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_program_names_the_classes_of_the_artifact(trained_digits, tmp_path):
    """Beside the exported network, called from another folder, on images as files."""
    digits = data.load("digits")
    (tmp_path / "net.pte").write_text("of an earlier goal")
    told = own_result.deliver(trained_digits / "int8.safetensors", tmp_path)
    assert {"net.safetensors", "net.onnx", "net.onnx.json", "classify.py"} <= {
        f.name for f in tmp_path.iterdir()
    }
    assert any("net.pte" in line for line in told)
    if (tmp_path / "net.pte").is_file():
        assert (tmp_path / "net.pte").stat().st_size > 1000
    few = data.Split(digits.test.images[:40], digits.test.labels[:40])
    stored = artifact.load(tmp_path / "net.safetensors")
    expected = evaluation.predict(stored, few, normalize=digits.normalize)
    said = []
    for number, image in enumerate(few.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number}.png")
        said.append(own_result.classify(tmp_path / "classify.py", tmp_path / f"{number}.png"))
    assert said == [digits.classes[label] for label in expected] and len(set(said)) > 5
    command = [sys.executable, str(tmp_path / "classify.py"), str(tmp_path / "0.png")]
    alone = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    assert alone.stdout.strip() == said[0]


def test_without_a_network_for_it_there_is_no_program(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise export.ExportError("not here")

    monkeypatch.setattr(own_result.export, "export", refused)
    for name in ("net", "classify.py"):
        (tmp_path / name).write_text("of an earlier goal")
    told = own_result.deliver(tmp_path / "net", tmp_path)
    assert told[1:] == ["no net.onnx: not here", "no net.pte: not here"]
    assert not (tmp_path / "classify.py").exists()


def test_a_full_disk_is_one_line(asked, monkeypatch, capsys):
    monkeypatch.setattr(own.signal, "signal", lambda *_: None)
    for name, value in {"check": asked, "claim_folder": None, "estimate": {}}.items():
        monkeypatch.setattr(own, name, lambda *_, value=value: value)
    monkeypatch.setattr(own, "run", lambda *_: Path("/dev/full").write_text("x"))
    assert own.main(["--data", "."]) == 1
    assert capsys.readouterr().err.endswith("No space left on device\n")


def test_the_table_and_the_figure_show_what_was_measured(published, tmp_path):
    tables = Tables(published)
    points = own_result.shown(tables.summary)
    told = own_result.table(points, tables, types.SimpleNamespace(depth=18)).splitlines()
    assert told[0] == own_result.HEAD and told[0] in (ROOT / "README.md").read_text(encoding="utf-8")
    first, int8 = told[2:4]
    assert "ResNet-18, uncompressed" in first and "2.000 ms, ONNX Runtime | 1×" in first
    assert "8-bit weights, one scale a channel" in int8 and "0.500 ms, ONNX Runtime | 4.00×" in int8
    assert "cannot tell a difference below 0.75 pp" in "\n".join(told)  # of 400 images
    assert list(own_result.compressed(points)["method"]) == ["uniform"]
    sha256 = tables.rows_of(points.iloc[1])["artifact_sha256"].iloc[0]
    offer = Offer("int8", sha256, 1, 1.0, None, 0.0)
    own_result.draw(points, tables, offer, tmp_path / "figures/own.png")
    assert Image.open(tmp_path / "figures/own.png").width > 500
    assert Path(own_result.PROGRAM).is_file()


def test_it_ends_with_the_network_that_answers_the_goal(example, published, tmp_path, monkeypatch):
    """From finished runs to the report, and every file that it names; the program on the test images."""
    digits, out = data.load("digits"), tmp_path / "out"
    files = [tmp_path / f"{number}.png" for number in range(len(digits.test))]
    for file, image in zip(files, digits.test.images, strict=True):
        Image.fromarray(image[0].numpy()).save(file)
    kept = types.SimpleNamespace(files={"test": {"all": files}})
    asked = own.Asked(replace(digits, folder=kept), Goal(2, points=50), out, 18, "small", "", (), 1)
    monkeypatch.setattr(own_result, "publish", lambda runs, _, out: publish.publish(runs, "quick", out=out))
    monkeypatch.setattr(own_result, "TRIED", 20)
    absent = {"executorch": "not here"}  # which compiles for seconds
    monkeypatch.setattr(export.runtimes, "available", lambda name, *_: absent.get(name, ""))
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    text = own_result.write(asked, example.folders)
    assert {file: file.read_bytes() for file in before} == before  # committed results stay
    assert (out / "report.md").read_text(encoding="utf-8").strip() == text
    assert "Chosen on 200 validation images: 8-bit weights, one scale a channel (" in text
    assert "The 400 test images say: at most 50 points are lost." in text
    assert "names the table's class on 20 of 20 test images" in text
    assert "`net.onnx` for ONNX Runtime" in text and ": not here (workflow" in text
    sha256 = json.loads((out / "net.onnx.json").read_text())["artifact_sha256"]
    assert (
        sha256
        == artifact.read(out / "net.safetensors").sha256
        == example.scores["02_quantization", 1]["sha256"]
    )
    assert (out / "figures/own.png").is_file() and (out / "classify.py").is_file()
