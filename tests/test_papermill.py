"""The real notebooks, run with plain papermill and parameters of another size than their defaults."""

import json

import numpy as np
import papermill
import pytest
from PIL import Image

from nnc_utils import provenance

NOTEBOOKS = provenance.PACKAGE.parent / "notebooks"


@pytest.fixture
def pictures(tmp_path):
    """Two classes of small colour pictures: more red at the top, or more blue."""
    random = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(60):
            image = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            image[:10, :, channel] += 100
            Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def execute(name, folder, **parameters):
    folder.mkdir()
    papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb",
        folder / "executed.ipynb",
        {**parameters, "run_dir": str(folder)},
        kernel_name="python3",
        cwd=NOTEBOOKS,
        progress_bar=False,
    )
    return json.loads((folder / "result.json").read_text())


def test_your_own_pictures_through_training_and_quantization(pictures, tmp_path):
    baseline = execute(
        "01_baseline",
        tmp_path / "baseline",
        dataset=f"imagefolder:{pictures}",
        size=16,
        width=0.125,
        epochs=3,
        batch_size=16,
        learning_rate=0.02,
    )
    [row] = baseline["compression"]
    assert row["total"] == 24 and row["accuracy"] > 80  # a fifth of 120; red from blue
    assert (baseline["parameters"]["width"], baseline["parameters"]["size"]) == (0.125, 16)
    assert not list((tmp_path / "baseline").glob("checkpoint*"))

    quantized = execute(
        "02_quantization",
        tmp_path / "quantized",
        upstream=[str(tmp_path / "baseline")],
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


def test_a_value_out_of_range_stops_before_any_work(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="epochs"):
        execute("01_baseline", tmp_path / "refused", epochs=0)
    assert not (tmp_path / "refused" / "result.json").exists()
