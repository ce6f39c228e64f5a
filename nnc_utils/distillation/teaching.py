"""A student's loss for `training.fit` with a teacher in it, who looks beside it or has looked before."""

from __future__ import annotations

import copy
import functools
import json
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.data import Data, Split
from nnc_utils.distillation import soft_labels
from nnc_utils.distillation.attention import attention_transfer
from nnc_utils.distillation.features import check_stages, hint, outputs, similarity
from nnc_utils.training import (
    Loss,
    data_digest,
    default_device,
    fast_bf16,
    network_digest,
    progress,
    recordable,
)

STAGES = ("layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Recipe:
    """What a student learns from its teacher, and how much each part weighs.

    ``(1 - alpha) * cross-entropy + alpha * soft labels + attention * ... + hints * ... + similarity * ...``

    Parameters
    ----------
    soft : "kd", "dkd" or "" for none; see `soft_labels`.
    alpha : weight of the soft labels, in [0, 1]; what is left is the label term's.
    temperature : of the soft labels, above 0.
    others : weight of the classes that are not the label's, for "dkd".
    attention, hints, similarity : weights, 0 or more; of the sum over `stages`, of `similarity` at the last.
    stages : whose outputs are compared.
    shuffled : each picture gets the teaching of another one of its batch; a control that must not help.
    """

    soft: str = "kd"
    alpha: float = 0.9
    temperature: float = 4.0
    others: float = 8.0
    attention: float = 0.0
    hints: float = 0.0
    similarity: float = 0.0
    stages: tuple[str, ...] = STAGES
    shuffled: bool = False

    def __post_init__(self) -> None:
        if self.soft not in ("kd", "dkd", ""):
            raise ValueError(f"soft is {self.soft!r}: one of 'kd', 'dkd', or '' for no soft labels")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}: the share of the soft labels, in [0, 1], is needed")
        soft_labels.check_temperature(self.temperature)
        for name in ("others", "attention", "hints", "similarity"):
            if not 0 <= getattr(self, name) < torch.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: a weight of 0 or more is needed")

    @property
    def compared(self) -> tuple[str, ...]:
        """The stages whose outputs are needed."""
        if self.attention or self.hints:
            return self.stages
        return self.stages[-1:] if self.similarity else ()


class Ensemble(nn.Module):
    """Several networks as one teacher: the mean of their logits."""

    def __init__(self, networks: Sequence[models.ResNet]) -> None:
        super().__init__()
        for network in networks[1:]:
            _check_pair(networks[0].spec, network.spec)
        self.networks, self.spec = nn.ModuleList(networks), networks[0].spec

    def forward(self, images: Tensor) -> Tensor:
        """Logits (images, classes)."""
        return torch.stack([network(images).float() for network in self.networks]).mean(0)


def taught_by(teacher: nn.Module, recipe: Recipe, student: models.Spec) -> Loss:
    """The loss of a student whose teacher looks at every batch beside it.

    Parameters
    ----------
    teacher : never changed: a copy of it, made at the first batch, teaches in eval mode where the student is
        trained. Its forward pass is part of the cost of each step.
    recipe : what is learned.
    student : the student's Spec. For hints the model given to `fit` is `features.WithRegressors`.

    Raises
    ------
    ValueError
        Where the two have other classes or pictures, a stage that is compared is missing, or features of an
        ensemble are asked for.
    """
    _check_pair(teacher.spec, student)
    stages = check_stages(teacher.spec, check_stages(student, recipe.compared))
    if stages and isinstance(teacher, Ensemble):
        raise ValueError("an ensemble has logits only: use soft labels, or one teacher for features")

    @functools.cache
    def there(device: torch.device) -> nn.Module:
        return copy.deepcopy(teacher).eval().to(device=device, memory_format=torch.channels_last)

    @recordable
    def taught(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if recipe.hints and not hasattr(model, "regressors"):
            raise ValueError("hints need a regressor at each stage: give features.WithRegressors to fit")
        guide = there(images.device)
        with torch.inference_mode():
            teacher_logits, theirs = outputs(guide, images, stages)
        # inference tensors cannot take part in a backward pass, their copies can
        teacher_logits, theirs = teacher_logits.float().clone(), {n: f.clone() for n, f in theirs.items()}
        if recipe.shuffled:
            places = _others(images)
            teacher_logits, theirs = teacher_logits[places], {n: f[places] for n, f in theirs.items()}
        student_logits, ours = outputs(model, images, stages)
        regressed = {n: model.regressors[n](ours[n]) for n in stages} if recipe.hints else {}
        with torch.autocast(images.device.type, enabled=False):  # sums over features, in fp32
            about = {"student_logits": student_logits.float(), "teacher_logits": teacher_logits}
            value = soft_and_hard(recipe, labels=labels, **about)
            for stage in stages:
                pair = {"student": ours[stage], "teacher": theirs[stage]}
                if recipe.attention:
                    value = value + recipe.attention * attention_transfer(**pair)
                if recipe.hints:
                    value = value + recipe.hints * hint(student=regressed[stage], teacher=theirs[stage])
                if recipe.similarity and stage == stages[-1]:
                    value = value + recipe.similarity * similarity(**pair)
        return value

    return taught


def soft_and_hard(
    recipe: Recipe, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
) -> Tensor:
    """The label term and the soft labels of a recipe, mean over the images.

    Parameters
    ----------
    student_logits, teacher_logits : float (images, classes).
    labels : int64 (images,).
    """
    hard = functional.cross_entropy(student_logits, labels)
    if not recipe.soft:
        return hard
    about = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    about["temperature"] = recipe.temperature
    if recipe.soft == "kd":
        soft = soft_labels.kd(**about)
    else:
        soft = soft_labels.dkd(labels=labels, others=recipe.others, **about)
    return (1 - recipe.alpha) * hard + recipe.alpha * soft


def smoothed(smoothing: float) -> Loss:
    """Cross-entropy with smoothed labels (Szegedy et al., 2016): what soft labels are without a teacher."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing!r}: a share in [0, 1) is needed")

    @recordable
    def label_smoothing(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    return label_smoothing


# --- A teacher that has looked before -----------------------------------------------------------


@dataclass(frozen=True)
class Remembered:
    """Training pictures in fixed augmentations, and what the teacher said of each.

    Parameters
    ----------
    pictures : a data set for `fit`, with `augment=False`: its training labels are row numbers of the two
        tensors, so that pictures and teaching cannot part, however they are shuffled.
    logits : the teacher's, float16 (rows, classes).
    labels : the true classes, int64 (rows,).
    copies : augmentations of each picture; an epoch over them is so many over the data set.
    seconds : that the teacher looked for.
    """

    pictures: Data
    logits: Tensor
    labels: Tensor
    copies: int
    seconds: float


def remember(
    teacher: nn.Module,
    pictures: Data,
    *,
    copies: int = 8,
    augment: bool = True,
    seed: int = 0,
    batch_size: int = 512,
    file: str | Path | None = None,
) -> Remembered:
    """Let the teacher look once at each picture in several fixed augmentations.

    Students then train at their own speed, however large the teacher; they see `copies` augmentations instead
    of ever new ones.

    Parameters
    ----------
    teacher : put into eval mode.
    pictures : the training split is used.
    copies : 1 or more; memory and the teacher's time grow with it.
    augment : without, all copies are the pictures as they are: one is enough.
    seed : of the augmentations, drawn batch by batch.
    batch_size : pictures at once.
    file : in which the logits are kept, by `numpy.savez`; where it exists, the teacher does not look again.

    Raises
    ------
    ValueError
        For fewer copies than one, or where `file` is of another teacher, pictures or augmentation, or none of
        this function.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}: at least one augmentation of each picture is needed")
    call = [network_digest(teacher), data_digest(pictures)]
    call += [copies, augment, seed, batch_size]
    kept = _kept(Path(file), call) if file and Path(file).exists() else None
    generator = torch.Generator().manual_seed(seed)
    every = pictures.train.images.repeat(copies, 1, 1, 1).split(batch_size)
    images = [pictures.augment(batch, generator) if augment else batch for batch in every]
    logits, seconds = kept or _look(teacher, pictures, images)
    if file and not kept:
        partial = Path(f"{file}.partial")
        with partial.open("wb") as opened:  # by name numpy would add a suffix
            np.savez(opened, logits=logits.numpy(), seconds=seconds, call=json.dumps(call))
        os.replace(partial, file)
    labels = pictures.train.labels.repeat(copies)
    train = Split(torch.cat(images), torch.arange(len(labels)))
    return Remembered(replace(pictures, train=train), logits, labels, copies, seconds)


def _look(teacher: nn.Module, pictures: Data, batches: Sequence[Tensor]) -> tuple[Tensor, float]:
    """A teacher's logits, float16, of pictures as they are given, and the seconds that it took."""
    device, home, begin = default_device(), next(teacher.parameters()).device, time.perf_counter()
    teacher.eval().to(device=device, memory_format=torch.channels_last)
    said = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
        for batch in progress(batches, "the teacher looks"):
            shown = pictures.normalize(batch.to(device)).to(memory_format=torch.channels_last)
            said.append(teacher(shown).float().half().cpu())
    teacher.to(device=home, memory_format=torch.contiguous_format)
    return torch.cat(said), time.perf_counter() - begin


def _kept(file: Path, call: list) -> tuple[Tensor, float]:
    """What an earlier call of `remember` kept."""
    try:
        with np.load(file) as kept:
            found, logits, seconds = json.loads(str(kept["call"])), kept["logits"], float(kept["seconds"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} holds no logits of a teacher ({error}): delete it or name another"
        ) from None
    if found != call:
        raise ValueError(f"{file} is of another teacher, pictures or augmentation: delete it or name another")
    return torch.from_numpy(logits), seconds


def taught_from(memory: Remembered, recipe: Recipe, student: models.Spec) -> Loss:
    """The loss of a student on `memory.pictures`, by the teacher's stored logits.

    Raises
    ------
    ValueError
        For a recipe that compares features, which are not stored, or a student of other classes; in training
        for pictures that were augmented once more, which the teacher never saw.
    """
    if recipe.compared:
        raise ValueError("features are not stored: use taught_by for attention, hints and similarity")
    if memory.logits.shape[1] != student.classes:
        raise ValueError(
            f"the teacher has {memory.logits.shape[1]} classes, the student {student.classes}: "
            "the same classes are needed"
        )

    @functools.cache
    def there(device: torch.device) -> tuple[Tensor, Tensor]:
        return memory.logits.to(device), memory.labels.to(device)

    looked = False

    @recordable
    def taught(model: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
        nonlocal looked
        if not looked or images.device.type == "cpu":  # elsewhere each look would wait for the device
            shown = memory.pictures.normalize(memory.pictures.train.images[rows.cpu()].to(images.device))
            if not torch.equal(shown, images):
                raise ValueError("the teacher saw other pictures: fit on memory.pictures with augment=False")
            looked = True
        said, truths = there(images.device)
        teacher_logits = said[rows].float()
        if recipe.shuffled:
            teacher_logits = teacher_logits[_others(images)]
        truth = truths[rows]
        logits = model(images).float()
        return soft_and_hard(recipe, student_logits=logits, teacher_logits=teacher_logits, labels=truth)

    return taught


def _others(images: Tensor) -> Tensor:
    """For each picture of a batch the place of another one, whose teaching it gets."""
    count, device = len(images), images.device
    if count < 2:
        raise ValueError("one picture a batch cannot get another one's teaching")
    return (torch.arange(count, device=device) - torch.randint(1, count, (1,), device=device)) % count


def _check_pair(teacher: models.Spec, student: models.Spec) -> None:
    for field in ("classes", "channels", "size"):
        theirs, ours = getattr(teacher, field), getattr(student, field)
        if theirs != ours:
            raise ValueError(
                f"the teacher has {theirs} {field}, the student {ours}: the same {field} are needed"
            )
