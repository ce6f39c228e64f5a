"""Where things are computed: scores of an accelerator are those of the processor, and come home."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nnc_utils import (
    artifact,
    batch_norm,
    curvature,
    data,
    devices,
    evaluation,
    models,
    sensitivity,
    training,
)
from nnc_utils.distillation import features, student_loss
from nnc_utils.pruning import channels, unstructured
from nnc_utils.quantization import activations, correction, qat, uniform

CPU = torch.device("cpu")
DIGITS = data.load("digits")
SPEC = models.resnet(18, channels=1, size=8, classes=10, stem="small", width=0.25)
IMAGES, LABELS = DIGITS.normalize(DIGITS.train.images[:96]), DIGITS.train.labels[:96]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = models.build(SPEC)
    training.fit(network, DIGITS, epochs=3, batch_size=64, learning_rate=0.05, device=CPU)
    return network


def test_exact_is_float32_and_never_mps():
    assert not torch.backends.cudnn.allow_tf32
    assert devices.exact_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_network_evaluated_elsewhere_stays_where_it_is(model):
    """The device "meta" computes nothing: whoever gets there has made a copy."""
    options = {"normalize": DIGITS.normalize}
    here = evaluation.logits(model, DIGITS.validation, **options)
    assert torch.equal(here, evaluation.logits(model, DIGITS.validation, device=CPU, **options))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        evaluation.logits(model, DIGITS.validation, device=torch.device("meta"), **options)
    assert {p.device for p in model.parameters()} == {CPU}
    assert torch.equal(here, evaluation.logits(model, DIGITS.validation, **options))


def test_a_teacher_stays_where_it_is(model):
    loss = student_loss.online(model, student_loss.Recipe(), SPEC)
    student = models.build(SPEC)
    strides = [p.stride() for p in model.parameters()]
    loss(student, IMAGES, LABELS).backward()
    assert [p.stride() for p in model.parameters()] == strides
    assert not torch.is_inference(next(model.parameters()))


def tensors(result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"": result}
    if isinstance(result, curvature.Curvature):
        return {"inputs": result.inputs, "outputs": result.outputs}
    if isinstance(result, nn.Module):
        ranges = {n: torch.tensor(p.scale) for n, p in models.activations(result).items() if p.scale}
        return {n: t for n, t in result.state_dict().items() if t.is_floating_point()} | ranges
    if isinstance(result, dict):
        return {f"{n} {inner}": t for n, value in result.items() for inner, t in tensors(value).items()}
    return {"": torch.tensor(result)}


def curved(model):
    return curvature.curvatures(model, IMAGES)


COMPUTED = {
    "logits": lambda m: evaluation.logits(
        m, DIGITS.validation, normalize=DIGITS.normalize, device=devices.exact_device()
    ),
    "fisher": lambda m: sensitivity.fisher_diagonal(m, IMAGES),
    "hessian": lambda m: sensitivity.hessian_diagonal(m, IMAGES, LABELS, probes=2),
    "loss_increase": lambda m: sensitivity.loss_increase(
        m, {"fc": {1: 0.5 * m.fc.weight.detach()}}, IMAGES, LABELS
    ),
    "curvature": curved,
    "loss_of_errors": lambda m: curvature.loss_of_errors(m, {"fc": 0.1 * m.fc.weight.detach()}, IMAGES),
    "channels_taylor": lambda m: channels.scores(m, "taylor", images=IMAGES, labels=LABELS),
    "taylor": lambda m: unstructured.scores(m, "taylor", images=IMAGES, labels=LABELS),
    "compensated": lambda m: channels.compensated(m, {"layer1.0.conv1": torch.arange(8)}, IMAGES),
    "reestimated": lambda m: batch_norm.reestimate(m, IMAGES),
    "calibrated": lambda m: activations.calibrate(m, IMAGES, clip="mse"),
    "bias": lambda m: correction.correct_bias(
        uniform.quantize_network(m, bits=3, per_channel=True), IMAGES, original=m
    ),
}


@cuda
@pytest.mark.parametrize("name", COMPUTED)
def test_cuda_computes_what_the_processor_does(model, name, monkeypatch):
    there = tensors(COMPUTED[name](model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = tensors(COMPUTED[name](model))
    assert there.keys() == here.keys() and {t.device for t in there.values()} == {CPU}
    for part, expected in here.items():
        largest = max(float(expected.abs().max()), 1e-12)
        torch.testing.assert_close(there[part] / largest, expected / largest, rtol=0, atol=2e-3, msg=part)


@cuda
@pytest.mark.parametrize(
    "kind", ["plain", "masked", "ste", "lsq", "hints", "kd", "dkd", "attention", "cached"]
)
def test_cuda_trains_what_is_saved_on_the_processor(model, kind, tmp_path):
    network, loss, pictures, augment = copy.deepcopy(model), training.cross_entropy, DIGITS, True
    if kind == "masked":
        score = unstructured.scores(network, "magnitude")
        network = unstructured.masked(network, unstructured.masks(score, 0.5))
    elif kind in ("ste", "lsq"):
        network = qat.prepare(network, IMAGES, bits=4, method=kind)
    elif kind in ("kd", "dkd", "attention", "hints"):
        about = {"soft": kind} if "kd" in kind else {kind: 1.0}
        loss = student_loss.online(model, student_loss.Recipe(**about), SPEC)
    elif kind == "cached":
        memory = student_loss.cache_logits(model, DIGITS, copies=2)
        loss, pictures, augment = (
            student_loss.cached(memory, student_loss.Recipe(), SPEC),
            memory.images,
            False,
        )
    trained = features.WithRegressors(network, SPEC, student_loss.STAGES) if kind == "hints" else network
    about = {"batch_size": 64, "learning_rate": 0.01, "augment": augment, "validate": True, "loss": loss}
    about["checkpoint"] = tmp_path / "checkpoint"
    history = training.fit(trained, pictures, epochs=2, device="cuda", **about)
    assert history[-1].validation > 85
    assert {t.device for m in (trained, model) for t in m.state_dict().values()} == {CPU}
    if kind == "masked":
        assert all((network.get_submodule(n).weight == 0)[~m].all() for n, m in _masks(network).items())
    saving = {"mean": DIGITS.mean, "std": DIGITS.std, "classes": DIGITS.classes}
    artifact.save(network, tmp_path / "file", **saving)
    again = artifact.load(tmp_path / "file")
    assert torch.equal(again(IMAGES), network.eval()(IMAGES))


def _masks(network):
    found = {x.name: network.get_submodule(x.name).parametrizations.weight[0] for x in models.layers(SPEC)}
    return {name: parametrization.mask for name, parametrization in found.items()}
