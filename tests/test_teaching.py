"""Teachers beside a student, or before it: in eval mode, aligned with the pictures, refused where unfit."""

import copy
import dataclasses

import pytest
import torch
from scipy.stats import binned_statistic
from torch import nn
from torch.nn import functional

from nnc_utils import data, models, training
from nnc_utils.distillation import attention, calibration, features, soft_labels, teaching
from nnc_utils.distillation.teaching import Recipe

DIGITS = data.load("digits")
CPU = torch.device("cpu")


def resnet(width, *, seed=0, **about):
    torch.manual_seed(seed)
    about = {"channels": 1, "size": 8, "classes": 10, "stem": "small_stride2"} | about
    return models.build(models.resnet(18, width=width, **about))


@pytest.fixture(scope="module")
def teacher():
    network = resnet(0.25)
    training.fit(network, DIGITS, epochs=3, batch_size=32, learning_rate=0.05, augment=False, device=CPU)
    return network


def batch(count=64):
    images = DIGITS.normalize(DIGITS.train.images[:count]).to(memory_format=torch.channels_last)
    return images, DIGITS.train.labels[:count]


def test_each_part_of_a_recipe_is_in_the_loss(teacher):
    """The value is the weighted sum of the parts, each computed here on the teacher in eval mode."""
    student, (images, labels) = resnet(0.125).eval(), batch()
    wrapped = features.WithRegressors(student, teacher.spec, ["layer2", "layer3"])
    recipe = Recipe(alpha=0.7, temperature=3.0, attention=5.0, hints=0.5, similarity=2.0)
    recipe = dataclasses.replace(recipe, stages=("layer2", "layer3"))
    found = teaching.taught_by(teacher, recipe, student.spec)(wrapped, images, labels)
    teacher.eval()
    theirs, their_stages = features.outputs(teacher, images, recipe.stages)
    ours, our_stages = features.outputs(student, images, recipe.stages)
    kl = functional.kl_div((ours / 3).log_softmax(1), (theirs / 3).softmax(1), reduction="batchmean")
    expected = 0.3 * functional.cross_entropy(ours, labels) + 0.7 * 9 * kl
    for stage in recipe.stages:
        a, b = our_stages[stage], their_stages[stage]
        maps = [functional.normalize(x.square().sum(1).flatten(1), dim=1) for x in (a, b)]
        expected = expected + 5 * (maps[0] - maps[1]).square().mean()
        hint = (wrapped.regressors[stage](a) - b).square().mean() / b.square().mean()
        expected = expected + 0.5 * hint
    rows = [x.flatten(1) for x in (our_stages["layer3"], their_stages["layer3"])]
    relations = [functional.normalize(x @ x.T, dim=1) for x in rows]
    expected = expected + 2 * (relations[0] - relations[1]).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_as_it_is_and_in_eval_mode(teacher):
    teacher.zero_grad()
    teacher.train()  # as a careless caller leaves it
    before = copy.deepcopy(teacher.state_dict())
    seen = []
    handle = teacher.register_forward_hook(lambda module, given, output: seen.append(module.training))
    student = resnet(0.125)
    loss = teaching.taught_by(teacher, Recipe(), student.spec)
    training.fit(student, DIGITS, epochs=0.2, batch_size=32, loss=loss, augment=False, device=CPU)
    handle.remove()
    assert seen and not any(seen)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_sums_over_features_are_exact_under_autocast(teacher, monkeypatch):
    """Of the features that the loss saw: bf16 products of whole stages would move the value by percents."""
    seen = []  # a second forward pass may take other kernels, which round otherwise
    monkeypatch.setattr(teaching, "outputs", lambda *about: seen.append(features.outputs(*about)) or seen[-1])
    student, (images, labels) = resnet(0.25, seed=5).eval(), batch(32)
    for name in ("similarity", "attention"):
        recipe = Recipe(soft="", stages=("layer3",), **{name: 1.0})
        with torch.autocast("cpu", torch.bfloat16):
            value = teaching.taught_by(teacher, recipe, student.spec)(student, images, labels)
        (_, theirs), (logits, ours) = seen[-2:]
        assert ours["layer3"].dtype == torch.bfloat16 and value.dtype == torch.float32
        pair = {"student": ours["layer3"].double(), "teacher": theirs["layer3"].double()}
        exact = {"similarity": features.similarity, "attention": attention.attention_transfer}[name](**pair)
        found = value.double() - functional.cross_entropy(logits.double(), labels)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)


def test_a_careless_callers_teacher_teaches_what_it_does_in_eval_mode(teacher):
    """The silent bug: in train mode its batch-norm normalizes by the batch, and its logits are others."""
    student, (images, labels) = resnet(0.125).eval(), batch(32)
    in_eval = copy.deepcopy(teacher).eval()(images)
    careless = copy.deepcopy(teacher).train()
    in_train = copy.deepcopy(careless)(images)
    found = teaching.taught_by(careless, Recipe(alpha=1.0), student.spec)(student, images, labels)
    about = {"student_logits": student(images), "temperature": 4.0}
    right, wrong = (soft_labels.kd(teacher_logits=logits, **about) for logits in (in_eval, in_train))
    torch.testing.assert_close(found, right)
    assert abs((wrong - right).item()) > 1e-3 * right.item()


def test_hints_train_the_regressors_and_leave_a_plain_student(teacher):
    student = resnet(0.125)
    wrapped = features.WithRegressors(student, teacher.spec, teaching.STAGES)
    before = [r.weight.clone() for r in wrapped.regressors.values()]
    recipe = Recipe(soft="", hints=1.0)
    loss = teaching.taught_by(teacher, recipe, student.spec)
    images, labels = batch()
    early = loss(wrapped, images, labels).item()
    training.fit(wrapped, DIGITS, epochs=3, batch_size=32, loss=loss, learning_rate=0.05, device=CPU)
    assert all(not torch.equal(b, r.weight) for b, r in zip(before, wrapped.regressors.values(), strict=True))
    assert loss(wrapped.eval(), images, labels).item() < 0.7 * early
    assert set(wrapped.student.state_dict()) == set(resnet(0.125).state_dict())


def test_a_student_learns_from_the_teacher_alone(teacher):
    """alpha = 1: no label is used, and yet the student names the classes."""
    student = resnet(0.125)
    loss = teaching.taught_by(teacher, Recipe(alpha=1.0), student.spec)
    wrong = dataclasses.replace(
        DIGITS, train=data.Split(DIGITS.train.images, torch.zeros_like(DIGITS.train.labels))
    )
    about = {"epochs": 4, "batch_size": 32, "learning_rate": 0.05, "augment": False, "device": CPU}
    training.fit(student, wrong, loss=loss, **about)
    right = (
        student(DIGITS.normalize(DIGITS.validation.images)).argmax(1) == DIGITS.validation.labels
    ).float()
    assert right.mean() > 0.8
    other = resnet(0.125)
    shuffled = teaching.taught_by(teacher, Recipe(alpha=1.0, shuffled=True), student.spec)
    training.fit(other, wrong, loss=shuffled, **about)
    right = (other(DIGITS.normalize(DIGITS.validation.images)).argmax(1) == DIGITS.validation.labels).float()
    assert right.mean() < 0.5


class Pixels(nn.Module):
    """A network that tells its pictures apart: the logits are ten of their pixels."""

    spec = models.resnet(18, channels=1, size=8, classes=10)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1)[:, 20:30].float() * self.scale


def test_what_the_teacher_said_stays_with_its_picture():
    """Student and teacher are the same: the loss is 0 if and only if both see the same picture."""
    network = Pixels()
    memory = teaching.remember(network, DIGITS, copies=3, seed=5, batch_size=100)
    assert memory.pictures.train.images.shape == (3 * len(DIGITS.train), *DIGITS.train.images.shape[1:])
    for recipe, zero in ((Recipe(alpha=1.0), True), (Recipe(alpha=1.0, shuffled=True), False)):
        loss = teaching.taught_from(memory, recipe, network.spec)
        drawn = training.batches(memory.pictures, 2, 7, 64, False, CPU)  # shuffled, as `fit` draws them
        values = torch.stack([loss(network, images, rows) for images, rows in drawn]).detach()
        assert (values.max() < 1e-4) == zero and (zero or values.min() > 0.05), recipe
    # the same pictures, with the labels of the data set
    drawn = training.batches(memory.pictures, 1, 7, 64, False, CPU)
    images, rows = next(drawn)
    truth = teaching.taught_from(memory, Recipe(alpha=0.0), network.spec)(network, images, rows)
    expected = functional.cross_entropy(network(images), DIGITS.train.labels[rows % len(DIGITS.train)])
    torch.testing.assert_close(truth, expected)
    # each copy is another augmentation, and the same seed gives the same
    first, second, _ = memory.pictures.train.images.split(len(DIGITS.train))
    assert not torch.equal(first, second)
    again = teaching.remember(network, DIGITS, copies=3, seed=5, batch_size=100)
    assert torch.equal(again.pictures.train.images, memory.pictures.train.images)
    assert torch.equal(again.logits, memory.logits)


def test_a_teacher_need_not_look_twice(tmp_path):
    network, about = Pixels(), {"copies": 2, "seed": 5, "file": tmp_path / "said"}
    memory = teaching.remember(network, DIGITS, **about)
    network.forward = None  # whoever looks again, fails
    again = teaching.remember(network, DIGITS, **about)
    assert torch.equal(again.logits, memory.logits) and again.seconds == memory.seconds
    assert torch.equal(again.pictures.train.images, memory.pictures.train.images)
    for other in (about | {"seed": 6}, about | {"copies": 1}):
        with pytest.raises(ValueError, match="of another teacher, pictures or augmentation"):
            teaching.remember(network, DIGITS, **other)
    network = Pixels()
    network.scale.data.fill_(2.0)
    with pytest.raises(ValueError, match="of another teacher, pictures or augmentation"):
        teaching.remember(network, DIGITS, **about)
    content = about["file"].read_bytes()
    for broken in (content[: len(content) // 2], b"", b"text"):
        about["file"].write_bytes(broken)
        with pytest.raises(ValueError, match="holds no logits of a teacher .*delete it or name another"):
            teaching.remember(network, DIGITS, **about)


def test_remembering_teaches_as_well(teacher):
    memory = teaching.remember(teacher, DIGITS, copies=2, seed=0)
    student = resnet(0.125)
    loss = teaching.taught_from(memory, Recipe(alpha=1.0), student.spec)
    about = {"batch_size": 32, "learning_rate": 0.05, "augment": False, "device": CPU}
    training.fit(student, memory.pictures, epochs=3, loss=loss, **about)
    found = student(DIGITS.normalize(DIGITS.validation.images)).argmax(1)
    # about 0.9 for any seed and processor, 0.1 where the teacher speaks of other pictures
    assert (found == DIGITS.validation.labels).float().mean() > 0.7


def test_an_ensemble_is_the_mean_of_its_members():
    members = [resnet(0.125, seed=seed).eval() for seed in (1, 2, 3)]
    images, _ = batch(4)
    expected = sum(member(images) for member in members) / 3
    torch.testing.assert_close(teaching.Ensemble(members)(images), expected)
    with pytest.raises(ValueError, match="the teacher has 10 classes, the student 7"):
        teaching.Ensemble([members[0], resnet(0.125, classes=7)])


def test_label_smoothing_is_torch_s():
    network, (images, labels) = resnet(0.125).eval(), batch(16)
    found = teaching.smoothed(0.1)(network, images, labels)
    expected = functional.cross_entropy(network(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"smoothing is 1: a share in \[0, 1\) is needed"):
        teaching.smoothed(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, "temperature is 0: a number above 0"),
        ({"alpha": 1.5}, r"alpha is 1.5: the share of the soft labels, in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"soft": "kl"}, "soft is 'kl': one of 'kd', 'dkd'"),
        ({"attention": -1}, "attention is -1: a weight of 0 or more"),
        ({"hints": float("inf")}, "hints is inf"),
        ({"others": -1}, "others is -1: a weight of 0 or more"),
    ],
)
def test_a_recipe_that_makes_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**given)


def test_a_teacher_that_does_not_fit():
    student = resnet(0.125)
    for about, message in (
        ({"classes": 7}, "the teacher has 7 classes, the student 10: the same classes are needed"),
        ({"channels": 3}, "the teacher has 3 channels, the student 1"),
        ({"size": 16}, "the teacher has 16 size, the student 8"),
    ):
        with pytest.raises(ValueError, match=message):
            teaching.taught_by(resnet(0.25, **about), Recipe(), student.spec)
    with pytest.raises(ValueError, match="no stage 'layer9'"):
        teaching.taught_by(resnet(0.25), Recipe(attention=1.0, stages=("layer9",)), student.spec)
    with pytest.raises(ValueError, match="an ensemble has logits only"):
        teaching.taught_by(teaching.Ensemble([student]), Recipe(attention=1.0), student.spec)
    memory = teaching.remember(Pixels(), DIGITS, copies=1)
    with pytest.raises(ValueError, match="features are not stored: use taught_by"):
        teaching.taught_from(memory, Recipe(similarity=1.0), student.spec)
    with pytest.raises(ValueError, match="the teacher has 10 classes, the student 7"):
        teaching.taught_from(memory, Recipe(), resnet(0.125, classes=7).spec)
    with pytest.raises(ValueError, match="copies is 0"):
        teaching.remember(Pixels(), DIGITS, copies=0)
    hints = teaching.taught_by(resnet(0.25), Recipe(hints=1.0), student.spec)
    with pytest.raises(
        ValueError, match="hints need a regressor at each stage: give features.WithRegressors"
    ):
        hints(student, *batch(4))
    again = teaching.taught_from(memory, Recipe(), student.spec)  # the pictures augmented once more
    with pytest.raises(
        ValueError, match="the teacher saw other pictures: fit on memory.pictures with augment"
    ):
        training.fit(student, memory.pictures, epochs=0.5, loss=again, augment=True, device=CPU)
    with pytest.raises(ValueError, match="one picture a batch"):
        teaching.taught_by(resnet(0.25), Recipe(shuffled=True), student.spec)(student, *batch(1))


def test_calibration_error_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=generator)
    labels = torch.randint(4, (500,), generator=generator)
    confidence, predicted = (x.numpy() for x in logits.double().softmax(1).max(1))
    right = (predicted == labels.numpy()).astype(float)
    counts, _, _ = binned_statistic(confidence, right, "count", bins=10, range=(0, 1))
    means = [binned_statistic(confidence, x, "mean", bins=10, range=(0, 1))[0] for x in (right, confidence)]
    expected = sum(n * abs(a - c) for n, a, c in zip(counts, *means, strict=True) if n) / 500
    assert calibration.expected_calibration_error(logits, labels, bins=10) == pytest.approx(100 * expected)
    sure = torch.eye(4)[labels] * 50
    assert calibration.expected_calibration_error(sure, labels) == pytest.approx(0, abs=1e-6)
    assert calibration.agreement(logits, logits) == 100 and calibration.agreement(sure, -sure) == 0
