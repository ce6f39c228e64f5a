"""Configurations: what a benchmark measures, as typed data.

A configuration is a frozen model with a `method` and its settings. Each technique declares its own in
``<technique>/configurations.py``; profiles, papermill and tables speak in plain mappings::

    {"method": "channels", "score": "fisher", "macs": 4, "compensate": True, "train": "finetune"}
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

MODULES = {  # what a notebook names -> the module that declares it
    "baseline": "nnc_utils.baseline",
    "quantization": "nnc_utils.quantization.configurations",
    "pruning": "nnc_utils.pruning.configurations",
    "distillation": "nnc_utils.distillation.configurations",
    "search": "nnc_utils.search.configurations",
    "pipeline": "nnc_utils.pipeline_configurations",
    "federated": "nnc_utils.federated.configurations",
    "transfer": "nnc_utils.transfer.configurations",
}

Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0, lt=1)]
Times = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Price = Annotated[float, Field(gt=0, lt=1)]


class ConfigurationError(ValueError):
    """Configurations that cannot be measured; the message names every fault of each."""


class Configuration(BaseModel):
    """One operating point. Subclasses give `method` as a Literal with a default, and their settings.

    The title is `what`, then what settings add to it: two tables of words instead of a function a method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    technique: ClassVar[str] = ""  # column `technique` of the tables
    needs: ClassVar[frozenset[str]] = frozenset()  # of "teacher", "calibration", "training"
    control: ClassVar[str] = ""  # the arm of a control experiment that this is; empty for a method
    race: ClassVar[str] = ""  # for a claim: fewest "bytes", "macs" within 0.3 pp, or best "accuracy ..."
    what: ClassVar[str] = ""  # begins the title: a format string of `words`
    added: ClassVar[dict[str, Any]] = {}  # word -> the same where it is not empty, or a text for each value
    method: str

    @property
    def trains(self) -> bool:
        """Whether gradient steps follow the baseline's."""
        return "training" in self.needs

    def words(self) -> dict[str, Any]:
        """What titles are made of: the settings; subclasses add to them."""
        return dict(self)

    def additions(self) -> list[str]:
        """What the words of `added` add to the title, in the order of that table."""
        words = self.words()
        chosen = [
            texts.get(words.get(name), "") if isinstance(texts, dict) else texts if words.get(name) else ""
            for name, texts in self.added.items()
        ]
        return [text.format(**words) for text in chosen if text]

    @property
    def title(self) -> str:
        """What tables and figures call it, in plain words."""
        return ", ".join([self.what.format(**self.words()), *self.additions()])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return self.model_dump(mode="json", by_alias=True, exclude={"method"}, exclude_defaults=True)

    @property
    def key(self) -> str:
        """The column `settings`: JSON with sorted keys."""
        return settings_json(self.settings)

    @property
    def slug(self) -> str:
        """A file name without suffix."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{self.method}_{self.key}").strip("_")

    def mapping(self) -> dict[str, Any]:
        """The plain mapping that `read` gives this configuration for."""
        return {"method": self.method, **_plain(self.settings)}


@dataclass(frozen=True)
class Built:
    """What a `candidates.build` makes of a configuration."""

    network: nn.Module | None  # to save, in eval mode; None where a tool wrote `file`
    train_images: int = 0  # what training saw and took after the baseline, its teacher's looks included
    train_seconds: float = 0.0
    stage: str = ""  # behind which a pipeline's network was saved; empty: the whole configuration
    dtype: torch.dtype = torch.float16  # of the weights and biases that stay floats in the file
    file: Path | None = None  # what a tool wrote,
    source: Path | None = None  # and the artifact that it got
    tool: str = ""


def settings_json(settings: Mapping[str, Any]) -> str:
    """Settings as the tables hold them; whole numbers are written as such, so that 4.0 and 4 are one."""
    plain = {name: _plain(value) for name, value in settings.items()}
    return json.dumps(plain, sort_keys=True, separators=(",", ":")) if plain else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.cache
def registry(*modules: str) -> dict[str, type[Configuration]]:
    """Every method's model by its name, of some `MODULES` or all; no other module is imported."""
    kinds: dict[str, type[Configuration]] = {}
    for name in modules or tuple(MODULES):
        for kind in vars(importlib.import_module(MODULES[name])).values():
            if isinstance(kind, type) and issubclass(kind, Configuration):
                kinds |= dict.fromkeys(getattr(kind.model_fields["method"].annotation, "__args__", ()), kind)
    return kinds


def read(mappings: Iterable[Mapping[str, Any]], *modules: str, repeated=False) -> list[Configuration]:
    """The configurations of mappings with `method` and its settings; `modules` (none: all) allow methods.

    The same twice is a fault unless `repeated`.

    Raises
    ------
    ConfigurationError
        Once, with every fault of every mapping, what is allowed and where.
    """
    known, configurations, faults = registry(*modules), [], []
    for place, mapping in enumerate(mappings, 1):
        method = mapping.get("method") if isinstance(mapping, Mapping) else mapping
        if not isinstance(mapping, Mapping) or method not in known:
            faults.append(f"{place}: {mapping!r}: no method {method!r} here: one of {', '.join(known)}")
            continue
        try:
            configurations.append(known[method].model_validate(dict(mapping)))
        except ValidationError as error:
            faults += [f"{place}: {mapping!r}: {_said(problem)}" for problem in error.errors()]
    names = [f"{one.method} {one.key}".strip() for one in configurations]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1 and not repeated]
    faults += [f"{name} occurs twice" for name in twice]
    if faults:
        raise ConfigurationError("\n  ".join(["these configurations cannot be measured:", *faults]))
    return configurations


def _said(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, not {problem['input']!r}" if where else message


def of_row(method: str, settings: str) -> Configuration:
    """The configuration of a table's row: its method and its JSON column `settings`."""
    loaded = [name for name, module in MODULES.items() if module in sys.modules]
    kinds = registry(*loaded) if method in registry(*loaded) else registry()  # a run notes what it imports
    return kinds[method](method=method, **(json.loads(settings) if settings else {}))


def one_of(*names: str) -> Callable[[Configuration], Configuration]:
    """A rule for `model_validator(mode="after")`: exactly one of these settings is given."""

    def check(self: Configuration) -> Configuration:
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(names)} is needed, not {' and '.join(given) or 'none'}")
        return self

    return check
