"""The studies in miniature.

The stages accept every run's command lines, a result counts only for the command lines that made
it, the README has the tables, and make_tiny.py makes backbones of all families.
"""

import importlib
import re
import sys

import pytest
from conftest import ROOT, stages, write_jsonl
from transformers import HfArgumentParser

for folder in ("miniature", "tiny"):
    sys.path.insert(0, str(ROOT / "tests" / folder))
runner = importlib.import_module("run")
tables = importlib.import_module("tables")
make_tiny = importlib.import_module("make_tiny")
README = (ROOT / "tests/miniature/README.md").read_text()
SHOWN = set(re.findall(r"<!-- study: (\w+) -->", README))


def test_every_command_line_of_every_run_is_one_that_its_stage_takes():
    for run in runner.RUNS:
        for line in runner.filled(run, 0):
            script, *arguments = line.split()
            settings = getattr(stages, script[3:-3]).Settings
            HfArgumentParser(settings).parse_args_into_dataclasses(arguments)
        assert all(needed in runner.RUNS for needed in runner.RUNS[run].needs)


def test_the_tables_of_the_studies_are_those_of_the_stored_results():
    assert tables.filled_in(README) == README
    assert SHOWN == set(runner.STUDIES) and "<!-- costs -->" in README


def test_every_row_of_a_study_in_the_readme_stands_on_five_seeds():
    seeds = {}
    for run, seed in runner.read_results():
        seeds.setdefault(run, set()).add(seed)
    rows = {run for name in SHOWN for _, run, *_ in runner.STUDIES[name].rows}
    assert {run: len(seeds.get(run, ())) for run in rows if len(seeds.get(run, ())) < 5} == {}


def test_a_result_counts_only_for_the_command_lines_that_made_it(tmp_path, monkeypatch):
    line = {"run": "base", "seed": 7, "measured": {}, "commands": runner.filled("base", 7)}
    other = line | {"seed": 8}
    results = write_jsonl(tmp_path / "results.jsonl", [line, other])
    monkeypatch.setattr(runner, "RESULTS", results)
    assert list(runner.read_results()) == [("base", 7)]


def test_a_cell_is_the_mean_and_its_standard_error_in_percent():
    assert tables.cell("mean", [0.5, 0.6, 0.7]) == "60.0 ± 5.8"  # 10 / sqrt(3)
    assert tables.cell("mean", [0.5]) == "50.0" and tables.cell("mean", []) == "-"
    assert tables.cell("GFLOP a comparison", [0.13, 0.14]) == "0.135"


@pytest.mark.parametrize("family", make_tiny.FAMILIES)
def test_a_backbone_of_every_family_can_be_pretrained_and_loaded_by_the_stages(family, tmp_path):
    tokenizer = make_tiny.make_tokenizer(640, family)
    policy = make_tiny.make_model(tokenizer, family, width=64, depth=1)
    for part in filter(None, (tokenizer, make_tiny.make_image_processor(family), policy)):
        part.save_pretrained(tmp_path)
    processors = stages.data.load_processors(str(tmp_path))
    stream = make_tiny.lessons(0, "train", text=1.0 if family == "qwen2" else 0.5)
    groups = [next(stream) for _ in range(4)]
    loss, outcomes = make_tiny.learn(policy, groups, processors)
    loaded = stages.model.load_backbone(str(tmp_path), lm_head=True)
    again, _ = make_tiny.learn(loaded, groups, processors)
    assert loss.item() == pytest.approx(again.item(), abs=1e-6) and len(outcomes) == 32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
