"""What 08 measures: federated averaging with what each direction may send."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from nnc_utils.configurations import Bits, Configuration, read
from nnc_utils.federated.compress import Compressor

Part = Annotated[float, Field(gt=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1000)]


class FedAvg(Configuration):
    """Clients whose classes differ, and what they and the server send: float32 where neither is given.

    What keeps what it did not send (the server, and with `feedback` the clients) rounds to nearest; clients
    without `feedback` round stochastically, so that their average is right.
    """

    method: Literal["fedavg"] = "fedavg"
    technique: ClassVar[str] = "federated"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    what: ClassVar[str] = "FedAvg, Dirichlet {dirichlet:g}: {sent} up, {got} down"
    dirichlet: Spread  # small: a client has few of the classes
    bits: Bits | None = None
    share: Part = 1.0  # of each weight's entries
    feedback: bool = False
    down_bits: Bits | None = None
    down_share: Part = 1.0

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.feedback and self.bits is None and self.share == 1:
            raise ValueError("feedback: float32 leaves nothing to be sent later; it goes with bits or share")
        return self

    @property
    def run(self) -> FedAvg:
        """What is run: this."""
        return self

    @property
    def up(self) -> Compressor:
        """What clients do with an update."""
        return Compressor(self.bits, self.share, "nearest" if self.feedback else "stochastic")

    @property
    def down(self) -> Compressor:
        """What the server does with a step."""
        rounding = "stochastic" if (self.down_bits, self.down_share) == (None, 1) else "nearest"
        return Compressor(self.down_bits, self.down_share, rounding)

    @property
    def control(self) -> str:
        return "fedavg_fp32" if self.up == self.down == Compressor() else ""

    def words(self) -> dict[str, Any]:
        sent = _words(self.bits, self.share) + (" with feedback" if self.feedback else "")
        return dict(self) | {"sent": sent, "got": _words(self.down_bits, self.down_share)}


class EqualBytes(Configuration):
    """The control of a compressed run: float32, and as many rounds as its bytes pay for."""

    method: Literal["fedavg_equal_bytes"] = "fedavg_equal_bytes"
    technique: ClassVar[str] = "federated"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    control: ClassVar[str] = "equal_bytes"
    what: ClassVar[str] = "fp32 for the bytes of: {compressed}"
    of: dict[str, Any]

    @field_validator("of")
    @classmethod
    def _known(cls, of: dict[str, Any]) -> dict[str, Any]:
        [configuration] = read([of], "federated")
        if configuration.method != "fedavg" or configuration.control:
            raise ValueError("a fedavg that compresses something is needed")
        return configuration.mapping()

    @property
    def compressed(self) -> FedAvg:
        """The run whose bytes it may send."""
        return read([self.of], "federated")[0]

    @property
    def run(self) -> FedAvg:
        """What is run: float32 on the same images."""
        return FedAvg(dirichlet=self.compressed.dirichlet)

    def words(self) -> dict[str, Any]:
        return dict(self) | {"compressed": self.compressed.title}


class Flower(Configuration):
    """The same rounds in float32 by Flower's own processes."""

    method: Literal["flower"] = "flower"
    technique: ClassVar[str] = "peer"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    what: ClassVar[str] = "Flower, Dirichlet {dirichlet:g}: fp32 up, fp32 down"
    dirichlet: Spread

    @property
    def run(self) -> FedAvg:
        """What is run: float32."""
        return FedAvg(dirichlet=self.dirichlet)


def _words(bits: int | None, share: float) -> str:
    number = f"{bits} bits" if bits else "fp32"
    return f"{100 * share:g} % × {number}" if share < 1 else number
