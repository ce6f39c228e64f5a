"""The figures draw the numbers of the tables, all of them."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from nnc_utils import figures


@pytest.fixture(autouse=True)
def closed():
    figures.style()
    yield
    plt.close("all")


def table(*rows, columns=("technique", "method", "settings", "control", "accuracy", "size_ratio"), **more):
    common = {"dataset": "digits", "headline": 0, "seed": 1, "run": "r", "params": 9}
    frame = pd.DataFrame([common | dict(zip(columns, row, strict=True)) for row in rows])
    delta = frame["accuracy"] - 92.0
    frame = frame.assign(accuracy_delta=delta, delta_ci_low=delta - 0.1, delta_ci_high=delta + 0.1)
    return frame.assign(**more)


COMPRESSION = table(
    ("baseline", "train", "", "", 92.0, 1.0),
    ("quantization", "uniform", '{"bits":8}', "", 91.9, 4.6),
    ("quantization", "uniform", '{"bits":4}', "", 80.0, 9.1),
)
LATENCY = pd.DataFrame(
    {
        "technique": ["baseline", "baseline", "quantization", "baseline", "baseline", "quantization"],
        "method": ["train", "train", "uniform", "identity", "train", "uniform"],
        "settings": ["", "", '{"bits":8}', "", "", '{"bits":8}'],
        "control": ["", "", "", "identity", "", "again"],
        "runtime": ["eager", "onnxruntime", "onnxruntime", "onnxruntime", "onnxruntime", "onnxruntime"],
        "precision": ["fp32", "fp32", "int8", "fp32", "fp32", "int8"],
        "batch": [1, 1, 1, 1, 64, 1],
        "threads": [1, 1, 1, 1, 1, 1],
        "p50_ms": [7.0, 4.0, 1.25, 0.01, 170.0, 1.3],
        "accuracy": [92.0, 91.5, 91.9, None, 92.0, None],
        "artifact_sha256": ["a", "a", "b", "", "a", "b"],
    }
)


def drawn(axes):
    """Label of each series -> its points."""
    return {bars.get_label(): bars.lines[0].get_xydata().round(6).tolist() for bars in axes.containers}


def interval_lengths(axes):
    ends = [bar for bars in axes.containers for bar in bars.lines[2][0].get_segments()]
    return {round(float(high - low), 6) for (_, low), (_, high) in ends}


def test_size_against_accuracy_holds_every_row_with_its_interval():
    axes = figures.size_against_accuracy(COMPRESSION).axes[0]
    assert drawn(axes) == {"uncompressed": [[1.0, 92.0]], "uniform": [[4.6, 91.9], [9.1, 80.0]]}
    assert interval_lengths(axes) == {0.2} and not axes.get_legend().get_title().get_text()
    assert {text.get_text() for text in axes.texts} >= {"8", "4", "↓ 1 more down to 80.0 %", "−0.3 pp"}
    assert axes.get_ylim()[0] == pytest.approx(89.0)


def test_configurations_are_drawn_over_their_seeds_and_a_line_joins_one_budget(tmp_path):
    rows = table(
        ("baseline", "train", "", "", 92.0, 1.0, 1),
        ("baseline", "train", "", "", 94.0, 1.0, 2),
        ("pipeline", "pipeline", '{"lambda_":1e-9,"macs":8}', "", 91.0, 100.0, 1),
        ("pipeline", "pipeline", '{"lambda_":1e-9,"macs":8}', "", 93.8, 110.0, 2),
        ("pipeline", "pipeline", '{"lambda_":2e-9,"macs":8}', "", 90.0, 200.0, 1),
        ("pipeline", "pipeline", '{"lambda_":1e-9,"macs":4}', "", 91.5, 90.0, 1),
        ("baseline", "small_dense", '{"lambda_":1e-9,"macs":8}', "small_dense", 91.0, 95.0, 1),
        ("baseline", "small_dense", '{"lambda_":2e-9,"macs":8}', "small_dense", 90.5, 150.0, 1),
        columns=("technique", "method", "settings", "control", "accuracy", "size_ratio", "seed"),
    )
    rows["accuracy_delta"] = rows["accuracy"] - rows["seed"].map({1: 92.0, 2: 94.0})
    rows.to_csv(tmp_path / "compression.csv", index=False)
    summary = rows.groupby(figures.KEY, dropna=False, sort=False)["accuracy_delta"].mean()
    summary = summary.rename("delta_mean").reset_index()
    ends = {"delta_ci_low": summary["delta_mean"] - 0.4, "delta_ci_high": summary["delta_mean"] + 0.3}
    summary.assign(**ends).to_csv(tmp_path / "summary.csv", index=False)
    axes = figures.size_against_accuracy(figures.read_table(tmp_path / "compression.csv")).axes[0]
    pipeline = "pipeline, prune → distill → quantize, MACs ÷ {}"
    assert drawn(axes) == {
        "uncompressed": [[1.0, 93.0]],
        pipeline.format(4): [[90.0, 92.5]],
        pipeline.format(8): [[105.0, 92.4], [200.0, 91.0]],
        "narrow ResNet-18, MACs ÷ 8": [[95.0, 92.0], [150.0, 91.5]],
    }
    assert interval_lengths(axes) == {0.7}  # of summary.csv, not of one seed
    hollow = [line.get_xydata().tolist() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert sorted(x for points in hollow for x, _ in points) == [90.0, 95.0, 150.0, 200.0]
    assert axes.get_legend().get_title().get_text() == "hollow: fewer than 2 seeds"


def test_six_series_are_named_and_the_others_grey():
    scores = ("magnitude", "gradient", "taylor", "obd_fisher", "obd_hessian")
    rows = [
        ("pruning", "weights", f'{{"score":"{s}","sparsity":{x}}}', "", 91.0, 2.0)
        for s in scores
        for x in (0.5, 0.9)
    ]
    rows += [
        ("pruning", "obs", '{"sparsity":0.9}', "", 91.0, 2.0),
        ("pruning", "blocks", '{"removed":1}', "", 91.0, 2.0),
    ]
    claimed = table(("baseline", "train", "", "", 92.0, 1.0), *rows)
    claimed["headline"] = (claimed["method"] == "blocks").astype(int)
    axes = figures.size_against_accuracy(claimed).axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(names) == 7 and "2 others" in names and "blocks" in names


def test_claims_against_accuracy_fills_what_is_claimed_and_omits_controls():
    shown = COMPRESSION.assign(headline=[0, 1, 0])
    more = table(
        ("baseline", "small_dense", '{"macs":8}', "small_dense", 91.0, 5.0),
        ("pruning", "weights", '{"score":"random","sparsity":0.9}', "random", 91.0, 3.0),
        ("pipeline", "pipeline", '{"bits":4,"macs":6}', "after_prune", 91.0, 3.0),
        ("peer", "xz", '{"of":{"bits":8,"method":"uniform"}}', "", 91.0, 3.0),
    )
    axes = figures.claims_against_accuracy(pd.concat([shown, more])).axes[0]
    filled = {tuple(p) for bars in axes.containers for p in bars.lines[0].get_xydata().tolist()}
    assert filled == {(4.6, 91.9)} and "5×" in {text.get_text() for text in axes.texts}
    hollow = [dots for dots in axes.collections if len(dots.get_facecolors())]
    points = {tuple(point) for dots in hollow for point in dots.get_offsets().tolist()}
    assert points == {(1.0, 92.0), (4.6, 91.9), (9.1, 80.0), (5.0, 91.0)}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["uncompressed", "quantized", "narrow, equal training budget"]


def test_macs_and_parameters_are_the_other_axes():
    rows = table(
        ("baseline", "train", "", "", 92.0, 800),
        ("pruning", "channels", '{"macs":2,"train":"finetune"}', "", 91.9, 400),
        ("pruning", "channels", '{"macs":4,"train":"finetune"}', "", 91.0, 200),
        ("distillation", "student_alone", '{"width":0.25}', "student_alone", 90.0, 100),
        columns=("technique", "method", "settings", "control", "accuracy", "macs"),
    )
    rows["params"] = rows["macs"]
    axes = figures.macs_against_accuracy(rows).axes[0]
    assert drawn(axes)["channels, fine-tuned, fisher"] == [[2.0, 91.9], [4.0, 91.0]]
    axes = figures.parameters_against_accuracy(rows).axes[0]
    assert drawn(axes)["student alone"] == [[100, 90.0]]
    colours = {bars.get_label(): bars.lines[0].get_color() for bars in axes.containers}
    assert colours["student alone"] == "grey" != colours["uncompressed"]


def test_frontier_holds_every_network_and_joins_the_best():
    axes = figures.frontier(LATENCY).axes[0]
    points = [tuple(point) for dots in axes.collections for point in dots.get_offsets().tolist()]
    assert sorted(points) == [(1.25, 91.9), (4.0, 91.5)]  # each network in its fastest runtime
    [line] = axes.lines
    assert list(line.get_xdata()) == [1.25]  # a tenth of a point more is not worth 7 ms
    assert not figures.frontier(LATENCY.assign(batch=8)).axes[0].get_legend()


def test_worth_having_is_what_noise_does_not_decide():
    networks = pd.DataFrame(
        [(1.0, 87.0), (1.08, 89.0), (1.16, 90.0), (2.0, 88.0), (3.0, 90.2), (4.0, 91.0), (5.0, 91.0)],
        columns=["p50_ms", "accuracy"],
    )
    # as fast as the first and better; slower and better; slower and worse; a hair better; better; only slower
    assert list(figures._worth_having(networks)["p50_ms"]) == [1.08, 1.16, 4.0]


def test_labels_of_parameters_do_not_overlap():
    rows = [("baseline", "train", "", "", 90.0 + place, 1) for place in range(5)]
    counts = [120_000, 330_000, 420_000, 900_000, 11_172_810]
    figure = figures.parameters_against_accuracy(table(*rows, params=counts))
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) >= 3 and all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:]))


def test_headline_reads_the_tables_of_a_profile(tmp_path):
    COMPRESSION.to_csv(tmp_path / "compression.csv", index=False)
    LATENCY.to_csv(tmp_path / "latency.csv", index=False)
    figure = figures.headline(tmp_path)
    figure.tight_layout()  # as `show` does
    figure.canvas.draw()
    top = figure.legends[0].get_window_extent().y1
    assert all(top <= axes.xaxis.label.get_window_extent().y0 for axes in figure.axes)
    figure.savefig(tmp_path / "headline.png")
    assert len(figure.axes) == 2
    assert 10_000 < (tmp_path / "headline.png").stat().st_size < 200_000


def test_the_waterfall_goes_through_the_stages_in_the_runtime_that_has_them_all():
    assert figures.waterfall(COMPRESSION) is None
    settings = '{"bits":4,"macs":6,"stages":["prune","quantize","distill"]}'
    stages = table(
        ("pipeline", "pipeline", settings, "after_prune", 90.0, 2.0),
        ("pipeline", "pipeline", settings, "after_quantize", 89.0, 10.0),
        ("pipeline", "pipeline", settings, "", 91.0, 11.0),
        artifact_bytes=[400, 100, 90],
        macs=2e6,
        artifact_sha256=["p", "q", "r"],
    )
    dense = COMPRESSION.head(1).assign(artifact_bytes=1000, macs=8e6, artifact_sha256="a")
    rows = pd.concat([dense, stages])
    panels = figures.waterfall(rows).axes
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert heights == [[1000, 400, 100, 90], [8, 2, 2, 2], []]
    assert list(panels[2].lines[0].get_ydata()) == [92, 90, 89, 91]
    names = [label.get_text() for label in panels[0].get_xticklabels()]
    assert names == ["fp32", "prune", "quantize", "distill"]
    times = {("a", "onnxruntime"): 4.0, ("p", "onnxruntime"): 2.0, ("q", "onnxruntime"): 0.5}
    times |= {("r", "onnxruntime"): 0.5, ("r", "executorch"): 0.1, ("a", "executorch"): 3.0}
    common = {"precision": "int8", "batch": 1, "threads": 1, "control": "", "method": "pipeline"}
    common["settings"] = settings
    timed = pd.DataFrame(
        [{"artifact_sha256": s, "runtime": r, "p50_ms": ms} | common for (s, r), ms in times.items()]
    )
    middle = figures.waterfall(rows, timed).axes[1]
    assert middle.get_title() == "milliseconds in ONNX Runtime, the last in int8 (log)"  # the other lacks two
    assert [bar.get_height() for bar in middle.patches] == [4.0, 2.0, 0.5, 0.5]
