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
# # 10 · The report: every number in one place
#
# This notebook reads the results of all others, checks them, and writes the tables, figures and text
# that the README shows. No result is typed: each number below is computed from a row, each row names its
# run, and the test predictions behind every accuracy lie beside the tables.

# %% tags=["parameters"]
upstream: list = []  # run folders of the other notebooks; empty: those of their defaults
seed: int = 1  # [0, 1000000] only names the run; nothing here is drawn
profile: str = "smoke"  # where the tables go: results/<profile>
run_dir: str = ""  # folder of this run; empty: results/smoke/10_report

# %%
import pandas as pd
from IPython.display import Image, Markdown, display

from nnc_utils import audit, figures, results
from nnc_utils.run import start

run = start("10_report", globals(), needs=("01_baseline", "02_quantization", "03_pruning", "07_deployment"))
figures.style()
folder = results.publish([part.folder for part in run.upstream], profile)

# %% [markdown]
# ## Is everything there?
#
# The audit recomputes each accuracy, difference and interval from the stored predictions, each speed-up
# from the medians of the rounds, and what is committed as a file from that file: its bytes, its counts, its predictions. It lists what does not agree.

# %% tags=["nbval-check-output"]
problems = audit.problems(folder)
print("\n".join(problems) or "nothing to object to")

# %% [markdown]
# Every table of every profile has the same columns, in the same order.

# %% tags=["nbval-check-output"]
for name in ("compression", "latency", "summary"):
    print(f"{name}.csv:", ", ".join(pd.read_csv(folder / f"{name}.csv").columns))

# %% [markdown]
# ## How small, how much worse, how fast?

# %%
figures.write(folder)
figures.show(
    figures.headline(folder),
    "Left: test accuracy against how many times smaller the file is. Right: against milliseconds a picture.",
)

# %% [markdown]
# ## What did each stage of the pipeline give?

# %%
compression, latency = (figures.read_table(folder / f"{kind}.csv") for kind in ("compression", "latency"))
if (figure := figures.waterfall(compression, latency)) is None:
    print("not among these runs")
else:
    figures.show(figure, "Bytes, milliseconds and test accuracy after each stage of the pipeline")

# %%
text = results.report(folder).splitlines()  # its figures are above
Markdown("\n".join(line for line in text if not line.startswith("![")))

# %% [markdown]
# ## What became of the usual recipe?
#
# What [00_the_usual_recipe](00_the_usual_recipe.ipynb) found: claimed, measured as published, measured when done right.

# %%
tables = [pd.DataFrame(part.extra["table"]) for part in run.upstream if "table" in part.extra]
display(*tables) if tables else print("not among these runs")

# %%
finished = run.finish()
print(f"{finished.run} is finished")

# %% [markdown]
# ## The committed results
#
# The same figures, of ResNet-18 on Fashion-MNIST; what is behind them stands in the report beside the tables.

# %%
committed = results.committed_profile(timed=True)
if committed is None:
    print("No committed tables yet: `make benchmark` makes them.")
else:
    for name, alt in results.FIGURES.items():
        if (picture := committed / f"figures/{name}.png").is_file():
            print(f"{committed.name}: {alt}")
            display(Image(picture, width=900))

# %% [markdown]
# ## What you can now do
#
# Trace any number: take a row of `compression.csv`, find its `run` in `provenance.json`, its predictions
# under the first 16 digits of its `artifact_sha256`, and recompute the accuracy with one line of NumPy.
