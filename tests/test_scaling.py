"""What more nodes would save: the simulated schedule against graphs whose makespan is known."""

import importlib.util
import itertools
import json

import pandas as pd
import pytest

from nnc_utils import provenance

FILE = provenance.PACKAGE.parent / "workflow/scaling.py"
spec = importlib.util.spec_from_file_location("scaling", FILE)
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

FORK = {
    "a": [],
    "b": ["a"],
    "c": ["a"],
    "d": ["a"],
    "e": ["b", "c", "d"],
}  # e.g. 01, three that build on it, 10
SECONDS = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 1.0}


@pytest.mark.parametrize(("nodes", "expected"), [(1, 9), (2, 7), (3, 5), (64, 5)])
def test_a_schedule_by_hand(nodes, expected):
    assert scaling.makespan(FORK, SECONDS, nodes) == expected
    # with the longest first d runs beside b and c: one second less on two nodes
    first = dict(SECONDS)
    assert scaling.makespan(FORK, SECONDS, nodes, first) == (6 if nodes == 2 else expected)


def test_no_order_of_few_independent_runs_is_better_than_the_best_of_all_orders():
    seconds = {"a": 3.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 2.0}
    free = {name: [] for name in seconds}

    def loads(choice):
        return max(sum(seconds[name] for name, node in zip(seconds, choice) if node == at) for at in (0, 1))

    best = min(map(loads, itertools.product((0, 1), repeat=len(seconds))))
    queued = scaling.makespan(free, seconds, 2)
    assert best <= queued <= best * (2 - 1 / 2)  # Graham's bound
    assert queued == 7 and best == 6


def test_seconds_are_those_recorded_or_scaled_by_epochs():
    known = json.loads((provenance.PACKAGE.parent / "results/standard/provenance.json").read_text())
    recorded = [
        one["wall_seconds"] for name, one in known.items() if name.startswith("standard/01_baseline/")
    ]
    mean = pytest.approx(sum(recorded) / len(recorded))
    runs, full = scaling.grid("standard"), scaling.grid("full")
    seconds = scaling.stage_seconds(runs)
    assert [seconds[runs.cell("01_baseline", f"seed={seed}")] for seed in (1, 5)] == [mean] * 2
    searched = seconds[runs.cell("05_architecture_search", "seed=1,search")]
    assert searched == known["standard/05_architecture_search/seed=1,search"]["wall_seconds"]
    longer = scaling.stage_seconds(full)[full.cell("01_baseline", "seed=1")]
    assert longer / 2 == mean  # 40 epochs, not 20


@pytest.mark.parametrize("profile", scaling.GRAPHS)
def test_no_schedule_beats_its_bounds(profile):
    table, path = scaling.simulate(profile)
    assert path[0].startswith("01_baseline") and path[-1].startswith("10_report")
    for hours in ("hours", "longest_path_first_hours"):
        assert (table[hours] >= table["longest_path_hours"]).all()
        assert (table[hours] * table["nodes"] >= table["hours"].iloc[0] - 0.1).all()
        assert table[hours].iloc[-1] == table["longest_path_hours"].iloc[-1]  # as many nodes as it can use


def test_the_page_says_what_the_simulation_gives():
    docs = provenance.PACKAGE.parent / "docs"
    text = " ".join((docs / "cluster.md").read_text(encoding="utf-8").split())
    kept = pd.read_csv(docs / "scaling.csv")
    for profile, graph in scaling.GRAPHS.items():
        table = scaling.simulate(profile)[0]
        pd.testing.assert_frame_equal(kept[kept["graph"] == graph].reset_index(drop=True), table, atol=0.002)
        at = table.set_index("nodes")
        assert f"{at.times_faster[8]:.1f} times" in text and f"({at.efficiency[8]:.2f}" in text
    full = scaling.simulate("full")[0].set_index("nodes")
    assert f"is {full.hours[1]:.0f} hours of one node" in text
    assert f"Six nodes are {full.times_faster[6]:.1f} times as fast ({full.efficiency[6]:.2f} of six)" in text
    assert f"more than {full.at_most_times_faster[1]:.1f} times is not possible" in text
