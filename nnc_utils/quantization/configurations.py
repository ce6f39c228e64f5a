"""What 02 measures: a model per method of quantization, and the tools beside it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from nnc_utils.configurations import Bits, Configuration, Price, one_of, read

WIDTHS = (2, 3, 4, 8)  # bits among which mixed precision chooses


class Quantized(Configuration):
    """What all methods of this folder share."""

    technique: ClassVar[str] = "quantization"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    added: ClassVar[dict[str, Any]] = {
        "hessian": {True: "Hessian-weighted k-means", False: "k-means"},
        "train": {"finetune": "fine-tuned"},
        "one_sided": "one-sided",
        "activations": {"float": "float activations"},
        "quantizer": {"lsq": "learned steps (LSQ)", "ste": "fixed steps"},
        "rdo": "rdo",
        "reestimate": "batch-norm re-estimated",
    }

    @property
    def race(self) -> str:
        return "" if self.control else "bytes"


class Rounded(Quantized):
    """Without training; batch-norm may be re-estimated behind the rounding."""

    reestimate: bool = False


class Uniform(Rounded):
    """Weights rounded to equal steps."""

    method: Literal["uniform"] = "uniform"
    granularity: Literal["channel", "tensor"] = "channel"
    bits: Bits | None = None
    levels: Literal[3, 5, 7, 9, 11, 13, 15] | None = None
    _exclusive = model_validator(mode="after")(one_of("bits", "levels"))

    @property
    def what(self) -> str:
        return (
            "{bits}-bit weights" if self.bits else "weights of {levels} levels"
        ) + ", one scale a {granularity}"


class KMeans(Rounded):
    """Weights replaced by the nearest entry of a codebook; `hessian` weights their errors.

    train "finetune": the entries are trained on, and batch-norm, which is re-estimated before.
    """

    method: Literal["kmeans"] = "kmeans"
    what: ClassVar[str] = "{bits}-bit codebook"
    bits: Bits
    hessian: bool = False
    train: Literal["none", "finetune"] = "none"

    @property
    def trains(self) -> bool:
        return self.train != "none"

    @model_validator(mode="after")
    def _once(self) -> KMeans:
        if self.trains and self.reestimate:
            raise ValueError("fine-tuning re-estimates batch-norm anyway: omit reestimate")
        return self


class MixedPrecision(Rounded):
    """Each layer gets its own number of bits."""

    method: Literal["mixed_precision"] = "mixed_precision"
    budget_bits: Literal[3, 4, 8] | None = None
    budget_levels: Literal[5] | None = None
    rule: Literal["hand"] | None = None
    _exclusive = model_validator(mode="after")(one_of("budget_bits", "budget_levels", "rule"))

    @property
    def control(self) -> str:
        return "hand_rule" if self.rule else ""

    @property
    def what(self) -> str:
        budget = "{budget_bits} bits" if self.budget_bits else "{budget_levels} levels"
        return "bits by a rule of thumb" if self.rule else f"bits for each layer within the bytes of {budget}"


class HessianRounding(Rounded):
    """Weights rounded to where loss and bits together cost least."""

    method: Literal["hessian_rounding"] = "hessian_rounding"
    what: ClassVar[str] = "second-order rounding, λ = {lambda_:g}"
    lambda_: Price  # loss for a bit
    activations: Literal["int8", "float"] = "int8"
    one_sided: bool = False  # knows nothing of how the rows' errors add up

    @property
    def control(self) -> str:
        return "one_sided" if self.one_sided else ""


class Qat(Quantized):
    """Quantization-aware training."""

    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "training"})
    method: Literal["qat"] = "qat"
    what: ClassVar[str] = "{bits}-bit quantization-aware training"
    quantizer: Literal["lsq", "ste"] = "lsq"
    bits: Bits


class Tool(Quantized):
    """A production counterpart: it writes a file of its own, which its runtime reads."""

    technique: ClassVar[str] = "peer"
    race: ClassVar[str] = ""


class OrtStatic(Tool):
    method: Literal["ort_static"] = "ort_static"
    what: ClassVar[str] = "ONNX Runtime's static quantization, {activations} activations"
    activations: Literal["uint8", "int8"] = "uint8"


class NncfPtq(Tool):
    method: Literal["nncf_ptq"] = "nncf_ptq"
    what: ClassVar[str] = "NNCF post-training quantization"


class TorchaoPt2e(Tool):
    method: Literal["torchao_pt2e"] = "torchao_pt2e"
    what: ClassVar[str] = "torchao PT2E quantization"


class Nncodec(Tool):
    """NNCodec, the reference software of ISO/IEC 15938-17."""

    method: Literal["nncodec"] = "nncodec"
    what: ClassVar[str] = "NNCodec, step {qp}"
    qp: int = Field(ge=-60, le=0)
    reestimate: bool = False
    rdo: bool = False  # its rate–distortion optimization


class Compressor(Tool):
    """A general compressor, of the codes of another configuration's file."""

    method: Literal["gzip", "xz", "zstd"]
    what: ClassVar[str] = "{method} of: {compressed}"
    of: dict[str, Any]

    @field_validator("of")
    @classmethod
    def _known(cls, of: dict[str, Any]) -> dict[str, Any]:
        return read([of], "quantization", "pipeline")[0].mapping()

    def words(self) -> dict[str, Any]:
        return dict(self) | {"compressed": read([self.of], "quantization", "pipeline")[0].title}
