"""01 trains; or takes the network that lies in the repository, which was made of such a run."""

import json
import shutil

import pytest
import torch
from conftest import write_notebook
from safetensors.torch import load_file

from bench import marks, reference, tables
from bench.session import Bench
from nnc_utils import artifact, data, models, training
from nnc_utils.baseline import Train
from nnc_utils.distillation import candidates, student_loss

pytestmark = pytest.mark.usefixtures("scored_here")
DECLARED = """dataset: str = "digits"  # name
size: int = 0  # pixels
depth: int = 18  # layers
stem: str = "small_stride2"  # stem
width: float = 0.05  # width
weights: str = ""  # weights
pretrained: str = ""  # network
epochs: float = 2.0  # epochs
batch_size: int = 64  # images
learning_rate: float = 0.05  # peak
augment: bool = False  # shifts
profile: str = "smoke"  # profile
seed: int = 3  # seed
run_dir: str = ""  # folder
"""
LATER = """copies: int = 2  # copies
upstream: list = []  # runs
"""
FILE = "results/reference/resnet18_small_stride2.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """ROOT with a finished run of 01, and the reference that it became."""
    root, patch = tmp_path_factory.mktemp("reference"), pytest.MonkeyPatch()
    patch.setenv("NNC_ROOT", str(root))
    write_notebook(root, "01_baseline", "pass", parameters=DECLARED)
    run = finish(Bench("01_baseline", {"run_dir": "results/runs/smoke/01_baseline/seed=3"}))
    assert reference.write(run.folder, root / "results/reference") == root / FILE
    yield root, run
    patch.undo()


def finish(bench):
    [candidate] = bench.build([Train()])
    assert candidate.path.name == "fp32.safetensors" and not candidate.is_open
    bench.measure([candidate])
    return bench.finish()


def again(**given):
    return Bench("01_baseline", {"run_dir": "results/smoke/again", "pretrained": FILE, "epochs": 9.0} | given)


def test_01_is_its_own_reference(trained):
    run = trained[1]
    torch.manual_seed(3)
    twin = models.build(models.resnet(18, channels=1, size=8, classes=10, stem="small_stride2", width=0.05))
    options = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05, "augment": False, "seed": 3}
    history = training.fit(twin, data.load("digits"), **options)
    saved = artifact.load(run.artifact("fp32")).state_dict()
    assert all(torch.equal(saved[name], p) for name, p in twin.named_parameters())
    row = run.baseline
    assert (row.method, row.control, row.division) == ("train", "", "closed")
    assert row.reference_sha256 == row.artifact_sha256 and row.train_images == history.images


def test_a_run_that_takes_it_trains_nothing_and_is_as_the_run_that_made_it(trained, monkeypatch):
    root, run = trained
    monkeypatch.setattr(Bench, "fit", lambda *_, **__: pytest.fail("trained"))
    bench = again()
    assert bench.pretrained.history.to_frame().to_dict("records") == run.extra["history"]
    made = finish(bench)
    before, after = run.baseline, made.baseline
    assert (after.train_images, after.train_seconds) == (before.train_images, before.train_seconds)
    assert abs(after.accuracy - before.accuracy) < 1
    one, other = (artifact.load(each.artifact("fp32")).state_dict() for each in (run, made))
    weights = [name for name in one if name.endswith(("conv1.weight", "fc.weight"))]
    assert all(torch.equal(other[name], one[name].half().float()) for name in weights)
    assert before.artifact_bytes == after.artifact_bytes > 1.8 * (root / FILE).stat().st_size
    # what is trained from scratch beside it gets the training of the run that made it
    write_notebook(root, "03_pruning", "pass", parameters=DECLARED + "upstream: list = []  # runs\n")
    later = Bench("03_pruning", {"run_dir": "results/smoke/03", "upstream": ["results/smoke/again"]})
    assert (later.recipe["epochs"], made.parameters["epochs"], later.recipe["width"]) == (2.0, 9.0, 0.05)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "imagenet"}, "pretrained and weights both"),
        ({"width": 0.06}, "network 29,228 parameters, stem small_stride2, 1 × 8 × 8 pixels, not 41,432"),
        ({"stem": "small"}, "stem small_stride2, 1 × 8 × 8 pixels, not 29,228 parameters, stem small,"),
        ({"size": 16}, "not .* 1 × 16 × 16 pixels"),
    ],
)
def test_a_network_of_other_parameters_is_refused(trained, given, said):
    with pytest.raises(tables.ResultError, match=said):
        again(**given).pretrained  # noqa: B018


def test_files_that_do_not_belong_together_are_refused_and_another_file_is_another_run(trained):
    root, mixed = trained[0], FILE.replace("reference", "mixed")
    shutil.copytree(root / "results/reference", root / "results/mixed")
    notebook, run = root / "notebooks/01_baseline.ipynb", again(pretrained=mixed).run.finish()
    assert marks.is_of(run, notebook, run.parameters, [])
    path = root / "results/mixed/provenance.json"
    record = json.loads(path.read_text())
    assert tables.RunRecord.model_validate(record).seed == 3 and "history" not in record["extra"]
    record["extra"]["reference"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record | {"dataset": "fashion_mnist"}))
    with pytest.raises(tables.ResultError, match="data set fashion_mnist, not digits; checksum .*, not 000"):
        again(pretrained=mixed).pretrained  # noqa: B018
    path.unlink()
    with pytest.raises(tables.ResultError, match="lacks provenance.json: `python -m bench reference"):
        again(pretrained=mixed).pretrained  # noqa: B018
    (root / mixed).write_bytes(b"another")
    assert not marks.is_of(run, notebook, run.parameters, [])


def test_a_loss_in_16_bits_and_a_run_without_its_history_are_refused(trained, monkeypatch):
    root, run = trained
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_validated", lambda stored, _: 90.0 if stored.nbytes > 100_000 else 89.8)
        with pytest.raises(tables.ResultError, match=r"90.00 % in 32 bits, 89.80 % in 16: more than 0.1"):
            reference.write(run.folder, root / "results/none")
    assert list((root / "results/none").iterdir()) == []
    shutil.copytree(run.folder, root / "old")
    record = json.loads((root / "old/result.json").read_text())
    del record["extra"]["history"]
    (root / "old/result.json").write_text(json.dumps(record))
    with pytest.raises(tables.ResultError, match="kept no history"):
        reference.write(root / "old", root / "results/none")


def test_a_narrow_network_has_the_references_training_and_is_a_rival_without_training(trained):
    root, folder = trained[0], "results/narrow"
    shutil.copytree(root / "results/reference", root / folder)
    path = reference.write_narrow(root / folder, "three_stage", 2.0)
    stored, record = artifact.read(path), json.loads((root / folder / "provenance.json").read_text())
    assert record["extra"]["narrow"]["three_stage_2"]["sha256"] == stored.sha256
    torch.manual_seed(3)
    twin = models.build(stored.spec)
    options = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05, "augment": False, "seed": 3}
    training.fit(twin, data.load("digits"), **options)
    assert torch.equal(artifact.load(path).conv1.weight, twin.conv1.weight.half().float())
    run = finish(again(pretrained=FILE.replace("reference", "narrow"), run_dir="results/smoke/narrow"))
    assert any(name.endswith("three_stage_2.safetensors") for name in marks.hashes([], run.parameters))
    write_notebook(root, "06_pipeline", "pass", parameters=DECLARED + "upstream: list = []  # runs\n")
    bench = Bench("06_pipeline", {"run_dir": "results/smoke/06", "upstream": ["results/smoke/narrow"]})
    rival = bench.trained_before(stored.spec)
    assert torch.equal(rival.fc.weight, artifact.load(path).fc.weight)
    assert bench.trained_before(models.three_stage(channels=1, size=8, classes=10, width=2)) is None
    bench.seed = 4  # its rival starts from weights of its own
    assert bench.trained_before(stored.spec) is None and again(seed=4).pretrained


def test_logits_beside_a_reference_are_those_of_its_runs(trained, monkeypatch):
    root, folder = trained[0], "results/with_logits"
    shutil.copytree(root / "results/reference", root / folder)
    path = reference.write_logits(root / folder, 2)  # without augmentation: one copy
    finish(again(pretrained=FILE.replace("reference", "with_logits"), run_dir="results/smoke/with_logits"))
    write_notebook(root, "04_distillation", "pass", parameters=DECLARED + LATER)
    bench = Bench(
        "04_distillation", {"run_dir": "results/smoke/04", "upstream": ["results/smoke/with_logits"]}
    )
    monkeypatch.setattr(student_loss, "_logits", lambda *_: pytest.fail("the teacher was asked"))
    known = candidates.memory(bench, bench.dense)
    assert torch.equal(known.logits, load_file(path)["logits"])
    assert bench.trained_before(models.three_stage(channels=1, size=8, classes=10, width=2)) is None


def test_a_network_of_other_images_is_refused(trained):
    root, copied = trained[0], FILE.replace("reference", "copied")
    shutil.copytree(root / "results/reference", root / "results/copied")
    path = root / "results/copied/provenance.json"
    for digest, same in ((data.load("digits").digests(), True), ({"train": "0" * 16}, False)):
        record = json.loads(path.read_text())
        record["extra"]["images"] = digest
        path.write_text(json.dumps(record))
        if same:
            assert again(pretrained=copied).pretrained
        else:
            with pytest.raises(tables.ResultError, match="images .*000.*, not "):
                again(pretrained=copied).pretrained  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--logits", "0"], "--logits is 0: a number"),
        (["--logits", "2"], "holds no reference: give a finished"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_any_work(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    with pytest.raises(SystemExit):
        reference.main(arguments)
    assert said in capsys.readouterr().err
