"""Online and cached teachers: in eval mode, aligned with the images, refused where they do not fit."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnc_utils import configurations, data, models, training
from nnc_utils.distillation import attention, candidates, features, soft_labels, student_loss
from nnc_utils.distillation.student_loss import Recipe

DIGITS = data.load("digits")
CPU = torch.device("cpu")
OPTIONS = {"batch_size": 32, "learning_rate": 0.05, "augment": False, "device": CPU}


def resnet(width, *, seed=0, **spec):
    torch.manual_seed(seed)
    spec = {"channels": 1, "size": 8, "classes": 10, "stem": "small_stride2"} | spec
    return models.build(models.resnet(18, width=width, **spec))


@pytest.fixture(scope="module")
def teacher():
    network = resnet(0.125, seed=3)
    training.fit(network, DIGITS, epochs=3, **OPTIONS)
    return network


def batch(count=64):
    images = DIGITS.normalize(DIGITS.train.images[:count]).to(memory_format=torch.channels_last)
    return images, DIGITS.train.labels[:count]


class Pixels(nn.Module):
    """A network that tells its images apart: the logits are ten of their pixels."""

    spec = models.resnet(18, channels=1, size=8, classes=10)

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return images.flatten(1)[:, 20:30].float() * self.scale


def test_each_part_of_a_recipe_is_in_the_loss(teacher):
    """The value is the weighted sum of the parts, each computed here on the teacher in eval mode."""
    student, (images, labels) = resnet(0.0625).eval(), batch()
    wrapped = features.WithRegressors(student, teacher.spec, ["layer2", "layer3"])
    recipe = Recipe(alpha=0.7, temperature=3.0, attention=5.0, hints=0.5, similarity=2.0)
    recipe = dataclasses.replace(recipe, stages=("layer2", "layer3"))
    value = student_loss.online(teacher, recipe, student.spec)(wrapped, images, labels)
    theirs, their_stages = features.outputs(teacher.eval(), images, recipe.stages)
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
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mapping", "soft"),
    [
        (
            {"method": "kd", "temperature": 3, "standardize": True, "gain": 5},
            {"function": "kd", "standardize": 1},
        ),
        ({"method": "dkd", "temperature": 3, "others": 5}, {"function": "dkd", "others": 5, "labels": None}),
        ({"method": "dist", "temperature": 3, "inter": 4}, {"function": "dist", "inter": 4, "intra": 2}),
    ],
)
def test_a_configuration_s_settings_reach_the_loss_of_an_online_and_a_cached_teacher(mapping, soft):
    mapping |= {"width": 0.25, "alpha": 0.7, "cached": True, "teacher": "ensemble"}
    recipe = candidates.recipe(configurations.read([mapping], "distillation")[0])
    teacher, student = Pixels(), Pixels(-0.5)
    memory = student_loss.cache_logits(teacher, DIGITS, copies=1, augment=False)
    images, labels = batch(64)
    if "labels" in soft:
        soft["labels"] = labels
    function, student_logits = getattr(soft_labels, soft.pop("function")), student(images)
    pair = {"student_logits": student_logits, "teacher_logits": teacher(images), "temperature": 3}
    weight = 0.7 * mapping.get("gain", 1)
    expected = 0.3 * functional.cross_entropy(student_logits, labels) + weight * function(**pair, **soft)
    online = student_loss.online(teacher, recipe, student.spec)(student, images, labels)
    cached = student_loss.cached(memory, recipe, student.spec)(student, images, torch.arange(64))
    torch.testing.assert_close(online, expected)
    torch.testing.assert_close(cached, expected, rtol=1e-3, atol=1e-3)


def test_a_careless_callers_teacher_stays_as_it_is_and_teaches_in_eval_mode(teacher):
    """The silent bug: in train mode its batch-norm normalizes by the batch, and its logits are others."""
    student, (images, labels) = resnet(0.0625).eval(), batch(32)
    careless = copy.deepcopy(teacher).train()
    before = copy.deepcopy(careless.state_dict())
    in_eval, in_train = copy.deepcopy(teacher).eval()(images), copy.deepcopy(careless)(images)
    loss = student_loss.online(careless, Recipe(alpha=1.0), student.spec)
    pair = {"student_logits": student(images), "temperature": 4.0}
    right, wrong = (soft_labels.kd(teacher_logits=logits, **pair) for logits in (in_eval, in_train))
    torch.testing.assert_close(loss(student, images, labels), right)
    assert abs((wrong - right).item()) > 1e-3 * right.item()
    training.fit(student, DIGITS, epochs=0.2, loss=loss, **OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in careless.state_dict().items())
    assert all(parameter.grad is None for parameter in careless.parameters())
    memory = student_loss.cache_logits(careless, DIGITS, copies=1, augment=False)
    assert (memory.logits[:32] - in_eval).abs().mean() < 0.1 * (in_train - in_eval).abs().mean()
    assert careless.training and careless.bn1.training


@pytest.mark.parametrize("function", [features.similarity, attention.attention_transfer])
def test_sums_over_features_are_exact_under_autocast(teacher, monkeypatch, function):
    """Of the features that the loss saw: bf16 products of whole stages would move the value by percents."""
    seen = []  # a second forward pass may take other kernels, which round otherwise
    monkeypatch.setattr(
        student_loss, "outputs", lambda *given: seen.append(features.outputs(*given)) or seen[-1]
    )
    student, (images, labels) = resnet(0.25, seed=5).eval(), batch(32)
    recipe = Recipe(soft="", stages=("layer3",), **{function.__name__.removesuffix("_transfer"): 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        value = student_loss.online(teacher, recipe, student.spec)(student, images, labels)
    (_, theirs), (logits, ours) = seen
    assert ours["layer3"].dtype == torch.bfloat16 and value.dtype == torch.float32
    exact = function(student=ours["layer3"].double(), teacher=theirs["layer3"].double())
    hard = functional.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(value.double() - hard, exact, rtol=1e-3, atol=1e-6)


def test_hints_train_the_regressors_and_leave_a_plain_student(teacher):
    student, (images, labels) = resnet(0.0625), batch()
    wrapped = features.WithRegressors(student, teacher.spec, student_loss.STAGES)
    before = [r.weight.clone() for r in wrapped.regressors.values()]
    loss = student_loss.online(teacher, Recipe(soft="", hints=1.0), student.spec)
    early = loss(wrapped, images, labels).item()
    training.fit(wrapped, DIGITS, epochs=2, loss=loss, **OPTIONS)
    assert all(not torch.equal(b, r.weight) for b, r in zip(before, wrapped.regressors.values(), strict=True))
    assert loss(wrapped.eval(), images, labels).item() < 0.7 * early
    assert set(wrapped.student.state_dict()) == set(resnet(0.0625).state_dict())


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_each_image_gets_its_own_logits_and_in_the_control_another_ones(is_cached, shuffled):
    """Student and teacher are the same: the loss is 0 if and only if both see the same image."""
    network, images, recipe = Pixels(), DIGITS, Recipe(alpha=1.0, shuffled=shuffled)
    if is_cached:
        memory = student_loss.cache_logits(network, DIGITS, copies=3, seed=5, batch_size=100)
        images, loss = memory.images, student_loss.cached(memory, recipe, network.spec)
    else:
        loss = student_loss.online(network, recipe, network.spec)
    drawn = training.batches(images, 1, 7, 64, False, CPU)  # in another order, as `fit` draws them
    values = torch.stack([loss(network, images, rows) for images, rows in drawn]).detach()
    assert values.min() > 0.05 if shuffled else values.max() < 1e-4


def test_cached_logits_have_the_labels_of_the_data_set_and_augmentations_by_their_seed():
    network, count = Pixels(), len(DIGITS.train)
    memory, again, other = (
        student_loss.cache_logits(network, DIGITS, copies=2, seed=seed) for seed in (5, 5, 6)
    )
    images, rows = next(training.batches(memory.images, 1, 7, 64, False, CPU))
    value = student_loss.cached(memory, Recipe(alpha=0.0), network.spec)(network, images, rows)
    expected = functional.cross_entropy(network(images), DIGITS.train.labels[rows % count])
    torch.testing.assert_close(value, expected)
    drawn = memory.images.train.images
    assert drawn.shape == (2 * count, 1, 8, 8) and not torch.equal(drawn[:count], drawn[count:])
    assert torch.equal(again.images.train.images, drawn) and torch.equal(again.logits, memory.logits)
    assert not torch.equal(other.images.train.images, drawn)


def test_a_file_of_logits_is_read_and_those_of_another_call_are_refused(tmp_path):
    network, options = Pixels(), {"copies": 2, "seed": 5, "file": tmp_path / "logits"}
    memory = student_loss.cache_logits(network, DIGITS, **options)
    network.forward = None  # whoever computes them again, fails
    again = student_loss.cache_logits(network, DIGITS, **options)
    assert torch.equal(again.logits, memory.logits) and again.seconds == memory.seconds
    assert torch.equal(again.images.train.images, memory.images.train.images)
    for teacher, changed in ((network, {"seed": 6}), (network, {"copies": 1}), (Pixels(2.0), {})):
        with pytest.raises(ValueError, match="holds no logits of this teacher"):
            student_loss.cache_logits(teacher, DIGITS, **options | changed)


def test_a_student_learns_from_the_teacher_alone(teacher):
    """alpha = 1: every label is 0, and yet the student names the classes."""
    nothing = data.Split(DIGITS.train.images, torch.zeros_like(DIGITS.train.labels))
    memory = student_loss.cache_logits(teacher, dataclasses.replace(DIGITS, train=nothing), copies=2)
    student = resnet(0.125)
    loss = student_loss.cached(memory, Recipe(alpha=1.0), student.spec)
    training.fit(student, memory.images, epochs=2, loss=loss, **OPTIONS)
    predicted = student(DIGITS.normalize(DIGITS.validation.images)).argmax(1)
    assert (predicted == DIGITS.validation.labels).float().mean() > 0.7  # 0.1 for logits of other images


def test_an_ensemble_is_the_mean_of_its_members():
    members = [resnet(0.0625, seed=seed).eval() for seed in (1, 2, 3)]
    images, _ = batch(4)
    expected = sum(member(images) for member in members) / 3
    torch.testing.assert_close(student_loss.Ensemble(members)(images), expected)
    with pytest.raises(ValueError, match="the teacher has 10 classes, the student 7"):
        student_loss.Ensemble([members[0], resnet(0.0625, classes=7)])


@pytest.mark.parametrize(
    ("what", "theirs", "ours"), [("classes", 7, 10), ("channels", 3, 1), ("size", 16, 8)]
)
def test_a_teacher_of_other_images_or_classes(what, theirs, ours):
    with pytest.raises(ValueError, match=f"the teacher has {theirs} {what}, the student {ours}"):
        student_loss.online(resnet(0.0625, **{what: theirs}), Recipe(), Pixels.spec)


def test_a_recipe_that_cannot_be_followed():
    student, memory = resnet(0.0625), student_loss.cache_logits(Pixels(), DIGITS, copies=1)
    with pytest.raises(ValueError, match="no stage 'layer9'"):
        student_loss.online(student, Recipe(attention=1.0, stages=("layer9",)), student.spec)
    with pytest.raises(ValueError, match="an ensemble has logits only"):
        student_loss.online(student_loss.Ensemble([student]), Recipe(attention=1.0), student.spec)
    with pytest.raises(ValueError, match="features are not stored: use online"):
        student_loss.cached(memory, Recipe(similarity=1.0), student.spec)
    with pytest.raises(ValueError, match="the teacher has 10 classes, the student 7"):
        student_loss.cached(memory, Recipe(), resnet(0.0625, classes=7).spec)
    with pytest.raises(ValueError, match="hints need a regressor at each stage: give features.WithRegress"):
        student_loss.online(student, Recipe(hints=1.0), student.spec)(student, *batch(4))
    loss = student_loss.cached(memory, Recipe(), student.spec)
    with pytest.raises(ValueError, match="the teacher saw other images: fit on memory.images with augment"):
        training.fit(student, memory.images, epochs=0.5, loss=loss, **OPTIONS | {"augment": True})
