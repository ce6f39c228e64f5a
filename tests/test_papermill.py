"""The real notebooks with other parameters than their defaults: by papermill, or cell by cell here."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torchvision
from IPython.display import display
from PIL import Image

from bench import folder, parameters
from bench.execute import without_lesson
from nnc_utils import artifact, provenance

pytestmark = pytest.mark.usefixtures("scored_here")
NOTEBOOKS = provenance.PACKAGE.parent / "notebooks"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of small colour images: more red at the top, or more blue."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("own")
    for name, channel in (("red", 0), ("blue", 2)):
        place = root / "images" / name
        place.mkdir(parents=True)
        for number in range(60):
            image = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            image[:10, :, channel] += 100
            Image.fromarray(image).save(place / f"{number}.png")
    return root / "images"


def execute(name, place, *, lesson=True, **given):
    """A notebook cell by cell in this process, until its run is finished; what that leaves behind."""
    path = NOTEBOOKS / f"{name}.ipynb"
    namespace = {name: one.default for name, one in parameters.declared(path).items()}
    namespace |= given | {"run_dir": str(place), "display": display}
    try:
        for cell in (nbformat.read(path, as_version=4) if lesson else without_lesson(path)).cells:
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
                exec("\n".join(line for line in cell.source.splitlines() if line[:1] != "%"), namespace)
                plt.close("all")
            if (place / "result.json").is_file():
                return json.loads((place / "result.json").read_text())
    finally:
        os.environ.pop("NNC_MODULES", None)
    raise AssertionError(f"{name} did not finish")


def configured(row):
    """The mapping that a row is of."""
    return {"method": row["method"], **json.loads(row["settings"] or "{}")}


@pytest.fixture(scope="module")
def baselines(images):
    """Two seeds of 01_baseline on them, which the other notebooks build on."""
    about = {"dataset": f"imagefolder:{images}", "size": 16, "width": 0.125}
    about |= {"epochs": 3, "batch_size": 16, "learning_rate": 0.02}
    places = [images.parent / f"baseline{seed}" for seed in (1, 2)]
    for seed, place in enumerate(places, 1):
        execute("01_baseline", place, seed=seed, **about)
    return [str(place) for place in places]


def test_a_baseline_of_your_own_images(baselines):
    made = json.loads((Path(baselines[0]) / "result.json").read_text())
    [row] = [row for row in made["compression"] if not row["control"]]
    assert row["total"] == 24 and row["accuracy"] > 80  # a fifth of 120; red from blue
    assert (made["parameters"]["width"], made["parameters"]["size"]) == (0.125, 16)
    assert not list(Path(baselines[0]).glob("checkpoint*"))
    assert {"training.py", "evaluation.py", "artifact.py", "scoring.py"} <= set(made["code"])


KD = {"method": "kd", "width": 0.0625}
CHANNELS = {"method": "channels", "macs": 2, "compensate": True}
SMALL = {  # a notebook's configurations here, what else it gets, and the methods of its other rows
    "02_quantization": (
        [
            {"method": "uniform", "bits": 8},
            {"method": "hessian_rounding", "lambda_": 1e-6, "reestimate": True},
        ],
        {"peers": [], "calibration_images": 32},
        set(),
    ),
    "03_pruning": (
        [{"method": "weights", "sparsity": 0.5, "train": "finetune"}, CHANNELS],
        {"peers": [], "train_epochs": 1.0, "scoring_images": 48, "multiple": 1},
        {"dense_finetuned"},
    ),
    "04_distillation": (
        [KD | {"cached": True}, KD | {"teacher": "ensemble"}, KD | {"method": "attention"}],
        {"controls": [{"method": "student_alone", "width": 0.0625}], "epochs": 1.0},
        set(),
    ),
    "06_pipeline": (
        [{"method": "pipeline", "macs": 2, "bits": 4}],
        {"controls": [{"method": "small_dense", "macs": 2}], "peers": [], "macs": 2.0, "multiple": 1}
        | {"scoring_images": 48},
        {"dense_finetuned"},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_notebook_on_your_own_images(baselines, tmp_path, name):
    configurations, given, others = SMALL[name]
    made = execute(name, tmp_path / "run", upstream=baselines, configurations=configurations, **given)
    wanted = [*configurations, *given.get("controls", [])]
    rows = [row for row in made["compression"] if not row["control"].startswith("after ")]
    assert not made["extra"]["missing"]
    assert {row["method"] for row in rows} == {mapping["method"] for mapping in wanted} | others
    settings = [configured(row) for row in rows]
    assert all(mapping in settings for mapping in wanted)
    assert all(row["total"] == 24 and row["dataset"].startswith("imagefolder:") for row in rows)
    own = json.loads((Path(baselines[0]) / "result.json").read_text())["compression"][0]
    references = {row["artifact_sha256"] for row in rows} | {own["artifact_sha256"]}
    assert {row["reference_sha256"] for row in rows} <= references
    trained = {row["train_images"] for row in rows if row["division"] == "open" and row["train_images"]}
    assert name == "06_pipeline" or len(trained) <= 1, "equal training budgets"


def test_your_own_images_as_a_second_task(baselines, images, tmp_path):
    """Red from blue, then top from bottom; the two tasks have other images and other classes."""
    for name, rows in (("top", slice(0, 10)), ("bottom", slice(10, 20))):
        (tmp_path / "second" / name).mkdir(parents=True)
        for file in sorted(images.glob("red/*.png"))[:40]:
            pixels = np.asarray(Image.open(file)).copy()
            pixels[:10, :, 0] -= 100
            pixels[rows, :, 0] += 100
            Image.fromarray(pixels).save(tmp_path / "second" / name / file.name)
    given = {"dataset": f"imagefolder:{tmp_path / 'second'}", "upstream": baselines[:1], "seen": 64}
    given |= {"compress_epochs": 0.5, "batch_size": 16, "controls": [], "lesson": False}
    wanted = [{"start": "dense"}, {"start": "dense", "train": "head"}, {"start": "zeros", "train": "kept"}]
    wanted = [{"method": "transfer", "labels": 4} | one for one in wanted]
    made = execute("09_transfer_learning", tmp_path / "run", configurations=wanted, **given)
    dense, head, zeros = made["compression"]
    assert [configured(row) for row in made["compression"]] == wanted and not made["extra"]["missing"]
    assert {row["dataset"] for row in made["compression"]} == {given["dataset"]} and dense["total"] == 16
    assert {row["reference_sha256"] for row in (dense, head, zeros)} == {dense["artifact_sha256"]}
    assert head["artifact_bytes"] < 1500 < zeros["artifact_bytes"] < dense["artifact_bytes"]
    assert head["train_images"] == dense["train_images"] == 64 < zeros["train_images"]
    with pytest.raises(ValueError, match="which have to be there, too: .*'start': 'dense', 'labels': 4"):
        execute("09_transfer_learning", tmp_path / "alone", configurations=wanted[1:], **given)
    with pytest.raises(ValueError, match="images of 1 channels: the network of imagefolder:.* takes 3"):
        execute(
            "09_transfer_learning", tmp_path / "grey", configurations=wanted, **given | {"dataset": "digits"}
        )


def test_the_usual_recipe_on_your_own_pictures(baselines, tmp_path):
    settings = {"teacher_epochs": 0.2, "epochs": 0.5, "batch_size": 16, "seconds": 0.2, "width": 0.0625}
    made = execute("00_the_usual_recipe", tmp_path / "usual", upstream=baselines[:1], **settings)
    table = {(line["step"], line["figure"]): line for line in made["extra"]["table"]}
    assert not made["compression"]  # it claims nothing
    assert table["1 · int8", "times smaller"]["claimed"] == "4×"
    for step in ("2 · pruned", "3 · distilled"):  # a mask, and a new network in fp32
        assert 0.95 < float(table[step, "times smaller"]["as published"].rstrip("×")) < 1.05
        assert float(table[step, "times smaller"]["done right"].rstrip("×")) > 3
    says = {failure["tried"]: failure["says"] for failure in made["extra"]["failures"]}
    assert "backend must be one of" in says["get_default_qconfig('qint8')"]
    assert "'Sequential' object has no attribute 'weight'" in says["ln_structured(model.layer1, ...)"]
    assert "'aten::add.out'" in says["the same between two stubs"]
    assert says["convert(model)"] == "no error"


OWN_DATA = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8").split("### Your own data")[1]
COMMANDS = {
    Path(words[1]).stem: words for words in map(shlex.split, OWN_DATA.split("```")[1].split("\n")[1:-1])
}
ADDED = {  # to the commands that are run; everything else is as the README has it
    "01_baseline": "-p size 16 -p width 0.25 -p epochs 1 -p batch_size 16",
    "02_quantization": "-y 'configurations: [{method: uniform, bits: 7}]'",
}


def test_the_commands_of_the_readme_on_your_own_images(images, tmp_path):
    """In a folder that stands for the clone."""
    (tmp_path / "notebooks").symlink_to(NOTEBOOKS)
    assert list(COMMANDS) == [path.stem for path in sorted(NOTEBOOKS.glob("0[1-7]*.ipynb"))]
    for name, added in ADDED.items():
        words = [word.replace("/PATH", str(images)) for word in [*COMMANDS[name], *shlex.split(added)]]
        assert words[:2] == [".venv/bin/papermill", f"notebooks/{name}.ipynb"]
        command = [sys.executable, "-m", "papermill", *words[1:]]
        environment = folder.environment() | {"NNC_ROOT": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = json.loads((tmp_path / f"mine/{name[1]}/result.json").read_text())
        assert made["dataset"] == f"imagefolder:{images}" and made["compression"]


@pytest.mark.parametrize("by_name", [True, False])
def test_imagenet_weights(images, tmp_path, monkeypatch, by_name):
    """The README's options, with a file in torchvision's format: where a download leaves it, or any."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    file = Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name if by_name else "resnet18.pth"
    place = tmp_path / "hub/checkpoints"
    place.mkdir(parents=True)
    torch.save(weights, place / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from_imagenet, from_a_file, _ = re.findall("`(-p [^`]+)`", OWN_DATA.split("```")[2])
    words = shlex.split(from_imagenet if by_name else f"{from_imagenet} {from_a_file}")
    assert set(words[::3]) == {"-p"}
    given = dict(zip(words[1::3], words[2::3], strict=True))  # of two values the second counts
    assert by_name or given.pop("weights") == "/FILE.pth"
    about = {"weights": str(place / file)} if not by_name else {}
    about |= {"dataset": f"imagefolder:{images}", "size": 32, "epochs": 0.1}
    about |= given | {"learning_rate": 1e-6, "batch_size": 8}
    execute("01_baseline", tmp_path / "tuned", **about)
    trained = artifact.load(tmp_path / "tuned/artifacts/fp32.safetensors")
    assert trained.spec.stem == "imagenet"
    given = weights["layer3.0.conv1.weight"]
    assert float((trained.layer3[0].conv1.weight.detach() - given).abs().max()) < 1e-3
    if not by_name:
        with pytest.raises(ValueError, match="of another network"):
            execute("01_baseline", tmp_path / "deeper", **about | {"depth": 34})


def test_two_classes_of_twenty_images_are_enough(images, tmp_path):
    few = tmp_path / "few"
    for file in images.glob("*/1?.png"):
        for number in (0, 1):
            (few / file.parent.name).mkdir(parents=True, exist_ok=True)
            turned = (
                Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number else Image.open(file)
            )
            turned.save(few / file.parent.name / f"{number}{file.name}")
    about = {"dataset": f"imagefolder:{few}", "size": 16, "width": 0.125, "epochs": 3, "batch_size": 7}
    execute("01_baseline", tmp_path / "1", **about)
    given = {"configurations": [KD], "controls": [], "epochs": 1.0, "upstream": [str(tmp_path / "1")]}
    made = execute("04_distillation", tmp_path / "4", **given)
    assert [row["total"] for row in made["compression"] if row["method"] == "kd"] == [8]
    assert not made["extra"]["missing"] and made["extra"]["images"].keys() == {"train", "validation", "test"}
