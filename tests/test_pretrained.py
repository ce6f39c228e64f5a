"""pretrained.py: files of weights as people have them: wrapped, prefixed, in half precision, broken."""

import argparse
import gzip
import json
import os
import pickle
import tarfile
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from small_networks import with_statistics
from torch import nn
from torch.nn.utils import prune

from nnc_utils import pretrained
from nnc_utils.models import BlockSpec, Spec, build, resnet
from nnc_utils.pretrained import load_pretrained

NARROW = {"width": 1 / 16, "classes": 7}


def narrow(seed=0):
    torch.manual_seed(seed)
    return with_statistics(build(resnet(18, **NARROW)), seed)


STATE = narrow().state_dict()  # its names are torchvision's: test_models.py loads one into the other


def led(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_same(model, state, **tolerances):
    for name, tensor in model.state_dict().items():
        if "tracked" not in name:
            torch.testing.assert_close(tensor, state[name].float(), **tolerances or {"rtol": 0, "atol": 0})


@pytest.mark.parametrize(("depth", "suffix"), [(18, ".pth"), (50, ".safetensors")])  # both kinds of block
def test_torchvisions_networks(tmp_path, depth, suffix):
    theirs = with_statistics(getattr(torchvision.models, f"resnet{depth}")(num_classes=7))
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(theirs.state_dict(), path)
    ours = build(resnet(depth, size=64, classes=7)).eval()
    assert load_pretrained(ours, path) == []
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_grey_images_get_the_sum_over_the_colours(tmp_path):
    theirs, grey = narrow(), build(resnet(18, channels=1, size=64, **NARROW)).eval()
    assert load_pretrained(grey, saved(tmp_path / "w.pth", STATE)) == []
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        same = theirs(images.expand(2, 3, 64, 64))
        torch.testing.assert_close(grey(images), same, rtol=1e-3, atol=1e-3)


def test_layers_of_another_shape_stay_fresh_and_are_named(tmp_path):
    ours = build(resnet(18, size=28, classes=10, stem="small", width=1 / 16))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    assert load_pretrained(ours, saved(tmp_path / "w.pth", STATE)) == ["conv1", "fc"]
    for name, tensor in ours.state_dict().items():
        source = before if name.startswith(("conv1", "fc")) or "tracked" in name else STATE
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize(
    "fc",
    [{}, {"fc.1.weight": torch.ones(7, 32)}, {"fc.weight": STATE["fc.weight"]}],
    ids=["none", "a Sequential", "without bias"],
)
def test_another_classifier_is_replaced_whole(tmp_path, fc):
    body = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}
    ours = build(resnet(18, **NARROW))
    before = ours.fc.weight.clone()
    assert load_pretrained(ours, saved(tmp_path / "w.pth", body | fc)) == ["fc"]
    assert torch.equal(ours.fc.weight, before) and torch.equal(ours.bn1.weight, STATE["bn1.weight"])


# --- As people save them ------------------------------------------------------------------------

LOW = torch.ones(2, 4)
SGD = torch.optim.SGD(narrow().parameters(), 0.1, momentum=0.9).state_dict()
SGD["state"] = {0: {"momentum_buffer": torch.zeros(4, 3, 7, 7)}}
OPTIMIZER = f"optimizer.* ({len(list(pretrained._flat(SGD)))} entries)"
PLACES = {
    "DataParallel": led("module."),
    "torch.compile": led("_orig_mod."),
    "both": led("module._orig_mod."),
    "a compiled stage": {name.replace("layer1.", "layer1._orig_mod."): x for name, x in STATE.items()},
    "the ImageNet example": {"epoch": 3, "arch": "resnet18", "state_dict": led("module."), "optimizer": SGD}
    | {"best_acc1": torch.tensor(0.5)},
    "torchvision's references": {"model": STATE, "optimizer": SGD, "args": argparse.Namespace(lr=0.1)},
    "PyTorch's tutorial": {"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": SGD, "loss": 0.1},
    "Lightning": {"state_dict": led("model.") | {"criterion.weight": torch.ones(7)}, "callbacks": {}},
    "a backbone": led("backbone.", {n: x for n, x in STATE.items() if "fc" not in n})
    | {"head.weight": torch.ones(2, 32)},
    "net": {"net": led("net."), "acc": 93.1, "epoch": 199},
    "params": {"params": STATE, "iter": 10},
    "a resumed training": {"net": STATE, "best": np.float64(0.5), "mean": np.float32(1), "rows": np.int64(7)},
    "parameters": OrderedDict(
        (name, nn.Parameter(x, x.is_floating_point())) for name, x in STATE.items() if x.ndim
    ),
    "without counters": {name: x for name, x in STATE.items() if "tracked" not in name},
}


BESIDE = {
    "the ImageNet example": f"epoch = '3', arch = 'resnet18', {OPTIMIZER}, best_acc1",
    "torchvision's references": f"{OPTIMIZER}, args.* (1 entries)",
    "PyTorch's tutorial": f"epoch = '1', {OPTIMIZER.replace('zer', 'zer_state_dict')}, loss = '0.1'",
    "Lightning": "state_dict.criterion.* (1 entries)",
    "a backbone": "head.* (1 entries)",
    "net": "acc = '93.1', epoch = '199'",
    "params": "iter = '10'",
    "a resumed training": "best = '0.5', mean = '1.0', rows = '7'",
}


@pytest.mark.parametrize("kind", PLACES)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, kind, capsys):
    ours = build(resnet(18, **NARROW))
    fresh = load_pretrained(ours, saved(tmp_path / "checkpoint.pth.tar", PLACES[kind]))
    assert fresh == (["fc"] if kind == "a backbone" else [])
    ours.fc = narrow().fc
    assert_same(ours, STATE)
    told = capsys.readouterr().out
    assert told.endswith(f"not used: {BESIDE[kind]}\n") if kind in BESIDE else told == ""


@pytest.mark.parametrize(
    "more",
    [
        {"lora": {"a": LOW, "b": LOW}},
        {"ema": [LOW, LOW]},
        {"ema": {"x": (LOW, LOW)}},
        {"scales": {"layer1.0.conv1": 0.1, "layer1.0.conv2": torch.tensor(0.2)}},
        {"optimized": {"a": LOW, "b": 3}},
    ],
)
def test_tensors_that_are_not_used_are_told(tmp_path, capsys, more):
    load_pretrained(build(resnet(18, **NARROW)), saved(tmp_path / "w.pth", {"model": STATE, **more}))
    assert capsys.readouterr().out.endswith(f"not used: {next(iter(more))}.* (2 entries)\n")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(tmp_path, kind):
    state = {name: x.to(kind) if x.is_floating_point() else x for name, x in STATE.items()}
    ours = build(resnet(18, **NARROW))
    assert load_pretrained(ours, saved(tmp_path / "w.pth", {"state_dict": state})) == []
    assert_same(ours, state)
    assert next(ours.parameters()).dtype == torch.float32


def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    safetensors.torch.save_file(led("module."), tmp_path / "a.pth")
    saved(tmp_path / "b.safetensors", STATE)
    saved(tmp_path / "c", STATE, _use_new_zipfile_serialization=False)
    for name in "a.pth", "b.safetensors", "c":
        ours = build(resnet(18, **NARROW))
        assert load_pretrained(ours, tmp_path / name) == []
        assert_same(ours, STATE)


def test_masks_of_torchs_pruning_are_applied(tmp_path):
    theirs = narrow()
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.7)
    pruned, ours = theirs.state_dict(), build(resnet(18, **NARROW))
    assert "layer1.0.conv1.weight_orig" in pruned
    assert load_pretrained(ours, saved(tmp_path / "w.pth", {"state_dict": led("module.", pruned)})) == []
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            prune.remove(module, "weight")
    assert_same(ours, theirs.state_dict())
    assert float((ours.conv1.weight == 0).float().mean()) > 0.69


def test_a_mask_beside_the_weight_itself_is_applied(tmp_path):
    mask = (STATE["layer1.0.conv1.weight"] > 0).float()
    content = {**STATE, "layer1.0.conv1.weight_mask": mask}
    expected = {**STATE, "layer1.0.conv1.weight": STATE["layer1.0.conv1.weight"] * mask}
    for more in ({}, {"layer1.0.conv1.weight_orig": STATE["layer1.0.conv1.weight"]}):
        ours = build(resnet(18, **NARROW))
        assert load_pretrained(ours, saved(tmp_path / "w.pth", content | more)) == []
        assert_same(ours, expected)


def test_the_final_weight_of_a_lottery_ticket_is_taken(tmp_path, capsys):
    """Beside it stand its mask and where it began."""
    name = "layer1.0.conv1.weight"
    mask = (STATE[name] > 0).float()
    content = {**STATE, f"{name}_mask": mask, f"{name}_orig": STATE[name] + 1}
    ours = build(resnet(18, **NARROW))
    load_pretrained(ours, saved(tmp_path / "w.pth", content))
    assert_same(ours, {**STATE, name: STATE[name] * mask})
    assert f"{name} is taken, not {name}_orig" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0.02, 0.3])
@pytest.mark.parametrize("channels", [False, True])
def test_a_pruned_network_is_not_taken_for_a_damaged_one(tmp_path, kept, channels):
    generator, pruned = torch.Generator().manual_seed(0), {}
    for name, tensor in STATE.items():
        shape = (1, tensor.shape[1], 1, 1) if channels and tensor.ndim == 4 else tensor.shape
        mask = torch.rand(shape, generator=generator) < kept
        pruned[name] = tensor * mask if tensor.ndim == 4 and mask.any() else tensor
    assert load_pretrained(build(resnet(18, **NARROW)), saved(tmp_path / "w.pth", pruned)) == []


def test_statistics_that_were_never_measured_are_told(tmp_path, capsys):
    load_pretrained(
        build(resnet(18, **NARROW)), saved(tmp_path / "w.pth", build(resnet(18, **NARROW)).state_dict())
    )
    assert "batch-norm statistics were never measured" in capsys.readouterr().out


def test_the_name_of_another_architecture_is_told(tmp_path, capsys):
    load_pretrained(
        build(resnet(18, **NARROW)),
        saved(tmp_path / "w.pth", {"model": STATE, "args": argparse.Namespace(model="resnetblur18", lr=0.1)}),
    )
    assert "args.model = 'resnetblur18', args.* (1 entries)" in capsys.readouterr().out
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors", {"format": "pt", "arch": "resnetaa18"})
    load_pretrained(build(resnet(18, **NARROW)), tmp_path / "w.safetensors")
    assert capsys.readouterr().out.endswith("not used: metadata.arch = 'resnetaa18'\n")


def test_of_several_networks_the_first_is_taken_and_told(tmp_path, capsys):
    averaged = led("module.", narrow(1).state_dict()) | {"n_averaged": torch.tensor(7)}
    ours = build(resnet(18, **NARROW))
    assert load_pretrained(ours, saved(tmp_path / "w.pth", {"model": STATE, "model_ema": averaged})) == []
    assert_same(ours, STATE)
    assert "several sets of weights: model.* is taken, not model_ema.module.*" in capsys.readouterr().out


def test_a_relative_path_is_one_in_the_repository_or_from_where_the_command_was_given(tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("repository", "caller", "notebooks")}
    for seed, place in enumerate(places.values()):
        place.mkdir()
        saved(place / f"{place.name}.pth", narrow(seed).state_dict())
    monkeypatch.setenv("NNC_ROOT", str(places["repository"]))
    monkeypatch.setenv("NNC_CALLER", str(places["caller"]))  # by `python -m bench run`
    monkeypatch.chdir(places["notebooks"])
    ours = build(resnet(18, **NARROW))
    load_pretrained(ours, "repository.pth")
    assert_same(ours, STATE)
    load_pretrained(ours, "caller.pth")
    assert_same(ours, narrow(1).state_dict())
    with pytest.raises(FileNotFoundError, match="repository/notebooks.pth and no .*caller/notebooks.pth"):
        load_pretrained(ours, "notebooks.pth")
    monkeypatch.delenv("NNC_CALLER")  # as papermill leaves it
    load_pretrained(ours, "notebooks.pth")
    assert_same(ours, narrow(2).state_dict())


# --- What is refused ----------------------------------------------------------------------------


class Evil:
    """Runs code where pickle reads it."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights.pth", content)


def tar(path):
    (path.parent / "storages").write_bytes(b"x")
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "storages", "storages")


def flip(path):
    """A byte of the largest tensor is another: its checksum no longer fits."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2 + 99] ^= 1
    path.write_bytes(content)


def two(path, **options):
    """One network, saved behind another."""
    with path.open("wb") as file:
        for seed in (1, 2):
            torch.save(narrow(seed).state_dict(), file, **options)


def codes(kind):
    """Weights of 8 bits whose scales are kept elsewhere."""
    weights = {n: x / x.abs().max() * 127 if x.ndim == 4 else x for n, x in STATE.items()}
    rounded = {n: x.round().to(kind) if x.ndim == 4 else x for n, x in weights.items()}
    return {"model": rounded, "scales": {n: torch.ones(1) for n in rounded}}


def cut(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def ring():
    content = {}
    content["state_dict"] = content
    return content


def bent(name, value):
    return {**STATE, name: STATE[name].index_fill(0, torch.tensor([1]), value)}


def bent_tail(name):
    """As safetensors of the right length whose rest is zeros."""
    tensor = STATE[name].clone()
    tensor.view(-1)[-1500:] = 0
    return {**STATE, name: tensor}


def text(path):
    """Sent as text: each line's end of another system."""
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def parts(path):
    """As torch.distributed.checkpoint leaves them."""
    path.mkdir()
    (path / ".metadata").touch()


def hole(path):
    """Zeros where a download or a disk lost a part; the old format has no checksums."""
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    content, kept = bytearray(path.read_bytes()), STATE["layer4.1.conv2.weight"].numpy().tobytes()
    begin = content.index(kept) + len(kept) // 3
    content[begin : begin + 8192] = bytes(8192)
    path.write_bytes(content)


FOREIGN = {
    "empty": (Path.touch, "is empty"),
    "a web page": (lambda p: p.write_text("\n <!DOCTYPE html><html>404</html>"), "is a web page"),
    "LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "a pointer of Git LFS",
    ),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "compressed by gzip"),
    "Keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99), "HDF5"),
    "a text": (lambda p: p.write_text("weights " * 99), "of another program"),
    "json": (lambda p: p.write_text(json.dumps({"conv1": [1.0] * 99})), "of another program"),
    "a folder": (Path.mkdir, "is a folder: the file of weights"),
    "a folder of parts": (parts, "is a folder: join its parts by"),
    "nothing but zeros": (lambda p: p.write_bytes(bytes(20_480)), "zeros where it should begin"),
    "a mask of the classifier": (
        lambda p: torch.save({**STATE, "fc.mask": torch.ones_like(STATE["fc.weight"])}, p),
        "fc.mask stands beside weights that fit: take it out",
    ),
    "zip": (lambda p: archive(p, b"x"), "a zip archive of weights.pth, not of torch.save"),
    "tar": (tar, "a tar archive"),
    "half of torch.save": (lambda p: cut(p, lambda q: torch.save(STATE, q)), "truncated"),
    "half of the old torch.save": (
        lambda p: cut(p, lambda q: torch.save(STATE, q, _use_new_zipfile_serialization=False)),
        "truncated",
    ),
    "half of safetensors": (
        lambda p: cut(p, lambda q: safetensors.torch.save_file(STATE, q)),
        "a truncated or damaged safetensors file",
    ),
    "TorchScript": (lambda p: torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(p), "a TorchScript"),
    "a module": (lambda p: torch.save(narrow(), p), "would run the code of nnc_utils.models.ResNet"),
    "a module in a wrapper": (lambda p: torch.save({"net": narrow()}, p), "would run the code of nnc_utils"),
    "code": (lambda p: torch.save({"state_dict": Evil()}, p), r"would run the code of \w+.system"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"conv1.weight": [1.0]})), "of another program"),
    "another head": (
        lambda p: torch.save({**STATE, "last_linear.weight": STATE["fc.weight"]}, p),
        "no ResNet has last_linear.weight: another network, a classifier not called fc",
    ),
    "a list": (lambda p: torch.save([torch.ones(3)], p), "holds 0 by place"),
    "nothing": (lambda p: torch.save({}, p), "holds no tensor with a name"),
    "a ring": (lambda p: torch.save(ring(), p), "of another program"),
    "sparse": (
        lambda p: torch.save({**STATE, "conv1.weight": STATE["conv1.weight"].to_sparse()}, p),
        "conv1.weight is torch.float32, torch.sparse_coo",
    ),
    "without values": (
        lambda p: torch.save({name: tensor.to("meta") for name, tensor in STATE.items()}, p),
        "conv1.weight is torch.float32, torch.strided, meta",
    ),
    "another network": (
        lambda p: torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), p),
        "holds 0.weight, 0.bias by place, as of nn.Sequential, ..., the weights of another",
    ),
    "ResNet-34": (
        lambda p: torch.save(build(resnet(34, **NARROW)).state_dict(), p),
        "layer1.2.conv1.weight is .* there, missing here: weights of another network",
    ),
    "ResNet-50": (lambda p: torch.save(build(resnet(50, **NARROW)).state_dict(), p), "of another network"),
    "wider": (
        lambda p: torch.save(build(resnet(18, width=1 / 8)).state_dict(), p),
        r"bn1.weight is \(8,\) there, \(4,\) here",
    ),
    "quantized": (
        lambda p: torch.save({**STATE, "layer2.0.conv1.weight": torch.ones(8, 4, 3, 3, dtype=torch.int8)}, p),
        "layer2.0.conv1.weight is torch.int8, .*: dense floats from before quantization",
    ),
    "eight bits": (
        lambda p: torch.save(codes(torch.float8_e4m3fn), p),
        "conv1.weight is torch.float8_e4m3fn, .*: dense floats from before quantization",
    ),
    "codes in floats": (
        lambda p: torch.save(codes(torch.float32), p),
        "conv1.weight holds whole numbers alone",
    ),
    "codes in the classifier": (
        lambda p: torch.save({**STATE, "fc.weight": (STATE["fc.weight"] * 99).round()}, p),
        "fc.weight holds whole numbers alone",
    ),
    "two saved": (two, "damaged, or more than one file"),
    "text": (lambda p: text(p), r"is damaged \("),
    "scores for a mask": (
        lambda p: torch.save({**STATE, "conv1.weight_mask": torch.randn_like(STATE["conv1.weight"])}, p),
        "conv1.weight_mask holds more than 0 and 1",
    ),
    "a shard": (lambda p: torch.save({**STATE, "bn1.weight": torch.empty(0)}, p), "bn1.weight is empty"),
    "places": (lambda p: torch.save({"0.weight": STATE["conv1.weight"]}, p), "by place, as of nn.Sequential"),
    "ours": (
        lambda p: safetensors.torch.save_file({"values": torch.ones(9)}, p, metadata={"artifact": "{}"}),
        "01 takes it as `pretrained`",
    ),
    "two saved as of old": (
        lambda p: two(p, _use_new_zipfile_serialization=False),
        "goes on behind what torch.save wrote first",
    ),
    "a mask of another shape": (
        lambda p: torch.save({**STATE, "conv1.weight_mask": torch.ones(1, 3, 7, 7)}, p),
        "conv1.weight_mask does not fit conv1.weight",
    ),
    "copied in part": (
        lambda p: torch.save(bent_tail("layer4.1.conv2.weight"), p),
        r"layer4.1.conv2.weight holds \d+ zeros in a row: the file was copied in part",
    ),
    "a wrong byte": (flip, r"damaged: \S+/data/\d+ does not match its checksum"),
    "one name for two": (
        lambda p: torch.save({"a": STATE, "a.conv1.weight": STATE["conv1.weight"] + 1}, p),
        "two tensors that would be called a.conv1.weight",
    ),
    "NaN": (
        lambda p: torch.save(bent("layer3.1.bn2.running_var", torch.nan), p),
        "layer3.1.bn2.running_var holds",
    ),
    "NaN, not copied": (
        lambda p: torch.save({**STATE, "fc.weight": torch.full((9, 32), torch.nan)}, p),
        "fc.weight holds NaN",
    ),
    "a negative variance": (
        lambda p: torch.save(bent("layer3.1.bn2.running_var", -1.0), p),
        "layer3.1.bn2.running_var is negative",
    ),
    "zeros": (
        lambda p: torch.save({**STATE, "layer2.0.conv1.weight": torch.zeros(8, 4, 3, 3)}, p),
        "layer2.0.conv1.weight is 0 everywhere",
    ),
    "two in one": (
        lambda p: torch.save({**STATE, **led("_orig_mod.", narrow(1).state_dict())}, p),
        "holds tensors twice",
    ),
    "infinity": (lambda p: torch.save(bent("fc.bias", -torch.inf), p), "fc.bias holds NaN, or more than"),
    "diverged": (lambda p: torch.save(bent("layer3.1.bn2.running_var", 3e38), p), "it diverged"),
    "a hole": (lambda p: hole(p), r"conv2.weight holds \d+ zeros in a row: the file was copied in part"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", FOREIGN)
def test_everything_else_is_one_line_and_changes_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, message = FOREIGN[kind]
    path, ours = tmp_path / "weights.pth", narrow(3)
    write(path)
    with pytest.raises(ValueError, match=message) as told:
        load_pretrained(ours, path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()
    assert_same(ours, narrow(3).state_dict())


def test_imagenet_weights_are_of_known_depths():
    block = BlockSpec((8, 8), (3, 3))
    with pytest.raises(ValueError, match="ResNet-18, -34 and -50"):
        load_pretrained(build(Spec(3, 16, 5, "small", 8, "basic", ((block,),))), "imagenet")


def test_imagenet_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    said = f"no network.*: put https://.*/resnet18-.*pth into {tmp_path}/hub/checkpoints/resnet18-"
    with pytest.raises(ValueError, match=said):
        load_pretrained(narrow(), "imagenet")
