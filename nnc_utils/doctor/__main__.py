"""``python -m nnc_utils.doctor FILE``: exit code 1 below ``--least`` of MACs in integers, 2 with an error."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nnc_utils.doctor import GIGABYTES, RUNTIMES, SECONDS, DoctorError, examine, repair, text
from nnc_utils.doctor.rules import TABLE


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine a file, or repair it, and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m nnc_utils.doctor",
        description="Which layers of a file a runtime computes in integers, and why not the others.",
    )
    parser.add_argument("file", type=Path, help=".onnx, OpenVINO's .xml, .pte, .pt2, or an artifact")
    parser.add_argument("--runtime", default="", help=f"{', '.join(RUNTIMES)}; else the suffix tells")
    parser.add_argument("--entry", action="append", default=[], metavar="KEY=VALUE", help="of the runtime")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired ONNX file, and examine it")
    parser.add_argument("--inputs", default="", help="with --fix: a .npy file of inputs to compare both on")
    parser.add_argument("--json", action="store_true", help="print a document instead of a table")
    parser.add_argument("--least", type=float, help="exit code 1 below this share of MACs in integers")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the runtime may take")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of memory that it may take")
    options = parser.parse_args(arguments)
    bounds = {"seconds": options.seconds, "gigabytes": options.gigabytes}
    try:
        if options.least is not None and not 0 <= options.least <= 1:
            raise DoctorError(f"--least {options.least:g}: a share is between 0 and 1")
        repaired, file = None, options.file
        if options.fix:
            repaired = repair(file, options.fix, inputs=options.inputs, **bounds)
            file = options.fix
        report = examine(file, runtime=options.runtime, entries=options.entry, **bounds)
    except (OSError, ValueError) as error:  # of these is DoctorError
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if options.json:
        document = report.document()
        document["rules"] = {name: TABLE[name].remedy for name in report.named()}
        said = json.dumps(document | ({"repaired": repaired} if repaired else {}), indent=1)
    else:
        said = (f"{text.repaired(repaired)}\n\n" if repaired else "") + text.render(report)
    try:
        print(said, flush=True)
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(options.least is not None and report.share < options.least)


if __name__ == "__main__":
    sys.exit(main())
