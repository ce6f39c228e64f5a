"""What each notebook measures, and its candidates: configurations with their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnc_utils import configurations, rows
from nnc_utils.configurations import Built, Configuration

BASELINE = "01_baseline"
TECHNIQUES = {  # notebook -> column `technique` of its controls, and the modules that declare its methods
    "00_the_usual_recipe": ("", ()),
    "01_baseline": ("baseline", ("baseline",)),
    "02_quantization": ("quantization", ("baseline", "quantization")),
    "03_pruning": ("pruning", ("pruning",)),
    "04_distillation": ("distillation", ("distillation",)),
    "05_architecture_search": ("search", ("search",)),
    "06_pipeline": ("baseline", ("pipeline",)),
    "07_deployment": ("", ()),
    "08_federated_learning": ("federated", ("federated",)),
    "09_transfer_learning": ("transfer", ("transfer",)),
}
NEEDS = {"01_baseline": (), "07_deployment": ("01_baseline", "02_quantization", "03_pruning")}  # else 01
FIRST_TASK = {"dataset": "digits:0-4", "width": 0.25, "augment": True}  # of 01, in place of its defaults
NEEDS |= {"09_transfer_learning": {"01_baseline": FIRST_TASK}}
BUILDERS = {"pipeline": "nnc_utils.pipeline", "baseline": "nnc_utils.baseline"}
BUILDERS |= {"transfer": "nnc_utils.transfer.build"}
CONTROLLED = ("02_quantization", "03_pruning", "06_pipeline")  # held against the dense network trained on
TRAINING = {  # what all shards of a notebook's benchmark share, since they have one rival
    "03_pruning": ("train_epochs", "learning_rate"),
    "06_pipeline": ("prune_epochs", "quantize_epochs", "distill_epochs", "learning_rate", "batch_size"),
}
LISTS = ("configurations", "controls", "peers")  # parameters that hold mappings


@dataclass(frozen=True)
class Candidate:
    """A configuration's file, and what training it took."""

    configuration: Configuration
    built: Built
    path: Path
    bytes: int
    macs: int
    is_open: bool  # retrained, or another architecture: the open division

    @property
    def control(self) -> str:
        """The column `control` of its row."""
        return rows.AFTER + self.built.stage if self.built.stage else self.configuration.control


def label(configuration: Configuration, stage: str = "") -> str:
    """How the files of a run are named: method, settings, and the stage behind which it was saved."""
    return " ".join(filter(None, [configuration.method, configuration.key, stage and rows.AFTER + stage]))


def title(row: Any) -> str:
    """What a row is called, in plain words: its configuration, and if it is a stage or an attempt."""
    named, control = configurations.of_row(row["method"], row["settings"]).title, row["control"]
    stage = control.startswith(rows.AFTER) or control == rows.ATTEMPT
    return named + (f" ({control.replace('_', ' ')})" if stage else "")
