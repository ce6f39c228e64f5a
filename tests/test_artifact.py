"""artifact.py: round trips into a fresh process, sizes, refusals, and files made to do harm.

``python tests/test_artifact.py FILE`` mutates a copy of an artifact 1,000 times and reads each as JSON
what came of it; the test below runs it in a process of its own and watches its memory.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from small_networks import affine, codebook
from torch.nn.utils import parametrize, prune

from nnc_utils import artifact, encoding, models
from nnc_utils.artifact import ArtifactError
from nnc_utils.encoding import UniformWeight, ZeroMask
from nnc_utils.runtimes.worker import peak_rss

MUTANTS = 1000
PREPROCESSING = {"mean": [0.286], "std": [0.353], "classes": [f"class {i}" for i in range(10)]}


def make(
    *,
    bits=None,
    per_channel=True,
    keep=None,
    levels=None,
    zero_points=False,
    learn_scale=False,
    ranges=False,
    width=0.125,
    **fields,
):
    """A small ResNet-18 with lively batch-norm, as training would leave it."""
    torch.manual_seed(0)
    fields = {"channels": 1, "size": 28, "classes": 10, "stem": "small_stride2", "width": width} | fields
    model = models.build(models.resnet(18, **fields)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                torch.nn.init.uniform_(tensor, low, high)
    for layer in models.layers(model.spec):
        module = model.get_submodule(layer.name)
        weight = module.weight.detach()
        mask = None if keep is None else torch.rand_like(weight) < keep
        if levels is not None:
            encoding.attach(module, codebook(weight, levels=levels, mask=mask))
        elif zero_points:
            encoding.attach(module, affine(weight, bits=bits, per_channel=per_channel))
        elif mask is not None:
            parametrize.register_parametrization(module, "weight", ZeroMask(mask))
        if bits is not None and not zero_points:
            peak = weight.abs().flatten(1).amax(1) if per_channel else weight.abs().amax()
            scale = peak / (2 ** (bits - 1) - 1)
            quantizer = UniformWeight(scale, bits=bits, learn_scale=learn_scale)
            parametrize.register_parametrization(module, "weight", quantizer)
    if ranges:
        for place in models.activations(model).values():
            place.scale, place.zero_point = 0.1 / 3, 119
    return model


KINDS = {
    "float": {},
    "8-bit with activations": {"bits": 8, "ranges": True},
    "8-bit per tensor": {"bits": 8, "per_channel": False},
    "4-bit masked": {"bits": 4, "keep": 0.3},
    "2-bit": {"bits": 2},
    "12-bit": {"bits": 12},
    "masked": {"keep": 0.1},
    "codebook": {"levels": 16},
    "codebook masked": {"levels": 5, "keep": 0.3, "ranges": True},
    "affine": {"bits": 8, "zero_points": True},
    "affine per tensor": {"bits": 3, "zero_points": True, "per_channel": False, "ranges": True},
    "learned scales": {"bits": 4, "keep": 0.3, "learn_scale": True},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(model, path, **changes):
    return artifact.save(model, path, **(PREPROCESSING | changes))


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))


class TestRoundTrip:
    def test_a_fresh_process_computes_the_same_logits(self, tmp_path, images):
        expected = {}
        safetensors.torch.save_file({"images": images}, tmp_path / "images")
        for name, options in KINDS.items():
            model = make(**options)
            save(model, tmp_path / f"{name}.nnc")
            with torch.inference_mode():
                expected[f"{name}.nnc"] = model(images)
                model.to(memory_format=torch.channels_last)
                last = images.contiguous(memory_format=torch.channels_last)
                expected[f"{name}.nnc channels_last"] = model(last)
        program = (
            "import sys, pathlib, torch, safetensors.torch as st; from nnc_utils import artifact\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"
            "folder, found = pathlib.Path(sys.argv[1]), {}\n"
            "images = st.load_file(folder / 'images')['images']\n"
            "last = torch.channels_last\n"
            "for path in folder.glob('*.nnc'):\n"
            "    with torch.inference_mode():\n"
            "        model = artifact.load(path)\n"
            "        found[path.name] = model(images)\n"
            "        model.to(memory_format=last)\n"
            "        found[path.name + ' channels_last'] = model(images.contiguous(memory_format=last))\n"
            "st.save_file(found, folder / 'logits')\n"
        )
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
        found = safetensors.torch.load_file(tmp_path / "logits")
        assert set(found) == set(expected)
        for name, logits in expected.items():
            assert logits.std() > 0
            assert found[name].numpy().tobytes() == logits.numpy().tobytes(), name

    @pytest.mark.parametrize("kind", KINDS)
    def test_trainable_networks_save_to_the_same_file(self, kind, tmp_path):
        first = save(make(**KINDS[kind]), tmp_path / "first")
        again = artifact.load(tmp_path / "first", trainable=True)
        assert again.training
        save(again, tmp_path / "again")
        assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
        plain = artifact.load(tmp_path / "first")
        assert not plain.training
        assert not any(parametrize.is_parametrized(module) for module in plain.modules())
        assert first.nbytes == (tmp_path / "first").stat().st_size

    def test_training_on_learns_levels_and_scales(self, tmp_path, images):
        for name, kind in (("codebook", "codebook masked"), ("scale", "learned scales")):
            model = make(**KINDS[kind])
            before = save(model, tmp_path / "before")
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
            model.train()(images).square().sum().backward()
            optimizer.step()
            after = save(model.eval(), tmp_path / "after")
            with torch.inference_mode():
                assert torch.equal(artifact.network(after)(images), model(images))
            for layer in before.weights:
                old, new = (getattr(a.weights[layer], name) for a in (before, after))
                assert not torch.equal(old, new), (kind, layer)

    @pytest.mark.parametrize("options", [{"bits": 4}, {"levels": 7}])
    def test_training_on_keeps_the_mask(self, options, tmp_path, images):
        save(make(keep=0.3, **options), tmp_path / "file")
        model = artifact.load(tmp_path / "file", trainable=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images).square().sum().backward()
        optimizer.step()
        before, after = artifact.read(tmp_path / "file"), save(model, tmp_path / "after")
        for name in before.weights:
            assert torch.equal(before.weights[name].mask, after.weights[name].mask)
        assert before.sha256 != after.sha256

    def test_reading_leaves_the_artifact_alone(self, tmp_path):
        found = save(make(), tmp_path / "file")
        model = artifact.network(found)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert all(encoding.decode(weight).any() for weight in found.weights.values())
        assert found.tensors["bn1.running_var"].any()

    def test_what_it_holds(self, tmp_path):
        model = make(bits=8, ranges=True)
        found = save(model, tmp_path / "file", mean=[0.1], std=[1 / 3])
        assert found.spec == model.spec
        assert found.mean == (0.1,)
        assert found.std == (1 / 3,)
        assert found.classes == tuple(PREPROCESSING["classes"])
        assert list(found.ranges) == list(models.activations(model))
        assert set(found.ranges.values()) == {(float(np.float32(0.1 / 3)), 119)}
        state = {name for name in make().state_dict() if not name.endswith("num_batches_tracked")}
        assert set(found.tensors) | {f"{name}.weight" for name in found.weights} == state

    def test_half_precision_halves_the_weights(self, tmp_path):
        model = make()
        full, half = save(model, tmp_path / "a"), save(model, tmp_path / "b", dtype=torch.float16)
        count = sum(math.prod(layer.weight_shape) for layer in models.layers(model.spec))
        assert full.nbytes - half.nbytes == pytest.approx(2 * count, abs=64)
        loaded = artifact.load(tmp_path / "b")
        assert torch.equal(loaded.conv1.weight, model.conv1.weight.half().float())
        assert (half.bits_per_weight, full.bits_per_weight) == (16, 32)


class TestNumbers:
    @pytest.mark.parametrize(
        "spec",
        [
            models.resnet(18, channels=1, size=28, classes=10, stem="small_stride2"),
            models.resnet(34, width=0.1, classes=7),
            models.resnet(50, width=0.25),
        ],
    )
    def test_fp32_bytes(self, spec):
        assert artifact.fp32_bytes(spec) == len(safetensors.torch.save(models.build(spec).state_dict()))

    @pytest.mark.parametrize(
        "options", [{"bits": 4}, {"levels": 9}, {"bits": 4, "zero_points": True, "keep": None}]
    )
    def test_bits_and_nonzeros(self, options, tmp_path):
        model = make(**({"keep": 0.3} | options))
        torch.nn.init.zeros_(model.bn1.bias[:3])
        found = save(model, tmp_path / "file")
        payload = sum(encoding.payload_bits(weight) for weight in found.weights.values())
        weights = {name: p for name, p in artifact.network(found).named_parameters()}
        count = sum(p.numel() for p in weights.values() if p.ndim > 1)
        assert found.bits_per_weight == payload / count
        assert found.nonzeros == sum(int((p != 0).sum()) for p in weights.values())
        most = 0.9 if "zero_points" in options else 0.4
        assert 0.1 < found.nonzeros / models.parameters(found.spec) < most

    def test_header_is_small(self, tmp_path):
        """What is neither payload nor batch-norm: of a 60 kB file about 3 percent."""
        found = save(make(bits=4, ranges=True, width=0.25), tmp_path / "file")
        payload = sum(encoding.payload_bits(weight) for weight in found.weights.values()) // 8
        rest = sum(4 * tensor.numel() for tensor in found.tensors.values()) + 5 * len(found.ranges)
        assert found.nbytes - payload - rest < 2000

    @pytest.mark.parametrize(
        ("options", "simulated"),
        [
            ({}, False),
            ({"bits": 8, "ranges": True}, False),
            ({"bits": 8, "per_channel": False, "ranges": True}, False),
            ({"bits": 8}, True),
            ({"bits": 4, "ranges": True}, True),
            ({"bits": 12, "ranges": True}, True),
            ({"bits": 8, "ranges": True, "keep": 0.5}, True),
            ({"keep": 0.5}, True),
            ({"ranges": True}, True),
            ({"levels": 256, "ranges": True}, True),
            ({"levels": 16}, True),
            ({"bits": 8, "zero_points": True, "ranges": True}, True),
            ({"bits": 8, "learn_scale": True, "ranges": True}, False),
        ],
    )
    def test_simulated(self, options, simulated, tmp_path):
        assert save(make(**options), tmp_path / "file").simulated == simulated

    def test_the_checksum_is_of_the_contents(self, tmp_path):
        model = make(bits=8)
        found = save(model, tmp_path / "file")
        assert found.sha256 == save(model, tmp_path / "again").sha256
        assert (tmp_path / "file").read_bytes() == (tmp_path / "again").read_bytes()
        document, arrays = parts(tmp_path / "file")
        assert found.sha256 == document["sha256"] == checksum(document, arrays)
        others = {"classes": ["other"] * 10, "mean": [0.5], "std": [0.5]}
        for entry, value in others.items():
            assert save(model, tmp_path / "other", **{entry: value}).sha256 != found.sha256


class TestSaving:
    def refuse(self, model, words, path, **changes):
        path.write_bytes(b"before")
        with pytest.raises(ArtifactError, match=words):
            save(model, path, **changes)
        assert path.read_bytes() == b"before"
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("options", [{}, {"bits": 8}, {"keep": 0.5}])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, options, bad, tmp_path):
        model = make(**options)
        for parameter in model.layer3[1].conv2.parameters():
            parameter.data[1, 2, 0, 0] = bad
        words = "layer3.1.conv2: 1 of 9216 weights are not finite"
        self.refuse(model, words, tmp_path / "file")

    @pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
    def test_scales_and_codebooks_that_training_led_astray(self, bad, tmp_path):
        model = make(bits=8, learn_scale=True)
        model.layer3[1].conv2.parametrizations.weight[0].scale.data[3] = bad
        self.refuse(model, "layer3.1.conv2: a scale is not positive, or .* learned", tmp_path / "file")
        if not math.isfinite(bad):
            model = make(levels=4)
            model.layer3[1].conv2.parametrizations.weight[0].codebook.data[3] = bad
            self.refuse(model, "layer3.1.conv2: the codebook's levels are not finite", tmp_path / "file")

    def test_batch_norm(self, tmp_path):
        model = make()
        model.layer1[0].bn2.running_mean[3] = math.nan
        self.refuse(model, "layer1.0.bn2.running_mean holds NaN", tmp_path / "file")
        model = make()
        model.layer1[0].bn2.running_var[3] = -0.1
        self.refuse(model, "layer1.0.bn2.running_var holds negative", tmp_path / "file")

    def test_parametrizations(self, tmp_path):
        model = make()
        torch.nn.utils.parametrizations.weight_norm(model.layer2[0].conv1)
        self.refuse(model, "layer2.0.conv1: .*_WeightNorm", tmp_path / "file")
        model = make()
        parametrize.register_parametrization(model.fc, "bias", torch.nn.Identity())
        self.refuse(model, "fc: bias has a parametrization", tmp_path / "file")
        model = make()
        parametrize.register_parametrization(model.bn1, "weight", torch.nn.Identity())
        self.refuse(model, "bn1: weight has a parametrization", tmp_path / "file")
        model = make()
        prune.l1_unstructured(model.layer2[0].conv1, "weight", 0.5)
        self.refuse(model, "layer2.0.conv1.weight_", tmp_path / "file")

    def test_ranges(self, tmp_path):
        model = make(ranges=True)
        model.layer2[0].quant_out.scale = None
        self.refuse(model, "1 of 30 activation places have no range, layer2.0.quant_out", tmp_path / "file")
        for scale, zero_point in ((0.0, 0), (-1.0, 0), (math.nan, 0), (math.inf, 0), (1.0, 256), (1.0, -1)):
            model.layer2[0].quant_out.scale = scale
            model.layer2[0].quant_out.zero_point = zero_point
            self.refuse(model, "layer2.0.quant_out has scale", tmp_path / "file")

    def test_networks_other_than_their_spec(self, tmp_path):
        model = make()
        model.layer1[0].bn1 = torch.nn.Identity()
        self.refuse(model, "layer1.0.bn1.weight is missing", tmp_path / "file")
        model = make()
        model.fc = torch.nn.Linear(64, 11)
        self.refuse(model, "fc has shape", tmp_path / "file")
        model = make()
        model.extra = torch.nn.Linear(2, 2)
        self.refuse(model, "extra.weight is not in", tmp_path / "file")
        self.refuse(torch.nn.Linear(2, 2), "Linear", tmp_path / "file")
        self.refuse(make().double(), "float64", tmp_path / "file")

    def test_preprocessing(self, tmp_path):
        for entry, bad in (
            ("mean", [0.1, 0.2]),
            ("mean", [math.nan]),
            ("std", [0.0]),
            ("std", [math.inf]),
            ("classes", ["a"]),
            ("classes", list(range(10))),
        ):
            self.refuse(make(), entry, tmp_path / "file", **{entry: bad})

    def test_a_failing_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", fail)
        (tmp_path / "file").write_bytes(b"before")
        with pytest.raises(OSError, match="disk full"):
            save(make(), tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"before"
        assert os.listdir(tmp_path) == ["file"]


# --- Files made to do harm ----------------------------------------------------------------------


def parts(path):
    """The JSON and the tensors of an artifact."""
    data = Path(path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["artifact"]), safetensors.numpy.load(data)


def checksum(document, arrays):
    rest = {entry: value for entry, value in document.items() if entry != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {list(array.shape)}\n".encode() + array.tobytes())
    return digest.hexdigest()


def forge(document, arrays):
    """A file with these contents and the right checksum over them."""
    document = document | {"sha256": checksum(document, arrays)}
    return safetensors.numpy.save(arrays, {"artifact": json.dumps(document)})


def put(document, path, value):
    """A copy of nested JSON with one place changed; a value None removes it."""
    copy = json.loads(json.dumps(document))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


def overwrite(arrays, name, at, value):
    array = arrays[name].copy()
    array[at] = value
    return arrays | {name: array}


def change(arrays, name, function):
    return arrays | {name: function(arrays[name])}


def rename(arrays, old, new):
    """Without the old tensor when there is no new name."""
    kept = {name: array for name, array in arrays.items() if name != old}
    return kept | ({new: arrays[old]} if new else {})


BLOCK = ("spec", "stages", 1, 0)
ODD = ("1", 1.5, True, [1], {}, -1, 0, 10**30, math.nan)


def forgeries(document, arrays):
    """Name -> (JSON, function that makes the tensors); none describes a network.

    For an 8-bit file with ranges.
    """
    found = {}

    def text(path, *values):
        for value in values:
            found[f"{path} = {value!r}"] = put(document, path, value), partial(dict, arrays)

    def tensor(what, edit, name, *arguments):
        found[f"{name}: {what}"] = document, partial(edit, arrays, name, *arguments)

    text(("format",), None, "nnc_utils.artifact/2", 1)
    text(("extra",), 1)
    text(("spec",), None, 1, [], "resnet18", {})
    for field in ("channels", "classes", "stem_width"):
        text(("spec", field), None, *ODD, document["spec"][field] + 1)
    text(("spec", "size"), None, *ODD)
    text(("spec", "stem"), None, "imagenet", "none", 1, [])
    text(("spec", "block"), None, "bottleneck", "none", 1, {})
    text(("spec", "stages"), None, [], [[]], 1, "x", document["spec"]["stages"] * 2)
    text(("spec", "stages", 0), [], document["spec"]["stages"][0] * 400, document["spec"]["stages"][0][:1])
    text((*BLOCK, "widths"), None, [], [1, 1], [8, 8, 8], [2**40, 2**40], ["8", "8"], 8)
    text((*BLOCK, "kernels"), None, [], [1, 3], [5, 5], [10001, 10001], [2, 2], [3, -3], [2**40 + 1, 3])
    text((*BLOCK, "stride"), None, *ODD)
    text((*BLOCK, "connection"), None, "none", "identity", "sum", 1, [])
    text(("mean",), None, [], [1, 2], ["1"], [True], [math.nan], [math.inf], [10**400], 1, "0", {})
    text(("std",), None, [], [1, 2], [0], [-1], [math.nan], [math.inf], [10**400], 1, [[1]])
    text(("classes",), None, [], ["a"] * 11, [1] * 10, "abcdefghij", {})
    text(("encodings",), None, [], {}, [1], [[]], document["encodings"] * 2 + [None])
    for field, values in (
        ("bits", (1, 7, 17, *ODD)),
        ("axis", (1, "0", False, [])),
        ("mask", (True, 0, "x")),
        ("affine", (True, None, 0, "x")),
    ):
        text(("encodings", 0, field), *values)
    text(("encodings", 0, "axis"), None)
    text(("encodings", 0, "kind"), None, "dense", "codebook", [], 1)
    text(("encodings", 0, "more"), 1)
    text(("weights",), None, [], {}, document["weights"][:-1], document["weights"] * 2)
    for at in range(0, len(document["weights"]), 5):
        index, codes, scale = document["weights"][at]
        text(
            ("weights", at),
            [],
            [index],
            [index, codes],
            [index, codes, scale, 0],
            [1, codes, scale],
            [-1, codes, scale],
        )
        text(("weights", at), [index, codes - 1, scale], [index, codes + 4, scale], [index, codes, scale - 4])
        text(
            ("weights", at),
            [index, -codes, scale],
            [index, 2**60, scale],
            [index, codes, float(scale)],
            1,
            "x",
        )
    middle = json.loads(json.dumps(document))
    middle["weights"][3][1] += 4
    middle["weights"][4][1] -= 4
    found["four bytes moved from one layer to the next"] = middle, partial(dict, arrays)

    for name in arrays:
        tensor("left out", rename, name, None)
        tensor("renamed", rename, name, f"{name}\n")
        tensor("shorter", change, name, lambda array: array[:-1])
        tensor("longer", change, name, lambda array: np.append(array, array[:1]))
        tensor("empty", change, name, lambda array: array[:0])
        tensor("in two dimensions", change, name, lambda array: array[None])
        tensor("as int64", change, name, lambda array: array.astype(np.int64))
        tensor("as float16", change, name, lambda array: array.astype(np.float16))
    found["a tensor too many"] = document, partial(dict, arrays, more=np.zeros(3, np.uint8))
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, 777, -1):
            tensor(f"{bad} at {at}", overwrite, "batch_norm_and_bias", at, bad)
    width = document["spec"]["stem_width"]
    tensor("negative variance", overwrite, "batch_norm_and_bias", 3 * width, -1)
    for bad in (math.nan, math.inf, 0.0, -1.0, 3e38):
        four = np.frombuffer(np.array([bad], "<f4").tobytes(), np.uint8)
        tensor(f"{bad}", overwrite, "scale", slice(40, 44), four)
        if bad != 3e38:
            tensor(f"{bad}", overwrite, "activation_scale", 5, bad)

    start = 0
    for at, (_, codes, _) in enumerate(document["weights"]):
        stream = arrays["codes"][start : start + codes]
        low, first, more = (int(byte) for byte in stream[:3])
        if at in (1, 9, 19) and more:
            headers = (low + 1, 9, 255), (first + 1, 255), (more + 1, more - 1, 0, 255)
            for byte, values in enumerate(headers):
                for value in {value % 256 for value in values} - {int(stream[byte])}:
                    tensor(f"layer {at}, byte {byte} = {value}", overwrite, "codes", start + byte, value)
            words = 3 + 2 * (more + 1)
            for place in (3, words - 2, words, words + 9):
                flipped = stream[place] ^ 1
                tensor(f"layer {at}, byte {place} flipped", overwrite, "codes", start + place, flipped)
        start += codes
    return found


@pytest.fixture(scope="module")
def forgeable(tmp_path_factory):
    path = tmp_path_factory.mktemp("forge") / "file"
    save(make(bits=8, ranges=True), path)
    return parts(path)


class TestReading:
    def test_an_unchanged_forgery_is_read(self, forgeable, tmp_path):
        (tmp_path / "file").write_bytes(forge(*forgeable))
        assert artifact.read(tmp_path / "file").sha256 == forgeable[0]["sha256"]

    def test_forged_fields_with_the_right_checksum(self, forgeable, tmp_path):
        path = tmp_path / "file"
        all_of_them = forgeries(*forgeable)
        assert len(all_of_them) > 250
        for name, forged in all_of_them.items():
            document, make_arrays = forged
            path.write_bytes(forge(document, make_arrays()))
            start = time.perf_counter()
            with pytest.raises(ArtifactError) as caught:
                artifact.read(path)
                pytest.fail(f"was read: {name}")
            assert time.perf_counter() - start < 5, name
            assert "checksum" not in str(caught.value), name
            assert len(str(caught.value)) < 1000, name

    def test_forged_codebooks_and_zero_points(self, tmp_path):
        path = tmp_path / "file"
        save(make(levels=5), path)
        document, arrays = parts(path)
        book = np.frombuffer(arrays["codebook"][:20].tobytes(), "<f4")
        forged = [put(document, ("encodings", 0, "levels"), levels) for levels in (*ODD, 4, 6, 257)]
        forged = [(changed, arrays) for changed in forged]
        for bad in (book[::-1], np.sort(book)[[0, 1, 1, 3, 4]], [*book[:4], np.nan], [-np.inf, *book[1:]]):
            stream = np.frombuffer(np.array(bad, "<f4").tobytes(), np.uint8)
            forged.append((document, overwrite(arrays, "codebook", slice(20), stream)))
        forged.append((document, rename(arrays, "codebook", None)))
        save(make(bits=4, zero_points=True), path)
        document, arrays = parts(path)
        forged.append((document, overwrite(arrays, "zero_point", 7, 16)))
        forged.append((document, change(arrays, "zero_point", lambda array: array[:-1])))
        for field, value in (("bits", 9), ("bits", 3), ("mask", True), ("affine", False)):
            forged.append((put(document, ("encodings", 0, field), value), arrays))
        for changed, tensors in forged:
            path.write_bytes(forge(changed, tensors))
            with pytest.raises(ArtifactError) as caught:
                artifact.read(path)
            assert "checksum" not in str(caught.value)

    def test_the_wrong_checksum(self, forgeable, tmp_path):
        document, arrays = forgeable
        for sha256 in ("", 1, None, [], "0" * 64, document["sha256"].upper()):
            changed = {"artifact": json.dumps(document | {"sha256": sha256})}
            (tmp_path / "file").write_bytes(safetensors.numpy.save(arrays, changed))
            with pytest.raises(ArtifactError, match="checksum"):
                artifact.read(tmp_path / "file")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"1234567",
            b"\0" * 8,
            b"\0" * 4096,
            b"\xff" * 4096,
            b"PK\3\4" * 1000,
            (10**9).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"{}",
            (100_000).to_bytes(8, "little") + b"[" * 100_000,
            safetensors.numpy.save({"a": np.zeros(3)}),
            safetensors.numpy.save({"a": np.zeros(3)}, {"artifact": "{"}),
            safetensors.numpy.save({"a": np.zeros(3)}, {"artifact": "[" * 100_000}),
            safetensors.numpy.save({"a": np.zeros(3)}, {"artifact": "1"}),
            safetensors.numpy.save({"a": np.zeros(3)}, {"artifact": "1" * 10_000}),
            safetensors.numpy.save({"a": np.zeros(3)}, {"other": "{}"}),
        ],
    )
    def test_foreign_files(self, data, tmp_path):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ArtifactError, match="file: .*(truncated|no artifact)"):
            artifact.read(tmp_path / "file")

    def test_deeply_nested_metadata(self, forgeable, tmp_path):
        document, arrays = forgeable
        for depth in (500, 900, 950, 980, 990, 1000, 5000):
            nested = json.dumps(document).replace(
                '"format"', f'"spec": {"[" * depth + "]" * depth}, "format"'
            )
            nested = nested.replace('"spec": {', '"old": {', 1)
            (tmp_path / "file").write_bytes(safetensors.numpy.save(arrays, {"artifact": nested}))
            with pytest.raises(ArtifactError):
                artifact.read(tmp_path / "file")

    def test_a_missing_file_and_a_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            artifact.read(tmp_path / "file")
        with pytest.raises(ArtifactError, match="folder"):
            artifact.read(tmp_path)

    def test_a_constant_network_of_any_size_is_refused(self, tmp_path):
        """Constant weights take no bits, so that only the file's length can bound what is believed."""
        spec = models.resnet(18, channels=1, size=28, classes=10, stem="small", width=1)
        blocks = [[{"widths": [64, 64], "kernels": [1001, 1001], "stride": 1, "connection": "identity"}]]
        document = {
            "format": artifact.FORMAT,
            "spec": json.loads(spec.to_json()) | {"stages": blocks},
            "encodings": [{"kind": "uniform", "mask": False, "bits": 4, "axis": None, "affine": False}],
            "weights": [[0, 3, 4]] * 4,
        }
        document |= PREPROCESSING
        arrays = {
            "codes": np.array([0, 7, 0] * 4, np.uint8),
            "scale": np.frombuffer(np.ones(4, "<f4").tobytes(), np.uint8),
            "batch_norm_and_bias": np.ones(3 * 4 * 64 + 10, np.float32),
        }
        (tmp_path / "file").write_bytes(forge(document, arrays))
        with pytest.raises(ArtifactError, match="more than [0-9]+ bytes of file warrant"):
            artifact.read(tmp_path / "file")
        blocks[0][0]["kernels"] = [3, 3]
        (tmp_path / "file").write_bytes(forge(document, arrays))
        assert artifact.read(tmp_path / "file").nonzeros == 3 * 2 * 64 + 10


def mutate(path, count, seed=0):
    """Change a file `count` times, read each, put it back; returns what came of them.

    Bytes flipped anywhere and in the header, cut, appended, blocks moved, and some of `forgeries`.
    """
    random = np.random.default_rng(seed)
    original = Path(path).read_bytes()
    reference = artifact.read(path)
    header = 8 + int.from_bytes(original[:8], "little")
    document, arrays = parts(path)
    forged = list(forgeries(document, arrays).values())
    outcome = {"refused": 0, "identical": 0, "wrong": [], "slowest": 0.0}

    def check(kind):
        start = time.perf_counter()
        try:
            found = artifact.read(path)
        except ArtifactError:
            outcome["refused"] += 1
        else:
            same = artifact._equal(found.spec, reference.spec) and found.ranges == reference.ranges
            same &= found.classes == reference.classes and found.mean == reference.mean
            for name in reference.weights:
                same &= artifact._equal(found.weights[name], reference.weights[name])
            for name in reference.tensors:
                same &= torch.equal(found.tensors[name], reference.tensors[name])
            if same:
                outcome["identical"] += 1
            else:
                outcome["wrong"].append(kind)
        outcome["slowest"] = max(outcome["slowest"], time.perf_counter() - start)

    with open(path, "r+b", buffering=0) as file:

        def write(at, data):
            file.seek(at)
            file.write(data)

        for turn in range(count):
            kind = ("anywhere", "header", "cut", "forged", "header", "anywhere", "moved", "appended")[
                turn % 8
            ]
            if kind in ("anywhere", "header"):
                end = header if kind == "header" else len(original)
                places = random.integers(0, end, random.choice([1, 1, 1, 2, 10]))
                for at in places:
                    write(at, bytes([original[at] ^ random.integers(1, 256)]))
                check(f"{kind} {places}")
                for at in places:
                    write(at, original[at : at + 1])
            elif kind == "cut":
                length = int(random.integers(0, len(original) if turn % 2 else header))
                file.truncate(length)
                check(f"cut to {length}")
                write(length, original[length:])
            elif kind == "appended":
                write(len(original), random.bytes(int(random.integers(1, 100))))
                check(kind)
                file.truncate(len(original))
            elif kind == "moved":
                size = int(random.integers(1, 1000))
                source, target = (int(at) for at in random.integers(0, len(original) - size, 2))
                write(target, original[source : source + size])
                check(f"{kind} {size} bytes from {source} to {target}")
                write(target, original[target : target + size])
            else:
                changed, make_arrays = forged[random.integers(len(forged))]
                data = forge(changed, make_arrays())
                file.truncate(0)
                write(0, data)
                check(kind)
                file.truncate(0)
                write(0, original)
    assert Path(path).read_bytes() == original
    return outcome


def test_a_resnet18_is_packed_and_read_in_under_two_seconds_of_one_core(tmp_path):
    model, path = make(bits=8, ranges=True, width=1.0), tmp_path / "resnet18.safetensors"
    begin = time.process_time()
    save(model, path)
    packed = time.process_time()
    artifact.load(path)
    assert packed - begin < 2
    assert time.process_time() - packed < 2


def test_1000_mutants_of_a_resnet18(tmp_path):
    """Each is refused or the same network; none crashes, hangs, or takes over 1 GiB."""
    path = tmp_path / "resnet18.safetensors"
    assert save(make(bits=8, ranges=True, width=1.0), path).nbytes > 9_000_000
    command = [sys.executable, __file__, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    outcome = json.loads(done.stdout)
    print(outcome)
    assert outcome["wrong"] == []
    assert outcome["refused"] + outcome["identical"] == MUTANTS
    assert outcome["refused"] > 0.95 * MUTANTS
    assert outcome["slowest"] < 10
    assert outcome["peak_bytes"] < 2**30


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = mutate(sys.argv[1], MUTANTS)
    print(json.dumps(result | {"peak_bytes": peak_rss()}))
