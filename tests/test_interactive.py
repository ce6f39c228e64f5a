"""An open notebook: a misspelt parameter of papermill's, cells run twice, parameters changed in between."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from small_networks import PLAIN

from bench import folder, interactive
from bench.parameters import ParameterError
from nnc_utils import data, models, training

INJECTED = "# Parameters\nepoch = 2\nseed = 3\n"
VALUES = {"seconds": 0.0, "profile": "smoke", "seed": 3, "run_dir": ""}


def test_what_papermill_has_set_is_the_last_such_cell():
    cells = [
        "",
        "# Parameters are nice\nmine = 1",
        INJECTED,
        "# Parameters\nlr = [1]\nPAPERMILL_X = 1\n",
        "y = 1",
    ]
    assert interactive.injected({"In": cells, "lr": [1], "epoch": 2, "y": 1, "PAPERMILL_X": 1}) == {"lr": [1]}
    assert interactive.injected({"x": 1}) == interactive.injected({"In": ["", "x = 1"], "x": 1}) == {}


def test_an_injected_parameter_that_nobody_declares_is_refused_with_the_nearest(place):
    place.notebook("n")
    with pytest.raises(ParameterError, match="no parameter 'sed'. Did you mean 'seed'"):
        folder.start("n", VALUES | {"In": ["", "# Parameters\nsed = 3\n"], "sed": 3})
    assert not (place.root / "results").exists()
    reader = {"In": ["", INJECTED.replace("epoch = 2\n", ""), "sed = 4"], "sed": 4}  # a reader's own cell
    assert folder.start("n", VALUES | reader).seed == 3


def test_plain_papermill_refuses_a_misspelt_parameter(place):
    start = "from bench.folder import start\nrun = start('n', globals())"
    path = place.notebook("n", start, "run.finish()")
    command = [sys.executable, "-m", "papermill", str(path), str(place.root / "out.ipynb")]
    command += ["-p", "secnods", "2"]
    done = subprocess.run(command, env=folder.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Did you mean 'seconds'" in done.stderr
    assert not list(place.root.rglob("result.json"))


def test_parameters_that_have_changed_since_the_setup_cell_are_told_once(capsys):
    began = {"epochs": 8.0, "seed": 1, "upstream": ["a"]}
    said = interactive.tell_changes(began, {"epochs": 8, "seed": 1, "upstream": ["/x/a"], "other": 2})
    assert said == capsys.readouterr().out == ""
    said = interactive.tell_changes(began, {"epochs": 3, "seed": 1})
    assert (
        capsys.readouterr().out
        == said + "\n"
        == ("epochs is 3 now, not 8.0: run the setup cell again to use that\n")
    )
    interactive.tell_changes(began, {"epochs": 3, "seed": 1}, said)
    assert capsys.readouterr().out == ""


def network():
    torch.manual_seed(0)
    return models.build(PLAIN)


def test_a_training_cell_runs_again_whatever_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NNC_HEADLESS", raising=False)
    digits, checkpoint = data.load("digits"), tmp_path / "checkpoint_train.pt"
    few = data.Split(digits.train.images[:256], digits.train.labels[:256])  # two steps an epoch
    digits = dataclasses.replace(digits, train=few)
    options = {"checkpoint": checkpoint, "learning_rate": 0.1, "augment": False}
    model = network()
    first = interactive.fit(model, digits, epochs=1.0, **options)
    assert interactive.fit(network(), digits, epochs=1.0, **options) == first  # as a stopped run goes on
    assert "replaced" not in capsys.readouterr().out
    for again, epochs, why in (
        (network(), 0.5, "epochs is 1.0 there and 0.5 here"),
        (model, 0.5, "starting network is"),  # the cell once more: it is trained on
    ):
        start = [tensor.clone() for tensor in again.state_dict().values()]
        history = interactive.fit(again, digits, epochs=epochs, **options)
        said = [line for line in capsys.readouterr().out.splitlines() if "replaced" in line]
        assert len(said) == 1 and said[0].startswith("checkpoint_train.pt was a checkpoint of another call")
        assert why in said[0] and len(history) == 1
        assert any(not torch.equal(a, b) for a, b in zip(start, again.state_dict().values()))
    checkpoint.write_text("no checkpoint")
    interactive.fit(network(), digits, epochs=0.5, **options)
    assert "no checkpoint of training" in capsys.readouterr().out
    monkeypatch.setenv("NNC_HEADLESS", "1")
    with pytest.raises(training.TrainingError, match="a checkpoint of another call"):
        interactive.fit(network(), digits, epochs=1.0, **options)
    monkeypatch.delenv("NNC_HEADLESS")
    with pytest.raises(training.TrainingError, match="not finite"):  # another error stays one
        interactive.fit(network(), digits, epochs=1.0, **options | {"learning_rate": 1e30})
