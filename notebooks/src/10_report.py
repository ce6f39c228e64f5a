# ---
# jupyter:
#   jupytext:
#     formats: ipynb,src//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · The report: how to read the tables
#
# Every notebook before this one wrote rows. This one reads the committed rows of the full benchmark, and then gathers
# the rows of your own runs. No result is typed here: each number is computed from a row, and each row from predictions
# that lie beside the tables.
#
# **You will be able to** trace any number back to its predictions, compute a paired interval by hand, say what a claim
# is and why it is not chosen on the test set, and read a comparison without being fooled by it. **You need** notebook
# [01](01_baseline.ipynb). **Time:** half an hour to read, a minute to run, once the runs of 01, 02, 03 and 07 are there.
#
# **Contents.**
# [1 · A row](#1-·-What-is-a-row?).
# [2 · An interval](#2-·-How-sure-is-a-difference?).
# [3 · Is the interval honest?](#3-·-Is-the-interval-honest?)
# [4 · Seeds](#4-·-What-do-seeds-add?).
# [5 · A verdict](#5-·-When-is-a-network-good-enough?).
# [6 · A claim](#6-·-Who-chooses-a-claim?).
# [7 · A race against rivals](#7-·-Does-it-beat-its-rivals?).
# [8 · Times](#8-·-Do-times-hold?).
# Then [the benchmark](#Benchmark:-the-tables-of-your-runs),
# [what you can now do](#What-you-can-now-do),
# [your predictions](#Your-predictions),
# [a summary](#Summary)
# and [a questionnaire](#Questionnaire).

# %% tags=["parameters"]
limit: float = -0.3  # [-10, 0] percentage points below the uncompressed network that still count as good
trials: int = 2000  # [1, 100000] simulated comparisons of networks that are equally good
seed: int = 1  # [0, 1000000] of that simulation
# what the benchmark also sets
upstream: list = []  # run folders of the other notebooks; empty: those of their defaults
profile: str = "smoke"  # where the tables go: results/<profile>
run_dir: str = ""  # folder of this run; empty: results/smoke/10_report

# %% tags=["setup"]
import numpy as np
from IPython.display import Markdown

from bench import audit, committed, publish, readme, report
from bench.folder import start
from nnc_utils import figures, rows
from nnc_utils.exercises import predictions

figures.style()
run = start("10_report", globals(), needs=("01_baseline", "02_quantization", "03_pruning", "07_deployment"))

# %% [markdown]
# ## 1 · What is a row?
#
# A [row](../docs/glossary.md#row) is one measurement of one file. `run` says which notebook of which
# [profile](../docs/glossary.md#profile) wrote it. `method` and `settings` are its
# [configuration](../docs/glossary.md#configuration), and `artifact_sha256` says which file it is about. Here is one: 8-bit
# weights, rounded without training.

# %% tags=["nbval-check-output"]
tables = committed.Tables(committed.committed_profile(timed=True))
uniform = tables.compression[tables.compression["method"] == "uniform"]
int8 = uniform[(uniform["setting.bits"] == 8) & (uniform["setting.reestimate"] == "")]
row = int8.iloc[0]
columns = ["run", "method", "settings", "seed", "artifact_bytes", "size_ratio", "accuracy", "artifact_sha256"]
row[columns].to_frame("one row")

# %% [markdown]
# **Predict:** which files do you need to compute its accuracy again? Two: the classes that this network predicted, and
# the true ones. Both are committed, one byte an image.

# %% tags=["nbval-check-output"]
def predicted_classes(sha256: str) -> np.ndarray:
    """The classes that a network predicted for the test images, (images,)."""
    return np.load(tables.folder / "predictions" / f"{sha256[:16]}.npy")


labels = np.load(tables.folder / "predictions" / f"labels-{row['dataset']}.npy")
right = predicted_classes(row["artifact_sha256"]) == labels
print(f"{right.sum():,} of {len(labels):,} images are right: {100 * right.mean():.2f} %")
print(f"the table says {row['accuracy']:.2f} %, so the ratio is {100 * right.mean() / row['accuracy']:.4f}")

# %% [markdown]
# ## 2 · How sure is a difference?
#
# How much worse than the uncompressed network is it? Both saw the same images, so compare image by image: a
# [paired interval](../docs/glossary.md#paired-interval). Let
# $d_i$ be $+100$ where only the compressed network is right, $-100$ where only its reference is, else 0. The difference
# in percentage points (pp) is the mean of $d$, and its 95 % interval $\bar d \pm 1.96\, s_d / \sqrt n$. For the
# deviation $s_d$ one image that is won and one that is lost are added, as in 01.
#
# **Predict:** an interval that ignores the pairing uses the spread of both networks instead of the spread of $d$. How
# many times wider is it?

# %%
predictions.predict("width unpaired ÷ paired", 1.4)

# %% tags=["nbval-check-output"]
def interval(d: np.ndarray) -> tuple[float, float, float]:
    """Lower end, mean and upper end of the 95 % interval of a mean, from values (n,)."""
    mean, deviation = d.mean(), np.append(d, [100, -100]).std(ddof=1)
    half = max(1.96 * deviation / len(d) ** 0.5, 300 / len(d))
    return mean - half, mean, mean + half


before = predicted_classes(row["reference_sha256"]) == labels
d = 100.0 * right - 100.0 * before
low, mean, high = interval(d)
unpaired = 1.96 * 100 * ((right.var() + before.var()) / len(labels)) ** 0.5
print(f"{(d > 0).sum()} images for the compressed network, {(d < 0).sum()} against it")
print(f"paired:   {mean:+.2f} [{low:+.2f}, {high:+.2f}] pp, as in the table: {rows.interval_text(row)}")
print(f"unpaired: ± {unpaired:.2f} pp")
predictions.measured("width unpaired ÷ paired", unpaired / (mean - low))

# %% [markdown]
# **What it means.** Most images cannot tell the two networks apart; only those that differ carry information. Pairing
# removes the noise that both networks share.
#
# ## 3 · Is the interval honest?
#
# Simulate two networks that are *equally* good and differ on as many images as these two. **Predict:** in what share of
# such comparisons does the 95 % interval exclude 0?

# %%
predictions.predict("intervals that exclude 0 by chance (%)", 5)

# %% tags=["nbval-check-output"]
random, differ = np.random.default_rng(seed), (d != 0).sum()
wins = random.binomial(differ, 0.5, size=trials)  # images for the first network, the rest for the second
fooled = 0
for won in wins:
    equal = np.zeros(len(d))
    equal[:differ] = np.where(np.arange(differ) < won, 100.0, -100.0)
    bottom, _, top = interval(equal)
    fooled += bottom > 0 or top < 0
print(f"{fooled} of {trials:,} intervals exclude 0 although nothing is different")
predictions.measured("intervals that exclude 0 by chance (%)", 100 * fooled / trials)
count = len(tables.pairs)
print(f"the report compares {count} pairs: up to {0.05 * count:.0f} would look different by chance alone")

# %% [markdown]
# **What it means.** The promise is 5 % at most. Where few images differ, the steps between possible results are coarse and
# the share is lower: the interval errs on the careful side.
#
# **What would fool you.** Read sixty comparisons and quote the best three: that is what chance gives. So the report
# shows all of them, and the pairs were fixed before anything was measured.
#
# ## 4 · What do seeds add?
#
# The interval speaks of other *images*. It does not speak of another training: for that the benchmark repeats
# everything with three seeds. $d_i$ is then the mean over the seeds.

# %% tags=["nbval-check-output"]
sides = [int8["artifact_sha256"], int8["reference_sha256"]]
hits = [np.stack([predicted_classes(sha256) == labels for sha256 in side]) for side in sides]
together = (100.0 * hits[0] - 100.0 * hits[1]).mean(0)
point = tables.over_seeds(row)
print("each seed:  ", "; ".join(rows.interval_text(one) for _, one in int8.iterrows()))
print("all seeds:   {1:+.2f} [{0:+.2f}, {2:+.2f}]".format(*interval(together)))
print(f"summary.csv: {rows.interval_text(point)}, {point['seeds']} seeds")
print(f"accuracies of the seeds deviate by {point['accuracy_sd']:.2f} pp, more than the difference")

# %% [markdown]
# ## 5 · When is a network good enough?
#
# "No loss" would be a claim about zero, and no finite test shows that. So fix a limit beforehand: a network is [*within*](../docs/glossary.md#within-03-pp)
# it if the whole interval is. **Predict** the verdicts of −0.05 ± 0.05, −0.26 ± 0.15 and −1.2 ± 0.3 pp at a limit of −0.3.

# %% tags=["nbval-check-output"]
import pandas as pd


def verdict(low: float, high: float) -> str:
    """Whether an interval lies above the limit: yes, no, or cannot tell."""
    if low >= limit:
        return "yes"
    return "no" if high < limit else "cannot tell"


for middle, half in ((-0.05, 0.05), (-0.26, 0.15), (-1.2, 0.3)):
    print(f"{middle:+.2f} ± {half:.2f} pp: {verdict(middle - half, middle + half)}")
ends = tables.summary[["delta_ci_low", "delta_ci_high"]].itertuples(index=False)
told = pd.Series([verdict(*end) for end in ends], name="within the limit")
told.value_counts().to_frame("configurations")

# %% [markdown]
# The package does the same, with the limit of the whole benchmark.

# %% tags=["nbval-check-output"]
packaged = [rows.within(point) for _, point in tables.summary.iterrows()]
print("the same verdicts" if limit == rows.NO_LOSS and packaged == list(told) else "another limit")

# %% [markdown]
# "Cannot tell" is an answer, too: with more test images the interval would be narrower.
#
# ## 6 · Who chooses a claim?
#
# Choose the smallest good file *on the test set*, and you choose luck with it. So a [claim](../docs/glossary.md#claim) is chosen on validation
# images: in each race the smallest file whose interval there lies above the limit. The test set then says whether it
# holds. Below is the race of the pipelines. **Predict** its winner before you read the last column.

# %% tags=["nbval-check-output"]
race = []
for key, choice in tables.chosen.items():
    if key[1] == "pipeline":
        point = tables.summary[(tables.summary[list(committed.KEY)] == list(key)).all(axis=1)].iloc[0]
        line = {"bytes": int(point["artifact_bytes"]), "validation: lower end": round(choice.low, 2)}
        line |= {"test: lower end": round(point["delta_ci_low"], 2), "chosen": choice.chosen}
        race.append({"configuration": point["title"].partition(": ")[2]} | line)
race = pd.DataFrame(race).sort_values("bytes").set_index("configuration")
race

# %% tags=["nbval-check-output"]
good = race[race["validation: lower end"] >= limit]
print(f"the smallest of {len(good)} that validation calls good: {good.index[0]}")
better = race[(race["test: lower end"] >= limit) & (race["bytes"] < good["bytes"].iloc[0])]
print(f"the test set would have let {len(better)} smaller ones pass: they are reported, and not claimed")

# %% [markdown]
# ## 7 · Does it beat its rivals?
#
# Small and good is not enough: a plain narrow network, trained for as long, might be as good. The verdict of a pair is
# *beats* (the interval lies above 0), *below* (it lies below 0) or *not below*, which means undecided.

# %% tags=["nbval-check-output"]
lines = []
for pair in tables.rivals:
    d = pair.difference
    own = "beats" if d["delta_ci_low"] > 0 else "below" if d["delta_ci_high"] < 0 else "not below"
    lines.append({"rival": pair.theirs["title"], "times its size": round(pair.bytes / pair.their_bytes, 2)})
    lines[-1] |= {"difference (pp)": rows.interval_text(d), "verdict": own, "seeds": pair.seeds}
    assert pair.verdict.startswith(own)
pd.DataFrame(lines).set_index("rival")

# %% [markdown]
# **What would fool you.** A verdict of one seed beside a claim of three. A rival that is beaten, but by a larger file:
# look at the column "times its size". "Not below" read as "as good as".
#
# ## 8 · Do times hold?
#
# Times were measured twice, in new processes. **Predict:** by how many percent does a speed-up change? Half of them change by
# less than the median.

# %%
predictions.predict("median change of a speed-up (%)", 5)

# %% tags=["nbval-check-output"]
both = committed.twice(tables.timings)
apart = both[f"{committed.FASTEST} apart"]
print(f"{(apart > 10).sum()} of {len(both)} speed-ups differ by more than 10 %")
predictions.measured("median change of a speed-up (%)", apart.median())
fastest = both.loc[both[committed.FASTEST].idxmax()]
first, second = fastest[committed.FASTEST], fastest[f"{committed.FASTEST} again"]
print(f"the largest: {first:.1f}× the fastest fp32 runtime, {second:.1f}× the second time")
print(f"({fastest['title']}, in {figures.name(fastest['runtime'])})")

# %% [markdown]
# ## Benchmark: the tables of your runs
#
# `publish` joins the runs, the audit recomputes every number in another way, and the report is written beside the tables.

# %% tags=["benchmark"]
folder = publish.publish([part.folder for part in run.upstream], profile)
print("\n".join(audit.problems(folder)) or "the audit has nothing to object to")

# %% tags=["benchmark"]
readme.draw(folder)
report.write(folder)
Markdown(report.text(folder, "headline"))

# %% tags=["benchmark"]
figures.show(figures.headline(folder), "Accuracy against times smaller, and accuracy against milliseconds")

# %% tags=["benchmark"]
print(f"{run.finish().run} is finished; the rest is in {folder.name}/report.md")

# %% [markdown]
# ## What you can now do
#
# Trace any number of the [report](../results/standard/report.md): take a row of `compression.csv`, find its `run` in
# `provenance.json`, its predictions under the first 16 digits of its `artifact_sha256`, and recompute the accuracy with
# one line of NumPy.

# %% [markdown]
# ## Your predictions
#
# How near were they? The bars begin at 1: no bar means that you understood.

# %%
shown = "For each prediction a bar: what was measured, divided by what was predicted"
figures.show(predictions.show(), shown)

# %% [markdown]
# ## Summary
#
# - A row is one measurement of one file. The predictions that it was computed from lie beside it.
# - Pairing removes the noise that both networks share, so that the interval is narrow.
# - A network is within a limit if the whole interval is. "Cannot tell" is an answer.
# - A claim is chosen on validation images, and judged once on the test set.
# - In a race count seeds, sizes and trainings on both sides. "Not below" means undecided.
#
# <!-- numbers:begin -->
# **In numbers.** Of 7 claims 2 are within 0.3 pp; for 2 the images cannot tell. Of 62 comparisons 14 are decided for
# the first of the pair and 11 against it; 37 are undecided.
# <!-- numbers:end -->
#
# ## Questionnaire
#
# Answer before you unfold.
#
# <details><summary>1. Why is the paired interval narrower than that of each accuracy?</summary>Most images are right or wrong for both networks. They add noise to each accuracy, and none to the difference.</details>
# <details><summary>2. What shrinks an interval: more seeds or more images?</summary>More images. Seeds say how much another training differs, which the interval does not contain.</details>
# <details><summary>3. Why are one win and one loss added before the deviation is taken?</summary>So that few differing images do not promise too much, and no interval has the width 0.</details>
# <details><summary>4. A difference is −0.05 [−0.11, +0.00]. Is the network within 0.3 pp?</summary>Yes: the whole interval is above −0.3.</details>
# <details><summary>5. A difference is −0.26 [−0.41, −0.10]. Is it?</summary>These images cannot tell: the interval holds −0.3.</details>
# <details><summary>6. Why is a claim chosen on validation images?</summary>The best of many on the test set is partly luck, and the test set can no longer say so.</details>
# <details><summary>7. Sixty pairs are compared. How many look different by chance?</summary>Up to three, where none is.</details>
# <details><summary>8. Why does a claim need three seeds?</summary>A single training may be lucky; the mean of three differs less.</details>
# <details><summary>9. Why are there two speed-ups, and which is honest?</summary>Against eager PyTorch a runtime alone gains much. Against the fastest fp32 runtime only compression counts.</details>
# <details><summary>10. Why does the audit not use the code that wrote the tables?</summary>A mistake in that code would agree with itself.</details>
#
# **Try it.** (1) Set `limit` to −0.1: how many verdicts change, and which claim would fall? Predict first. (2) Section 3
# with `differ` ten times as large: does the share change, and does the width of the interval? (3) Take the row of
# `hessian_rounding` with the smallest file and find out which images it loses: are they of one class?
#
# **Further reading.** Dietterich, [Approximate statistical tests for comparing supervised classification learning
# algorithms](https://direct.mit.edu/neco/article/10/7/1895/6224) (1998). Blalock et al., [What is the state of neural
# network pruning?](https://arxiv.org/abs/2003.03033) (2020).
#
# Next: [your own images](../README.md#your-own-data), the same benchmark for a network of yours.
