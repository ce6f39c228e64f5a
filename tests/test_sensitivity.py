"""Fisher, Hessian and measured increase against the same by hand, on a network of 108 weights."""

import copy
import itertools

import pytest
import torch
from small_networks import ODD, images, network, quantized
from torch.nn import functional

from nnc_utils import encoding, models, sensitivity
from nnc_utils.models import BlockSpec, Spec
from nnc_utils.quantization import uniform

TINY = Spec(
    1, 4, 3, "small", 2, "basic", ((BlockSpec((2, 2), (3, 3)), BlockSpec((3, 2), (1, 1), 2, "none")),)
)
NAMES = [layer.name for layer in models.layers(TINY)]
LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture
def model():
    """In float64, its batch-norm in training mode: what is measured has to be in evaluation mode."""
    torch.manual_seed(0)
    model = models.build(TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, 0.2, 0.6)  # few units that are never active
    model.train()(images(TINY, 64))
    return model.double()


@pytest.fixture
def batch():
    return images(TINY, 5).double()


def weights(model):
    return {name: model.get_submodule(name).weight for name in NAMES}


def without_parametrizations(model):
    for layer in models.layers(model.spec):
        encoding.fold(model.get_submodule(layer.name))
    return model


def state(model):
    """All that a call must leave as it was, in bytes."""
    tensors = {**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    return {name: None if t is None else t.numpy().tobytes() for name, t in tensors.items()}, flags


def exact_fisher(model, batch):
    """Sum over all labels of their probability times the squared gradient, one image at a time."""
    model = copy.deepcopy(model).eval()
    own = weights(model)
    fisher = {name: torch.zeros_like(weight) for name, weight in own.items()}
    for image in batch:
        logs = functional.log_softmax(model(image[None])[0], 0)
        for log in logs:
            gradients = torch.autograd.grad(log, list(own.values()), retain_graph=True)
            for name, gradient in zip(own, gradients):
                fisher[name] += float(log.detach().exp()) * gradient.square() / len(batch)
    return fisher


def test_the_expected_fisher_diagonal_is_exact(model, batch, monkeypatch):
    """Every way to draw labels for two batches of two and one image, times its probability."""
    batch = batch[:3]
    shares = copy.deepcopy(model).eval()(batch).softmax(1).detach()
    mean = {name: 0.0 for name in NAMES}
    for labels in itertools.product(range(3), repeat=3):
        waiting = iter(torch.tensor(labels)[:, None].split(2))
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=waiting, **__: next(drawn))
        found = sensitivity.fisher_diagonal(model, batch, batch_size=2)
        chance = float(shares[range(3), labels].prod())
        mean = {name: mean[name] + chance * found[name] for name in NAMES}
    for name, wanted in exact_fisher(model, batch).items():
        assert wanted.sum() > 0
        assert torch.allclose(mean[name], wanted, rtol=1e-9, atol=1e-15), name


def test_drawn_labels_give_the_fisher_diagonal_on_average(model, batch):
    model.fc.weight.data *= 5  # the network is sure of itself: labels are far from evenly drawn
    drawn = [sensitivity.fisher_diagonal(model, batch, seed=seed) for seed in range(100)]
    wanted = exact_fisher(model, batch)
    for name in NAMES:
        sums = torch.stack([found[name].sum() for found in drawn])
        assert abs(sums.mean() - wanted[name].sum()) < 4 * sums.std() / len(sums) ** 0.5, name
        assert drawn[0][name].shape == wanted[name].shape and (drawn[0][name] >= 0).all()
        assert torch.equal(sensitivity.fisher_diagonal(model, batch, seed=7)[name], drawn[7][name])


def hessian_diagonals(model, batch, labels):
    """Central differences of the gradient, weight by weight."""
    model = copy.deepcopy(model).eval()
    own, step, found = weights(model), 1e-6, {}
    for name, weight in own.items():
        found[name], flat = torch.zeros_like(weight.data), weight.data.view(-1)
        for i in range(flat.numel()):
            slopes = []
            for side in (step, -step):
                flat[i] += side
                loss = functional.cross_entropy(model(batch), labels)
                slopes.append(float(torch.autograd.grad(loss, weight)[0].view(-1)[i]))
                flat[i] -= side
            found[name].view(-1)[i] = (slopes[0] - slopes[1]) / (2 * step)
    return found


def test_one_weight_at_a_time_gives_the_exact_diagonal(model, batch, monkeypatch):
    count = {name: weight.numel() for name, weight in weights(model).items()}
    total = dict.fromkeys(NAMES, 0.0)
    for name in NAMES:
        for i in range(count[name]):
            units = {n: torch.zeros(size, dtype=torch.float64) for n, size in count.items()}
            units[name][i] = 1
            waiting = itertools.cycle(units.values())
            monkeypatch.setattr(
                sensitivity, "_signs", lambda weight, _, drawn=waiting: next(drawn).view_as(weight)
            )
            found = sensitivity.hessian_diagonal(model, batch, LABELS, probes=1, batch_size=3)
            total = {n: total[n] + found[n] for n in NAMES}
    wanted = hessian_diagonals(model, batch, LABELS)
    assert all(found.abs().max() > 1e-4 for found in wanted.values())
    for name in NAMES:
        torch.testing.assert_close(total[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_random_probes_give_the_diagonal_on_average(model, batch):
    wanted = hessian_diagonals(model, batch, LABELS)
    settings = {"probes": 10, "batch_size": 3}
    drawn = [sensitivity.hessian_diagonal(model, batch, LABELS, seed=s, **settings) for s in range(12)]
    for name in NAMES:
        each = torch.stack([found[name] for found in drawn])
        for estimates, exact in ((each, wanted[name]), (each.flatten(1).sum(1), wanted[name].sum())):
            noise = estimates.std(0) / len(estimates) ** 0.5
            assert ((estimates.mean(0) - exact).abs() <= 5 * noise + 1e-6).all(), name
        again = sensitivity.hessian_diagonal(model, batch, LABELS, seed=3, **settings)
        assert torch.equal(again[name], drawn[3][name])


def candidates(model):
    """For each layer its weight in 2 bits, and one that has nothing to do with it."""
    generator = torch.Generator().manual_seed(0)
    offered = {}
    for layer in LAYERS:
        weight = model.get_submodule(layer.name).weight.detach()
        rounded = encoding.decode(uniform.quantize(weight, bits=2, per_channel=True))
        offered[layer.name] = {2: rounded, 4: torch.randn(weight.shape, generator=generator)}
    return offered


LAYERS = models.layers(ODD)


@pytest.mark.parametrize(
    "make, batch_size",
    [(network, 4), (lambda spec: quantized(network(spec), bits=8), 10)],
    ids=["float", "8 bits"],
)
def test_the_increase_is_what_putting_the_weight_there_does(make, batch_size):
    model, plain = make(ODD), without_parametrizations(make(ODD))
    batch, labels = images(ODD, 10), torch.arange(10) % 5
    offered = candidates(model)
    found = sensitivity.loss_increase(model, offered, batch, labels, batch_size=batch_size)
    assert list(found) == [layer.name for layer in LAYERS]

    def loss(network):
        with torch.no_grad():
            return float(functional.cross_entropy(network(batch).double(), labels))

    for name, widths in offered.items():
        assert list(found[name]) == list(widths)
        for bits, weight in widths.items():
            changed = copy.deepcopy(plain)
            changed.get_submodule(name).weight.data.copy_(weight)
            wanted = loss(changed) - loss(model)
            assert found[name][bits] == pytest.approx(wanted, rel=1e-3, abs=2e-5), (name, bits)
    assert min(abs(widths[4]) for widths in found.values()) > 1e-3


def test_a_layers_own_weight_increases_nothing_and_part_of_the_layers_will_do():
    model = network(ODD)
    own = {name: {8: model.get_submodule(name).weight} for name in ("fc", "layer1.1.downsample.0")}
    found = sensitivity.loss_increase(model, own, images(ODD, 6), torch.arange(6) % 5)
    assert found == {name: {8: 0.0} for name in own}


CALLS = {
    "fisher": lambda model, images, labels: sensitivity.fisher_diagonal(model, images),
    "hessian": lambda *sample: sensitivity.hessian_diagonal(*sample, probes=1),
    "increase": lambda model, *sample: sensitivity.loss_increase(
        model, {"conv1": {2: torch.zeros(2, 1, 3, 3)}}, *sample
    ),
}
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@EACH
def test_the_network_stays_as_it_was_whatever_happens(model, batch, call):
    model(batch).sum().backward()
    model.fc.weight.requires_grad_(False)
    model.layer1[0].bn1.eval()
    encoding.attach(model.conv1, uniform.quantize(model.conv1.weight, bits=3, per_channel=True))
    before, generator = state(model), torch.get_rng_state()
    call(model, batch, LABELS)
    assert state(model) == before
    with pytest.raises(ValueError, match="logits are not finite"):
        call(model, torch.full_like(batch, float("nan")), LABELS)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


@EACH
def test_a_quantized_weight_is_looked_at_where_it_is(model, batch, call):
    attached = uniform.quantize_network(model.float(), bits=3, per_channel=True)
    plain = without_parametrizations(uniform.quantize_network(model.float(), bits=3, per_channel=True))
    ours, theirs = (call(each, batch.float(), LABELS) for each in (attached, plain))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]


@EACH
def test_images_and_labels_that_do_not_fit_are_refused(model, batch, call):
    with pytest.raises(ValueError, match="at least 1"):
        call(model, batch[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"\(5, 2, 4, 4\).*\(1, 4, 4\)"):
        call(model, batch.expand(5, 2, 4, 4), LABELS)
    with pytest.raises(ValueError, match="are torch.uint8: normalized floats"):
        call(model, batch.to(torch.uint8), LABELS)
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        call(model, batch, LABELS)


def test_labels_that_do_not_fit_are_refused(model, batch):
    for call in (CALLS["hessian"], CALLS["increase"]):
        with pytest.raises(ValueError, match=r"labels have shape \(4,\)"):
            call(model, batch, LABELS[:4])
