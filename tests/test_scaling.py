"""What more nodes would save: the simulated schedule against graphs whose makespan is known."""

import importlib.util
import itertools
import json

import pandas as pd
import pytest
import yaml

from bench import execute
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
    table = scaling.simulate(profile)
    assert table["longest_path"].iloc[0].startswith("01_baseline")
    for hours in ("hours", "longest_path_first_hours"):
        assert (table[hours] >= table["longest_path_hours"]).all()
        assert (table[hours] * table["nodes"] >= table["hours"].iloc[0] - 0.1).all()
        assert table[hours].iloc[-1] == table["longest_path_hours"].iloc[-1]  # as many nodes as it can use


def test_full_goes_on_where_nodes_are_many_and_no_cell_outlasts_its_limit():
    """Before 03 and 06 were divided, eight nodes were 6.5 times as fast, and a cell of 06 took 19 hours."""
    assert scaling.simulate("full").set_index("nodes").efficiency[8] >= 0.9
    for profile in scaling.GRAPHS:
        file = provenance.PACKAGE.parent / f"workflow/profiles/{profile}.yaml"
        given = yaml.safe_load(file.read_text(encoding="utf-8")).get("cell_hours")
        limit = 3600 * given if given else execute.CELL_TIMEOUT
        slower = 1.5  # such a machine may be
        assert slower * max(scaling.stage_seconds(scaling.grid(profile)).values()) <= limit


def test_a_network_that_is_trained_on_counts_once():
    """Named by a first shard, or trained there for all that follow."""
    runs = scaling.grid("full")
    cells = {cell.shard: cell for cell in runs.of("06_pipeline") if cell.seed == 1}
    epochs = {shard: scaling.units(runs, cell)[1] for shard, cell in cells.items()}
    assert epochs["dense"] == epochs["wide"] == 80 and epochs["joined"] == 3 * 80
    pruned = scaling.grid("standard")
    assert scaling.units(pruned, pruned.cell("03_pruning", "seed=1,dense"))[1] == 4


def test_the_page_says_what_the_simulation_gives():
    docs = provenance.PACKAGE.parent / "docs"
    text = " ".join((docs / "cluster.md").read_text(encoding="utf-8").split())
    kept = pd.read_csv(docs / "scaling.csv")
    for profile, graph in scaling.GRAPHS.items():
        table = scaling.simulate(profile)
        pd.testing.assert_frame_equal(kept[kept["graph"] == graph].reset_index(drop=True), table, atol=0.002)
        at = table.set_index("nodes")
        assert f"{at.times_faster[8]:.1f} times" in text and f"({at.efficiency[8]:.3f}" in text
    full = scaling.simulate("full").set_index("nodes")
    assert f"is {full.hours[1]:.0f} hours of one node" in text
    assert f"Six nodes are {full.times_faster[6]:.1f} times as fast ({full.efficiency[6]:.3f} of six)" in text
    assert f"wait for each other: {full.longest_path[1]}. A supernet" in text
    assert f"more than {full.at_most_times_faster[1]:.1f} times is not possible" in text
