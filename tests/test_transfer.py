"""A second task: its labels, its difference to a first file, and what 09 builds and measures."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from small_networks import PLAIN, images, network, saved

from bench import committed
from nnc_utils import artifact, configurations, data, encoding, models, rows, training
from nnc_utils.quantization import activations
from nnc_utils.transfer import build, delta, starts, tasks

TARGET = data.load("digits:5-9")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A first task's file."""
    path = tmp_path_factory.mktemp("first") / "first.safetensors"
    saved(network(PLAIN), path)
    return path


def second(base, *, share=0.02, seed=0):
    """A second task's network: all of it moved, of the convolutions the largest differences kept."""
    before = tasks.in_floats(tasks.adopted(artifact.load(base), 5, seed=seed))
    moved = tasks.adopted(before, 5, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in moved.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=draw))
    return before, moved, delta.sparse(before, moved, share)


def test_few_labels_are_as_many_of_each_class_and_drawn_by_the_seed():
    few = tasks.few(TARGET, 7, seed=1)
    assert torch.bincount(few.train.labels).tolist() == [7] * 5
    known = {image.tobytes() for image in TARGET.train.images.numpy()}
    assert {image.tobytes() for image in few.train.images.numpy()} <= known
    assert torch.equal(few.train.images, tasks.few(TARGET, 7, seed=1).train.images)
    assert not torch.equal(few.train.images, tasks.few(TARGET, 7, seed=2).train.images)
    assert len(tasks.few(TARGET, 0, seed=1).train) == len(TARGET.train)
    with pytest.raises(ValueError, match="labels is 500: class '.' has .* training images; 0 takes all"):
        tasks.few(TARGET, 500, seed=1)
    assert len(tasks.repeated(few, 100).train) == 105


def test_training_the_head_leaves_the_body_bit_for_bit(base):
    model = tasks.freeze_body(tasks.adopted(artifact.load(base, trainable=True), 5, seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.fit(model, TARGET, epochs=0.2, batch_size=16, augment=False, loss=tasks.of_the_head)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_a_sparse_difference_is_the_largest_share_of_what_moved(base):
    before, moved, sparse = second(base, share=0.02)
    names = delta.convolutions(sparse)
    whole = [moved.get_submodule(n).weight - before.get_submodule(n).weight for n in names]
    kept = [sparse.get_submodule(n).weight - before.get_submodule(n).weight for n in names]
    flat, left = (np.concatenate([w.detach().flatten().numpy() for w in ws]) for ws in (whole, kept))
    largest = np.argsort(-np.abs(flat))[: round(0.02 * len(flat))]
    assert set(np.flatnonzero(left)) == set(largest)
    np.testing.assert_allclose(left[largest], flat[largest], atol=1e-6)


def test_a_sparse_difference_has_its_share_of_places_also_where_hardly_any_weight_moved(base):
    before = tasks.adopted(artifact.load(base), 5, seed=0)
    moved = tasks.adopted(before, 5, seed=0)
    with torch.no_grad():
        moved.conv1.weight[0] += 1
    few = delta.sparse(before, moved, 0.02)
    masks = [few.get_submodule(n).parametrizations.weight[0].mask for n in delta.convolutions(few)]
    assert sum(int(m.sum()) for m in masks) == round(0.02 * sum(m.numel() for m in masks))
    assert masks[0][0].all()


def test_a_difference_gives_back_the_network_that_it_describes(base, tmp_path):
    """Against the codes, computed here by hand."""
    before, _, sparse = second(base)
    file = tmp_path / "second.safetensors"
    nbytes = delta.save(sparse, base, file, classes=TARGET.classes)
    loaded, classes = delta.load(file, base)
    assert classes == TARGET.classes and nbytes == file.stat().st_size < base.stat().st_size / 5
    values = [
        sparse.get_submodule(n).parametrizations.weight[0].values.detach() for n in delta.convolutions(sparse)
    ]
    scale = max(float(v.abs().max()) for v in values) / 127
    for name, value in zip(delta.convolutions(sparse), values):
        wanted = before.get_submodule(name).weight + (value / np.float32(scale)).round() * np.float32(scale)
        assert torch.equal(loaded.get_submodule(name).weight, wanted)
    step = float(loaded.fc.weight.detach().abs().max()) / 127
    assert (loaded.fc.weight - sparse.fc.weight).abs().max() <= step / 2 * 1.01
    assert torch.equal(loaded.fc.bias, sparse.fc.bias)
    for name, tensor in sparse.state_dict().items():
        if "running" in name or ".bn" in name and name.endswith(("weight", "bias")):
            assert (loaded.state_dict()[name] - tensor).abs().max() < 1e-4, name


def test_a_difference_that_was_loaded_is_written_and_loaded_again_as_the_same_network(base, tmp_path):
    before, _, sparse = second(base)
    delta.save(sparse, base, tmp_path / "one", classes=TARGET.classes)
    one, _ = delta.load(tmp_path / "one", base)
    delta.save(delta.sparse(before, one, 0.02), base, tmp_path / "two", classes=TARGET.classes)
    two, _ = delta.load(tmp_path / "two", base)
    inputs = images(PLAIN, 8)
    weights = [[m.get_submodule(n).weight for n in delta.convolutions(m)] for m in (one, two)]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*weights))
    with torch.inference_mode():
        assert torch.allclose(one(inputs), two(inputs), atol=1e-3)
        again, _ = delta.load(tmp_path / "one", base)
        assert torch.equal(one(inputs), again(inputs))


def test_another_base_is_refused_by_its_checksum(base, tmp_path):
    other = tmp_path / "other.safetensors"
    saved(network(PLAIN, seed=1), other)
    delta.save(second(base)[2], base, tmp_path / "second", classes=TARGET.classes)
    first, given = artifact.read(base).sha256[:16], artifact.read(other).sha256[:16]
    with pytest.raises(delta.DeltaError, match=f"to the network {first}, and .* is {given}: give the file"):
        delta.load(tmp_path / "second", other)


@pytest.mark.parametrize("place", [12, 200, -40, -1])
def test_a_damaged_or_truncated_difference_is_refused(base, tmp_path, place):
    file = tmp_path / "second"
    delta.save(second(base)[2], base, file, classes=TARGET.classes)
    whole = file.read_bytes()
    for broken in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:]):
        file.write_bytes(broken)
        with pytest.raises(delta.DeltaError, match="no whole difference"):
            delta.load(file, base)
    with pytest.raises(delta.DeltaError, match="no whole difference"):
        delta.load(base, base)


def test_what_a_difference_cannot_hold_is_refused_and_named(base, tmp_path):
    _, moved, _ = second(base)
    with pytest.raises(delta.DeltaError, match="conv1 is not what it is in"):
        delta.save(moved, base, tmp_path / "second", classes=TARGET.classes)


class Run:
    """What `bench.TransferBench` is to builders."""

    seed, images, dense = 1, data.load("digits:0-4"), None
    recipe = {"depth": 18, "width": 0.125, "epochs": 0.3, "learning_rate": 0.05, "augment": False}
    recipe |= {"batch_size": 32}
    parameters = {"seen": 64, "learning_rate": 0.02, "batch_size": 32, "compress_epochs": 0.2}

    def __init__(self, folder):
        self.folder, self.fitted = folder, []
        self.dense = network(dataclasses.replace(PLAIN, classes=5))
        self.target = dataclasses.replace(TARGET, mean=self.images.mean, std=self.images.std)

    def path(self, name):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def sample(self, count):
        train = self.images.train
        return self.images.normalize(train.images[:count]), train.labels[:count]

    def fit(self, model, name, **options):
        self.fitted.append(name)
        given = {"images": self.images, "seed": self.seed} | options
        return training.fit(model, given.pop("images"), **given)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def built(bench, **mapping):
    [one] = configurations.read([{"method": "transfer", "labels": 10, **mapping}], "transfer")
    build.check(one, bench)
    return build.build(one, bench)


@pytest.mark.parametrize("start", ["dense", "scratch", "int8", "zeros", "channels", "distilled", "pipeline"])
def test_each_start_is_trained_on_as_many_images_of_the_second_task(bench, start):
    file, before, _ = starts.file(bench, start)
    one = built(bench, start=start)
    assert one.train_images - before == 64 and one.network.spec.classes == 5
    assert (models.macs(one.network.spec) < models.macs(bench.dense.spec)) == (
        start in ("channels", "distilled", "pipeline")
    )
    trained = {"dense": 0, "scratch": 0, "int8": 0}.get(start, 1)
    assert (before > 0) == bool(trained) and artifact.read(file).mean == bench.images.mean


def test_what_is_kept_is_masks_and_codes(bench):
    zeros, int8 = (built(bench, start=start, train="kept").network for start in ("zeros", "int8"))
    masks = [encoding.mask_of(zeros.get_submodule(name)) for name in delta.convolutions(zeros)]
    share = sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)
    assert share == pytest.approx(0.9, abs=0.01)
    for name, mask in zip(delta.convolutions(zeros), masks):
        assert not zeros.get_submodule(name).weight[~mask].any()
    kinds = {type(encoding.encoded(int8.get_submodule(x.name))) for x in models.layers(int8.spec)}
    assert kinds == {encoding.Uniform} and all(p.scale for p in models.activations(int8).values())


def test_activations_are_calibrated_on_all_classes(bench, monkeypatch):
    """The labelled images lie class by class: the first of many are of one class."""
    drawn, calibrate = [], activations.calibrate
    bench.target, whole = tasks.repeated(bench.target, 5000), bench.target
    monkeypatch.setattr(activations, "calibrate", lambda *a: drawn.append(a[1]) or calibrate(*a))
    try:
        built(bench, start="int8", train="kept", labels=0)
    finally:
        bench.target = whole
    images = whole.normalize(whole.train.images).numpy()
    label = {image.tobytes(): int(own) for image, own in zip(images, whole.train.labels)}
    for sample in drawn[-2:]:
        counts = np.bincount([label[image.tobytes()] for image in sample.numpy()])
        assert len(counts) == 5 and counts.min() > 0.15 * len(sample) and len(sample) <= 512


def test_few_images_are_two_steps_at_least_since_one_would_move_nothing(bench, monkeypatch):
    monkeypatch.setattr(bench, "parameters", bench.parameters | {"seen": 32})
    model = tasks.adopted(bench.dense, 5, seed=1)
    before = model.fc.weight.detach().clone()
    history = build._fit(bench, "few", tasks.few(bench.target, 10, seed=1), "all", model)
    assert history.images == 32 and (model.fc.weight - before).abs().max() > 1e-4


@pytest.mark.parametrize("train", ["head", "sparse"])
def test_a_head_and_a_sparse_difference_are_files_of_a_few_kilobytes(bench, train):
    one = built(bench, start="int8", train=train)
    base, _, _ = starts.file(bench, "int8")
    again, _ = delta.load(one.file, base)
    inputs = bench.target.normalize(bench.target.test.images[:8])
    with torch.inference_mode():
        assert torch.equal(again(inputs), one.network(inputs))
    assert one.file.stat().st_size < (1500 if train == "head" else base.stat().st_size / 3)
    body = artifact.load(base).state_dict()
    moved = {
        n
        for n, t in one.network.state_dict().items()
        if not n.startswith("fc") and not torch.equal(t, body[n])
    }
    assert bool(moved) == (train == "sparse")


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"start": "dense", "train": "kept"}, "kept: dense has no masks or codes"),
        ({"start": "scratch", "train": "head"}, "scratch: new weights are all trained"),
        ({"start": "pruned"}, "start: Input should be"),
        ({"start": "dense", "labels": -1}, "labels: Input should be greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(mapping, said):
    with pytest.raises(configurations.ConfigurationError, match=said):
        configurations.read([{"method": "transfer", **mapping}], "transfer")


def test_a_checksum_covers_every_tensor_and_the_text(base, tmp_path):
    """Changed contents with a checksum that is not made anew are refused, whatever was changed."""
    file = tmp_path / "second"
    delta.save(second(base)[2], base, file, classes=TARGET.classes)
    whole = file.read_bytes()
    assert artifact.read(base).sha256.encode() in whole
    for was, now in ((rb"\"5\"", rb"\"3\""), (b'"U8"', b'"I8"')):
        assert was in whole
        file.write_bytes(whole.replace(was, now, 1))
        with pytest.raises(delta.DeltaError, match="another checksum"):
            delta.load(file, base)


def test_the_report_has_a_line_a_start_and_a_column_for_each_number_of_labels():
    told = [("dense", 10, 80.0, 0.0), ("zeros", 10, 78.5, -1.5), ("dense", 0, 95.0, 0.0)]
    table = pd.DataFrame(
        [
            {"technique": "transfer", "method": "transfer", "accuracy_mean": accuracy, "delta_mean": delta}
            | {"settings": configurations.settings_json({"start": start} | ({"labels": n} if n else {}))}
            | {"delta_ci_low": delta - 1, "delta_ci_high": delta + 1}
            for start, n, accuracy, delta in told
        ]
    )
    head, _, *lines = committed.second_tasks(rows.with_settings(table)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *lines)]
    assert cells[0] == ["start and training", "10 labels a class", "all labels"]
    assert cells[1][1:] == ["80.0 % (+0.00 [-1.00, +1.00])", "95.0 % (+0.00 [-1.00, +1.00])"]
    assert cells[2] == ["90 % zeros, all in floats", "78.5 % (-1.50 [-2.50, -0.50])", "–"]
    assert committed.second_tasks(rows.with_settings(table.assign(technique="search"))) == ""
