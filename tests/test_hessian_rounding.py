"""Second-order rounding against finite differences, exhaustive search and plain rounding."""

import itertools
import math

import numpy as np
import pytest
import torch

from nnc_utils import curvature, encoding, models
from nnc_utils.quantization import hessian_rounding, uniform
from tests import small_networks

IMAGES = small_networks.images(small_networks.PLAIN, 256)


@pytest.fixture
def model():
    return small_networks.network(small_networks.PLAIN)


def loss(weight, rounded, known):
    """By the Kronecker product written out, or as a sum over it where that is too large."""
    error = (encoding.decode(rounded) - weight).flatten(1)
    if error.numel() <= 1000:
        flat = error.flatten()
        return float(0.5 * flat @ torch.kron(known.outputs, known.inputs) @ flat)
    return float(0.5 * torch.trace(known.outputs @ error @ known.inputs @ error.T))


def one_by_one(weight, known, scale, *, lambda_=0.0, damping=(0.0, 0.0)):
    """Rounded with steps of one's own."""
    along = curvature.upper_factor(known.inputs, damping[0])
    columns = weight.T.contiguous().numpy()
    codes = hessian_rounding._round_columns(
        columns,
        np.ones_like(columns),
        np.zeros_like(columns),
        along,
        outputs=known.outputs.diagonal().numpy(),
        scale=scale.numpy(),
        lambda_=lambda_,
        counts=np.ones(2 * hessian_rounding.LARGEST + 1, np.float32),
    )
    return encoding.Uniform(torch.from_numpy(codes.T.copy()).to(torch.int16), scale, 0, 8)


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_compensated_by_later_weights_and_by_later_rows(seed, monkeypatch):
    """Against rounding to nearest, and against a rounding that knows nothing of how rows' errors add up."""
    monkeypatch.setattr(hessian_rounding, "ROWS", 4)
    known = small_networks.kronecker(32, 30, seed=seed)
    weight = torch.randn(32, 30, generator=torch.Generator().manual_seed(100 + seed))
    ours = hessian_rounding.quantize(weight, known, lambda_=1e-3, damping=(0.0, 0.0))
    alone = one_by_one(weight, known, ours.scale, lambda_=1e-3)
    assert loss(weight, ours, known) < 0.85 * loss(weight, alone, known)
    plain = curvature.Curvature(known.inputs, torch.eye(32))
    nearest = encoding.Uniform((weight / ours.scale[:, None]).round().short(), ours.scale, 0, 8)
    compensated = one_by_one(weight, plain, ours.scale)
    assert loss(weight, compensated, plain) < 0.9 * loss(weight, nearest, plain)


def test_codes_are_those_of_one_weight_after_the_other(monkeypatch):
    """Without a price, against the definition in double precision: no blocks of columns, a mask, odd ends."""
    monkeypatch.setattr(hessian_rounding, "ROWS", 5)
    monkeypatch.setattr(hessian_rounding, "COLUMNS", 7)
    generator = torch.Generator().manual_seed(0)
    known, weight = small_networks.kronecker(13, 24), torch.randn(13, 24, generator=generator)
    kept = torch.rand(13, 24, generator=generator) > 0.2
    weight *= kept
    damping = (0.05, 0.3)
    ours = hessian_rounding.quantize(weight, known, lambda_=1e-9, damping=damping, mask=kept)
    w, scale = weight.double(), ours.scale.double()
    moments = (known.inputs.double(), known.outputs.double())
    r, s = map(curvature.upper_factor, moments, damping)
    error = torch.zeros_like(w)
    for row in range(13):
        first = row // 5 * 5
        block = slice(first, min(first + 5, 13))
        felt = -torch.linalg.inv(s[block, block].T) @ s[:first, block].T @ error[:first] @ r
        for column in range(24):
            pushed = error[row, :column] @ r[:column, column] - felt[row - first, column]
            code = ((w[row, column] + pushed / r[column, column]) / scale[row]).round().clamp(-63, 63)
            assert int(ours.codes[row, column]) == int(code * kept[row, column]), (row, column)
            error[row, column] = w[row, column] - scale[row] * code * kept[row, column]


def test_steps_follow_what_later_rows_cannot_make_up_for(monkeypatch):
    """A row's curvature is that of its block when all later rows are free: a Schur complement."""
    monkeypatch.setattr(hessian_rounding, "ROWS", 4)
    known = small_networks.kronecker(10, 24)
    weight = 1e-3 * torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    lambda_ = 10.0
    scale = hessian_rounding.quantize(weight, known, lambda_=lambda_, damping=(0.0, 0.0)).scale
    g = known.outputs.double()
    for first in (0, 4, 8):
        own, later = slice(first, min(first + 4, 10)), slice(min(first + 4, 10), 10)
        free = g[own, own] - g[own, later] @ torch.linalg.inv(g[later, later]) @ g[later, own]
        typical = torch.logdet(known.inputs.double()).div(24).exp()
        wanted = (24 * lambda_ / (math.log(4) * free.diagonal() * typical)).sqrt()
        assert torch.allclose(scale[own].double(), wanted, rtol=1e-3)


def test_no_choice_of_codes_has_a_much_smaller_cost_in_a_small_case():
    """Against all codes near the weight: the greedy order costs something, but not much on average."""
    ratios = []
    for seed in range(10):
        known = small_networks.kronecker(1, 5, seed=seed)
        weight = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
        ours = hessian_rounding.quantize(weight, known, lambda_=1e-2, damping=(0.0, 0.0))
        step = float(ours.scale)
        offsets = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2), repeat=5)))
        errors = ((weight / step).round() + offsets) * step - weight
        best = float((0.5 * known.outputs[0, 0] * ((errors @ known.inputs) * errors).sum(1)).min())
        ratios.append(loss(weight, ours, known) / best)
    assert min(ratios) >= 1 - 1e-3
    assert sorted(ratios)[5] < 3


def test_a_higher_price_buys_fewer_bits_at_a_higher_loss():
    known = small_networks.kronecker(64, 72)
    weight = torch.randn(64, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    bits, losses = [], []
    for lambda_ in (1.0, 10.0, 100.0, 1000.0):
        rounded = hessian_rounding.quantize(weight, known, lambda_=lambda_)
        bits.append(encoding.payload_bits(rounded))
        losses.append(loss(weight, rounded, known))
    assert bits == sorted(bits, reverse=True) and losses == sorted(losses)


def test_the_price_of_a_bit_saves_coded_bits_at_the_same_loss():
    """Against the same compensation without a price, its step chosen to end at the same size."""
    known = small_networks.kronecker(128, 72, seed=3)
    known.outputs.copy_(torch.diag(known.outputs.diagonal()))  # rows have nothing to make up for
    weight = torch.randn(128, 72, generator=torch.Generator().manual_seed(0)) * 0.7
    ours = hessian_rounding.quantize(weight, known, lambda_=0.3)
    free = []
    for wider in torch.linspace(0.6, 3, 45):
        free.append(one_by_one(weight, known, wider * ours.scale, damping=(0.05, 0.3)))
    smaller = [x for x in free if encoding.payload_bits(x) <= encoding.payload_bits(ours)]
    assert smaller and loss(weight, ours, known) < min(loss(weight, x, known) for x in smaller)


def test_a_network_has_half_the_bits_of_plain_rounding_at_half_its_loss(model):
    known = curvature.curvatures(model, IMAGES)
    ours = hessian_rounding.quantize_network(model, known, lambda_=1e-8)

    def size_and_loss(network):
        size = total = 0.0
        for layer in models.layers(model.spec):
            rounded = encoding.encoded(network.get_submodule(layer.name))
            size += encoding.payload_bits(rounded)
            total += loss(model.get_submodule(layer.name).weight.detach(), rounded, known[layer.name])
        return size, total

    size, total = size_and_loss(ours)
    plain, error = size_and_loss(uniform.quantize_network(model, bits=2, per_channel=True, clip="mse"))
    assert size < 0.5 * plain and total < 0.5 * error


def test_zeros_constants_and_dead_inputs_are_no_trouble():
    known = small_networks.kronecker(4, 12)
    known.inputs[3] = known.inputs[:, 3] = 0.0  # an input that is never on
    dead = curvature.Curvature(known.inputs, torch.zeros(4, 4))
    for weight in (torch.zeros(4, 12), torch.full((4, 12), 0.3), torch.eye(12)[:4]):
        for one in (known, dead):
            rounded = hessian_rounding.quantize(weight, one, lambda_=1e-6)
            assert encoding.decode(rounded).isfinite().all()
            encoding.pack(rounded)
    exact = hessian_rounding.quantize(torch.zeros(4, 12), known, lambda_=1e-6)
    assert not encoding.decode(exact).any()


def test_bad_input_is_refused():
    known = small_networks.kronecker(4, 12)
    with pytest.raises(ValueError, match="48 weights are not finite"):
        hessian_rounding.quantize(torch.full((4, 12), math.nan), known, lambda_=1e-6)
