"""The command line: ``python -m bench COMMAND``, which ``--help`` lists."""

from __future__ import annotations

import importlib
import sys

COMMANDS = """\
python -m bench run NOTEBOOK OUT PARAMS      one notebook; PARAMS is a JSON file or object
python -m bench benchmark --profile quick    everything of a profile, then its tables
python -m bench own --data FOLDER            your own images, from a folder to a network that meets a goal
python -m bench report [--profile quick]     tables, figures, report and README of what is committed
python -m bench publish --profile quick      finished runs into the profile's tables
python -m bench restore --profile quick      committed runs back into run folders
python -m bench reference RUN_FOLDER         a finished run of 01 becomes results/reference/
python -m bench course [--nbgrader]          the student edition in build/course, or nbgrader's sources
python -m bench notebooks [NAME ...]         every notebook executed where it stands, outputs stored
"""
MODULES = {"run": "execute", "benchmark": "workflow", "notebooks": "notebooks", "reference": "reference"}
MODULES |= {"course": "course", "own": "own"}
MODULES |= dict.fromkeys(("report", "publish", "restore"), "report")


def main(arguments: list[str]) -> int:
    """Run one command; its exit status. Each imports only what it needs: a notebook's start is timed."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    command, *rest = arguments or ["--help"]
    if command in MODULES:
        module = importlib.import_module(f"bench.{MODULES[command]}")
        return module.main(arguments if MODULES[command] == "report" else rest)
    print(COMMANDS, end="")
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
