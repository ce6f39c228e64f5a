"""NNCodec, the implementation of ISO/IEC 15938-17 by its authors, in a virtual environment of its own.

It wants an older NumPy than this package: `workflow/setup_env.py --nncodec` sets its environment up,
whose interpreter runs `nncodec_child.py` for each call.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from nnc_utils import artifact as artifacts
from nnc_utils import batch_norm, encoding, models, peers
from nnc_utils.models import Spec

# What NNCodec's own `encode` takes by default.
DEFAULTS = {"use_dq": True, "param_opt": True, "row_skipping": True, "nonweight_qp": -75}
# The smallest at equal divergence from the fp32 logits, of what needs neither training nor data:
# `opt_qp` takes coarser steps for layers with more weights.
BEST = DEFAULTS | {"nonweight_qp": -50, "opt_qp": True}
# Rate-distortion optimization shrinks the weights: worse, unless batch-norm is re-estimated afterwards;
# then it can be smaller than BEST where compression is strong. Both together are worse than either.
RDO = BEST | {"opt_qp": False, "lambda_scale": 1.0}


def venv() -> Path:
    """Its environment; the environment variable NNCODEC_VENV names another folder."""
    return Path(os.environ.get("NNCODEC_VENV") or Path(__file__).parents[2] / ".venv-nncodec")


def _python() -> Path:
    return venv() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def missing(name: str) -> str:
    """Whether its environment has been set up."""
    try:
        failed = json.loads((venv() / "setup.json").read_text())["failed"]
    except (OSError, ValueError, KeyError):
        failed = " (its set-up was interrupted)" if _python().exists() else ""
        return f"not installed{failed}: run workflow/setup_env.py --nncodec"
    return f"not installed ({failed}): run workflow/setup_env.py --nncodec --again" if failed else ""


def encode(
    state: Mapping[str, np.ndarray], target: Path, *, qp: int, settings: Mapping | None = None
) -> Path:
    """Write arrays as a bit stream; RuntimeError holds NNCodec's own words.

    Parameters
    ----------
    state : name -> float32 of one dimension or more; those of two or more are quantized with `qp`.
    qp : quantization parameter; 4 more double the step. With `opt_qp` layers get coarser ones.
    settings : of NNCodec's `compress`, such as `DEFAULTS` or `RDO`; None for `BEST`.
    """
    for name, array in state.items():
        if array.dtype != np.float32 or not array.ndim:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}: float32 of 1 or more dimensions is needed"
            )
    with tempfile.TemporaryDirectory() as scratch:
        arrays, wanted = Path(scratch) / "state.npz", Path(scratch) / "settings.json"
        np.savez(arrays, **state)
        wanted.write_text(json.dumps({"qp": int(qp), **(BEST if settings is None else settings)}))
        _run("encode", arrays, wanted, target)
    return target


def decode(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a bit stream, float32; needs nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        arrays = Path(scratch) / "state.npz"
        _run("decode", path, arrays)
        return dict(np.load(arrays, allow_pickle=False))


def _run(*words: str | Path) -> None:
    if missing("nncodec"):
        raise ImportError(f"nncodec is {missing('nncodec')}")
    # -I: otherwise this folder's nncodec.py would be found before the package
    command = [_python(), "-I", Path(__file__).with_name("nncodec_child.py"), *words]
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"NNCodec could not {words[0]}; it said last:\n{said}")


# --- Networks -----------------------------------------------------------------------------------


def make(
    source: Path,
    images: np.ndarray | None,
    folder: Path,
    *,
    qp: int,
    settings: Mapping | None = None,
    reestimate: bool = False,
) -> Path:
    """Encode an artifact's float weights and batch-norm.

    With `reestimate` batch-norm is re-estimated on the images for the decoded weights, as for our own
    quantizers (`batch_norm.reestimate`); otherwise the images do not matter. `qp`, `settings`: see `encode`.
    """
    artifact = artifacts.read(source)
    state = {f"{name}.weight": encoding.decode(weight) for name, weight in artifact.weights.items()}
    odd = [f".{key}={value}" for key, value in (settings or {}).items() if BEST.get(key) != value]
    name = f"{artifact.sha256[:16]}.qp{qp}{''.join(odd)}{'.batch_norm' if reestimate else ''}.nnc"

    def write(tensors: Mapping[str, torch.Tensor]) -> Path:
        arrays = {name: tensor.numpy() for name, tensor in (state | fold(artifact.spec, tensors)).items()}
        return encode(arrays, folder / name, qp=qp, settings=settings)

    path = write(artifact.tensors)
    if not reestimate:
        return path
    original, changed = models.build(artifact.spec).eval(), models.build(artifact.spec).eval()
    original.load_state_dict(original.state_dict() | state | artifact.tensors)
    decoded = {name: torch.from_numpy(array) for name, array in decode(path).items() if name in state}
    changed.load_state_dict(original.state_dict() | decoded)
    moved = batch_norm.reestimate(changed, torch.from_numpy(images), original=original).state_dict()
    # Weights decode to the same whatever batch-norm is beside them.
    return write({name: moved[name] for name in artifact.tensors})


def load(path: Path, source: Path, threads: int) -> peers.Loaded:
    """The decoded network."""
    return peers.in_eager(network(path, artifacts.read(source).spec), threads)


def network(path: Path, spec: Spec) -> models.ResNet:
    """The network in a file, in evaluation mode."""
    model = models.build(spec)
    state = model.state_dict() | {name: torch.from_numpy(array) for name, array in decode(path).items()}
    for layer in models.layers(spec):  # what `fold` has taken out of batch-norm
        if layer.batch_norm:
            ones = torch.ones(layer.out_channels)
            state[f"{layer.batch_norm}.running_mean"] = 0 * ones
            state[f"{layer.batch_norm}.running_var"] = (1 - models.BATCH_NORM_EPSILON) * ones
    model.load_state_dict(state)
    return model.eval()


def fold(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Batch-norm as one factor and one summand a channel, as the standard's batch-norm folding has it.

    The tensors come back without running_mean and running_var, which are constants then.
    """
    folded = dict(tensors)
    for layer in models.layers(spec):
        if norm := layer.batch_norm:
            factor, bias = models.fold_batch_norm(folded, norm)
            del folded[f"{norm}.running_mean"], folded[f"{norm}.running_var"]
            folded |= {f"{norm}.weight": factor.float(), f"{norm}.bias": bias.float()}
    return folded
