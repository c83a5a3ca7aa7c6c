"""The README's promises: the six stages run in order, on the embedded world and on a user's own pairs; --help is
complete."""

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


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project in a folder of its own, so that the default places can be used."""
    folder = tmp_path_factory.mktemp("project")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tests/tiny", folder / "tests/tiny")
    return folder


def test_the_six_stages_run_in_order_each_on_what_the_one_before_it_wrote(copy):
    few = {
        "01_data.py": ["--world_size", 0.05],
        "03_train.py": ["--steps", 4],
        "05_ensemble.py": ["--steps", 2],
        "06_grpo.py": ["--steps", 2, "--batch_size", 4, "--evaluate_size", 16],
    }
    for script in SCRIPTS:
        done = torchrun(script, *few.get(script, []), cwd=copy, fresh=True)
        if script != SCRIPTS[-1]:
            following = SCRIPTS[SCRIPTS.index(script) + 1]
            assert f"Next: torchrun --standalone --nproc_per_node=2 {following}" in done.stdout
        assert "Warning" not in done.stderr, done.stderr
    artifacts = copy / "artifacts"
    (copy / "any").touch()
    rights = {path.stat().st_mode for path in artifacts.rglob("*") if path.is_file()}
    assert rights == {(copy / "any").stat().st_mode}  # those of any new file
    for path in (
        "data/train/dataset.json",
        "data/train/rejected.jsonl",
        "model/reward_head.safetensors",
        "reward/reward_head.safetensors",
        "reward/metrics.jsonl",
        "reward/config.json",
        "scores/reward/new_scenes.safetensors",
        "scores/reward/summary.json",
        "ensemble/summary.json",
        "policy/model.safetensors",
        "policy/evaluation.json",
        "policy/samples.jsonl",
    ):
        assert (artifacts / path).is_file(), path
    assert not [
        path for path in artifacts.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")
    ]
    ensemble = json.loads((artifacts / "ensemble/summary.json").read_text())
    assert len(ensemble["members"]) == 2 and set(ensemble["benchmarks"]["new_text"]) == {
        "reward",
        "second",
        "mean",
        "by accuracy",
        "by confidence",
        "mean, text routed",
        "text-only",
    }
    evaluation = json.loads((artifacts / "policy/evaluation.json").read_text())
    assert (
        evaluation["before"]["closed"] + evaluation["before"]["open"] == 16
        and 0 <= evaluation["after"]["exact_match"] <= 1
    )
    reward = stages.model.RewardModel.from_pretrained(str(artifacts / "reward"))
    assert reward.score(
        [user("What is at row 1 column 1?", picture())], ["A red circle.", "A blue square."]
    ).shape == torch.Size([2])


def test_a_users_own_pairs_go_through_01_03_and_04(tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(24):
        (tmp_path / f"pictures/{i}.png").write_bytes(picture(90 + 10 * i, 120, seed=i))
        lines.append(
            {
                "id": i,
                "category": "pictures",
                "prompt": [user("Wie heißt das? 这是什么?")],
                "chosen": [assistant(f"Picture {i} 🙂")],
                "rejected": [assistant("nothing")],
                "images": [f"pictures/{i}.png"],
            }
            if i % 2
            else {
                "prompt": f"Question {i}",
                "chosen": "right",
                "rejected": "wrong, and longer",
                "category": "text",
            }
        )
    for line in lines[1::2]:
        line["prompt"][0]["content"].insert(0, {"type": "image"})
    file = write_jsonl(tmp_path / "mine.jsonl", [*lines, "{broken"])
    printed = torchrun(
        "01_data.py",
        "--source",
        file,
        "--out",
        tmp_path / "data",
        "--holdout",
        0,
        "--max_pixels",
        28 * 28 * 8,
    ).stdout
    assert "read 25 = kept 24 + rejected 1" in printed
    torchrun("02_model.py", "--out", tmp_path / "model", "--data", tmp_path / "data/mine")
    torchrun(
        "03_train.py",
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "data/mine",
        "--out",
        tmp_path / "reward",
        "--steps",
        12,
        "--batch_size",
        12,
    )
    printed = torchrun(
        "04_eval.py",
        "--model",
        tmp_path / "reward",
        "--benchmark",
        tmp_path / "data/mine",
        "--out",
        tmp_path / "scores",
    ).stdout
    assert "pictures" in printed and "longer wins" in printed
    assert (
        json.loads((tmp_path / "scores/reward/summary.json").read_text())["mine"]["reward"][
            "overall"
        ]["accuracy"]
        > 0.9
    )  # 24 pairs, seen 6 times


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_setting(script):
    done = torchrun(script, "--help", ranks=1)
    stage = getattr(stages, script[3:-3])
    assert " ".join(stage.__doc__.split("\n")[0].split()) in " ".join(done.stdout.split())
    for field in dataclasses.fields(stage.Settings):
        assert f"--{field.name}" in done.stdout and len(field.metadata["help"]) > 10, field.name


@pytest.mark.parametrize(
    "script, mistake, says",
    [
        ("01_data.py", ["--source", "no/such.jsonl"], "no/such.jsonl: nothing there"),
        ("02_model.py", ["--backbone", "no/such"], "no/such: no model in the Hugging Face layout"),
        ("02_model.py", ["--data", "no/such"], "--data no/such: no prepared data set there"),
        ("03_train.py", ["--model", "no/such"], "no/such: no reward model there"),
        ("03_train.py", ["--lr", "3e-6"], "unknown: --lr 3e-6; --help lists all options"),
        (
            "03_train.py",
            ["--steps", "many"],
            "argument --steps: invalid int value: 'many'; --help lists all options",
        ),
        ("03_train.py", ["--batch_size", "0"], "--batch_size 0: has to be at least 1"),
        ("04_eval.py", ["--benchmark", "no/such"], "no/such: no prepared data set there"),
        ("05_ensemble.py", ["--benchmark", "no/such"], "no/such: no prepared data set there"),
        ("06_grpo.py", ["--model", "no/such"], "no/such: no reward model there"),
    ],
)
def test_a_mistake_in_the_command_line_ends_in_one_line(script, mistake, says, tmp_path):
    done = torchrun(script, *mistake, "--out", tmp_path, ranks=1, check=False, HF_HUB_OFFLINE="1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"{script}: ")]
    assert done.returncode and says in line and f'{script}", line' not in done.stderr


def test_data_of_which_no_line_can_be_used_leads_nowhere(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Is it?"}\n' * 3)
    done = torchrun("01_data.py", "--source", tmp_path / "mine.jsonl", "--out", tmp_path / "data")
    assert "data/mine is empty: nothing to go on with" in done.stdout and "Next:" not in done.stdout
    assert len((tmp_path / "data/mine/rejected.jsonl").read_text().splitlines()) == 3


def test_an_error_of_one_rank_leaves_no_traceback_of_another(tmp_path):
    done = torchrun("02_model.py", "--data", tmp_path / "none", "--out", tmp_path, check=False)
    assert (
        done.returncode
        and "none: no prepared data set there" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_screen_says_what_goes_in_what_comes_out_and_what_the_paper_says(script):
    screen = "\n".join((ROOT / script).read_text().splitlines()[:30])
    assert (
        "\nIn  " in screen
        and "\nOut " in screen
        and "paper" in screen
        and f"torchrun --standalone --nproc_per_node=2 {script}" in screen
    )


def test_importing_a_stage_does_nothing():
    code = (
        "import importlib, os\nbefore = set(os.listdir('.'))\n"
        f"for name in {SCRIPTS}: importlib.import_module(name[:-3])\n"
        "assert set(os.listdir('.')) - before <= {'__pycache__'}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == done.stderr == ""


def test_the_readme_opens_with_the_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"^    (pip install .*)$", (ROOT / "README.md").read_text(), re.M)
    assert commands[:2] == [
        "pip install -r requirements.txt && "
        'for stage in 0*.py; do torchrun --standalone --nproc_per_node=2 "$stage" || break; done',
        "pip install -r tests/requirements.txt && pytest",
    ]
    assert "pip install -q -r tests/requirements.txt && pytest" in (ROOT / ".ci/run").read_text()


def test_nothing_is_needed_but_the_six_packages_and_pyarrow_where_parquet_is_read():
    names = {
        re.split(r"[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()
    }
    assert names == {"torch", "transformers", "pillow", "numpy", "tqdm", "safetensors"}
    standard = set(sys.stdlib_module_names)
    for script in SCRIPTS:
        nodes = list(ast.walk(ast.parse((ROOT / script).read_text())))
        imported = {
            alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {
            node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
        }
        optional = {"huggingface_hub"} | (
            {"pyarrow"} if script == "01_data.py" else set()
        )  # comes with transformers
        assert imported - standard - optional <= {
            "torch",
            "transformers",
            "PIL",
            "numpy",
            "tqdm",
            "safetensors",
        }, script
