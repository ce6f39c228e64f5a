"""How much of a bare training loop's speed `fit` keeps: python tests/benchmark_fit.py

Both train ResNet-18 with the same optimizer and the same number of batches. The bare loop gets them
ready-made and normalized; `fit` draws, shifts, flips and normalizes them, watches the loss and
counts. They take turns, so that a machine that slows down slows both; the ratio is the median over
the turns.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))
from nnc_utils import data, models, training


def random_data(images: int, size: int) -> data.Data:
    """Noise in the shape of Fashion-MNIST."""
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (images, 1, size, size), generator=draw, dtype=torch.uint8)
    split = data.Split(pictures, torch.randint(0, 10, (images,), generator=draw))
    return data.Data("noise", split, split, split, tuple("0123456789"), (0.5,), (0.29,))


def network(size: int, width: float) -> models.ResNet:
    torch.manual_seed(0)
    spec = models.resnet(18, channels=1, size=size, classes=10, stem="small_stride2", width=width)
    return models.build(spec)


def bare_seconds(
    model: models.ResNet, batches: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> float:
    model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.004, momentum=0.9, nesterov=True, fused=True)
    bf16 = training.fast_bf16(device)
    started = time.perf_counter()
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("batches", 10), ("turns", 5), ("batch-size", 128), ("size", 28), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--width", type=float, default=1.0)
    given = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(given.threads or torch.get_num_threads())
    device = training.default_device()
    noise = random_data(given.batches * given.batch_size, given.size)
    ready = list(training.batches(noise, 1, 0, given.batch_size, True, device))
    bare_seconds(network(given.size, given.width), ready[:2], device)  # warm-up

    images, speeds = given.batches * given.batch_size, []
    print(f"{images} images a turn, {torch.get_num_threads()} threads, {device}, width {given.width}")
    for turn in range(given.turns):
        bare = images / bare_seconds(network(given.size, given.width), ready, device)
        model = network(given.size, given.width)
        started = time.perf_counter()
        training.fit(model, noise, epochs=1, batch_size=given.batch_size, device=device)
        fit = images / (time.perf_counter() - started)
        speeds.append((bare, fit))
        print(f"turn {turn + 1}: bare {bare:.1f} img/s  fit {fit:.1f} img/s  ratio {fit / bare:.3f}")
    bare, fit = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(fit / bare for bare, fit in speeds)
    print(f"median: bare {bare:.1f} img/s  fit {fit:.1f} img/s  ratio {ratio:.3f}")
    if ratio < 0.95:
        raise SystemExit("the loop takes more than 5 % of the time: it has to be at least 0.95")


if __name__ == "__main__":
    main()
