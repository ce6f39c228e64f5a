"""The report's goals: a claim of enough seeds reaches one, a point that the test set chose does not."""

from types import SimpleNamespace

import pandas as pd
import pytest

from nnc_utils import results
from nnc_utils.reports import goals
from nnc_utils.tables import PIPELINE

SMALLER = goals._without_loss("size_ratio", 22.0, "technique == 'quantization'")


def point(method, ratio, low, *, headline=0, seeds=3, control="", technique="quantization", **more):
    about = {"dataset": "digits", "technique": technique, "method": method, "point": "", "control": control}
    about |= {"size_ratio": ratio, "delta_mean": low + 0.1, "delta_ci_low": low, "delta_ci_high": low + 0.2}
    return about | {"headline": headline, "seeds": seeds, "macs": 10.0, "accuracy_mean": 94.5} | more


def tables(*points, pairs=(), latency=()):
    whole = point("train", 1.0, 0.0, technique="baseline", macs=80.0)
    rows = [row | {"train_images": 7} for row in (whole, *points)]
    columns = ["precision", "batch", "threads", *whole, "speedup_best_fp32", "speedup_eager_fp32"]
    times = pd.DataFrame(latency, columns=columns)
    return SimpleNamespace(
        summary=pd.DataFrame([whole, *points]), compression=pd.DataFrame(rows), latency=times, pairs=pairs
    )


def test_a_claim_without_loss_reaches_a_goal():
    measured, reached = SMALLER(tables(point("a", 30.0, -0.2, headline=1), point("b", 90.0, -0.1)))
    assert reached == goals.YES and measured == "`a ` 30.0× smaller, -0.10 [-0.20, +0.00] (3 seeds)"


@pytest.mark.parametrize(
    "claim",
    [
        point("a", 30.0, -0.31, headline=1),  # a loss
        point("a", 21.9, -0.2, headline=1),  # not small enough
        point("a", 30.0, -0.2, headline=1, seeds=2),  # not by two seeds
        point("a", 30.0, -0.2),  # chosen by the test set
    ],
)
def test_what_validation_did_not_choose_reaches_none(claim):
    assert SMALLER(tables(claim))[1] in (goals.NO, goals.UNCLAIMED)
    measured, reached = SMALLER(tables(claim, point("b", 25.0, -0.1)))
    assert reached == goals.UNCLAIMED and ("`a `" in measured) == (
        claim["headline"] or claim["size_ratio"] > 25
    )


def test_where_nothing_reaches_a_goal_the_nearest_stand_there():
    found = tables(point("a", 30.0, -0.5, headline=1), point("b", 40.0, -0.4), point("c", 9.0, 0.0))
    measured, reached = SMALLER(found)
    assert reached == goals.NO
    assert [part.split(":")[0] for part in measured.split("; ")] == [
        "claimed",
        "nearest with so much",
        "most without loss",
    ]
    assert measured.index("`b `") < measured.index("`c `")
    assert SMALLER(tables(point("a", 30.0, -0.5))) == (
        "nearest with so much: `a ` 30.0× smaller, -0.40 [-0.50, -0.30] (3 seeds)",
        goals.NO,
    )
    assert SMALLER(tables(point("a", 3.0, -0.5))) == ("none without loss", goals.NO)
    control = point("a", 30.0, 0.0, headline=1, control="random")
    assert SMALLER(tables(control)) is None and SMALLER(tables()) is None


def test_a_speed_is_the_fastest_runtimes_at_batch_1_with_the_fewest_threads():
    faster = goals._without_loss("speedup_best_fp32", 20.0, "method == 'a'")
    rows = [("int8", 1, 1, 19.0), ("int8", 1, 1, 21.0), ("int8", 64, 1, 50.0), ("int8", 1, 2, 60.0)]
    made = point("a", 30.0, -0.2, headline=1)
    times = [
        {"precision": precision, "batch": batch, "threads": threads, **made, "speedup_best_fp32": ratio}
        for precision, batch, threads, ratio in [*rows, ("fp32", 1, 1, 70.0)]
    ]
    assert "`a ` 21.0× the fastest fp32" in faster(tables(made, latency=times))[0]
    assert faster(tables(made, latency=times))[1] == goals.YES
    assert faster(tables(made)) is None  # not timed


def test_fewer_multiplications_are_counted_from_the_uncompressed_network():
    fewer = goals._without_loss("fewer", 8.0, "technique == 'pruning'")
    narrow = point("a", 9.0, 0.0, headline=1, technique="pruning")
    assert fewer(tables(narrow))[1] == goals.YES
    assert fewer(tables(narrow | {"macs": 10.1}))[1] == goals.NO


def test_each_rival_has_to_be_met():
    def pair(ours, theirs, verdict, low):
        return {"ours": ours, "theirs": theirs, "verdict": verdict, "seeds": "3"} | {
            "points": f"{low + 0.1:+.2f} [{low:+.2f}, {low + 0.2:+.2f}]"
        }

    pairs = [pair("a x", "b 1", "beats", 0.1), pair("a y", "b 1", "below", -0.9)]
    pairs += [pair("a x", "b 2", "not below, in a larger file", -0.1), pair("c", "b 2", "beats", 0.4)]
    found = tables(pairs=pairs)
    assert goals._pairs("a", "b 1", "beats")(found)[1] == goals.YES
    assert goals._pairs("a", "b", "not below")(found)[1] == goals.NO
    assert goals._pairs("a", "b", "not below", at_least=1)(found)[1] == goals.YES
    measured, _ = goals._pairs("a", "b", "beats")(found)
    assert measured.split("; ")[0] == "`a x` beats `b 1`: +0.20 [+0.10, +0.30] (3 seeds)"
    assert goals._pairs("d", "b", "beats")(found) is None


def test_a_baseline_that_gains_has_not_converged():
    def more(gain):
        return point("dense_finetuned", 2.0, gain - 0.1, technique="baseline", control="dense_finetuned")

    assert goals._converged(tables(more(0.29)))[1] == goals.YES
    assert goals._converged(tables(more(0.31)))[1] == goals.NO
    assert goals._converged(tables()) is None


def test_one_rival_that_is_not_beaten_is_enough(monkeypatch):
    found = tables(point(PIPELINE, 130.0, -0.2, headline=1, technique="pipeline"))
    for told, reached in (
        ([("beats", "x"), ("beats", "y")], goals.YES),
        ([("beats", "x"), ("not below", "y")], goals.NO),
        ([("beats", "x"), ("beats, in a larger file", "y")], goals.NO),
    ):
        monkeypatch.setattr(goals, "rivals_of", lambda tables, point, told=told: told)
        assert goals._no_rival(found)[1] == reached
    monkeypatch.setattr(goals, "rivals_of", lambda tables, point: [])
    assert goals._no_rival(found) is None


def test_goals_are_asked_where_there_are_seeds_enough(published):
    assert "Which goals are reached?" not in results.report_text(published)
    path = published / "summary.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame.assign(seeds=[3] + [1] * (len(frame) - 1)).to_csv(path, index=False)
    section = results.report_text(published).split("## Which goals are reached?")[1].split("\n## ")[0]
    assert all(f"| {goal} |" in section for goal in goals.GOALS)
