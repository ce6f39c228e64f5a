"""What artifacts, and the files of peers, get right: scored in a fresh process.

`score` gets file names and nothing else, so that no network in memory, no forgotten mask and no cast can
flatter a number.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnc_utils import artifact as artifacts
from nnc_utils import data, evaluation, models, peers, processes
from nnc_utils.artifact import Artifact
from nnc_utils.rows import evidence
from nnc_utils.runtimes.children import child
from nnc_utils.runtimes.worker import only_answers

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

    Parameters
    ----------
    paths : of artifacts, or of what `peers.make` wrote.
    dataset : name, as for `data.load`.
    folder : for the predictions; an artifact whose predictions are there is not run again.
    split : "train", "validation" or "test".
    peer, source : one of `peers.NAMES`, and the artifact that the files were made of. Its Spec gives
        params and macs; bits_per_weight is then that of the whole file.

    Returns
    -------
    For each artifact, in the given order: path, sha256, params, nonzeros, macs, artifact_bytes,
    bits_per_weight, simulated, correct, total, predictions (file of uint8 classes, one an image).

    Raises
    ------
    ChildError
        With the child's own words.
    """
    paths = [str(path) for path in paths]
    if not paths:
        return []
    if bool(peer) != bool(source):
        raise ValueError(f"peer {peer!r} and source {str(source)!r}: both are needed, or none")
    command = ["nnc_utils.scoring", "--dataset", dataset, "--split", split]
    command += ["--peer", peer, "--source", str(source)] if peer else []
    scores = []
    with child([*command, "--folder", str(folder), *paths]) as scorer:
        for path in paths:
            scores.append(json.loads(scorer.answer()))
            accuracy = 100 * scores[-1]["correct"] / scores[-1]["total"]
            seconds = scores[-1].pop("seconds")
            print(f"scored {Path(path).name}: {accuracy:.2f} % of {split}, {seconds:.1f} s", flush=True)
    return scores


def _score(
    paths: Sequence[str], dataset: str, folder: Path, split: str, peer: str = "", source: str = ""
) -> Iterator[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        start = time.perf_counter()
        network = artifacts.read(source or path)
        images = getattr(matching(dataset, source or path, network), split)
        known, predict = _peer(peer, path, network, source) if peer else _artifact(network)
        sha256 = known["sha256"]
        file = folder / (evidence(sha256) if split == "test" else f"{sha256[:16]}.{split}.npy")
        predictions = np.load(file, allow_pickle=False) if file.exists() else np.zeros(0, np.uint8)
        if len(predictions) != len(images):
            predictions = predict(images)
            draft = file.with_suffix(".part")
            with open(draft, "wb") as stream:
                np.save(stream, predictions)
            os.replace(draft, file)
        yield {
            "path": path,
            "params": models.parameters(network.spec),
            "macs": models.macs(network.spec),
            **known,
            "correct": evaluation.correct(predictions, images.labels),
            "total": len(images),
            "predictions": str(file),
            "seconds": time.perf_counter() - start,
        }


def _artifact(network: Artifact) -> tuple[dict[str, Any], Callable[[data.Split], np.ndarray]]:
    """What a row says about an artifact, and what it predicts in eager."""
    known = {name: getattr(network, name) for name in ("sha256", "nonzeros", "bits_per_weight", "simulated")}
    normalize = functools.partial(data.normalize, mean=network.mean, std=network.std)

    def predict(images: data.Split) -> np.ndarray:
        return evaluation.predict(artifacts.network(network), images, normalize=normalize)

    return known | {"artifact_bytes": network.nbytes}, predict


def _peer(
    peer: str, path: str, network: Artifact, source: str
) -> tuple[dict[str, Any], Callable[[data.Split], np.ndarray]]:
    """The same of a peer's file that was made of `network`; its runtime predicts."""
    sha256, nbytes = peers.measured(path)
    loaded = peers.load(peer, path, source, threads=torch.get_num_threads())
    weights = sum(math.prod(layer.weight_shape) for layer in models.layers(network.spec))
    normalize = functools.partial(data.normalize, mean=network.mean, std=network.std)
    known = {
        "sha256": sha256,
        "nonzeros": models.parameters(network.spec) - loaded.zeros,
        "artifact_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / weights,
        "simulated": peer in peers.CODECS,
    }

    def predict(images: data.Split) -> np.ndarray:
        batches = map(normalize, images.images.split(PEER_BATCH))
        logits = np.concatenate([loaded.predict(batch.contiguous().numpy()) for batch in batches])
        if not np.isfinite(logits).all():
            raise ValueError(f"{path}: {peer} predicts logits that are not finite")
        return logits.argmax(1).astype(np.uint8)

    return known, predict


_load = functools.lru_cache(maxsize=2)(data.load)


def matching(dataset: str, path: str | Path, network: Artifact) -> data.Data:
    """The data set in the artifact's size, if it can be the artifact's."""
    found, spec = _load(dataset, size=network.spec.size), network.spec
    if (found.channels, len(found.classes)) != (spec.channels, spec.classes):
        raise ValueError(
            f"{path} is a network for {spec.channels} channels and {spec.classes} classes: {dataset} has "
            f"{found.channels} channels and {len(found.classes)} classes"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """What `score` starts: score artifacts, a JSON line each."""
    command = argparse.ArgumentParser(prog="python -m nnc_utils.scoring", description=main.__doc__)
    command.add_argument("paths", nargs="+", metavar="ARTIFACT")
    command.add_argument("--dataset", required=True)
    command.add_argument("--split", default="test", choices=("train", "validation", "test"))
    command.add_argument("--folder", required=True, type=Path)
    command.add_argument("--peer", default="", choices=("", *peers.NAMES))
    command.add_argument("--source", default="")
    arguments = vars(command.parse_args(arguments))
    processes.die_with_parent()
    answers = only_answers()
    for record in _score(**arguments):
        answers.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
