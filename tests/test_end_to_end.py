"""The README's promises: the six stages run in order, on the embedded world and on own pairs."""

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assistant, picture, stages, torchrun, user, write_jsonl

SCRIPTS = sorted(path.name for path in ROOT.glob("0*.py"))
FEW = {  # options that make a stage short
    "01_data.py": ["--world_size", 0.05],
    "03_train.py": ["--steps", 4, "--batch_size", 16],
    "05_ensemble.py": ["--steps", 2],
    "06_grpo.py": ["--steps", 2, "--batch_size", 4, "--evaluate_size", 16],
}
WRITTEN = """
    data/train/dataset.json data/train/rejected.jsonl
    model/reward_head.safetensors
    reward/reward_head.safetensors reward/metrics.jsonl reward/config.json
    scores/reward/new_scenes.safetensors scores/reward/summary.json
    ensemble/summary.json
    policy/model.safetensors policy/evaluation.json policy/samples.jsonl
"""


def test_the_six_stages_run_in_order_each_on_what_the_one_before_it_wrote(tmp_path):
    """In a copy of the project, so that the default folders can be used."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "tests/tiny")
    for i, script in enumerate(SCRIPTS):
        fresh = script == "02_model.py"  # one stage by torchrun itself, the others forked
        done = torchrun(script, *FEW.get(script, []), cwd=tmp_path, fresh=fresh)
        assert "Warning" not in done.stderr, done.stderr
        for following in SCRIPTS[i + 1 : i + 2]:
            assert re.search(rf"^Next: torchrun .*{following}", done.stdout, re.M), done.stdout

    artifacts = tmp_path / "artifacts"
    for path in WRITTEN.split():
        assert (artifacts / path).is_file(), path
    files = [path for path in artifacts.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}

    ensemble = json.loads((artifacts / "ensemble/summary.json").read_text())
    systems = {"reward", "second", "text-only", "mean", "mean, text routed"}
    systems |= {"mean, text voted"}
    systems |= {"by accuracy", "by confidence"}
    assert len(ensemble["members"]) == 2
    assert set(ensemble["benchmarks"]["new_text"]) == systems
    evaluation = json.loads((artifacts / "policy/evaluation.json").read_text())
    assert evaluation["before"]["closed"] + evaluation["before"]["open"] == 16
    assert 0 <= evaluation["after"]["exact_match"] <= 1
    reward = stages.model.RewardModel.from_pretrained(str(artifacts / "reward"))
    prompt = [user("What is at row 1 column 1?", picture())]
    scores = reward.score(prompt, ["A red circle.", "A blue square."])
    assert scores.shape == torch.Size([2])


def test_a_users_own_pairs_are_prepared_learned_and_ranked_right(tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(0, 24, 2):
        prompt = {"prompt": f"Question {i}", "category": "text"}
        lines.append(prompt | {"chosen": "right", "rejected": "wrong, and longer"})
        path = f"pictures/{i}.png"
        (tmp_path / path).write_bytes(picture(90 + 10 * i, 120, seed=i))
        turn = user("Wie heißt das? 这是什么?")
        turn["content"].insert(0, {"type": "image"})
        prompt = {"prompt": [turn], "images": [path], "category": "pictures", "id": i}
        answers = {"chosen": [assistant(f"Picture {i} 🙂")], "rejected": [assistant("nothing")]}
        lines.append(prompt | answers)
    file = write_jsonl(tmp_path / "mine.jsonl", [*lines, "{broken"])
    pairs = tmp_path / "data/mine"
    limits = ["--holdout", 0, "--max_pixels", 28 * 28 * 8]
    done = torchrun("01_data.py", "--source", file, "--out", tmp_path / "data", *limits)
    assert "read 25 = kept 24 + rejected 1" in done.stdout

    torchrun("02_model.py", "--out", tmp_path / "model", "--data", pairs)
    training = ["--model", tmp_path / "model", "--data", pairs, "--steps", 12, "--batch_size", 12]
    torchrun("03_train.py", *training, "--out", tmp_path / "reward")
    scoring = ["--model", tmp_path / "reward", "--benchmark", pairs, "--out", tmp_path / "scores"]
    printed = torchrun("04_eval.py", *scoring).stdout
    assert "pictures" in printed and "longer wins" in printed
    summary = json.loads((tmp_path / "scores/reward/summary.json").read_text())
    assert summary["mine"]["reward"]["overall"]["accuracy"] > 0.9  # it has seen each pair 6 times


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_setting(script):
    printed = torchrun(script, "--help", ranks=1).stdout
    stage = getattr(stages, script[3:-3])
    title = stage.__doc__.split("\n")[0]
    assert " ".join(title.split()) in " ".join(printed.split())
    for field in dataclasses.fields(stage.Settings):
        assert f"--{field.name}" in printed and len(field.metadata["help"]) > 10, field.name


@pytest.mark.parametrize(
    "script, mistake, message",
    [
        ("01_data.py", "--source /no/such.jsonl", "no/such.jsonl: nothing there"),
        ("02_model.py", "--backbone /no/such", "no/such: no model in the Hugging Face layout"),
        ("02_model.py", "--data /no/such", "--data /no/such: no prepared data set there"),
        ("03_train.py", "--model /no/such", "no/such: no reward model there"),
        ("03_train.py", "--lr 3e-6", "unknown: --lr 3e-6; --help lists all options"),
        ("03_train.py", "--steps many", "argument --steps: invalid int value: 'many'; --help"),
        ("03_train.py", "--batch_size 0", "--batch_size 0: has to be at least 1"),
        ("04_eval.py", "--benchmark /no/such", "no/such: no prepared data set there"),
        ("05_ensemble.py", "--benchmark /no/such", "no/such: no prepared data set there"),
        ("06_grpo.py", "--model /no/such", "no/such: no reward model there"),
        ("06_grpo.py", "--group_size 1", "--group_size 1: has to be at least 2"),
    ],
)
def test_a_mistake_in_the_command_line_ends_in_one_line(script, mistake, message, tmp_path):
    done = torchrun(script, *mistake.split(), "--out", tmp_path, ranks=1, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{script}: ")]
    assert done.returncode and len(lines) == 1 and message in lines[0], done.stderr
    assert f'{script}", line' not in done.stderr


def test_data_of_which_no_line_can_be_used_leads_nowhere(tmp_path):
    file = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "Is it?"}] * 3)
    printed = torchrun("01_data.py", "--source", file, "--out", tmp_path / "data").stdout
    assert "data/mine is empty: nothing to go on with" in printed and "Next:" not in printed
    assert len((tmp_path / "data/mine/rejected.jsonl").read_text().splitlines()) == 3


def test_an_error_of_one_rank_leaves_no_traceback_of_another(tmp_path):
    done = torchrun("02_model.py", "--data", tmp_path / "none", "--out", tmp_path, check=False)
    assert done.returncode and "none: no prepared data set there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_screen_says_what_goes_in_what_comes_out_and_what_the_paper_says(script):
    screen = "\n".join((ROOT / script).read_text().splitlines()[:30])
    assert re.search(r"^In:? ", screen, re.M) and re.search(r"^Out:? ", screen, re.M)
    assert re.search(r"[Tt]he\s+paper", screen)
    assert f"torchrun --standalone --nproc_per_node=2 {script}" in screen


def test_importing_a_stage_does_nothing():
    code = f"""
import importlib, os
before = set(os.listdir("."))
for name in {SCRIPTS}:
    importlib.import_module(name[:-3])
assert set(os.listdir(".")) - before <= {{"__pycache__"}}
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == done.stderr == ""


def test_the_readmes_first_command_runs_all_stages_and_continuous_integration_the_second():
    commands = re.findall(r"^    pip install (.*)$", (ROOT / "README.md").read_text(), re.M)
    loop = 'for stage in 0*.py; do torchrun --standalone --nproc_per_node=2 "$stage" || break; done'
    assert commands[0] == f"-r requirements.txt && {loop}"
    assert f"pip install -q {commands[1]}\n" in (ROOT / ".ci/run").read_text()


def imports_of(script: Path) -> set[str]:
    """The packages that a script imports anywhere."""
    packages = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names)


def test_nothing_is_needed_but_the_six_packages_and_pyarrow_where_parquet_is_read():
    requirements = (ROOT / "requirements.txt").read_text().split()
    names = {re.split(r"[=<>]", line)[0] for line in requirements}
    assert names == {"torch", "transformers", "pillow", "numpy", "tqdm", "safetensors"}
    brought = {"huggingface_hub", "jinja2"}  # by transformers and torch
    allowed = (names - {"pillow"}) | {"PIL"} | brought
    for script in SCRIPTS:
        extra = imports_of(ROOT / script) - allowed
        assert extra <= ({"pyarrow"} if script == "01_data.py" else set()), script
