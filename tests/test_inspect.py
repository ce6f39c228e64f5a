"""inspect.py: what it prints, against numbers computed from the network and the file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_networks import affine, codebook
from torch.nn.utils import parametrize

from nnc_utils import artifact, encoding, inspect, models
from nnc_utils.encoding import UniformWeight, ZeroMask

OTHERS = {
    "layer2.0.conv1": ("codebook of 9", lambda w: codebook(w, levels=9)),
    "layer2.0.conv2": ("codebook of 16, mask", lambda w: codebook(w, levels=16, mask=w > 0)),
    "layer3.0.conv1": ("6-bit affine, scale per channel", lambda w: affine(w, bits=6)),
    "layer3.0.conv2": ("2-bit affine, scale per tensor", lambda w: affine(w, bits=2, per_channel=False)),
}


@pytest.fixture(scope="module")
def model():
    """A narrow ResNet-18: 4-bit, 8-bit and other layers, floats in the classifier, activation ranges."""
    torch.manual_seed(0)
    model = models.build(models.resnet(18, channels=3, size=16, classes=3, stem="small", width=0.125))
    for layer in models.layers(model.spec):
        module = model.get_submodule(layer.name)
        peak = module.weight.detach().abs().amax()
        if layer.name == "layer1.0.conv1":
            mask = torch.rand_like(module.weight) < 0.25
            parametrize.register_parametrization(module, "weight", ZeroMask(mask))
        if layer.name in OTHERS:
            encoding.attach(module, OTHERS[layer.name][1](module.weight))
        elif layer.name == "conv1":
            scale = peak.expand(layer.out_channels) / 127
            parametrize.register_parametrization(module, "weight", UniformWeight(scale, bits=8))
        elif layer.kind == "conv":
            parametrize.register_parametrization(module, "weight", UniformWeight(peak / 7, bits=4))
    for place in models.activations(model).values():
        place.scale, place.zero_point = 0.25, 7
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "file.safetensors"
    classes = ["shirt", "pull\nover", "\x1b[31mcoat"]
    return path, artifact.save(model, path, mean=[0.1, 0.2, 0.3], std=[0.5] * 3, classes=classes)


@pytest.fixture(scope="module")
def text(saved):
    return inspect.describe(saved[1])


def rows(text):
    """First column -> the other columns."""
    lines = text.split("\n\n")[1].splitlines()
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert tuple(cells[0]) == inspect.COLUMNS
    return {name: rest for name, *rest in cells[2:]}


def number(cell):
    return int(cell.replace(",", ""))


def test_bytes_add_up_to_the_file(saved, text):
    found = rows(text)
    assert sum(number(row[-2]) for row in found.values()) == saved[0].stat().st_size
    assert sum(float(row[-1].rstrip("%")) for row in found.values()) == pytest.approx(100, abs=2)
    header = int.from_bytes(saved[0].read_bytes()[:8], "little") + 8
    assert number(found["header"][0]) == header


def test_each_layer(model, text):
    found = rows(text)
    for layer in models.layers(model.spec):
        weight = model.get_submodule(layer.name).weight.detach()
        shape, kind, bits, zeros, size, _ = found[layer.name]
        assert shape == "x".join(map(str, weight.shape))
        assert float(zeros.rstrip("%")) == pytest.approx(100 * float((weight == 0).float().mean()), abs=0.051)
        assert float(bits) == pytest.approx(8 * number(size) / weight.numel(), abs=0.001)
        expected = {"conv1": "8-bit, scale per channel", "fc": "float32"}
        expected |= {"layer1.0.conv1": "4-bit, scale per tensor, mask"}
        expected |= {name: text for name, (text, _) in OTHERS.items()}
        assert kind == expected.get(layer.name, "4-bit, scale per tensor")
    assert float(found["fc"][2]) == 32


def test_heading(model, saved, text):
    path, contents = saved
    reference = len(safetensors.torch.save(models.build(model.spec).state_dict()))
    assert f"{reference / path.stat().st_size:.2f} times smaller" in text
    assert f"({reference:,} bytes)" in text
    assert f"{models.parameters(model.spec):,}" in text
    assert f"{models.macs(model.spec):,}" in text
    assert contents.sha256 in text
    assert "simulated   yes" in text
    assert "input 3x16x16" in text
    assert "0.1, 0.2, 0.3; 0.5, 0.5, 0.5" in text


def test_ranges(model, text):
    for name in models.activations(model):
        assert re.search(rf"^  {re.escape(name)} +0\.25  7$", text, re.MULTILINE), name


def test_class_names_cannot_control_the_terminal(text):
    assert "\x1b" not in text
    assert r"'shirt', 'pull\nover', '\x1b[31mcoat'" in text


def test_floats(tmp_path):
    spec = models.resnet(18, channels=1, size=8, classes=2, stem="small", width=0.125)
    arguments = {"mean": [0.0], "std": [1.0], "classes": ["a", "b"], "dtype": torch.float16}
    text = inspect.describe(artifact.save(models.build(spec), tmp_path / "file", **arguments))
    assert "simulated   no" in text
    assert "no ranges" in text
    assert {row[1] for name, row in rows(text).items() if "conv" in name} == {"float16"}


def test_the_command(saved, text):
    command, root = [sys.executable, "-m", "nnc_utils.inspect", str(saved[0])], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")


def test_a_reader_that_stops_early_is_no_error(saved):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command, root = [sys.executable, "-m", "nnc_utils.inspect", str(saved[0])], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_bad_files_take_one_line(saved, tmp_path, capsys):
    (tmp_path / "foreign").write_text("no artifact")
    (tmp_path / "cut").write_bytes(saved[0].read_bytes()[:-1])
    for name in ("foreign", "cut", "missing", "."):
        assert inspect.main([str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and str(tmp_path / name) in err
        assert name != "foreign" or "truncated or no artifact" in err
