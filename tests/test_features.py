"""Features and attention maps against their formulas, and stages that cannot be compared."""

import numpy as np
import pytest
import torch

from nnc_utils import models
from nnc_utils.distillation import attention, features

GENERATOR = torch.Generator().manual_seed(0)


def stage(images=4, channels=3, size=4):
    return torch.randn(images, channels, size, size, generator=GENERATOR, dtype=torch.float64)


def resnet(width, size=16, depth=18):
    torch.manual_seed(0)
    spec = models.resnet(depth, channels=1, size=size, classes=10, stem="small_stride2", width=width)
    return models.build(spec).eval()


def test_outputs_are_those_of_the_stages():
    network, images = resnet(0.25), torch.randn(5, 1, 16, 16, generator=GENERATOR)
    logits, kept = features.outputs(network, images, ["layer2", "layer4"])
    assert torch.equal(logits, network(images)) and list(kept) == ["layer2", "layer4"]
    assert kept["layer2"].shape == (5, 32, 4, 4)
    pooled = kept["layer4"].mean((2, 3))
    torch.testing.assert_close(network.fc(pooled), logits)
    with pytest.raises(RuntimeError):
        features.outputs(network, torch.zeros(1, 3, 16, 16), ["layer2"])
    assert not network.layer2._forward_hooks  # taken away again


def test_attention_maps_are_their_formula():
    student, teacher = stage(channels=2), stage(channels=7)
    total = 0
    for ours, theirs in zip(student.numpy(), teacher.numpy(), strict=True):
        maps = [np.square(x).sum(0).ravel() for x in (ours, theirs)]
        maps = [m / np.sqrt(np.square(m).sum()) for m in maps]
        total += np.square(maps[0] - maps[1]).mean()
    found = attention.attention_transfer(student=student, teacher=teacher)
    assert found.item() == pytest.approx(total / 4, rel=1e-5)
    scaled = attention.attention_transfer(student=-5 * student, teacher=teacher)
    torch.testing.assert_close(scaled, found)  # neither scale nor sign matters


def test_similarity_is_its_formula():
    student, teacher = stage(channels=2, size=6), stage()  # any width and size
    relations = []
    for given in (student, teacher):
        rows = given.flatten(1).numpy()
        products = rows @ rows.T
        relations.append(products / np.sqrt(np.square(products).sum(1, keepdims=True)))
    expected = np.square(relations[0] - relations[1]).sum() / 16
    assert features.similarity(student=student, teacher=teacher).item() == pytest.approx(expected, rel=1e-5)


def test_hints_are_their_formula():
    student, teacher = stage(), stage()
    expected = np.square(student.numpy() - teacher.numpy()).mean() / np.square(teacher.numpy()).mean()
    found = features.hint(student=student, teacher=teacher)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    scaled = features.hint(student=7 * student, teacher=7 * teacher)
    assert scaled.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [features.hint, features.similarity, attention.attention_transfer])
def test_gradients_and_zero(loss):
    student, teacher = stage(size=2).requires_grad_(), stage(size=2)
    assert loss(student=teacher, teacher=teacher).item() == 0
    assert loss(student=student, teacher=teacher).item() > 0
    assert torch.autograd.gradcheck(lambda given: loss(student=given, teacher=teacher), student)
    half = loss(student=student.detach().bfloat16(), teacher=teacher.bfloat16())
    assert half.dtype == torch.float32  # sums of what autocast made of them


def test_a_larger_stage_is_averaged_down():
    small = stage(size=2)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert features.hint(student=small, teacher=large).item() == pytest.approx(0, abs=1e-12)
    assert features.hint(student=large, teacher=small).item() == pytest.approx(0, abs=1e-12)
    assert attention.attention_transfer(student=small, teacher=large).item() == pytest.approx(0, abs=1e-12)


def test_regressors_map_the_student_to_the_teacher():
    student, teacher = resnet(0.25), resnet(0.125, depth=50)
    wrapped = features.WithRegressors(student, teacher.spec, ["layer1", "layer3"])
    images = torch.randn(2, 1, 16, 16, generator=GENERATOR)
    assert torch.equal(wrapped(images), student(images)) and wrapped.spec == student.spec
    _, ours = features.outputs(wrapped, images, ["layer1", "layer3"])
    _, theirs = features.outputs(teacher, images, ["layer1", "layer3"])
    for name, regressor in wrapped.regressors.items():
        assert regressor(ours[name]).shape == theirs[name].shape
