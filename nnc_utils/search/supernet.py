"""One network that contains all others: shared weights, the sandwich rule, and how to take a network out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.search.space import Architecture, Space
from nnc_utils.training import Loss


def sliced(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part that a smaller network takes: the first channels, and the middle of a kernel."""
    part = tensor[tuple(slice(length) for length in shape[:2])]
    if tensor.ndim < 4:
        return part
    edge = (tensor.shape[2] - shape[2]) // 2
    return part[:, :, edge : edge + shape[2], edge : edge + shape[2]]


class Supernet(nn.Module):
    """The largest network of a space; each smaller one works with the first channels of its weights.

    A 3x3 kernel is the middle of the 5x5 one. Batch-norm takes the statistics of the batch, since those of
    one network are wrong for another; a network that was taken out (`extract`) gets its own.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.spec = space.spec(space.largest)
        self.largest = models.build(self.spec)
        self._norms = {layer.name: layer.batch_norm for layer in models.layers(self.spec)}

    def forward(self, images: Tensor, architecture: Architecture | None = None) -> Tensor:
        """Logits (images, classes) of one of the networks, the largest if none is given."""
        spec = self.spec if architecture is None else self.space.spec(architecture)
        kernel, stride, _ = models.STEMS[spec.stem]
        out = functional.relu(self._convolve("conv1", images, spec.stem_width, kernel, stride))
        out = self.largest.maxpool(out)
        for name, block in models.named_blocks(spec):
            (inner, width), stride = block.widths, block.stride
            inside = functional.relu(self._convolve(f"{name}.conv1", out, inner, block.kernels[0], stride))
            inside = self._convolve(f"{name}.conv2", inside, width, 3, 1)
            if block.connection == "projection":
                out = self._convolve(f"{name}.downsample.0", out, width, 1, stride)
            out = functional.relu(inside + out)
        out = out.mean((2, 3))
        return functional.linear(out, self.largest.fc.weight[:, : out.shape[1]], self.largest.fc.bias)

    def _convolve(self, name: str, inputs: Tensor, width: int, kernel: int, stride: int) -> Tensor:
        kernel = min(kernel, 2 * inputs.shape[2] - 1)  # what lies further out sees nothing but padding
        weight = sliced(self.largest.get_submodule(name).weight, (width, inputs.shape[1], kernel))
        if kernel == 1 and stride > 1:  # see models.PickingConv2d
            inputs, stride = inputs[:, :, ::stride, ::stride], 1
        out = functional.conv2d(inputs, weight, stride=stride, padding=kernel // 2)
        norm = self.largest.get_submodule(self._norms[name])
        scale, shift = norm.weight[:width], norm.bias[:width]
        return functional.batch_norm(out, None, None, scale, shift, True, 0.0, models.BATCH_NORM_EPSILON)

    def extract(self, architecture: Architecture) -> models.ResNet:
        """A network of its own, in eval mode, with a copy of its part of the weights.

        Its batch-norm statistics are those of nothing yet: `batch_norm.take_statistics` gives it some.
        """
        with torch.device("meta"):  # no weights are drawn that are thrown away
            network = models.ResNet(self.space.spec(architecture))
        whole, state = self.largest.state_dict(), {}
        for name, tensor in network.state_dict().items():
            order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            state[name] = sliced(whole[name], tensor.shape).clone(memory_format=order)
        network.load_state_dict(state, assign=True)
        return network.eval()


def sandwich(space: Space, draw: Callable[[np.random.Generator], Architecture], *, between: int = 2) -> Loss:
    """The sandwich rule: the largest, a narrowest, some between (Yu and Huang, 2019, arXiv:1903.05134).

    The largest learns from the labels, the others from its soft labels; their gradients add up (algorithm 1).
    Were it always the same smallest network, that one would be trained more than any other, and a search
    would find it. `draw`, seeded by torch's generator, gives those `between`, such as `Costs.draw`.
    """

    def sandwich_rule(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        largest = model(images).float()
        value = functional.cross_entropy(largest, labels)
        soft_labels = largest.detach().softmax(1)
        for architecture in (space.narrow(random), *(draw(random) for _ in range(between))):
            value = value + functional.cross_entropy(model(images, architecture).float(), soft_labels)
        return value

    return sandwich_rule
