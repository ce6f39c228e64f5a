"""Exported files give the artifact's classes in processes that know nothing of this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from small_networks import PLAIN, network, quantized, saved

from nnc_utils import artifact, data, evaluation, export, image_file, models, runtimes

ROOT = Path(__file__).parents[1]
ALONE = """
import json, sys
import numpy as np
for name in {without!r}:
    sys.modules[name] = None
{body}
np.save({target!r}, np.asarray(logits).argmax(1))
assert not [m for m in sys.modules if m.split(".")[0] in {without!r} and sys.modules[m]]
"""
RUNNING = {
    "onnx": """
import onnxruntime
logits = onnxruntime.InferenceSession({file!r}).run(None, {{"images": np.load({images!r})}})[0]
""",
    "executorch": """
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program({file!r}).load_method("forward")
parts = torch.from_numpy(np.load({images!r})).split(64)
logits = np.concatenate([method.execute([part])[0].numpy() for part in parts])
""",
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("to, without", [("onnx", ["torch", "nnc_utils"]), ("executorch", ["nnc_utils"])])
def test_the_accuracy_is_the_artifacts_in_a_process_without_this_package(
    to, without, precision, trained_digits, tmp_path
):
    if why := runtimes.available(export.TARGETS[to]):
        pytest.skip(why)
    path, digits = trained_digits / "int8.safetensors", data.load("digits")
    out = tmp_path / f"net{runtimes.adapter(export.TARGETS[to]).SUFFIX}"
    export.export(path, to=to, out=out, precision=precision)
    about = json.loads(out.with_name(f"{out.name}.json").read_text())
    mean, std = (np.array(about[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    pixels = digits.test.images.numpy().astype(np.float32) / 255
    np.save(tmp_path / "images.npy", (pixels - mean) / std)
    places = {"file": str(out), "images": str(tmp_path / "images.npy")}
    body, target = RUNNING[to].format(**places), str(tmp_path / "classes.npy")
    code = ALONE.format(without=without, body=body, target=target)
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    classes = np.load(target)
    stored = artifact.network(artifact.read(path))
    for place in models.activations(stored).values() if precision == "fp32" else ():
        place.scale = None
    eager = evaluation.predict(stored, digits.test, normalize=digits.normalize)
    labels = digits.test.labels.numpy()
    assert (eager == labels).mean() > 0.5
    assert abs((classes == labels).mean() - (eager == labels).mean()) < 0.01
    assert (classes == eager).mean() >= 0.99


def test_the_example_of_the_readme_names_the_class_of_an_image(trained_digits, tmp_path):
    path, digits = trained_digits / "int8.safetensors", data.load("digits")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "InferenceSession" in c]
    assert len(code.strip().splitlines()) <= 25 and "nnc_utils" not in code and "torch" not in code
    export.export(path, to="onnx", out=tmp_path / "net.onnx")
    small = Image.fromarray(digits.test.images[0, 0].numpy())
    wide = Image.new("L", (44, 32), 255)  # whose middle is the picture
    wide.paste(small.resize((32, 32), Image.Resampling.NEAREST), (6, 0))
    wide.save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, "picture.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    stored = artifact.network(artifact.read(path))
    read = torch.tensor(image_file.read_image(tmp_path / "picture.png", digits.size)).permute(2, 0, 1)[None]
    first = data.Split(read, digits.test.labels[:1])
    [expected] = evaluation.predict(stored, first, normalize=digits.normalize)
    assert done.stdout.strip() == digits.classes[expected]


def test_the_json_says_how_to_use_it(tmp_path):
    stored = saved(quantized(network(PLAIN)), tmp_path / "a.safetensors")
    written = export.export(tmp_path / "a.safetensors", to="onnx", out=tmp_path / "net.onnx")
    assert [file.name for file in written] == ["net.onnx", "net.onnx.json"]
    about = json.loads(written[1].read_text())
    assert about["classes"] == list(stored.classes) and about["size"] == PLAIN.size
    assert (about["mean"], about["std"]) == (list(stored.mean), list(stored.std))
    assert about["precision"] == "int8" and about["artifact_sha256"] == stored.sha256
    assert "note" not in about  # 7 bits
    assert about["reading"] == image_file.READING | {"colours": "grey"}
    saved(quantized(network(PLAIN), bits=8), tmp_path / "b.safetensors")
    wide = export.export(tmp_path / "b.safetensors", to="onnx", out=tmp_path / "wide.onnx")
    assert "VNNI" in json.loads(wide[1].read_text())["note"]
    for file in (*wide, tmp_path / "b.safetensors"):
        file.unlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "net.onnx", "net.onnx.json"]


def test_a_runtime_that_knows_opset_13_only_can_take_the_file(trained_digits, tmp_path):
    """Nothing in the graph is newer: with that number it is valid, and computes the same."""
    file, labelled = tmp_path / "net.onnx", tmp_path / "old.onnx"
    export.export(trained_digits / "int8.safetensors", to="onnx", out=file)
    model = onnx.load(file)
    model.opset_import[0].version = 13
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, labelled)
    digits = data.load("digits")
    given = {"images": digits.normalize(digits.test.images[:20]).numpy()}
    first, second = (onnxruntime.InferenceSession(path).run(None, given)[0] for path in (file, labelled))
    assert np.array_equal(first, second) and first.std() > 0


def test_openvino_gets_both_files(tmp_path):
    if why := runtimes.available("openvino"):
        pytest.skip(why)
    saved(network(PLAIN), tmp_path / "a.safetensors")
    written = export.export(tmp_path / "a.safetensors", to="openvino", out=tmp_path / "net.xml")
    assert [file.name for file in written] == ["net.xml", "net.bin", "net.xml.json"]
    session = runtimes.adapter("openvino").load(written[0], "fp32", 1)
    assert session.predict(np.zeros((2, 1, 8, 8), np.float32)).shape == (2, 10)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"to": "tensorrt"}, "unknown target 'tensorrt': one of onnx, openvino, executorch, web"),
        ({"precision": "int4"}, "unknown precision 'int4': one of fp32, int8"),
        ({"out": "net.pte"}, "has to end with .onnx"),
        ({"out": "nowhere/net.onnx"}, "cannot be written"),
        ({"precision": "int8"}, "has no activation ranges"),
        ({"file": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(change, said, tmp_path, capsys):
    saved(network(PLAIN), tmp_path / "a.safetensors")
    given = {"file": "a.safetensors", "to": "onnx", "out": "net.onnx", "precision": "fp32"} | change
    command = [str(tmp_path / given["file"]), "--to", given["to"], "--out", str(tmp_path / given["out"])]
    assert export.main([*command, "--precision", given["precision"]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_a_runtime_loads_but_does_not_run_is_not_left(tmp_path, monkeypatch):
    saved(network(PLAIN), tmp_path / "a.safetensors")

    def refused(*_):
        raise RuntimeError("error: 0x1")

    monkeypatch.setattr(runtimes.adapter("onnxruntime").OnnxRuntimeSession, "predict", refused)
    with pytest.raises(export.ExportError, match="as fp32 for onnx: error: 0x1"):
        export.export(tmp_path / "a.safetensors", to="onnx", out=tmp_path / "net.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "available", lambda *_: "not installed")
    with pytest.raises(export.ExportError, match="onnx needs onnxruntime: not installed .*--peers"):
        export.export(tmp_path / "a.safetensors", to="onnx", out=tmp_path / "net.onnx")


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    saved(network(PLAIN), tmp_path / "a.safetensors")
    out = tmp_path / "net.onnx"
    assert export.main([str(tmp_path / "a.safetensors"), "--to", "onnx", "--out", str(out)]) == 0
    assert f"net.onnx  {out.stat().st_size:,} bytes" in capsys.readouterr().out
