"""The page that holds two data sets side by side: where it stands, and what it says carries over."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_report import altered, pair, quantized

from bench import goals, report, two_data_sets
from bench.committed import Tables

HEADING = "Two data sets"


@pytest.fixture
def second(published):
    """The same tables once more, as if they were of CIFAR-10; gives results/cifar."""
    folder = published.parent / "cifar"
    shutil.copytree(published, folder)
    for file in ("compression.csv", "summary.csv", "latency.csv"):
        altered(folder / file, lambda frame: frame["dataset"] == "digits", dataset="cifar10")
    (folder / "predictions/labels-digits.npy").rename(folder / "predictions/labels-cifar10.npy")
    return folder


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def page(folder):
    """The section alone."""
    tables = Tables(folder)
    template = report.template("two_data_sets.md.j2", tables)
    return report.tidy(template.render(t=tables, pair=two_data_sets.both(tables)))


def test_the_page_stands_in_both_reports_and_only_with_both_tables(published, second):
    text = report.text(second)
    assert page(published) == page(second) and page(second) in text
    assert "all numbers are about CIFAR-10, but" in text and "Not measured: phones" in text
    other = published.parent / "standard"  # what the README shows from now on; the same data set
    shutil.copytree(published, other)
    assert two_data_sets.both(Tables(published)) is None
    assert [its.folder for its in two_data_sets.both(Tables(second))] == [other, second]
    shutil.rmtree(second)
    text = report.text(other)
    assert HEADING not in text and "Not measured: other data sets, phones" in text


def test_what_carries_over_is_told_from_the_tables(published, second):
    frame = pd.read_csv(published / "summary.csv").set_index("technique")
    good = {"delta_mean": 0.0, "delta_ci_low": -0.1, "delta_ci_high": 0.1, "no_loss": 1}
    bad = {"delta_mean": -1.0, "delta_ci_low": -1.2, "delta_ci_high": -0.8, "no_loss": 0}
    outcomes = {}
    for name, mine, theirs in (
        ("not", good, bad),
        ("both", good, good),
        ("second", bad, good),
        ("no", bad, bad),
    ):
        altered(published / "summary.csv", quantized, **mine)
        altered(second / "summary.csv", quantized, **theirs)
        outcomes[name] = page(second)
    assert "- Int8, without training: **does not carry over**. scikit-learn's digits: " in outcomes["not"]
    assert "**carries over**." in outcomes["both"] and "**holds on neither**" in outcomes["no"]
    assert "**holds on CIFAR-10 alone**" in outcomes["second"]
    ratio = f"{frame['size_ratio']['quantization']:.2f}×"
    assert ["", "CIFAR-10"] + [f"{frame['accuracy_mean']['quantization']:.2f} %"] + [
        "-1.00 [-1.20, -0.80]", "no", ratio, "4.00×"
    ] in rows_of(outcomes["not"])  # fmt: skip
    # the same configuration on both: how much more the second loses, of two independent sets of images
    half = math.hypot(0.1, 0.2)
    [line] = [row for row in rows_of(outcomes["not"]) if len(row) == 5 and row[1] == "+0.00 [-0.10, +0.10]"]
    assert line[4] == f"+1.00 [{1 - half:+.2f}, {1 + half:+.2f}]: more"
    assert "Of 1 configurations that both measured, 1 cost more on CIFAR-10, 0 less" in outcomes["not"]
    assert "0 cost more on CIFAR-10, 1 less" in outcomes["second"]
    assert "0 cost more on CIFAR-10, 0 less" in outcomes["both"]


def test_goals_of_the_second_data_set_and_a_published_neighbour_stand_there(published, second):
    text = page(second)
    assert (
        "- Goal on CIFAR-10: The pipeline: 50 times smaller within 0.3 pp. Reached: **–**. not measured."
        in text
    )
    assert "6.3× smaller and 2.45× faster ([Zhou and Shen, 2026](https://arxiv.org/abs/2604.04988))" in text
    assert "The pipeline: 50 times smaller within 0.3 pp" not in [
        a["goal"] for a in goals.answers(Tables(second), [])
    ]
    altered(second / "compression.csv", lambda frame: frame["dataset"] == "cifar10", dataset="cifar100")
    altered(second / "summary.csv", lambda frame: frame["dataset"] == "cifar10", dataset="cifar100")
    (second / "predictions/labels-cifar10.npy").rename(second / "predictions/labels-cifar100.npy")
    assert "Zhou" not in page(second)


def test_comparisons_agree_are_opposite_or_decided_on_one():
    sides = [
        ("kmeans", '{"bits":2}'),
        ("uniform", '{"bits":2}'),
        ("qat", '{"bits":2}'),
        ("uniform", '{"bits":3}'),
    ]
    first = [
        pair(sides[0], other, verdict)
        for other, verdict in zip(sides[1:], ("beats", "beats", "below"), strict=True)
    ]
    verdicts = ("beats, in a larger file", "below", "not below")
    second = [pair(sides[0], other, verdict) for other, verdict in zip(sides[1:], verdicts, strict=True)]
    second.append(pair(sides[1], sides[2], "beats"))  # the first did not compare them
    lines = two_data_sets.comparisons(SimpleNamespace(pairs=first), SimpleNamespace(pairs=second))
    assert [line["kind"] for line in lines] == ["same", "opposite", "decided on one"]
    assert lines[1]["pairs"] == (first[1], second[1])


def test_a_rival_of_another_data_set_is_no_answer(published, second):
    """What a report did not measure another profile did, but only on the same images."""
    frame = Tables(published)
    words = report.template("details.md.j2", frame).globals
    assert words["others"]() == []
    assert np.array_equal(words["both"](frame)[1].folder, second)
