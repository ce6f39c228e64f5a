"""Each method beside its paper's claim: what is told, that none is left out, that a defeat is explained."""

from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from result_files import Invented

from bench import papers
from bench.committed import ALL_PROFILES
from nnc_utils import configurations, provenance

ROOT = provenance.PACKAGE.parent
COMMITTED = [ROOT / "results" / name for name in ALL_PROFILES]
COMMITTED = [folder for folder in COMMITTED if (folder / "compression.csv").is_file()]
WITHOUT_CLAIM = {  # method -> why no paper's claim stands beside it
    **dict.fromkeys(
        ("train", "resnet50", "student_alone", "dense_finetuned"), "what others are compared with"
    ),
    **dict.fromkeys(("student_longer", "from_scratch", "small_dense"), "a control: equal training"),
    **dict.fromkeys(("random", "random_near_limit", "random_alone"), "a control of search"),
    **dict.fromkeys(("narrow_resnet18", "three_stage"), "what search is held against"),
    **dict.fromkeys(
        ("gzip", "xz", "zstd", "torch_pruning_nncf", "nncodec_pruned"), "a tool, held against 06"
    ),
    "layerwise": "where the zeros go, shown for the lesson: a scan beside a rule of thumb",
    "searched": "what 05 found, as a rival of the pipeline",
    **dict.fromkeys(("fedavg", "fedavg_equal_bytes", "flower"), "held against float32 by 08's own goal"),
    "transfer": "a start for another task: a question, not a method",
}


def tables(rows, provenance=None):
    folder, about = (
        rows.folder.parent,
        {"dataset": "digits", "profile": "quick", "provenance": provenance or {}},
    )
    return SimpleNamespace(compression=rows.frame, folder=folder, **about)


def test_a_line_has_the_claim_the_difference_and_a_reason_for_a_defeat(tmp_path, monkeypatch):
    (tmp_path / "predictions").mkdir()
    invented = Invented(tmp_path / "predictions")
    paper = {
        "paper": "Somebody, 1999",
        "url": "https://example.org",
        "claim": "it is better",
        "equal": ["bits"],
    }
    won = {"method": "A", "ours": {"method": "kmeans", "hessian": True}, "theirs": {"method": "uniform"}}
    lost = {"method": "B", "ours": {"method": "qat"}, "theirs": {"method": "kmeans"}}
    monkeypatch.setattr(papers, "read", lambda: [paper | one | {"because": "of X"} for one in (won, lost)])
    about = {"technique": "quantization", "bits": 2}
    invented.add("uniform", 300, **about)
    nothing = SimpleNamespace(frame=invented.frame, folder=invented.folder)
    invented.add("kmeans", 200, hessian=True, **about)
    first, second = papers.lines(tables(invented), [])
    assert list(first) == ["method", "claim", "ours", "against", "difference", "verdict"]
    assert first["claim"] == "[Somebody, 1999](https://example.org): it is better"
    assert first["ours"] == "2-bit codebook, Hessian-weighted k-means" and first["verdict"] == "beats"
    assert first["difference"].startswith("+10.00 [") and first["difference"].endswith(", 1 seed")
    assert second["verdict"] == "not measured" and second["ours"] == "–"
    assert papers.lines(tables(nothing), [tables(invented)])[0]["verdict"] == "beats (in quick)"
    invented.add("kmeans", 90, **about)
    invented.add("qat", 100, **about)
    told = [(line["method"], line["verdict"]) for line in papers.lines(tables(invented), [])]
    assert told == [("A", "beats"), ("B", "beats"), ("", "below: of X")]  # named once


def test_searches_are_compared_by_what_they_found():
    found = {"evolution": [91.0, 92.0, 93.0], "random": [90.0, 90.5, 91.0], "gradient": [89.0, 90.0, 92.0]}
    about = SimpleNamespace(provenance={"05": {"extra": {"search": {"verified": found}}}})
    [[ours, theirs, difference, verdict]] = papers._searched("evolution", "random", about)
    half = 1.96 * (1 / 3 + 0.25 / 3) ** 0.5
    assert (ours, theirs, verdict) == ("evolution", "random", "beats")
    assert difference == f"+1.50 [{1.5 - half:+.2f}, {1.5 + half:+.2f}], 3 searches"
    assert papers._searched("gradient", "random", about)[0][3] == "not below"
    assert papers._searched("random", "evolution", about)[0][3] == "below"
    assert papers._searched("evolution", "optuna_nsga2", about) == []


def named(selector):
    """The methods that one side of a paper's entry names."""
    methods = selector if isinstance(selector, str) else selector.get("method", [])
    return {methods} if isinstance(methods, str) else set(methods)


def test_every_method_has_a_claim_or_a_reason_why_not():
    entries, known = papers.read(), set(configurations.registry())
    claimed = {name for entry in entries for side in ("ours", "peer") for name in named(entry.get(side, {}))}
    assert claimed <= known and known - claimed <= set(WITHOUT_CLAIM) and not claimed & set(WITHOUT_CLAIM)
    assert all(entry["url"].startswith("https://") and len(entry["claim"]) < 130 for entry in entries)


def planned(value):
    """The method of every mapping in a profile's file, at whatever depth."""
    if isinstance(value, dict):
        yield from [value.get("method")] * ("method" in value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from planned(inner)


def test_every_method_is_measured_or_planned(read_once):
    """In a committed profile's tables, or beside them as what a search found; or in a profile's file."""
    seen = {"train"}
    for folder in COMMITTED:
        seen |= set(pd.read_csv(folder / "compression.csv")["method"])
        for record in read_once(folder).provenance.values():
            seen |= set(record["extra"].get("search", {}).get("verified", {}))
    for file in (ROOT / "workflow/profiles").glob("*.yaml"):
        seen |= set(planned(yaml.safe_load(file.read_text(encoding="utf-8"))))
    assert set(configurations.registry()) - seen == set()


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_defeat_says_why(folder, read_once):
    told = papers.lines(read_once(folder), [read_once(other) for other in COMMITTED if other != folder])
    assert [line for line in told if line["verdict"].startswith("below") and ":" not in line["verdict"]] == []
    assert sum(line["verdict"] != "not measured" for line in told) > len(told) / 2
