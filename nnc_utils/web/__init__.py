"""A folder in which networks run in the visitor's browser; any static server serves it.

ONNX Runtime's build for browsers comes from npm when the folder is written, its version and checksum pinned
here; a single thread of its WebAssembly needs three files. That and the networks lie there gzipped, since not
every server compresses; the page unpacks them. What the page does stands in ``index.html`` and ``page.js``,
how it reads an image in ``image.js``.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
WASM = "ort-wasm-simd-threaded.wasm"
SCRIPTS = {  # names in the package, and in the folder: some servers call .mjs no script
    "ort.wasm.min.js": "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
}
PAGE = ("index.html", "page.css", "image.js", "page.js")
NETWORKS = "networks.json"


class WebError(RuntimeError):
    """What a folder for browsers lacks; the message says what to do."""


def check(out: Path) -> None:
    """WebError unless npm is there and a new folder can be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WebError(
            f"{out} is there already, and not empty: remove it, or name a folder that is not there"
        )
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise WebError(f"{out} cannot be written: {out.parent} has to be a folder that may be written to")
    if not shutil.which("npm"):
        raise WebError(
            f"no npm here, which fetches {PACKAGE} {VERSION} for the page: install Node.js "
            "(Debian, Ubuntu: apt-get install npm), then call this again"
        )


def write(networks: Sequence[tuple[Path, dict]], out: Path) -> list[Path]:
    """Write the folder, all at once or not at all; the files in it.

    Parameters
    ----------
    networks : an ONNX file each, and what the page has to know of it: `label`, `precision`, `classes`, and
        how an image becomes its input (`channels`, `size`, `mean`, `std`).
    out : the folder, for which `check` was called.
    """
    runtime = fetched()
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        for name in PAGE:
            shutil.copyfile(Path(__file__).with_name(name), site / name)
        for name, target in SCRIPTS.items():
            (site / target).write_bytes(runtime[name])
        described = [
            about | packed(file.read_bytes(), site / f"network{number}.onnx.gz")
            for number, (file, about) in enumerate(networks, 1)
        ]
        wasm = {"version": VERSION} | packed(runtime[WASM], site / f"{WASM}.gz")
        text = json.dumps({"runtime": wasm, "networks": described}, indent=1)
        (site / NETWORKS).write_text(text + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(site, out)
    return sorted(out.iterdir())


def packed(content: bytes, target: Path) -> dict:
    """Gzip something into a file; its name, its length and that of the content."""
    target.write_bytes(gzip.compress(content, mtime=0))
    return {"file": target.name, "bytes": len(content), "gzip_bytes": target.stat().st_size}


def fetched() -> dict[str, bytes]:
    """The files of ONNX Runtime that the page needs, by name; npm keeps the package in its cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            shutil.which("npm"),
            "pack",
            f"{PACKAGE}@{VERSION}",
            "--prefer-offline",
            "--ignore-scripts",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packages:
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()][:2]
            raise WebError(
                f"npm could not fetch {PACKAGE} {VERSION} ({' '.join(said) or f'exit {done.returncode}'}): "
                "is this machine online, and `npm config get registry` right?"
            )
        package = packages[0].read_bytes()
    return unpacked(package)


def unpacked(package: bytes) -> dict[str, bytes]:
    """The files that the page needs out of npm's package, once its checksum is the pinned one."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != INTEGRITY:
        raise WebError(
            f"npm's {PACKAGE} {VERSION} has the checksum {found}, {INTEGRITY} is needed: it is another file. "
            "`npm cache clean --force` removes a damaged one; else look at `npm config get registry`"
        )
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        return {name: archive.extractfile(f"package/dist/{name}").read() for name in (*SCRIPTS, WASM)}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: what is asked for is nobody's business."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine alone, for a while; gives its address."""
    handler = functools.partial(_Quiet, directory=os.fspath(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
