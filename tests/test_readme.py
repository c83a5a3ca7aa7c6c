"""The READMEs are true: commands parse and run, scripts have the excerpts, links have targets."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT, picture, stages, torchrun
from transformers import HfArgumentParser

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted(ROOT.glob("tests/**/README.md")))]
COMMANDS = re.findall(r"^    ((?:torchrun|python) .*?)(?:  +#.*)?$", "\n".join(PAGES), re.M)
COMMANDS += re.findall(r"`((?:torchrun|python) [^`]*\.py[^`]*)`", README)


def script_and_arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1 :]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_one_that_its_script_takes(command):
    script, arguments = script_and_arguments(command)
    if script.startswith("tests/"):
        code = (ROOT / script).read_text()
        assert all(f'"{word}"' in code for word in arguments if word.startswith("--"))
    else:
        settings = getattr(stages, script[3:-3]).Settings
        HfArgumentParser(settings).parse_args_into_dataclasses(arguments)


def test_the_commands_on_ones_own_pairs_run_as_printed(tmp_path):
    for script in ROOT.glob("0*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "tests/tiny")
    section = re.search(r"^## Your own pairs\n(.*?)^### ", README, re.M | re.S)[1]
    line = json.loads(re.search(r"```json\n(.*?)```", section, re.S)[1])
    (tmp_path / "pictures").mkdir()
    for name in (*line["images"], "picture.png"):
        (tmp_path / name).write_bytes(picture())
    ranking = {"prompt": "Is it red?", "responses": ["Yes", "No", "Maybe?"], "ranks": [1, 2, 2]}
    lines = [json.dumps(line) + "\n", json.dumps(ranking) + "\n"] * 10
    for name in ("my_pairs", "my_benchmark", "my_responses"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    scripts = []
    for command in re.findall(r"^    (torchrun .*?)(?:  +#.*)?$", section, re.M):
        script, arguments = script_and_arguments(command)
        torchrun(script, *arguments, cwd=tmp_path)
        scripts.append(script[:2])
    assert scripts == ["01", "01", "02", "03", "04", "04"]
    scored = (tmp_path / "artifacts/scores/my_reward/my_responses.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["scores"]) for line in scored] == [2, 3] * 10


def without_comments(code: str) -> str:
    """Leave out lines that are comments, blank lines, and indentation."""
    lines = [line.strip() for line in code.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def test_excerpts_are_in_the_scripts_they_are_of():
    excerpts = re.findall(
        r"^[^`\n]*`(0\d_\w+\.py)`[^`\n]*:\n```python\n(.*?)```", README, re.M | re.S
    )
    assert len(excerpts) == 5
    for script, excerpt in excerpts:
        assert without_comments(excerpt) in without_comments((ROOT / script).read_text()), excerpt


def test_every_name_of_a_source_and_of_a_family_is_in_it():
    names = {*stages.data.SOURCES, *stages.data.FAMILIES} - {"jsonl", "world"}
    missing = [name for name in names if not re.search(rf"[\s`]{re.escape(name)}[,;`\s]", README)]
    assert missing == []


def test_links_lead_to_a_heading_and_files_named_are_there():
    for path in [ROOT / "README.md", *ROOT.glob("tests/**/README.md")]:
        page = path.read_text()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page):
            other = path.parent / target if target else path
            assert other.exists(), (path, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
                slugs = []
                for title in titles:
                    slugs.append(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
                assert anchor in slugs, (path, anchor)
        for name in re.findall(r"`(tests/[\w./]*)`", page):
            assert (ROOT / name).exists(), (path, name)
