"""report.md, section by section."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nnc_utils.paired import thin_rivals
from nnc_utils.reports.claimed import claims_text
from nnc_utils.reports.committed import PROFILES, Tables, baselines
from nnc_utils.reports.goals import goals_text
from nnc_utils.reports.headline import table, verdict
from nnc_utils.reports.times import latency_text, twice_text
from nnc_utils.reports.words import (
    delta_over_seeds,
    factor,
    markdown,
    network_name,
    no_loss,
    number,
    verdicts,
    yes,
)
from nnc_utils.tables import PIPELINE, POINT

SMALLEST = PROFILES[-1]  # whose network is trained least: what it says may change
DELTAS = ("delta_mean", "delta_ci_low", "delta_ci_high")  # over the seeds, of summary.csv
FIGURES = {  # in figures/ of a profile, and what they show
    "headline": "Size against accuracy, and accuracy against milliseconds",
    "waterfall": "Bytes, milliseconds and accuracy after each stage of the pipeline",
}


def _ranking(tables: Tables, division: str) -> str:
    chosen = tables.summary[tables.summary["division"] == division]
    chosen = chosen.sort_values(["no_loss", "size_ratio"], ascending=False, kind="stable")
    lines = []
    dense = tables.compression[baselines(tables.compression)]["macs"].max()
    for _, row in chosen.iterrows():
        lines.append(
            {
                "technique": row["technique"],
                "method": row["method"],
                "point": row["point"] or "–",
                "control": row["control"] or "–",
                "claim": yes(row["headline"] == 1),
                "accuracy (sd)": f"{row['accuracy_mean']:.2f} ({number(row['accuracy_sd'], '.2f')})",
                "Δ points [95 %]": delta_over_seeds(row),
                "no loss": no_loss(row["delta_ci_low"], row["delta_ci_high"]),
                "smaller": factor(row["size_ratio"]),
                "bytes": f"{row['artifact_bytes']:,.0f}",
                "fewer MACs": factor(dense / row["macs"]),
                "seeds": str(row["seeds"]),
            }
        )
    return markdown(lines)


def _stops_paying(tables: Tables) -> str:
    """The smallest file of each technique without loss, and the next smaller one; or the nearest to that."""
    lines = []
    ours = tables.summary[(tables.summary["control"] == "") & (tables.summary["technique"] != "baseline")]
    thin = tables.compression[thin_rivals(tables.compression)][POINT].drop_duplicates()
    ours = pd.concat([ours, tables.summary.merge(thin, on=POINT).assign(technique="the thin rivals")])
    for (technique, division), rows in ours.groupby(["technique", "division"], sort=False):
        rows = rows.sort_values("size_ratio", kind="stable")
        good = rows[rows["no_loss"] == 1].tail(1)
        smaller = rows[rows["size_ratio"] > good["size_ratio"].max()]
        if good.empty:
            smaller = rows.sort_values("delta_ci_low", ascending=False, kind="stable")
        line = {"technique": technique, "division": division}
        for name, found in (("smallest without loss", good), ("beyond, or else nearest", smaller.head(1))):
            line[name], line[f"{name}: Δ points"] = "none", "–"
            for _, row in found.iterrows():
                line[name] = f"{row['method']} {row['point']}".strip() + f", {factor(row['size_ratio'])}"
                line[f"{name}: Δ points"] = delta_over_seeds(row)
        lines.append(line)
    return markdown(lines)


def _zeros(tables: Tables) -> list[str]:
    """A section on the zeros in stem, stages and classifier of masked networks, where they are known."""
    records = [record for run in tables.provenance.values() for record in run["artifacts"]]
    known = {record["artifact_sha256"]: record["zeros"] for record in records if "zeros" in record}
    rows = tables.compression[tables.compression["artifact_sha256"].isin(known)]
    rows = rows.sort_values("seed", kind="stable").drop_duplicates(POINT)
    rows = rows.merge(tables.summary[[*POINT, *DELTAS]], on=POINT, suffixes=("_alone", ""))
    names = {part for counts in known.values() for part in counts}
    names = sorted(names, key=lambda part: (part == "fc", part))
    lines = []
    for _, row in rows.iterrows():
        counts = known[row["artifact_sha256"]]
        zeros, weights = map(sum, zip(*counts.values(), strict=True))
        shares = {part: 100 * counts[part][0] / counts[part][1] for part in names if part in counts}
        line = {"network": f"{network_name(row)}, seed {row['seed']}", "all": 100 * zeros / weights, **shares}
        lines.append((line, delta_over_seeds(row)))
    lines.sort(key=lambda pair: pair[0]["all"])
    told = [
        {"network": line["network"], "Δ points [95 %]": delta}
        | {part: number(line.get(part), ".1f") for part in ("all", *names)}
        for line, delta in lines
    ]
    about = "Percent of the weights in each part of a masked network.\n\n"
    return ["## Where do the zeros lie?", about + markdown(told)] if told else []


def _not_measured(tables: Tables) -> str:
    missing = []
    for _, network in tables.networks().iterrows():
        if not len(tables.timed(network["artifact_sha256"])):
            missing.append(f"{network_name(network)}: its time.")
    absent = tables.latency[tables.latency["p50_ms"].isna()]
    where = {f"{row['runtime']} {row['precision']}": tables.why(row) for _, row in absent.iterrows()}
    missing += [f"{name}: {why}." for name, why in sorted(where.items())]
    if single := (tables.summary["seeds"] == 1).sum():
        missing.append(
            f"The spread between seeds of {single} of {len(tables.summary)} points: they have one, so their "
            "intervals are about these networks."
        )
    for run, record in tables.provenance.items():
        if seen := record["extra"].get("search", {}).get("images", {}).get("supernet"):
            missing.append(f"The search of {run} in `train_images`: its supernet saw {seen:,} pictures.")
        points = record["extra"].get("missing", {}).items()
        missing += [f"{point}: {why}." for point, why in points if ":" in point]
        for entry in record["artifacts"]:
            if entry["headline"] and entry["committed"].startswith("not"):
                why = entry["committed"].removeprefix("not: ")
                missing.append(f"The network {Path(entry['path']).stem} again, in this repository: {why}.")
    return "\n".join(f"- {line}" for line in missing) or "- Nothing that the tables promise."


def _provenance(tables: Tables) -> str:
    lines = [
        {
            "run": run,
            "seed": str(record["seed"]),
            "commit": record["commit"][:12] + ("-dirty" if record["commit"].endswith("-dirty") else ""),
            "code": tables.code[run],
            "seconds": f"{record['wall_seconds']:.0f}",
        }
        for run, record in sorted(tables.provenance.items())
    ]
    told: dict[str, list[str]] = {}
    for run, record in sorted(tables.provenance.items()):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        machine = [f"{k}: {v}" for k, v in record["hardware"].items() if k != "load_average"]
        told.setdefault(f"Versions: {versions}.\n\nMachine: {', '.join(machine)}.", []).append(run)
    texts = [f"{', '.join(runs)}:\n\n" * (len(told) > 1) + text for text, runs in told.items()]
    return "\n\n".join([markdown(lines), *texts])


def _reversed(tables: Tables) -> list[str]:
    """A section on the points, and the pairs, that had another verdict in the smallest profile."""
    folder = tables.folder.parent / SMALLEST
    if folder == tables.folder or not (folder / "summary.csv").is_file():
        return []
    small, lines = Tables(folder), []
    both = small.summary.merge(tables.summary, on=POINT, suffixes=("_small", ""))
    for _, row in both.iterrows():
        before = row.filter(like="_small").rename(lambda column: column.removesuffix("_small"))
        told = [no_loss(point["delta_ci_low"], point["delta_ci_high"]) for point in (before, row)]
        if told[0] != told[1]:
            line = {"what": " ".join(filter(None, (row["method"], row["point"])))} | {"asked": "no loss?"}
            line |= {f"in {SMALLEST}": f"{told[0]}, {delta_over_seeds(before)}"}
            lines.append(line | {"here": f"{told[1]}, {delta_over_seeds(row)}"})
    earlier = {(pair["ours"], pair["theirs"]): pair for pair in small.pairs}
    for pair in tables.pairs:
        before = earlier.get((pair["ours"], pair["theirs"]), pair)
        if before["verdict"] != pair["verdict"]:
            line = {"what": f"{pair['ours']} against {pair['theirs']}", "asked": "which is better?"}
            line |= {f"in {SMALLEST}": f"{before['verdict']}, {before['points']}"}
            lines.append(line | {"here": f"{pair['verdict']}, {pair['points']}"})
    about = (
        f"Points and pairs of both profiles with another verdict here than in {SMALLEST}. There the fp32 "
        f"network is right on {_accuracy(small)} % of the test pictures, here on {_accuracy(tables)} %.\n\n"
    )
    return [f"## What changed from the {SMALLEST} profile?", about + markdown(lines)]


def _accuracy(tables: Tables) -> str:
    """Of the uncompressed networks, their mean."""
    return f"{tables.compression[baselines(tables.compression)]['accuracy'].mean():.1f}"


def _orders(tables: Tables) -> list[str]:
    """A section on the pipeline's stages in another order, at the same budgets, where there are such rows."""
    stages, lines, said = sorted(PIPELINE.split("_")), [], {}
    for pair in tables.pairs:
        if sorted(pair["theirs"].partition(" ")[0].split("_")) == stages:
            lines.append(pair)
            about = f"`{pair['theirs']}` ({int(pair['their bytes']):,} bytes, {pair['points']})"
            ours = f"`{pair['ours']}` ({int(pair['bytes']):,} bytes)"
            said.setdefault(ours, []).append((pair["verdict"], about))
    about = "The same stages, budgets and number of training pictures. “Undecided”: the interval holds 0.\n\n"
    about += "\n\n".join(f"{ours}:{verdicts(told)}" for ours, told in said.items())
    return ["## Does the order matter?", f"{about}\n\n{markdown(lines)}"] if lines else []


def _side_by_side(tables: Tables) -> str:
    text = (
        "“not below” is undecided. A student whose point ends in "
        "`shuffled` had a teacher of wrong answers, as a control.\n\n" + markdown(tables.pairs)
    )
    if tables.closed_gaps:
        text += (
            "\n\nFrom the student alone to the uncompressed network: what a teacher closes of that gap:\n\n"
        )
        text += markdown(tables.closed_gaps)
    return text


def report_text(profile_dir: Path) -> str:
    """What ``report.md`` of a profile says, from its tables."""
    tables = Tables(profile_dir)
    drawn = {
        name: f"![{alt}](figures/{name}.png)\n\n" if (tables.folder / f"figures/{name}.png").is_file() else ""
        for name, alt in FIGURES.items()
    }
    return "\n\n".join(
        [
            f"# Results of the {tables.compression.iloc[0]['profile']} profile",
            verdict(profile_dir),
            *goals_text(tables),
            "## Chosen on validation",
            claims_text(tables),
            "## Headline",
            drawn["headline"] + table(profile_dir),
            "## Closed division: no gradient step after the baseline",
            _ranking(tables, "closed"),
            "## Open division: retrained, or another architecture",
            _ranking(tables, "open"),
            "## Where does each technique stop paying?",
            "Read off the test set, so a guide and no claim: claims were chosen on validation.\n\n"
            + _stops_paying(tables),
            "## Side by side: paired differences",
            drawn["waterfall"] + _side_by_side(tables),
            *_orders(tables),
            *_reversed(tables),
            *_zeros(tables),
            "## Time",
            latency_text(tables),
            "## Time, measured twice",
            twice_text(tables),
            "## Not measured",
            _not_measured(tables),
            "## Provenance",
            _provenance(tables),
        ]
    )
