"""The README says what is so: its commands parse, its plans and tables are what the commands print, its excerpts are in
the scripts, its links lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, picture, stages, torchrun
from test_plan import QWEN2_5_VL_7B
from transformers import HfArgumentParser

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    ((?:torchrun|python) .*?)(?:  +#.*)?$", README, re.M)
COMMANDS += [each for each in re.findall(r"`((?:torchrun|python) [^`]*\.py[^`]*)`", README)]


def script_and_arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_script_takes(command):
    script, arguments = script_and_arguments(command)
    if script.startswith("tests/"):
        code = (ROOT / script).read_text()
        assert all(f'"{word}"' in code for word in arguments if word.startswith("--"))
    else:
        HfArgumentParser(getattr(stages, script[3:-3]).Settings).parse_args_into_dataclasses(
            arguments
        )


@pytest.mark.parametrize("command", [each for each in COMMANDS if " --plan " in each])
def test_a_plan_is_printed_as_the_readme_has_it(command, tmp_path):
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b/config.json").write_text(json.dumps(QWEN2_5_VL_7B))
    script, arguments = script_and_arguments(command)
    run = [sys.executable, str(ROOT / script), *arguments]
    printed = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    shown = README.split(command)[1].split("\n\n", 1)[
        1
    ]  # the blocks behind it, up to the next text
    shown = re.match(r"(?:    .*\n|\n)+", shown)[0].rstrip()
    printed = "\n".join("    " + line if line else "" for line in printed.rstrip().splitlines())
    assert printed.endswith(shown) and len(shown) > 80


def test_the_commands_on_ones_own_pairs_run_as_printed(tmp_path):
    for script in ROOT.glob("0*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "tests/tiny")
    section = re.search(r"^## Your own pairs\n(.*?)^### Published data", README, re.M | re.S)[1]
    line = json.loads(re.search(r"```json\n(.*?)```", section, re.S)[1])
    (tmp_path / "pictures").mkdir()
    for name in (*line["images"], "picture.png"):
        (tmp_path / name).write_bytes(picture())
    lines = [
        line,
        {"prompt": "Is it red?", "responses": ["Yes", "No", "Who knows?"], "ranks": [1, 2, 2]},
    ] * 10
    for name in ("my_pairs", "my_benchmark", "my_responses"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    commands = re.findall(r"^    (torchrun .*?)(?:  +#.*)?$", section, re.M)
    for command in commands:
        script, arguments = script_and_arguments(command)
        torchrun(script, *arguments, cwd=tmp_path)
    assert [script_and_arguments(each)[0][:2] for each in commands] == [
        "01",
        "01",
        "02",
        "03",
        "04",
        "04",
    ]
    scored = (tmp_path / "artifacts/scores/my_reward/my_responses.jsonl").read_text().splitlines()
    assert [len(json.loads(each)["scores"]) for each in scored] == [2, 3] * 10


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("0*.py")))
def test_what_the_walk_shows_of_a_script_is_in_it(script):
    section = re.search(rf"^### `{script}`.*?\n(.*?)(?=^##)", README, re.M | re.S)[1]
    excerpts = re.findall(r"```python\n(.*?)```", section, re.S)
    code = [line.strip() for line in (ROOT / script).read_text().splitlines()]
    assert excerpts
    for excerpt in excerpts:
        lines = [line.strip() for line in excerpt.strip().splitlines() if line.strip() != "..."]
        assert all(line in code for line in lines if line), [
            line for line in lines if line and line not in code
        ]


def test_every_name_of_a_source_and_of_a_family_is_in_it():
    names = {*stages.data.SOURCES, *stages.data.FAMILIES} - {"jsonl", "world"}
    assert [
        name for name in sorted(names) if not re.search(rf"[\s`]{re.escape(name)}[,;`\s]", README)
    ] == []


def test_links_within_it_lead_to_a_heading_and_files_it_names_are_there():
    headings = {
        re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-")
        for each in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert [
        anchor for anchor in re.findall(r"\]\(#([^)]*)\)", README) if anchor not in headings
    ] == []
    assert [
        name for name in re.findall(r"`(tests/[\w./]*)`", README) if not (ROOT / name).exists()
    ] == []
