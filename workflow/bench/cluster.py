"""The benchmark on a Slurm cluster: what Snakemake is told, and which jobs in the queue are ours."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from nnc_utils.provenance import root

CLUSTERS = ("slurm",)
JOBS = 100  # in the queue at a time
FIRST_LOOK = 10  # seconds until the plugin asks how jobs are; the longer none ends, the less often it asks
SELDOMEST = 180  # seconds
SHARED = 60  # seconds until a file of another node is seen here
PLUGIN = "snakemake_executor_plugin_slurm"


class ClusterError(RuntimeError):
    """The benchmark cannot run on this cluster; the message says what is missing."""


def name(profile: str) -> str:
    """What the names of all jobs of this clone's benchmark of a profile begin with."""
    return f"nnc-{profile}-{hashlib.sha256(str(root()).encode()).hexdigest()[:8]}"


def logs(profile: str) -> Path:
    """Where Slurm's logs lie; those of jobs that ended well are removed."""
    return root() / "results/runs" / profile / "slurm"


def check() -> None:
    """Raise a ClusterError where this machine submits no jobs, or could not see how they end."""
    if importlib.util.find_spec(PLUGIN) is None:
        install = ".venv/bin/pip install -c constraints.txt -e '.[cluster]'"
        raise ClusterError(f"Snakemake's plugin for Slurm is not installed: {install}")
    if absent := [tool for tool in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(tool) is None]:
        raise ClusterError(f"no {', '.join(absent)} here: call this on a login node of the cluster")
    config = _ask("scontrol", "show", "config")
    if config.returncode != 0:
        raise ClusterError(f"Slurm does not answer: {config.stderr.strip()}")
    kept = re.search(r"MinJobAge\s*=\s*(\d+)", config.stdout)
    if status_command() == "squeue" and kept and int(kept[1]) <= SELDOMEST:
        raise ClusterError(
            f"this cluster has no accounting storage and forgets a job {kept[1]} s after its end, before "
            f"anybody asked how it ended: slurm.conf needs MinJobAge={SELDOMEST + 120}"
        )


def status_command() -> str:
    """What tells how jobs ended: sacct, or squeue where nothing is accounted.

    The plugin (2.8.0) takes sacct wherever the program is there, and then waits for ever for its answer.
    """
    has_accounting = shutil.which("sacct") and _ask("sacct", "--allocations", "--noheader").returncode == 0
    return "sacct" if has_accounting else "squeue"


def options(profile: str) -> list[str]:
    """What Snakemake gets in place of `--cores`. A job whose node fails goes back into Slurm's queue."""
    slurm = {"jobname-prefix": name(profile), "logdir": logs(profile), "status-command": status_command()}
    slurm |= {"init-seconds-before-status-checks": FIRST_LOOK}
    given = [f"--slurm-{option}={value}" for option, value in slurm.items()]
    return ["--executor", "slurm", f"--jobs={JOBS}", f"--latency-wait={SHARED}", "--slurm-requeue", *given]


def cancel(profile: str) -> int:
    """Cancel the jobs of a benchmark that was ended, which would go on in their run folders; how many."""
    queue = _ask("squeue", "--me", "--noheader", "--format=%j %i").stdout.splitlines()
    if jobs := [job.split()[-1] for job in queue if job.startswith(f"{name(profile)}_")]:
        _ask("scancel", *jobs)
    return len(jobs)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
