"""The real notebooks with other parameters than their defaults: by papermill, or cell by cell here."""

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
import torch
import torchvision
from IPython.display import display
from PIL import Image

from nnc_utils import artifact, models, notebook, parameters, peers, provenance

NOTEBOOKS = provenance.PACKAGE.parent / "notebooks"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of small colour pictures: more red at the top, or more blue."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("own")
    for name, channel in (("red", 0), ("blue", 2)):
        folder = root / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(60):
            image = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            image[:10, :, channel] += 100
            Image.fromarray(image).save(folder / f"{number}.png")
    return root / "pictures"


def by_papermill(name, folder, **given):
    folder.mkdir()
    papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        folder / "executed.ipynb",
        {**given, "run_dir": str(folder)},
        kernel_name="python3",
        cwd=NOTEBOOKS,
        progress_bar=False,
    )
    return json.loads((folder / "result.json").read_text())


def execute(name, folder, until="run.finish(", **given):
    """The same cell by cell in this process, as far as one that holds this text: the names that it leaves."""
    folder.mkdir(exist_ok=True)
    path = NOTEBOOKS / f"{name}.ipynb"
    namespace = {name: found.default for name, found in parameters.declared(path).items()}
    namespace |= given | {"run_dir": str(folder), "display": display}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            exec(cell.source, namespace)
            plt.close("all")
            if until in cell.source:
                return namespace
    raise AssertionError(f"{name} has no cell with {until}")


def result(name, folder, **given):
    """What a run leaves behind, without the start of a kernel."""
    execute(name, folder, **given)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def baseline(pictures):
    """A run of 01_baseline on them, which the other notebooks build on."""
    about = {"dataset": f"imagefolder:{pictures}", "size": 16, "width": 0.125}
    about |= {"epochs": 3, "batch_size": 16, "learning_rate": 0.02}
    by_papermill("01_baseline", pictures.parent / "run", **about)
    return pictures.parent / "run"


def test_your_own_pictures_through_training_and_quantization(baseline, tmp_path):
    folder, baseline = baseline, json.loads((baseline / "result.json").read_text())
    [row] = baseline["compression"]
    assert row["total"] == 24 and row["accuracy"] > 80  # a fifth of 120; red from blue
    assert (baseline["parameters"]["width"], baseline["parameters"]["size"]) == (0.125, 16)
    assert not list(folder.glob("checkpoint*"))

    quantized = result(
        "02_quantization",
        tmp_path / "quantized",
        upstream=[str(folder)],
        points=["uniform_per_channel:bits=8", "uniform_per_tensor:bits=4", "hessian_rounding:rate=1e-6 bn"],
        calibration_images=32,
        repair_images=32,
    )
    rows = quantized["compression"]
    assert [(r["method"], r["point"]) for r in rows] == [
        ("uniform_per_channel", "bits=8"),
        ("uniform_per_tensor", "bits=4"),
        ("hessian_rounding", "rate=1e-6 bn"),
    ]
    assert all(r["reference_sha256"] == row["artifact_sha256"] for r in rows)
    assert rows[1]["size_ratio"] > rows[0]["size_ratio"] > 2


def test_the_usual_recipe_on_your_own_pictures(baseline, tmp_path):
    settings = {"teacher_epochs": 0.2, "epochs": 0.5, "batch_size": 16, "seconds": 0.2, "width": 0.0625}
    made = result("00_the_usual_recipe", tmp_path / "usual", upstream=[str(baseline)], **settings)
    found = {(line["step"], line["figure"]): line for line in made["extra"]["table"]}
    assert not made["compression"]  # it claims nothing
    assert found["1 · int8", "times smaller"]["claimed"] == "4×"
    for step in ("2 · pruned", "3 · distilled"):  # a mask, and a new network in fp32
        assert 0.95 < float(found[step, "times smaller"]["as published"].rstrip("×")) < 1.05
        assert float(found[step, "times smaller"]["done right"].rstrip("×")) > 3
    says = {failure["tried"]: failure["says"] for failure in made["extra"]["failures"]}
    assert "backend must be one of" in says["get_default_qconfig('qint8')"]
    assert "'Sequential' object has no attribute 'weight'" in says["ln_structured(model.layer1, ...)"]
    assert "'aten::add.out'" in says["the same between two stubs"]
    assert says["convert(model)"] == "no error"


def test_every_way_to_cut(baseline, tmp_path):
    points = [
        "magnitude_global:sparsity=0.5 gradual tuned",
        "random_global:sparsity=0.5 tuned",
        "magnitude_global:sparsity=0.9999",  # empties a layer: no row, and no reason to stop
        "taylor:sparsity=0.2 bn",
        "obd_hessian:sparsity=0.2 tuned bn",
        "obs_block:sparsity=0.5 bn",
        "magnitude_layerwise:rates=hand bn",
        "magnitude_layerwise:sparsity=0.5 scanned bn",
        "nm_2_4:keep=2of4 tuned",
        "channels_fisher:macs=2x mended iterative tuned",
        "channels_l1:macs=2x even tuned int8",
        "channels_l2:macs=2x mended taught",
        "blocks:removed=1",
    ]
    controls = ["from_scratch:macs=2x", "small_dense:macs=2x int8", "magnitude_global:sparsity=0.4 tuned"]
    settings = {"train_epochs": 1.0, "steps": 2, "multiple": 1, "scoring_images": 48}
    upstream = [str(baseline), str(tmp_path / "cuts")]
    made = result("03_pruning", tmp_path / "cuts", upstream=upstream[:1], points=points, **settings)
    about = {"upstream": upstream, "points": controls, "part": "controls"}
    rest = result("03_pruning", tmp_path / "controls", **about, **settings)
    rows = {f"{row['method']}:{row['point']}": row for row in made["compression"] + rest["compression"]}
    assert list(made["extra"]["missing"]) == ["magnitude_global:sparsity=0.9999"]
    expected = {p for point in points + controls for p in (point, point.replace(" int8", ""))}
    assert set(rows) == expected - {"magnitude_global:sparsity=0.9999"} | {"dense_finetuned:"}
    assert rest["run"] == "smoke/03_pruning/seed=1,controls"
    assert "dense_finetuned" not in {row["method"] for row in rest["compression"]}  # that of the first part
    dense = rows["dense_finetuned:"]
    weights = dense["nonzeros"]
    assert dense["train_images"] == 5 * 16  # one epoch of whole batches
    for name, row in rows.items():
        tuned, narrow = "tuned" in name or "taught" in name, row["macs"] < dense["macs"]
        assert row["division"] == ("open" if tuned or narrow else "closed"), name
        assert narrow == ("macs=" in name or "blocks" in name), name
        if "macs=2x" in name:
            assert 0.25 * dense["macs"] < row["macs"] <= dense["macs"] / 2, name
        if tuned:
            whole = "iterative" not in name and "gradual" not in name  # half an epoch ends with a batch
            assert row["train_images"] == (dense["train_images"] if whole else 4 * 16), name
        if "sparsity=0.5" in name and "scanned" not in name:
            assert 0.4 < row["nonzeros"] / weights < 0.6, name
    assert rows["from_scratch:macs=2x"]["train_images"] == 4 * 5 * 16  # the baseline's three epochs, too
    controls = {name: row["control"] for name, row in rows.items() if row["control"]}
    assert controls == {
        "dense_finetuned:": "dense_finetuned",
        "random_global:sparsity=0.5 tuned": "random",
        "from_scratch:macs=2x": "from_scratch",
        "small_dense:macs=2x": "small_dense",
        "small_dense:macs=2x int8": "small_dense",
    }
    references = {row["reference_sha256"] for row in rows.values() if row["division"] == "open"}
    assert references <= {dense["reference_sha256"], dense["artifact_sha256"]}
    with pytest.raises(ValueError, match="parts share it"):
        execute("03_pruning", tmp_path / "other", **about, **settings | {"train_epochs": 2.0})


def test_every_way_to_teach(pictures, tmp_path):
    about = {"dataset": f"imagefolder:{pictures}", "size": 16, "width": 0.25}
    for seed in (1, 2):
        execute("01_baseline", tmp_path / f"baseline{seed}", **about, epochs=2, batch_size=16, seed=seed)
    methods = (
        "kd",
        "dkd",
        "hints",
        "similarity",
        "attention",
        "kd_attention",
        "kd_hints",
        "self",
        "ensemble",
    )
    points = [f"{method}:width=0.125" for method in methods] + ["kd:width=0.125,T=2,alpha=1,cached"]
    controls = [f"{name}:width=0.125" for name in ("student_alone", "label_smoothing", "student_longer")]
    controls += ["kd:width=0.125,cached,shuffled", "dense_finetuned", "resnet50:epochs=0.5"]
    settings = {"epochs": 1.0, "copies": 2, "controls": controls}
    upstream = [str(tmp_path / f"baseline{seed}") for seed in (1, 2)]
    made = result("04_distillation", tmp_path / "taught", upstream=upstream, points=points, **settings)
    rows = {(row["method"], row["control"], "cached" in row["point"]): row for row in made["compression"]}
    assert set(rows) == {
        *((method, "", False) for method in methods),
        ("kd", "", True),
        ("kd", "shuffled_teacher", True),
        *((name, name, False) for name in ("student_alone", "label_smoothing", "student_longer")),
        ("dense_finetuned", "dense_finetuned", False),
        ("resnet50", "teacher", False),
    }
    larger = rows.pop(("resnet50", "teacher", False))
    assert larger["model"] == "resnet50" and larger["train_images"] == 2 * 16  # half an epoch of 5 steps
    assert rows["kd", "", True]["point"] == "width=0.125,T=2,alpha=1,cached"  # all settings, in one order
    assert rows["dkd", "", False]["point"] == "width=0.125,T=4,alpha=0.5,others=8"
    assert len({row["artifact_sha256"] for row in rows.values()}) == len(rows)  # each learns something else
    alone = rows["student_alone", "student_alone", False]
    seconds = {key: row["train_seconds"] for key, row in rows.items()}
    for (method, control, _), row in rows.items():
        longer = 2 if method in ("student_longer", "self") else 1  # what taught `self` counts, too
        assert row["train_images"] == longer * alone["train_images"], (method, control)
        assert (row["division"], row["technique"]) == ("open", "distillation")
        if method != "dense_finetuned":
            assert (row["params"], row["macs"]) == (alone["params"], alone["macs"])
    assert seconds["self", "", False] > seconds["student_alone", "student_alone", False]
    # the best on validation of those with an equal budget is claimed
    found = {(v["method"], v["control"], "cached" in v["point"]): v for v in made["extra"]["validation"]}
    [claimed] = [key for key, row in rows.items() if row["headline"]]
    able = [
        key
        for key, row in rows.items()
        if not row["control"] and row["train_images"] == alone["train_images"]
    ]
    assert found[claimed]["validation accuracy"] == max(found[key]["validation accuracy"] for key in able)
    assert claimed in able and ("self", "", False) not in able
    dense = rows["dense_finetuned", "dense_finetuned", False]
    assert {row["reference_sha256"] for row in rows.values()} <= {
        dense["reference_sha256"],
        dense["artifact_sha256"],
    }
    # another seed takes the larger teacher, and what it said, from the part that has it
    points = ["kd:width=0.125,resnet50,cached", "kd_hints:width=0.125,resnet50"]
    about = {"points": points, "controls": ["student_alone:width=0.125"]}
    folders = [upstream[1], str(tmp_path / "taught")]
    first = result("04_distillation", tmp_path / "first", upstream=folders, part="kd", **settings | about)
    taught = [row for row in first["compression"] if row["control"] == ""]
    assert {row["method"] for row in taught} == {"kd", "kd_hints"}
    assert all(row["train_seconds"] > larger["train_seconds"] for row in taught)
    [cached] = [row for row in taught if "cached" in row["point"]]
    cost = first["extra"]["spent"][f"kd:{cached['point']}"]
    assert cost["teacher"] == larger["train_seconds"] and min(cost["looks"], cost["steps"]) > 0
    assert cached["train_seconds"] == pytest.approx(sum(cost.values()), abs=0.02)
    [own] = json.loads((tmp_path / "baseline2/result.json").read_text())["compression"]
    [reference] = {row["reference_sha256"] for row in first["compression"]}  # the better on validation
    assert reference in (own["artifact_sha256"], dense["artifact_sha256"])
    about |= {"points": ["kd:width=0.0625,resnet50,cached"], "controls": [], "claim": False}
    folders.append(str(tmp_path / "first"))
    again = result("04_distillation", tmp_path / "again", upstream=folders, part="thin", **settings | about)
    assert not any(row["headline"] for row in again["compression"])
    assert not list((tmp_path / "again").glob("remembered*"))  # what it needs lies there already
    # another network teaches in the baseline's place, whose file is elsewhere
    (tmp_path / "baseline1/artifacts/fp32.safetensors").unlink()
    about = {
        "points": ["kd:width=0.0625,cached", "self:width=0.0625"],
        "teaches": "kd_width0.125_T4_alpha0.9",
    }
    about |= {"controls": ["student_alone:width=0.0625"], "upstream": [upstream[0], str(tmp_path / "taught")]}
    other = result("04_distillation", tmp_path / "other", part="other", **settings | about)
    taught = {row["method"]: row for row in other["compression"]}
    teacher = rows["kd", "", False]
    assert taught["kd"]["point"] == "width=0.0625,T=4,alpha=0.9,cached,compressed"
    assert taught["self"]["point"] == "width=0.0625,T=4,alpha=0.9"
    assert taught["kd"]["train_seconds"] > teacher["train_seconds"]  # which counts
    assert {row["reference_sha256"] for row in other["compression"]} == {teacher["reference_sha256"]}
    sizes = {row["artifact_bytes"] * row["size_ratio"] / teacher["artifact_bytes"] for row in taught.values()}
    assert max(sizes) == pytest.approx(teacher["size_ratio"], rel=1e-3) == min(sizes)
    about |= {"points": ["ensemble:width=0.0625,cached"]}
    with pytest.raises(ValueError, match="kd_width0.125_T4_alpha0.9 of other seeds"):
        execute("04_distillation", tmp_path / "one", **settings | about)
    about |= {"teaches": "kd", "points": []}
    with pytest.raises(ValueError, match="no upstream run has an artifact 'kd'"):
        execute("04_distillation", tmp_path / "none", **settings | about)


def test_every_pipeline(baseline, tmp_path):
    orders = ["prune_distill_quantize", "prune_quantize_distill", "quantize_prune_distill"]
    points = [
        "prune_distill_quantize:macs=3x,rate=1e-6",
        "prune_quantize_distill:macs=2x,size=10x,sparsity=0.3",
    ]
    points += [
        "prune_distill_quantize:macs=2x,rate=1e-6,sparsity=0.3",
        "prune_distill_quantize:macs=3x,rate=1e-4",
    ]
    points += [f"{order}:macs=3x,bits=4" for order in [*orders, "distill_prune_quantize"]]
    points += [f"{order}:macs=3x,rate=1e-6" for order in orders[1:]]
    points += ["prune_distill:macs=3x", "prune_only:macs=3x", "quantize_only:bits=3", "distill_only:macs=3x"]
    points += ["prune_only:ms=1000"]  # which the whole network takes, too
    controls = [
        "small_dense:macs=3x",
        "small_dense:macs=3x,rate=1e-6",
        "small_dense_qat4:macs=3x",
        "small_dense_distilled:macs=3x,bits=4",
    ]
    controls += ["torch_pruning:macs=3x", "torch_pruning:macs=9999x"]  # the last: no row, no reason to stop
    about = {"prune_epochs": 0.4, "quantize_epochs": 0.4, "distill_epochs": 0.8, "scoring_images": 48}
    about |= {"multiple": 1, "batch_size": 16}
    made = result(
        "06_pipeline", tmp_path / "all", upstream=[str(baseline)], points=points, controls=controls, **about
    )
    rows = {
        f"{row['method']}:{row['point']}": row for row in made["compression"] if "after" not in row["control"]
    }
    missing = made["extra"]["missing"]
    if not peers.available("torch_pruning"):
        assert {row["technique"] for row in rows.values()} == {"pipeline", "baseline", "peer"}
        assert len(missing) == 1
    else:
        controls.remove("torch_pruning:macs=3x")
        assert len(missing) == 2
    assert all(key.startswith("torch") and "Torch-Pruning" in why for key, why in missing.items())
    assert set(rows) == {*points, *controls[:-1], "dense_finetuned:"}
    start = json.loads((baseline / "result.json").read_text())["compression"][0]
    for name, row in rows.items():
        assert row["train_images"] == 8 * 16, name  # everyone the same, however many stages
        fewer = 3 if "macs=3x" in name else 2 if "macs=2x" in name else 1
        assert row["macs"] <= start["macs"] / fewer and row["macs"] > 0.4 * start["macs"] / fewer, name
        assert row["division"] == "open", name
    first, taught = rows[points[0]], rows["prune_distill:macs=3x"]
    assert first["artifact_bytes"] < taught["artifact_bytes"] < start["artifact_bytes"]
    for name in points[1:3]:  # masks stay through roundings of both kinds
        assert rows[name]["nonzeros"] < 0.75 * rows[name]["params"], name
    dear = rows["prune_distill_quantize:macs=3x,rate=1e-4"]
    assert dear["artifact_bytes"] < first["artifact_bytes"]  # the dearer a bit, the fewer
    thin, priced = rows["small_dense:macs=3x"], rows["small_dense:macs=3x,rate=1e-6"]
    assert priced["artifact_bytes"] < thin["artifact_bytes"]
    for one, other in ((first, taught), (first, dear), (thin, priced)):  # made of the same trained network
        assert one["train_seconds"] == other["train_seconds"]
    behind = rows["prune_quantize_distill:macs=3x,rate=1e-6"]  # at the same price, whatever was trained when
    assert 0.8 < behind["artifact_bytes"] / first["artifact_bytes"] < 1.25
    assert not first["simulated"] and not behind["simulated"]
    stages = [row["control"] for row in made["compression"] if "after" in row["control"]]
    assert stages == ["after_prune", "after_distill"]
    if first["reference_sha256"] == start["artifact_sha256"]:  # settled: that file need not be here
        (tmp_path / "all/artifacts/dense_finetuned.safetensors").unlink()
    rest = {"upstream": [str(baseline), str(tmp_path / "all")], "part": "peers", "points": [], "controls": []}
    others = ["xz:macs=3x,rate=1e-4", "zstd:macs=8x,bits=4", "nncodec_pruned:macs=3x,qp=-24"]
    made = result("06_pipeline", tmp_path / "peers", **rest, **about, peers=others)
    row, *coded = made["compression"]
    assert (row["method"], row["train_seconds"]) == ("xz", dear["train_seconds"])
    assert row["correct"] == dear["correct"]
    assert list(made["extra"]["missing"]) == others[1 : 3 - len(coded)]
    assert len(coded) == (not peers.available("nncodec"))
    record = json.loads((tmp_path / "all/result.json").read_text())
    for row in record["compression"]:
        row["reference_sha256"] = "0" * 64
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text(json.dumps(record))
    rest["upstream"].append(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="upstream has parts of several references"):
        execute("06_pipeline", tmp_path / "both", until="# before any work", **rest, **about)
    for row in coded:  # the taught network, as it was before any rounding
        assert row["train_seconds"] == taught["train_seconds"] and row["macs"] == taught["macs"]
        assert row["artifact_bytes"] < taught["artifact_bytes"] / 2


def until_trained(folder, baseline, **given):
    """What 06 knows before its first training."""
    about = {"upstream": [str(baseline)], "multiple": 1, "scoring_images": 48}
    return execute("06_pipeline", folder, until="# before any training", **about | given)


@pytest.fixture(scope="module")
def known(baseline, tmp_path_factory):
    """The same without milliseconds, and with times that no machine changes."""
    found = until_trained(tmp_path_factory.mktemp("known"), baseline)
    found["timings"] |= {
        f"{stage} in onnxruntime": ([1, 2, 8], [0.4, 0.2, 0.1]) for stage in ("prune", "thin")
    }
    return found


def test_milliseconds_become_a_ratio_of_macs(known):
    def fewer(point):
        method, values = known["parsed"](point)
        return float(known["budgets"](method, values)["macs"].removesuffix("x"))

    for method in ("prune_quantize_distill:bits=4,", "small_dense_qat4:", "distill_only:", "prune_only:"):
        assert fewer(f"{method}ms=0.2") == pytest.approx(2, abs=0.02)
        assert fewer(f"{method}ms=0.141421356") == pytest.approx(4, abs=0.02)  # the middle, in logarithms
        assert fewer(f"{method}ms=0.1") == pytest.approx(8, abs=0.02)
        assert fewer(f"{method}ms=3") == 1 and fewer(f"{method}macs=3x") == 3


def test_networks_are_timed_from_the_whole_to_the_narrowest(baseline, known, tmp_path, capsys):
    whole = models.macs(known["spec"])
    for stage in ("prune", "thin"):
        narrow = known["shrunk"](stage, 3.0).spec
        assert 0.5 * whole / 3 < models.macs(narrow) <= whole / 3
        assert models.macs(narrow) > models.macs(known["shrunk"](stage).spec)
        assert narrow.classes == 2 and len(narrow.stages) == 4
    made = until_trained(tmp_path / "timed", baseline, points=["prune_only:ms=1000"], controls=[])
    assert "prune_only:ms=1000: 1x fewer MACs, as timed in onnxruntime" in capsys.readouterr().out
    [(name, (fewer, took))] = made["timings"].items()
    assert name == "prune in onnxruntime" and fewer[0] == 1 and len(fewer) == len(took)
    assert fewer == sorted(fewer) and took == sorted(took, reverse=True) and took[-1] > 0
    assert fewer[-1] == pytest.approx(made["most"]("prune"))
    # who goes on has the same networks
    again = until_trained(tmp_path / "timed", baseline, points=["prune_only:ms=1000"], controls=[])
    assert again["timings"] == made["timings"]
    with pytest.raises(ValueError, match=r"ms=0.00001 cannot be met in onnxruntime: 0.\d+ is the nearest"):
        until_trained(tmp_path / "fast", baseline, points=["prune_only:ms=0.00001"])


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("prune_only:macs=9999x", r"macs=9999x cannot be met: ([\d.]+)x is the nearest.* a multiple of 1$"),
        ("small_dense:macs=99999x", r"macs=99999x cannot be met: ([\d.]+)x is the nearest$"),
        ("prune_quantize_distill:macs=2x,size=9999x", r"size=9999x cannot be met: ([\d.]+)x is the nearest"),
        ("quantize_only:size=99x", r"size=99x cannot be met: ([\d.]+)x is the nearest, with 2 bits"),
        ("quantize_prune_distill:macs=2x,size=99x", r"size=99x cannot be met: ([\d.]+)x is the nearest"),
        ("small_dense_distilled:macs=2x,size=999x", r"size=999x cannot be met: ([\d.]+)x is the nearest"),
        ("prune_only:ms=2,macs=6x", "needs macs or ms$"),
        ("quantize_only:ms=2,bits=4", "needs bits or size$"),
        ("quantize_only:rate=1e-9", "needs bits or size$"),  # nothing would be trained
        ("prune_distill_quantize:macs=6x,rate=0", "rate is '0', needed is the loss"),
        ("small_dense_qat4:macs=6x,rate=1e-9", "small_dense_qat4 needs macs or ms$"),
        ("torch_pruning:ms=2", "needs macs$"),
        ("nncodec_pruned:macs=2x", "nncodec_pruned needs macs, qp$"),
        (
            "nncodec_pruned:macs=2x,qp=-20,ensemble",
            "ensemble is '', needed is no value, and baselines of other",
        ),
        ("torch_pruning_nncf:macs=2x,ensemble", "torch_pruning_nncf needs macs$"),
        ("xz:sparsity=0.5", "xz needs bits or size or rate, macs or ms$"),
        ("prune_only:ms=-1", "ms is '-1', needed is milliseconds a picture"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_before_any_training(baseline, tmp_path, point, message):
    """And what is named as the nearest can be met."""
    method = point.partition(":")[0]
    kind = "controls" if method.startswith("small") or method == "torch_pruning" else "points"
    kind = "peers" if method in ("nncodec_pruned", "torch_pruning_nncf", "xz") else kind
    with pytest.raises(ValueError, match=message) as refused:
        until_trained(tmp_path / "refused", baseline, **{"points": [], "controls": [], kind: [point]})
    if "nearest" in message:
        nearest = re.search(message, str(refused.value))[1]
        met = re.sub(r"=9+x", f"={nearest}x", point)
        until_trained(tmp_path / "met", baseline, **{"points": [], "controls": [], kind: [met]})
    assert not list(tmp_path.rglob("*artifacts/*.safetensors"))


OWN_DATA = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8").split("### Your own data")[1]
COMMANDS = {
    Path(words[1]).stem: words for words in map(shlex.split, OWN_DATA.split("```")[1].split("\n")[1:-1])
}
SMALL = {  # those that are run, and what a test adds; everything else is as the README has it
    "01_baseline": "-p size 16 -p width 0.25 -p epochs 1 -p batch_size 16",
    "02_quantization": "-y 'points: [uniform_per_channel:bits=7]'",
    "06_pipeline": "-p scoring_images 32",
}


def as_in_the_readme(name, place, added, **replaced):
    """Run a command of the README in a folder that stands for the clone."""
    words = COMMANDS[name]
    assert words[:2] == [".venv/bin/papermill", f"notebooks/{name}.ipynb"]
    words = [sys.executable, "-m", "papermill", *words[1:], *shlex.split(added)]
    for old, new in replaced.items():
        assert sum(old in word for word in words) == 1, (name, old)
        words = [word.replace(old, str(new)) for word in words]
    environment = notebook.environment() | {"NNC_ROOT": str(place)}
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "notebooks").symlink_to(NOTEBOOKS)
    return tmp_path


def test_the_commands_of_the_readme_on_your_own_pictures(pictures, clone):
    assert list(COMMANDS) == [path.stem for path in sorted(NOTEBOOKS.glob("0[1-7]*.ipynb"))]
    for name, added in SMALL.items():
        done = as_in_the_readme(name, clone, added, **{"/PATH": pictures} if name == "01_baseline" else {})
        assert done.returncode == 0, done.stderr
        made = json.loads((clone / f"mine/{name[1]}/result.json").read_text())
        assert made["dataset"] == f"imagefolder:{pictures}" and (made["compression"] or made["latency"])


@pytest.mark.parametrize("by_name", [True, False])
def test_imagenet_weights(pictures, tmp_path, monkeypatch, by_name):
    """The README's options, with a file in torchvision's format: where a download leaves it, or any."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    file = Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name if by_name else "resnet18.pth"
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from_imagenet, from_a_file, _ = re.findall("`(-p [^`]+)`", OWN_DATA.split("```")[2])
    words = shlex.split(from_imagenet if by_name else f"{from_imagenet} {from_a_file}")
    assert set(words[::3]) == {"-p"}
    given = dict(zip(words[1::3], words[2::3], strict=True))  # of two values the second counts
    assert by_name or given.pop("weights") == "/FILE.pth"
    about = {"weights": str(folder / file)} if not by_name else {}
    about |= {"dataset": f"imagefolder:{pictures}", "size": 32, "epochs": 0.1}
    about |= given | {"learning_rate": 1e-6, "batch_size": 8}
    execute("01_baseline", tmp_path / "tuned", **about)
    trained = artifact.load(tmp_path / "tuned/artifacts/fp32.safetensors")
    assert trained.spec.stem == "imagenet"
    given = weights["layer3.0.conv1.weight"]
    assert float((trained.layer3[0].conv1.weight.detach() - given).abs().max()) < 1e-3
    if not by_name:
        with pytest.raises(ValueError, match="of another network"):
            execute("01_baseline", tmp_path / "deeper", **about | {"depth": 34})


def test_every_way_to_search(baseline, tmp_path):
    """As a divided benchmark: blocks are timed, a search is made, its winner is trained in its own run."""
    common = {"widest": 0.125, "macs": 0.0, "latency_networks": 6, "epochs": 1.0, "copies": 1}
    parts = {
        "blocks": {"steps": ["latency"]},
        "search": {"steps": ["search"], "latency_ms": 1.0, "macs": 100.0},
        "retrain": {
            "steps": ["retrain"],
            "arms": ["winner", "random_alone", "thin_resnet18", "winner taught"],
            "macs": 100.0,
            "latency_ms": 1.0,
        },
        "taught": {"steps": ["retrain"], "arms": ["winner taught"], "teaches": "winner", "macs": 100.0},
    }
    parts["blocks"]["macs"] = 100.0
    parts["search"] |= {"supernet_epochs": 1.0, "supernet_batch": 16, "calibration_images": 16}
    parts["search"] |= {"validation_images": 12, "queries": 6, "search_seeds": 2, "evaluations": 0}
    parts["search"] |= {"alone": 3, "alone_epochs": 0.5, "peers": ["optuna_nsga2"], "finalists": 2}
    made, upstream = {}, [str(baseline)]
    for part, values in parts.items():
        about = {"upstream": upstream, "part": part, **common, **values}
        made[part] = result("05_architecture_search", tmp_path / part, **about)
        upstream = [*upstream, str(tmp_path / part)]
    about |= {"arms": ["random_alone taught"], "part": "other", "macs": 50.0}
    with pytest.raises(ValueError, match="the search was within macs=100x,latency_ms"):
        execute("05_architecture_search", tmp_path / "other", **about)
    timed, search = made["blocks"]["extra"]["latency"], made["search"]["extra"]["search"]
    assert (len(timed["blocks"]), len(timed["networks"])) == (6, 3)
    assert not {text for text, _ in timed["blocks"]} & {text for text, _ in timed["networks"]}
    methods = {"random", "random_near_limit", "evolution", "reinforce", "gradient", "optuna_nsga2"}
    methods -= set(made["search"]["extra"]["missing"])
    assert set(search["verified"]) == set(search["curves"]) == methods
    assert all(len(values) == 2 for values in search["verified"].values())
    # a step of 16 pictures trains four networks, forward and backward
    assert search["images"] == {"supernet": 5 * 16 * 4 * 3, "candidate": 28, "asked": 6}
    assert len(search["pairs"]) == 3 and (search["tau"] is None or -1 <= search["tau"][0] <= 1)
    winner = models.Spec.from_json(search["winner"]["spec"])
    ours = [row["alone"] for row in search["finalists"] if row["method"] not in peers.SEARCHERS]
    assert search["winner"]["alone"] == max(ours)
    retrained = {row["method"]: row for row in made["retrain"]["compression"]}
    alone = retrained.pop("random_alone")  # the best of the random ones, when trained alone
    assert alone["control"] == "" and alone["macs"] <= retrained["thin_resnet18"]["macs"]
    assert alone["train_images"] == retrained["thin_resnet18"]["train_images"]
    left = [row for row in made["retrain"]["compression"] if row["method"] != "random_alone"]
    rows = {(row["point"].endswith("taught"), row["control"]): row for row in left}
    assert set(rows) == {(False, ""), (True, ""), (False, "thin_resnet18")}
    ours, thin = rows[False, ""], rows[False, "thin_resnet18"]
    assert ours["macs"] == rows[True, ""]["macs"] == models.macs(winner) <= thin["macs"]
    assert ours["train_images"] == rows[True, ""]["train_images"] == thin["train_images"] == 5 * 16
    assert ours["method"] in methods and ours["point"] == "macs=100x,latency_ms=1"
    assert ours["headline"] + rows[True, ""]["headline"] + alone["headline"] == 1 and not thin["headline"]
    assert not made["search"]["compression"] and not made["blocks"]["compression"]
    [by_other] = made["taught"]["compression"]
    assert by_other["point"] == "macs=100x,latency_ms=1 taught by compressed"
    assert by_other["train_seconds"] > ours["train_seconds"]  # its teacher's training counts
    assert by_other["artifact_sha256"] != rows[True, ""]["artifact_sha256"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"macs": 0.0}, "without a constraint the largest network wins"),
        ({"steps": ["retrain"]}, "nothing has been searched"),
        ({"steps": ["search"], "latency_ms": 0.1}, "nothing predicts latency_ms"),
        ({"steps": ["serach"]}, "unknown step 'serach'"),
        ({"arms": ["winner tuned"]}, "unknown arm 'winner tuned'"),
        ({"peers": ["optuna"]}, "unknown peer 'optuna'"),
        ({"arms": ["random_alone"], "alone": 0}, "no random network is trained alone"),
        ({"widest": 0.2}, "sixteenths"),
    ],
)
def test_searches_that_make_no_sense_are_refused(values, message):
    """The cells that check parameters, with the parameters' defaults."""
    from nnc_utils.search import space

    path = NOTEBOOKS / "05_architecture_search.ipynb"
    sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    [check] = [source for source in sources if "# before any work" in source]
    namespace = {name: found.default for name, found in parameters.declared(path).items()} | values
    namespace |= {"models": models, "counterparts": peers, "before": [], "spaces": space}
    namespace["pictures"] = types.SimpleNamespace(channels=1, size=28, classes=range(10))
    with pytest.raises(ValueError, match=message):
        exec(check, namespace | {"recipe_of_01": {"stem": "small"}})


def test_a_value_out_of_range_stops_before_any_work(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="epochs"):
        by_papermill("01_baseline", tmp_path / "refused", epochs=0)
    assert not (tmp_path / "refused" / "result.json").exists()
