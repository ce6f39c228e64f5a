"""Where things are computed: on the accelerator that the machine has, or on the processor."""

from __future__ import annotations

import torch

# fp32 means fp32: by default cuDNN rounds what a convolution multiplies to TF32's 10 bits.
torch.backends.cudnn.allow_tf32 = False


def default_device() -> torch.device:
    """Where to train: CUDA where there is one, else Apple's MPS, else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def exact_device() -> torch.device:
    """For scores and curvature: CUDA where there is one, else the processor; MPS has no float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
