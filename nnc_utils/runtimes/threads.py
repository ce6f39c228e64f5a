"""PyTorch's number of threads, which belongs to the process: each session sets its own again."""

from __future__ import annotations

import torch


def use(threads: int) -> int:
    """Let PyTorch use so many threads; what it says then."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
