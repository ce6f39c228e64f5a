"""What was chosen on validation, before the test set was looked at, and whether it holds there."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nnc_utils.over_seeds import SEEDS_OF_A_CLAIM, chosen_over_seeds
from nnc_utils.paired import OURS, in_points
from nnc_utils.publishing import ATTEMPT
from nnc_utils.reports.committed import Tables
from nnc_utils.reports.words import count_seeds, delta_over_seeds, factor, in_words, network_name, verdicts
from nnc_utils.rows import NO_LOSS
from nnc_utils.tables import POINT, committed_runs

CHOICE = """Validation pictures chose what is claimed: in each division of a run the smallest file that is \
likely without loss on the test set, of networks that lost channels the one with the fewest MACs; of \
students of one width, and of searched networks, taught or not, the best of the first seed. Whether it \
holds, the test set says."""
TOGETHER = f"""Where {SEEDS_OF_A_CLAIM} seeds looked at the same points, they chose together, one point in \
each technique and division, networks that lost channels apart: the first whose lower end, over the seeds, \
is {NO_LOSS} or more (of equal files the first by name); where there is none, the nearest that they do not \
call a loss (`over_seeds.chosen_over_seeds`)."""
HISTORY = "history.md"  # what the test set had seen before what is claimed was made, in the authors' words


def claims_text(tables: Tables) -> str:
    """The rule of the choice, and each claim: what it is on the test set, against whom, how fast."""
    together = chosen_over_seeds(committed_runs(tables.folder))
    claims = [CHOICE, TOGETHER] if together else [CHOICE]
    if (history := tables.folder / HISTORY).is_file():
        claims.append(history.read_text(encoding="utf-8").strip())
    equal_macs = [pair for pair in tables.pairs if pair["ours"].startswith(OURS)]
    for _, network in tables.networks().iterrows():
        if network["headline"] != 1 or network["artifact_sha256"] == network["reference_sha256"]:
            continue
        point = tables.summary[(tables.summary[POINT] == network[POINT]).all(axis=1)].iloc[0]
        text = (
            f"**{network_name(network)}** ({network['division']} division): a file "
            f"{factor(point['size_ratio'])} smaller at {delta_over_seeds(point)} points over "
            f"{count_seeds(point)}: {in_words(point['delta_ci_low'], point['delta_ci_high'])}."
        )
        if seen := together.get(tuple(network[column] for column in POINT)):
            near = "" if seen.low >= NO_LOSS else ", the nearest: none is likely without loss"
            text += f" On validation {seen.mean:+.2f} [{seen.low:+.2f}, {seen.high:+.2f}]{near}."
        same_kind = [tables.summary[c] == network[c] for c in ("dataset", "technique", "division")]
        short = tables.summary[np.logical_and.reduce(same_kind) & (tables.summary["control"] == ATTEMPT)]
        if fell_short := (short["no_loss"] == 0).sum():
            text += (
                f" Earlier attempts of its technique that fell short on the test set (control `{ATTEMPT}`): "
                f"{fell_short}."
            )
        rivals = [pair for pair in equal_macs if pair["ours"] == f"{network['method']} {network['point']}"]
        text += verdicts(
            (
                pair["verdict"],
                f"`{pair['theirs']}` ({pair['points']}, {pair['seeds']} of {count_seeds(point)})",
            )
            for pair in rivals
        )
        timed = tables.timed(network["artifact_sha256"])
        timed = timed[timed["p50_ms"].notna() & (timed["runtime"] != "eager")].sort_values("p50_ms")
        if len(timed):
            row = timed.iloc[0]
            inside = tables.differences(network, row)
            holds = in_words(inside["delta_ci_low"], inside["delta_ci_high"])
            text += (
                f" In {row['runtime']} {row['precision']} {row['p50_ms']:.3f} ms a picture: "
                f"{factor(row['speedup_eager_fp32'])} as fast as fp32 in eager, "
                f"{factor(row['speedup_best_fp32'])} as fast as the fastest fp32 runtime; "
                + "the time of the network that the file decodes to; " * bool(network["simulated"])
                + f"{in_points(inside)} points ({holds})"
                + ("." if pd.isna(row["agreement"]) else f", agreement {row['agreement']:.2f} %.")
            )
        claims.append(text)
    none = ["No row of this profile carries a claim (`headline` = 1)."]
    return "\n\n".join(claims if (tables.compression["headline"] == 1).any() else claims + none)
