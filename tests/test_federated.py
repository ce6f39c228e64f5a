"""Federated averaging without processes: who has what, what is sent, and how it is averaged."""

import socket
import threading

import numpy as np
import pytest
import torch
from small_networks import PLAIN, network

from nnc_utils.configurations import ConfigurationError, read
from nnc_utils.encoding import decode
from nnc_utils.entropy import EncodingError
from nnc_utils.federated import messages, plan, split
from nnc_utils.federated.compress import (
    Compressor,
    Feedback,
    encode,
    from_bytes,
    nearest,
    stochastic,
    to_bytes,
    top,
)

LABELS = torch.arange(1200) % 10


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def heavy(shape, seed=0):
    """Values some of which are far larger than the rest, as updates are."""
    values = torch.randn(shape, generator=draws(seed))
    return values * values.abs() ** 2


# --- Split --------------------------------------------------------------------------------------


def test_every_image_is_one_clients_and_small_alpha_means_few_classes():
    classes = {}
    for alpha in (0.1, 100.0):
        parts = split.dirichlet(LABELS, clients=8, alpha=alpha, seed=3)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(LABELS)))
        assert all((part.diff() > 0).all() for part in parts) and min(map(len, parts)) >= 2
        counts = split.counts(LABELS, parts, 10)
        assert counts.sum(0).tolist() == [120] * 10
        shares = counts / counts.sum(1, keepdim=True)
        classes[alpha] = float((-shares * shares.clamp(min=1e-9).log2()).sum(1).exp2().mean())
    assert classes[0.1] < 0.6 * classes[100.0] and classes[100.0] > 7
    again = split.dirichlet(LABELS, clients=8, alpha=100.0, seed=3)
    other = split.dirichlet(LABELS, clients=8, alpha=100.0, seed=4)
    assert all(map(torch.equal, parts, again)) and not all(map(torch.equal, parts, other))


def test_images_that_cannot_be_divided_are_refused(monkeypatch):
    monkeypatch.setattr(split, "TRIES", 3)
    with pytest.raises(split.SplitError, match="601 clients with 2 images or more: 1200 images allow 600"):
        split.dirichlet(LABELS, clients=601, alpha=1, seed=0)
    with pytest.raises(split.SplitError, match="use a larger alpha, or fewer clients"):
        split.dirichlet(LABELS, clients=400, alpha=0.01, seed=0)
    with pytest.raises(split.SplitError, match="alpha 0: at least 1, and a number above 0"):
        split.dirichlet(LABELS, clients=3, alpha=0, seed=0)


def test_a_file_of_images_is_those_images(tmp_path, digits):
    own = split.Split(digits.train.images[:7], digits.train.labels[:7])
    split.write_images(tmp_path / "own", digits, own)
    found = split.read_images(tmp_path / "own")
    assert torch.equal(found.train.images, own.images) and torch.equal(found.train.labels, own.labels)
    for name in ("name", "classes", "mean", "std", "flip", "shift"):
        assert getattr(found, name) == getattr(digits, name)


@pytest.fixture(scope="module")
def digits():
    from nnc_utils import data

    return data.load("digits")


# --- Compressors --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_right_on_average_and_within_a_step(bits):
    values, generator = heavy(300), draws(1)
    drawn = torch.stack([decode(stochastic(values, bits, generator)) for _ in range(4000)])
    step = values.abs().max() / (2 ** (bits - 1) - 1)
    assert (drawn - values).abs().max() <= step * 1.0001
    assert (
        drawn.mean(0) - values
    ).abs().max() < 5 * step / 2 / 4000**0.5  # a deviation is half a step at most
    assert (decode(nearest(values, bits)) - values).abs().max() <= step / 2 * 1.0001


def test_nearest_contracts_and_two_stochastic_bits_do_not():
    for seed, make in enumerate((heavy, lambda shape, seed: torch.randn(shape, generator=draws(seed)))):
        values = make(5000, seed)
        for bits in (2, 3, 8):
            assert (decode(nearest(values, bits)) - values).norm() < values.norm()
        kept = decode(encode(values.view(50, 100), Compressor(None, 0.1), draws())).flatten()
        assert (kept - values).norm() ** 2 <= 0.9 * values.norm() ** 2
        error = torch.stack([(decode(stochastic(values, 2, draws(s))) - values).norm() for s in range(20)])
        assert (error**2).mean() > values.norm() ** 2


def test_top_keeps_exactly_the_largest():
    values = heavy((40, 25))
    mask, largest = top(values, 0.05), np.sort(np.abs(values.numpy()).ravel())[-50:]
    assert np.array_equal(np.sort(values[mask].abs().numpy()), largest)
    assert top(torch.ones(4, 4), 0.5).sum() == 8 and top(torch.ones(3, 3), 0.01).sum() == 1


def test_feedback_sends_all_in_the_end_if_the_compressor_contracts():
    updates = [{"weight": heavy((60, 50), seed) / 100} for seed in range(40)]
    norms = {}
    for rounding in ("nearest", "stochastic"):
        sender, generator, sent = Feedback(Compressor(2, rounding=rounding)), draws(), 0
        norms[rounding] = []
        for update in updates:
            sent = sent + sender.send(update, generator)[1]["weight"]
            norms[rounding].append(float(sender.residual["weight"].norm()))
        assert torch.allclose(sent + sender.residual["weight"], sum(u["weight"] for u in updates), atol=1e-4)
    assert norms["stochastic"][-1] > 2 * norms["stochastic"][9] > 4 * norms["nearest"][9]
    assert norms["nearest"][-1] < 2 * norms["nearest"][9]


COMPRESSORS = [Compressor(), Compressor(4), Compressor(8, rounding="nearest"), Compressor(4, 0.05, "nearest")]
COMPRESSORS += [Compressor(None, 0.1), Compressor(2)]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_what_is_read_is_what_the_sender_says_and_other_bytes_are_refused(compressor):
    update = {
        "weight": heavy((30, 20, 3, 3)),
        "fc": heavy((10, 30), 1),
        "bias": heavy(10, 2),
        "zero": torch.zeros(4, 4),
    }
    shapes = {name: values.shape for name, values in update.items()}
    body, decoded = to_bytes(update, compressor, draws())
    found = from_bytes(body, shapes, compressor)
    assert list(found) == list(update) and all(torch.equal(found[name], decoded[name]) for name in update)
    if compressor == Compressor():
        assert all(torch.equal(found[name], update[name]) for name in update)
    for broken in (b"", body[:-1], body + b"\0", body[:3], b"\xff" * len(body)):
        with pytest.raises(EncodingError):
            from_bytes(broken, shapes, compressor)
    with pytest.raises(EncodingError):
        to_bytes({"weight": torch.full((3, 3), torch.nan)}, compressor, draws())


def test_codes_take_little_more_than_their_entropy():
    values = {"weight": heavy((400, 300))}
    codes = nearest(values["weight"], 4).codes
    _, counts = codes.unique(return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * share.log2()).sum()) * codes.numel() / 8
    body, _ = to_bytes(values, Compressor(4, rounding="nearest"), draws())
    assert entropy < len(body) < 1.02 * entropy + 100


# --- Averages -----------------------------------------------------------------------------------


def test_the_average_weighs_images_and_pools_the_variance_of_batch_norm():
    activations = [
        np.random.default_rng(0).normal(3, 1, (60, 5)),
        np.random.default_rng(1).normal(-1, 2, (20, 5)),
    ]
    states = [
        {
            "w": torch.full((2, 2), float(i)),
            "running_mean": torch.tensor(a.mean(0)).float(),
            "running_var": torch.tensor(a.var(0)).float(),
        }
        for i, a in enumerate(activations)
    ]
    known = {name: torch.full_like(tensor, 0.5) for name, tensor in states[0].items()}
    updates = [{name: state[name] - known[name] for name in state} for state in states]
    found = plan.average(known, updates, [60, 20])
    together = np.concatenate(activations)
    assert torch.allclose(found["w"], torch.full((2, 2), 0.25))
    assert np.allclose(found["running_mean"], together.mean(0), atol=1e-5)
    assert np.allclose(found["running_var"], together.var(0), atol=1e-4)


def test_a_state_is_all_of_a_network_but_its_counters():
    model, other = network(PLAIN), network(PLAIN, seed=1)
    state = plan.floats(model)
    plan.load(other, state)
    images = torch.randn(4, 1, 8, 8, generator=draws())
    assert torch.equal(model(images), other(images)) and plan.digest(plan.floats(other)) == plan.digest(state)
    plan.load(other, state | {"bn1.running_var": -state["bn1.running_var"]})
    assert (other.bn1.running_var == 0).all()
    assert plan.digest(state | {"fc.bias": state["fc.bias"] + 1}) != plan.digest(state)


def test_a_plan_survives_its_way_to_another_process():
    own = plan.Plan(PLAIN, rounds=4, learning_rate=0.2, up=Compressor(4, 0.05, "nearest"), feedback=True)
    assert plan.Plan.from_json(own.to_json()) == own
    assert [round(own.rate(number), 4) for number in (1, 3)] == [0.2, 0.1] and 0 < own.rate(4) < 0.04
    first, second = (own.draws(1, client).initial_seed() for client in (0, 1))
    assert first != second


# --- Messages -----------------------------------------------------------------------------------


@pytest.fixture
def pair():
    ends = [messages.Connection(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def test_bytes_are_counted_and_a_damaged_message_costs_no_later_one(pair):
    sender, receiver = pair
    good = messages.frame({"kind": "update", "round": 3}, b"\n\0body")
    for place in (12, 20, len(good) - 1):  # header, and body
        sender.send_frame(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(messages.Damaged, match="the checksum of a message of 34 bytes differs"):
            receiver.receive()
    sender.send(b"\n\0body", kind="update", round=3)
    assert receiver.receive() == ({"kind": "update", "round": 3}, b"\n\0body")
    assert sender.sent == receiver.received == 4 * len(good) and receiver.sent == 0


def test_what_is_no_message_ends_the_connection(pair):
    sender, receiver = pair
    sender.send_frame(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionError, match="begin no message"):
        receiver.receive()
    receiver.patience = 0.05
    with pytest.raises(ConnectionError, match=r"silent for 0.05 s"):
        receiver.receive()
    sender.send_frame(messages.frame({"kind": "update"}, b"body")[4:20])
    sender.close()
    with pytest.raises(ConnectionError, match="closed|begin no message"):
        receiver.receive()


@pytest.mark.parametrize("header", [["update"], 3, None, "update", {}], ids=str)
def test_a_header_is_an_object_or_the_message_is_damaged(pair, header):
    sender, receiver = pair
    sender.send_frame(messages.frame(header, b"body"))
    for text in (b"{", b"\xff", b"[" * 100_000):
        rest = text + b"\n"
        sender.send_frame(messages.HEAD.pack(messages.MAGIC, len(rest), messages.zlib.crc32(rest)) + rest)
    if header == {}:
        assert receiver.receive() == ({}, b"body")
    for _ in range(3 + (header != {})):
        with pytest.raises(messages.Damaged, match="is no header of a message"):
            receiver.receive()


def test_a_client_waits_as_long_as_the_server_takes_to_come_to_it(pair, monkeypatch):
    monkeypatch.setattr(messages, "STALLED", 0.1)
    sender, receiver = pair
    sender.patience, receiver.patience, body = None, 5, bytes(10**7)
    busy = threading.Timer(0.4, lambda: got.append(receiver.receive()))
    got = []
    busy.start()
    sender.send(body, kind="update")
    busy.join()
    assert got == [({"kind": "update"}, body)]


# --- Configurations -----------------------------------------------------------------------------


def test_configurations_say_what_each_direction_sends():
    mapping = {
        "method": "fedavg",
        "dirichlet": 0.3,
        "bits": 4,
        "share": 0.05,
        "feedback": True,
        "down_bits": 4,
    }
    given = [mapping, {"method": "fedavg", "dirichlet": 1}, {"method": "fedavg_equal_bytes", "of": mapping}]
    ours, plain, equal = read(given, "federated")
    assert ours.title == "FedAvg, Dirichlet 0.3: 5 % × 4 bits with feedback up, 4 bits down"
    assert (ours.up, ours.down) == (Compressor(4, 0.05, "nearest"), Compressor(4, rounding="nearest"))
    assert [one.control for one in (ours, plain, equal)] == ["", "fedavg_fp32", "equal_bytes"]
    assert (
        equal.compressed == ours
        and equal.run == read([{"method": "fedavg", "dirichlet": 0.3}], "federated")[0]
    )
    assert read([{"method": "fedavg", "dirichlet": 1, "bits": 4}])[0].up.rounding == "stochastic"
    for wrong, said in (
        ({"method": "fedavg", "dirichlet": 1, "feedback": True}, "float32 leaves nothing to be sent later"),
        ({"method": "fedavg", "dirichlet": 0}, "greater than 0"),
        (
            {"method": "fedavg_equal_bytes", "of": {"method": "fedavg", "dirichlet": 1}},
            "compresses something",
        ),
    ):
        with pytest.raises(ConfigurationError, match=said):
            read([wrong], "federated")
