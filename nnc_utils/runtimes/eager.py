"""PyTorch as it is: one operator after the other, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from nnc_utils import artifact as artifacts
from nnc_utils import models
from nnc_utils.artifact import Artifact

PRECISIONS = ("fp32",)
INTEGER = ()


class EagerSession:
    """A module in evaluation mode; see `runtimes.Session`."""

    integer_operators: dict[str, int] = {}

    def __init__(self, module: nn.Module, runtime_bytes: int, threads: int) -> None:
        self._module = module.eval()
        self._threads = threads
        self.runtime_bytes = runtime_bytes
        self._use_threads()

    @property
    def threads(self) -> int:
        """What PyTorch says; the number belongs to the process, so each session sets its own again."""
        self._use_threads()
        return torch.get_num_threads()

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        self._use_threads()
        inputs = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        return self._module(inputs).numpy()


def prepare(artifact: Artifact, precision: str, threads: int) -> EagerSession:
    """The decoded network, its activations never rounded."""
    module = artifacts.network(artifact).to(memory_format=torch.channels_last)
    for place in models.activations(module).values():
        place.scale = None
    return EagerSession(module, artifact.nbytes, threads)


def convert(source: Path, precision: str, folder: Path) -> Path:
    """Nothing to convert: eager loads the artifact itself."""
    return Path(source)


def load(path: Path, precision: str, threads: int) -> EagerSession:
    """`prepare` of an artifact's file."""
    return prepare(artifacts.read(path), precision, threads)


def identity(shape: tuple[int, int], threads: int, folder: Path) -> EagerSession:
    """A module that gives its input back."""
    return EagerSession(nn.Identity(), 0, threads)
