"""The benchmark of 09: a second task beside the first, rows on its test images, and what it adds in bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from bench.candidates import Candidate, label
from bench.session import Bench
from nnc_utils import artifact, data, models, rows, scoring
from nnc_utils.configurations import Built, Configuration, ConfigurationError
from nnc_utils.figures import MARKERS
from nnc_utils.transfer.configurations import STARTS, TRAINED, Transfer


class TransferBench(Bench):
    """A run whose `images` are the first task, of 01, and whose `target` is the second."""

    @functools.cached_property
    def target(self) -> data.Data:
        """The second task, in the network's size, normalized as the first was."""
        name, spec = self.parameters["dataset"], self.dense.spec
        images = data.load(name, size=spec.size)
        if images.channels != spec.channels:
            wanted = f"the network of {self.baseline.dataset} takes {spec.channels}"
            raise ValueError(f"dataset {name} has images of {images.channels} channels: {wanted}")
        return replace(images, mean=self.images.mean, std=self.images.std)

    def build(self, wanted: Iterable[Configuration], builder: Any = None) -> list[Candidate]:
        """As `Bench.build`; each has to have its reference, the uncompressed start with as many labels."""
        wanted = list(wanted)
        lacking = {c.labels for c in wanted} - {c.labels for c in wanted if c == _reference(c)}
        if lacking:
            added = "; ".join(
                str(Transfer(start="dense", labels=count).mapping()) for count in sorted(lacking)
            )
            raise ConfigurationError(
                f"the others are compared with these, which have to be there, too: {added}"
            )
        return super().build(wanted, builder)

    def _saved(self, configuration: Configuration, built: Built) -> Candidate:
        target, path = self.target, self.path(f"artifacts/{configuration.slug}.safetensors")
        about = {"mean": target.mean, "std": target.std, "classes": target.classes}
        saved = artifact.save(built.network, path, dtype=built.dtype, **about)
        nbytes = built.file.stat().st_size if built.file else saved.nbytes
        if built.file:
            named = built.file.relative_to(self.run.folder).as_posix()
            self.extra.setdefault("files", {})[label(configuration)] = named
        print(f"{configuration.title}: {nbytes:,} bytes", flush=True)
        return Candidate(configuration, built, path, nbytes, models.macs(saved.spec), is_open=True)

    def measure(self, candidates: Iterable[Candidate]) -> pd.DataFrame:
        """Score each network on the second task's test images, in a fresh process; none of them is claimed.

        artifact_bytes is what the second task adds: a difference's file, or a network's.
        """
        candidates, dataset = list(candidates), self.parameters["dataset"]
        scores = scoring.score([c.path for c in candidates], dataset=dataset, folder=self.path("predictions"))
        of = {c.configuration: score for c, score in zip(candidates, scores, strict=True)}
        for c in candidates:
            row = rows.compression_row(
                of[c.configuration] | {"artifact_bytes": c.bytes},
                run=self.run,
                dataset=dataset,
                model=self._model(c),
                technique=self.technique,
                method=c.configuration.method,
                settings=c.configuration.key,
                reference=of[_reference(c.configuration)],
                division="open",
                control=c.control,
                train_images=c.built.train_images,
                train_seconds=c.built.train_seconds,
            )
            self._keep(row)
        return pd.DataFrame([row.model_dump() for row in self._rows], columns=rows.CompressionRow.columns())

    def show(self, table: pd.DataFrame) -> pd.DataFrame:
        """Accuracy, the difference to the uncompressed start, and the bytes that the second task adds."""
        told = rows.with_settings(table)
        columns = {"configuration": told["title"], "accuracy (%)": told["accuracy"].round(2)}
        columns["difference (pp) [95 %]"] = [rows.interval_text(row) for _, row in told.iterrows()]
        columns["kB added"] = (told["artifact_bytes"] / 1000).round(1)
        return pd.DataFrame(columns).set_index("configuration")

    def figure(self, table: pd.DataFrame) -> Figure:
        """Accuracy against the bytes that the second task adds, a colour a start, a marker a training."""
        told = rows.with_settings(table)
        fewest = min(told["setting.labels"], key=lambda count: count or torch.inf)
        told = told[told["setting.labels"] == fewest]
        figure, axes = plt.subplots()
        colours = dict(zip(STARTS, plt.rcParams["axes.prop_cycle"].by_key()["color"]))
        markers = dict(zip(TRAINED, MARKERS))
        for _, row in told.iterrows():
            start, train = row["setting.start"], row["setting.train"]
            axes.plot(row["artifact_bytes"] / 1000, row["accuracy"], markers[train], color=colours[start])
        for start in dict.fromkeys(told["setting.start"]):
            axes.plot([], [], "s", color=colours[start], label=STARTS[start])
        for train in dict.fromkeys(told["setting.train"]):
            axes.plot([], [], markers[train], color="grey", label=TRAINED[train])
        axes.set(xscale="log", xlabel="kB that the second task adds", ylabel="test accuracy (%)")
        axes.set_title("What do more bytes buy?")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
        return figure


def _reference(configuration: Transfer) -> Transfer:
    """What a network is compared with: the uncompressed start, all of it trained, with as many labels."""
    return Transfer(start="dense", labels=configuration.labels)
