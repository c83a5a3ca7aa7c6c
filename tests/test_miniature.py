"""The studies in miniature: the stages take every run's command lines, results count only for the
lines and the world that made them, the READMEs have their tables, and backbones can be made."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, stages
from transformers import HfArgumentParser

for folder in ("miniature", "tiny"):
    sys.path.insert(0, str(ROOT / "tests" / folder))
runner, tables, make_tiny = (
    importlib.import_module(name) for name in ("run", "tables", "make_tiny")
)
README = (ROOT / "tests/miniature/README.md").read_text()
SHOWN = set(re.findall(r"<!-- study: (\w+) -->", README))


def test_every_command_line_of_every_run_is_one_that_its_stage_takes():
    for run in runner.RUNS:
        for line in runner.filled(run, 0):
            script, *arguments = shlex.split(line)
            settings = importlib.import_module(Path(script).stem).Settings
            HfArgumentParser(settings).parse_args_into_dataclasses(arguments)
        assert all(needed in runner.RUNS for needed in runner.RUNS[run].needs)


def test_the_tables_of_the_studies_are_those_of_the_stored_results():
    main_readme = (ROOT / "README.md").read_text()
    assert tables.filled_in(README) == README and tables.filled_in(main_readme) == main_readme
    assert "<!-- claims -->" in main_readme
    assert SHOWN == set(runner.STUDIES) and "<!-- costs -->" in README


def test_every_row_of_every_study_has_five_seeds():
    results = tables.complete_results()
    rows = {row.run for study in runner.STUDIES.values() for row in study.rows}
    assert rows <= {run for run, _ in results}


def test_a_run_counts_once_it_has_five_seeds(tmp_path, monkeypatch):
    lines = []
    for run, seeds in (("base", range(4)), ("2 none", range(5))):
        for seed in seeds:
            line = {"run": run, "seed": seed, "measured": {}, "commands": runner.filled(run, seed)}
            lines.append(json.dumps(line) + "\n")
    (tmp_path / "results.jsonl").write_text("".join(lines))
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results.jsonl")
    assert list(tables.complete_results()) == [("2 none", seed) for seed in range(5)]


def test_a_result_counts_only_for_the_command_lines_and_the_world_that_made_it(
    tmp_path, monkeypatch
):
    line = {"run": "base", "seed": 7, "measured": {}, "commands": runner.filled("base", 7)}
    other = line | {"seed": 8}
    commands = [line.replace(runner.hash_of_world(), "0000") for line in runner.filled("base", 9)]
    old = line | {"seed": 9, "commands": commands}
    (tmp_path / "results.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in (line, other, old))
    )
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results.jsonl")
    assert list(runner.read_results()) == [("base", 7)]


def test_a_cell_is_the_mean_and_its_standard_error_in_percent():
    assert tables.cell("mean", [0.5, 0.6, 0.7]) == "60.0 ± 5.8"  # 10 / sqrt(3)
    assert tables.cell("mean", [0.5]) == "50.0" and tables.cell("mean", []) == "-"
    assert tables.cell("GFLOP a comparison", [0.13, 0.14]) == "0.135"


def test_a_claim_agrees_or_differs_beyond_the_error_of_the_paired_differences():
    assert tables.verdict([0.03, 0.02, 0.04]) == "agrees"
    assert tables.verdict([-0.03, -0.02, -0.04]) == "differs"
    assert tables.verdict([0.03, -0.02, 0.01]) == "too close to tell"
    study = runner.Study(["mean"], [runner.Row("a", "x"), runner.Row("b", "y")], [])
    results = {}  # the seeds differ by far more than the rows
    for seed, mean in enumerate([0.5, 0.7, 0.9]):
        results["x", seed] = {"measured": {"mean": mean + 0.01 + seed / 1000}}
        results["y", seed] = {"measured": {"mean": mean}}
    claim = runner.Claim("a better than b", "a", "b")
    assert tables.judged(claim, study, results) == ("+1.1 ± 0.1", "agrees")
    above_chance = runner.Claim("a above chance", "a", 0.5)
    assert tables.judged(above_chance, study, results)[1] == "too close to tell"


@pytest.mark.parametrize("family", make_tiny.FAMILIES)
def test_a_backbone_of_every_family_can_be_pretrained_and_loaded_by_the_stages(family, tmp_path):
    tokenizer = make_tiny.make_tokenizer(640, family)
    policy = make_tiny.make_model(tokenizer, family, width=64, depth=1)
    for part in filter(None, (tokenizer, make_tiny.make_image_processor(family), policy)):
        part.save_pretrained(tmp_path)
    processors = stages.data.load_processors(str(tmp_path))
    mix = make_tiny.Mix(text=1.0 if family == "qwen2" else 0.5)
    stream = make_tiny.lessons(0, "train", mix)
    groups = [next(stream) for _ in range(4)]
    loss, outcomes = make_tiny.loss_and_outcomes(policy, groups, processors)
    again, _ = make_tiny.loss_and_outcomes(
        stages.model.load_backbone(str(tmp_path), lm_head=True), groups, processors
    )
    assert loss.item() == pytest.approx(again.item(), abs=1e-6) and len(outcomes) == 32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
