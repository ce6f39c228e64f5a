#!/usr/bin/env bash
# torchao 0.18.0, torch 2.14.1: a convolution quantized to int8 as documented (export, prepare_pt2e, calibrate,
# convert_pt2e) and saved by torch.export.save.
# Expected: a file of about a quarter of the bytes of the float network's.
# Seen: 1.25 of them. The file holds the int8 weight, and beside it the float one, which no operator reads.
#   convert_pt2e folds the weight's quantizer and wants to delete the float weight, if hasattr(module, target). The
#   target is a path, "conv.weight": an attribute of that name does not exist, so weights of layers stay. Where the same
#   weight is a parameter of the outermost module, "weight", it is deleted, and the file has a quarter of the bytes.
# Fails where torchao behaves otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchao==0.18.0 numpy
cd "$folder" && OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
import torchao
from torch import nn
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

torch.manual_seed(0)
images = torch.randn(1, 128, 8, 8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(128, 256, 3, bias=False)

    def forward(self, images):
        return self.conv(images)


class Parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 128, 3, 3))

    def forward(self, images):
        return functional.conv2d(images, self.weight)


def size(program):
    torch.export.save(program, "net.pt2")
    return os.path.getsize("net.pt2")


print("torchao", torchao.__version__, "torch", torch.__version__)
config = x86.get_default_x86_inductor_quantization_config()
for module, left in ((Layer(), ["conv.weight"]), (Parameter(), [])):
    program = torch.export.export(module.eval(), (images,), strict=True)
    prepared = prepare_pt2e(program.module(), x86.X86InductorQuantizer().set_global(config))
    prepared(images)
    quantized = torch.export.export(convert_pt2e(prepared), (images,))
    users = {node.name: len(node.users) for node in quantized.graph.nodes}
    specs = [spec for spec in quantized.graph_signature.input_specs if spec.target]
    unread = [spec.target for spec in specs if not users[spec.arg.name]]
    stored = {str(quantized.state_dict[name].dtype) for name in unread}
    ratio = size(quantized) / size(program)
    print(f"{type(module).__name__}: unread {unread} {stored or ''}, int8 file / float file: {ratio:.2f}")
    assert unread == left, "other tensors are unread than were seen"
    assert (1.2 < ratio < 1.3) if left else (0.25 < ratio < 0.3), "another size than was seen"
print("as described")
PYTHON
