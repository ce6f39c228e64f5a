"""federated.csv: bytes as a run kept them, differences from the evidence, and an audit of both."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from result_files import change, read

from bench import audit, federated, publish
from bench.tables import read_run
from nnc_utils import provenance, rows

SENT = {"method": "fedavg", "dirichlet": 0.3, "bits": 4, "down_bits": 4}
RUN = "quick/08_federated_learning/seed=1"


@pytest.fixture
def sent(published):
    """A finished run of 08: float32, and a compressed one that gets 12 test images more wrong. Its tables."""
    runs = published.parent / "runs/quick"
    shutil.copytree(runs / "02_quantization/seed=1", folder := runs / "08_federated_learning/seed=1")
    run = read_run(folder)
    row, labels = run.compression[0], rows.labels_of("digits")
    first = rows.read_predictions(folder / "predictions" / rows.evidence(row.artifact_sha256))
    worse = first.copy()
    right = np.flatnonzero(first == labels)[:12]
    worse[right] = (labels[right] + 1) % 10
    shas = {"fp32": "a" * 64, "small": "b" * 64}
    for sha256, predictions in zip(shas.values(), (first, worse), strict=True):
        np.save(folder / "predictions" / rows.evidence(sha256), predictions)
    base = rows.read_predictions(
        folder.parents[1] / "01_baseline/seed=1/predictions" / rows.evidence(row.reference_sha256)
    )
    same = {"run": RUN, "technique": "federated", "method": "fedavg", "division": "open", "headline": 0}
    settings = {"fp32": '{"dirichlet":0.3}', "small": '{"bits":4,"dirichlet":0.3,"down_bits":4}'}
    made = []
    for name, predictions in (("fp32", first), ("small", worse)):
        own = {"settings": settings[name], "control": "fedavg_fp32" if name == "fp32" else ""}
        own |= {"artifact_sha256": shas[name], "correct": int((predictions == labels).sum())}
        own |= {"accuracy": round(100 * float((predictions == labels).mean()), 4)}
        own |= rows.differences(compressed=[predictions], reference=[base], labels=labels)
        made.append(row.model_copy(update=same | own))
    ledger = {
        "rounds": 5,
        "clients": 3,
        "agreed": 3,
        "train_images": 5760,
        "seconds": 9.0,
        "history": [],
        "said": [],
    }
    slugs = [federated.of_row("fedavg", text).slug for text in settings.values()]
    sizes = [{"up_bytes": 2_000_000, "down_bytes": 2_100_000}, {"up_bytes": 90_000, "down_bytes": 110_000}]
    kept = {slug: ledger | size for slug, size in zip(slugs, sizes, strict=True)}
    changes = {"run": RUN, "notebook": "08_federated_learning", "compression": made, "artifacts": []}
    record = run.record.model_copy(update=changes).model_dump(mode="json") | {"extra": {"federated": kept}}
    (folder / "result.json").write_text(json.dumps(record))
    publish.publish(sorted(runs.glob("*/seed=*")), "quick")
    return published


def test_bytes_and_differences_stand_beside_each_other(sent):
    fp32, small = read(sent / "federated.csv")
    assert (fp32["against_sha256"], fp32["times_fewer_bytes"]) == ("", "")
    assert (small["up_bytes"], small["down_bytes"], small["rounds"], small["clients"]) == (
        "90000",
        "110000",
        "5",
        "3",
    )
    assert float(small["times_fewer_bytes"]) == 20.5 and float(small["dirichlet"]) == 0.3
    assert float(small["accuracy_delta"]) == -100 * 12 / 400 and float(small["delta_ci_high"]) < 0
    assert audit.problems(sent) == []
    table = federated.committed()
    assert list(table.loc["FedAvg, Dirichlet 0.3: 4 bits up, 4 bits down"])[:4] == [1, 5.0, 0.09, 0.11]
    assert table["within 0.5 pp"].tolist()[1] == "no" and pd.isna(table["within 0.5 pp"].iloc[0])


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("up_bytes", "80000", "its bytes and rounds are not those that its run has kept"),
        ("rounds", "50", "its bytes and rounds"),
        ("accuracy_delta", "-0.1", "accuracy_delta is -0.1, but the evidence says -3.0"),
        ("times_fewer_bytes", "30", "times_fewer_bytes is 30.0, but the evidence says 20.5"),
    ],
)
def test_the_audit_sees_another_number(sent, column, value, said):
    change(sent / "federated.csv", {"control": ""}, **{column: value})
    assert any(said in problem for problem in audit.problems(sent, rescore=False))


def test_a_table_that_is_gone_is_missed(sent):
    (sent / "federated.csv").unlink()
    assert any("federated.csv is missing" in problem for problem in audit.problems(sent, rescore=False))


def test_the_committed_curves_are_drawn_and_other_profiles_have_none(tmp_path):
    folder = tmp_path / "federated"
    shutil.copytree(provenance.PACKAGE.parent / "results/federated", folder)
    (folder / "figures/federated.png").unlink()
    assert federated.draw(folder).stat().st_size > 10_000
    (folder / federated.FILE).unlink()
    assert federated.draw(folder) is None and federated.of(folder) is None
