"""Runs in NNCodec's own environment: ``encode STATE.npz SETTINGS.json FILE`` or ``decode FILE STATE.npz``.

Imports nothing of this package. NNCodec's adapters to PyTorch and TensorFlow, which importing it would
load, are replaced by empty modules: coding arrays needs neither.
"""

import ctypes
import json
import os
import sys
import types

import numpy as np

framework = sys.modules["nncodec.framework"] = types.ModuleType("nncodec.framework")
for name in ("tensorflow_model", "pytorch_model", "use_case_init"):
    setattr(framework, name, types.ModuleType(name))
from nncodec import nnc  # noqa: E402


def encode(source, settings, target):
    """Write a state as a bit stream."""
    with open(settings) as file:
        settings = json.load(file)
    draft = target + ".part"
    nnc.compress(dict(np.load(source, allow_pickle=False)), bitstream_path=draft, **settings)
    os.replace(draft, target)


def decode(source, target):
    """Write a bit stream's state."""
    with open(source, "rb") as file:
        np.savez(target, **nnc.decompress(bytearray(file.read())))


if __name__ == "__main__":
    if sys.platform == "linux":  # end with the parent
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
    {"encode": encode, "decode": decode}[sys.argv[1]](*sys.argv[2:])
