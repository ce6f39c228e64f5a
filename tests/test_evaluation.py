"""evaluation.py against scikit-learn, SciPy, closed formulas and a simulation."""

import doctest

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from torch import nn

from nnc_utils import evaluation
from nnc_utils.data import Split
from nnc_utils.evaluation import Interval, paired_interval
from nnc_utils.models import build, resnet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def split():
    torch.manual_seed(0)
    return Split(torch.randint(0, 256, (37, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (37,)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(resnet(18, channels=1, size=8, classes=10, stem="small", width=1 / 16))


def normalize(images):
    return images.float() / 255 - 0.3


class Bright(nn.Module):
    """Tells the class that the first pixel names, among `classes`."""

    def __init__(self, classes, factor=1.0):
        super().__init__()
        self.classes, self.factor = classes, nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        return self.factor * nn.functional.one_hot(images[:, 0, 0, 0].long(), self.classes).float()


# --- Predictions --------------------------------------------------------------------------------


def test_predictions_are_the_largest_logits_in_eval_mode(model, split):
    predictions = evaluation.predict(model, split, normalize=normalize)
    model.eval()
    with torch.no_grad():
        expected = np.array([int(model(normalize(image[None])).argmax()) for image in split.images])
    assert predictions.dtype == np.uint8 and predictions.shape == (37,)
    np.testing.assert_array_equal(predictions, expected)


@pytest.mark.parametrize("batch_size", [1, 10, 37, 500])
def test_the_batch_size_changes_nothing(model, split, batch_size):
    whole = evaluation.logits(model, split, normalize=normalize)
    parts = evaluation.logits(model, split, normalize=normalize, batch_size=batch_size)
    assert parts.shape == (37, 10) and parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_every_module_gets_its_own_mode_back_also_after_an_error(model, split):
    model.train()
    model.bn1.eval()  # frozen, as fine-tuning does
    before = {name: module.training for name, module in model.named_modules()}
    statistics = model.layer1[0].bn1.running_mean.clone()
    evaluation.predict(model, split, normalize=normalize)
    with pytest.raises(RuntimeError):
        evaluation.predict(model, split, normalize=lambda images: images.float().expand(-1, 2, -1, -1))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.layer1[0].bn1.running_mean, statistics)


def test_256_classes_are_the_most_and_logits_have_to_be_finite():
    split = Split(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), torch.arange(256))
    options = {"normalize": torch.Tensor.float, "batch_size": 100}
    np.testing.assert_array_equal(evaluation.predict(Bright(256), split, **options), np.arange(256))
    with pytest.raises(ValueError, match="257 classes.*256"):
        evaluation.predict(Bright(257), split, **options)
    with pytest.raises(ValueError, match="256 of 256 images are not finite"):
        evaluation.predict(Bright(256, float("nan")), split, **options)
    with pytest.raises(ValueError, match="no images"):
        evaluation.predict(Bright(256), Split(split.images[:0], split.labels[:0]), **options)


def test_accuracy_is_scikit_learns():
    draw = np.random.default_rng(0)
    predictions, labels = draw.integers(0, 3, (2, 200)).astype(np.uint8)
    expected = sklearn.metrics.accuracy_score(labels, predictions, normalize=False)
    for given in (labels, torch.tensor(labels).long()):
        assert evaluation.correct(predictions, given) == expected
        assert evaluation.accuracy(predictions, given) == pytest.approx(expected / 2)
    with pytest.raises(ValueError, match=r"\(200,\).*\(1,\)"):  # would broadcast
        evaluation.correct(predictions, labels[:1])


def test_docstring_examples_hold():
    tried = doctest.testmod(evaluation)
    assert tried.attempted > 0 and tried.failed == 0


# --- The paired interval ------------------------------------------------------------------------


def test_paired_interval_by_hand():
    # d = 100, 0, -100, 100: mean 25; with 100 and -100 the mean is 100/6, the sum of squares 5 * 100^2
    interval = paired_interval(
        compressed_correct=np.array([1, 1, 0, 1], bool), reference_correct=np.array([0, 1, 1, 0], bool)
    )
    half = 1.96 * ((50000 - 100**2 / 6) / 5) ** 0.5 / 2
    assert (interval.mean, interval.low, interval.high) == pytest.approx((25, 25 - half, 25 + half))


@pytest.mark.parametrize("seeds", [1, 3])
def test_paired_interval_of_several_seeds_is_scipys(seeds):
    compressed, reference = np.random.default_rng(2).random((2, seeds, 500)) < 0.8
    difference = 100 * (compressed.astype(float) - reference).mean(0)
    more = np.append(difference, [100, -100])
    error = scipy.stats.sem(more) * (502 / 500) ** 0.5
    low, high = scipy.stats.norm.interval(0.95, difference.mean(), error)
    interval = paired_interval(compressed_correct=compressed, reference_correct=reference)
    assert interval.mean == pytest.approx(100 * compressed.mean() - 100 * reference.mean())
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-3)


def test_paired_interval_covers_the_true_difference_in_95_of_100_samples():
    draw, inside = np.random.default_rng(3), 0
    for _ in range(2000):
        reference = draw.random(1000) < 0.9
        compressed = np.where(draw.random(1000) < 0.05, ~reference, reference)  # expected: 5 % x (10 - 90)
        interval = paired_interval(compressed_correct=compressed, reference_correct=reference)
        inside += interval.low <= -4.0 <= interval.high
    assert 0.935 < inside / 2000 < 0.965


def test_where_no_image_differs_the_rule_of_three_is_the_interval():
    same = np.array([[True, False, True]] * 2)
    assert paired_interval(compressed_correct=same, reference_correct=same) == Interval(0.0, -100.0, 100.0)


@pytest.mark.parametrize("lost", [1, 5, 6, 12])
def test_few_images_tell_as_much_as_an_exact_test_of_them(lost):
    """McNemar's exact test: the images that differ are won or lost with equal chance."""
    compressed = np.arange(1000) >= lost
    interval = paired_interval(compressed_correct=compressed, reference_correct=np.ones(1000))
    exact = scipy.stats.binomtest(lost, lost).pvalue
    assert (interval.high < 0) == (exact < 0.05)


@pytest.mark.parametrize(
    "compressed, reference, named",
    [
        (np.ones((2, 5), bool), np.ones((3, 5), bool), r"compressed_correct.*\(2, 5\).*\(3, 5\)"),
        (np.ones(5, bool), np.ones((1, 5), bool), r"reference_correct.*\(1, 5\)"),
        (np.ones(1, bool), np.ones(1, bool), "2 images"),
        (np.ones((0, 5), bool), np.ones((0, 5), bool), r"\(0, 5\)"),
        (np.ones((1, 1, 5), bool), np.ones((1, 1, 5), bool), r"\(1, 1, 5\)"),
        (np.ones(5, bool), np.arange(5, dtype=np.uint8), "reference_correct.*not predictions"),
    ],
)
def test_what_cannot_be_paired_is_refused(compressed, reference, named):
    with pytest.raises(ValueError, match=named):
        paired_interval(compressed_correct=compressed, reference_correct=reference)
