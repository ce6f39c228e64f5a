"""How well does an architecture do? Its validation accuracy with the supernet's weights, remembered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nnc_utils import batch_norm
from nnc_utils.data import Data, Split
from nnc_utils.search.space import Architecture
from nnc_utils.search.supernet import Supernet
from nnc_utils.training import default_device, fast_bf16, network_digest


class Evaluator:
    """Validation accuracy of architectures with the supernet's weights, each looked at once.

    Parameters
    ----------
    supernet : trained; moved to where it is fast and left there.
    pictures : calibration images come from train, the others from validation.
    calibration : training images that re-estimate each candidate's batch-norm.
    validation : validation images that score it, from the first; all of them if there are fewer.
    file : in which evaluations are kept, a line each; where it is of the same weights and images it is read.

    Attributes
    ----------
    known : the accuracy of what has been asked here, in this order. What the file holds beyond that is not in
        it, so that a run that was interrupted goes on as if it had not been.
    """

    def __init__(
        self,
        supernet: Supernet,
        pictures: Data,
        *,
        calibration: int = 512,
        validation: int = 2500,
        batch_size: int = 256,
        file: str | Path | None = None,
    ) -> None:
        self.device = default_device()
        digest = network_digest(supernet)
        self.supernet, self.batch_size = supernet.eval().to(self.device), batch_size
        train, held = pictures.train, pictures.validation
        self.calibration = self._ready(
            pictures, Split(train.images[:calibration], train.labels[:calibration])
        )
        self.images = self._ready(pictures, Split(held.images[:validation], held.labels[:validation]))
        self.labels = held.labels[:validation].to(self.device)
        self.known: dict[Architecture, float] = {}
        self._remembered: dict[Architecture, float] = {}
        self.file = Path(file) if file else None
        self._call = {"supernet": digest, "calibration": len(self.calibration), "images": len(self.images)}
        self._read()

    @property
    def cost(self) -> int:
        """Images that go through the supernet for one evaluation."""
        return len(self.calibration) + len(self.images)

    def __call__(self, architecture: Architecture) -> float:
        """Validation accuracy in percent."""
        if architecture in self._remembered:
            self.known.setdefault(architecture, self._remembered[architecture])
        if architecture not in self.known:
            self.known[architecture] = found = self._evaluate(architecture)
            if self.file:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([architecture, found]) + "\n")
        return self.known[architecture]

    @torch.no_grad()
    def _evaluate(self, architecture: Architecture) -> float:
        network = self.supernet.cut(architecture)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            batch_norm.take_statistics(network, self.calibration, batch_size=self.batch_size)
            hits = [
                (network(images).argmax(1) == labels).sum()
                for images, labels in zip(
                    self.images.split(4 * self.batch_size),
                    self.labels.split(4 * self.batch_size),
                    strict=True,
                )
            ]
        return 100 * int(torch.stack(hits).sum()) / len(self.labels)

    def _ready(self, pictures: Data, split: Split) -> Tensor:
        images = pictures.normalize(split.images.to(self.device))
        return images.to(memory_format=torch.channels_last)

    def _read(self) -> None:
        if not self.file:
            return
        try:
            first, *lines = self.file.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == self._call:
                self._remembered = {tuple(a): accuracy for a, accuracy in map(json.loads, _whole(lines))}
                return
        except (OSError, ValueError):
            pass  # missing, or no such file: begun anew
        self.file.write_text(json.dumps(self._call) + "\n", encoding="utf-8")


def _whole(lines: Iterable[str]) -> list[str]:
    """Without a last line that a killed run did not finish."""
    return [line for line in lines if line.endswith("]")]
