"""A second task: few of its labels, a new classifier, and a training that leaves the rest as it was."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.data import Data, Split


def few(images: Data, labels: int, *, seed: int) -> Data:
    """The data set with so many training images of each class, drawn by the seed; 0: with all of them."""
    train = images.train
    counts = torch.bincount(train.labels, minlength=len(images.classes))
    if labels > counts.min():
        name, most = images.classes[counts.argmin()], int(counts.min())
        raise ValueError(f"labels is {labels}: class {name!r} has {most} training images; 0 takes all")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    ordered = train.labels[order]
    chosen = torch.cat([order[ordered == label][: labels or None] for label in range(len(counts))])
    return dataclasses.replace(images, train=Split(train.images[chosen], train.labels[chosen]))


def repeated(images: Data, count: int) -> Data:
    """The data set with each training image as often as it takes to have so many."""
    train = images.train
    order = torch.arange(len(train)).repeat(-(-count // len(train)))
    return dataclasses.replace(images, train=Split(train.images[order], train.labels[order]))


def adopted(network: models.ResNet, classes: int, *, seed: int) -> models.ResNet:
    """A copy of a network with a new classifier, drawn by the seed; masks and quantizers elsewhere stay."""
    network = copy.deepcopy(network)
    network.spec = dataclasses.replace(network.spec, classes=classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.fc = nn.Linear(network.fc.in_features, classes)
    return network


def in_floats(network: models.ResNet) -> models.ResNet:
    """The network, in place, with activations that are not rounded."""
    for place in models.activations(network).values():
        place.scale = None
    return network


def freeze_body(network: models.ResNet) -> models.ResNet:
    """The network, in place, with only its classifier to train, by the loss `of_the_head`."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    return network


def of_the_head(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in eval mode: in train mode the batch-norms of a frozen body would still change."""
    return functional.cross_entropy(model.eval()(images).float(), labels)
