"""The one training loop: every technique brings a network and a loss."""

from __future__ import annotations

import contextlib
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
    """One pass over the training images.

    Parameters
    ----------
    epoch : counted from 1.
    loss : mean over the steps.
    learning_rate : of the first step.
    validation : accuracy on the validation split in percent; None when not asked for.
    images : training images seen.
    seconds : spent in training steps; validation and checkpoint are not counted.
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


def recordable(loss: Loss) -> Loss:
    """Mark a loss whose every call is the same sequence of tensor operations; see `_Steps`.

    It takes no number from a tensor (as `float` does), draws nothing in Python and never branches on values.
    """
    loss.recordable = True
    return loss


@recordable
def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of a batch: what `fit` lowers unless it is given another loss."""
    return functional.cross_entropy(model(images).float(), labels)


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 in hardware; an emulation would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


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
    """Train a network: SGD with Nesterov momentum and one cycle of the learning rate (Smith, 2018).

    The network is changed in place and ends in eval mode, on the device it came from.
    Parametrizations (masks, quantizers) stay: it is the tensors behind them that are trained.

    Parameters
    ----------
    model : any module that gives logits (batch, classes); its parameters that require a gradient
        are trained, one-dimensional ones (biases, batch-norm) without weight decay.
    data : the training split is used, the validation split where `validate` asks for it.
    epochs : passes over the training images; the last may be a part of one.
    loss : (model, images, labels) -> scalar. The images are normalized float32 in channels-last
        order on the training device. Randomness from torch's global generator is seeded by epoch.
        A second network in it, such as a teacher, has to be on `default_device()` or `device`.
    learning_rate : peak of the cycle, after 30 % of the steps; it begins at 1/25 of that.
    batch_size : images in a step. The last, incomplete batch of an epoch is dropped.
    augment : random crop, and flip where the data allows it.
    validate : measure the validation accuracy after each epoch.
    seed : of order and augmentation, which in epoch e depend on nothing but (seed, e).
    device : where to train; `default_device()` unless given. bf16 autocast is used where the
        hardware has bf16, fp32 elsewhere.
    checkpoint : file written after each epoch. Where it exists, training goes on behind its last
        epoch and ends bit for bit as if it had not been interrupted (same machine and threads; some
        CUDA kernels vary by themselves); at the last epoch it only loads. The call must be the same
        and start from the same weights. What a loss holds cannot be compared: one file a call.
    threads : of the processor, for the length of the call.

    Raises
    ------
    TrainingError
        When the loss or the weights stop being finite, or `checkpoint` is of another call.
    ValueError
        When an argument is out of its range, or the network is for other data.
    """
    call = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "augment": augment,
        "validate": validate,
        "seed": seed,
        "loss": getattr(loss, "__qualname__", type(loss).__name__),
    }
    _check(model, data, call, threads)
    if checkpoint:
        call |= {"starting network": network_digest(model), "training data": data_digest(data)}
    device = torch.device(device) if device else default_device()
    home = next(model.parameters()).device
    steps = len(data.train.labels) // batch_size
    total = round(epochs * steps)

    with _threads(threads):
        model.to(device=device, memory_format=torch.channels_last)
        optimizer = _sgd(model, learning_rate, momentum, weight_decay)
        schedule = OneCycleLR(optimizer, learning_rate, total_steps=total, cycle_momentum=False)
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        history = History()
        if checkpoint and Path(checkpoint).exists():
            history = _resume(Path(checkpoint), call, parts)
        step = _Steps(model, loss, optimizer, device)
        bar = _bar(total * batch_size, history.images)
        try:
            for epoch in range(len(history) + 1, math.ceil(total / steps) + 1):
                left = min(steps, total - (epoch - 1) * steps)
                losses = _Losses(f"epoch {epoch} of {epochs:g}", left, 1 if device.type == "cpu" else 50)
                rate = float(schedule.get_last_lr()[0])
                model.train()
                started = said = time.perf_counter()
                with _seeded(seed, epoch, device):
                    drawn = batches(data, epoch, seed, batch_size, augment, device)
                    for images, labels in itertools.islice(drawn, left):
                        losses.add(step(images, labels), schedule.get_last_lr()[0])
                        schedule.step()
                        bar.update(batch_size)
                        said = _say(bar, losses, said)
                losses.check_weights(model)
                seconds = time.perf_counter() - started
                validation = _validation(model, data) if validate else None
                history.append(Epoch(epoch, losses.mean, rate, validation, left * batch_size, seconds))
                if checkpoint:
                    _save(Path(checkpoint), call, parts, history)
                _report(bar, history[-1], epochs)
        finally:
            bar.close()
            model.eval().to(device=home, memory_format=torch.contiguous_format)
    return history


# --- Batches ------------------------------------------------------------------------------------


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def batches(
    data: Data, epoch: int, seed: int, batch_size: int, augment: bool, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of one epoch; the same for the same (seed, epoch), whatever ran before.

    Drawn and shifted as uint8 on the processor, normalized on the device, images in channels-last
    order. The last, incomplete batch is dropped.
    """
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
    order = torch.randperm(len(data.train.labels), generator=generator)
    for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
        images = data.train.images[chosen]
        if augment:
            images = data.augment(images, generator)
        images = data.normalize(_sent(images, device)).to(memory_format=torch.channels_last)
        yield images, _sent(data.train.labels[chosen], device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the processor on a device; from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- Inside a step ------------------------------------------------------------------------------


def _sgd(model: nn.Module, rate: float, momentum: float, decay: float) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One pass over the memory instead of several: a third of the time of a step of the default.
    return torch.optim.SGD(
        [group for group in groups if group["params"]], rate, momentum, nesterov=True, fused=True
    )


def _precision(device: torch.device) -> contextlib.AbstractContextManager:
    if fast_bf16(device):
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=device.type != "cuda")
    return contextlib.nullcontext()


class _Steps:
    """Steps of a training. On CUDA one is recorded and from then on replayed, if the loss is `recordable`.

    A step of these networks is hundreds of small kernels, and to launch them one by one takes longer than to
    compute them. A recording works on fixed places in memory: pictures, labels and the learning rate are put
    there.
    """

    EAGER = 3  # steps that come before: what is made at the first use has to exist

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: torch.optim.SGD, device: torch.device
    ) -> None:
        self.model, self.loss, self.optimizer, self.device = model, loss, optimizer, device
        self.recording: torch.cuda.CUDAGraph | None = None
        self.eager = math.inf
        if device.type == "cuda" and getattr(loss, "recordable", False):
            self.eager, self.stream = self.EAGER, torch.cuda.Stream()
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take a step, and return its loss."""
        if self.eager == math.inf:
            return self._step(images, labels)
        if self.eager:
            self.eager -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                value = self._step(images, labels)
            torch.cuda.current_stream().wait_stream(self.stream)
            return value
        if self.recording is None:
            self.images, self.labels = images.clone(), labels.clone()
            self.recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.recording):
                self.value = self._step(self.images, self.labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.recording.replay()
        return self.value.clone()

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with _precision(self.device):
            value = self.loss(self.model, images, labels)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return value.detach()


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for an epoch (a loss may draw from them); put them back after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_epoch_seed(seed, epoch))
        yield


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Losses:
    """The losses of an epoch, looked at every few steps: each look waits for the device."""

    def __init__(self, where: str, steps: int, every: int) -> None:
        self.where, self.steps, self.every = where, steps, every
        self.values: list[float] = []
        self.waiting: list[tuple[Tensor, float]] = []

    def add(self, value: Tensor, rate: float) -> None:
        self.waiting.append((value, rate))
        if len(self.waiting) == self.every or len(self.values) + len(self.waiting) == self.steps:
            found = torch.stack([value for value, _ in self.waiting]).tolist()
            for number, (_, rate) in zip(found, self.waiting, strict=True):
                self.values.append(number)
                if not math.isfinite(number):
                    step = f"step {len(self.values)} of {self.steps}"
                    raise self._diverged(f"{self.where}, {step}: the loss is {number}", rate)
            self.rate = rate
            self.waiting.clear()

    def check_weights(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(
                    f"{self.where}, after step {self.steps}: {name} is not finite", self.rate
                )

    @staticmethod
    def _diverged(what: str, rate: float) -> TrainingError:
        return TrainingError(
            f"{what} (learning rate {rate:.4g}): training has diverged; lower learning_rate, "
            "or look for a division by zero or a logarithm of zero in the loss"
        )

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


# --- What is seen of it -------------------------------------------------------------------------


def _validation(model: nn.Module, data: Data) -> float:
    predictions = evaluation.predict(model, data.validation, normalize=data.normalize)
    return evaluation.accuracy(predictions, data.validation.labels)


def _hidden() -> bool:
    """Whether no bar is wanted: neither a notebook nor a terminal, or TQDM_DISABLE is set."""
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    quiet = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return quiet or not (notebook or sys.stderr.isatty())


def progress(steps: Iterable, what: str) -> Iterable:
    """The steps, with a bar where one is wanted."""
    return tqdm(steps, desc=what, leave=False, disable=_hidden())


def _bar(images: int, done: int) -> tqdm:
    """A bar in a notebook and on a terminal; elsewhere none, and a line an epoch instead."""
    return tqdm(total=images, initial=done, unit=" images", disable=_hidden())


def _say(bar: tqdm, losses: _Losses, said: float) -> float:
    """Where no bar is shown, a line a minute; returns when the last one was."""
    now = time.perf_counter()
    if not bar.disable or now - said < 60:
        return said
    print(f"{losses.where}: step {len(losses.values)} of {losses.steps}", flush=True)
    return now


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
    """Which training pictures they are, and how they are normalized and augmented."""
    images, labels = data.train.images, data.train.labels
    about = {"mean": data.mean, "std": data.std, "flip": data.flip, "shift": data.shift}
    return _digest({"images": images, "labels": labels} | about)


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


def _resume(path: Path, call: dict[str, object], parts: dict[str, object]) -> History:
    remedy = "delete the file to train from the start, or give this call a file of its own"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs, records = saved["call"], saved["history"]
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of training ({type(error).__name__}): {remedy}"
        ) from error
    if theirs != call:
        differ = [
            f"{name} is {theirs.get(name)!r} there and {call.get(name)!r} here"
            for name in {**call, **theirs}
            if theirs.get(name) != call.get(name)
        ]
        raise TrainingError(f"{path} is a checkpoint of another call, {', '.join(differ)}: {remedy}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return History(Epoch(**record) for record in records)


# --- Arguments ----------------------------------------------------------------------------------


def _check(model: nn.Module, data: Data, call: dict[str, object], threads: int | None) -> None:
    images = len(data.train.labels)
    whole = {name: call[name] for name in ("batch_size", "seed")}
    whole |= {} if threads is None else {"threads": threads}
    for name, value in whole.items():
        least = 0 if name == "seed" else 1
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}: a whole number of at least {least} is needed")
    if call["batch_size"] > images:
        raise ValueError(
            f"batch_size is {call['batch_size']}, {data.name} has {images} training images: "
            "not one batch can be filled, lower batch_size"
        )
    least = call["batch_size"] / images  # one step
    for name, fits, allowed in (
        ("epochs", lambda value: least <= value < math.inf, f"a number of at least {least:.3g}, one step,"),
        ("learning_rate", lambda value: 0 < value < math.inf, "a number above 0"),
        ("weight_decay", lambda value: 0 <= value < math.inf, "0 or a number above"),
        ("momentum", lambda value: 0 < value < 1, "a number between 0 and 1"),
    ):
        if not (isinstance(call[name], int | float) and fits(call[name])):
            raise ValueError(f"{name} is {call[name]!r}: {allowed} is needed")
    spec = getattr(model, "spec", None)
    if spec and (spec.channels, spec.classes) != (data.channels, len(data.classes)):
        raise ValueError(
            f"the network has {spec.channels} channels and {spec.classes} classes, the data set {data.name} "
            f"{data.channels} channels and {len(data.classes)} classes: build a Spec for this data set"
        )
