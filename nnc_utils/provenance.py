"""Where a number comes from: hashes of code, notebook and parameters, commit, versions, the machine."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tokenize
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGE = Path(__file__).resolve().parent
# They turn finished rows into tables and start notebooks; no measured number depends on them.
WITHOUT_INFLUENCE = {
    *("processes", "parameters", "provenance", "rows", "tables", "over_seeds", "publishing", "paired"),
    *("reports", "results", "audit", "figures", "run", "notebook", "benchmark", "inspect", "export"),
    "__init__",
}
LIBRARIES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "constriction", "safetensors")
FLAGS = (  # of a processor, those that matter to a time
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
BEGUN = ".begun"  # in a run folder: which run its files are of, so that only that one goes on with them
PEERS = ("torchao", "openvino", "nncf", "executorch", "torch-pruning", "optuna")


def root() -> Path:
    """The folder with notebooks/, workflow/ and results/: NNC_ROOT, or the clone this package is in."""
    return Path(os.environ.get("NNC_ROOT") or PACKAGE.parent).resolve()


def relative(path: Path) -> str:
    """A path as it is written into results: from `root` on, so that it holds on every machine."""
    path = Path(path).resolve()
    return path.relative_to(root()).as_posix() if path.is_relative_to(root()) else path.as_posix()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file that is there completely or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(text.encode() if isinstance(text, str) else text)
    os.replace(partial, path)


@functools.lru_cache(maxsize=4096)
def meaning(source: str) -> str:
    """Python source without comments, docstrings and blank lines, so that rewording changes no hash."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            if body[0].lineno == getattr(node, "lineno", 0):
                continue
            for line in range(body[0].lineno, body[0].end_lineno + 1):
                lines[line - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    """Source and tags of each code cell. (`nbformat` would do it, too, but takes a second to import.)"""
    try:
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))
        found = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is no notebook of format 4: {error!r}") from None


def cells(notebook: Path) -> list[str]:
    """The code cells of a notebook as Python: without magics and what papermill injected."""
    found = []
    for source, tags in code_cells(notebook):
        if "injected-parameters" not in tags:
            lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
            found.append("\n".join(lines))
    return found


def notebook_sha256(notebook: Path) -> str:
    """Hash of what a notebook's code means; its prose and outputs do not count."""
    try:
        return json_sha256([meaning(cell) for cell in cells(notebook)])
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{notebook}: a code cell is no Python: {error}") from None


def code_sha256(notebook: Path) -> str:
    """Hash of the package's modules that a notebook uses, directly or through others.

    Of a folder (a technique, the runtimes) everything counts, since adapters are imported by name.
    """
    return _files_sha256(tuple(code_files(notebook)))


def code_files(notebook: Path) -> list[Path]:
    """The files behind `code_sha256`, sorted."""
    reached: set[Path] = set()
    waiting = [file for cell in cells(notebook) for file in _imported(cell)]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += _imported(file.read_text(encoding="utf-8"))
    return sorted(reached)


@functools.lru_cache(maxsize=64)
def _files_sha256(files: tuple[Path, ...]) -> str:
    sources = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return json_sha256({name: meaning(source) for name, source in sources.items()})


@functools.lru_cache(maxsize=256)
def _imported(source: str) -> tuple[Path, ...]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {m.split(".")[1] for m in modules if m.startswith(f"{PACKAGE.name}.")} - WITHOUT_INFLUENCE
    files: list[Path] = []
    for part in sorted(parts):
        folder, file = PACKAGE / part, PACKAGE / f"{part}.py"
        files += sorted(folder.rglob("*.py")) if folder.is_dir() else [file] if file.is_file() else []
    return tuple(files)


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the clone, with "-dirty" where its code differs from it.

    Of a copy without git the variable NNC_COMMIT, or "unknown".
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "--", "nnc_utils", "notebooks/src") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("NNC_COMMIT") or "unknown"


def versions() -> dict[str, str]:
    """Python and the libraries that a number may depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for library in (*LIBRARIES, *PEERS):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine that measures: processor, its flags that matter, cores, memory, system, load.

    Where torch is loaded also what that uses: threads, GPU.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = _processor()
    return {
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "machine": platform.machine(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
    } | _torch()


def _torch() -> dict[str, Any]:
    if (torch := sys.modules.get("torch")) is None:
        return {}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"threads": torch.get_num_threads()} | gpu


def _processor() -> tuple[str, set[str]]:
    """Model and flags; flags are known on Linux only."""
    if sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return name.stdout.strip() or platform.processor(), set()
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip().lower(), value.strip())
    model = info.get("model name") or platform.processor() or platform.machine()
    return model, set((info.get("flags") or info.get("features") or "").split())
