"""A student's loss for `training.fit`: by an online teacher, or by cached teacher logits."""

from __future__ import annotations

import copy
import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nnc_utils import models
from nnc_utils.data import Data, Split
from nnc_utils.distillation import soft_labels
from nnc_utils.distillation.attention import attention_transfer
from nnc_utils.distillation.features import check_stages, hint, outputs, similarity
from nnc_utils.training import Loss, data_digest, default_device, fast_bf16, network_digest, progress

STAGES = ("layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Recipe:
    """What a student learns from its teacher, and how much each part weighs.

    ``(1 - alpha) * cross-entropy + alpha * gain * soft labels + attention * ... + hints * ...`` and so on
    """

    soft: str = "kd"  # or "dkd", "dist", or "" for none; see `soft_labels`
    alpha: float = 0.9  # weight of the soft labels, in [0, 1]; what is left is the label term's
    temperature: float = 4.0
    standardize: bool = False  # for "kd": of logits with mean 0 and deviation 1; gradients are smaller then,
    gain: float = 1.0  # and need a factor; Sun et al. (2024) weigh 0.1 and 9: alpha 0.9 and gain 10
    others: float = 8.0  # for "dkd": weight of the classes that are not the label's
    inter: float = 2.0  # for "dist": weight of the correlation over an image's classes,
    intra: float = 2.0  # and over a class's images
    attention: float = 0.0  # weight of the sum over `stages`
    hints: float = 0.0  # the same
    similarity: float = 0.0  # weight at the last of `stages`
    stages: tuple[str, ...] = STAGES  # whose outputs are compared
    shuffled: bool = False  # control that must not help: the teacher's output on another image of the batch

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


def online(teacher: nn.Module, recipe: Recipe, student: models.Spec) -> Loss:
    """The loss of a student with an online teacher: its forward pass is part of each step.

    A copy of the teacher, made at the first batch, teaches in eval mode where the student is trained. For
    hints the model to train is `features.WithRegressors`. A ValueError says where teacher, recipe and student
    do not fit.
    """
    _check_pair(teacher.spec, student)
    stages = check_stages(teacher.spec, check_stages(student, recipe.compared))
    if stages and isinstance(teacher, Ensemble):
        raise ValueError("an ensemble has logits only: use soft labels, or one teacher for features")

    @functools.cache
    def teacher_on(device: torch.device) -> nn.Module:
        return copy.deepcopy(teacher).eval().to(device=device, memory_format=torch.channels_last)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if recipe.hints and not hasattr(model, "regressors"):
            raise ValueError("hints need a regressor at each stage: give features.WithRegressors to fit")
        with torch.no_grad():
            teacher_logits, theirs = outputs(teacher_on(images.device), images, stages)
        if recipe.shuffled:
            places = _other_places(images)
            teacher_logits, theirs = teacher_logits[places], {n: f[places] for n, f in theirs.items()}
        student_logits, ours = outputs(model, images, stages)
        regressed = {n: model.regressors[n](ours[n]) for n in stages} if recipe.hints else {}
        with torch.autocast(images.device.type, enabled=False):  # sums over features, in fp32
            pair = {"student_logits": student_logits.float(), "teacher_logits": teacher_logits.float()}
            value = _of_logits(recipe, labels=labels, **pair)
            for stage in stages:
                pair = {"student": ours[stage], "teacher": theirs[stage]}
                if recipe.attention:
                    value = value + recipe.attention * attention_transfer(**pair)
                if recipe.hints:
                    value = value + recipe.hints * hint(student=regressed[stage], teacher=theirs[stage])
                if recipe.similarity and stage == stages[-1]:
                    value = value + recipe.similarity * similarity(**pair)
        return value

    return loss


def _of_logits(recipe: Recipe, *, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The label term and the soft labels of a recipe, mean over the images; logits (images, classes)."""
    hard = functional.cross_entropy(student_logits, labels)
    if not recipe.soft:
        return hard
    soft = {
        "kd": functools.partial(soft_labels.kd, standardize=recipe.standardize),
        "dkd": functools.partial(soft_labels.dkd, labels=labels, others=recipe.others),
        "dist": functools.partial(soft_labels.dist, inter=recipe.inter, intra=recipe.intra),
    }[recipe.soft]
    pair = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    value = soft(**pair, temperature=recipe.temperature)
    return (1 - recipe.alpha) * hard + recipe.alpha * recipe.gain * value


def smoothed(smoothing: float) -> Loss:
    """Cross-entropy with smoothed labels (Szegedy et al., 2016): what soft labels are without a teacher."""

    def label_smoothing(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    return label_smoothing


@dataclass(frozen=True)
class CachedLogits:
    """Training images in fixed augmentations, and the teacher's logits of each.

    The training labels of `images` are row numbers of the two tensors, so that images and logits cannot part.
    """

    images: Data  # for `fit` with augment=False
    logits: Tensor  # the teacher's, float16 (rows, classes)
    labels: Tensor  # the true classes, int64 (rows,)
    seconds: float  # that the teacher took


def cache_logits(
    teacher: nn.Module, images: Data, *, copies=8, augment=True, seed=0, batch_size=512, file=None
) -> CachedLogits:
    """The teacher's logits, computed once for each training image in `copies` fixed augmentations.

    Students then train at their own speed, however large the teacher, but see no other augmentations.

    Parameters
    ----------
    seed, batch_size : of the augmentations, drawn batch by batch.
    file : a Path that keeps the logits (safetensors); where it exists, the teacher computes nothing, and a
        ValueError says where it is of another teacher, images or augmentation.
    """
    call = json.dumps([network_digest(teacher), data_digest(images), copies, augment, seed, batch_size])
    generator = torch.Generator().manual_seed(seed)
    batches = images.train.images.repeat(copies, 1, 1, 1).split(batch_size)
    batches = [images.augment(batch, generator) if augment else batch for batch in batches]
    if file and file.exists():
        logits, seconds = _read(file, call)
    else:
        logits, seconds = _logits(teacher, images, batches)
        if file:
            kept = {"call": call, "seconds": repr(seconds)}
            draft = f"{file}.{os.getpid()}.partial"  # other runs may compute the same
            save_file({"logits": logits}, draft, metadata=kept)
            os.replace(draft, file)
    labels = images.train.labels.repeat(copies)
    train = Split(torch.cat(batches), torch.arange(len(labels)))
    return CachedLogits(replace(images, train=train), logits, labels, seconds)


def logits_name(teacher: nn.Module, copies: int, seed: int) -> str:
    """The name of the file that keeps a teacher's logits of so many copies of each image."""
    return f"teacher_logits_{network_digest(teacher)}_{copies}_copies_seed_{seed}.safetensors"


def _logits(teacher: nn.Module, images: Data, batches: Sequence[Tensor]) -> tuple[Tensor, float]:
    """A teacher's logits of batches of images, float16 (images, classes), and the seconds that it took."""
    device, begin, logits = default_device(), time.perf_counter(), []
    teacher = copy.deepcopy(teacher).eval().to(device=device, memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
        for batch in progress(batches, "teacher"):
            batch = images.normalize(batch.to(device)).to(memory_format=torch.channels_last)
            logits.append(teacher(batch).float().half().cpu())
    return torch.cat(logits), time.perf_counter() - begin


def _read(file: Path, call: str) -> tuple[Tensor, float]:
    """The logits and the seconds that an earlier `cache_logits` with the same arguments wrote."""
    with safe_open(file, "pt") as opened:
        if (kept := opened.metadata() or {}).get("call") != call:
            raise ValueError(f"{file} holds no logits of this teacher, images and augmentation: delete it")
        return opened.get_tensor("logits"), float(kept["seconds"])


def cached(memory: CachedLogits, recipe: Recipe, student: models.Spec) -> Loss:
    """The loss of a student on `memory.images`, by cached logits; a ValueError for a recipe of features.

    In training it also refuses images that are augmented once more.
    """
    if recipe.compared:
        raise ValueError("features are not stored: use online for attention, hints and similarity")
    if (classes := memory.logits.shape[1]) != student.classes:
        raise ValueError(f"the teacher has {classes} classes, the student {student.classes}")
    there: list[Tensor] = []  # logits and labels, on the training device

    def loss(model: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
        if not there:  # at the first batch only: on an accelerator each look would wait for it
            shown = memory.images.normalize(memory.images.train.images[rows.cpu()].to(images.device))
            if not torch.equal(shown, images):
                raise ValueError("the teacher saw other images: fit on memory.images with augment=False")
            there.extend([memory.logits.to(images.device), memory.labels.to(images.device)])
        logits, labels = there
        teacher_logits = logits[rows].float()
        if recipe.shuffled:
            teacher_logits = teacher_logits[_other_places(images)]
        pair = {"student_logits": model(images).float(), "teacher_logits": teacher_logits}
        return _of_logits(recipe, labels=labels[rows], **pair)

    return loss


def _other_places(images: Tensor) -> Tensor:
    """For each image of a batch the place of another one, whose logits it gets."""
    count, device = len(images), images.device
    return (torch.arange(count, device=device) - torch.randint(1, count, (1,), device=device)) % count


def _check_pair(teacher: models.Spec, student: models.Spec) -> None:
    for field in ("classes", "channels", "size"):
        if (theirs := getattr(teacher, field)) != (ours := getattr(student, field)):
            raise ValueError(f"the teacher has {theirs} {field}, the student {ours}: both need the same")
