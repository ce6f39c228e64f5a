"""The report's goals: a claim of enough seeds reaches one, a point that the test set chose does not."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nnc_utils import models, results
from nnc_utils.reports import goals
from nnc_utils.search.space import around
from nnc_utils.tables import PIPELINE

SMALLER = goals._without_loss("size_ratio", 22.0, "technique == 'quantization'")


def point(method, ratio, low, *, headline=0, seeds=3, control="", technique="quantization", **more):
    about = {"dataset": "digits", "technique": technique, "method": method, "point": "", "control": control}
    about |= {"division": "open"}
    about |= {"size_ratio": ratio, "delta_mean": low + 0.1, "delta_ci_low": low, "delta_ci_high": low + 0.2}
    return about | {"headline": headline, "seeds": seeds, "macs": 10.0, "accuracy_mean": 94.5} | more


def tables(*points, pairs=(), timed=None):
    """Tables of some points and an uncompressed network; `timed` has the first point's row of latency.csv."""
    whole = point("train", 1.0, 0.0, technique="baseline", macs=80.0)
    rows = [
        row | {"train_images": 7, "seed": 1, "artifact_sha256": row["method"]} for row in (whole, *points)
    ]
    times = pd.DataFrame([timed] if timed else [], columns=list(timed or ["precision"]))
    return SimpleNamespace(
        summary=pd.DataFrame([whole, *points]),
        compression=pd.DataFrame(rows),
        pairs=pairs,
        timed=lambda sha256: times if points and sha256 == points[0]["method"] else times.head(0),
        differences=lambda network, row: {"delta_ci_low": row["low"]},
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
        "chosen",
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


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({}, goals.YES),
        ({"speedup_best_fp32": 19.9}, goals.NO),
        ({"low": -0.31}, goals.NO),  # the runtime loses what eager does not
        ({"agreement": 98.9}, goals.NO),
        ({"precision": "fp32"}, None),  # not timed in integers
    ],
)
def test_a_speed_is_one_runtimes_without_loss_there(change, reached):
    faster = goals._without_loss("speedup_best_fp32", 20.0, "method == 'a'")
    row = {"precision": "int8", "runtime": "openvino", "speedup_best_fp32": 21.0, "speedup_eager_fp32": 50.0}
    row |= {"agreement": 99.6, "low": -0.25} | change
    found = faster(tables(point("a", 30.0, -0.2, headline=1), timed=row))
    assert (found and found[1]) == reached
    if reached == goals.YES:
        assert "`a ` 21.0× the fastest fp32" in found[0] and "openvino: lower end -0.25" in found[0]


def test_fewer_multiplications_are_counted_from_the_uncompressed_network():
    fewer = goals._without_loss("fewer", 8.0, "technique == 'pruning'")
    narrow = point("a", 9.0, 0.0, headline=1, technique="pruning")
    assert fewer(tables(narrow))[1] == goals.YES
    assert fewer(tables(narrow | {"macs": 10.1}))[1] == goals.NO


def pair(ours, theirs, verdict, low, seeds=3):
    points = f"{low + 0.1:+.2f} [{low:+.2f}, {low + 0.2:+.2f}]"
    return {"ours": ours, "theirs": theirs, "verdict": verdict, "seeds": str(seeds), "points": points}


def test_each_rival_has_to_be_met():
    pairs = [pair("a x", "b 1", "beats", 0.1), pair("a y", "b 1", "below", -0.9)]
    pairs += [pair("a x", "b 2", "not below, in a larger file", -0.1), pair("c ", "b 2", "beats", 0.4)]
    ours = [point("a", 2.0, 0.0, point=name, headline=1) for name in "xy"]
    found = tables(*ours, point("c", 2.0, 0.0), pairs=pairs)
    assert goals._pairs("a .*", "b 1", "beats")(found)[1] == goals.YES
    assert goals._pairs("a .*", "b .*", "not below")(found)[1] == goals.NO
    assert goals._pairs("a .*", "b .*", "not below", at_least=1)(found)[1] == goals.YES
    assert goals._pairs("a .*", "b .*", "not below", bytes_count=False)(found)[1] == goals.YES
    assert goals._pairs(".*", "b .*", "beats")(found)[1] == goals.UNCLAIMED  # c is not claimed
    assert goals._pairs(".*", "b .*", "beats", fixed=True)(found)[1] == goals.YES
    measured, _ = goals._pairs("a .*", "b .*", "beats")(found)
    assert measured.split("; ")[0] == "`a x` (94.50 %) beats `b 1`: +0.20 [+0.10, +0.30] (3 seeds)"
    assert goals._pairs("d .*", "b .*", "beats")(found) is None
    assert goals._pairs("a", "b .*", "beats")(found) is None  # the whole name has to match


def test_few_seeds_and_controls_make_no_claim():
    ours = point("kd", 2.0, 0.0, headline=1)
    beats = goals._pairs(".*", "alone", "beats")
    assert beats(tables(ours, pairs=[pair("kd ", "alone", "beats", 0.1, seeds=2)]))[1] == goals.UNCLAIMED
    shuffled = ours | {"control": "shuffled_teacher"}
    assert beats(tables(shuffled, pairs=[pair("kd ", "alone", "beats", 0.1)])) is None


def test_a_baseline_that_gains_has_not_converged():
    def more(gain):
        return point("dense_finetuned", 2.0, gain - 0.1, technique="baseline", control="dense_finetuned")

    assert goals._converged(tables(more(0.19)))[1] == goals.YES  # the upper end counts
    assert goals._converged(tables(more(0.21)))[1] == goals.NO
    assert goals._converged(tables(more(0.19) | {"seeds": 2}))[1] == goals.UNCLAIMED
    assert goals._converged(tables()) is None


@pytest.mark.parametrize(
    ("found", "reached"),
    [
        ({}, goals.YES),
        ({"gradient": [88.0, 88.1]}, goals.NO),  # as random
        ({"optuna_nsga2": [91.0]}, goals.NO),
        ({"evolution": None}, goals.NO),
    ],
)
def test_each_family_has_to_find_more_than_random_search(found, reached):
    verified = {name: [88.5, 89.0] for name in goals.FAMILIES} | {
        "random": [88.0, 88.1],
        "optuna_nsga2": [88.6],
    }
    verified = {name: values for name, values in (verified | found).items() if values}
    provenance = {"run": {"extra": {}}, "05": {"extra": {"search": {"verified": verified}}}}
    measured, said = goals._searches(SimpleNamespace(provenance=provenance))
    assert said == reached and "`random` 88.05 %" in measured
    assert goals._searches(SimpleNamespace(provenance={"run": {"extra": {}}})) is None


@pytest.mark.parametrize(("factor", "reached"), [(1.0, goals.YES), (1.2, goals.NO)])
def test_the_predictor_is_asked_for_networks_never_seen(factor, reached):
    space = around(channels=1, size=28, classes=10, stem="small_stride2")
    random, times = np.random.default_rng(0), {}
    for name, count in (("blocks", 30), ("networks", 10)):
        specs = [space.spec(space.sample(random)) for _ in range(count)]
        scale = factor if name == "networks" else 1.0
        times[name] = [[spec.to_json(), scale * (0.01 + 1e-8 * models.macs(spec))] for spec in specs]
    measured, said = goals._predictor(SimpleNamespace(provenance={"05": {"extra": {"latency": times}}}))
    assert said == reached and "on 10 networks, fitted to 30 blocks" in measured


def test_one_rival_that_is_not_beaten_is_enough(monkeypatch):
    found = tables(point(PIPELINE, 130.0, -0.2, headline=1, technique="pipeline"))
    for told, reached in (
        ([("beats", "x"), ("beats", "y")], goals.YES),
        ([("beats", "x"), ("not below", "y")], goals.NO),
        ([("beats", "x"), ("beats, in a larger file", "y")], goals.NO),
        ([("beats", "x (1 of 3 seeds)")], goals.UNCLAIMED),
        ([("beats", "x (another teacher)")], goals.UNCLAIMED),
    ):
        monkeypatch.setattr(goals, "rivals_of", lambda tables, point, told=told: told)
        measured, said = goals._no_rival(found)
        assert said == reached and f" of {len(told)} (" in measured
    monkeypatch.setattr(goals, "rivals_of", lambda tables, point: [])
    assert goals._no_rival(found) is None


@pytest.mark.parametrize(
    ("goal", "enough"),
    [
        ("Integers without", point("uniform_per_channel", 4.5, -0.3, point="bits=7", division="closed")),
        ("Without a gradient step", point("kmeans", 22.0, -0.3, division="closed")),
        ("Trained with 4", point("qat_lsq", 8.0, -0.3, point="bits=4")),
        ("Trained with 2", point("qat_lsq", 8.0, -1.0, point="bits=2")),
        ("90 % zeros", point("taylor", 12.0, -0.3, point="sparsity=0.9 tuned", technique="pruning")),
        ("Channels removed", point("taylor", 2.0, -0.3, technique="pruning", macs=20.0)),
        ("The pipeline: 100", point(PIPELINE, 100.0, -0.3, technique="pipeline")),
    ],
)
def test_each_goal_asks_for_its_points(goal, enough):
    [find] = [find for text, find in goals.GOALS.items() if text.startswith(goal)]
    enough = enough | {"headline": 1}
    assert find(tables(enough))[1] == goals.YES
    assert find(tables(enough | {"delta_ci_low": -1.01}))[1] == goals.NO
    assert find(tables(enough | {"method": "other", "technique": "peer"})) is None
    less = {"macs": 20.1} if goal == "Channels removed" else {"size_ratio": 0.99 * enough["size_ratio"]}
    if not goal.startswith("Trained"):
        assert find(tables(enough | less))[1] == goals.NO


def test_what_a_profile_did_not_measure_a_smaller_one_did(tmp_path, monkeypatch):
    monkeypatch.setattr(
        goals, "GOALS", {"small": SMALLER, "fast": goals._without_loss("fewer", 9.0, "fewer < 0")}
    )
    here = tables(point("a", 30.0, -0.2, technique="pruning"))
    for name, seeds in (("medium", 1), ("quick", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compression.csv").touch()
        other = tables(point("b", 30.0, -0.2, headline=1, seeds=seeds))
        other.compression["profile"] = name
        other.folder = tmp_path / name
        monkeypatch.setattr(here, name, other, raising=False)
    monkeypatch.setattr(goals, "Tables", lambda folder: getattr(here, folder.name))
    here.folder = tmp_path / "standard"
    _, text = goals.goals_text(here)
    assert "| small | in medium: chosen: `b ` 30.0× smaller" in text and f"| {goals.UNCLAIMED} |" in text
    assert "| fast | not measured | – |" in text


def test_goals_are_asked_where_there_are_seeds_enough(published):
    assert "Which goals are reached?" not in results.report_text(published)
    path = published / "summary.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame.assign(seeds=[3] + [1] * (len(frame) - 1)).to_csv(path, index=False)
    section = results.report_text(published).split("## Which goals are reached?")[1].split("\n## ")[0]
    assert all(f"| {goal} |" in section for goal in goals.GOALS)
