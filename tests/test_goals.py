"""The report's goals: a claim of enough seeds reaches one, what the test set chose does not."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_report import pair

from bench import goals
from nnc_utils import rows

SMALLER = {"kind": "reach", "column": "size_ratio", "at_least": 22.0, "of": {"technique": "quantization"}}
OTHER = ("kmeans", '{"bits":3}')


def point(
    ratio,
    low,
    *,
    method="kmeans",
    settings='{"bits":2}',
    headline=0,
    seeds=3,
    technique="quantization",
    **more,
):
    named = {"dataset": "digits", "technique": technique, "method": method, "settings": settings}
    named |= {"control": "", "division": "open", "headline": headline, "seeds": seeds, "fewer": 8.0}
    return named | {
        "size_ratio": ratio,
        "delta_mean": low + 0.1,
        "delta_ci_low": low,
        "delta_ci_high": low + 0.2,
        "accuracy_mean": 94.5,
        **more,
    }


def tables(*points, pairs=(), **more):
    points = rows.with_settings(
        pd.DataFrame([point(1.0, 0.0, method="train", settings="", technique="baseline"), *points])
    )
    return SimpleNamespace(points=points, summary=points, pairs=pairs, provenance={}, rivals=[], **more)


def test_a_claim_within_the_limit_reaches_a_goal():
    measured, reached = goals.ask(
        SMALLER, tables(point(30.0, -0.2, headline=1), point(90.0, -0.1, settings=OTHER[1]))
    )
    assert reached == goals.YES
    assert measured == "2-bit codebook, k-means: 30.0× smaller, -0.10 [-0.20, +0.00] (3 seeds)"


@pytest.mark.parametrize(
    "claim",
    [
        point(30.0, -0.31, headline=1),  # a loss
        point(21.9, -0.2, headline=1),  # not small enough
        point(30.0, -0.2, headline=1, seeds=2),  # not by two seeds
        point(30.0, -0.2),  # chosen by the test set
    ],
)
def test_what_validation_did_not_choose_reaches_none(claim):
    assert goals.ask(SMALLER, tables(claim))[1] in (goals.NO, goals.UNCLAIMED)
    measured, reached = goals.ask(SMALLER, tables(claim, point(25.0, -0.1, settings=OTHER[1])))
    assert reached == goals.UNCLAIMED
    assert ("2-bit" in measured) == bool(claim["headline"] or claim["size_ratio"] > 25)


def test_where_nothing_reaches_a_goal_the_nearest_stand_there():
    three, four = OTHER[1], '{"bits":4}'
    found = tables(
        point(30.0, -0.5, headline=1), point(40.0, -0.4, settings=three), point(9.0, 0.0, settings=four)
    )
    measured, reached = goals.ask(SMALLER, found)
    assert reached == goals.NO
    told = [part.split(":")[0] for part in measured.split("; ")]
    assert told == ["chosen", "nearest with so much", "most within the limit"]
    assert measured.index("3-bit") < measured.index("4-bit")
    assert goals.ask(SMALLER, tables(point(3.0, -0.5))) == ("none within the limit", goals.NO)
    assert goals.ask(SMALLER, tables()) is None


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({}, goals.YES),
        ({"speedup_best_fp32": 19.9}, goals.NO),
        ({"runtime_low": -0.31}, goals.NO),  # the runtime loses what eager does not
        ({"agreement": 98.9}, goals.NO),
        ({"speedup_best_fp32": np.nan}, None),  # not timed in integers
    ],
)
def test_a_speed_is_one_runtimes_within_the_limit_there(change, reached):
    goal = SMALLER | {"column": "speedup_best_fp32", "at_least": 20.0}
    timed = {
        "speedup_best_fp32": 21.0,
        "runtime": "openvino",
        "runtime_low": -0.25,
        "agreement": 99.6,
    } | change
    answer = goals.ask(goal, tables(point(30.0, -0.2, headline=1, **timed)))
    assert (answer and answer[1]) == reached
    if reached == goals.YES:
        assert "21.0× the fastest fp32" in answer[0] and "openvino: lower end -0.25" in answer[0]


def test_a_baseline_that_gains_has_not_converged():
    goal = {"kind": "converged", "accuracy": 94.0, "gain": 0.3}
    images = {"rows_of": lambda point: pd.DataFrame({"train_images": [7]})}

    def asked(gain, **more):
        dense = {"method": "dense_finetuned", "technique": "baseline", "control": "dense_finetuned"}
        dense["settings"] = ""
        return goals.ask(goal, tables(point(2.0, gain - 0.1, **dense | more), **images))[1]

    assert asked(0.19) == goals.YES  # the upper end counts
    assert asked(0.21) == goals.NO
    assert asked(0.19, seeds=2) == goals.UNCLAIMED
    assert goals.ask(goal, tables()) is None


@pytest.mark.parametrize(("error", "reached"), [(9.9, goals.YES), (10.1, goals.NO)])
def test_the_predictors_error_is_the_one_that_its_run_recorded(error, reached):
    timed, found = {"blocks": [None] * 30, "networks": [None] * 10, "error": error}, tables()
    found.provenance = {"05": {"extra": {"latency": timed}}}
    measured, said = goals.ask({"kind": "predicted", "percent": 10.0}, found)
    assert said == reached and measured == f"{error} % on 10 networks, fitted to 30 blocks"


def test_one_rival_that_is_not_beaten_is_enough():
    ours, rival = ("pipeline", '{"bits":4,"macs":6}'), ("nncodec_pruned", '{"macs":6,"qp":-9}')
    found = tables(point(130.0, -0.2, method=ours[0], settings=ours[1], headline=1, technique="pipeline"))
    found.pipeline = found.points.iloc[-1]
    for met, reached in (
        ([pair(ours, rival, "beats"), pair(ours, rival, "beats")], goals.YES),
        ([pair(ours, rival, "beats"), pair(ours, rival, "not below")], goals.NO),
        ([pair(ours, rival, "beats"), pair(ours, rival, "beats, in a larger file")], goals.NO),
        ([pair(ours, rival, "beats", seeds=1)], goals.UNCLAIMED),
        ([pair(ours, (rival[0], '{"ensemble":true,"macs":6,"qp":-9}'), "beats")], goals.UNCLAIMED),
    ):
        found.rivals = met
        measured, said = goals.ask({"kind": "no_rival"}, found)
        assert said == reached and f" of {len(met)}" in measured
    found.rivals = []
    assert goals.ask({"kind": "no_rival"}, found) is None


PRUNING, PIPELINE = {"technique": "pruning"}, {"method": "pipeline", "technique": "pipeline"}


@pytest.mark.parametrize(
    ("start", "settings", "enough"),
    [
        ("Integers without", '{"bits":7}', {"method": "uniform", "division": "closed", "size_ratio": 4.5}),
        ("Without a gradient step", '{"bits":2}', {"division": "closed", "size_ratio": 22.0}),
        ("Trained with 4", '{"bits":4}', {"method": "qat"}),
        ("Trained with 2", '{"bits":2}', {"method": "qat", "delta_ci_low": -1.0}),
        ("90 %", '{"sparsity":0.9,"train":"finetune"}', PRUNING | {"method": "weights", "size_ratio": 12.0}),
        ("Channels removed", '{"macs":4}', PRUNING | {"method": "channels", "fewer": 4.0}),
        ("The pipeline: 100", '{"bits":4,"macs":6}', PIPELINE | {"size_ratio": 100.0}),
    ],
)
def test_each_goal_asks_for_its_configurations(start, settings, enough):
    [goal] = [goal for goal in goals.read() if goal["goal"].startswith(start)]
    good = point(8.0, -0.3, headline=1, settings=settings) | enough
    assert goals.ask(goal, tables(good))[1] == goals.YES
    assert goals.ask(goal, tables(good | {"delta_ci_low": -1.01}))[1] == goals.NO
    peer = {"method": "nncodec", "settings": '{"qp":-9}', "technique": "peer"}
    assert goals.ask(goal, tables(good | peer)) is None
    if not start.startswith("Trained"):
        assert goals.ask(goal, tables(good | {goal["column"]: 0.99 * good[goal["column"]]}))[1] == goals.NO


@pytest.mark.parametrize(
    ("changed", "reached"),
    [
        ({}, goals.YES),
        ({"seeds": 2}, goals.UNCLAIMED),
        ({"within 0.5 pp": "cannot tell"}, goals.NO),
        ({"times fewer bytes": 14.9}, goals.NO),
    ],
)
def test_rounds_that_send_less_reach_their_goal_with_enough_seeds(monkeypatch, changed, reached):
    run = {"seeds": 3, "times fewer bytes": 16.0, "difference (pp) [95 %]": "-0.1", "within 0.5 pp": "yes"}
    sent = {"fp32 for the bytes of: FedAvg": run | {"times fewer bytes": 30.0}, "FedAvg": run | changed}
    known = pd.DataFrame.from_dict(sent, orient="index")
    monkeypatch.setattr(goals.federated, "of", lambda folder: known)
    goal = {"kind": "sent", "at_least": 15.0}
    text, said = goals.ask(goal, tables(folder="x"))
    assert said == reached and text.startswith("FedAvg: 1")
    monkeypatch.setattr(goals.federated, "of", lambda folder: None)
    assert goals.ask(goal, tables(folder="x")) is None


def test_what_a_profile_did_not_measure_a_smaller_one_did(monkeypatch):
    here = tables(point(30.0, -0.2, technique="pruning", method="weights", settings='{"sparsity":0.9}'))
    smaller = [
        tables(point(30.0, -0.2, headline=1, seeds=s), profile=p) for p, s in (("medium", 1), ("quick", 3))
    ]
    asked = [SMALLER | {"goal": "small"}, SMALLER | {"goal": "never", "of": {"method": "obs"}}]
    monkeypatch.setattr(goals, "read", lambda: asked)
    small, never = goals.answers(here, smaller)
    assert small["measured"].startswith("in medium: chosen: 2-bit") and small["reached"] == goals.UNCLAIMED
    assert (never["measured"], never["reached"]) == ("not measured", "–")
