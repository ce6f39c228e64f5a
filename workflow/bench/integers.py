"""What share of its MACs another tool's file computes in integers, as the doctor finds it."""

from __future__ import annotations

import time
from typing import Any

# tool whose file a runtime loads -> the settings that `peers.load` gives that runtime
SETTINGS = {"ort_static": ["session.qdqisint8allowed=1"], "nncf_ptq": [], "torchao_pt2e": ["freezing=True"]}


def note_share(extra: dict[str, Any], tool: str, score: dict[str, Any]) -> None:
    """Add the share of a scored file to `extra["integer_macs"]`: SHA-256 -> from 0 to 1.

    Nothing is added for a codec's file, which no runtime loads, nor where the doctor fails: the log says why.
    """
    if tool not in SETTINGS:
        return
    start = time.perf_counter()
    try:
        from nnc_utils import doctor

        share = doctor.examine(score["path"], entries=SETTINGS[tool]).share
    except Exception as error:  # whatever it is, the row stands without it
        print(f"the share of MACs in integers is unknown: {error}", flush=True)
        return
    extra.setdefault("integer_macs", {})[score["sha256"]] = share
    print(f"{share:.1%} of the MACs in integers, {time.perf_counter() - start:.1f} s", flush=True)
