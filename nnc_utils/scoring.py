"""What artifacts, and the files of peers, get right: scored in a fresh process.

`score` gets file names and nothing else, so that no network in memory, no forgotten mask and no cast can
flatter a number.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnc_utils import artifact as artifacts
from nnc_utils import data, evaluation, models, peers
from nnc_utils.artifact import Artifact
from nnc_utils.rows import evidence
from nnc_utils.runtimes.children import child, serve

PEER_BATCH = 64  # images that a peer's runtime gets at once


def score(
    paths: Iterable[str | Path],
    *,
    dataset: str,
    folder: str | Path,
    split: str = "test",
    peer: str = "",
    source: str | Path = "",
) -> list[dict[str, Any]]:
    """Score artifacts, or files of a peer, in one fresh process that gets their names only.

    Predictions on `split` are kept in `folder`: an artifact that has some is not run again. A `peer`, one of
    `peers.NAMES`, needs `source`, the artifact that its files were made from, whose Spec gives params and
    macs; bits_per_weight is then that of the whole file. Gives for each path: path, sha256, params, nonzeros,
    macs, artifact_bytes, bits_per_weight, simulated, correct, total, predictions (file of uint8 classes).
    """
    paths = [str(path) for path in paths]
    if bool(peer) != bool(source):
        raise ValueError(f"peer {peer!r} and source {str(source)!r}: both are needed, or none")
    if not paths:
        return []
    scores = []
    order = {"dataset": dataset, "folder": str(folder), "split": split, "peer": peer, "source": str(source)}
    with child("nnc_utils.scoring") as scorer:
        for path in paths:
            start = time.perf_counter()
            scores.append(scorer.ask("score_one", path=path, **order))
            accuracy = 100 * scores[-1]["correct"] / scores[-1]["total"]
            seconds = time.perf_counter() - start
            print(f"scored {Path(path).name}: {accuracy:.2f} % of {split}, {seconds:.1f} s", flush=True)
    return scores


def score_one(
    *, path: str, dataset: str, folder: str, split: str = "test", peer: str = "", source: str = ""
) -> dict[str, Any]:
    """What `score` says about one file, in the process that is asked."""
    network = artifacts.read(source or path)
    images = getattr(matching(dataset, source or path, network), split)
    record, loaded = _of_peer(peer, path, network, source) if peer else (_of_artifact(network), None)
    file = Path(folder) / (
        evidence(record["sha256"]) if split == "test" else f"{record['sha256'][:16]}.{split}.npy"
    )
    predictions = np.load(file, allow_pickle=False) if file.exists() else np.zeros(0, np.uint8)
    if len(predictions) != len(images):
        predictions = _predict(network, loaded, images)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        with open(draft, "wb") as stream:
            np.save(stream, predictions)
        os.replace(draft, file)
    return {
        "path": path,
        "params": models.parameters(network.spec),
        "macs": models.macs(network.spec),
        **record,
        "correct": evaluation.correct(predictions, images.labels),
        "total": len(images),
        "predictions": str(file),
    }


def _of_artifact(network: Artifact) -> dict[str, Any]:
    names = ("sha256", "nonzeros", "bits_per_weight", "simulated")
    return {name: getattr(network, name) for name in names} | {"artifact_bytes": network.nbytes}


def _of_peer(peer: str, path: str, network: Artifact, source: str) -> tuple[dict[str, Any], peers.Loaded]:
    sha256, nbytes = peers.measured(path)
    loaded = peers.load(peer, path, source, threads=torch.get_num_threads())
    weights = sum(math.prod(layer.weight_shape) for layer in models.layers(network.spec))
    record = {
        "sha256": sha256,
        "nonzeros": models.parameters(network.spec) - loaded.zeros,
        "artifact_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights,
        "simulated": peer in peers.CODECS,
    }
    return record, loaded


def _predict(network: Artifact, loaded: peers.Loaded | None, images: data.Split) -> np.ndarray:
    """Classes of the artifact in eager, or of what a peer's runtime says."""
    normalize = functools.partial(data.normalize, mean=network.mean, std=network.std)
    if loaded is None:
        return evaluation.predict(artifacts.network(network), images, normalize=normalize)
    batches = map(normalize, images.images.split(PEER_BATCH))
    logits = np.concatenate([loaded.predict(batch.contiguous().numpy()) for batch in batches])
    if not np.isfinite(logits).all():
        raise ValueError("the peer predicts logits that are not finite")
    return logits.argmax(1).astype(np.uint8)


_load = functools.lru_cache(maxsize=2)(data.load)


def matching(dataset: str, path: str | Path, network: Artifact) -> data.Data:
    """The data set in the artifact's size, if it can be the artifact's."""
    images, spec = _load(dataset, size=network.spec.size), network.spec
    if (images.channels, len(images.classes)) != (spec.channels, spec.classes):
        raise ValueError(
            f"{path} is a network for {spec.channels} channels and {spec.classes} classes: {dataset} has "
            f"{images.channels} channels and {len(images.classes)} classes"
        )
    return images


if __name__ == "__main__":
    serve(sys.modules[__name__])
