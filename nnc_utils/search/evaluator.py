"""How well does an architecture do? Its validation accuracy with the supernet's weights, remembered."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from nnc_utils import batch_norm
from nnc_utils.data import Data, Split
from nnc_utils.search.space import Architecture
from nnc_utils.search.supernet import Supernet
from nnc_utils.training import default_device, fast_bf16, network_digest


class Evaluator:
    """Validation accuracy of architectures with the supernet's weights, each computed once.

    So many `calibration` images of train re-estimate a candidate's batch-norm, so many of `validation`
    score it. A `file` keeps evaluations, a line each; where it is of the same weights and images it is read.
    `known` has what was asked here, in this order, and not what else the file holds: an interrupted run goes
    on as if it had not been.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Data,
        *,
        calibration: int = 512,
        validation: int = 2500,
        batch_size: int = 256,
        file: str | Path | None = None,
    ) -> None:
        self.device = default_device()
        digest = network_digest(supernet)
        self.supernet, self.batch_size = supernet.eval().to(self.device), batch_size
        self.calibration = self._ready(data, data.train, calibration)
        self.images = self._ready(data, data.validation, validation)
        self.labels = data.validation.labels[:validation].to(self.device)
        self.known: dict[Architecture, float] = {}
        self.file = Path(file) if file else None
        of = {"supernet": digest, "calibration": len(self.calibration), "images": len(self.images)}
        self._remembered = _read(self.file, of) if self.file else {}

    @property
    def cost(self) -> int:
        """Images that go through the supernet for one evaluation."""
        return len(self.calibration) + len(self.images)

    def __call__(self, architecture: Architecture) -> float:
        """Validation accuracy in percent."""
        if architecture not in self._remembered:
            self._remembered[architecture] = self._evaluate(architecture)
            if self.file:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([architecture, self._remembered[architecture]]) + "\n")
        return self.known.setdefault(architecture, self._remembered[architecture])

    @torch.no_grad()
    def _evaluate(self, architecture: Architecture) -> float:
        network, batch = self.supernet.extract(architecture), 4 * self.batch_size
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            batch_norm.take_statistics(network, self.calibration, batch_size=self.batch_size)
            pairs = zip(self.images.split(batch), self.labels.split(batch), strict=True)
            hits = [(network(images).argmax(1) == labels).sum() for images, labels in pairs]
        return 100 * int(torch.stack(hits).sum()) / len(self.labels)

    def _ready(self, data: Data, split: Split, count: int) -> Tensor:
        images = data.normalize(split.images[:count].to(self.device))
        return images.to(memory_format=torch.channels_last)


def _read(file: Path, of: dict) -> dict[Architecture, float]:
    """The evaluations of these weights and images that a file holds; any other file is begun anew."""
    with contextlib.suppress(OSError, ValueError):  # missing, or no such file
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        if json.loads(first) == of:
            whole = [line for line in lines if line.endswith("]")]  # a killed run does not finish its last
            return {tuple(architecture): accuracy for architecture, accuracy in map(json.loads, whole)}
    file.write_text(json.dumps(of) + "\n", encoding="utf-8")
    return {}


def kendall(pairs: list[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Kendall's tau, and the ends of its 95 % interval from 2,000 bootstrap samples; None without order."""
    one, other = np.array(pairs).T
    random, taus = np.random.default_rng(0), []
    for _ in range(2000):
        some = random.integers(0, len(one), len(one))
        taus.append(scipy.stats.kendalltau(one[some], other[some]).statistic)
    values = (scipy.stats.kendalltau(one, other).statistic, *np.nanpercentile(taus, (2.5, 97.5)))
    return tuple(map(float, values)) if np.isfinite(values).all() else None
