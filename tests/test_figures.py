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


COMPRESSION = pd.DataFrame(
    {
        "technique": ["baseline", "quantization", "quantization"],
        "method": ["train", "uniform_per_channel", "uniform_per_channel"],
        "point": ["", "bits=8", "bits=4"],
        "control": ["", "", ""],
        "headline": [0, 1, 0],
        "accuracy": [92.0, 91.9, 80.0],
        "seed": [1, 1, 1],
        "accuracy_delta": [0.0, -0.1, -12.0],
        "delta_ci_low": [0.0, -0.2, -12.5],
        "delta_ci_high": [0.0, 0.0, -11.5],
        "size_ratio": [1.0, 4.6, 9.1],
    }
)
LATENCY = pd.DataFrame(
    {
        "model": "resnet18",
        "technique": ["baseline", "baseline", "quantization", "baseline", "baseline", "quantization"],
        "method": ["train", "train", "uniform_per_channel", "identity", "train", "uniform_per_channel"],
        "point": ["", "", "bits=8", "", "", "bits=8"],
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


def test_size_against_accuracy_holds_every_row_with_its_interval():
    axes = figures.size_against_accuracy(COMPRESSION).axes[0]
    drawn = {tuple(point) for bars in axes.containers for point in bars.lines[0].get_xydata().tolist()}
    assert drawn == set(zip(COMPRESSION["size_ratio"], COMPRESSION["accuracy"], strict=True))
    intervals = [segment for bars in axes.containers for segment in bars.lines[2][0].get_segments()]
    ends = {(round(float(low), 6), round(float(high), 6)) for (_, low), (_, high) in intervals}
    assert ends == {(92.0, 92.0), (91.8, 92.0), (79.5, 80.5)}
    assert not axes.get_legend().get_title().get_text()
    assert {text.get_text() for text in axes.texts} >= {"8", "4", "↓ 1 more down to 80.0 %"}
    assert axes.get_ylim()[0] == pytest.approx(88.0)


def test_size_against_accuracy_shows_points_over_their_seeds_and_joins_only_what_the_rate_changes(tmp_path):
    rows = [
        ("baseline", "train", "", "", 1, 92.0, 1.0, 0.0),
        ("baseline", "train", "", "", 2, 94.0, 1.0, 0.0),
        ("pipeline", "prune_distill_quantize", "macs=8x,rate=1e-9", "", 1, 91.0, 100.0, -1.0),
        ("pipeline", "prune_distill_quantize", "macs=8x,rate=1e-9", "", 2, 93.8, 110.0, -0.2),
        ("pipeline", "prune_distill_quantize", "macs=8x,rate=2e-9", "", 1, 90.0, 200.0, -2.0),
        ("pipeline", "prune_distill_quantize", "macs=4x,rate=1e-9", "", 1, 91.5, 90.0, -0.5),
        ("pipeline", "prune_distill_quantize", "macs=4x,rate=2e-9", "attempt", 1, 91.0, 95.0, -1.0),
        ("baseline", "small_dense", "macs=8x,rate=1e-9", "small_dense", 1, 91.0, 95.0, -1.0),
        ("baseline", "small_dense", "macs=8x,rate=2e-9", "small_dense", 1, 90.5, 150.0, -1.5),
    ]
    columns = ["technique", "method", "point", "control", "seed", "accuracy", "size_ratio", "accuracy_delta"]
    table = pd.DataFrame(rows, columns=columns).assign(dataset="fashion_mnist")
    own = {"delta_ci_low": table["accuracy_delta"] - 0.1, "delta_ci_high": table["accuracy_delta"] + 0.1}
    table.assign(**own).to_csv(tmp_path / "compression.csv", index=False)
    summary = table.groupby(["dataset", *columns[:4]], dropna=False, sort=False)["accuracy_delta"].mean()
    summary = summary.rename("delta_mean").reset_index()
    summary = summary.assign(
        delta_ci_low=summary["delta_mean"] - 0.4, delta_ci_high=summary["delta_mean"] + 0.3
    )
    summary.to_csv(tmp_path / "summary.csv", index=False)
    axes = figures.size_against_accuracy(figures.read_table(tmp_path / "compression.csv")).axes[0]
    drawn = {bars.get_label(): bars.lines[0].get_xydata().round(6).tolist() for bars in axes.containers}
    assert drawn == {
        "ResNet, fp32": [[1.0, 93.0]],
        "prune → distill → quantize, MACs ÷ 4": [[90.0, 92.5], [95.0, 92.0]],
        "prune → distill → quantize, MACs ÷ 8": [[105.0, 92.4], [200.0, 91.0]],
        "small dense, MACs ÷ 8": [[95.0, 92.0], [150.0, 91.5]],
    }
    joined = {bars.get_label() for bars in axes.containers if bars.lines[0].get_linestyle() == "-"}
    assert joined == set(drawn) - {"prune → distill → quantize, MACs ÷ 4"}  # one of them is an attempt
    ends = [bar for bars in axes.containers for bar in bars.lines[2][0].get_segments()]
    assert {round(float(high - low), 6) for (_, low), (_, high) in ends} == {0.7}
    assert axes.get_ylabel() == "test accuracy (%), fp32: mean of 2 seeds"
    hollow = [line.get_xydata().tolist() for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert sorted(x for points in hollow for x, _ in points) == [90.0, 95.0, 95.0, 150.0, 200.0]
    assert axes.get_legend().get_title().get_text() == "hollow: fewer than 2 seeds"


def test_claims_against_accuracy_fills_what_is_claimed_and_leaves_controls_out():
    more = COMPRESSION.tail(1).assign(accuracy=91.0, size_ratio=3.0)
    thin = more.assign(method="small_dense", technique="baseline", control="small_dense", size_ratio=5.0)
    left_out = [more.assign(control="random"), more.assign(control="after_prune"), more.assign(method="xz")]
    axes = figures.claims_against_accuracy(pd.concat([COMPRESSION, thin, *left_out])).axes[0]
    filled = {tuple(p) for bars in axes.containers for p in bars.lines[0].get_xydata().tolist()}
    assert filled == {(4.6, 91.9)} and "5×" in {text.get_text() for text in axes.texts}
    hollow = [dots for dots in axes.collections if len(dots.get_facecolors())]
    points = {tuple(point) for dots in hollow for point in dots.get_offsets().tolist()}
    assert points == {(1.0, 92.0), (4.6, 91.9), (9.1, 80.0), (5.0, 91.0)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "uncompressed",
        "quantized",
        "thin, trained as long",
    ]


def test_macs_against_accuracy_joins_equal_treatments_and_leaves_rounded_weights_out():
    rows = [
        ("baseline", "train", "", "", 800, 92.0),
        ("pruning", "channels_l1", "macs=2x tuned", "", 400, 91.9),
        ("pruning", "channels_l1", "macs=4x tuned", "", 200, 91.0),
        ("pruning", "channels_l1", "macs=4x tuned int8", "", 200, 90.9),
        ("pruning", "channels_l1", "macs=4x", "", 200, 89.5),
        ("pruning", "from_scratch", "macs=4x", "from_scratch", 200, 91.2),
        ("baseline", "small_dense", "macs=4x", "small_dense", 200, 91.1),
        ("baseline", "small_dense", "macs=4x,rate=1e-9", "small_dense", 200, 91.0),
        ("baseline", "small_dense", "macs=8x", "small_dense", 100, 91.0),  # of the pipeline's notebook
        ("pruning", "magnitude_global", "sparsity=0.9 tuned", "", 800, 91.5),
        ("pruning", "magnitude_global", "sparsity=0.9 bn", "", 800, 90.5),
    ]
    columns = ("technique", "method", "point", "control", "macs", "accuracy")
    table = pd.DataFrame(rows, columns=columns)
    closed = table["point"].isin(["", "macs=4x", "sparsity=0.9 bn"]) & (table["control"] == "")
    table["division"] = closed.map({True: "closed", False: "open"})
    table["run"] = (table["macs"] == 100).map(
        {True: "quick/06_pipeline/seed=1", False: "quick/03_pruning/seed=1"}
    )
    table = table.assign(seed=1, accuracy_delta=0.0, delta_ci_low=-0.1, delta_ci_high=0.1, size_ratio=1.0)
    axes = figures.macs_against_accuracy(table).axes[0]
    lines = {c.get_label(): sorted(c.lines[0].get_xdata()) for c in axes.containers}
    assert len({x for xs in lines.values() for x in xs}) == sum(map(len, lines.values()))  # side by side
    lines = {label: [round(x) for x in xs] for label, xs in lines.items()}
    assert lines == {
        "ResNet, fp32": [1.0],
        "channels l1, tuned": [2.0, 4.0],
        "channels l1": [4.0],
        "magnitude global, tuned": [1.0],
        "from scratch": [4.0],
        "small dense": [4.0],
    }


def test_parameters_against_accuracy_holds_the_means_and_spreads_of_all_arms():
    rows = [
        ("baseline", "train", "", "", 8_000, 93.0, 1),
        ("distillation", "student_alone", "width=0.25", "student_alone", 500, 91.0, 1),
        ("distillation", "student_alone", "width=0.25", "student_alone", 500, 92.0, 2),
        ("distillation", "kd", "width=0.25,T=4", "", 500, 92.5, 1),
        ("distillation", "kd", "width=0.5,T=4", "", 2_000, 92.8, 1),
        ("distillation", "kd", "width=0.25,T=4,shuffled", "shuffled_teacher", 500, 60.0, 1),
    ]
    columns = ("technique", "method", "point", "control", "params", "accuracy", "seed")
    table = pd.DataFrame(rows, columns=columns)
    table = table.assign(accuracy_delta=0.0, delta_ci_low=-0.2, delta_ci_high=0.2)
    axes = figures.parameters_against_accuracy(table).axes[0]
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert list(drawn) == ["student alone", "soft labels", "shuffled teacher"]
    assert [list(bars.lines[0].get_ydata()) for bars in drawn.values()] == [[91.5], [92.5, 92.8], [60.0]]
    halves = [
        round(float(ends[1][1] - ends[0][1]) / 2, 4)
        for bars in drawn.values()
        for ends in bars.lines[2][0].get_segments()
    ]
    assert halves == [round(0.5**0.5, 4), 0.2, 0.2, 0.2]  # between seeds; of one seed its interval
    greys = [bars.lines[0].get_color() == "grey" for bars in drawn.values()]
    assert greys == [True, False, True]
    assert "↓ 1 more down to 60.0 %" in {text.get_text() for text in axes.texts}
    # what lies below the axis is not in the legend
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student alone", "soft labels"]


def test_latency_bars_are_the_medians_at_batch_one_without_the_identity():
    axes = figures.latency_bars(LATENCY).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [7.0, 4.0, 1.25]
    assert [text.get_text().strip() for text in axes.texts] == ["7.00 ms", "4.00 ms", "1.25 ms"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert (
        labels[0] == "eager PyTorch fp32, resnet18" and labels[2] == "ONNX Runtime int8, per channel 8 bits"
    )


def test_frontier_holds_every_network_and_joins_the_best():
    axes = figures.frontier(LATENCY).axes[0]
    drawn = [tuple(point) for dots in axes.collections for point in dots.get_offsets().tolist()]
    assert sorted(drawn) == [(1.25, 91.9), (4.0, 91.5), (7.0, 92.0)]
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


def test_headline_reads_the_tables_of_a_profile(tmp_path):
    COMPRESSION.assign(artifact_sha256="a").to_csv(tmp_path / "compression.csv", index=False)
    LATENCY.assign(artifact_sha256="a").to_csv(tmp_path / "latency.csv", index=False)
    figure = figures.headline(tmp_path)
    figure.savefig(tmp_path / "headline.png")
    assert len(figure.axes) == 2
    assert 10_000 < (tmp_path / "headline.png").stat().st_size < 200_000


def test_the_waterfall_goes_through_the_stages_in_the_runtime_that_has_them_all():
    assert figures.waterfall(COMPRESSION) is None
    stages = pd.DataFrame({"control": ["after_prune", "after_quantize", ""], "accuracy": [90.0, 89.0, 91.0]})
    stages = stages.assign(
        technique="pipeline", method="prune_quantize_distill", point="macs=6x,bits=4", run="p"
    )
    stages = stages.assign(
        artifact_bytes=[400, 100, 90], macs=[2e6] * 3, artifact_sha256=["p", "q", "r"], seed=1
    )
    dense = COMPRESSION.head(1).assign(artifact_bytes=1000, macs=8e6, artifact_sha256="a", run="b", seed=1)
    table = pd.concat([dense, stages])
    panels = figures.waterfall(table).axes
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert heights == [[1000, 400, 100, 90], [8, 2, 2, 2], []]
    assert list(panels[2].lines[0].get_ydata()) == [92, 90, 89, 91]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == [
        "fp32",
        "prune",
        "quantize",
        "distill",
    ]
    times = {("a", "onnxruntime"): 4.0, ("p", "onnxruntime"): 2.0, ("q", "onnxruntime"): 0.5}
    times |= {("r", "onnxruntime"): 0.5, ("r", "executorch"): 0.1, ("a", "executorch"): 3.0}
    rows = [
        {"artifact_sha256": sha256, "runtime": runtime, "precision": "int8", "p50_ms": ms, "batch": 1}
        | {"threads": 1, "control": ""}
        for (sha256, runtime), ms in times.items()
    ]
    middle = figures.waterfall(table, pd.DataFrame(rows)).axes[1]
    assert middle.get_title() == "milliseconds in ONNX Runtime (log)"  # executorch lacks two of them
    assert [bar.get_height() for bar in middle.patches] == [4.0, 2.0, 0.5, 0.5]
