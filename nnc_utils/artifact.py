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

Its tensors are the streams, those of all layers behind each other under one name (an entry for each
layer would cost a small network several percent of its file), "batch_norm_and_bias" and, where
activations are quantized, "activation_scale" and "activation_zero_point" in the order of the Spec's
`models.activations`. The file's length in bytes is the size that is reported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from nnc_utils import encoding, models
from nnc_utils.encoding import Dense, Encoding, EncodingError, Uniform
from nnc_utils.models import Spec, SpecError

FORMAT = "nnc_utils.artifact/1"
ENTRIES = {"format", "spec", "encodings", "weights", "mean", "std", "classes", "sha256"}
LARGEST_FILE = 2**30
LARGEST_HEADER = 2**22
MOST_BLOCKS = 1000
LARGEST_SIZE = 2**14


class ArtifactError(ValueError):
    """A file that is no artifact, or a network that no artifact can hold."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a file holds.

    Parameters
    ----------
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
        layer with 8-bit activations. Simulated are masks (runtimes multiply by the zeros), codes of fewer
        than 8 bits (they run as int8) or more, codebooks and affine codes (they are requantized), weights
        quantized without the activations or the reverse (they run as fp32).
        """
        if any(e.mask is not None for e in self.weights.values()):
            return True

        def width(e: Encoding) -> int | None:
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

    Parameters
    ----------
    model : a network of `models.build`. The parametrizations on its weights (`encoding.CHAINS`) and the
        ranges of its `models.Activation` go into the file.
    path : conventionally ``*.safetensors``; replaced if it exists.
    mean, std, classes : see `Artifact`.
    dtype : float32 or float16, for weights that are not quantized.

    Returns
    -------
    What a reader of the file gets.

    Raises
    ------
    ArtifactError
        For weights, scales or codebooks that training led astray, foreign parametrizations or modules,
        activation ranges in some places only; the message names the layer.
    """
    if not isinstance(model, models.ResNet):
        raise ArtifactError(f"cannot save a {type(model).__name__}: a network of models.build is needed")
    spec, path = model.spec, Path(path)
    weights = _weights(model, dtype)
    tensors, ranges = _tensors(model), _ranges(model)
    preprocessing = {
        "mean": [float(m) for m in mean],
        "std": [float(s) for s in std],
        "classes": list(classes),
    }
    _check_preprocessing(preprocessing, spec)
    data = _serialize(spec, weights, tensors, ranges, preprocessing)

    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = read(draft)
        found = written.weights | written.tensors | written.ranges
        for name, wanted in (weights | tensors | ranges).items():
            if not _equal(wanted, found[name]):
                raise ArtifactError(f"{path}: {name} was read back as something else; nothing is written")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return written


def _weights(model: models.ResNet, dtype: torch.dtype) -> dict[str, Encoding]:
    layers = {layer.name: layer for layer in models.layers(model.spec)}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        foreign = set(getattr(module, "parametrizations", ())) - ({"weight"} if name in layers else set())
        if parametrize.is_parametrized(module) and foreign:
            raise ArtifactError(
                f"{name}: {sorted(foreign)[0]} has a parametrization; only layers' weights may"
            )
    weights = {}
    for name, layer in layers.items():
        if name not in modules:
            raise ArtifactError(f"the network has no {name}, which its Spec names")
        try:
            weights[name] = encoding.encoded(modules[name], dtype)
        except EncodingError as error:
            raise ArtifactError(f"{name}: {error}") from None
        if weights[name].shape != layer.weight_shape:
            raise ArtifactError(f"{name} has shape {weights[name].shape}, its Spec says {layer.weight_shape}")
    return weights


def _tensors(model: models.ResNet) -> dict[str, Tensor]:
    lengths = _lengths(model.spec)
    state = model.state_dict()
    weights = [f"{layer.name}." for layer in models.layers(model.spec)]
    ours = tuple(f"{prefix}parametrizations.weight." for prefix in weights)
    known = {*lengths, *(f"{prefix}weight" for prefix in weights)}
    foreign = [
        name
        for name in state
        if name not in known and not name.startswith(ours) and not name.endswith(".num_batches_tracked")
    ]
    absent = [name for name in lengths if name not in state]
    if foreign or absent:
        name, why = (foreign[0], "is not in") if foreign else (absent[0], "is missing; it is in")
        raise ArtifactError(f"{name} {why} the network of the Spec: make the Spec describe the network")
    tensors = {name: state[name].detach().cpu().clone() for name in lengths}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ArtifactError(f"{name} is {tensor.dtype}: float32 is needed, as by model.float()")
    _check_tensors(tensors, lengths)
    return tensors


def _ranges(model: models.ResNet) -> dict[str, tuple[float, int]]:
    found, wanted = models.activations(model), _places(model.spec)
    if list(found) != wanted:
        odd = sorted(set(found) ^ set(wanted))
        raise ArtifactError(f"activation places differ from the Spec's: {', '.join(odd) or 'another order'}")
    without = [name for name, place in found.items() if place.scale is None]
    if len(without) == len(found):
        return {}
    if without:
        raise ArtifactError(
            f"{len(without)} of {len(found)} activation places have no range, {without[0]} for one: "
            "calibrate all of them or none"
        )
    # PyTorch computes with the scale in float32, so the file loses nothing.
    ranges = {name: (float(np.float32(place.scale)), int(place.zero_point)) for name, place in found.items()}
    _check_ranges(ranges)
    return ranges


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
    for name, weight in weights.items():
        try:
            description, streams = encoding.pack(weight)
        except EncodingError as error:
            raise ArtifactError(f"{name}: {error}") from None
        names = encoding.stream_names(description)
        del description["shape"]
        if description not in descriptions:
            descriptions.append(description)
        entries.append([descriptions.index(description), *(streams[stream].size for stream in names)])
        for stream in names:
            parts.setdefault(stream, []).append(streams[stream])
    arrays = {stream: np.concatenate(pieces) for stream, pieces in parts.items()}
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


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Encoding):
        return type(a) is type(b) and all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


# --- Reading ------------------------------------------------------------------------------------


def read(path: str | Path) -> Artifact:
    """Read a file, trusting none of it.

    Returns
    -------
    The artifact, each part checked against the Spec and all against the checksum.

    Raises
    ------
    ArtifactError
        For a truncated, changed or foreign file, and one whose network would take more memory than the
        file warrants (over 256 MiB only at 32 times its length); the message says what is wrong.
    FileNotFoundError
    """
    try:
        data = _bytes(path)
        document, arrays = _contents(data)
        return _artifact(document, arrays, len(data))
    except (ArtifactError, EncodingError, SpecError) as error:
        raise ArtifactError(f"{path}: {error}") from None
    except RecursionError:
        raise ArtifactError(f"{path}: the metadata are nested too deeply") from None


def _bytes(path: str | Path) -> bytes:
    if Path(path).exists() and not Path(path).is_file():
        raise ArtifactError("a folder or device, no file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(8), "little")
        if size > LARGEST_FILE:
            raise ArtifactError(f"{size} bytes long: artifacts have at most {LARGEST_FILE}")
        if size < 8 or header > min(size - 8, LARGEST_HEADER):
            raise ArtifactError(
                f"truncated or no safetensors file: {size} bytes, {header} of them claimed by its header"
            )
        file.seek(0)
        return file.read(LARGEST_FILE)


def _contents(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata and tensors of a safetensors file, once the checksum agrees."""
    try:
        stored = safetensors.deserialize(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["artifact"])
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"truncated or no safetensors file: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ArtifactError(
            "a safetensors file, but no artifact: its metadata have no 'artifact' in JSON"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"a safetensors file, but no artifact of format {FORMAT!r}")
    if set(document) != ENTRIES:
        raise ArtifactError(
            f"the metadata have the entries {sorted(document)!s:.200}: {sorted(ENTRIES)} are needed"
        )
    arrays = {}
    for name, tensor in stored:
        dtype = {"U8": np.uint8, "F32": np.dtype("<f4")}.get(tensor["dtype"])
        if dtype is None or len(tensor["shape"]) != 1:
            raise ArtifactError(
                f"{name!r:.80} is {tensor['dtype']} of shape {tensor['shape']!s:.80}: foreign"
            )
        arrays[name] = np.frombuffer(tensor["data"], dtype)
    if document["sha256"] != _sha256(document, arrays):
        raise ArtifactError("the checksum differs: the file was changed or damaged")
    return document, arrays


def _artifact(document: Mapping, arrays: Mapping[str, np.ndarray], nbytes: int) -> Artifact:
    spec = Spec.from_json(json.dumps(document["spec"]))
    blocks = sum(map(len, spec.stages))
    if blocks > MOST_BLOCKS:
        raise ArtifactError(f"the Spec has {blocks} blocks: at most {MOST_BLOCKS} are read")
    pixels = max(spec.size, *(block.stride for _, block in models.named_blocks(spec)))
    if pixels > LARGEST_SIZE:
        raise ArtifactError(
            f"the Spec has a size or stride of {pixels} pixels: at most {LARGEST_SIZE} are read"
        )
    # Memory for constant weights is all that a file gets without bytes for it.
    size = 4 * models.parameters(spec)
    if size > min(4096 * nbytes, max(32 * nbytes, 2**28)):
        raise ArtifactError(f"the network would take {size} bytes, more than {nbytes} bytes of file warrant")
    _check_preprocessing(document, spec)

    lengths = _lengths(spec)
    flat = _array(arrays, "batch_norm_and_bias", np.float32, sum(lengths.values()))
    pieces = torch.from_numpy(flat).split(list(lengths.values()))
    tensors = {name: piece.clone() for name, piece in zip(lengths, pieces, strict=True)}
    _check_tensors(tensors, lengths)

    ranges = {}
    if "activation_scale" in arrays:
        places = _places(spec)
        scales = _array(arrays, "activation_scale", np.float32, len(places))
        zeros = _array(arrays, "activation_zero_point", np.uint8, len(places))
        ranges = dict(zip(places, zip(scales.tolist(), zeros.tolist(), strict=True), strict=True))
        _check_ranges(ranges)

    streams = _streams(document, arrays, spec)
    known = {"batch_norm_and_bias"} | ({"activation_scale", "activation_zero_point"} if ranges else set())
    known |= {stream for _, found in streams.values() for stream in found}
    if set(arrays) != known:
        raise ArtifactError(f"tensors {sorted(set(arrays) ^ known)!s:.200} are missing or belong to nothing")
    weights = {}
    for name, (description, found) in streams.items():
        try:
            weights[name] = encoding.unpack(description, found)
        except EncodingError as error:
            raise ArtifactError(f"{name}: {error}") from None
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
        streams={name: {s: v.size for s, v in found.items()} for name, (_, found) in streams.items()},
    )


def _streams(
    document: Mapping, arrays: Mapping[str, np.ndarray], spec: Spec
) -> dict[str, tuple[dict, dict[str, np.ndarray]]]:
    """Layer name -> its description and its streams, cut out of those of all layers."""
    descriptions, entries, layers = document["encodings"], document["weights"], models.layers(spec)
    if not isinstance(descriptions, list) or not all(isinstance(d, dict) for d in descriptions):
        raise ArtifactError("'encodings' is no list of descriptions")
    if not isinstance(entries, list) or len(entries) != len(layers):
        raise ArtifactError(f"'weights' is no list of {len(layers)} entries, one for each layer of the Spec")
    used: dict[str, int] = {}
    streams = {}
    for layer, entry in zip(layers, entries, strict=True):
        numbers = isinstance(entry, list) and all(type(n) is int and n >= 0 for n in entry)
        if not numbers or not entry or entry[0] >= len(descriptions):
            raise ArtifactError(f"{layer.name}: {entry!r:.80} names none of {len(descriptions)} encodings")
        description = {**descriptions[entry[0]], "shape": list(layer.weight_shape)}
        encoding.check_description(description)
        names = encoding.stream_names(description)
        if len(entry) != 1 + len(names):
            raise ArtifactError(
                f"{layer.name}: {len(entry) - 1} lengths given for the streams {', '.join(names)}"
            )
        found = {}
        for stream, length in zip(names, entry[1:], strict=True):
            start = used.get(stream, 0)
            found[stream] = arrays.get(stream, _NOTHING)[start : start + length]
            if found[stream].size != length or found[stream].dtype != np.uint8:
                raise ArtifactError(f"{layer.name}: the stream {stream!r} is missing or too short")
            used[stream] = start + length
        streams[layer.name] = description, found
    for stream, length in used.items():
        if stream not in arrays or arrays[stream].size != length:
            raise ArtifactError(f"the stream {stream!r} has not the {length} bytes that its layers claim")
    return streams


_NOTHING = np.zeros(0, np.uint8)


def _array(arrays: Mapping[str, np.ndarray], name: str, dtype: type, size: int) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.size != size:
        found = "missing" if array is None else f"{array.dtype} of length {array.size}"
        raise ArtifactError(f"{name} is {found}: the Spec needs {np.dtype(dtype)} of length {size}")
    return array.astype(dtype)


def _lengths(spec: Spec) -> dict[str, int]:
    """Names and lengths of the state_dict's tensors that are no weights of layers."""
    lengths = {}
    for layer in models.layers(spec):
        names = [f"{layer.batch_norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        lengths |= dict.fromkeys(names if layer.batch_norm else [f"{layer.name}.bias"], layer.out_channels)
    return lengths


def _places(spec: Spec) -> list[str]:
    with torch.device("meta"):
        return list(models.activations(models.ResNet(spec)))


def _check_tensors(tensors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (lengths[name],):
            raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}: the Spec needs ({lengths[name]},)")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} holds NaN or infinity")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ArtifactError(f"{name} holds negative variances")


def _check_ranges(ranges: Mapping[str, tuple[float, int]]) -> None:
    for name, (scale, zero_point) in ranges.items():
        if not 0 < scale < math.inf or not 0 <= zero_point <= 255:
            raise ArtifactError(
                f"{name} has scale {scale} and zero-point {zero_point}: a positive finite scale and a "
                "zero-point from 0 to 255 are needed"
            )


_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def _check_preprocessing(document: Mapping, spec: Spec) -> None:
    for entry, lowest in (("mean", -_LARGEST_FLOAT), ("std", 0.0)):
        values = document[entry]
        numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
        if (
            not numbers
            or len(values) != spec.channels
            or not all(lowest < v < _LARGEST_FLOAT for v in values)
        ):
            raise ArtifactError(
                f"{entry} is {values!r:.80}: {spec.channels} finite{' positive' if lowest == 0 else ''} "
                "numbers are needed, one for each channel"
            )
    classes = document["classes"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != spec.classes:
        raise ArtifactError(f"classes is {classes!r:.80}: {spec.classes} names are needed")


# --- Using --------------------------------------------------------------------------------------


def network(artifact: Artifact, *, trainable: bool = False) -> models.ResNet:
    """The network of an artifact.

    Parameters
    ----------
    trainable : False for plain decoded weights in evaluation mode. True for training mode with masks,
        quantizers and codebooks attached again, so that zeros stay zeros and `save` writes codes again.
        Scales are then fixed, even if they were learned; a codebook's levels are trained.

    Returns
    -------
    A network whose logits in evaluation mode are bit for bit those of the network that was saved (with
    dtype float16: of that network rounded), given the same memory format and number of threads.
    """
    with torch.device("meta"):
        model = models.ResNet(artifact.spec)
    state = {f"{name}.weight": encoding.decode(weight).clone() for name, weight in artifact.weights.items()}
    state |= {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    counters = (name for name in model.state_dict() if name.endswith("num_batches_tracked"))
    state |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
    model.load_state_dict(state, assign=True)
    for name, place in models.activations(model).items():
        if artifact.ranges:
            place.scale, place.zero_point = artifact.ranges[name]
    if trainable:
        for name, weight in artifact.weights.items():
            encoding.attach(model.get_submodule(name), weight)
    return model.train(trainable)


def load(path: str | Path, *, trainable: bool = False) -> models.ResNet:
    """`network` of `read`."""
    return network(read(path), trainable=trainable)


def fp32_bytes(spec: Spec) -> int:
    """Length of the safetensors file of a Spec's float32 state_dict: the size that ratios refer to."""
    with torch.device("meta"):
        state = models.ResNet(spec).state_dict()
    header, end = {}, 0
    for name in sorted(state, key=lambda name: (-state[name].element_size(), name)):
        start, end = end, end + state[name].numel() * state[name].element_size()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[state[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(state[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + math.ceil(len(text) / 8) * 8 + end
