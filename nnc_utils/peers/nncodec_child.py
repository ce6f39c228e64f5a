"""Runs in NNCodec's own environment: ``encode STATE.npz SETTINGS.json FILE`` or ``decode FILE STATE.npz``.

Imports nothing of this package. NNCodec's adapters to PyTorch and TensorFlow, which importing it would
load, are left out: coding arrays needs neither.
"""

import ctypes
import json
import os
import sys
import types

ADAPTERS = ("tensorflow_model", "pytorch_model", "use_case_init")


def codec():
    """The module with `compress` and `decompress`, which use none of the adapters."""
    framework = types.ModuleType("nncodec.framework")
    for name in ADAPTERS:
        setattr(framework, name, types.ModuleType(name))
    sys.modules["nncodec.framework"] = framework
    from nncodec import nnc

    return nnc


def encode(source, settings, target):
    """Write a state as a bit stream."""
    import numpy as np

    with open(settings) as file:
        settings = json.load(file)
    state = dict(np.load(source, allow_pickle=False))
    draft = target + ".part"
    codec().compress(state, bitstream_path=draft, **settings)
    os.replace(draft, target)


def decode(source, target):
    """Write a bit stream's state."""
    import numpy as np

    with open(source, "rb") as file:
        stream = bytearray(file.read())
    np.savez(target, **codec().decompress(stream))


if __name__ == "__main__":
    if sys.platform == "linux":  # end with the parent
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
    {"encode": encode, "decode": decode}[sys.argv[1]](*sys.argv[2:])
