"""What becomes of finished and of committed runs when tables are made."""

import json
import os
import shutil

import pandas as pd
import pytest
from result_files import read

from bench import audit, publish, report, tables
from nnc_utils import rows


def test_publish_leaves_what_the_rows_need_and_nothing_else(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    for leftover in ("predictions/old.npy", "artifacts/old.safetensors"):
        (published / leftover).write_bytes(b"x")
    (published / "compression.csv").write_text("broken")
    assert publish.publish(folders, "quick") == published
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before
    # five artifacts' worth of evidence: 4 in eager, 4 of runtimes, labels; of artifacts only the small ones
    assert len(list((published / "predictions").iterdir())) == 9
    assert [file.stat().st_size < 450_000 for file in (published / "artifacts").iterdir()] == [True, True]
    record = json.loads((published / "provenance.json").read_text())["quick/01_baseline/seed=1"]
    assert "more than 450,000" in record["artifacts"][0]["committed"]
    assert str(published.parents[1]) not in (published / "provenance.json").read_text()


def test_what_another_machine_committed_stays_beside_what_is_here(published, capsys):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    here = [folder for folder in folders if folder.name == "seed=1"]
    for folder in set(folders) - set(here):
        shutil.rmtree(folder)
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    publish.publish(here, "quick", keep=True)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before
    assert capsys.readouterr().out == ""
    publish.publish([folder for folder in here if "07" in str(folder)], "quick", keep=True)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before


def test_another_machine_goes_on_where_the_tables_end(published):
    runs = published.parent / "runs"
    made = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    assert publish.restore("quick") == []  # all are here
    shutil.rmtree(runs)
    restored = {run.run: run for run in publish.restore("quick")}
    assert set(restored) == set(json.loads((published / "provenance.json").read_text()))
    small, large = (restored[f"quick/{name}/seed=1"] for name in ("02_quantization", "01_baseline"))
    assert small.artifact("network").read_bytes() == made[small.artifact("network")]
    with pytest.raises(tables.ResultError, match="is missing: .* or delete .*01_baseline.seed=1"):
        large.artifact("network")
    assert large.score("network")["sha256"] == large.baseline.artifact_sha256
    publish.publish([run.folder for run in restored.values()], "quick")
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before
    # what was made here stays, with what is being made; what was restored follows the tables
    mark = small.folder / ".begun"
    mark.write_text("finished")
    os.utime(mine := small.folder / "result.json")
    (large.folder / "result.json").unlink()
    again = {run.run for run in publish.restore("quick")}
    assert again == set(restored) - {small.run} and (large.folder / "result.json").is_file()
    ends = {run: (restored[run].folder / "result.json").stat().st_mtime for run in again}
    assert max(ends.values()) < mine.stat().st_mtime  # a workflow sees none newer than what is built on it
    assert [publish.is_restored(run.folder) for run in (small, large)] == [False, True]
    (large.folder / "result.json").unlink()
    (large.folder / ".begun").write_text("another run")  # which was interrupted
    assert large.run not in {run.run for run in publish.restore("quick")}
    shutil.rmtree(runs)
    [file] = (published / "artifacts").glob(f"{small.compression[0].artifact_sha256[:16]}*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(tables.ResultError, match="not what was measured"):
        publish.restore("quick")
    assert not (small.folder / "result.json").exists()
    file.write_bytes(whole)
    (published / "predictions" / rows.evidence(small.compression[0].artifact_sha256)).unlink()
    with pytest.raises(tables.ResultError, match="bring it back from version control"):
        publish.restore("quick")
    with pytest.raises(tables.ResultError, match="has no tables to restore runs from"):
        publish.restore("medium")


def test_a_committed_search_without_rows_stays_and_comes_back(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    path = published / "provenance.json"
    record = json.loads(path.read_text())
    empty = record["quick/02_quantization/seed=1"] | {"artifacts": [], "extra": {}}
    found = {"curves": {"random": [[1.0], [2.0], [3.0]]}}
    record["quick/05_architecture_search/seed=1,search"] = searched = empty | {"extra": {"search": found}}
    record["quick/05_architecture_search/seed=1,nothing"] = empty
    path.write_text(json.dumps(record))
    publish.publish(folders, "quick", keep=True)
    record = json.loads(path.read_text())
    assert record["quick/05_architecture_search/seed=1,search"] == searched
    shutil.rmtree(published.parent / "runs")
    restored = {run.run: run.record.extra.search for run in publish.restore("quick")}
    assert restored["quick/05_architecture_search/seed=1,search"] == found
    assert "quick/05_architecture_search/seed=1,nothing" not in record


def test_rows_that_were_measured_again_or_are_no_longer_made_go_with_a_word(published, capsys):
    committed = tables.committed_runs(published)
    [old] = [run for run in committed if run.run == "quick/02_quantization/seed=1"]
    other = old.compression[0].model_copy(update={"settings": '{"bits":7}'})
    older = tables.Run(old.folder, old.record.model_copy(update={"run": "quick/older"}))
    [kept] = publish._kept(committed, [older.with_changes(compression=[*old.compression, other])])
    assert kept.compression == [other]
    assert "1 of 2 rows of quick/older go: measured again" in capsys.readouterr().out
    assert publish._kept([old.with_changes(compression=[other])], [old]) == []
    gone = len(old.compression)
    assert f"{gone} of {gone} rows of {old.run} go: it was made again" in capsys.readouterr().out


def test_points_that_fell_short_stay_as_attempts(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    short = [f"quick/02_quantization/seed={seed}" for seed in (1, 2)]
    before = {tuple(row.values()) for row in read(published / "compression.csv")}
    publish.publish(folders, "quick", keep=True, attempts=short)
    made = read(published / "compression.csv")
    attempts = [row for row in made if row["control"] == "attempt"]
    assert [(row["run"], row["headline"]) for row in attempts] == [(f"{run},attempt", "0") for run in short]
    assert {tuple(row.values()) for row in made if row not in attempts} == before
    assert audit.problems(published, rescore=False) == []
    (published / report.HISTORY).write_text("What was tried before.\n")
    assert "What was tried before.\n\n" in report.text(published, "details")
    publish.publish(folders, "quick", keep=True)  # and they stay
    assert read(published / "compression.csv") == made
    with pytest.raises(tables.ResultError, match="not committed: quick/nowhere"):
        publish.publish(folders, "quick", keep=True, attempts=["quick/nowhere"])


def test_publish_fails_without_evidence_or_run(published):
    folders = sorted((published.parent / "runs/quick").glob("*/seed=*"))
    with pytest.raises(tables.ResultError, match="predictions"):
        publish.publish(folders[2:], "quick")  # the baselines are missing, and with them the references
    with pytest.raises(tables.ResultError, match="each once"):
        publish.publish([folders[0], folders[0]], "quick")
    evidence = (
        folders[2] / "predictions" / rows.evidence(tables.read_run(folders[2]).compression[0].artifact_sha256)
    )
    evidence.unlink()
    with pytest.raises(tables.ResultError, match="are missing"):
        publish.publish(folders, "quick")


def test_a_chain_of_references_goes_link_by_link(published, capsys):
    """A row's reference is gone, and with it that row as the reference of another, and so on."""
    [first] = [run for run in tables.committed_runs(published) if run.run == "quick/02_quantization/seed=1"]
    row, links = first.compression[0], ["0" * 64, "1" * 64, "2" * 64, "3" * 64]
    chain = [
        first.with_changes(
            run=f"quick/link/seed={place}",
            compression=[
                row.model_copy(update={"artifact_sha256": own, "reference_sha256": before, "seed": place})
            ],
        )
        for place, (before, own) in enumerate(zip(links, links[1:], strict=False), 10)
    ]
    assert publish._kept([first], chain[::-1]) == []
    assert capsys.readouterr().out.count("their reference is gone") == len(chain)
    whole = first.with_changes(compression=[row, row.model_copy(update={"artifact_sha256": links[0]})])
    assert publish._kept([whole], chain[::-1]) == chain[::-1]


@pytest.fixture
def three_seeds(published):
    """The example with a third seed, a copy of the second; all looked at validation images."""
    folders = sorted((published.parent / "runs/quick").glob("0[12]*/seed=[12]"))
    for folder in [f for f in folders if f.name == "seed=2"]:
        copy = shutil.copytree(folder, folder.with_name("seed=3"))
        record = json.loads((copy / "result.json").read_text().replace("seed=2", "seed=3"))
        rows_of_3 = [row | {"seed": 3} for row in record["compression"]]
        (copy / "result.json").write_text(json.dumps(record | {"seed": 3, "compression": rows_of_3}))
        folders.append(copy)
    return published, folders


def test_three_seeds_claim_together_and_the_audit_agrees(three_seeds):
    published, folders = three_seeds
    publish.publish(folders, "quick")
    quantized = [row for row in read(published / "compression.csv") if row["method"] == "uniform"]
    assert [row["headline"] for row in quantized] == ["1"] * 3
    claimed = {f"{row['artifact_sha256'][:16]}.safetensors" for row in read(published / "compression.csv")}
    assert {file.name for file in (published / "artifacts").iterdir()} < claimed  # the small ones
    assert "On validation" in report.text(published, "details")
    assert audit.problems(published, rescore=False) == []
    table = pd.read_csv(published / "compression.csv", keep_default_na=False)
    table.loc[table["method"] == "uniform", "headline"] = 0
    table.to_csv(published / "compression.csv", index=False)
    assert any("likely within 0.3 points, and no claim" in problem for problem in audit.problems(published))


def test_a_claim_whose_file_is_elsewhere_is_refused_before_anything_is_written(three_seeds):
    published, folders = three_seeds
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    (folders[-1] / "artifacts/network.safetensors").unlink()
    with pytest.raises(tables.ResultError, match="is missing: bring it"):
        publish.publish(folders, "quick")
    assert before == {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
