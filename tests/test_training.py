"""training.fit against SGD and its schedule written by hand, and against itself when it is killed."""

import copy
import dataclasses
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from nnc_utils import data, evaluation, models, training
from nnc_utils.training import TrainingError, batches, cross_entropy, fit

CPU = torch.device("cpu")
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process at once on either


@pytest.fixture(autouse=True)
def no_bars(one_thread, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def few(digits):
    """The first 150 training images: two batches of 64 and a rest."""
    return dataclasses.replace(digits, train=data.Split(digits.train.images[:150], digits.train.labels[:150]))


def network(seed=0, width=1 / 16):
    torch.manual_seed(seed)
    return models.build(models.resnet(18, channels=1, size=8, classes=10, stem="small", width=width))


def noisy(model, images, labels):
    """A loss that draws from torch's global generator."""
    return cross_entropy(model, images + 0.1 * torch.randn_like(images), labels)


SETTINGS = {"epochs": 3, "batch_size": 64, "seed": 5, "loss": noisy, "validate": True, "device": "cpu"}


def assert_equal_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def without_seconds(history):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history]


# --- The method ---------------------------------------------------------------------------------


def one_cycle(step, total, peak):
    """Smith, 2018: cosine from peak / 25 up to the peak, then down to peak / 250,000."""
    top, last = 0.3 * total - 1, total - 1
    low, high, share = (
        (peak / 25, peak, step / top) if step <= top else (peak, peak / 25e4, (step - top) / (last - top))
    )
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def test_fit_is_nesterovs_sgd_on_one_cycle(few, monkeypatch):
    monkeypatch.setattr(training, "fast_bf16", lambda device: False)  # the loop below is in fp32
    ours, theirs = network(), network()
    # steps so small that rounding, of which each processor has its own, is not amplified by the next ones
    settings = {"epochs": 5, "learning_rate": 0.005, "weight_decay": 0.5, "momentum": 0.8, "batch_size": 64}
    history = fit(ours, few, seed=3, device="cpu", **settings)

    velocity = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    rates, step = [], 0
    theirs.train()
    for epoch in range(1, 6):
        losses = []
        for images, labels in batches(few, epoch, 3, 64, True, CPU):
            loss = functional.nll_loss(theirs(images).log_softmax(1), labels)
            parameters = dict(theirs.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            rate = one_cycle(step, 10, 0.005)
            with torch.no_grad():
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    gradient = gradient + (0.5 * p if p.ndim > 1 else 0)
                    velocity[name] = 0.8 * velocity[name] + gradient
                    p -= rate * (gradient + 0.8 * velocity[name])
            losses.append(loss.item())
            rates.append(rate)
            step += 1
        assert history[epoch - 1].loss == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert [epoch.learning_rate for epoch in history] == pytest.approx(rates[::2])
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_last_epoch_may_be_a_part(few):
    model = network()
    history = fit(model, few, epochs=1.5, batch_size=64, device="cpu", validate=True)
    predictions = evaluation.predict(model, few.validation, normalize=few.normalize)
    assert history[-1].validation == evaluation.accuracy(predictions, few.validation.labels)
    assert [epoch.images for epoch in history] == [128, 64] and history.images == 192
    frame = history.to_frame()
    assert list(frame.columns) == ["epoch", "loss", "learning_rate", "validation", "images", "seconds"]
    assert frame["epoch"].tolist() == [1, 2] and frame["seconds"].sum() == pytest.approx(history.seconds)
    assert training.History().to_frame().empty and training.History().images == 0


def test_frozen_parameters_stay_and_the_network_comes_back_as_it_went(few, monkeypatch):
    model, seen, asked = network(), [], []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    model.conv1.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(model, images, labels):
        order = images.is_contiguous(memory_format=torch.channels_last)
        seen.append((model.training, order, images.dtype, tuple(images.shape), list(asked)))
        return cross_entropy(model, images, labels)

    fit(model, few, loss=loss, epochs=2, batch_size=64, device="cpu", validate=True, threads=3)
    assert seen == [(True, True, torch.float32, (64, 1, 8, 8), [3])] * 4  # the rest of 22 is dropped
    assert asked == [3, 1]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"conv1.weight"}
    assert not any(module.training for module in model.modules())
    assert all(p.is_contiguous() and p.device == CPU for p in model.parameters())


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_parametrizations_are_kept_and_zeros_stay_zero(few, tmp_path):
    def masked():
        model = network()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name != "conv1":
                mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
                parametrize.register_parametrization(module, "weight", Mask(mask))
        return model

    model = masked()
    places = {name: m for name, m in model.named_modules() if parametrize.is_parametrized(m)}
    before = {name: module.weight.detach().clone() for name, module in places.items()}
    fit(model, few, epochs=2, batch_size=64, device="cpu", checkpoint=tmp_path / "fit.pt")
    again = masked()
    fit(again, few, epochs=2, batch_size=64, device="cpu", checkpoint=tmp_path / "fit.pt")
    for name, module in places.items():
        assert parametrize.is_parametrized(module, "weight")
        mask = module.parametrizations.weight[0].mask
        assert (module.weight[~mask] == 0).all() and not mask.all()
        assert (module.weight != before[name])[mask].any()
        assert torch.equal(again.get_submodule(name).weight, module.weight)


# --- Seeds --------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_epoch_alone(few):
    def drawn(epoch, seed):
        return torch.cat([images for images, _ in batches(few, epoch, seed, 50, True, CPU)])

    first = drawn(2, seed=1)
    torch.manual_seed(99)
    drawn(1, seed=1)
    assert torch.equal(drawn(2, seed=1), first)
    assert not torch.equal(drawn(3, seed=1), first) and not torch.equal(drawn(2, seed=2), first)
    assert not torch.equal(drawn(1, seed=2), first)


def test_an_epoch_shows_each_image_once_with_its_label(few):
    marked = few.train.images.clone()
    marked[:, 0, 0, 0] = torch.arange(150)
    few = dataclasses.replace(few, train=data.Split(marked, few.train.labels))
    shown = list(batches(few, 1, 0, 50, False, CPU))
    images, labels = (torch.cat(part) for part in zip(*shown, strict=True))
    order = ((images * few.std[0] + few.mean[0]) * 255)[:, 0, 0, 0].round().long()
    assert order.sort().values.tolist() == list(range(150)) != order.tolist()
    assert torch.equal(labels, few.train.labels[order])
    torch.testing.assert_close(images, few.normalize(marked[order]))


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_generator_alone(few):
    states = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(seed * len(states))
        before = torch.get_rng_state()
        fit(model, few, **SETTINGS | {"epochs": 1, "seed": seed})
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert_equal_states(states[0], states[1])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


# --- Interrupted --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(few):
    torch.set_num_threads(1)
    model = network()
    history = fit(model, few, **SETTINGS)
    return model.state_dict(), history


def dies_in(call, kill):
    """The loss `noisy` until its given call; then it dies."""
    calls = []

    def noisy(model, images, labels):
        calls.append(None)
        if len(calls) == call:
            kill()
        return cross_entropy(model, images + 0.1 * torch.randn_like(images), labels)

    noisy.__qualname__ = "noisy"
    return noisy


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", [3, 4, 6])  # epoch 2: first and last step, epoch 3: last step
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(few, tmp_path, uninterrupted, call):
    checkpoint = tmp_path / "folder" / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(network(), few, **SETTINGS | {"loss": dies_in(call, interrupt)}, checkpoint=checkpoint)
    model = network()
    torch.manual_seed(call)
    history = fit(model, few, **SETTINGS, checkpoint=checkpoint)
    assert_equal_states(model.state_dict(), uninterrupted[0])
    assert without_seconds(history) == without_seconds(uninterrupted[1])


def test_a_finished_run_only_loads(few, finished, uninterrupted, capsys):
    model = network()
    again = fit(model, few, **SETTINGS | {"loss": dies_in(1, interrupt)}, checkpoint=finished)
    assert without_seconds(again) == without_seconds(uninterrupted[1]) and again.seconds > 0
    assert_equal_states(model.state_dict(), uninterrupted[0])
    assert not model.training and capsys.readouterr().out == ""


def test_a_checkpoint_is_whole_or_the_one_before(few, tmp_path, monkeypatch):
    checkpoint, write = tmp_path / "fit.pt", torch.save

    def torn(content, file):
        if len(content["history"]) == 2:
            file.write(b"half a checkpoint")
            raise KeyboardInterrupt
        write(content, file)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), few, **SETTINGS, checkpoint=checkpoint)
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"learning_rate": 0.2}, "learning_rate is 0.1 there and 0.2 here"),
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"loss": cross_entropy}, "loss is 'noisy' there and 'cross_entropy' here"),
        ({"model": 1}, "starting network"),
        ({"model": "range"}, "starting network"),
        ({"model": "width"}, "starting network"),
        ({"data": None}, "training data"),
    ],
)
def test_a_checkpoint_of_another_call_is_refused(few, finished, changed, named):
    model = network()
    if changed.get("model") == 1:
        model = network(seed=1)
    elif changed.get("model") == "width":
        model = network(width=1 / 8)
    elif changed.get("model") == "range":
        model.quant_stem.scale = 0.1
    if "data" in changed:
        few = dataclasses.replace(few, train=data.Split(few.train.images, few.train.labels.flip(0)))
    changed = {name: value for name, value in changed.items() if name not in ("model", "data")}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=f"fit.pt.*{named}.*delete the file"):
        fit(model, few, **SETTINGS | changed, checkpoint=finished)
    assert_equal_states(model.state_dict(), before)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "fit.pt"
    torch.set_num_threads(1)
    fit(network(), few, **SETTINGS, checkpoint=path)
    return path


@pytest.mark.parametrize("kind", ["empty", "half", "text", "foreign", "pickle"])
def test_a_file_that_is_no_checkpoint_is_refused(few, tmp_path, finished, kind):
    path, whole = tmp_path / "fit.pt", finished.read_bytes()
    if kind in ("foreign", "pickle"):
        torch.save({"model": {}} if kind == "foreign" else {"call": Path("code"), "history": []}, path)
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"not a checkpoint"}[kind])
    with pytest.raises(TrainingError, match=r"fit\.pt is no checkpoint.*delete the file"):
        fit(network(), few, **SETTINGS, checkpoint=path)


# --- What goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_at_its_step(few, value):
    calls = []

    def loss(model, images, labels):
        calls.append(None)
        return cross_entropy(model, images, labels) + (value if len(calls) == 3 else 0)

    message = (
        rf"epoch 2 of 5.*step 1 is not finite \(learning rate {one_cycle(2, 10, 0.05):.4g}.*lower learning"
    )
    with pytest.raises(TrainingError, match=message):
        fit(network(), few, loss=loss, epochs=5, batch_size=64, learning_rate=0.05, device="cpu")
    assert len(calls) == 3


def test_weights_that_stop_being_finite_are_noticed_behind_a_finite_loss(few, tmp_path):
    def loss(model, images, labels):  # the root's slope at zero is infinite
        return cross_entropy(model, images, labels) + (model.fc.bias * 0).abs().sqrt().sum()

    with pytest.raises(TrainingError, match="fc.bias is not finite"):
        fit(network(), few, loss=loss, epochs=1, batch_size=150, device="cpu", checkpoint=tmp_path / "fit.pt")
    assert not (tmp_path / "fit.pt").exists()


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"epochs": 0}, "epochs is 0.*one step"),
        ({"epochs": float("nan")}, "epochs is nan.*one step"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 151}, "batch_size is 151.*digits's 150 training images"),
        ({"learning_rate": 0}, "learning_rate is 0: a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(few, wrong, named):
    with pytest.raises(ValueError, match=named):
        fit(network(), few, **{"epochs": 1, "device": "cpu"} | wrong)


def test_a_network_for_other_data_is_refused(few):
    other = models.build(models.resnet(18, channels=3, size=8, classes=10, stem="small", width=1 / 16))
    with pytest.raises(ValueError, match="3 channels and 10 classes, the data set digits 1 channels"):
        fit(other, few, epochs=1)


# --- Around it ----------------------------------------------------------------------------------


def test_one_line_an_epoch_where_no_bar_is_shown(few, capsys):
    fit(network(), few, epochs=2, batch_size=64, device="cpu", validate=True)
    fit(network(), few, epochs=1, batch_size=64, device="cpu")
    number, validation = r"\d+\.\d+", r"validation \d+\.\d\d %  "
    wanted = [(1, 2, validation), (2, 2, validation), (1, 1, "")]
    for line, (epoch, of, middle) in zip(capsys.readouterr().out.splitlines(), wanted, strict=True):
        assert re.fullmatch(rf"epoch {epoch}/{of}  loss {number}  {middle}{number} s", line)


@pytest.mark.parametrize(
    "flags, fast", [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)]
)
def test_bf16_only_where_the_processor_has_it(monkeypatch, flags, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert training.fast_bf16(CPU) is fast


@pytest.mark.parametrize("fast, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_follows_the_hardware(few, monkeypatch, fast, expected):
    monkeypatch.setattr(training, "fast_bf16", lambda device: fast)
    seen = []

    def loss(model, images, labels):
        seen.append(model(images).dtype)
        return cross_entropy(model, images, labels)

    model = network()
    fit(model, few, loss=loss, epochs=1, batch_size=150, device="cpu")
    assert seen == [expected] and {p.dtype for p in model.parameters()} == {torch.float32}
