"""Bench: what a notebook's Benchmark section calls, on small networks that nobody trained."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import PLAIN

from bench import folder
from bench.folder import read_run
from bench.parameters import ParameterError
from bench.session import Bench
from bench.tables import ResultError
from nnc_utils import artifact, data, doctor, models, peers, provenance, rows, scoring
from nnc_utils.configurations import Built, ConfigurationError
from nnc_utils.quantization import uniform

pytestmark = pytest.mark.usefixtures("scored_here")
PARAMETERS = """\
configurations: list = []  # files
controls: list = []  # rivals
train_epochs: float = 1.0  # [0, 10] training
learning_rate: float = 0.1  # [0, 10] its peak
upstream: list = []  # runs
claim: bool = True  # whether it may be claimed
profile: str = "smoke"  # profile
seed: int = 1  # [0, 100] seed
run_dir: str = ""  # folder
"""
SPARSE = [{"method": "weights", "sparsity": share} for share in (0.5, 0.9)]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """ROOT with the finished run of a small baseline, an untrained network on digits."""
    root, patch = tmp_path_factory.mktemp("session"), pytest.MonkeyPatch()
    patch.setenv("NNC_ROOT", str(root))
    from conftest import write_notebook

    path = write_notebook(root, "01_baseline", "pass", parameters=PARAMETERS)
    own = root / "results/runs/smoke/01_baseline/seed=1"
    own.mkdir(parents=True)
    values = {"dataset": "digits", "profile": "smoke", "seed": 1, "batch_size": 64, "epochs": 1.0}
    run = folder.Current("01_baseline", own, values, [], provenance.notebook_sha256(path))
    digits = data.load("digits")
    torch.manual_seed(0)
    file = run.path("artifacts/fp32.safetensors")
    network = models.build(PLAIN).eval()
    artifact.save(network, file, mean=digits.mean, std=digits.std, classes=digits.classes)
    [score] = scoring.score([file], dataset="digits", folder=run.path("predictions"))
    about = {"dataset": "digits", "model": "tiny", "technique": "baseline", "method": "train"}
    run.finish(compression=[rows.compression_row(score, run=run, **about)])
    yield root
    patch.undo()


def start(root, name="03_pruning", **given):
    from conftest import write_notebook

    write_notebook(root, name, "pass", parameters=PARAMETERS)
    namespace = {"configurations": [], "controls": [], "upstream": ["results/runs/smoke/01_baseline/seed=1"]}
    namespace |= {"run_dir": f"results/runs/smoke/{name}/seed=1", **given}
    return Bench(name, namespace), namespace


def rounded(configuration, bench):
    """More zeros here mean fewer bits; half of the weights at zero cannot be made."""
    bits = {0.5: 8, 0.9: 2}.get(getattr(configuration, "sparsity", None))
    if bits is None:
        return Built(copy.deepcopy(bench.dense), train_images=100, train_seconds=1.0)
    return Built(uniform.quantize_network(bench.dense, bits=bits, per_channel=True))


def test_every_fault_of_all_lists_is_named_before_any_work(baseline):
    wrong = {"configurations": [{"method": "weights", "sparsity": 2}], "controls": [{"method": "kd"}]}
    with pytest.raises(
        ConfigurationError, match=r"(?s)configurations: .*not 2.*controls: .*no method 'kd' here"
    ):
        start(baseline, **wrong, run_dir="results/runs/smoke/refused")
    assert not (baseline / "results/runs/smoke/refused").exists()


def test_files_rows_and_result(baseline):
    bench, namespace = start(baseline, configurations=SPARSE)
    candidates = bench.build(namespace["configurations"], rounded)
    table = bench.measure(candidates)
    assert list(table["settings"]) == ['{"sparsity":0.5}', '{"sparsity":0.9}']
    assert set(table["division"]) == {"closed"} and set(table["technique"]) == {"pruning"}
    digits = data.load("digits").test
    for (_, row), c in zip(table.iterrows(), candidates, strict=True):
        network = artifact.load(c.path)  # scored by hand, of the file
        right = network(data.load("digits").normalize(digits.images)).argmax(1) == digits.labels
        assert row["correct"] == int(right.sum()) and row["artifact_bytes"] == c.path.stat().st_size
    smallest = table.loc[table["artifact_bytes"].idxmin()]
    others = table[table["artifact_bytes"] > smallest["artifact_bytes"]]
    assert smallest["headline"] or others["headline"].sum() <= 1
    shown = bench.show(table)
    assert shown.index[0] == "50 % zeros by magnitude" and len(shown.columns) <= 6
    done = bench.finish(note="kept")
    assert [r.settings for r in read_run(done.folder).compression] == list(table["settings"])
    assert done.extra["note"] == "kept" and set(done.extra["validation_delta"]) <= {
        c.path.stem for c in candidates
    }


def test_parameters_are_recorded_as_they_were_given_and_the_setup_cell_can_run_again(baseline):
    bench, namespace = start(
        baseline, configurations=[{"method": "weights", "sparsity": 0.5, "score": "taylor"}]
    )
    assert bench.parameters["configurations"] == [{"method": "weights", "sparsity": 0.5, "score": "taylor"}]
    again = Bench("03_pruning", namespace)
    assert again.parameters["configurations"] == bench.parameters["configurations"]


def test_the_setup_cell_can_run_again_after_a_module_of_a_lists_name_was_imported(baseline):
    _, namespace = start(baseline)
    assert Bench("03_pruning", namespace | {"peers": peers}).parameters["configurations"] == []


def test_cells_that_run_twice_measure_each_network_once(baseline):
    bench, namespace = start(baseline, configurations=SPARSE)
    for _ in range(2):
        table = bench.measure(bench.build(namespace["configurations"], rounded))
        assert list(table["settings"]) == ['{"sparsity":0.5}', '{"sparsity":0.9}']
    for _ in range(2):
        assert len(bench.finish().compression) == 2


def test_a_batch_of_more_images_than_there_are_is_refused_by_its_name(baseline):
    from conftest import write_notebook

    more = "supernet_batch: int = 64  # [2, 4096] images\nbatch_size: int = 0  # 0 or [2, 4096] images\n"
    write_notebook(baseline, "05_architecture_search", "pass", parameters=PARAMETERS + more)
    given = {"upstream": ["results/runs/smoke/01_baseline/seed=1"], "run_dir": "results/runs/smoke/batch"}
    Bench("05_architecture_search", given | {"supernet_batch": 1197})
    with pytest.raises(ParameterError, match="supernet_batch is 1198: from 2 to the 1197 training images"):
        Bench("05_architecture_search", given | {"supernet_batch": 1198})


def test_what_is_trained_gets_the_dense_network_trained_on_as_its_rival(baseline):
    trained = [{"method": "weights", "sparsity": 0.7, "train": "finetune"}]
    bench, namespace = start(baseline, configurations=trained)
    candidates = bench.build(namespace["configurations"], rounded)
    assert [c.configuration.method for c in candidates] == ["dense_finetuned", "weights"]
    assert all(c.is_open for c in candidates) and candidates[0].control == "dense_finetuned"
    table = bench.measure(candidates)
    assert list(table["division"]) == ["open", "open"] and list(table["train_images"]) == [100, 100]
    # the same network, so validation has no reason to prefer the one that trained on
    assert set(table["reference_sha256"]) == {bench.baseline.baseline.artifact_sha256}
    bench.candidates.clear()
    bench.baseline.record.parameters["pretrained"] = "a converged network"
    assert [c.configuration.method for c in bench.build(namespace["configurations"], rounded)] == ["weights"]


def test_one_network_that_fails_costs_no_other(baseline):
    def failing(configuration, bench):
        if configuration.sparsity == 0.5:
            raise ValueError("a layer would be empty")
        return rounded(configuration, bench)

    bench, namespace = start(baseline, configurations=SPARSE)
    assert [c.configuration.sparsity for c in bench.build(namespace["configurations"], failing)] == [0.9]
    assert bench.missing == {'weights {"sparsity":0.5}': "a layer would be empty"}
    nothing = bench.measure([])  # as in a shard whose tools are not installed: shown and drawn all the same
    assert bench.show(nothing).empty and bench.with_reference(nothing)["accuracy"].dtype == float


def test_the_share_of_macs_in_integers_stands_beside_a_tools_row(baseline, monkeypatch, capsys):
    def quantized(configuration, bench):
        source, images = bench.baseline.artifact("fp32"), bench.sample(64)[0].numpy()
        file = peers.make("ort_static", source, images, bench.path("peers/x").parent)
        return Built(None, file=file, source=source, tool="ort_static")

    bench, namespace = start(baseline, "02_quantization", configurations=[{"method": "ort_static"}])
    candidates = bench.build(namespace["configurations"], quantized)
    [sha256] = bench.measure(candidates)["artifact_sha256"]
    assert bench.finish().record.extra.integer_macs == {sha256: 1.0}
    bench.extra.clear()

    def broken(*arguments, **options):
        raise RuntimeError("it is ill itself")

    monkeypatch.setattr(doctor, "examine", broken)
    assert list(bench.measure(candidates)["artifact_sha256"]) == [sha256]
    assert "integer_macs" not in bench.finish().extra
    assert "the share of MACs in integers is unknown: it is ill itself" in capsys.readouterr().out


def test_files_of_earlier_runs_are_found_by_their_configuration(baseline):
    first = "results/runs/smoke/03_pruning/seed=1,a"
    bench, namespace = start(baseline, configurations=SPARSE, run_dir=first)
    bench.measure(bench.build(namespace["configurations"], rounded))
    bench.finish()
    upstream = ["results/runs/smoke/01_baseline/seed=1", first]
    later, _ = start(baseline, upstream=upstream, run_dir="results/runs/smoke/03_pruning/seed=1,b")
    file = later.file(namespace["configurations"][1])
    assert file.parent.parent.name == "seed=1,a" and artifact.read(file).nbytes == file.stat().st_size
    with pytest.raises(ValueError, match="there is no network weights .* or the run that has it to upstream"):
        later.file(namespace["configurations"][1].model_copy(update={"sparsity": 0.1}))


def test_nothing_is_claimed_where_nothing_may_be(baseline):
    bench, namespace = start(baseline, configurations=SPARSE, claim=False)
    table = bench.measure(bench.build(namespace["configurations"], rounded))
    assert not table["headline"].any() and json.dumps(bench.looked) == "{}"


def test_other_images_than_those_that_an_upstream_run_saw_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    from conftest import write_notebook

    for number in range(12):
        place = tmp_path / "own" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(number).randint(0, 256, (8, 8)).astype(np.uint8)).save(place)
    dataset = f"imagefolder:{tmp_path / 'own'}"
    owned = data.load(dataset, size=8)
    path = write_notebook(tmp_path, "01_baseline", "pass", parameters=PARAMETERS)
    own = tmp_path / "results/runs/smoke/01_baseline/seed=1"
    own.mkdir(parents=True)
    values = {"dataset": dataset, "profile": "smoke", "seed": 1}
    run = folder.Current("01_baseline", own, values, [], provenance.notebook_sha256(path))
    network = models.build(models.resnet(18, channels=1, size=8, classes=2, width=1 / 16)).eval()
    file = run.path("artifacts/fp32.safetensors")
    artifact.save(network, file, mean=owned.mean, std=owned.std, classes=owned.classes)
    run.finish(extra={"images": owned.digests()})
    assert start(tmp_path)[0].finish().extra["images"] == owned.digests()
    place.rename(place.with_name("another name.png"))  # nothing that matters
    start(tmp_path)
    Image.new("L", (8, 8), 40).save(place)
    with pytest.raises(ResultError, match=r"01_baseline/seed=1.* saw other .*train.* run it again"):
        start(tmp_path)
    record = json.loads((own / "result.json").read_text())
    del record["extra"]["images"]  # of before there were digests
    (own / "result.json").write_text(json.dumps(record))
    start(tmp_path)
