"""What 03 measures: a model per method of pruning, and its rivals."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nnc_utils.baseline import DenseFinetuned, SmallDense  # noqa: F401, methods of this notebook
from nnc_utils.configurations import Configuration, Share, Times

SCANNED = (0.5, 0.8, 0.9, 0.95, 0.98)  # shares of zeros that the sensitivity scan measures
SCORES = {"random": "chance", "magnitude": "magnitude", "gradient": "gradient", "taylor": "Taylor"}
SCORES |= {"obd_fisher": "OBD (Fisher)", "obd_hessian": "OBD (Hessian)", "fisher": "Fisher"}
SCORES |= {"inputs": "magnitude × input", "obs": "OBS"}
SCORES |= {"l1": "L1 norm", "l2": "L2 norm", "bn_scale": "batch-norm scale"}
RULES = {"hand": "a rule of thumb", "uniform": "{percent:g} %", "scan": "a scan, {percent:g} % in all"}
Schedule = Literal["one_shot", "iterative", "gradual"]


class Pruned(Configuration):
    """What all methods of this folder share: how the network is trained behind the removal."""

    technique: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    added: ClassVar[dict[str, Any]] = {
        "normalize": {"isomorphic": "isomorphic groups"},
        "uniform": "uniform",
        "schedule": {"iterative": "iterative", "gradual": "gradual"},
        "compensate": "compensated",
        "correct": "reconstructed",
        "train": {"finetune": "fine-tuned", "distill": "distilled"},
        "reestimate": "batch-norm re-estimated",
        "int8": "int8",
    }
    counted: ClassVar[str] = "macs"  # the race
    train: Literal["none", "finetune", "distill"] = "none"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if getattr(self, "schedule", "one_shot") != "one_shot" and not self.trains:
            raise ValueError("a schedule trains between its steps: train is 'finetune' or 'distill'")
        if self.method == "layerwise" and (self.sparsity is None) != (self.rule == "hand"):
            raise ValueError("rule 'hand' has its own shares of zeros; the others need a sparsity")
        if self.method == "layerwise" and self.rule == "scan" and self.sparsity not in SCANNED:
            raise ValueError(f"rule 'scan' needs a sparsity of {', '.join(map(str, SCANNED))}")
        return self

    @property
    def trains(self) -> bool:
        return self.train != "none"

    @property
    def control(self) -> str:
        return "random" if getattr(self, "score", "") == "random" else ""

    @property
    def race(self) -> str:
        return "" if self.control or getattr(self, "int8", False) else self.counted

    def words(self) -> dict[str, Any]:
        values = dict(self) | {"percent": 100 * (getattr(self, "sparsity", None) or 0)}
        by = SCORES.get(values.get("score")) or RULES.get(values.get("rule"), "").format(**values)
        return values | {"by": by}


class Masked(Pruned):
    """Weights set to zero; batch-norm may be re-estimated behind it."""

    counted: ClassVar[str] = "bytes"
    reestimate: bool = False


class Weights(Masked):
    method: Literal["weights"] = "weights"
    what: ClassVar[str] = "{percent:g} % zeros by {by}"
    score: Literal["magnitude", "random", "gradient", "taylor", "obd_fisher", "obd_hessian"] = "magnitude"
    sparsity: Share
    schedule: Schedule = "one_shot"


class Layerwise(Masked):
    method: Literal["layerwise"] = "layerwise"
    what: ClassVar[str] = "zeros for each layer by {by}"
    rule: Literal["hand", "uniform", "scan"]
    sparsity: Share | None = None


class Reconstruct(Masked):
    """Layers lose as much as by magnitude; their weights that stay are corrected by least squares."""

    method: Literal["reconstruct"] = "reconstruct"
    what: ClassVar[str] = "{percent:g} % zeros by {by}, reconstructed"
    score: Literal["obs", "magnitude", "inputs"] = "obs"  # of the corrected weights, inside a layer
    sparsity: Share


class Obs(Masked):
    """Reconstruction in one round: scored once, removed at once, the rest corrected."""

    method: Literal["obs"] = "obs"
    what: ClassVar[str] = "{percent:g} % zeros, Optimal Brain Surgeon"
    sparsity: Share


class TwoOfFour(Masked):
    method: Literal["two_of_four"] = "two_of_four"
    what: ClassVar[str] = "2:4 zeros"
    correct: bool = False  # the weights that stay, by least squares


class Channels(Pruned):
    method: Literal["channels"] = "channels"
    what: ClassVar[str] = "{macs:g}× fewer MACs, channels by {by}"
    score: Literal["random", "l1", "l2", "bn_scale", "taylor", "fisher"] = "fisher"
    macs: Times
    compensate: bool = False  # the layers that read a removed channel make up for it by least squares
    normalize: Literal["group", "isomorphic"] = "group"  # what scores are compared with
    uniform: bool = False  # the same share of every group
    schedule: Schedule = "one_shot"
    int8: bool = False  # rounded to 7 bits at the end


class Blocks(Pruned):
    method: Literal["blocks"] = "blocks"
    what: ClassVar[str] = "{removed} blocks removed"
    removed: int = Field(ge=1)


class TorchPruning(Pruned):
    method: Literal["torch_pruning"] = "torch_pruning"
    technique: ClassVar[str] = "peer"
    counted: ClassVar[str] = ""
    what: ClassVar[str] = "{macs:g}× fewer MACs, Torch-Pruning by {by}"
    score: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    macs: Times
    uniform: bool = False


class FromScratch(Configuration):
    """The architecture of `channels` with as many MACs, trained from new weights."""

    method: Literal["from_scratch"] = "from_scratch"
    control: ClassVar[str] = "from_scratch"
    what: ClassVar[str] = "{macs:g}× fewer MACs, the pruned architecture from scratch"
    technique: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    macs: Times
