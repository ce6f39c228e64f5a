"""Optuna's NSGA-II over the same space and the same evaluations: accuracy against cost."""

from __future__ import annotations

import warnings

import optuna

from nnc_utils.search.costs import Costs
from nnc_utils.search.searchers import Evaluate, Trace

TRIALS = 20  # for each query, at most: what costs too much is known without one


def search(costs: Costs, evaluate: Evaluate, *, queries: int, seed: int, population: int = 16) -> Trace:
    """As the searchers of `nnc_utils.search`, by `optuna.samplers.NSGAIISampler`.

    A trial that costs too much asks nothing and gets accuracy 0; the sampler knows the limits, too.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trace: Trace = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        numbers = [
            trial.suggest_int(f"{c.stage}.{c.block}.{c.kind}", 0, len(c.options) - 1)
            for c in costs.space.choices
        ]
        architecture = costs.space.canonical(numbers)
        ratio = costs.ratio(architecture)
        trial.set_user_attr("excess", ratio - 1)
        if ratio > 1 or len(trace) >= queries:
            return 0.0, ratio
        trace.append((architecture, evaluate(architecture)))
        if len(trace) == queries:
            trial.study.stop()
        return trace[-1][1], ratio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # version 5 offers another way, version 4 this one
        sampler = optuna.samplers.NSGAIISampler(
            population_size=population,
            seed=seed,
            constraints_func=lambda trial: [trial.user_attrs["excess"]],
        )
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=TRIALS * queries)
    return trace
