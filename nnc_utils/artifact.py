"""A network as one file: Spec, encoded weights, batch-norm, activation ranges, preprocessing, classes.

The container is safetensors. Its metadata hold one JSON text, "artifact":

    format      FORMAT
    spec        the Spec
    encodings   the distinct descriptions of `encoding.pack`, without the shapes, which the Spec knows
    weights     for each layer, in the order of `models.layers`: which encoding, and the length in
                bytes of each of its streams
    mean, std   of the training images, for each channel
    classes     their names
    sha256      over the JSON without this entry, and each tensor's name, dtype, shape and bytes

Its tensors are the streams, those of all layers joined under one name (entries cost bytes),
"batch_norm_and_bias" and, where activations are quantized, "activation_scale" and "activation_zero_point"
in the order of `models.activations`. The file's length in bytes is the size that is reported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from nnc_utils import encoding, models
from nnc_utils.encoding import Dense, Encoding, EncodingError, Uniform
from nnc_utils.models import Spec

FORMAT = "nnc_utils.artifact/1"
LARGEST_FILE = 2**30


class ArtifactError(ValueError):
    """A file that is no artifact, or a network that no artifact can hold."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds.

    spec : the architecture.
    weights : layer name (as `models.layers`) -> encoding.
    tensors : the rest of the state_dict: batch-norm's weight, bias, running_mean, running_var and the
        classifier's bias, float32. The counters num_batches_tracked are not kept.
    ranges : name (as `models.activations`) -> (scale, zero_point); empty when activations are floats.
    mean, std : for each channel, on the 0..1 scale.
    classes : names.
    sha256 : checksum of the contents.
    nbytes : length of the file.
    streams : layer name -> stream name -> bytes.
    """

    spec: Spec
    weights: dict[str, Encoding]
    tensors: dict[str, Tensor]
    ranges: dict[str, tuple[float, int]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    sha256: str
    nbytes: int
    streams: dict[str, dict[str, int]]

    @property
    def nonzeros(self) -> int:
        """Trainable parameters (`models.parameters`) that are not 0 (weights once decoded)."""
        weights = map(encoding.decode, self.weights.values())
        rest = (t for name, t in self.tensors.items() if name.endswith((".weight", ".bias")))
        return sum(int(torch.count_nonzero(tensor)) for tensor in (*weights, *rest))

    @property
    def bits_per_weight(self) -> float:
        """Payload of the weights, scales and masks included, over their number."""
        payload = sum(sum(lengths.values()) for lengths in self.streams.values())
        return 8 * payload / sum(math.prod(e.shape) for e in self.weights.values())

    @property
    def simulated(self) -> bool:
        """Whether no runtime executes the network as stored.

        Executed as stored are float weights with float activations, and symmetric 8-bit codes of every
        layer with 8-bit activations. Of all others runtimes multiply the zeros or requantize the codes.
        """

        def width(e: Encoding) -> int | None:
            if e.mask is not None:
                return None
            if isinstance(e, Dense):
                return 32
            return e.bits if isinstance(e, Uniform) and e.zero_point is None else None

        return {width(e) for e in self.weights.values()} != ({8} if self.ranges else {32})


# --- Writing ------------------------------------------------------------------------------------


def save(
    model: torch.nn.Module,
    path: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> Artifact:
    """Write a network to a file, at once or not at all, and read it back.

    The parametrizations on the weights of a network of `models.build` (`encoding.CHAINS`) and the ranges of
    its `models.Activation` go into the file; a file that exists is replaced. For mean, std, classes see
    `Artifact`; dtype, float32 or float16, is for weights that are not quantized. Returns what a reader gets.
    An `ArtifactError` names the layer with weights, scales or codebooks that training led astray, foreign
    parametrizations or modules, or no activation range where others have one.
    """
    if not isinstance(model, models.ResNet):
        raise ArtifactError(f"cannot save a {type(model).__name__}: a network of models.build is needed")
    spec, path = model.spec, Path(path)
    weights = {}
    for layer in models.layers(spec):
        try:
            weights[layer.name] = encoding.encoded(model.get_submodule(layer.name), dtype)
        except (EncodingError, AttributeError) as error:
            raise ArtifactError(f"{layer.name}: {error}") from None
    preprocessing = {"mean": [float(m) for m in mean], "std": [float(s) for s in std], "classes": [*classes]}
    _check_preprocessing(**preprocessing, spec=spec)
    data = _serialize(spec, weights, _tensors(model), _ranges(model), preprocessing)

    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = read(draft)
        for name, weight in weights.items():
            if not torch.equal(encoding.decode(weight), encoding.decode(written.weights[name])):
                raise ArtifactError(f"{path}: {name} was read back as something else; nothing is written")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return written


def _tensors(model: models.ResNet) -> dict[str, Tensor]:
    """What is no weight of a layer, once all of the state_dict is what the Spec says."""
    quantized = tuple(f"{layer.name}.parametrizations.weight." for layer in models.layers(model.spec))
    state = model.state_dict()
    for name in [name for name in state if name.startswith(quantized)]:
        tensor = state.pop(name)
        if name.endswith(".original"):
            state[name.replace("parametrizations.weight.original", "weight")] = tensor
    try:
        _on_meta(model.spec).load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"the network is not the one that its Spec describes: {error}") from None
    tensors = {name: state[name].detach().cpu().clone() for name in _lengths(model.spec)}
    _check_tensors(tensors)
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (name.endswith("running_var") and (tensor < 0).any()):
            raise ArtifactError(f"{name} holds NaN, infinity or a negative variance")
        if tensor.dtype != torch.float32:
            raise ArtifactError(f"{name} is {tensor.dtype}: float32 is needed, as by model.float()")


def _ranges(model: models.ResNet) -> dict[str, tuple[float, int]]:
    places = models.activations(model)
    if all(place.scale is None for place in places.values()):
        return {}
    ranges = {}
    for name, place in places.items():
        if place.scale is None:
            raise ArtifactError(f"{name} has no range, other activations have: calibrate all of them or none")
        # PyTorch computes with the scale in float32, so the file loses nothing.
        ranges[name] = float(np.float32(place.scale)), int(place.zero_point)
    _check_ranges(ranges)
    return ranges


def _check_ranges(ranges: Mapping[str, tuple[float, int]]) -> None:
    for name, (scale, zero_point) in ranges.items():
        if not 0 < scale < math.inf or zero_point not in range(256):
            raise ArtifactError(
                f"{name} has scale {scale}, zero-point {zero_point}: above 0, 0 to 255 needed"
            )


def _check_preprocessing(mean: list[float], std: list[float], classes: list[str], spec: Spec) -> None:
    numbers = (
        len(mean) == len(std) == spec.channels and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
    )
    if not numbers:
        given = f"mean {mean!r:.80}, std {std!r:.80}"
        raise ArtifactError(f"{given}: {spec.channels} finite numbers are needed, std above 0")
    if len(classes) != spec.classes or not all(isinstance(name, str) for name in classes):
        raise ArtifactError(f"classes is {classes!r:.80}: {spec.classes} names are needed")


def _serialize(
    spec: Spec,
    weights: Mapping[str, Encoding],
    tensors: Mapping[str, Tensor],
    ranges: Mapping[str, tuple[float, int]],
    preprocessing: Mapping[str, list],
) -> bytes:
    descriptions: list[dict] = []
    entries: list[list[int]] = []
    parts: dict[str, list[np.ndarray]] = {}
    for weight in weights.values():
        description, streams = encoding.pack(weight)
        del description["shape"]
        if description not in descriptions:
            descriptions.append(description)
        entries.append([descriptions.index(description), *(stream.size for stream in streams.values())])
        for name, stream in streams.items():
            parts.setdefault(name, []).append(stream)
    arrays = {name: np.concatenate(streams) for name, streams in parts.items()}
    arrays["batch_norm_and_bias"] = torch.cat(list(tensors.values())).numpy()
    if ranges:
        arrays["activation_scale"] = np.array([scale for scale, _ in ranges.values()], np.float32)
        arrays["activation_zero_point"] = np.array([zero for _, zero in ranges.values()], np.uint8)
    document = {"format": FORMAT, "spec": json.loads(spec.to_json()), **preprocessing}
    document |= {"encodings": descriptions, "weights": entries}
    document["sha256"] = _sha256(document, arrays)
    # One entry of metadata: safetensors writes several in random order.
    return safetensors.numpy.save(arrays, {"artifact": json.dumps(document, separators=(",", ":"))})


def _sha256(document: Mapping, arrays: Mapping[str, np.ndarray]) -> str:
    text = {entry: value for entry, value in document.items() if entry != "sha256"}
    digest = hashlib.sha256(json.dumps(text, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype.name} {list(arrays[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


# --- Reading ------------------------------------------------------------------------------------


def read(path: str | Path) -> Artifact:
    """Read a file whose checksum agrees; none of its bytes is run as code.

    An `ArtifactError` says what is wrong with a truncated, changed or foreign file, or one whose network
    would take more memory than the file warrants (over 256 MiB only at 32 times its length).
    """
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(f"{path}: a folder, no file")
    if path.stat().st_size > LARGEST_FILE:
        raise ArtifactError(
            f"{path}: {path.stat().st_size} bytes long, artifacts have at most {LARGEST_FILE}"
        )
    data = path.read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["artifact"])
        if document["format"] != FORMAT:
            raise ArtifactError(f"format {document['format']!r:.80}, {FORMAT!r} is needed")
        if document["sha256"] != _sha256(document, arrays):
            raise ArtifactError("the checksum differs: the file was changed or damaged")
        return _artifact(document, arrays, len(data))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
    except Exception as error:  # whatever bytes of another kind make a parser raise
        raise ArtifactError(f"{path}: truncated or no artifact: {error!r:.300}") from None


def _artifact(document: Mapping, arrays: Mapping[str, np.ndarray], nbytes: int) -> Artifact:
    spec = Spec.from_json(json.dumps(document["spec"]))
    # Memory for constant weights is all that a file gets without bytes for it.
    size = 4 * models.parameters(spec)
    if size > min(4096 * nbytes, max(32 * nbytes, 2**28)):
        raise ArtifactError(f"the network would take {size} bytes, more than {nbytes} bytes of file warrant")
    _check_preprocessing(*(document[entry] for entry in ("mean", "std", "classes")), spec=spec)
    lengths = _lengths(spec)
    pieces = torch.from_numpy(arrays["batch_norm_and_bias"].copy()).split(list(lengths.values()))
    ranges = {}
    if "activation_scale" in arrays:
        pairs = zip(*(arrays[f"activation_{part}"].tolist() for part in ("scale", "zero_point")), strict=True)
        ranges = dict(zip(models.activations(_on_meta(spec)), pairs, strict=True))
    tensors = {name: piece.clone() for name, piece in zip(lengths, pieces, strict=True)}
    _check_ranges(ranges)
    _check_tensors(tensors)
    weights, streams, used = {}, {}, dict.fromkeys(arrays, 0)
    for layer, (which, *sizes) in zip(models.layers(spec), document["weights"], strict=True):
        description = {**document["encodings"][which], "shape": list(layer.weight_shape)}
        streams[layer.name] = dict(zip(encoding.stream_names(description), sizes, strict=True))
        own = {name: arrays[name][used[name] :][:size] for name, size in streams[layer.name].items()}
        used |= {name: used[name] + size for name, size in streams[layer.name].items()}
        weights[layer.name] = encoding.unpack(description, own)
    return Artifact(
        spec=spec,
        weights=weights,
        tensors=tensors,
        ranges=ranges,
        mean=tuple(map(float, document["mean"])),
        std=tuple(map(float, document["std"])),
        classes=tuple(document["classes"]),
        sha256=document["sha256"],
        nbytes=nbytes,
        streams=streams,
    )


def _lengths(spec: Spec) -> dict[str, int]:
    """Names and lengths of the state_dict's tensors that are no weights of layers."""
    lengths = {}
    for layer in models.layers(spec):
        names = [f"{layer.batch_norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        lengths |= dict.fromkeys(names if layer.batch_norm else [f"{layer.name}.bias"], layer.out_channels)
    return lengths


def _on_meta(spec: Spec) -> models.ResNet:
    with torch.device("meta"):
        return models.ResNet(spec)


# --- Using --------------------------------------------------------------------------------------


def network(artifact: Artifact, *, trainable: bool = False) -> models.ResNet:
    """The network of an artifact.

    Its logits in evaluation mode are bit for bit those of the network that was saved (with dtype float16: of
    that network rounded), given the same memory format and number of threads.

    Parameters
    ----------
    trainable : False for plain decoded weights in evaluation mode. True for training mode with masks,
        quantizers and codebooks attached again, so that zeros stay zeros and `save` writes codes again.
        Scales are then fixed, even if they were learned; a codebook's levels are trained.
    """
    model = _on_meta(artifact.spec)
    state = {f"{name}.weight": encoding.decode(weight).clone() for name, weight in artifact.weights.items()}
    state |= {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    counters = (name for name in model.state_dict() if name.endswith("num_batches_tracked"))
    state |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
    model.load_state_dict(state, assign=True)
    for name, (scale, zero_point) in artifact.ranges.items():
        place = model.get_submodule(name)
        place.scale, place.zero_point = scale, zero_point
    if trainable:
        for name, weight in artifact.weights.items():
            encoding.attach(model.get_submodule(name), weight)
    return model.train(trainable)


def load(path: str | Path, *, trainable: bool = False) -> models.ResNet:
    """`network` of `read`."""
    return network(read(path), trainable=trainable)


def fp32_bytes(spec: Spec) -> int:
    """Length of the safetensors file of a Spec's float32 state_dict: the size that ratios refer to."""
    state = _on_meta(spec).state_dict()
    header, end = {}, 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.nbytes
        dtype = "F32" if tensor.is_floating_point() else "I64"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + end
