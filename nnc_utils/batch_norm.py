"""Batch-norm re-estimated after weights were rounded or removed: needs images, but no training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nnc_utils import models, sample
from nnc_utils.devices import exact_device


@torch.no_grad()
def reestimate(
    changed: nn.Module, images: Tensor, *, original: nn.Module | None = None, batch_size: int = 256
) -> nn.Module:
    """A copy of a rounded or pruned network whose batch-norm statistics are those of its own activations.

    Changed weights give other sums than those whose mean and variance batch-norm remembers (Sun et al.,
    2019, "Hybrid 8-bit floating point (HFP8) training and inference"). These images give new ones, for the
    network before, too: by how much, in its own deviations, a channel's memory differs from what they give
    there is kept. So a network that was not changed keeps its statistics, few images suffice where little
    was changed, and a channel that has become constant gets exactly that constant.

    Parameters
    ----------
    changed : the network with rounded or missing weights; not changed.
    images : at least 2 normalized training images, (n, channels, size, size); else a ValueError.
    original : the network before, with channels as many; not changed. Without one the statistics become those
        of these images, which takes more of them.
    batch_size : images a pass; a smaller last batch is omitted unless it is the only one.
    """
    models.check_images(changed, images, least=2)
    corrected, measured = copy.deepcopy(changed), _measured(changed, images, batch_size)
    norms = _batch_norms(corrected)
    if original is None:
        for norm, new in zip(norms, measured, strict=True):
            norm.running_mean.copy_(new.running_mean)
            norm.running_var.copy_(new.running_var)
        return corrected
    before = _measured(original, images, batch_size)
    for norm, new, old in zip(norms, measured, before, strict=True):
        ratio = new.running_var / (old.running_var + norm.eps)
        surplus = norm.running_mean - old.running_mean
        norm.running_mean.copy_(new.running_mean + surplus * ratio.sqrt())
        norm.running_var += norm.eps
        norm.running_var *= (new.running_var + norm.eps) / (old.running_var + norm.eps)
        norm.running_var.sub_(norm.eps).clamp_(min=0)
    return corrected


@torch.no_grad()
def take_statistics(network: nn.Module, images: Tensor, *, batch_size: int = 256) -> nn.Module:
    """Give a network the batch-norm statistics of these images, in place; a plain average over the batches.

    The network, then in eval mode, computes where it is, under the caller's autocast.
    """
    for norm in _batch_norms(network):
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    network.train()
    whole = len(images) // batch_size * batch_size or len(images)
    for batch in sample.sent(images[:whole].split(batch_size), network):
        network(batch)
    return network.eval()


def _measured(model: nn.Module, images: Tensor, batch_size: int) -> list[nn.BatchNorm2d]:
    """Batch-norms as those of a network, with the statistics of these images."""
    copied = copy.deepcopy(model).to(exact_device())
    home = next(model.parameters()).device
    return [norm.to(home) for norm in _batch_norms(take_statistics(copied, images, batch_size=batch_size))]


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
