"""What a configuration of 08 runs, without processes: plans, rounds for equal bytes, what is kept."""

import subprocess
import types

import pytest
import torch
from small_networks import PLAIN

from nnc_utils import data
from nnc_utils.configurations import read
from nnc_utils.federated import candidates, split
from nnc_utils.federated import plan as plans
from nnc_utils.federated.federation import Outcome
from nnc_utils.runtimes.children import ChildError

SMALL = {"method": "fedavg", "dirichlet": 0.5, "bits": 6, "feedback": True, "down_bits": 5}


class Imagined:
    """A federation whose compressed rounds send a tenth of float32's bytes."""

    made = []

    def __init__(self, images, parts):
        self.parts, self.plans, self.closed, self.ready = parts, [], False, True
        Imagined.made.append(self)

    def run(self, plan, watch):
        self.plans.append(plan)
        self.ready = plan.up.bits not in (2, 3, 8)
        if plan.up.bits == 3:
            raise KeyboardInterrupt
        if plan.up.bits == 2:
            raise ChildError("round 1: no client has answered")
        watch("round 1 of 8: sent")
        watch("round 1 of 8: 3 of 3 clients")
        network = plan.network().eval()
        payload = 4 * len(self.parts) * sum(t.numel() for t in plans.floats(network).values()) * plan.rounds
        sent = payload // (10 if plan.up.bits else 1)
        return Outcome(network, {"up_bytes": sent, "down_bytes": sent, "train_images": 90, "seconds": 1.5})

    def close(self):
        self.closed = True


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "Federation", Imagined)
    monkeypatch.setattr(candidates, "_running", {})
    Imagined.made.clear()
    given = {"clients": 3, "rounds": 40, "width": 0.125, "local_epochs": 2.0, "batch_size": 32}
    parameters = given | {"learning_rate": 0.1}
    dense = types.SimpleNamespace(spec=PLAIN)

    class Bench:
        extra: dict = {}

    own = Bench()
    own.__dict__ |= {"parameters": parameters, "dense": dense, "images": data.load("digits"), "seed": 7}
    own.__dict__ |= {"recipe": {"augment": True}, "path": tmp_path.joinpath, "extra": {}}
    return own


def test_equal_bytes_are_as_many_rounds_in_float32_and_nothing_is_run_twice(bench, capsys):
    small, equal, fp32 = read(
        [SMALL, {"method": "fedavg_equal_bytes", "of": SMALL}, SMALL | {"dirichlet": 2}]
    )
    built = candidates.build(equal, bench)
    first, second = Imagined.made[0].plans
    assert (first.up.bits, first.down.bits, first.rounds, first.feedback) == (6, 5, 40, True)
    assert (second.up.bits, second.down.bits, second.rounds, second.feedback) == (None, None, 4, False)
    assert (first.seed, first.augment, first.local_epochs, first.spec) == (7, True, 2.0, PLAIN)
    assert (built.train_images, built.train_seconds, built.dtype) == (90, 1.5, torch.float32)
    assert "3 of 3 clients" in (said := capsys.readouterr().out) and "sent" not in said
    again = candidates.build(small, bench)
    assert len(Imagined.made[0].plans) == 2, "what had ended is read from its file"
    assert torch.equal(again.network.fc.weight, built.network.fc.weight)
    assert list(bench.extra["federated"]) == [equal.slug, small.slug]
    candidates.build(fp32, bench)
    assert [one.closed for one in Imagined.made] == [True, False], "other parts are other processes"


def test_what_cannot_be_divided_or_ends_early_is_a_value_error(bench):
    wanted = read([SMALL, SMALL | {"bits": 2}])
    candidates.check(wanted[0], bench)
    with pytest.raises(ValueError, match="no client has answered"):
        candidates.build(wanted[1], bench)
    bench.parameters["clients"] = 600
    with pytest.raises(split.SplitError, match="1197 images allow 598"):
        candidates.check(wanted[0], bench)


def test_processes_that_were_interrupted_or_lost_a_client_are_not_used_again(bench):
    interrupted, lossy, whole = read([SMALL | {"bits": bits} for bits in (3, 8, 6)])
    with pytest.raises(KeyboardInterrupt):
        candidates.build(interrupted, bench)
    for configuration in (lossy, whole):
        candidates.build(configuration, bench)
    assert [(one.closed, len(one.plans)) for one in Imagined.made] == [(True, 1), (True, 1), (False, 1)]


def test_flower_that_takes_too_long_costs_no_other_configuration(bench, monkeypatch):
    def late(*given):
        raise subprocess.TimeoutExpired("flwr", 3)

    monkeypatch.setattr(candidates.flower, "run", late)
    with pytest.raises(ValueError, match="timed out after 3 seconds"):
        candidates.build(read([{"method": "flower", "dirichlet": 0.5}])[0], bench)
