"""Shared weights: a network that is cut out says what the supernet says, and evaluations are remembered."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnc_utils import batch_norm, data, evaluation, models, training
from nnc_utils.search.costs import Costs
from nnc_utils.search.evaluator import Evaluator
from nnc_utils.search.space import Space
from nnc_utils.search.supernet import Supernet, sandwich

SPACE = Space(1, 8, 10, "small", ((4, 8, 16), (8, 16), (8, 24), (8, 32)), blocks=2)


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    network = Supernet(SPACE)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    return network


@pytest.fixture(scope="module")
def digits():
    found = data.load("digits")
    return replace(found, train=data.Split(found.train.images[:256], found.train.labels[:256]))


@pytest.mark.parametrize("seed", range(6))
def test_a_network_that_is_taken_out_gives_the_supernets_logits(supernet, seed):
    random = np.random.default_rng(seed)
    found = [SPACE.smallest, SPACE.largest][seed] if seed < 2 else SPACE.sample(random)
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    cut = supernet.extract(found)
    assert cut.spec == SPACE.spec(found) and not cut.training
    with torch.no_grad():  # both with the statistics of the batch
        torch.testing.assert_close(cut.train()(images), supernet(images, found), rtol=1e-4, atol=1e-4)


def test_the_network_is_a_copy_of_the_middle(supernet):
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    found = SPACE.smallest
    cut = supernet.extract(found)
    whole = supernet.largest.layer1[0].conv1.weight
    assert torch.equal(cut.layer1[0].conv1.weight, whole[:4, :4, 1:4, 1:4])
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())


def test_the_sandwich_is_the_sum_of_its_networks_losses(supernet):
    """Of their mean, at twice the rate of one network, digits learned 86 % in four epochs instead of 92."""
    drawn = [SPACE.sample(np.random.default_rng(seed)) for seed in (1, 2)]
    waiting, images = iter(drawn), torch.randn(16, 1, 8, 8)
    labels = torch.arange(16) % 10
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss = sandwich(SPACE, lambda random: next(waiting), between=2)(supernet, images, labels)
        torch.manual_seed(5)
        narrow = SPACE.narrow(np.random.default_rng(int(torch.randint(2**31, ()))))
    assert {block.widths for _, block in models.named_blocks(SPACE.spec(narrow))} == {(4, 4), (8, 8)}
    largest = supernet(images)
    soft = largest.detach().softmax(1)
    wanted = functional.cross_entropy(largest, labels)
    for found in (narrow, *drawn):
        wanted = wanted - (soft * supernet(images, found).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, wanted)
    # the largest learns from labels alone: `wanted` has what it says to the others as fixed targets
    ours, theirs = (torch.autograd.grad(value, supernet.largest.fc.bias)[0] for value in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_network_learns_and_its_evaluation_is_remembered(digits, tmp_path, monkeypatch):
    torch.manual_seed(0)
    supernet, most = Supernet(SPACE), models.macs(SPACE.spec(SPACE.largest))
    costs = Costs(SPACE, {"macs": 0.5 * most})
    options = {"epochs": 12, "batch_size": 32, "learning_rate": 0.05, "augment": False}
    training.fit(supernet, digits, loss=sandwich(SPACE, costs.draw), **options)
    sizes = {"calibration": 128, "validation": 100, "batch_size": 64}
    evaluate = Evaluator(supernet, digits, file=tmp_path / "evaluations.jsonl", **sizes)
    found = costs.draw(np.random.default_rng(0))
    accuracy = evaluate(found)
    assert accuracy > 40 and evaluate(SPACE.largest) > 60  # of ten classes; 7 where blocks may omit their sum
    assert evaluate.cost == 228
    # by the house's own evaluator, in fp32
    images = digits.normalize(digits.train.images[:128])
    network = batch_norm.reestimate(supernet.extract(found), images, batch_size=64)
    split = data.Split(digits.validation.images[:100], digits.validation.labels[:100])
    predictions = evaluation.predict(network, split, normalize=digits.normalize)
    by_hand = evaluation.accuracy(predictions, split.labels)
    assert abs(by_hand - accuracy) <= 3  # bf16 where the processor has it

    with (tmp_path / "evaluations.jsonl").open("a") as stream:
        stream.write("[[0, 1")  # killed while it wrote
    again = Evaluator(supernet, digits, file=tmp_path / "evaluations.jsonl", **sizes)
    monkeypatch.setattr(again, "_evaluate", None)
    assert again.known == {}  # what has not been asked yet is not known, or a resumed search would differ
    assert again(found) == accuracy and again(SPACE.largest) == evaluate(SPACE.largest)
    assert again.known == evaluate.known
    with torch.no_grad():
        supernet.largest.fc.bias.add_(1)
    for content in (
        (tmp_path / "evaluations.jsonl").read_text(),
        "",
        "no json\n",
    ):  # of other weights; broken
        (tmp_path / "e.jsonl").write_text(content)
        Evaluator(supernet, digits, file=tmp_path / "e.jsonl", **sizes)(SPACE.smallest)
        assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 2  # begun anew


def test_a_tiny_image_needs_no_large_kernel(supernet):
    images = torch.randn(4, 1, 8, 8)
    deep = Space(1, 8, 10, "small_stride2", ((8,), (8,), (8,), (16,)), blocks=2)  # 4, 2, 1, 1 pixels
    torch.manual_seed(0)
    network = Supernet(deep)
    cut = network.extract(deep.largest).train()
    torch.testing.assert_close(network(images), cut(images), rtol=1e-3, atol=1e-3)
    network(images).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert models.layers(network.spec)[-2].size_in == 1
