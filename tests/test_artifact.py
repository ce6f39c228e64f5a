"""artifact.py: round trips into a fresh process, sizes, refusals, damaged and foreign files."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from small_networks import affine, codebook
from torch.nn.utils import parametrizations, parametrize, prune

from nnc_utils import artifact, encoding, models
from nnc_utils.artifact import ArtifactError
from nnc_utils.parametrizations import UniformWeight, ZeroMask

pytestmark = pytest.mark.usefixtures("one_thread")
NOTHING = torch.nn.Identity()
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
                assert torch.equal(*(a.weights[layer].mask for a in (before, after)))

    def test_reading_leaves_the_artifact_alone(self, tmp_path):
        found = save(make(), tmp_path / "file")
        for tensor in artifact.network(found).state_dict().values():
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

    @pytest.mark.parametrize(
        ("simulated", "options"),
        [
            *((False, o) for o in ({}, {"bits": 8, "ranges": True})),
            (False, {"bits": 8, "per_channel": False, "ranges": True}),
            (False, {"bits": 8, "learn_scale": True, "ranges": True}),
            *((True, o) for o in ({"bits": 8}, {"keep": 0.5}, {"ranges": True}, {"levels": 16})),
            *((True, {"bits": bits, "ranges": True}) for bits in (4, 12)),
            *((True, {"bits": 8, "ranges": True} | more) for more in ({"keep": 0.5}, {"zero_points": True})),
            (True, {"levels": 256, "ranges": True}),
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
        self.refuse(model, "layer3.1.conv2: 1 of 9216 weights are not finite", tmp_path / "file")

    @pytest.mark.parametrize(
        ("options", "field", "words"),
        [
            ({"bits": 8, "learn_scale": True}, "scale", "a scale is not positive, or .* learned"),
            ({"levels": 4}, "codebook", "the codebook's levels are not finite"),
        ],
    )
    def test_scales_and_codebooks_that_training_led_astray(self, options, field, words, tmp_path):
        model = make(**options)
        getattr(model.layer3[1].conv2.parametrizations.weight[0], field).data[3] = math.nan
        self.refuse(model, f"layer3.1.conv2: {words}", tmp_path / "file")

    @pytest.mark.parametrize(("part", "bad"), [("running_mean", math.nan), ("running_var", -0.1)])
    def test_batch_norm(self, part, bad, tmp_path):
        model = make()
        getattr(model.layer1[0].bn2, part)[3] = bad
        self.refuse(model, f"layer1.0.bn2.{part} holds NaN, infinity or a negative", tmp_path / "file")

    @pytest.mark.parametrize(
        ("words", "change"),
        [
            ("layer2.0.conv1: .*_WeightNorm", lambda m: parametrizations.weight_norm(m.layer2[0].conv1)),
            ("fc.param.*bias", lambda m: parametrize.register_parametrization(m.fc, "bias", NOTHING)),
            ("bn1.param.*weight", lambda m: parametrize.register_parametrization(m.bn1, "weight", NOTHING)),
            ("layer2.0.conv1.weight_", lambda m: prune.l1_unstructured(m.layer2[0].conv1, "weight", 0.5)),
            ("Missing.*layer1.0.bn1.weight", lambda m: setattr(m.layer1[0], "bn1", NOTHING)),
            ("layer1.0.conv1: .*weight", lambda m: setattr(m.layer1[0], "conv1", NOTHING)),
            ("size mismatch for fc.weight", lambda m: setattr(m, "fc", torch.nn.Linear(64, 11))),
            ("Unexpected.*extra.weight", lambda m: setattr(m, "extra", torch.nn.Linear(2, 2))),
            ("float64", lambda m: m.double()),
            ("bn1.weight is torch.float64", lambda m: m.bn1.double()),
        ],
    )
    def test_networks_other_than_their_spec(self, words, change, tmp_path):
        model = make()
        change(model)
        self.refuse(model, words, tmp_path / "file")
        self.refuse(torch.nn.Linear(2, 2), "Linear", tmp_path / "file")

    def test_ranges(self, tmp_path):
        model = make(ranges=True)
        model.layer2[0].quant_out.scale = None
        self.refuse(model, "layer2.0.quant_out has no range", tmp_path / "file")
        for scale, zero_point in ((0.0, 0), (-1.0, 0), (math.nan, 0), (math.inf, 0), (1.0, 256), (1.0, -1)):
            model.layer2[0].quant_out.scale = scale
            model.layer2[0].quant_out.zero_point = zero_point
            self.refuse(model, "layer2.0.quant_out has scale", tmp_path / "file")

    @pytest.mark.parametrize(
        ("entry", "bad"),
        [
            *(("mean", bad) for bad in ([0.1, 0.2], [math.nan])),
            *(("std", bad) for bad in ([0.0], [math.inf])),
            *(("classes", bad) for bad in (["a"], list(range(10)))),
        ],
    )
    def test_preprocessing(self, entry, bad, tmp_path):
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


# --- Damaged and foreign files -------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "file"
    save(make(bits=8, ranges=True), path)
    return path


class TestReading:
    def test_contents_that_do_not_fit_together(self, file, tmp_path):
        """Written by another program, with the right checksum."""
        document, arrays = parts(file)
        path, weights = tmp_path / "file", document["weights"]
        path.write_bytes(forge(document, arrays))
        assert artifact.read(path).sha256 == document["sha256"]
        others = [(document | {"format": "nnc_utils.artifact/2"}, arrays), (document | {"spec": {}}, arrays)]
        others += [
            (document | {"weights": changed}, arrays) for changed in (weights[:-1], [[0, 9**9, 4]] * 21)
        ]
        others += [(document | {"encodings": changed}, arrays) for changed in ([], [{"kind": "dense"}])]
        about = {"mean": [0.1, 0.2], "std": [math.nan], "classes": document["classes"][1:]}
        others += [(document | {entry: changed}, arrays) for entry, changed in about.items()]
        int8 = document["encodings"][0]
        for change in ({"bits": 27}, {"bits": 8.0}, {"bits": 2**40}, {"axis": 1}):
            others.append((document | {"encodings": [int8 | change]}, arrays))
        for name, array in arrays.items():
            if array.dtype == np.float32 or name == "scale":  # 255 four times is NaN, too
                nan = np.full_like(array, 255 if name == "scale" else np.nan)
                others.append((document, arrays | {name: nan}))
        for name, array in arrays.items():
            others.append((document, arrays | {name: array[:-1]}))
            if name != "activation_scale":  # without it activations are floats
                others.append((document, {key: other for key, other in arrays.items() if key != name}))
        for changed, tensors in others:
            path.write_bytes(forge(changed, tensors))
            with pytest.raises(ArtifactError) as caught:
                artifact.read(path)
            assert str(caught.value).startswith(str(path)) and "checksum" not in str(caught.value)

    @pytest.mark.parametrize("sha256", ["", None, "0" * 64])
    def test_the_wrong_checksum(self, sha256, file, tmp_path):
        document, arrays = parts(file)
        changed = {"artifact": json.dumps(document | {"sha256": sha256})}
        (tmp_path / "file").write_bytes(safetensors.numpy.save(arrays, changed))
        with pytest.raises(ArtifactError, match="checksum"):
            artifact.read(tmp_path / "file")

    @pytest.mark.parametrize(
        "data",
        [
            *(b"", b"1234567", b"\0" * 4096, b"\xff" * 4096, b"PK\3\4" * 1000),
            (10**9).to_bytes(8, "little") + b"{}",
            (100_000).to_bytes(8, "little") + b"[" * 100_000,
            safetensors.numpy.save({"a": np.zeros(3)}),
            *(
                safetensors.numpy.save({"a": np.zeros(3)}, {"artifact": text})
                for text in ("{", "[" * 10**5, "1")
            ),
        ],
    )
    def test_foreign_files(self, data, tmp_path):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ArtifactError, match="file: truncated or no artifact"):
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
