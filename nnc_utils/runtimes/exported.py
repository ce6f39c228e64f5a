"""The lowering as an exported graph of PyTorch: what Inductor and ExecuTorch compile.

The same integers as in `qdq.onnx_model`, as `quantized_decomposed` operators, the quantize and
dequantize pairs whose patterns both compilers replace by integer kernels.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # defines the operators
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils.artifact import Artifact
from nnc_utils.runtimes import qdq

OPERATORS = torch.ops.quantized_decomposed


class Network(nn.Module):
    """The steps of a network, floats (batch, C, H, W) -> float logits (batch, classes).

    An artifact is decoded for "fp32", lowered for "int8". `signed`: S8 activations, as XNNPACK has them,
    instead of U8. XNNPACK gives float logits only where it finds the classifier's range anew for each image,
    so that input is rounded once more.
    """

    def __init__(self, artifact: Artifact, precision: str, *, signed: bool = False) -> None:
        super().__init__()
        self._steps, self._signed, self._ranges = qdq.steps(artifact.spec), signed, {}
        if precision == "fp32":
            for name, (weight, bias) in qdq.float_layers(artifact).items():
                self._keep(name, weight=weight, bias=bias)
            return
        network = qdq.lower(artifact)
        shift = qdq.SIGNED_SHIFT if signed else 0
        low, high, kind = -shift, 255 - shift, torch.int8 if signed else torch.uint8
        for name, (scale, zero_point) in network.ranges.items():
            self._ranges[name] = (float(torch.tensor(scale)), zero_point - shift, low, high, kind)
        for step in network.steps:
            if step.layer is not None:
                layer = network.layers[step.name]
                input_scale = torch.tensor(network.ranges[step.inputs[0]][0])
                bias = layer.bias * (input_scale * layer.scale)
                zeros = torch.zeros(len(bias), dtype=torch.int64)
                self._keep(step.name, codes=layer.codes, scale=layer.scale, zero_point=zeros, bias=bias)

    def _keep(self, layer: str, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():  # parameters: of buffers the compilers think they may change
            constant = nn.Parameter(tensor.contiguous(), requires_grad=False)
            self.register_parameter(f"{layer}_{name}".replace(".", "_"), constant)

    def _kept(self, layer: str, name: str) -> Tensor:
        return getattr(self, f"{layer}_{name}".replace(".", "_"))

    def forward(self, images: Tensor) -> Tensor:
        tensors = {"quant_input": self._quantize(images, "quant_input")}
        for step in self._steps:
            # each reader dequantizes for itself: patterns end at a tensor that several read
            inputs = [self._dequantize(tensors[name], name) for name in step.inputs]
            output = self._compute(step, *inputs)
            if step.relu and not self._ranges:  # codes that are clamped at 0 need none
                output = output.relu()
            tensors[step.output] = self._quantize(output, step.output)
        return tensors["logits"]

    def _quantize(self, tensor: Tensor, name: str) -> Tensor:
        rounding = self._ranges.get(name)
        return OPERATORS.quantize_per_tensor.default(tensor, *rounding) if rounding else tensor

    def _dequantize(self, tensor: Tensor, name: str) -> Tensor:
        rounding = self._ranges.get(name)
        return OPERATORS.dequantize_per_tensor.default(tensor, *rounding) if rounding else tensor

    def _compute(self, step: qdq.Step, *inputs: Tensor) -> Tensor:
        if step.kind == "add":
            return inputs[0] + inputs[1]
        if step.kind == "max_pool":
            return functional.max_pool2d(inputs[0], 3, 2, 1)
        if step.kind == "average_pool":
            return inputs[0].mean((-2, -1), keepdim=True)
        weight, bias = self._weight(step.name), self._kept(step.name, "bias")
        if step.kind == "conv":
            kernel, stride = step.layer.kernel, step.layer.stride
            return functional.conv2d(inputs[0], weight, bias, stride, kernel // 2)
        features = inputs[0].view(-1, weight.shape[1])
        if self._ranges:
            features = self._rounded_again(features, step.inputs[0])
        return functional.linear(features, weight, bias)

    def _weight(self, layer: str) -> Tensor:
        if not self._ranges:
            return self._kept(layer, "weight")
        codes, scale, zero_point = (self._kept(layer, part) for part in ("codes", "scale", "zero_point"))
        return OPERATORS.dequantize_per_channel.default(codes, scale, zero_point, 0, -127, 127, torch.int8)

    def _rounded_again(self, features: Tensor, name: str) -> Tensor:
        """Behind the flattening, so that the classifier's input is a dequantized tensor."""
        if not self._signed:
            return self._dequantize(self._quantize(features, name), name)
        low, high, kind = -128, 127, torch.int8
        smallest = torch.finfo(torch.float32).eps
        rounding = (*OPERATORS.choose_qparams.tensor(features, low, high, smallest, kind), low, high, kind)
        codes = OPERATORS.quantize_per_tensor.tensor(features, *rounding)
        return OPERATORS.dequantize_per_tensor.tensor(codes, *rounding)


class Copy(nn.Module):
    """Returns a copy of its input: the identity network of a compiler."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clone()


def export(module: nn.Module, shape: tuple[int, ...], *, batch: int, dynamic: bool = False):
    """A `torch.export.ExportedProgram` for images (C, H, W) in batches of this size, or any up to it."""
    example = (torch.zeros(batch, *shape),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=batch)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(module.eval(), example, dynamic_shapes=shapes)
