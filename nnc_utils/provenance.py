"""Where a number comes from: notebook, parameters, loaded modules, commit, versions, machine."""

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
BEGUN = ".begun"  # in a run folder: which run its files are of, so that only that one goes on with them
# No row depends on them: they lock, hash, draw, check answers, turn rows into tables, look into files, or
# read weights that only users bring.
WITHOUT_INFLUENCE = {
    *("__init__", "processes", "provenance", "rows", "figures", "inspect", "export", "exercises", "doctor"),
    "pretrained",
}
LIBRARIES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "constriction", "safetensors")
PEERS = ("torchao", "openvino", "nncf", "executorch", "torch-pruning", "optuna")
FLAGS = {  # of a processor, those that matter to a time
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
}


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
    try:
        partial.write_bytes(text.encode() if isinstance(text, str) else text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# --- What code means -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def meaning(source: str) -> str:
    """Python source without comments, docstrings and blank lines, so that rewording changes no hash."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if text and first.lineno != getattr(node, "lineno", 0):
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    """Source and tags of each code cell. (`nbformat` would do it, too, but takes a second to import.)"""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is no notebook of format 4: {error!r}") from None


def notebook_sha256(notebook: Path) -> str:
    """Hash of what a notebook's code means; prose, outputs, magics and injected parameters do not count."""
    cells = [source for source, tags in code_cells(notebook) if "injected-parameters" not in tags]
    plain = [[line for line in cell.splitlines() if line.lstrip()[:1] not in ("%", "!")] for cell in cells]
    try:
        return json_sha256([meaning("\n".join(lines)) for lines in plain])
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{notebook}: a code cell is no Python: {error}") from None


# --- Which modules were loaded -------------------------------------------------------------------


def watch(log: Path) -> None:
    """Append to a file every module of the package that this process, or one that it starts, loads.

    Processes inherit the file's name as NNC_MODULES, and `nnc_utils` follows it. A module is written down
    before it runs, with a hash of its code, so that the list is also right where a process is killed.
    """
    os.environ["NNC_MODULES"] = str(log)
    if _Watch not in sys.meta_path:
        sys.meta_path.insert(0, _Watch)
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE.name}.")]:
        _Watch.find_spec(name)


class _Watch:
    """Stands before Python's finders, and finds nothing itself."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        package, _, rest = name.partition(".")
        log = os.environ.get("NNC_MODULES")
        if not log or package != PACKAGE.name or rest.partition(".")[0] in WITHOUT_INFLUENCE | {""}:
            return
        place = PACKAGE / rest.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        with contextlib.suppress(OSError):  # no such module, or the run folder has gone
            known = Path(log).read_text().splitlines() if Path(log).is_file() else []
            apart = [f"{file.stem}_child.py", f"{file.stem}_app/*.py"]  # run by another interpreter
            for own in (file, *(own for pattern in apart for own in file.parent.glob(pattern))):
                entry = f"{own.relative_to(PACKAGE).as_posix()} {own.stat().st_mtime_ns}"
                if not any(line.startswith(f"{entry} ") for line in known):
                    with open(log, "a") as stream:
                        stream.write(f"{entry} {_code_hash(own)}\n")


def loaded(log: Path) -> dict[str, str]:
    """The modules that a file of `watch` lists, and their hashes; "edited" where one had two of them, or its
    line is not whole, since the disk was full."""
    code: dict[str, str] = {}
    for line in sorted(Path(log).read_text().splitlines()) if Path(log).is_file() else []:
        file, *rest = line.split(" ")
        sha256 = rest[1] if len(rest) == 2 else "edited"
        code[file] = sha256 if code.get(file, sha256) == sha256 else "edited"
    return code


def changed(code: dict[str, str]) -> list[str]:
    """Which of these modules are not what they were, or are gone; comments and docstrings do not count."""
    names = {file: file.removesuffix(".py").partition("/")[0] for file in code}
    counted = {file: sha256 for file, sha256 in code.items() if names[file] not in WITHOUT_INFLUENCE}
    return [file for file, sha256 in counted.items() if _code_hash(PACKAGE / file) != sha256]


def _code_hash(file: Path) -> str:
    return json_sha256(meaning(file.read_text(encoding="utf-8")))[:16] if file.is_file() else ""


# --- Where it was measured -----------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The clone's commit, with "-dirty" where its code differs; of a copy NNC_COMMIT, or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "--", "nnc_utils", "notebooks/src") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("NNC_COMMIT") or "unknown"


def versions() -> dict[str, str]:
    """Python and the libraries that a number may depend on, as far as they are installed."""
    known = {"python": platform.python_version()}
    for library in (*LIBRARIES, *PEERS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[library] = metadata.version(library)
    return known


def hardware() -> dict[str, Any]:
    """The machine that measures, and where torch is loaded what that uses: threads, GPU."""
    processor: dict[str, str] = {}
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            processor.setdefault(key.strip().lower(), value.strip())
    flags = (processor.get("flags") or processor.get("features") or "").split()
    model = processor.get("model name") or platform.processor() or platform.machine()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True).stdout.strip() or model
    machine = {
        "cpu": model,
        "flags": sorted(FLAGS.intersection(flags)),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "machine": platform.machine(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
    }
    torch = sys.modules.get("torch")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    return machine | ({"threads": torch.get_num_threads()} | gpu if torch else {})
