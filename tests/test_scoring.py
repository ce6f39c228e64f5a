import dataclasses
import hashlib
import types

import numpy as np
import pytest
import torch
from small_networks import PLAIN, saved

from nnc_utils import artifact, data, models, peers, rows, scoring
from nnc_utils.runtimes.children import ChildError


def test_score_is_the_reloaded_artifacts_accuracy(trained_digits, tmp_path, capfd):
    paths = [trained_digits / "int8.safetensors", trained_digits / "base.safetensors"]
    scores = scoring.score(paths, dataset="digits", folder=tmp_path)
    digits = data.load("digits")
    for path, score in zip(paths, scores, strict=True):
        stored = artifact.read(path)
        with torch.inference_mode():
            classes = artifact.network(stored)(digits.normalize(digits.test.images)).argmax(1)
        predictions = np.load(score["predictions"])
        assert predictions.dtype == np.uint8 and (predictions != classes.numpy()).sum() <= 1
        assert score["correct"] == (predictions == digits.test.labels.numpy()).sum() > 200
        assert score["predictions"] == str(tmp_path / f"{stored.sha256[:16]}.npy")
        expected = {"path": str(path), "sha256": stored.sha256, "total": 400}
        expected |= {"artifact_bytes": path.stat().st_size, "params": models.parameters(PLAIN)}
        expected |= {"macs": models.macs(PLAIN), "nonzeros": stored.nonzeros}
        assert expected.items() <= score.items()
    assert capfd.readouterr().out.count("scored ") == 2
    changed = np.load(scores[0]["predictions"]) * 0
    np.save(scores[0]["predictions"], changed)  # found there, it is taken as it is
    again = scoring.score_one(path=str(paths[0]), dataset="digits", folder=str(tmp_path))
    assert again["correct"] == (digits.test.labels == 0).sum()
    assert scoring.score([], dataset="digits", folder=tmp_path) == []


def test_a_peers_file_is_scored_like_an_artifact(trained_digits, tmp_path):
    """xz of the codes decodes to the artifact: same predictions, and a row that its file decides."""
    source, about = (
        trained_digits / "int8.safetensors",
        {"dataset": "digits", "folder": tmp_path / "predictions"},
    )
    path = peers.make("xz", source, None, tmp_path)
    [own] = scoring.score([source], **about)
    [found] = scoring.score([path], peer="xz", source=source, **about)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["sha256"] == sha256 and found["predictions"].endswith(f"{sha256[:16]}.npy")
    np.testing.assert_array_equal(np.load(found["predictions"]), np.load(own["predictions"]))
    assert found["artifact_bytes"] == path.stat().st_size and found["simulated"] is True
    weights = sum(np.prod(layer.weight_shape) for layer in models.layers(PLAIN))
    assert found["bits_per_weight"] == 8 * path.stat().st_size / weights
    assert all(found[name] == own[name] for name in ("params", "macs", "nonzeros", "correct", "total"))
    run = types.SimpleNamespace(profile="smoke", name="r", seed=1)
    about = {"run": run, "dataset": "digits", "model": "m", "technique": "peer", "method": "xz"}
    row = rows.compression_row(found, reference=own, **about)
    assert row.size_ratio == round(artifact.fp32_bytes(PLAIN) / path.stat().st_size, 4)
    assert (row.accuracy_delta, row.simulated, row.artifact_sha256) == (0, 1, sha256)


def test_a_peers_runtime_predicts_itself(trained_digits, tmp_path):
    source, digits = trained_digits / "base.safetensors", data.load("digits")
    pictures = digits.normalize(digits.train.images[:128]).numpy()
    path = peers.make("ort_static", source, pictures, tmp_path)
    about = {"dataset": "digits", "folder": tmp_path, "split": "validation"}
    [score] = scoring.score([path], peer="ort_static", source=source, **about)
    images = digits.normalize(digits.validation.images).numpy()
    expected = peers.load("ort_static", path, source).predict(images).argmax(1)
    np.testing.assert_array_equal(np.load(score["predictions"]), expected)
    assert score["simulated"] is False and score["params"] == models.parameters(PLAIN) > score["nonzeros"]
    with pytest.raises(ValueError, match="peer 'xz' and source '': both are needed, or none"):
        scoring.score([path], peer="xz", **about)
    with pytest.raises(ChildError, match="not an int8 network|InvalidProtobuf|INVALID_PROTOBUF"):
        scoring.score([source], peer="ort_static", source=source, **about)


def test_validation_does_not_pass_for_test(trained_digits, tmp_path):
    path = trained_digits / "base.safetensors"
    validation = scoring.score_one(path=path, dataset="digits", folder=tmp_path, split="validation")
    assert validation["total"] == 200 and not (tmp_path / rows.evidence(validation["sha256"])).exists()


def test_errors_of_the_child_come_back(trained_digits, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((trained_digits / "base.safetensors").read_bytes()[:-7])
    with pytest.raises(ChildError, match="broken.safetensors: truncated"):
        scoring.score([broken], dataset="digits", folder=tmp_path)
    spec = dataclasses.replace(PLAIN, classes=3)
    saved(models.build(spec), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="1 channels and 3 classes: digits has 1 channels and 10 classes"):
        scoring.score_one(path=tmp_path / "other.safetensors", dataset="digits", folder=tmp_path)
