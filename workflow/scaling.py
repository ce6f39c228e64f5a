"""How much sooner is a profile finished on more machines? Simulated, from recorded seconds.

    python workflow/scaling.py          writes docs/scaling.csv and docs/scaling.png

The graph is Snakemake's: `bench.grid` gives the runs and what each builds on. Seconds are those of
results/standard/provenance.json. What was not run there, or with other epochs, is scaled: a unit of work
(`units`) costs what it cost on the average in the same notebook of `standard`. One run at a time on a node;
nodes are as fast as the machine that recorded; queues, starting and copying cost nothing.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import yaml

from bench.grid import Cell, Grid
from nnc_utils import figures
from nnc_utils.provenance import root
from nnc_utils.rows import run_name

NODES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
SEEDS = [1, 2, 3, 4, 5]
SHORT = 0.1  # hours: shorter runs of the longest path are not told
REPORT_SECONDS = 60  # 10_report reads tables; it leaves no seconds there
GRAPHS = {"full": "full", "standard": "standard's shards, 5 seeds"}
EPOCHS = {"03_pruning": "train_epochs", "04_distillation": "epochs", "06_pipeline": "distill_epochs"}


def grid(profile: str) -> Grid:
    """The runs of a profile, with five seeds."""
    config = yaml.safe_load((root() / f"workflow/profiles/{profile}.yaml").read_text(encoding="utf-8"))
    return Grid(config | {"profile": profile, "seeds": SEEDS})


def units(runs: Grid, cell: Cell) -> tuple[str, float]:
    """The kind of a run's work, and how much of it: epochs times networks, as far as it trains."""
    notebook = cell.notebook
    declared = {name: one.default for name, one in runs.declared[notebook].items()}
    given = declared | runs.parameters(cell)
    networks = sum(len(given.get(name, ())) for name in ("configurations", "controls", "peers"))
    first = cell.shard == next(iter(runs.shards.get(notebook, [""])))
    if notebook == "00_the_usual_recipe":  # trains a network of 01's size, twice
        return "01_baseline", given["teacher_epochs"] + given["epochs"]
    if notebook == "01_baseline":
        return notebook, given["epochs"]
    if notebook == "02_quantization":
        return notebook, networks
    if notebook in EPOCHS:  # the first shard also trains the uncompressed network on
        trains_dense = first and {"method": "dense_finetuned"} not in given["configurations"]
        return notebook, (networks + trains_dense) * given[EPOCHS[notebook]]
    if notebook == "05_architecture_search":
        searching = given["supernet_epochs"] + given["alone"] * given["alone_epochs"]
        work = {
            "latency": given["latency_networks"],
            "search": searching,
            "retrain": networks * given["epochs"],
        }
        return f"{notebook}: {given['steps'][-1]}", work[given["steps"][-1]]
    return notebook, len(given["networks"]) * given["seconds"]  # 07_deployment


def stage_seconds(runs: Grid) -> dict[Cell, float]:
    """Seconds of each run of a profile: recorded, of the same shard with another seed, or scaled."""
    known = json.loads((root() / "results/standard/provenance.json").read_text(encoding="utf-8"))
    standard, recorded, spent, done = (
        grid("standard"),
        defaultdict(list),
        defaultdict(float),
        defaultdict(float),
    )
    for cell in standard.cells:
        name = run_name("standard", cell.notebook, cell.seed, cell.shard)
        if name in known:
            kind, work = units(standard, cell)
            recorded[cell.notebook, cell.shard].append(known[name]["wall_seconds"])
            spent[kind] += known[name]["wall_seconds"]
            done[kind] += work
    seconds = {}
    for cell in runs.cells:
        same = recorded[cell.notebook, cell.shard] if runs.profile == "standard" else []
        if cell.notebook == "10_report":
            seconds[cell] = REPORT_SECONDS
        elif same:
            seconds[cell] = sum(same) / len(same)
        else:
            kind, work = units(runs, cell)
            seconds[cell] = spent[kind] / done[kind] * work
    return seconds


def to_the_end(runs: Grid, seconds: dict[Cell, float]) -> dict[Cell, tuple[float, list[Cell]]]:
    """For each run the longest path that begins with it: its seconds, and its runs."""
    later = defaultdict(list)
    for cell in runs.cells:
        for before in runs.upstream(cell):
            later[before].append(cell)
    paths: dict[Cell, tuple[float, list[Cell]]] = {}

    def longest(cell: Cell) -> tuple[float, list[Cell]]:
        if cell not in paths:
            rest = max((longest(one) for one in later[cell]), key=lambda path: path[0], default=(0.0, []))
            paths[cell] = (seconds[cell] + rest[0], [cell, *rest[1]])
        return paths[cell]

    return {cell: longest(cell) for cell in runs.cells}


def makespan(
    upstream: dict[Any, list], seconds: dict[Any, float], nodes: int, urgency: dict[Any, float] | None = None
) -> float:
    """Seconds until all is done on so many nodes (Graham's list scheduling).

    A free node takes, of what can run, what has been able to for longest, as Slurm does; with `urgency` what
    has most of it.
    """
    urgency = urgency or {}
    order = {cell: at for at, cell in enumerate(upstream)}
    waiting = {cell: set(before) for cell, before in upstream.items()}
    ready, running, now = [], [], 0.0

    def now_ready() -> None:
        for cell in [cell for cell, before in waiting.items() if not before]:
            del waiting[cell]
            heapq.heappush(ready, (-urgency.get(cell, 0), now, order[cell], cell))

    now_ready()
    while ready or running:
        while ready and len(running) < nodes:
            *_, at, cell = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[cell], at, cell))
        now, _, ended = heapq.heappop(running)
        for before in waiting.values():
            before.discard(ended)
        now_ready()
    return now


def simulate(profile: str) -> pd.DataFrame:
    """A row for each number of nodes."""
    runs = grid(profile)
    seconds, upstream = stage_seconds(runs), {cell: runs.upstream(cell) for cell in runs.cells}
    paths = to_the_end(runs, seconds)
    length, path = max(paths.values(), key=lambda one: one[0])
    total, urgency = sum(seconds.values()), {cell: one[0] for cell, one in paths.items()}
    hours = {f"{cell.notebook} {cell.shard}".strip(): seconds[cell] / 3600 for cell in path}
    words = [f"{run} {its:.1f} h" for run, its in hours.items() if its >= SHORT]
    table = []
    for nodes in NODES:
        queued = makespan(upstream, seconds, nodes)
        row = {
            "graph": GRAPHS[profile],
            "nodes": nodes,
            "hours": queued / 3600,
            "times_faster": total / queued,
        }
        row |= {"efficiency": total / queued / nodes}
        row |= {"longest_path_first_hours": makespan(upstream, seconds, nodes, urgency) / 3600}
        row |= {"longest_path_hours": length / 3600, "at_most_times_faster": total / length}
        table.append(row | {"longest_path": ", ".join(words)})
    return pd.DataFrame(table).round(3)


def draw(table: pd.DataFrame) -> plt.Figure:
    """How many times faster are N nodes? Simulated; the dotted lines are what the longest path allows."""
    figures.style()
    figure, axes = plt.subplots()
    axes.plot(NODES, NODES, color="0.6", label="N times faster")
    for at, (graph, rows) in enumerate(table.groupby("graph", sort=False)):
        colour = f"C{at}"
        axes.plot(rows["nodes"], rows["times_faster"], color=colour, marker=figures.MARKERS[at], label=graph)
        axes.axhline(rows["at_most_times_faster"].iloc[0], color=colour, linestyle=":")
    for scale, set_ticks in ((axes.set_xscale, axes.set_xticks), (axes.set_yscale, axes.set_yticks)):
        scale("log", base=2)
        set_ticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes.set(
        xlabel="nodes", ylabel="times faster than one node", title="How much do more nodes help? (simulated)"
    )
    axes.legend()
    figure.tight_layout()
    return figure


def main() -> None:
    """Write docs/scaling.csv and docs/scaling.png, and say what limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=root() / "docs", help="folder of the two files")
    out = parser.parse_args().out
    whole = pd.concat([simulate(profile) for profile in GRAPHS])
    print(whole.to_string(index=False))
    whole.to_csv(out / "scaling.csv", index=False)
    draw(whole).savefig(out / "scaling.png")


if __name__ == "__main__":
    main()
