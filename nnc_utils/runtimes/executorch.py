"""ExecuTorch with XNNPACK: the .pte that runs on phones, here on this machine's processor.

XNNPACK's integers are signed, so activations are the file's codes less 128.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from executorch.extension.pybindings import _C as executorch  # after torch; portable_lib imports the compiler
from torch import nn

from nnc_utils.artifact import Artifact

PRECISIONS = ("fp32", "int8")
INTEGER = ("conv", "linear", "add")
SUFFIX = ".pte"
MOST = 64  # images at once; larger batches are split
KINDS = {"XNNConv2d": "conv", "XNNDepthwiseConv2d": "conv", "XNNFullyConnected": "linear", "XNNAdd": "add"}


class ExecuTorchSession:
    """A loaded program; see `runtimes.Session`.

    The thread pool belongs to the process, and a program keeps a pointer to the pool it was loaded with. So
    a session that finds another pool creates one of its own size and loads its program again.
    """

    _pools = 0  # so many have been created in this process

    def __init__(self, path: Path, threads: int) -> None:
        self._content, self._threads, self._pool = path.read_bytes(), threads, -1
        self._loaded()
        self.runtime_bytes = len(self._content)

    @property
    def threads(self) -> int:
        """As the thread pool says."""
        self._loaded()
        return executorch._threadpool_get_thread_count()

    def _loaded(self):
        if executorch._threadpool_get_thread_count() != self._threads:
            self._program = None
            executorch._unsafe_reset_threadpool(self._threads)
            ExecuTorchSession._pools += 1
        if self._pool != ExecuTorchSession._pools:
            self._program = executorch._load_for_executorch_from_buffer(self._content)
            self._pool = ExecuTorchSession._pools
        return self._program

    @property
    def integer_operators(self) -> dict[str, int]:
        """Counted in the graph of XNNPACK that the program holds; what is outside counts as float."""
        return count_operators(self._content)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Normalized float32 (batch, C, H, W) -> float32 logits (batch, classes)."""
        program, batches = self._loaded(), torch.from_numpy(np.ascontiguousarray(images)).split(MOST)
        # a program's output lies in memory that its next run writes to
        return torch.cat([program.forward((batch,))[0].clone() for batch in batches]).numpy()


def count_operators(content: bytes) -> dict[str, int]:
    """Kinds of operators that a .pte computes in integers, and those in floats."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(content).program
    counts: Counter[str] = Counter()
    for plan in program.execution_plan:
        counts.update(f"float {operator.name}" for operator in plan.operators)
        for delegate in plan.delegates:
            graph = xnnpack_graph(program.backend_delegate_data[delegate.processed.index].data)
            kinds = [value["xvalue_union_type"] for value in graph["xvalues"]]
            integers = {i for i, kind in enumerate(kinds) if kind == "XNNQuantizedTensorValue"}
            for node in graph["xnodes"]:
                kind = KINDS.get(node["xnode_union_type"].removeprefix("_"))
                read = {node["xnode_union"].get(key) for key in ("input1_id", "input2_id", "filter_id")}
                if kind:
                    counts[kind if read - {None} <= integers else f"float {kind}"] += 1
    return dict(counts)


def xnnpack_graph(data: bytes) -> dict:
    """The graph of XNNPACK in a delegate's data, as its schema's JSON."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = xnnpack.XNNHeader.from_bytes(data[: xnnpack.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema, graph = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(xnnpack._get_schema_bytes())
        graph.write_bytes(data[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(graph), ["--raw-binary", "--defaults-json"])
        text = (Path(folder) / "graph.json").read_text()
    return json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))


def _lower(module: nn.Module, shape: tuple[int, ...], target: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from nnc_utils.runtimes import exported

    program = exported.export(module, shape, batch=MOST, dynamic=True)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    try:
        target.write_bytes(lowered.to_executorch().buffer)
    except RuntimeError as error:  # "Missing out variants": there is no kernel for a pair that is left over
        raise RuntimeError(f"not an int8 network: XNNPACK did not take every operator ({error})") from None


def write(artifact: Artifact, precision: str, target: Path) -> None:
    """Write an artifact as .pte."""
    from nnc_utils.runtimes import exported

    spec = artifact.spec
    module = exported.Network(artifact, precision, signed=precision == "int8")
    _lower(module, (spec.channels, spec.size, spec.size), target)


def write_identity(shape: tuple[int, int, int], target: Path) -> None:
    """Write a program that copies its input."""
    from nnc_utils.runtimes import exported

    _lower(exported.Copy(), shape, target)


def load(path: Path, precision: str, threads: int) -> ExecuTorchSession:
    """A session of a .pte file."""
    return ExecuTorchSession(Path(path), threads)
