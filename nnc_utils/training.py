"""The one training loop: every technique brings a network and a loss."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from nnc_utils import evaluation, models
from nnc_utils.data import Data
from nnc_utils.devices import default_device

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class TrainingError(RuntimeError):
    """Training that cannot go on: a loss that is not finite, or a checkpoint of another call."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, counted from 1.

    `loss` is the mean over the steps, `learning_rate` the first step's, `validation` the accuracy on it in
    percent or None, `images` how many were seen; `seconds` is without validation and checkpoint.
    """

    epoch: int
    loss: float
    learning_rate: float
    validation: float | None
    images: int
    seconds: float


class History(list[Epoch]):
    """The epochs of one call of `fit`, also those before it was interrupted."""

    @property
    def images(self) -> int:
        """Training images seen."""
        return sum(epoch.images for epoch in self)

    @property
    def seconds(self) -> float:
        """Seconds spent in training steps."""
        return sum(epoch.seconds for epoch in self)

    def to_frame(self) -> pd.DataFrame:
        """One row an epoch, the fields of `Epoch` as columns."""
        columns = [field.name for field in dataclasses.fields(Epoch)]
        return pd.DataFrame([dataclasses.asdict(epoch) for epoch in self], columns=columns)


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of a batch: what `fit` lowers unless it is given another loss."""
    return functional.cross_entropy(model(images).float(), labels)


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 in hardware; an emulation would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: float,
    loss: Loss = cross_entropy,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    augment: bool = True,
    validate: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    threads: int | None = None,
) -> History:
    """Train a network in place: SGD with Nesterov momentum and one cycle of the learning rate (Smith, 2018).

    It ends in eval mode, on the device it came from. Parametrizations (masks, quantizers) stay: it is the
    tensors behind them that are trained. Parameters that require no gradient stay as they are;
    one-dimensional ones (biases, batch-norm) are trained without weight decay.

    Parameters
    ----------
    epochs : passes over the training images; the last may be a part of one.
    loss : (model, images, labels) -> scalar. The images are normalized float32 in channels-last order on the
        training device, where a teacher in the loss has to be, too. torch's generator is seeded by epoch.
    learning_rate : peak of the cycle, after 30 % of the steps; it begins at 1/25 of that.
    batch_size : images in a step; the last, incomplete batch of an epoch is dropped.
    augment : random crop, and flip where the data allows it.
    validate : measure the validation accuracy after each epoch.
    seed : of order and augmentation, which in epoch e depend on nothing but (seed, e).
    device : `default_device()` when None. bf16 autocast where the hardware has bf16, fp32 elsewhere.
    checkpoint : file written after each epoch. Where it exists, training goes on behind its last epoch and
        ends bit for bit as if it had not been interrupted (same machine and threads; some CUDA kernels vary
        by themselves). The call must be the same and start from the same weights: a TrainingError says what
        differs. What a loss holds cannot be compared: one file a call.
    threads : of the processor, for the length of the call.
    """
    call = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    call |= {"weight_decay": weight_decay, "momentum": momentum, "augment": augment, "validate": validate}
    call["loss"] = getattr(loss, "__qualname__", type(loss).__name__)
    _check(model, data, call)
    if checkpoint:
        call |= {"starting network": network_digest(model), "training data": data_digest(data)}
    device = torch.device(device) if device else default_device()
    home = next(model.parameters()).device
    steps = len(data.train.labels) // batch_size
    total = round(epochs * steps)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    model.to(device=device, memory_format=torch.channels_last)
    try:
        optimizer = _sgd(model, learning_rate, momentum, weight_decay)
        schedule = OneCycleLR(optimizer, learning_rate, total_steps=total, cycle_momentum=False)
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        history = _resume(checkpoint, call, parts) if checkpoint and Path(checkpoint).exists() else History()
        with tqdm(total=total * batch_size, initial=history.images, unit=" images", disable=_hidden()) as bar:
            for epoch in range(len(history) + 1, math.ceil(total / steps) + 1):
                epoch_steps = min(steps, total - (epoch - 1) * steps)
                rate, started = float(schedule.get_last_lr()[0]), time.perf_counter()
                model.train()
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(_epoch_seed(seed, epoch))  # a loss may draw from it
                    drawn = batches(data, epoch, seed, batch_size, augment, device)
                    drawn = itertools.islice(drawn, epoch_steps)
                    mean = _steps(
                        model, loss, optimizer, schedule, drawn, f"epoch {epoch} of {epochs:g}", bar
                    )
                seconds = time.perf_counter() - started
                accuracy = None
                if validate:
                    predictions = evaluation.predict(model, data.validation, normalize=data.normalize)
                    accuracy = evaluation.accuracy(predictions, data.validation.labels)
                history.append(Epoch(epoch, mean, rate, accuracy, epoch_steps * batch_size, seconds))
                if checkpoint:
                    _save(Path(checkpoint), call, parts, history)
                _report(bar, history[-1], epochs)
    finally:
        torch.set_num_threads(threads_before)
        model.eval().to(device=home, memory_format=torch.contiguous_format)
    return history


def _steps(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.SGD,
    schedule: OneCycleLR,
    drawn: Iterable[tuple[Tensor, Tensor]],
    where: str,
    bar: tqdm,
) -> float:
    """The steps of an epoch; returns their mean loss, or raises a TrainingError where one is not finite."""
    losses, said = [], time.perf_counter()
    for images, labels in drawn:
        device, rate = images.device.type, schedule.get_last_lr()[0]
        with torch.autocast(device, torch.bfloat16, enabled=fast_bf16(images.device)):
            value = loss(model, images, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
        if device == "cpu" or len(losses) % 50 == 0:  # an accelerator would have to wait at each step
            _check_finite({f"the loss of step {len(losses)}": losses[-1]}, where, rate)
        bar.update(len(images))
        if bar.disable and time.perf_counter() - said > 60:  # no bar is shown: a line a minute
            said = time.perf_counter()
            print(f"{where}: step {len(losses)}", flush=True)
    _check_finite({f"the loss of step {i}": value for i, value in enumerate(losses, 1)}, where, rate)
    _check_finite(dict(model.named_parameters()), where, rate)
    numbers = torch.stack(losses).tolist()
    return sum(numbers) / len(numbers)


def _check_finite(tensors: dict[str, Tensor], where: str, rate: float) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TrainingError(
                f"{where}: {name} is not finite (learning rate {rate:.4g}): training has diverged; lower "
                "learning_rate, or look for a division by zero or a logarithm of zero in the loss"
            )


def _check(model: nn.Module, data: Data, call: dict[str, object]) -> None:
    images, size = len(data.train.labels), call["batch_size"]
    if not 1 <= size <= images:
        raise ValueError(f"batch_size is {size}: from 1 to {data.name}'s {images} training images are needed")
    if not size / images <= call["epochs"] < math.inf:
        raise ValueError(f"epochs is {call['epochs']}: {size / images:.3g}, one step, or more is needed")
    if not 0 < call["learning_rate"] < math.inf:
        raise ValueError(f"learning_rate is {call['learning_rate']}: a number above 0 is needed")
    spec = getattr(model, "spec", None)
    if spec and (spec.channels, spec.classes) != (data.channels, len(data.classes)):
        raise ValueError(
            f"the network has {spec.channels} channels and {spec.classes} classes, the data set {data.name} "
            f"{data.channels} channels and {len(data.classes)} classes: build a Spec for this data set"
        )


# --- Inside a step ------------------------------------------------------------------------------


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def batches(
    data: Data, epoch: int, seed: int, batch_size: int, augment: bool, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of one epoch; the same for the same (seed, epoch), whatever ran before.

    Drawn and shifted as uint8 on the processor, normalized on the device, in channels-last order.
    """
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
    order = torch.randperm(len(data.train.labels), generator=generator)
    for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
        images, labels = data.train.images[chosen], data.train.labels[chosen]
        if augment:
            images = data.augment(images, generator)
        if device.type == "cuda":  # from pinned memory, so that nobody waits for the copy
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        yield data.normalize(images).to(memory_format=torch.channels_last), labels


def _sgd(model: nn.Module, rate: float, momentum: float, decay: float) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # fused: one pass over the memory instead of several, a third of the time of a step of the default
    return torch.optim.SGD(groups, rate, momentum, nesterov=True, fused=True)


# --- What is seen of it -------------------------------------------------------------------------


def _hidden() -> bool:
    """Whether no bar is wanted: neither a notebook nor a terminal, or TQDM_DISABLE is set."""
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    quiet = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return quiet or not (notebook or sys.stderr.isatty())


def progress(steps: Iterable, what: str) -> Iterable:
    """The steps, with a bar where one is wanted."""
    return tqdm(steps, desc=what, leave=False, disable=_hidden())


def _report(bar: tqdm, record: Epoch, epochs: float) -> None:
    validation = "" if record.validation is None else f"validation {record.validation:.2f} %  "
    line = f"epoch {record.epoch}/{epochs:g}  loss {record.loss:.3f}  {validation}{record.seconds:.1f} s"
    if bar.disable:
        print(line, flush=True)
    else:
        bar.set_description(line)


# --- Checkpoints --------------------------------------------------------------------------------


def _digest(content: dict[str, object]) -> str:
    """The beginning of the SHA-256 of named tensors and plain values."""
    digest = hashlib.sha256()
    for name, value in content.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]


def network_digest(model: nn.Module) -> str:
    """Which network it is: the beginning of a SHA-256 of its state."""
    ranges = {name: (place.scale, place.zero_point) for name, place in models.activations(model).items()}
    return _digest({**model.state_dict(), **ranges})


def data_digest(data: Data) -> str:
    """Which training images they are, and how they are normalized and augmented."""
    settings = {"mean": data.mean, "std": data.std, "flip": data.flip, "shift": data.shift}
    return _digest({"images": data.train.images, "labels": data.train.labels} | settings)


def _save(path: Path, call: dict[str, object], parts: dict[str, object], history: History) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    records = [dataclasses.asdict(epoch) for epoch in history]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save({"call": call, "history": records, **states}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)  # a run killed while it writes leaves the checkpoint before


def _resume(path: str | Path, call: dict[str, object], parts: dict[str, object]) -> History:
    remedy = "delete the file to train from the start, or give this call a file of its own"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs, records = saved["call"], saved["history"]
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of training ({type(error).__name__}): {remedy}"
        ) from error
    differ = [
        f"{name} is {theirs.get(name)!r} there and {call.get(name)!r} here"
        for name in {**call, **theirs}
        if theirs.get(name) != call.get(name)
    ]
    if differ:
        raise TrainingError(f"{path} is a checkpoint of another call, {', '.join(differ)}: {remedy}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return History(Epoch(**record) for record in records)
