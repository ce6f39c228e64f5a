"""Which runs a profile has, what each builds on, and what of a profile is refused."""

import copy

import pytest

from bench.grid import STAGES, Cell, Grid, GridError

DECLARED = 'profile: str = "smoke"  # name\nseconds: float = 0.0  # [0, 100]\nseed: int = 1  # seed\n'
PART = 'upstream: list = []  # run folders\npart: str = ""  # of a divided benchmark\n'
DIVIDED = {
    "profile": "tiny",
    "seeds": [1, 2],
    "stages": {
        "first": {"upstream": [], "runs": "each seed"},
        "second": {"upstream": ["first"], "runs": "each seed"},
        "third": {"upstream": [], "runs": "each seed"},  # but for what its parts name
        "last": {"upstream": ["first"], "runs": "over all seeds"},
    },
    "parts": {
        "first": {"once": {"seconds": 0.2, "runs": "first seed"}, "small": {"seconds": 0.1}},
        "second": {
            "all": {"others": True},
            "more": {},
            "last": {"runs": "first seed", "after": "more", "alone": True},
            "small": {"runs": "first seed", "with": {"third": "plain"}},  # a later notebook
        },
        "third": {
            "plain": {},
            "both": {"with": {"first": "once", "second": "more"}},
            "others": {"with": {"second": ["all", "more"]}, "others": True},
        },
    },
    "parameters": {"second": {"seconds": 5}},
}


@pytest.fixture
def profile(place):
    for name in DIVIDED["stages"]:
        place.notebook(name, parameters=DECLARED + PART * (name != "last"))
    return copy.deepcopy(DIVIDED)


def test_a_divided_notebook_builds_on_its_first_part(profile):
    grid = Grid(profile)
    builds_on = {
        f"{c.notebook}/{c.name}": [f"{u.notebook}/{u.name}" for u in grid.upstream(c)] for c in grid.wanted
    }
    firsts = ["first/seed=1,once", "first/seed=1,small", "first/seed=2,small"]
    both = [f"second/seed={seed},{part}" for part in ("all", "more") for seed in (1, 2)]
    assert builds_on == {
        "first/seed=1,once": [],
        "first/seed=1,small": ["first/seed=1,once"],
        "first/seed=2,small": ["first/seed=1,once"],
        "second/seed=1,all": firsts,
        "second/seed=2,all": [firsts[2], *firsts[:2]],
        "second/seed=1,more": [*firsts[:2], "second/seed=1,all"],
        "second/seed=2,more": [firsts[2], "second/seed=2,all"],
        "second/seed=1,last": [*firsts[:2], "second/seed=1,all", "second/seed=1,more"],
        "second/seed=1,small": [*firsts[:2], "third/seed=1,plain", "second/seed=1,all"],
        "third/seed=1,plain": [],
        "third/seed=2,plain": [],
        "third/seed=1,both": ["first/seed=1,once", "second/seed=1,more", "third/seed=1,plain"],
        "third/seed=2,both": ["first/seed=1,once", "second/seed=2,more", "third/seed=2,plain"],
        "third/seed=1,others": [*both, "third/seed=1,plain"],
        "third/seed=2,others": [*[both[i] for i in (1, 0, 3, 2)], "third/seed=2,plain"],
        "last/seed=1": firsts,
    }


def test_what_a_run_gets(profile):
    grid = Grid(profile | {"jobs": 2})
    timed, small = grid.cell("second", "seed=1,last"), grid.cell("first", "seed=2,small")
    assert small == Cell("first", 2, "small")
    assert grid.folder(small) == "results/runs/tiny/first/seed=2,small"
    upstream = ["results/runs/tiny/first/seed=1,once"]
    common = {"profile": "tiny", "seed": 2, "part": "small"}
    assert grid.parameters(small) == common | {"seconds": 0.1, "upstream": upstream}
    assert grid.parameters(timed)["seconds"] == 5 and not {"runs", "after", "alone"} & {
        *grid.parameters(timed)
    }
    assert grid.parameters(grid.cell("last", "seed=1")) == {"profile": "tiny", "seed": 1}  # declares no more
    # two share a machine, but for what is timed
    assert [cell for cell in grid.cells if grid.is_timed(cell)] == [timed]
    assert (grid.threads(timed, 3), grid.threads(small, 3)) == (3, 2)
    chain = {name: profile["stages"][name] for name in ("first", "last")}
    alone = Grid({"profile": "tiny", "seeds": [1], "jobs": 2, "stages": chain})
    assert [alone.threads(cell, 3) for cell in alone.cells] == [3, 3]  # nothing can run beside them
    asked = Grid(profile | {"only": ["second/seed=2*", "*/seed=2,all"]}).wanted
    assert [cell.name for cell in asked] == ["seed=2,all", "seed=2,more"]


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("once", {"runs": "first"}, "part once of first: `runs`"),
        ("small", {"alone": "yes"}, "part small of first: `alone`"),
        ("once", {"after": "small"}, "`after` names a part before it, not 'small'"),
        ("once", {"with": {"second": ["all", "none"]}}, "`with` maps other notebooks to their parts"),
        ("once", {"with": {"first": "small"}}, "`with` maps other notebooks to their parts"),
        ("once", {"with": {"last": "small"}}, "`with` maps other notebooks to their parts"),
        ("once", {"with": ["second"]}, "part once of first: `with`"),
        ("small", {"with": {"second": "all"}}, "build on each other: .*second/seed=1,all"),
        ("a part", {}, "part a part of first: a name"),
    ],
)
def test_what_a_part_cannot_say(profile, part, options, message):
    profile["parts"]["first"][part] = options
    with pytest.raises(GridError, match=message):
        Grid(profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": 0}, "jobs is 0: how many trainings share the cores"),
        ({"parts": {"last": {"a": {}}}}, "parts of last: a stage whose notebook declares `part`"),
        ({"only": ["frist/*"]}, "'frist/\\*' is none of the runs of tiny: first/seed=1,once, "),
        ({"stages": {"first": {"upstream": [], "runs": "never"}}, "parts": {}}, "`runs`"),
    ],
)
def test_what_a_profile_cannot_say(profile, change, message):
    with pytest.raises(GridError, match=message):
        Grid(profile | change)


def test_every_notebook_that_measures_is_in_the_report():
    assert set(STAGES["10_report"]["upstream"]) == set(STAGES) - {"10_report"}
