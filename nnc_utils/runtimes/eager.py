"""PyTorch as it is: one operator after the other, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnc_utils import artifact as artifacts
from nnc_utils import models
from nnc_utils.artifact import Artifact
from nnc_utils.runtimes import threads as torch_threads

PRECISIONS = ("fp32",)
INTEGER = ()
SUFFIX = ""  # it loads the artifact itself


class EagerSession:
    """A module in evaluation mode; see `runtimes.Session`."""

    integer_operators: dict[str, int] = {}

    def __init__(self, module: nn.Module, runtime_bytes: int, threads: int) -> None:
        self._module, self._threads = module.eval(), threads
        self.runtime_bytes = runtime_bytes
        torch_threads.use(threads)

    @property
    def threads(self) -> int:
        """What PyTorch says."""
        return torch_threads.use(self._threads)

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        torch_threads.use(self._threads)
        inputs = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        return self._module(inputs).numpy()


def load(source: Artifact | Path | None, precision: str, threads: int) -> EagerSession:
    """The decoded network, its activations never rounded; None gives a module that returns its input."""
    if source is None:
        return EagerSession(nn.Identity(), 0, threads)
    artifact = source if isinstance(source, Artifact) else artifacts.read(source)
    module = artifacts.network(artifact).to(memory_format=torch.channels_last)
    for place in models.activations(module).values():
        place.scale = None
    return EagerSession(module, artifact.nbytes, threads)
