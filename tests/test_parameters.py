"""Declarations of parameters are read as written, and hold."""

import pytest
import yaml

from bench.parameters import ParameterError, check, declared, parse

CELL = """
# a comment of its own
epochs: int = 8  # [1, 500] passes over the training images
learning_rate: float = 0.1  # (0, 10] peak = highest
dataset: str = "digits"  # {digits, fashion_mnist, imagefolder:PATH} name
model: str = "any"  # {small, ...} examples only
augment: bool = True  # flips # and crops
bits: list = [8, 4]  # [2, 16] bits a weight
points: list[str] = ["per_channel:8"]  # {per_channel:8, per_tensor:8} method:bits
upstream: list = []  # run folders
configurations: list = [
    {"method": "kmeans", "bits": 3},  # one of 2, 3
]
# --- below: the runner's
depth: int = 18  # {18, 50} layers
offset: float = -1  # no range
batch: int = 0  # 0 or [2, 64] images a step
"""
DECLARED = parse(CELL)


def test_what_is_declared():
    names = (
        "epochs learning_rate dataset model augment bits points upstream configurations depth offset batch"
    )
    assert list(DECLARED) == names.split()
    assert DECLARED["epochs"].help == "passes over the training images"
    assert DECLARED["learning_rate"].help == "peak = highest"
    assert {
        name: DECLARED[name].allowed
        for name in ("epochs", "learning_rate", "depth", "model", "bits", "batch")
    } == {
        "epochs": "a whole number in [1, 500]",
        "learning_rate": "a number in (0, 10]",
        "depth": "a whole number, one of 18, 50",
        "model": "a text",
        "bits": "a list (a whole number each) in [2, 16]",
        "batch": "0 or a whole number in [2, 64]",
    }
    assert DECLARED["batch"].help == "images a step"
    assert DECLARED["augment"].help == "flips # and crops"
    assert DECLARED["bits"].default == [8, 4] and DECLARED["offset"].default == -1


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 1},
        {"epochs": 500},
        {"learning_rate": 1},
        {"learning_rate": 10.0},
        {"dataset": "imagefolder:/some/where"},
        {"model": "other"},
        {"augment": False},
        {"bits": []},
        {"bits": [2, 16]},
        {"points": ["per_tensor:8"]},
        {"upstream": ["results/runs/quick/01_baseline/seed=1"]},
        {"configurations": [{"method": "uniform"}, {"method": "qat", "of": {"bits": 2}}]},
        {"depth": 50},
        {"batch": 0},
        {"batch": 2},
    ],
)
def test_values_that_agree(given):
    assert check(DECLARED, given, notebook="n") == given
    for name, value in check(DECLARED, given, notebook="n").items():
        assert not isinstance(value, int) or name != "learning_rate"  # 1 becomes 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "Did you mean 'epochs'"),
        ({"zzz": 3}, "no parameter 'zzz'. It has: epochs"),
        ({"epochs": 0}, r"epochs is 0: a whole number in \[1, 500\] is needed"),
        ({"epochs": 501}, "epochs is 501"),
        ({"epochs": "8"}, "epochs is '8'"),
        ({"epochs": 8.0}, "epochs is 8.0"),
        ({"epochs": True}, "epochs is True"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": "1e-3"}, r"learning_rate is '1e-3'.*\(YAML reads that as text: write 0.001\)"),
        ({"learning_rate": "1e-7"}, r"write 1.0e-07\)"),
        ({"learning_rate": "fast"}, "a number in .* is needed$"),
        ({"dataset": 1}, r"dataset is 1: .*\(with papermill: -r dataset 1\)"),
        ({"upstream": "mine/1"}, r"\(with papermill: -y 'upstream: \[mine/1\]'\)"),
        ({"batch": 1}, r"batch is 1: 0 or a whole number in \[2, 64\] is needed"),
        ({"batch": 65}, "batch is 65"),
        ({"batch": False}, "batch is False"),
        ({"offset": float("nan")}, "offset is nan"),
        ({"dataset": "cifar11"}, "one of digits, fashion_mnist, imagefolder:PATH"),
        ({"dataset": "imagefolder:"}, "dataset is"),
        ({"augment": "false"}, "augment is 'false': True or False"),
        ({"augment": 1}, "augment is 1"),
        ({"bits": [8, 1]}, "bits is"),
        ({"bits": [8, 4.5]}, "bits is"),
        ({"bits": 8}, r"a list \(a whole number each\)"),
        ({"bits": "84"}, "bits is '84'"),
        ({"configurations": {"method": "uniform"}}, "configurations is .*a list"),
        ({"depth": 34}, "depth is 34"),
    ],
)
def test_values_that_do_not(given, message):
    with pytest.raises(ParameterError, match=message):
        check(DECLARED, given, notebook="n")


def test_the_spelling_that_is_told_is_a_number_to_yaml():
    for text in ("1e-7", "3e-10", "2E5", "1e20"):
        with pytest.raises(ParameterError) as told:
            DECLARED["offset"].check(text)
        written = str(told.value).rpartition("write ")[2].rstrip(")")
        assert isinstance(yaml.safe_load(text), str) and yaml.safe_load(written) == float(text)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ParameterError) as caught:
        check(DECLARED, {"epochs": 0, "depht": 18, "augment": 3}, notebook="01_baseline")
    assert all(word in str(caught.value) for word in ("01_baseline", "epochs", "'depth'", "augment"))


@pytest.mark.parametrize(
    "line",
    [
        "epochs = 8",
        "epochs: int = 4 + 4",
        "epochs: int",
        "epochs: int | None = None",
        "import math",
        "epochs: int = 0  # [1, 5] default out of range",
        'epochs: int = "8"',
        "size: tuple = (1, 2)",
        "epochs: int = (8",
    ],
)
def test_what_is_no_declaration(line):
    with pytest.raises(ParameterError, match="cell"):
        parse(line)


def test_a_notebook_needs_one_parameters_cell(place):
    assert list(declared(place.notebook("one"))) == ["seconds", "profile", "seed", "run_dir"]
    path = place.notebook("two")
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ParameterError, match="0 cells tagged"):
        declared(path)
