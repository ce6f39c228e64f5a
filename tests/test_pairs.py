"""Who is held against whom, and what the images say."""

import json

import numpy as np
import pandas as pd
import pytest
from result_files import Invented

from bench import pairs


@pytest.fixture
def rows(tmp_path):
    return Invented(tmp_path)


def told(rows):
    """Ours, theirs (method and settings), seeds and verdict of each pair."""
    return sorted(
        (
            f"{p.ours['method']} {p.ours['settings']}",
            f"{p.theirs['method']} {p.theirs['settings']}",
            p.seeds,
            p.verdict,
        )
        for p in pairs.pairs(rows.frame, rows.folder, dataset="digits")
    )


def test_methods_are_compared_at_the_same_setting_or_in_no_more_bytes(rows):
    def add(method, size, wrong, control="", **settings):
        rows.add(method, wrong, technique="quantization", size=size, control=control, **settings)

    add("kmeans", 100, 300, bits=2)
    add("kmeans", 101, 200, bits=2, hessian=True)
    add("kmeans", 150, 100, bits=3, hessian=True)  # no counterpart
    add("uniform", 150, 100, bits=3, reestimate=True)
    add("uniform", 150, 100, bits=3)  # another setting
    add("uniform", 150, 100, bits=3, granularity="tensor", reestimate=True)
    add("mixed_precision", 149, 100, budget_bits=3, reestimate=True)
    add("uniform", 100, 300, levels=5)
    add("mixed_precision", 99, 200, budget_levels=5)
    add("mixed_precision", 400, 10, "hand_rule", rule="hand")  # has no budget
    add("qat", 100, 30, bits=2)
    add("qat", 100, 40, bits=2, quantizer="ste")
    add("weights", 200, 100, sparsity=0.9, reestimate=True)
    for score in ("taylor", "obd_fisher", "obd_hessian"):
        add("weights", 199, 200, sparsity=0.9, score=score, reestimate=True)
    add("weights", 199, 0, "random", sparsity=0.9, score="random", reestimate=True)
    add("weights", 300, 0, sparsity=0.8, score="taylor", reestimate=True)  # no counterpart
    add("obs", 203, 100, sparsity=0.9, reestimate=True)
    add("nncodec", 120, 50, qp=-30)
    add("hessian_rounding", 90, 400, lambda_=1e-9)
    add("hessian_rounding", 119, 60, lambda_=1e-10)
    add("hessian_rounding", 121, 0, lambda_=1e-11)  # larger than NNCodec's
    add("hessian_rounding", 120, 80, "one_sided", lambda_=1e-10, one_sided=True)  # not ours against NNCodec
    magnitude = 'weights {"reestimate":true,"sparsity":0.9}'
    assert told(rows) == sorted(
        [
            ('kmeans {"bits":2,"hessian":true}', 'kmeans {"bits":2}', 1, "beats"),
            (
                'mixed_precision {"budget_bits":3,"reestimate":true}',
                'uniform {"bits":3,"reestimate":true}',
                1,
                "not below",
            ),
            ('mixed_precision {"budget_levels":5}', 'uniform {"levels":5}', 1, "beats"),
            ('qat {"bits":2}', 'qat {"bits":2,"quantizer":"ste"}', 1, "beats"),
            *(
                (f'weights {{"reestimate":true,"score":"{score}","sparsity":0.9}}', magnitude, 1, "below")
                for score in ("taylor", "obd_fisher", "obd_hessian")
            ),
            ('obs {"reestimate":true,"sparsity":0.9}', magnitude, 1, "not below, in a larger file"),
            ('hessian_rounding {"lambda_":1e-10}', 'nncodec {"qp":-30}', 1, "below"),
            (
                'hessian_rounding {"lambda_":1e-10}',
                'hessian_rounding {"lambda_":1e-10,"one_sided":true}',
                1,
                "beats",
            ),
        ]
    )


def test_removed_channels_meet_networks_of_equal_macs(rows):
    rows.add("channels", 50, macs=4, compensate=True, train="finetune")
    rows.add("channels", 50, macs=4, compensate=True, train="finetune", int8=True)
    rows.add("channels", 70, macs=4, compensate=True, train="finetune", schedule="iterative")
    rows.add("channels", 0, macs=4, compensate=True, train="distill")
    rows.add("channels", 20, macs=4, images=0)  # not trained: nothing to compare with
    rows.add("channels", 0, macs=4, compensate=True, train="finetune", control="attempt")
    rows.add(
        "channels", 10, macs=4, compensate=True, train="finetune", score="l2"
    )  # not what was fixed before
    rows.add("torch_pruning", 80, technique="peer", macs=4, score="taylor", uniform=True, train="finetune")
    rows.add(
        "torch_pruning", 80, technique="peer", macs=4, uniform=True, train="finetune", images=300
    )  # other budget
    rows.add("channels", 70, macs=4, compensate=True, train="finetune", score="random", control="random")
    controls = {"images": 1200, "run": "03_pruning/controls"}
    rows.add("from_scratch", 30, macs=4, control="from_scratch", **controls)
    rows.add("small_dense", 60, technique="baseline", macs=4, control="small_dense", **controls)
    rows.add("small_dense", 60, technique="baseline", macs=4, int8=True, control="small_dense", **controls)
    rows.add("small_dense", 60, technique="baseline", macs=8, control="small_dense", run="06_pipeline")
    fine_tuned = 'channels {"compensate":true,"macs":4,"train":"finetune"}'
    distilled = 'channels {"compensate":true,"macs":4,"train":"distill"}'
    int8 = 'channels {"compensate":true,"int8":true,"macs":4,"train":"finetune"}'
    iterative = 'channels {"compensate":true,"macs":4,"schedule":"iterative","train":"finetune"}'
    scratch, narrow = 'from_scratch {"macs":4}', 'small_dense {"macs":4}'
    pruned = [
        (
            fine_tuned,
            'torch_pruning {"macs":4,"score":"taylor","train":"finetune","uniform":true}',
            1,
            "beats",
        ),
        (fine_tuned, 'channels {"compensate":true,"macs":4,"score":"random","train":"finetune"}', 1, "beats"),
    ]
    never_pruned = [
        (fine_tuned, scratch, 1, "below"),
        (fine_tuned, narrow, 1, "beats"),
        (int8, 'small_dense {"int8":true,"macs":4}', 1, "beats"),
        (distilled, scratch, 1, "beats"),
        (distilled, narrow, 1, "beats"),
        (iterative, scratch, 1, "below"),
        (iterative, narrow, 1, "below"),
    ]
    assert told(rows) == sorted(pruned)  # how long the baseline was trained is not known
    for images, more in ((999, []), (1000, never_pruned)):
        rows.add("train", 0, technique="baseline", run="01_baseline", images=images)
        assert told(rows) == sorted(pruned + more)
        rows.rows.pop()
    for row in rows.rows:  # of one run: its notebook gives both the same images
        row["run"] = row["run"].replace("/controls", "")
    assert told(rows) == sorted(pruned + never_pruned)


def test_distilled_students_meet_those_alone_over_all_seeds(rows):
    def student(method, wrong, control="", images=100, **settings):
        rows.add(
            method,
            wrong,
            technique="distillation",
            control=control,
            seed=seed,
            size=100 + seed,
            images=images,
            **settings,
        )

    for seed in (1, 2):
        rows.add("train", 20, technique="baseline", seed=seed, images=900)
        student("student_alone", 60, "student_alone", width=0.25)
        student("student_longer", 50, "student_longer", images=200, width=0.25)
        student("kd", 50 if seed == 1 else 30, width=0.25)
        student("kd", 60 if seed == 1 else 30, width=0.25, cached=True)
        student("kd", 90, "shuffled_teacher", width=0.25, shuffled=True)
        student("kd", 40, images=200, width=0.25, teacher="self")
        student("kd", 10, width=0.5)  # nobody of its width is alone
        student("student_alone", 20, "student_alone", width=0.125)
        student("dkd", 10, width=0.125)
    alone = 'student_alone {"width":0.25}'
    assert told(rows) == sorted(
        [
            ('dkd {"width":0.125}', 'student_alone {"width":0.125}', 2, "beats"),
            ('kd {"width":0.25}', alone, 2, "beats"),
            ('kd {"cached":true,"width":0.25}', 'kd {"width":0.25}', 2, "below"),
            ('kd {"cached":true,"width":0.25}', alone, 2, "beats"),
            ('kd {"shuffled":true,"width":0.25}', alone, 2, "below"),
            ('kd {"teacher":"self","width":0.25}', 'student_longer {"width":0.25}', 2, "beats"),
        ]
    )
    # d is the mean over the seeds: 1 for 10 images, 1/2 for 20 of 1000
    difference = np.repeat([1.0, 0.5, 0.0], [10, 20, 970])
    half = 100 * 1.96 * np.append(difference, [1, -1]).std(ddof=1) / np.sqrt(1000)
    table = pairs.comparisons(rows.frame, rows.folder, dataset="digits")
    [line] = table[(table["ours"] == table["ours"][0]) & (table["theirs"] == table["theirs"][0])].to_dict(
        "records"
    )
    assert line["difference (pp) [95 %]"] == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    assert line["bytes"] == 102  # (101 + 102) / 2, rounded to even
    closed = pairs.gaps(rows.frame, rows.folder, dataset="digits")["closed"]
    # 2 points of 4 and 1.5 of 4, the shuffled teacher is not asked; the eighth alone is as good as the dense
    assert list(closed) == ["50 %", "38 %", "no gap"]


def of_pipelines(rows):
    table = pairs._table(rows.frame)
    return {
        (table.at[mine, "settings"], table.at[other, "method"], table.at[other, "seed"])
        for mine, other in pairs._of_pipelines(table)
    }


def test_the_pipeline_is_held_against_orders_and_every_rival(rows):
    def add(method, size, seed=1, technique="pipeline", control="", **settings):
        about = {"technique": technique, "run": "06_pipeline", "images": settings.pop("images", 8)}
        rows.add(method, size=size, seed=seed, control=control, **about, **settings)

    three, four = '{"bits":3,"macs":6}', '{"bits":4,"macs":6}'
    for seed in (1, 2):
        add("pipeline", 80, seed, bits=3, macs=6)
        add("pipeline", 100, seed, bits=4, macs=6)
        add("small_dense", 99, seed, "baseline", "small_dense", macs=8)
    add("small_dense", 79, 1, "baseline", "small_dense_qat4", macs=8, bits=4)  # smaller than any of ours
    add("pipeline", 400, 1, stages=["prune"], macs=8)  # another budget
    add("pipeline", 500, 3, stages=["prune", "quantize"], macs=6, bits=4)  # no such seed of ours
    add("pipeline", 70, 2, stages=["quantize", "prune", "distill"], macs=6, bits=3)
    add("xz", 120, 1, "peer", of={"method": "pipeline", "bits": 4, "macs": 6})
    add(
        "zstd", 120, 1, "peer", of={"method": "pipeline", "bits": 4, "macs": 6}, images=15
    )  # another training
    add("pipeline", 10, 1, control="after_prune", bits=4, macs=6)
    expected = {(three, "small_dense", 1), (three, "small_dense", 2), (four, "xz", 1), (three, "pipeline", 2)}
    assert of_pipelines(rows) == expected
    add("pipeline", 90, ensemble=True, bits=4, macs=6)  # of another teacher, so not to be compared
    add("nncodec_pruned", 95, technique="peer", macs=6, qp=-9)  # distilled from one network
    add("pipeline", 400, stages=["prune"], macs=6)  # has no teacher
    both = {four, '{"bits":4,"ensemble":true,"macs":6}'}
    more = {(three, "nncodec_pruned", 1), (three, "pipeline", 1), *((one, "pipeline", 1) for one in both)}
    few = {
        (settings, method, seed) for settings, method, seed in of_pipelines(rows) if method != "small_dense"
    }
    assert few == {pair for pair in expected if pair[1] != "small_dense"} | more


def test_a_students_pipeline_stands_where_nothing_is_pruned():
    def summary(*stages):
        named = {"method": "pipeline", "control": "", "headline": 1, "size_ratio": 9.0}
        budgets = {"macs": 16, "lambda_": 1e-9}
        settings = [json.dumps(budgets | ({"stages": own} if own else {})) for own in stages]
        return pd.DataFrame([named | {"settings": own} for own in settings])

    student = ["narrow", "distill", "quantize"]
    assert json.loads(pairs.the_pipeline(summary(student))["settings"])["stages"] == student
    assert "stages" not in pairs.the_pipeline(summary(student, None))["settings"]
    assert pairs.the_pipeline(summary(["quantize", "prune", "distill"])) is None


def test_rivals_of_any_size_are_told_of_the_same_seeds(rows):
    for seed in (1, 2):
        rows.add("pipeline", 10, technique="pipeline", seed=seed, run="06_pipeline", bits=4, macs=6)
    narrow = {"technique": "baseline", "control": "small_dense", "run": "06_pipeline"}
    rows.add("small_dense", 60, size=90, macs=8, **narrow)
    rows.add("small_dense", 0, macs=16, images=1, **narrow)  # another training
    rows.add("gzip", 10, technique="peer", run="06_pipeline", of={"method": "pipeline", "bits": 4, "macs": 6})
    rows.add("nncodec_pruned", 0, technique="peer", run="06_pipeline", macs=6, qp=-9, ensemble=True)
    first = rows.frame.iloc[0]
    found = pairs.rivals(rows.frame, first, rows.folder)
    assert [(p.theirs["method"], p.verdict, p.seeds) for p in found] == [
        ("small_dense", "beats, in a larger file", 1),
        ("nncodec_pruned", "below", 1),
    ]
    assert [pairs.another_teacher(p.ours, p.theirs) for p in found] == [False, True]


def test_a_winner_is_held_against_the_network_by_hand(rows):
    def add(method, seed, control="", run="05_architecture_search", **settings):
        rows.add(method, technique="search", seed=seed, control=control, run=run, macs=16, **settings)

    for seed in (1, 2):
        add("gradient", seed)
        add("gradient", seed, distill=True)
        add("narrow_resnet18", seed, "narrow_resnet18")
    add("narrow_resnet18", 2, "narrow_resnet18", distill=True)
    add("torch_pruning_nncf", 1, run="06_pipeline")
    assert told(rows) == [
        ('gradient {"distill":true,"macs":16}', 'narrow_resnet18 {"distill":true,"macs":16}', 1, "not below"),
        ('gradient {"macs":16}', 'narrow_resnet18 {"macs":16}', 2, "not below"),
    ]
