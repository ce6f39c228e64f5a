"""Which point several seeds claim together."""

import json
import re
import shutil

import pytest
from result_files import edit, read

from nnc_utils import artifact, audit, data, evaluation, over_seeds, publishing, results, tables


def test_all_of_two_seeds_claim_what_the_first_one_chose(example):
    made = [tables.read_run(folder) for folder in example.folders][::-1]
    rows = [row for run in made for row in run.compression]
    for chosen in (0, 1):  # by the first seed; the second one liked another point
        wanted = {1: chosen, 2: 1 - chosen}
        mixed = [
            run.with_rows(
                compression=[r.model_copy(update={"headline": wanted[r.seed]}) for r in run.compression]
            )
            for run in made
        ]
        claimed = over_seeds.claimed_once(mixed)
        assert len(claimed) == len(rows) > 2 and {row.headline for row in claimed} == {chosen}
        assert [row.artifact_sha256 for row in claimed] == [row.artifact_sha256 for row in rows]


def looked_at(example, seed, points, *, technique="pipeline"):
    """A run of a seed: a row each point (name, MACs, bytes, validation difference); the notebook chose c."""
    whole = next(tables.read_run(f) for f in example.folders if f.parent.name == "01_baseline")
    template = whole.compression[0].model_copy(update={"macs": 1000, "artifact_sha256": "f" * 64})
    rows, files, looked = [template], [], {}
    for name, macs, size, mean in points:
        sha = f"{seed}{name}" * 32
        about = {"technique": technique, "method": "m", "point": name, "seed": seed, "macs": macs}
        about |= {"artifact_bytes": size, "artifact_sha256": sha, "reference_sha256": "f" * 64}
        rows.append(template.model_copy(update=about | {"headline": int(name == "c"), "division": "open"}))
        files.append(tables.ArtifactRecord(path=f"{name}.safetensors", sha256=sha, artifact_sha256=sha))
        if mean is not None:
            looked[name] = [mean - 0.3, mean, mean + 0.3]
    record = {"run": f"quick/n/seed={seed}", "seed": seed, "compression": rows, "artifacts": files}
    record["extra"] = {"validation_delta": looked}
    return tables.Run(whole.folder, whole.record.model_copy(update=record))


def chosen_of(runs):
    return {
        row.point for row in over_seeds.claimed_once(runs) if row.headline and row.technique != "baseline"
    }


@pytest.mark.parametrize(
    "small, large, chosen",
    [
        ([0.0, -0.5, 0.2], [0.1, 0.1, 0.1], {"a"}),  # lower end -0.1 - 0.17
        ([0.0, -0.7, 0.2], [0.1, 0.1, 0.1], {"b"}),  # -0.17 - 0.17 is below -0.3
        ([0.0, -0.7, 0.2], [-0.9, -0.9, -0.9], {"a"}),  # neither is likely: the nearer one
        ([-0.9, -0.9, -0.9], [0.0, -0.7, 0.2], {"b"}),
        ([0.0, -0.7, 0.2], [0.0, -0.7, 0.2], {"a"}),  # as near: the smaller one
        ([-0.9, -0.9, -0.9], [-0.2, -0.2, -0.2], set()),  # the nearer one is a loss: -0.2 + 0.17 is below 0
        ([0.0, -0.7, 0.2], [None, 0.1, 0.1], {"a"}),  # a seed did not look at the large one
    ],
)
def test_three_seeds_choose_over_all_their_validation_pictures(example, small, large, chosen):
    def run(seed):
        points = [("a", 10, 100, small[seed - 1]), ("b", 10, 200, large[seed - 1]), ("c", 10, 50, None)]
        return looked_at(example, seed, points)

    assert chosen_of([run(seed) for seed in (3, 1, 2)]) == chosen  # and no more c, which one seed had chosen
    rows = over_seeds.claimed_once([run(seed) for seed in (3, 1, 2)])
    assert [row.seed for row in rows if row.point in chosen and row.headline] == [3, 1, 2] * len(chosen)
    assert chosen_of([run(seed) for seed in (1, 2)]) == {"c"}  # two seeds: as the first one's notebook has it


def test_one_seed_claims_nothing_beside_three(example):
    """Of students no notebook says what validation thinks of a difference: the first seed's choice counts."""
    for seeds, chosen in (((1, 2, 3), {"c"}), ((1, 2), {"c", "d"})):
        runs = [looked_at(example, s, [("c", 10, 50, None)], technique="distillation") for s in seeds]
        rows = runs[0].compression
        more = rows[-1].model_copy(update={"point": "d", "artifact_sha256": "d" * 64})
        assert chosen_of([runs[0].with_rows(compression=[*rows, more]), *runs[1:]]) == chosen


def test_seeds_choose_cut_channels_by_macs_and_masks_by_bytes(example):
    points = [("a", 250, 200, 0.0), ("b", 500, 100, 0.0), ("c", 1000, 50, -0.9), ("d", 1000, 60, 0.0)]
    cut = [looked_at(example, seed, points, technique="pruning") for seed in (1, 2, 3)]
    assert chosen_of(cut) == {"a", "d"}
    assert chosen_of([looked_at(example, seed, points) for seed in (1, 2, 3)]) == {"d"}  # by bytes alone


def test_points_that_share_a_file_are_both_looked_at(example):
    runs = [looked_at(example, seed, [("a", 10, 100, 0.0), ("b", 10, 90, -0.9)]) for seed in (1, 2, 3)]
    for run in runs:
        run.compression.append(run.compression[1].model_copy(update={"point": "twin of a"}))
    chosen = {point[3]: choice.chosen for point, choice in over_seeds.chosen_over_seeds(runs).items()}
    assert chosen == {"a": True, "twin of a": False, "b": False}


@pytest.fixture
def three_seeds(published):
    """The example with a third seed, a copy of the second; only the first looked at validation pictures."""
    folders = sorted((published.parent / "runs/quick").glob("0[12]*/seed=[12]"))
    for folder in [f for f in folders if f.name == "seed=2"]:
        copy = shutil.copytree(folder, folder.with_name("seed=3"))
        text = (copy / "result.json").read_text().replace("seed=2", "seed=3")
        (copy / "result.json").write_text(text)
        record = json.loads(text)
        edit(copy, seed=3, compression=[row | {"seed": 3} for row in record["compression"]])
        folders.append(copy)
    for folder in folders:
        if not folder.match("02_quantization/seed=1"):
            edit(folder, extra={})
    return published, folders


def test_what_a_seed_did_not_look_at_is_looked_at_before_three_choose(three_seeds):
    published, folders = three_seeds
    publishing.publish(folders, "quick")
    provenance = json.loads((published / "provenance.json").read_text())
    looks = [provenance[f"quick/02_quantization/seed={s}"]["extra"]["validation_delta"] for s in (1, 2, 3)]
    assert looks[0] == {"network": [-0.2, 0.0, 0.2]} and looks[1] == looks[2] != looks[0]
    [[low, mean, high]] = looks[2].values()
    run = tables.read_run(folders[-1])
    digits = data.load("digits").validation
    right = [
        evaluation.predict(artifact.load(path), digits, normalize=data.load("digits").normalize)
        == digits.labels.numpy()
        for path in (
            run.artifact("network"),
            folders[-1].parents[1] / "01_baseline/seed=3/artifacts/network.safetensors",
        )
    ]
    assert mean == pytest.approx(100 * (right[0].mean() - right[1].mean())) and low <= mean <= high
    assert {row["headline"] for row in read(published / "compression.csv")} == {"1"}
    claimed = {f"{row['artifact_sha256'][:16]}.safetensors" for row in read(published / "compression.csv")}
    assert {file.name for file in (published / "artifacts").iterdir()} < claimed  # the small ones
    results.report(published)
    assert "On validation" in (published / "report.md").read_text()
    assert audit.problems(published) == []
    text = (published / "compression.csv").read_text()
    for_all = re.sub(r"(bits=8,\d,closed,,)1", r"\g<1>0", text)
    assert for_all.count(",closed,,0,") == 3
    (published / "compression.csv").write_text(for_all)
    assert any("likely without loss, and no claim" in problem for problem in audit.problems(published))


def test_a_claim_whose_file_is_elsewhere_is_refused_before_anything_is_written(three_seeds, capsys):
    published, folders = three_seeds
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    (folders[-1] / "artifacts/network.safetensors").unlink()
    with pytest.raises(results.ResultError, match="is missing: bring it"):
        publishing.publish(folders, "quick")
    assert "seed=3 uniform_per_channel bits=8 stays out of what the seeds choose" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
