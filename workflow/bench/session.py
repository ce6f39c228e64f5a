"""What a notebook's Benchmark section calls: from its configurations to files, rows and `result.json`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bench import claims, folder, integers, interactive, reference
from bench.candidates import (
    BASELINE,
    BUILDERS,
    CONTROLLED,
    LISTS,
    NEEDS,
    TECHNIQUES,
    TRAINING,
    Candidate,
    label,
    title,
)
from bench.parameters import ParameterError
from bench.tables import Run
from nnc_utils import artifact, configurations, data, evaluation, models, peers, rows, scoring, training
from nnc_utils.baseline import DenseFinetuned
from nnc_utils.configurations import Built, Configuration, ConfigurationError
from nnc_utils.devices import exact_device
from nnc_utils.provenance import root

FAILURES = (ValueError, training.TrainingError, ImportError)  # one network that cannot be made costs no other


class Bench:
    """One run of a notebook; in its globals the lists of mappings among its parameters become configurations.

    ConfigurationError, ParameterError or ResultError come before any work and name every fault.
    """

    def __init__(self, notebook: str, namespace: dict[str, Any]) -> None:
        self.notebook = notebook
        self.technique, modules = TECHNIQUES[notebook]
        faults = []
        plain = {  # mappings, also where the setup cell runs once more and finds what it made of them
            name: [one.mapping() if isinstance(one, Configuration) else one for one in namespace[name]]
            for name in LISTS
            if isinstance(namespace.get(name), list)  # and no module: a later cell of 05 imports `peers`
        }
        for name in plain:
            try:
                namespace[name] = configurations.read(plain[name], *modules)
            except ConfigurationError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise ConfigurationError("\n".join(faults))
        self.run = folder.start(notebook, namespace | plain, needs=NEEDS.get(notebook, ("01_baseline",)))
        self.parameters, self.seed, self.path = self.run.parameters, self.run.seed, self.run.path
        self.extra: dict[str, Any] = {}
        self.missing: dict[str, str] = {}  # configuration -> why it could not be made
        self.looked: dict[str, list[float]] = {}  # file -> its difference on validation images, with interval
        self.candidates: list[Candidate] = []
        self._rows: list[rows.CompressionRow] = []
        self._namespace, self._told = namespace, ""
        self._check_shards()
        self._check_batches()
        for run in self.run.upstream:
            run.check_images(self)

    def _check_shards(self) -> None:
        """Earlier shards had the same training, and one network that the open division is compared with."""
        for run in self.shards:
            for name in TRAINING.get(self.notebook, ()):
                if (was := run.record.parameters[name]) != self.parameters[name]:
                    raise ValueError(
                        f"{name} is {self.parameters[name]}, but {was} in {run.run}: shards share it"
                    )
        rivals = [row for run in self.shards for row in run.compression if row.method != "dense_finetuned"]
        references = {row.reference_sha256 for row in rivals if row.division == "open"}
        if self.notebook in TRAINING and len(references) > 1:
            listed = ", ".join(sorted(references))
            raise ValueError(f"upstream has shards of several references: {listed}; give those of one")

    def _check_batches(self) -> None:
        """A batch has at most all training images."""
        for name in {"batch_size", "supernet_batch"} & set(self.parameters):
            if (value := self.parameters[name]) > (most := len(self.images.train)):
                raise ParameterError(f"{name} is {value}: from 2 to the {most} training images is needed")

    # --- What it builds on ----------------------------------------------------------------------

    @property
    def baseline(self) -> Run:
        """The run of 01 of the same seed."""
        return self.run.upstream[0]

    @functools.cached_property
    def others(self) -> list[Run]:
        """The runs of 01 of other seeds."""
        return [run for run in self.run.upstream[1:] if run.record.notebook == "01_baseline"]

    @functools.cached_property
    def shards(self) -> list[Run]:
        """Earlier shards of this notebook's benchmark."""
        return [run for run in self.run.upstream if run.record.notebook == self.notebook]

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """How the baseline was trained: the parameters of 01, or of the run that its network is from."""
        return self.baseline.record.parameters | self.baseline.extra.get("recipe", {})

    @functools.cached_property
    def pretrained(self) -> reference.Reference | None:
        """In 01 the network that it takes instead of training one; None where it trains."""
        given = self.parameters
        return reference.read(given, self.images) if given.get("pretrained") else None

    def trained_before(self, spec: models.Spec) -> models.ResNet | None:
        """The network that lies beside a pretrained baseline, trained like it by this seed; or None."""
        given = self.baseline.record.parameters.get("pretrained")
        return reference.beside(root() / given, spec, self.seed) if given else None

    def file_beside(self, name: str) -> Path | None:
        """A file of this name beside a pretrained baseline; None where there is none."""
        given = self.baseline.record.parameters.get("pretrained")
        file = (root() / given).with_name(name) if given else None
        return file if file and file.is_file() else None

    @functools.cached_property
    def dense(self) -> models.ResNet:
        """The uncompressed network, in eval mode; copy it before you change it."""
        path = self.baseline.artifact("fp32") if self.run.upstream else self.candidates[0].path
        return artifact.load(path, trainable=True).eval()

    @functools.cached_property
    def images(self) -> data.Data:
        """The data set, in the network's size."""
        if self.notebook == BASELINE:
            return data.load(self.parameters["dataset"], size=self.parameters["size"] or None)
        return data.load(self.baseline.dataset, size=self.dense.spec.size)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """The first of the training images in this seed's order: (count, C, H, W) normalized, and labels."""
        train, generator = self.images.train, torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(train.labels), generator=generator)[:count]
        return self.images.normalize(train.images[chosen]), train.labels[chosen].long()

    def rows_of(self, configuration: Configuration, stage: str = "") -> list[tuple[Run, rows.CompressionRow]]:
        """The runs in upstream that measured a configuration, own seed first, and their rows of it."""
        wanted = (
            configuration.method,
            configuration.key,
            rows.AFTER + stage if stage else configuration.control,
        )
        pairs = [(run, row) for run in self.run.upstream for row in run.compression]
        same = [(run, row) for run, row in pairs if (row.method, row.settings, row.control) == wanted]
        return sorted(same, key=lambda pair: pair[1].seed != self.seed)

    def made(self, configuration: Configuration | str, stage: str = "") -> tuple[Path, int, float]:
        """A configuration's file, of this run or an earlier one, and the images and seconds of its training.

        For a method of which there is one its name is enough. Where there is none it is a ValueError.
        """
        for c in self.candidates:
            same = (c.configuration, c.built.stage) == (configuration, stage)
            if same or c.configuration.method == configuration:
                return c.path, c.built.train_images, c.built.train_seconds
        if isinstance(configuration, str):
            rows_of = [
                (run, r) for run in self.run.upstream for r in run.compression if r.method == configuration
            ]
        else:
            rows_of = self.rows_of(configuration, stage)
        for run, row in rows_of:
            return run.artifact(row.artifact_sha256), row.train_images, row.train_seconds
        name = configuration if isinstance(configuration, str) else label(configuration, stage)
        raise ValueError(
            f"there is no network {name}: add it to configurations, or the run that has it to upstream"
        )

    def file(self, configuration: Configuration, stage: str = "") -> Path:
        """A configuration's file, of this run or an earlier one."""
        return self.made(configuration, stage)[0]

    # --- Build ----------------------------------------------------------------------------------

    def fit(self, network: torch.nn.Module, name: str, **options: Any) -> training.History:
        """Train in place; a stopped run goes on from its checkpoint. Options as for `training.fit`."""
        self._told = interactive.tell_changes(self.parameters, self._namespace, self._told)
        images = options.pop("images", self.images)
        checkpoint = self.path(f"checkpoint_{name}.pt")
        return interactive.fit(network, images, **{"seed": self.seed, "checkpoint": checkpoint} | options)

    def build(self, wanted: Iterable[Configuration], builder: Callable | None = None) -> list[Candidate]:
        """Make each configuration's network and save it; one that fails is named and costs no other.

        What the technique's `check` refuses is a ConfigurationError before any work, which names all.
        """
        technique = TECHNIQUES[self.notebook][1][-1]
        module = importlib.import_module(BUILDERS.get(technique, f"nnc_utils.{technique}.candidates"))
        wanted, faults = self._with_dense(list(wanted)), []
        for configuration in wanted if hasattr(module, "check") else ():
            try:
                module.check(configuration, self)
            except ValueError as error:
                faults.append(f"{configuration.mapping()}: {error}")
        if faults:
            raise ConfigurationError("\n  ".join(["these configurations cannot be built:", *faults]))
        self._told = interactive.tell_changes(self.parameters, self._namespace, self._told)
        self.candidates = [c for c in self.candidates if c.configuration not in wanted]  # the cell ran before
        for configuration in wanted:
            self.missing.pop(label(configuration), None)
            try:
                built = (builder or module.build)(configuration, self)
                for one in built if isinstance(built, Iterable) else [built]:
                    self.candidates.append(self._saved(configuration, one))
            except FAILURES as error:
                self.missing[label(configuration)] = str(error)
                print(f"{configuration.title}: {error}", flush=True)
        return self.candidates

    def _with_dense(self, wanted: list[Configuration]) -> list[Configuration]:
        """Before what is trained: the dense network with as much training, unless an earlier shard has it.

        A pretrained one has converged (its history is beside it), and gets no such control.
        """
        controlled = self.notebook in CONTROLLED and not self.baseline.record.parameters.get("pretrained")
        trained = controlled and any(c.trains for c in wanted)
        has = self._dense_runs() or any(c.method == "dense_finetuned" for c in wanted)
        return wanted if has or not trained else [DenseFinetuned(), *wanted]

    def _saved(self, configuration: Configuration, built: Built) -> Candidate:
        if built.file:
            nbytes = peers.measured(built.file)[1]
            spec = artifact.read(built.source).spec
        else:
            name = "fp32" if self.notebook == BASELINE else configuration.slug
            name += f"_{rows.AFTER}{built.stage}" if built.stage else ""
            about = {"mean": self.images.mean, "std": self.images.std, "classes": self.images.classes}
            saved = artifact.save(
                built.network, self.path(f"artifacts/{name}.safetensors"), dtype=built.dtype, **about
            )
            nbytes, spec = saved.nbytes, built.network.spec
        path = built.file or self.path(f"artifacts/{name}.safetensors")
        after = f" after {built.stage}" if built.stage else ""
        print(f"{configuration.title}{after}: {nbytes:,} bytes", flush=True)
        is_open = self.notebook != BASELINE and (bool(built.train_images) or spec != self.dense.spec)
        return Candidate(configuration, built, path, nbytes, models.macs(spec), is_open)

    # --- Measure --------------------------------------------------------------------------------

    def measure(self, candidates: Iterable[Candidate]) -> pd.DataFrame:
        """Decide on validation images what is claimed, then score the test set in a fresh process."""
        candidates = list(candidates)
        if self.notebook == BASELINE:
            return self._measure_baseline(*candidates)
        decided = self._decide(candidates)
        own = [c for c in candidates if not c.built.tool]
        scored = functools.partial(
            scoring.score, dataset=self.baseline.dataset, folder=self.path("predictions")
        )
        scores = dict(zip([c.path for c in own], scored([c.path for c in own]), strict=True))
        for c in candidates:
            if c.built.tool:
                [scores[c.path]] = scored([c.path], peer=c.built.tool, source=c.built.source)
                integers.note_share(self.extra, c.built.tool, scores[c.path])
        against = self._reference(decided, scores)
        for c in candidates:
            is_reference = c.configuration.method == "dense_finetuned"
            self._keep(
                rows.compression_row(
                    scores[c.path],
                    run=self.run,
                    dataset=self.baseline.dataset,
                    model=self._model(c),
                    technique=self.technique if is_reference else c.configuration.technique,
                    method=c.configuration.method,
                    settings=c.configuration.key,
                    reference=against if c.is_open and not is_reference else self.baseline,
                    division="open" if c.is_open else "closed",
                    control=c.control,
                    headline=int(c.path in decided.claimed.values()),
                    train_images=c.built.train_images,
                    train_seconds=c.built.train_seconds,
                )
            )
        return pd.DataFrame([row.model_dump() for row in self._rows], columns=rows.CompressionRow.columns())

    def _keep(self, row: rows.CompressionRow) -> None:
        """Add a row; one of the same network, of a cell that ran before, goes."""
        key = row.method, row.settings, row.control
        self._rows = [r for r in self._rows if (r.method, r.settings, r.control) != key] + [row]

    def _measure_baseline(self, candidate: Candidate) -> pd.DataFrame:
        """The row of the uncompressed network, which is its own reference."""
        dataset, depth = self.run.dataset, self.parameters["depth"]
        [score] = scoring.score([candidate.path], dataset=dataset, folder=self.path("predictions"))
        row = rows.compression_row(
            score,
            run=self.run,
            dataset=dataset,
            model=f"resnet{depth}",
            technique="baseline",
            method=candidate.configuration.method,
            train_images=candidate.built.train_images,
            train_seconds=candidate.built.train_seconds,
        )
        self._keep(row)
        return pd.DataFrame([row.model_dump()])

    def _model(self, c: Candidate) -> str:
        return "resnet50" if c.configuration.method == "resnet50" else self.baseline.baseline.model

    def _decide(self, candidates: list[Candidate]) -> claims.Chosen:
        """What is claimed in each race, and the open division's reference, by validation images."""
        races: dict[tuple[str, str], list[Candidate]] = {}
        able = [c for c in candidates if c.configuration.race and not c.built.stage and not c.built.tool]
        for c in able if self.parameters.get("claim", True) else ():
            races.setdefault(("open" if c.is_open else "closed", c.configuration.race), []).append(c)
        for (_, counted), own in races.items():
            own.sort(key=lambda c: (c.macs if counted == "macs" else c.bytes, c.bytes))
        small = {key: own for key, own in races.items() if not key[1].startswith("accuracy")}
        orders = {key: [c.path for c in own] for key, own in small.items()}
        decided = claims.choose(
            orders,
            baseline=self.baseline.artifact("fp32"),
            dense=self._dense_file(candidates),
            images=self.images,
        )
        best = {
            key: max(own, key=lambda c: self.validated(c.path)).path
            for key, own in races.items()
            if key not in small
        }
        self.looked |= decided.looked
        return claims.Chosen(decided.reference, decided.claimed | best, decided.looked)

    @functools.cache  # noqa: B019, a run's files are few
    def validated(self, path: Path) -> float:
        """Validation accuracy of an artifact, in percent."""
        about = {"normalize": self.images.normalize, "device": exact_device()}
        predictions = evaluation.predict(artifact.load(path), self.images.validation, **about)
        return float(100 * np.mean(predictions == self.images.validation.labels.numpy()))

    def _dense_file(self, candidates: list[Candidate]) -> Path | None:
        """The network that was trained on for as long: of this run, or of an earlier shard."""
        for c in candidates:
            if c.configuration.method == "dense_finetuned":
                return c.path
        settled = {row.reference_sha256 for run in self.shards for row in run.compression if not row.control}
        if settled == {self.baseline.baseline.artifact_sha256}:
            return None  # earlier shards' validation images have preferred the baseline
        return next((run.artifact("dense_finetuned") for run in self._dense_runs()), None)

    def _dense_runs(self) -> list[Run]:
        return [
            run for run in self.run.upstream if any(r.method == "dense_finetuned" for r in run.compression)
        ]

    def _reference(self, decided: claims.Chosen, scores: dict[Path, dict]) -> Any:
        """What the open division is compared with; students of a compressed network: with what that was."""
        if self.parameters.get("teaches"):
            _, row = self.rows_of(configurations.read(self.parameters["teaches"], "pipeline")[0])[0]
            return self.run.made_before(row.reference_sha256)[0].score(row.reference_sha256)
        if decided.reference == self.baseline.artifact("fp32"):
            return self.baseline
        return scores.get(decided.reference) or self._dense_runs()[0].score("dense_finetuned")

    # --- Show and finish ------------------------------------------------------------------------

    def show(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table that fits a page: what it is, its size, its MACs, its accuracy and the difference."""
        whole = models.macs(self.dense.spec)
        return pd.DataFrame(
            {
                "configuration": [title(row) for _, row in table.iterrows()],
                "times smaller": table["size_ratio"].round(1),
                "MACs ÷": (whole / table["macs"]).round(1),
                "accuracy (%)": table["accuracy"].round(2),
                "difference (pp) [95 %]": [rows.interval_text(row) for _, row in table.iterrows()],
                "within 0.3 pp": [rows.within(row) for _, row in table.iterrows()],
            }
        ).set_index("configuration")

    def with_reference(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows, behind the one of the uncompressed network: what figures are drawn of."""
        return pd.DataFrame([self.baseline.baseline.model_dump(), *table.to_dict("records")])

    def finish(self, latency: Iterable[dict[str, Any]] = (), **extra: Any) -> Run:
        """Write `result.json`: rows, files, what is missing, and what later notebooks want to know."""
        kept = {"missing": self.missing, "validation_delta": self.looked}
        kept |= {"images": self.images.digests()} if self.run.dataset.startswith("imagefolder:") else {}
        done = self.run.finish(compression=self._rows, latency=latency, extra=kept | self.extra | extra)
        print(f"{done.run} is finished: {len(self._rows) + len(latency)} rows")
        return done
