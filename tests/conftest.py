"""What several test files build on: a small profile with real artifacts, as notebooks leave it."""

import contextlib
import functools
import json
import os
import shutil
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from small_networks import PLAIN, quantized
from xdist.scheduler import LoadFileScheduling

from bench import folder as notebook
from bench import marks, publish, readme, report, two_data_sets
from bench.committed import Tables
from nnc_utils import artifact, data, encoding, evaluation, models, provenance, rows, scoring
from nnc_utils.runtimes.children import ChildError

PARAMETERS = """\
seconds: float = 0.0  # [0, 100] how long it works
profile: str = "smoke"  # name
seed: int = 1  # [0, 1000] seed
run_dir: str = ""  # folder
"""


NOTEBOOKS = {  # what runs in one process, in this order; each builds on the runs of those before it
    **dict.fromkeys(("01", "02", "03", "07"), "first"),
    **dict.fromkeys(("04", "05", "06", "08", "09"), "between"),
    **dict.fromkeys(("10", "00"), "last"),
}


def _group(nodeid: str) -> str:
    """The group of a notebook's cells; empty for a test."""
    return NOTEBOOKS[nodeid.removeprefix("notebooks/")[:2]] if nodeid.startswith("notebooks/") else ""


class _NotebooksInOrder(LoadFileScheduling):
    """A file's tests in one process, and a group of notebooks in one."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid) or super()._split_scope(nodeid)


def pytest_collection_modifyitems(items):
    """Notebooks 04 to 06, 08 and 09 come amid the tests, after 01, and at the end what builds on all."""
    if not os.environ.get("NNC_SLOW"):
        for item in (item for item in items if item.get_closest_marker("slow")):
            item.add_marker(pytest.mark.skip(reason="slow: make test SLOW=1"))
    files = list(dict.fromkeys(item.nodeid.split("::")[0] for item in items if not _group(item.nodeid)))
    early = set(files[: len(files) // 2])

    def place(item):
        name, group = item.nodeid.split("::")[0], _group(item.nodeid)
        if group:
            number = name.removeprefix("notebooks/")[:2]
            return {"first": 0, "between": 2, "last": 4}[group], list(NOTEBOOKS).index(number)
        return 1 if name in early else 3, 0

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Notebooks show no progress bars, as in their stored outputs."""
    os.environ.pop("TQDM_DISABLE", None)
    if _group(item.nodeid):
        os.environ["TQDM_DISABLE"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _NotebooksInOrder(config, log)


def write_notebook(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook that can be run, in ROOT/notebooks."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    content = new_notebook(cells=[first, *map(new_code_cell, cells)])
    content.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(content, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder in the clone's place, with `notebook(name, *cells)` to write notebooks there."""
    monkeypatch.setenv("NNC_ROOT", str(tmp_path))
    monkeypatch.delenv("NNC_HEADLESS", raising=False)

    def write(name, *cells, parameters=PARAMETERS):
        return write_notebook(tmp_path, name, *cells, parameters=parameters)

    return types.SimpleNamespace(root=tmp_path, notebook=write)


class Inline:
    """A child that carries its orders out here, and notes them."""

    def __init__(self, actor, name, log):
        self.actor, self.name, self.log = actor, name, log

    def ask(self, order, **arguments):
        self.log.append((self, order, arguments))
        try:  # as on the way to another process, which has random numbers of its own
            with torch.random.fork_rng(devices=[]):
                answer = getattr(self.actor, order)(**json.loads(json.dumps(arguments)))
            return json.loads(json.dumps(answer))
        except Exception as error:
            raise ChildError(f"{self.name} could not {order}: {error}") from None


@pytest.fixture(scope="module")
def scored_here():
    """Networks are scored in this process: the fresh one of `test_scoring.py` imports for seconds."""

    @contextlib.contextmanager
    def child(module):
        scoring._load.cache_clear()  # a folder may hold other images by now
        yield Inline(scoring, module, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "child", child)
        yield


@pytest.fixture
def one_thread():
    """Small networks are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _networks(seed: int):
    """A small random network, then the same one with 8-bit weights, a scale for each channel."""
    torch.manual_seed(seed)
    spec = models.resnet(18, channels=1, size=8, classes=10, stem="small", width=1 / 8)
    network = models.build(spec)
    yield network
    for layer in models.layers(spec):
        module = network.get_submodule(layer.name)
        weight = module.weight.detach()
        scale = weight.flatten(1).abs().amax(1) / 127
        codes = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().clamp(-127, 127)
        encoding.attach(module, encoding.Uniform(codes.to(torch.int16), scale, 0, 8))
    yield network


def _score(path: Path, stored, digits) -> dict:
    """What `scoring.score` says about an artifact, without its process."""
    predictions = evaluation.predict(artifact.network(stored), digits.test, normalize=digits.normalize)
    file = path.parents[1] / "predictions" / rows.evidence(stored.sha256)
    file.parent.mkdir(exist_ok=True)
    np.save(file, predictions)
    correct = int((predictions == digits.test.labels.numpy()).sum())
    sizes = {"artifact_bytes": stored.nbytes, "bits_per_weight": stored.bits_per_weight}
    counts = {"params": models.parameters(stored.spec), "macs": models.macs(stored.spec)}
    counts |= {"nonzeros": stored.nonzeros, "simulated": False, "correct": correct, "total": len(predictions)}
    return {"path": path, "sha256": stored.sha256, "predictions": file, **sizes, **counts}


def _run(root: Path, name: str, seed: int, upstream: list) -> notebook.Current:
    path = root / "notebooks" / f"{name}.ipynb"
    values = {"dataset": "digits", "profile": "quick", "seed": seed}
    folder = root / "results" / "runs" / "quick" / name / f"seed={seed}"
    folder.mkdir(parents=True)
    provenance.watch(folder / marks.MODULES)
    del os.environ["NNC_MODULES"]
    return notebook.Current(name, folder, values, upstream, provenance.notebook_sha256(path))


def _timed(stored, run, file: Path, labels: np.ndarray, times: dict) -> list[dict]:
    """Invented times, but predictions of each runtime as `measure.latency` leaves them."""
    measured = []
    for (runtime, precision), milliseconds in times.items():
        predictions = np.load(file).copy()
        if precision == "int8":
            predictions[0] = (predictions[0] + 1) % 10
        np.save(run.path(f"predictions/{rows.evidence(stored, runtime, precision)}"), predictions)
        shares = {"accuracy": round(100 * float((predictions == labels).mean()), 4)}
        shares |= {"agreement": round(100 * float((predictions == np.load(file)).mean()), 4)}
        for batch in (1, 64):
            p50 = milliseconds * batch**0.5
            row = {"runtime": runtime, "precision": precision, "batch": batch, "threads": 1, "rounds": 5}
            row |= {"p50_ms": p50, "p90_ms": 1.1 * p50, "iqr_ms": 0.1 * p50, "throughput": 1000 * batch / p50}
            row |= {"rounds_p50_ms": " ".join([f"{p50:.6g}"] * 5)}
            row |= {"stored_codes": int(precision == "int8"), "artifact_sha256": stored, **shares}
            measured.append(row | {"peak_rss_mb": 100.0, "load_ms": 5.0, "runtime_bytes": 1000})
    return measured


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """ROOT with the finished runs of a profile: two seeds of a baseline, of it in 8 bits, and their times."""
    root = tmp_path_factory.mktemp("example")
    patch = pytest.MonkeyPatch()
    patch.setenv("NNC_ROOT", str(root))
    code = "from nnc_utils import training\n"
    for name in ("01_baseline", "02_quantization", "07_deployment"):
        write_notebook(root, name, code)
    digits = data.load("digits")
    labels = digits.test.labels.numpy()
    folders, scores, sources = [], {}, {}
    for seed in (1, 2):
        for name, network in zip(("01_baseline", "02_quantization"), _networks(seed), strict=True):
            upstream = [sources["01_baseline", seed]] if name != "01_baseline" else []
            run = _run(root, name, seed, upstream)
            path = run.path("artifacts/network.safetensors")
            stored = artifact.save(network, path, mean=digits.mean, std=digits.std, classes=digits.classes)
            scores[name, seed] = _score(path, stored, digits)
            row = rows.compression_row(
                scores[name, seed],
                run=run,
                dataset="digits",
                reference=upstream[0] if upstream else None,
                model="tiny",
                technique="quantization" if upstream else "baseline",
                method="uniform" if upstream else "train",
                settings='{"bits":8}' if upstream else "",
                headline=1,
            )
            looked = {"validation_delta": {"network": [-0.2, 0.0, 0.2]}} if upstream else {}
            sources[name, seed] = run.finish(compression=[row], extra=looked)
            folders.append(run.folder)
    run = _run(root, "07_deployment", 1, list(sources.values()))
    times = {
        "01_baseline": {("eager", "fp32"): 4.0, ("onnxruntime", "fp32"): 2.0},
        "02_quantization": {("eager", "fp32"): 4.5, ("onnxruntime", "int8"): 0.5},
    }
    measured = []
    for name, own in times.items():
        score = scores[name, 1]
        measured += _timed(score["sha256"], run, score["predictions"], labels, own)
    networks = [row for (_, seed), source in sources.items() if seed == 1 for row in source.compression]
    reference = scores["01_baseline", 1]["sha256"]
    run.finish(latency=rows.latency_rows(measured, networks, reference_sha256=reference))
    folders.append(run.folder)
    publish.publish(folders, "quick")
    blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in readme.BLOCKS]
    (root / "README.md").write_text("# T\n" + "".join(blocks) + "rest\n")
    patch.undo()
    return types.SimpleNamespace(root=root, folders=folders, labels=labels, scores=scores)


@pytest.fixture
def published(example, tmp_path, monkeypatch):
    """A copy of the example that a test may change; gives ROOT/results/quick."""
    root = tmp_path / "clone"
    shutil.copytree(example.root, root)
    monkeypatch.setenv("NNC_ROOT", str(root))
    return root / "results" / "quick"


_read = functools.cache(Tables)


@pytest.fixture
def read_once(monkeypatch):
    """Tables of the repository, which no test changes: read and compared once for all that reports ask."""
    monkeypatch.setattr(data, "_test_labels", {})  # another test's stand-in may have had the name
    for module in (readme, report, two_data_sets):
        monkeypatch.setattr(module, "Tables", _read)
    return _read


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory):
    """A trained network on digits, and the same in 7-bit integers."""
    folder = tmp_path_factory.mktemp("artifacts")
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.build(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pictures = digits.normalize(digits.train.images)
    for rate in (0.1, 0.1, 0.1, 0.01):  # the last makes it sure of its classes, on any number of threads
        optimizer.param_groups[0]["lr"] = rate
        for batch in torch.randperm(len(pictures)).split(64):
            loss = torch.nn.functional.cross_entropy(model(pictures[batch]), digits.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    about = {"mean": digits.mean, "std": digits.std, "classes": digits.classes}
    artifact.save(model, folder / "base.safetensors", **about)
    artifact.save(quantized(model), folder / "int8.safetensors", **about)
    return folder
