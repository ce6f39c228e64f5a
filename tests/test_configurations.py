"""Configurations: what is refused, with which words, and that everything written in them can be read."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from bench.candidates import LISTS, TECHNIQUES
from nnc_utils import configurations
from nnc_utils.configurations import ConfigurationError, of_row, read

ROOT = Path(__file__).parent.parent
PROFILES = sorted((ROOT / "workflow" / "profiles").glob("*.yaml"))


def test_one_error_names_every_fault_of_every_mapping():
    wrong = [
        {"method": "channels", "scor": "fisher", "macs": 0.4},
        {"method": "weights", "sparsity": 1.2},
        {"method": "weights", "sparsity": 0.9, "schedule": "gradual"},
        {"method": "pipelin"},
        "weights",
    ]
    with pytest.raises(ConfigurationError) as error:
        read(wrong, "pruning")
    text = str(error.value)
    for said in (
        "scor: Extra inputs",
        "macs: Input should be greater than or equal to 1, not 0.4",
        "not 1.2",
    ):
        assert said in text, said
    for said in ("trains between its steps", "no method 'pipelin' here: one of dense_finetuned", "'weights'"):
        assert said in text, said


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"method": "uniform"}, "one of bits, levels is needed, not none"),
        ({"method": "uniform", "bits": 3, "levels": 5}, "not bits and levels"),
        ({"method": "uniform", "levels": 4}, "levels: Input should be 3, 5"),
        ({"method": "mixed_precision", "budget_bits": 2}, "budget_bits: Input should be 3, 4 or 8"),
        ({"method": "kmeans"}, "bits: Field required"),
        ({"method": "hessian_rounding", "lambda_": 0}, "lambda_: Input should be greater than 0"),
        ({"method": "gzip", "of": {"method": "uniform"}}, "one of bits, levels is needed"),
        ({"method": "layerwise", "rule": "scan", "sparsity": 0.7}, "rule 'scan'"),
        ({"method": "kd", "width": 0.25, "temperature": 0}, "temperature: Input should be greater than 0"),
        ({"method": "kd", "width": -1}, "width: Input should be greater than 0"),
        ({"method": "attention", "width": 0.25, "cached": True}, "compares features, which are not cached"),
        ({"method": "attention", "width": 0.25, "teacher": "ensemble"}, "has soft labels only"),
        ({"method": "evolution"}, "without a constraint the largest network wins"),
        ({"method": "pipeline", "stages": ["prune", "narrow"], "macs": 4}, "not prune and narrow both"),
        ({"method": "pipeline", "stages": ["prune"], "macs": 4, "bits": 4}, "quantize is missing for bits"),
        ({"method": "pipeline", "macs": 4}, "quantize needs one of bits, size, lambda_"),
        ({"method": "pipeline", "macs": 4, "latency_ms": 1, "bits": 4}, "prune or narrow needs one of"),
        ({"method": "small_dense", "macs": 4, "bits": 4, "lambda_": 1e-9}, "at most one is needed"),
        ({"method": "small_dense", "macs": 4, "distill": True, "int8": True}, "distill goes with bits"),
        ({"method": "nncodec", "qp": 3}, "qp: Input should be less than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(mapping, message):
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        read([mapping])


def test_the_same_configuration_twice_is_refused_however_it_is_written():
    with pytest.raises(ConfigurationError, match="occurs twice"):
        read([{"method": "channels", "macs": 4}, {"method": "channels", "score": "fisher", "macs": 4.0}])


def test_a_mapping_survives_the_way_through_a_table():
    mapping = {"method": "pipeline", "stages": ["prune", "distill"], "macs": 6, "ensemble": True}
    [configuration] = read([mapping])
    assert of_row(configuration.method, configuration.key) == configuration
    assert read([configuration.mapping()]) == [configuration]


def test_a_notebook_imports_no_other_techniques_modules():
    """Provenance: rows record what their process loaded."""
    import subprocess
    import sys

    program = "import sys, bench.session as s; s.configurations.read([], 'pruning')\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "nnc_utils.pruning.configurations" in run.stdout
    assert not {"nnc_utils.search", "nnc_utils.distillation"} & set(run.stdout.split())


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_names_configurations_that_can_be_read(path):
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    for notebook, (_, modules) in TECHNIQUES.items():
        common = (profile.get("parameters") or {}).get(notebook) or {}
        shards = ((profile.get("parts") or {}).get(notebook) or {"": {}}).values()
        for values in (common | (shard or {}) for shard in shards):
            for name in LISTS:
                read(values.get(name, []), *modules)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_times_networks_that_it_makes(path):
    """A name in 07 that no earlier run has would be found after hours."""
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    given, parts = profile.get("parameters") or {}, profile.get("parts") or {}
    made = []
    for notebook, (_, modules) in TECHNIQUES.items():
        for values in (given.get(notebook) or {}, *(parts.get(notebook) or {}).values()):
            for name in ("configurations", "controls"):
                made += read(values.get(name, []), *modules)
    timed = (given.get("07_deployment") or {}).get("networks", [])
    wanted = [{name: value for name, value in network.items() if name != "stage"} for network in timed]
    for network in wanted:
        assert read([network])[0] in made, network


def test_every_committed_row_is_of_a_configuration_and_has_a_title_of_its_own():
    titles = {}
    for path in (ROOT / "results").glob("*/compression.csv"):
        for row in csv.DictReader(path.open(encoding="utf-8")):
            configuration = of_row(row["method"], row["settings"])
            assert configurations.settings_json(json.loads(row["settings"] or "{}")) == row["settings"]
            titles.setdefault(configuration.title, set()).add((row["method"], row["settings"]))
    assert len(titles) > 100 and all(len(same) == 1 for same in titles.values())
