"""The command line: ``python -m bench COMMAND``, which ``--help`` lists."""

from __future__ import annotations

import sys

COMMANDS = """\
python -m bench run NOTEBOOK OUT PARAMS      one notebook; PARAMS is a JSON file or object
python -m bench benchmark --profile quick    everything of a profile, then its tables
python -m bench report [--profile quick]     tables, figures, report and README of what is committed
python -m bench publish --profile quick      finished runs into the profile's tables
python -m bench restore --profile quick      committed runs back into run folders
python -m bench notebooks [NAME ...]         every notebook executed where it stands, outputs stored
"""


def main(arguments: list[str]) -> int:
    """Run one command; its exit status. Each imports only what it needs: a notebook's start is timed."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    command, *rest = arguments or ["--help"]
    if command == "run":
        from bench import execute

        return execute.main(rest)
    if command == "benchmark":
        from bench import workflow

        return workflow.main(rest)
    if command in ("report", "publish", "restore"):
        from bench import report

        return report.main(arguments)
    if command == "notebooks":
        from bench import notebooks

        notebooks.execute_all(rest)
        return 0
    print(COMMANDS, end="")
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
