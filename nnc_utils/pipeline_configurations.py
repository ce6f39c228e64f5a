"""What 06 measures: pipelines as lists of stages, their rivals, and other tools at the same budgets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nnc_utils.baseline import DenseFinetuned, SmallDense  # noqa: F401, methods of this notebook
from nnc_utils.configurations import Bits, Configuration, Price, Share, Times
from nnc_utils.pruning.configurations import TorchPruning  # noqa: F401, the same
from nnc_utils.quantization.configurations import Compressor  # noqa: F401, the same

Stage = Literal["prune", "distill", "quantize", "narrow"]
Milliseconds = Annotated[float, Field(gt=0, lt=1e6)]


class Rounded(Configuration):
    """The budget of a stage that rounds: bits, times smaller, or a price; and the teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"training", "calibration", "teacher"})
    added: ClassVar[dict[str, Any]] = {
        "family": {"three_stage": "a three-stage ResNet"},
        "macs": "{macs:g}× fewer MACs",
        "latency_ms": "{latency_ms:g} ms",
        "sparsity": "{percent:g} % zeros",
        "bits": "{bits:g} bits",
        "size": "{size:g}× smaller",
        "lambda_": "λ = {lambda_:g}",
        "ensemble": "distilled from all seeds",
    }
    bits: Bits | None = None
    size: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None  # times smaller
    lambda_: Price | None = None  # loss for a bit
    ensemble: bool = False  # the baselines of all seeds are the teacher

    @property
    def title(self) -> str:
        return f"{self.what.format(**self.words())}: {', '.join(self.additions())}"


class Pipeline(Rounded):
    """Stages in their order, with one budget for each kind."""

    method: Literal["pipeline"] = "pipeline"
    technique: ClassVar[str] = "pipeline"
    race: ClassVar[str] = "bytes"
    what: ClassVar[str] = "{in_order}"
    stages: tuple[Stage, ...] = ("prune", "distill", "quantize")
    macs: Times | None = None
    latency_ms: Milliseconds | None = None
    family: Literal["narrow_resnet18", "three_stage"] = (
        "narrow_resnet18"  # of the stage narrow, as SmallDense's
    )
    sparsity: Share | None = None  # of the weights that are left

    @model_validator(mode="after")
    def _budgets(self) -> Pipeline:
        stages, faults = set(self.stages), []
        if len(stages) != len(self.stages) or {"prune", "narrow"} <= stages or not stages:
            faults.append("stages: some of prune, distill, quantize, narrow; not prune and narrow both")
        wanted = {"prune or narrow": ("macs", "latency_ms"), "quantize": ("bits", "size", "lambda_")}
        for stage, budgets in wanted.items():
            is_there = bool(stages & set(stage.split(" or ")))
            if sum(getattr(self, name) is not None for name in budgets) != is_there:
                needed = f"needs one of {', '.join(budgets)}"
                faults.append(f"{stage} {needed if is_there else 'is missing for ' + ' and '.join(budgets)}")
        if self.sparsity is not None and "prune" not in stages:
            faults.append("sparsity belongs to the stage prune")
        if self.family == "three_stage" and "narrow" not in stages:
            faults.append("family belongs to the stage narrow")
        if self.ensemble and "distill" not in stages:
            faults.append("ensemble is the teacher of the stage distill")
        if self.lambda_ and self.stages == ("quantize",):
            faults.append("lambda_ rounds without training: a pipeline of it alone is hessian_rounding of 02")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def words(self) -> dict[str, Any]:
        return dict(self) | {"in_order": " → ".join(self.stages), "percent": 100 * (self.sparsity or 0)}


class FoundNetwork(Rounded):
    """The network of 05, distilled and rounded like a pipeline."""

    method: Literal["searched"] = "searched"
    technique: ClassVar[str] = "baseline"
    control: ClassVar[str] = "searched"
    what: ClassVar[str] = "the network that 05 found"


class TorchPruningNncf(Configuration):
    """Torch-Pruning, fine-tuned, then NNCF's int8."""

    method: Literal["torch_pruning_nncf"] = "torch_pruning_nncf"
    technique: ClassVar[str] = "peer"
    needs: ClassVar[frozenset[str]] = frozenset({"training", "calibration"})
    what: ClassVar[str] = "{macs:g}× fewer MACs, Torch-Pruning, then NNCF int8"
    macs: Times


class NncodecPruned(Configuration):
    """NNCodec on the pruned and distilled network, before it is rounded."""

    method: Literal["nncodec_pruned"] = "nncodec_pruned"
    technique: ClassVar[str] = "peer"
    needs: ClassVar[frozenset[str]] = frozenset({"training", "teacher"})
    what: ClassVar[str] = "{macs:g}× fewer MACs, distilled, NNCodec step {qp}"
    macs: Times
    qp: int = Field(ge=-60, le=0)
    ensemble: bool = False
