"""Who is held against whom, and what the pictures say."""

import numpy as np
import pandas as pd

from nnc_utils import paired, results, rows, tables


def test_methods_are_compared_at_the_same_setting_or_in_no_more_bytes(tmp_path):
    labels = np.arange(1000) % 10
    np.save(tmp_path / tables.labels_name("digits"), labels.astype(np.uint8))

    def row(method, point, size, wrong, control=""):
        sha256 = f"{len(made):064x}"[::-1]
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "artifact_bytes": size, "artifact_sha256": sha256})
        made[-1] |= {"seed": 1, "control": control or np.nan, "technique": "quantization", "train_images": 0}

    made = []
    row("kmeans", "bits=2", 100, 300)
    row("hessian_kmeans", "bits=2", 101, 200)
    row("hessian_kmeans", "bits=3", 150, 100)  # no counterpart
    row("uniform_per_channel", "bits=3 bn", 150, 100)
    row("uniform_per_channel", "bits=3", 150, 100)  # another setting
    row("mixed_precision", "budget=3bit bn", 149, 100)
    row("uniform_per_channel", "levels=5 bn", 100, 300)
    row("mixed_precision", "budget=5level bn", 99, 200)
    row("mixed_precision", "rule=hand", 400, 10, "hand_rule")  # has no budget
    row("magnitude_global", "sparsity=0.9 bn", 200, 100)
    for score in ("taylor", "obd_fisher", "obd_hessian", "obs_block"):
        row(score, "sparsity=0.9 bn", 199, 200)
    row("taylor", "sparsity=0.8 bn", 300, 0)  # no counterpart
    row("nncodec", "qp=-30", 120, 50)
    row("hessian_rounding", "rate=1e-9", 90, 400)
    row("hessian_rounding", "rate=1e-10", 119, 60)
    row("hessian_rounding", "rate=1e-11", 121, 0)  # larger than NNCodec's
    row("hessian_rounding", "rate=1e-10 one_sided", 120, 80, "one_sided")  # not ours to compare with NNCodec
    found = results.comparisons(pd.DataFrame(made), tmp_path, dataset="digits")
    assert found[["ours", "theirs", "verdict"]].values.tolist() == [
        ["hessian_kmeans bits=2", "kmeans bits=2", "beats"],
        ["mixed_precision budget=3bit bn", "uniform_per_channel bits=3 bn", "equal"],
        ["mixed_precision budget=5level bn", "uniform_per_channel levels=5 bn", "beats"],
        *(
            [f"{score} sparsity=0.9 bn", "magnitude_global sparsity=0.9 bn", "below"]
            for score in ("taylor", "obd_fisher", "obd_hessian", "obs_block")
        ),
        ["hessian_rounding rate=1e-10", "nncodec qp=-30", "below"],
        ["hessian_rounding rate=1e-10", "hessian_rounding rate=1e-10 one_sided", "beats"],
    ]
    assert found["points"][0].startswith("+10.00 [")
    # by hand: d is 1 for 100 of 1000 pictures
    half = 1.96 * np.sqrt(0.1 * 0.9 * 1000 / 999) / np.sqrt(1000) * 100
    assert found["points"][0] == f"+10.00 [{10 - half:+.2f}, {10 + half:+.2f}]"


def test_fisher_channels_meet_each_network_of_equal_macs_and_training(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    np.save(tmp_path / tables.labels_name("digits"), labels)
    made = []

    def add(method, point, wrong, control="", *, images=200, seed=1, run="03_pruning", technique="pruning"):
        sha256 = f"{len(made) + 1:016x}" + "0" * 48
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "control": control, "technique": technique})
        made[-1] |= {"artifact_bytes": 100, "artifact_sha256": sha256, "train_images": images, "seed": seed}
        made[-1] |= {"run": f"quick/{run}/seed={seed}"}

    add("channels_fisher", "macs=4x mended tuned", 50)
    add("channels_fisher", "macs=4x tuned", 90)
    add("channels_fisher", "macs=4x mended tuned int8", 55)
    add("channels_fisher", "macs=4x mended iterative tuned", 65)
    add("channels_fisher", "macs=4x mended taught", 0)
    add("channels_fisher", "macs=4x mended", 20, images=0)  # not trained on: nothing to compare with
    add("channels_fisher", "macs=8x mended tuned", 90)
    add("channels_fisher", "macs=4x mended tuned", 0, "attempt")
    add("channels_l2", "macs=4x mended tuned", 10)  # not what was fixed before
    add("torch_pruning_taylor", "macs=4x even tuned", 80)
    add("torch_pruning_taylor", "macs=8x even tuned", 10)
    add("torch_pruning_bn_scale", "macs=4x even tuned", 80, images=300)  # of another budget
    add("torch_pruning_bn_scale", "macs=4x even tuned", 80, "attempt")
    add("channels_random", "macs=4x mended tuned", 70, "random")
    add("channels_random", "macs=8x mended tuned", 70, "random", images=300)  # of another budget
    add("from_scratch", "macs=4x", 30, "from_scratch", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=4x", 60, "small_dense", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=4x int8", 60, "small_dense", images=1200, run="03_pruning/controls")
    add("small_dense", "macs=8x", 60, "small_dense", run="06_pipeline")  # its first training is not counted
    add("torch_pruning_taylor", "macs=4x even tuned", 0, seed=2)  # a seed without ours
    seed_1 = {"images": 1000, "technique": "baseline", "run": "01_baseline"}
    mended, plain = "channels_fisher macs=4x mended tuned", "channels_fisher macs=4x tuned"
    taught, eighth = "channels_fisher macs=4x mended taught", "channels_fisher macs=8x mended tuned"
    step_by_step = "channels_fisher macs=4x mended iterative tuned"
    cut = {
        (mended, "torch_pruning_taylor macs=4x even tuned", "beats"),
        (mended, "channels_random macs=4x mended tuned", "beats"),
        (plain, "torch_pruning_taylor macs=4x even tuned", "below"),
        (eighth, "torch_pruning_taylor macs=8x even tuned", "below"),
    }
    never_cut = {
        (mended, "from_scratch macs=4x", "below"),
        (mended, "small_dense macs=4x", "beats"),
        (f"{mended} int8", "small_dense macs=4x int8", "beats"),
        (plain, "from_scratch macs=4x", "below"),
        (plain, "small_dense macs=4x", "below"),
        (taught, "from_scratch macs=4x", "beats"),
        (taught, "small_dense macs=4x", "beats"),
        (step_by_step, "from_scratch macs=4x", "below"),
        (step_by_step, "small_dense macs=4x", "below"),
    }

    def told():
        found = results.comparisons(pd.DataFrame(made), tmp_path, dataset="digits")
        assert (found["seeds"] == 1).all()
        return {tuple(pair) for pair in found[["ours", "theirs", "verdict"]].values.tolist()}

    assert told() == cut  # how long the baseline was trained is not known
    add("train", "", 0, **seed_1 | {"images": 999})
    assert told() == cut
    made.pop()
    add("dense_finetuned", "", 0, "dense_finetuned", **seed_1)  # not the baseline
    assert told() == cut
    add("train", "", 0, **seed_1)
    assert told() == cut | never_cut
    made.pop()
    for row in made:  # of one run: its notebook sees to it
        row["run"] = row["run"].replace("/controls", "")
    assert told() == cut | never_cut


def test_taught_students_meet_those_alone_over_all_seeds(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    np.save(tmp_path / tables.labels_name("digits"), labels)
    made = []

    def row(method, point, wrong, *, seed, control="", images=100, technique="distillation"):
        sha256 = f"{len(made) + 1:016x}" + "0" * 48
        predictions = labels.copy()
        predictions[:wrong] = (predictions[:wrong] + 1) % 10
        np.save(tmp_path / rows.evidence(sha256), predictions.astype(np.uint8))
        made.append({"method": method, "point": point, "artifact_bytes": 100 + seed, "control": control})
        made[-1] |= {"artifact_sha256": sha256, "seed": seed, "train_images": images, "technique": technique}

    for seed in (1, 2):
        row("train", "", 20, seed=seed, technique="baseline", images=900)
        row("student_alone", "width=0.25", 60, seed=seed, control="student_alone")
        row("student_longer", "width=0.25,times=2", 50, seed=seed, control="student_longer", images=200)
        row("kd", "width=0.25,T=4,alpha=0.9", 50 if seed == 1 else 30, seed=seed)
        row("kd", "width=0.25,T=4,alpha=0.9,cached", 60 if seed == 1 else 30, seed=seed)
        row("kd", "width=0.25,T=4,alpha=0.9,shuffled", 90, seed=seed, control="shuffled_teacher")
        row("self", "width=0.25,T=4,alpha=0.9", 40, seed=seed, images=200)
        row("kd", "width=0.5,T=4,alpha=0.9", 10, seed=seed)  # nobody of its width is alone
        row("student_alone", "width=0.125", 20, seed=seed, control="student_alone")
        row("dkd", "width=0.125,T=4,alpha=0.5,others=8", 10, seed=seed)
    compression = pd.DataFrame(made)
    found = results.comparisons(compression, tmp_path, dataset="digits")
    assert sorted(found[["ours", "theirs", "seeds", "verdict"]].values.tolist()) == [
        ["dkd width=0.125,T=4,alpha=0.5,others=8", "student_alone width=0.125", 2, "beats"],
        ["kd width=0.25,T=4,alpha=0.9", "student_alone width=0.25", 2, "beats"],
        ["kd width=0.25,T=4,alpha=0.9,cached", "kd width=0.25,T=4,alpha=0.9", 2, "below"],
        ["kd width=0.25,T=4,alpha=0.9,cached", "student_alone width=0.25", 2, "beats"],
        ["kd width=0.25,T=4,alpha=0.9,shuffled", "student_alone width=0.25", 2, "below"],
        ["self width=0.25,T=4,alpha=0.9", "student_longer width=0.25,times=2", 2, "beats"],
    ]
    # d is the mean over the seeds: 1 for 10 pictures, 1/2 for 20 of 1000
    difference = np.repeat([1.0, 0.5, 0.0], [10, 20, 970])
    half = 100 * 1.96 * difference.std(ddof=1) / np.sqrt(1000)
    by_name = found.set_index("ours")
    assert by_name["points"]["kd width=0.25,T=4,alpha=0.9"] == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    assert by_name["bytes"]["kd width=0.25,T=4,alpha=0.9"] == 102  # (101 + 102) / 2, rounded to even
    closed = results.gaps(compression, tmp_path, dataset="digits").set_index("student")["closed"].to_dict()
    assert closed == {
        "kd width=0.25,T=4,alpha=0.9,cached": "38 %",  # 1.5 points of 4
        "kd width=0.25,T=4,alpha=0.9": "50 %",  # 2 points of 4; the shuffled teacher is not asked
        "dkd width=0.125,T=4,alpha=0.5,others=8": "no gap",
    }


def test_the_pipeline_is_held_against_orders_and_every_rival():
    def row(method, point, nbytes, seed=1, technique="pipeline", control=""):
        about = {"technique": technique, "method": method, "point": point, "control": control}
        about |= {"artifact_bytes": nbytes, "seed": seed, "run": f"quick/06_pipeline/seed={seed}"}
        return about | {"train_images": 8}

    ours = [row(tables.PIPELINE, "bits=3", 80, s) for s in (1, 2)]
    ours += [row(tables.PIPELINE, "bits=4", 100, s) for s in (1, 2)]
    rivals = [row("small_dense", "", 99, s, "baseline", "small_dense") for s in (1, 2)]
    rivals += [row("small_dense_qat4", "", 79, 1, "baseline", "small_dense_qat4")]  # smaller than any of ours
    rivals += [
        row("prune_only", "macs=6x", 400, 1),
        row("prune_only", "bits=3,macs=6x", 90, 1),
    ]  # other budgets
    rivals += [row("xz", "bits=4", 120, 1, "peer"), row("prune_only", "bits=4", 500, 3)]  # no such seed
    rivals += [row("quantize_prune_distill", "bits=3", 70, 2)]  # another order: the same budgets
    rivals += [row("zstd", "bits=4", 120, 1, "peer") | {"train_images": 15}]  # another training
    stages = [row(tables.PIPELINE, "bits=4", 10, 1, control="after_prune")]
    pairs = paired._against_pipeline(pd.DataFrame(ours + rivals + stages))
    found = {(mine["point"], other["method"], other["seed"]) for mine, other in pairs}
    assert found == {
        ("bits=3", "small_dense", 1),
        ("bits=3", "small_dense", 2),
        ("bits=4", "xz", 1),
        ("bits=3", "quantize_prune_distill", 2),
        ("bits=3", "small_dense_qat4", 1),
    }
    ours = [row(tables.PIPELINE, "macs=6x,bits=4", 100)]  # an order that has one of its budgets
    [(mine, other)] = paired._against_pipeline(pd.DataFrame(ours + [row("prune_only", "macs=6x", 400)]))
    assert (mine["point"], other["point"]) == ("macs=6x,bits=4", "macs=6x")
    ours += [row(tables.PIPELINE, "macs=6x,bits=4,ensemble", 90)]  # of another teacher, so not to be compared
    others = [row("quantize_prune_distill", "macs=6x,bits=4", 95), row("prune_only", "macs=6x", 400)]
    pairs = paired._against_pipeline(pd.DataFrame(ours + others))
    assert [(mine["point"], other["method"]) for mine, other in pairs] == [
        ("macs=6x,bits=4", "quantize_prune_distill"),
        ("macs=6x,bits=4,ensemble", "prune_only"),
        ("macs=6x,bits=4", "prune_only"),
    ]
    others = [row("nncodec_pruned", "macs=6x,qp=-9", 95, technique="peer")]  # taught by one network
    others += [row("gzip", "macs=6x,bits=4,ensemble", 120, technique="peer")]  # of those codes
    pairs = paired._against_pipeline(pd.DataFrame(ours + others))
    assert {(mine["point"], other["method"]) for mine, other in pairs} == {
        ("macs=6x,bits=4", "nncodec_pruned"),
        ("macs=6x,bits=4,ensemble", "gzip"),
    }
    assert paired._against_pipeline(pd.DataFrame(rivals)) == []


def test_a_winner_is_held_against_the_network_by_hand():
    def row(method, point, seed, control="", notebook="05_architecture_search"):
        about = {"run": f"quick/{notebook}/seed={seed}", "method": method, "point": point, "seed": seed}
        return about | {"control": control}

    made = [row("gradient", f"macs=16x{taught}", seed) for taught in ("", " taught") for seed in (1, 2)]
    made += [row("thin_resnet18", "macs=16x", seed, "thin_resnet18") for seed in (1, 2)]
    made += [row("thin_resnet18", "macs=16x taught", 2, "thin_resnet18")]
    made += [row("torch_pruning", "macs=16x", 1, notebook="06_pipeline")]
    pairs = paired._against_thin(pd.DataFrame(made))
    found = [
        (mine["method"], mine["point"], mine["seed"], other["point"], other["seed"]) for mine, other in pairs
    ]
    assert found == [
        ("gradient", "macs=16x", 1, "macs=16x", 1),
        ("gradient", "macs=16x", 2, "macs=16x", 2),
        ("gradient", "macs=16x taught", 2, "macs=16x taught", 2),
    ]
