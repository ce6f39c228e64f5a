"""What an open notebook needs: cells run twice, parameters change in between, papermill adds a cell."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

INJECTED = "# Parameters\n"  # begins the cell that papermill adds behind the one tagged `parameters`


def headless() -> bool:
    """Whether nobody watches: `python -m bench run` says so."""
    return bool(os.environ.get("NNC_HEADLESS"))


def injected(namespace: dict[str, Any]) -> dict[str, Any]:
    """What papermill's cell has set, by name; the last where IPython's history has several."""
    cells = [source for source in namespace.get("In", []) if source.startswith(INJECTED)]
    names = [
        target.id
        for statement in ast.parse(cells[-1] if cells else "").body
        for target in getattr(statement, "targets", [])
    ]
    own = [name for name in names if not name.startswith("PAPERMILL_")]  # papermill's, where it is asked
    return {name: namespace[name] for name in own if name in namespace}


def tell_changes(parameters: dict[str, Any], namespace: dict[str, Any], told: str = "") -> str:
    """Print, unless it was `told`, which parameters no longer are what a run began with; returns that."""
    plain = {n: v for n, v in namespace.items() if n in parameters and type(v) in (int, float, str, bool)}
    other = [f"{n} is {v!r} now, not {parameters[n]!r}" for n, v in plain.items() if v != parameters[n]]
    said = f"{'; '.join(other)}: run the setup cell again to use that" if other else ""
    if said not in ("", told):
        print(said)
    return said


def fit(network: Any, images: Any, *, checkpoint: Path, **options: Any) -> Any:
    """`training.fit`, but in an open notebook a checkpoint of another call is replaced, and that is told."""
    from nnc_utils import training  # not in a runner, which needs no torch

    try:
        return training.fit(network, images, checkpoint=checkpoint, **options)
    except training.TrainingError as error:
        why, _, _ = str(error).removeprefix(f"{checkpoint} is ").partition(": delete the file")
        if headless() or why == str(error):
            raise
    print(f"{checkpoint.name} was {why}: it is replaced, and training starts from the network as it is")
    checkpoint.unlink()
    return training.fit(network, images, checkpoint=checkpoint, **options)
