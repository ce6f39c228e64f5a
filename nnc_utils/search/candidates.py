"""What the benchmark of 05 builds, in the steps "latency", "search" and "retrain".

What the first two find is plain JSON in the run's `extra`, where a later shard reads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from nnc_utils import artifact, evaluation, models, training
from nnc_utils.configurations import Built
from nnc_utils.distillation import candidates as distillation
from nnc_utils.distillation import student_loss
from nnc_utils.quantization import activations, uniform
from nnc_utils.search import latency, searchers
from nnc_utils.search.configurations import Searched
from nnc_utils.search.costs import Costs, described
from nnc_utils.search.evaluator import Evaluator, kendall
from nnc_utils.search.gradient import gradient_search
from nnc_utils.search.space import Architecture, around
from nnc_utils.search.supernet import Supernet, sandwich
from nnc_utils.training import History

METHODS = {
    "random": searchers.random_search,
    "random_near_limit": functools.partial(searchers.random_search, least=0.5),
    "evolution": searchers.evolution,
    "reinforce": searchers.reinforce,
    "gradient": gradient_search,
}
PASSES = 4 * 3  # a step trains four networks forward and backward, which counts as three forward
REPEATS = 4  # times as many queries for those that come back to what they like: old ones are free


def found(bench: Any, step: str) -> dict[str, Any]:
    """What the step "latency" or "search" of this run or an earlier shard found; empty where none did."""
    extras = (bench.extra, *(shard.extra for shard in bench.shards))
    return next((extra[step] for extra in extras if step in extra), {})


class Search:
    """The search of one run, `bench`: its space and limits, and its steps.

    `milliseconds` times artifacts (`measure.milliseconds`); `others` are other tools' searchers.
    """

    def __init__(self, bench: Any, milliseconds: Callable | None = None, **others: Callable) -> None:
        self.bench, self.given, self.others = bench, bench.parameters, others
        self.milliseconds, self.random = milliseconds, np.random.default_rng(0)
        spec = bench.dense.spec
        self.about = {name: getattr(spec, name) for name in ("channels", "size", "classes")}
        self.stem = "small" if spec.stem == "small_stride2" else spec.stem  # the space's: at full resolution
        size = {name: self.given[name] for name in ("widest", "blocks")}
        self.space = around(**self.about, **size, stem=self.stem)
        self.limits = {name: self.given[name] for name in ("macs", "latency_ms") if self.given[name]}

    def whole(self, width: float = 1) -> models.Spec:
        """ResNet-18 with the baseline's stem."""
        return models.resnet(18, stem=self.bench.dense.spec.stem, width=width, **self.about)

    @functools.cached_property
    def costs(self) -> Costs:
        """What the networks cost and may cost; milliseconds where blocks were timed."""
        times, limits = self.limits.get("macs"), dict(self.limits)
        if times:
            limits["macs"] = models.macs(self.whole()) / times
        timed = found(self.bench, "latency")
        return Costs(self.space, limits, latency.fit(latency.read(timed["blocks"])).part if timed else None)

    def run(self) -> None:
        """Take the steps "latency" and "search" where the parameters ask for them."""
        self._check()
        drawn = [self.space.sample(self.random) for _ in range(2000)]
        if "latency" in self.given["steps"]:
            count = self.given["latency_networks"]
            blocks = latency.blocks(self.space, count, self.random)
            timed = self._time(blocks + [self.space.spec(one) for one in drawn[: max(2, count // 2)]])
            blocks, networks = timed[: len(blocks)], timed[len(blocks) :]
            error = latency.fit(latency.read(blocks)).error(latency.read(networks))
            self.bench.extra["latency"] = {"runtime": self.given["runtime"], "blocks": blocks}
            self.bench.extra["latency"] |= {"networks": networks, "error": error}
        if "search" in self.given["steps"]:
            self.bench.extra["search"] = self._search()

    def _check(self) -> None:
        """Before any work: can the configurations be retrained after this search, or an earlier one?"""
        steps, search = self.given["steps"], found(self.bench, "search")
        if "search" in steps:
            search = {"limits": self.limits, "pairs": self.given["alone"]}
        if "retrain" in steps and not search:
            raise ValueError("nothing has been searched: add 'search' to steps, or its run to upstream")
        for configuration in self.given["configurations"] if "retrain" in steps else ():
            limits = {name: configuration[name] for name in ("macs", "latency_ms") if name in configuration}
            if limits != search["limits"]:
                raise ValueError(f"{configuration}: the search is within {search['limits']}, give the same")
            if configuration.get("compressed") and not self.given["teaches"]:
                raise ValueError(f"{configuration}: name the pipeline whose network teaches in `teaches`")
            if configuration["method"] == "random_alone" and not search["pairs"]:
                raise ValueError("no random network is trained alone: drop random_alone, or give alone=16")

    def _time(self, specs: list[models.Spec]) -> list[list]:
        """Specs in JSON with milliseconds, int8, one thread, untrained: weights do not change the time."""
        paths, images = [], self.bench.images
        for number, spec in enumerate(specs):
            torch.manual_seed(number)
            noise = torch.randn(16, spec.channels, spec.size, spec.size)
            network = models.build(spec)
            network.train()(noise)
            network = uniform.quantize_network(network, bits=7, per_channel=True)
            paths.append(self.bench.path(f"timed/{number}.safetensors"))
            saved = {"mean": images.mean, "std": images.std, "classes": images.classes}
            artifact.save(activations.calibrate(network, noise), paths[-1], **saved)
        folder = self.bench.path("timed")
        times = self.milliseconds(paths, runtime=self.given["runtime"], precision="int8", folder=folder)
        shutil.rmtree(folder)
        return [[spec.to_json(), ms] for spec, ms in zip(specs, times, strict=True)]

    # --- The search -----------------------------------------------------------------------------

    def _search(self) -> dict[str, Any]:
        """Repeat every search with other seeds, and send the best into a short training of their own."""
        given, costs = self.given, self.costs
        supernet, history = self._supernet()
        images = {"calibration": given["calibration_images"], "validation": given["validation_images"]}
        evaluate = Evaluator(supernet, self.bench.images, file=self.bench.path("evaluations.jsonl"), **images)
        some = [costs.draw(self.random, least=0.5) for _ in range(4)]
        for architecture in (*some, self.space.largest, self.space.smallest):
            evaluate(architecture)
        answer, best, curves = evaluate, {}, {}
        if given["evaluations"]:
            answer = surrogate(costs, evaluate, given["evaluations"], self.random)
        for name, method in (METHODS | self.others).items():
            again = REPEATS if name in ("reinforce", *self.others) else 1
            asked = functools.partial(at_equal_cost, method, costs, answer, given["queries"], again)
            traces = [asked(seed) for seed in training.progress(range(given["search_seeds"]), name)]
            best[name] = [max(trace, key=lambda asked: asked[1])[0] for trace in traces]
            so_far = np.maximum.accumulate([[value for _, value in trace] for trace in traces], axis=1)
            curves[name] = np.percentile(so_far, (25, 50, 75), axis=0).round(3).tolist()
        verified = {name: [round(evaluate(one), 3) for one in own] for name, own in best.items()}
        pairs = [[evaluate(one), self._alone(self.space.spec(one))] for one in self.drawn_alone()]
        tau = kendall(pairs) if len(pairs) > 2 else None
        sent: dict[Architecture, str] = {}
        for name, own in best.items():
            ranked = sorted(set(own), key=lambda one: (evaluate(one), one), reverse=True)
            sent |= {one: name for one in ranked[: given["finalists"]] if one not in sent}
        finalists = []
        for one, name in sent.items():
            spec = self.space.spec(one)
            scores = {"shared": evaluate(one), "alone": self._alone(spec)}
            finalists.append({"method": name, "spec": spec.to_json()} | scores | described(costs, one))
        cost = {"supernet": history.images * PASSES, "candidate": evaluate.cost, "asked": given["queries"]}
        result = {"seed": self.bench.seed, "limits": self.limits, "images": cost, "curves": curves}
        result |= {"supernet": [[epoch.epoch, epoch.loss, epoch.validation] for epoch in history]}
        result |= {"verified": verified, "modelled": bool(given["evaluations"])}
        result |= {"pairs": pairs, "tau": [round(value, 3) for value in tau] if tau else None}
        ours = [row for row in finalists if row["method"] not in self.others]
        return result | {"finalists": finalists, "winner": max(ours, key=lambda row: row["alone"])}

    def _supernet(self) -> tuple[Supernet, History]:
        """The supernet, trained by the sandwich rule on networks of half of what is allowed to all of it."""
        torch.manual_seed(self.bench.seed)
        network = Supernet(self.space)
        loss = sandwich(self.space, functools.partial(self.costs.draw, least=0.5))
        options = {"epochs": self.given["supernet_epochs"], "batch_size": self.given["supernet_batch"]}
        options |= {"learning_rate": self.given["learning_rate"], "augment": self.bench.recipe["augment"]}
        return network, self.bench.fit(network, "supernet", loss=loss, validate=True, **options)

    def drawn_alone(self) -> list[Architecture]:
        """The random networks that are trained alone: the same ones for every seed of the same limits."""
        random = np.random.default_rng(7)
        return [self.costs.draw(random, least=0.5) for _ in range(self.given["alone"])]

    def _alone(self, spec: models.Spec) -> float:
        """Validation accuracy in percent of a network after a short training of its own."""
        network, _ = self.train(spec, self.given["alone_epochs"])
        held, normalize = self.bench.images.validation, self.bench.images.normalize
        return evaluation.accuracy(evaluation.predict(network, held, normalize=normalize), held.labels)

    # --- Networks from scratch ------------------------------------------------------------------

    def train(self, spec: models.Spec, epochs: float, **options: Any) -> tuple[models.ResNet, History]:
        """A network from scratch, by the common recipe; always from the same random numbers."""
        torch.manual_seed(self.bench.seed)
        network, recipe = models.build(spec), self.bench.recipe
        batch, rows = recipe["batch_size"], len(options.get("images", self.bench.images).train)
        steps = round(epochs * (len(self.bench.images.train) // batch))  # however many copies of each image
        name = hashlib.sha256(f"{spec.to_json()} {epochs} {len(options)}".encode()).hexdigest()[:12]
        common = {"augment": recipe["augment"], "learning_rate": self.given["learning_rate"]}
        common |= {"batch_size": batch, "epochs": steps / (rows // batch)}
        history = self.bench.fit(network, name, **common | options)
        return network.eval(), history

    def spec(self, configuration: Searched) -> models.Spec:
        """The architecture of a configuration, as the step "search" found it."""
        search, method = found(self.bench, "search"), configuration.method
        ranked = sorted(search["finalists"], key=lambda row: row["alone"])
        specs = {row["method"]: models.Spec.from_json(row["spec"]) for row in ranked}
        if search["pairs"]:
            best = int(np.argmax([accuracy for _, accuracy in search["pairs"]]))
            specs["random_alone"] = self.space.spec(self.drawn_alone()[best])
        rivals = [specs[name] for name in (search["winner"]["method"], "random_alone") if name in specs]
        macs = max(map(models.macs, rivals))
        specs["narrow_resnet18"] = by_hand(self.whole, macs)
        specs["three_stage"] = by_hand(functools.partial(models.three_stage, **self.about), macs)
        if method not in specs:
            raise ValueError(f"{configuration.title}: trained alone were only {', '.join(specs)}")
        return specs[method]


def by_hand(family: Callable[..., models.Spec], macs: int) -> models.Spec:
    """A plain network with every width scaled by one factor, the smallest in 64ths with no fewer MACs."""
    members = (family(width=share / 64) for share in range(1, 1025))
    return next(spec for spec in members if models.macs(spec) >= macs)


class _EnoughError(Exception):
    """A search has asked as many networks as it may."""


def at_equal_cost(
    method: Callable, costs: Costs, answer: searchers.Evaluate, queries: int, repeats: int, seed: int
) -> searchers.Trace:
    """What one search asks, in order, each network once; one that runs out of ideas repeats its last.

    What another search asked before counts in full, what the same search asked before is free (it may ask
    `repeats` times as often): otherwise those that come back to what they like would pay for nothing new.
    """
    trace: dict[Architecture, float] = {}

    def ask(architecture: Architecture) -> float:
        if architecture not in trace:
            if len(trace) == queries:
                raise _EnoughError
            trace[architecture] = answer(architecture)
        return trace[architecture]

    with contextlib.suppress(_EnoughError):
        method(costs, ask, queries=repeats * queries, seed=seed)
    asked = list(trace.items())
    return asked + asked[-1:] * (queries - len(asked))


def surrogate(
    costs: Costs, evaluate: Evaluator, count: int, random: np.random.Generator, gamma=0.05, ridge=0.3
) -> searchers.Evaluate:
    """Kernel ridge regression over `count` evaluations: asked where those of all queries are too dear."""
    for _ in range(count * 2 // 3):
        evaluate(costs.draw(random, least=0.3))
    searchers.evolution(costs, evaluate, queries=max(4, count - len(evaluate.known)), seed=1000)  # good ones
    known = {asked: value for asked, value in evaluate.known.items() if costs.ratio(asked) <= 1}

    def features(one: Architecture) -> np.ndarray:
        scaled = np.array(one) / np.maximum(costs.space.options - 1, 1)
        return np.append(np.where(costs.space.active(one), scaled, -0.5), 3 * np.log(costs.ratio(one)))

    def closeness(some: np.ndarray) -> np.ndarray:
        return np.exp(-gamma * ((some[:, None] - inputs) ** 2).sum(2))

    inputs, values = np.stack([features(asked) for asked in known]), np.array(list(known.values()))
    weights = np.linalg.solve(closeness(inputs) + ridge * np.eye(len(known)), values - values.mean())
    return functools.cache(lambda one: values.mean() + float(closeness(features(one)[None])[0] @ weights))


# --- What Bench calls ---------------------------------------------------------------------------


def resolved(bench: Any, configurations: Iterable[Searched]) -> list[Searched]:
    """The configurations of the step "retrain", "winner" by the name of the method that found it."""
    if "retrain" not in bench.parameters["steps"]:
        return []
    names = {"winner": found(bench, "search")["winner"]["method"]}
    return [c.model_copy(update={"method": names.get(c.method, c.method)}) for c in configurations]


def build(configuration: Searched, bench: Any) -> Built:
    """Train a network from scratch, by the common recipe, alone or from its teacher's cached logits."""
    search, given = Search(bench), bench.parameters
    spec = search.spec(configuration)
    if not configuration.distill:
        network, history = search.train(spec, given["epochs"])
        return Built(network, history.images, history.seconds)
    (teacher, seconds), *_ = distillation.members(bench, configuration.compressed)
    memory = distillation.memory(bench, teacher)
    options = {"loss": student_loss.cached(memory, student_loss.Recipe(), spec), "images": memory.images}
    network, history = search.train(spec, given["epochs"], augment=False, **options)
    return Built(network, history.images, history.seconds + memory.seconds + seconds)
