"""The grid of a profile: which runs there are, what each builds on, which parameters it gets.

A profile may divide a notebook's long benchmark: `parts` names shards, each a run of its own that builds on
the first of them. What a shard says beside these options are parameters of its notebook. With `lessons` the
notebooks run whole; otherwise without the cells that measure nothing, which need minutes on large networks.

======  ====================================================================================================
runs    "first seed": it exists once, for all seeds
others  true: it builds on what other seeds have of its upstream notebooks, too
after   an earlier shard of its own notebook that it builds on, too
with    {NOTEBOOK: SHARD} or {NOTEBOOK: [SHARD, SHARD]}, of another notebook (null where that is not divided):
        it builds on those, too, of all seeds with `others`; the other shards do not wait for them
alone   true: it is timed, so nothing else may run on its machine
======  ====================================================================================================
"""

from __future__ import annotations

import fnmatch
import functools
import graphlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench import parameters
from nnc_utils.provenance import root

NETWORKS = ["01_baseline", "02_quantization", "03_pruning", "04_distillation", "05_architecture_search"]
NETWORKS += ["06_pipeline"]
# what a notebook builds on; if it runs for each seed, once with the first, or once over all; if it is timed
STAGES = {
    "00_the_usual_recipe": {"upstream": ["01_baseline"], "runs": "first seed", "alone": True},
    "01_baseline": {"upstream": [], "runs": "each seed"},
    **{name: {"upstream": ["01_baseline"], "runs": "each seed"} for name in NETWORKS[1:]},
    "07_deployment": {"upstream": NETWORKS, "runs": "first seed", "alone": True},
    "10_report": {"upstream": [*NETWORKS, "07_deployment", "00_the_usual_recipe"], "runs": "over all seeds"},
}


class GridError(ValueError):
    """A profile that cannot be run; the message names the fault."""


class Stage(BaseModel):
    """A notebook's place in the grid."""

    model_config = ConfigDict(extra="forbid", strict=True)
    upstream: list[str]
    runs: Literal["each seed", "first seed", "over all seeds"]
    alone: bool = False


class Shard(BaseModel):
    """The options of a shard; everything else is in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)
    runs: Literal["first seed", ""] = ""
    others: bool = False
    after: str = ""
    also: dict[str, str | list[str] | None] = Field({}, alias="with")
    alone: bool = False


@dataclass(frozen=True)
class Cell:
    """One run: a notebook with a seed, and the shard's name where it is divided."""

    notebook: str
    seed: int
    shard: str = ""

    @property
    def name(self) -> str:
        """Its folder below the notebook's: "seed=1", or "seed=1,weights"."""
        return f"seed={self.seed}" + (f",{self.shard}" if self.shard else "")


class Grid:
    """The runs of a profile: `config` is its file, with `profile`, its name, and `only`, patterns of runs."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.profile, self.seeds, self.jobs = config["profile"], config["seeds"], config.get("jobs", 1)
        self.given, self.lessons = config.get("parameters") or {}, bool(config.get("lessons"))
        self.stages = _checked(Stage, {"stages": config.get("stages") or STAGES})["stages"]
        self.shards = _checked(Shard, config.get("parts") or {})
        self.declared = {
            name: parameters.declared(root() / f"notebooks/{name}.ipynb") for name in self.stages
        }
        self._check()
        self.cells = [cell for notebook in self.stages for cell in self.of(notebook)]
        try:
            graphlib.TopologicalSorter({cell: self.upstream(cell) for cell in self.cells}).prepare()
        except graphlib.CycleError as error:
            chain = " <- ".join(f"{cell.notebook}/{cell.name}" for cell in error.args[1])
            raise GridError(f"`with` makes runs build on each other: {chain}") from None
        names = {f"{cell.notebook}/{cell.name}": cell for cell in self.cells}
        self.wanted: list[Cell] = []
        for pattern in config.get("only") or ["*"]:
            if not (matching := fnmatch.filter(names, pattern)):
                known = ", ".join(names)
                raise GridError(f"only: {pattern!r} is none of the runs of {self.profile}: {known}")
            self.wanted += [names[name] for name in matching if names[name] not in self.wanted]

    def _check(self) -> None:
        if not isinstance(self.jobs, int) or self.jobs < 1:
            raise GridError(f"jobs is {self.jobs!r}: how many trainings share the cores is needed, 1 or more")
        for notebook, shards in self.shards.items():
            if notebook not in self.stages or "part" not in self.declared[notebook]:
                raise GridError(f"parts of {notebook}: a stage whose notebook declares `part` is needed")
            for at, (name, shard) in enumerate(shards.items()):
                where = f"part {name} of {notebook}"
                if not re.fullmatch(r"\w+", name):
                    raise GridError(f"{where}: a name of letters, digits and _ is needed")
                if shard.after and shard.after not in list(shards)[:at]:
                    raise GridError(f"{where}: `after` names a part before it, not {shard.after!r}")
                for other, its in shard.also.items():
                    unknown = set(several(its)) - set(self.shards.get(other, {"": None}))
                    if other == notebook or other not in self.stages or unknown:
                        raise GridError(
                            f"{where}: `with` maps other notebooks to their parts, not {other}: {its}"
                        )

    def cell(self, notebook: str, name: str) -> Cell:
        """The run of this folder name."""
        return next(cell for cell in self.of(notebook) if cell.name == name)

    def shard(self, cell: Cell) -> Shard:
        """What the profile says about a run's shard."""
        return self.shards.get(cell.notebook, {}).get(cell.shard, Shard())

    def folder(self, cell: Cell) -> str:
        """The run folder, from the clone's on."""
        return f"results/runs/{self.profile}/{cell.notebook}/{cell.name}"

    def of(self, notebook: str) -> list[Cell]:
        """The runs of a notebook."""
        seeds = self.seeds if self.stages[notebook].runs == "each seed" else self.seeds[:1]
        cells = [Cell(notebook, seed, name) for seed in seeds for name in self.shards.get(notebook, [""])]
        return [c for c in cells if c.seed == self.seeds[0] or self.shard(c).runs != "first seed"]

    def upstream(self, cell: Cell) -> list[Cell]:
        """The runs that one builds on, of its own seed first."""
        stage, shard, runs = self.stages[cell.notebook], self.shard(cell), []
        for notebook in stage.upstream:
            same = [other for other in self.of(notebook) if other.seed == cell.seed]
            every = stage.runs == "over all seeds" or shard.others or not same
            runs += same + [other for other in self.of(notebook) if every and other not in same]
        for notebook, its in shard.also.items():
            seeds = [cell.seed, *(self.seeds if shard.others else [])]
            runs += [self._of_seed(notebook, name, seed) for name in several(its) for seed in seeds]
        first = next(iter(self.shards.get(cell.notebook, [""])))
        if cell.shard != first:
            runs += [self._of_seed(cell.notebook, name, cell.seed) for name in (first, shard.after or first)]
        return list(dict.fromkeys(runs))

    def _of_seed(self, notebook: str, shard: str, seed: int) -> Cell:
        cells = [cell for cell in self.of(notebook) if cell.shard == shard]
        return next((cell for cell in cells if cell.seed == seed), cells[0])

    def parameters(self, cell: Cell) -> dict[str, Any]:
        """The parameters that a run gets: the profile's, its shard's, and those that every stage has."""
        upstream = [self.folder(run) for run in self.upstream(cell)]
        every = {"profile": self.profile, "seed": cell.seed, "part": cell.shard, "upstream": upstream}
        declared = self.declared[cell.notebook]
        every = {name: value for name, value in every.items() if name in declared}
        return every | (self.given.get(cell.notebook) or {}) | self.shard(cell).model_extra

    def is_timed(self, cell: Cell) -> bool:
        """Whether nothing else may run on the machine meanwhile."""
        return self.stages[cell.notebook].alone or self.shard(cell).alone

    def threads(self, cell: Cell, cores: int) -> int:
        """How many cores it gets of a machine's: a share that lets `jobs` run side by side, if others can."""
        related = self._before(cell) | {other for other in self.cells if cell in self._before(other)}
        alone = self.is_timed(cell) or len(related) == len(self.cells) - 1
        return cores if alone else -(-cores // self.jobs)

    @functools.cache  # noqa: B019, one object a run
    def _before(self, cell: Cell) -> frozenset[Cell]:
        """The runs that one builds on, and those that these build on."""
        direct = self.upstream(cell)
        return frozenset(direct).union(*map(self._before, direct))


def several(names: str | list[str] | None) -> list[str]:
    """What `with` names of a notebook, as a list."""
    return names if isinstance(names, list) else [names or ""]


def _checked(kind: type[BaseModel], groups: dict[str, dict[str, dict]]) -> dict[str, dict[str, Any]]:
    checked: dict[str, dict[str, Any]] = {}
    for group, members in groups.items():
        for name, options in members.items():
            try:
                checked.setdefault(group, {})[name] = kind(**options or {})
            except ValidationError as error:
                faults = "; ".join(f"`{fault['loc'][0]}`: {fault['msg']}" for fault in error.errors())
                raise GridError(f"part {name} of {group}: {faults}") from None
    return checked
