"""The tests share the stages as modules, a torchrun helper, and small comparisons."""

import ctypes
import gc
import importlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from forks import ROOT, STAGES
from PIL import Image

# Before torch is imported. Two threads would mostly wait for each other here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))


class Stages:
    """The scripts as modules, imported when first used: by pytest's workers, not by itself."""

    def __getattr__(self, name: str):
        for script in STAGES:
            if script[3:] == name:
                return importlib.import_module(script)
        raise AttributeError(name)


stages = Stages()
TINY = str(ROOT / "tests" / "tiny" / "qwen2_5_vl")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # of ranks

# Workers get the files in this order (--no-loadscope-reorder): the longest come first, so that the
# others fill up the end. All that are not named here come last.
LONGEST = "families plan train end_to_end kinds sources grpo use packed_row data loading".split()


def pytest_collection_modifyitems(items: list) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@cache
def can_fork() -> bool:
    """Return whether ranks can be forked: a GPU that was looked for is lost in a fork."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def torchrun(
    script: str | Path,
    *arguments,
    ranks: int = 2,
    cwd: Path = ROOT,
    check: bool = True,
    fresh: bool = False,
    **more,
) -> subprocess.CompletedProcess:
    """Run a script on ranks of one thread each; return what they printed.

    `more` is set in their environment. `fresh` uses torchrun, as a user would; else forks.py, which
    does the same with much less work."""
    command = [str(script), *map(str, arguments)]
    if fresh or not can_fork():
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start.append(f"--nproc_per_node={ranks}")
        run = {"cwd": cwd, "env": {**os.environ, **ENVIRONMENT, **more}, "timeout": 600}
        done = subprocess.run([*start, *command], capture_output=True, text=True, **run)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            request = {"command": command, "ranks": ranks, "cwd": cwd}
            request |= {"stdout": stdout, "stderr": stderr}
            server = forks(**more)
            print(json.dumps(request, default=str), file=server.stdin, flush=True)
            status = server.stdout.readline()
            assert status, "tests/forks.py has ended"
            printed = stdout.read_text(), stderr.read_text()
            done = subprocess.CompletedProcess(command, int(status), *printed)
    if check and done.returncode:
        own = done.stderr.split("torch.distributed.elastic")[0]  # without torchrun's report
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{own[-4000:]}")
    return done


@cache
def forks(**more: str) -> subprocess.Popen:
    """Start a process that ranks are forked from, one for each environment.

    It ends with this one, as its input does.
    """
    command = [sys.executable, ROOT / "tests/forks.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, **more}, **pipes)


def prepare_here(**settings) -> None:
    """Run 01 in this process."""
    stages.data.start_distributed()
    try:
        stages.data.main(stages.data.Settings(**{"holdout": 0, **settings}))
    finally:
        stages.data.dist.destroy_process_group()


def picture(width: int = 56, height: int = 56, seed: int = 0) -> bytes:
    """Draw coloured noise in large blocks, as a PNG."""
    rng = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
    file = io.BytesIO()
    small.resize((width, height)).save(file, "PNG")
    return file.getvalue()


def user(text: str, *images) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


PROMPTS = {
    "text": [user("What is 2 + 3?")],
    "one image": [user("What do you see?", picture(56, 84, 1))],
    "several images of different sizes": [
        user("Which is larger?", picture(84, 56, 2), picture(56, 140, 3), picture(112, 112, 4))
    ],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        user("Describe it.", picture(84, 84, 5)),
        assistant("A square."),
        user("Sure? And this?", picture(56, 56, 6)),
    ],
}
RESPONSES = ["A red circle.", "I see a blue square at the top left, and much else besides.", "No"]


@pytest.fixture(scope="module", autouse=True)
def _clean():
    """After each file, leave a process group that its tests have joined, and give memory back."""
    import torch

    yield
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def processors():
    return stages.data.load_processors(TINY)


@pytest.fixture(scope="session")
def comparisons(processors):
    """One comparison of three responses for each kind of prompt."""
    responses = [stages.data.encode_response(text, processors) for text in RESPONSES]
    comparisons = []
    for prompt in PROMPTS.values():
        ids, files, grids = stages.data.encode_prompt(prompt, [], processors)
        comparisons.append(stages.data.Comparison(ids, responses, [1, 2, 3], files, grids))
    return comparisons


def reward_on(backbone: str, seed: int = 1):
    """Make a reward model on a backbone, with a new head whose scores differ visibly."""
    import torch

    torch.manual_seed(seed)
    model = stages.model.RewardModel.from_backbone(backbone, stages.model.HeadSettings()).eval()
    torch.nn.init.normal_(model.head.mlp[-1].weight, std=0.5)
    return model


@pytest.fixture(scope="session")
def reward():
    return reward_on(TINY)


@pytest.fixture(scope="session")
def initial(tmp_path_factory):
    """The folder of a reward model that is not trained."""
    import torch

    folder = str(tmp_path_factory.mktemp("initial"))
    torch.manual_seed(0)
    reward = stages.model.RewardModel.from_backbone(TINY, stages.model.HeadSettings())
    reward.save_pretrained(folder)
    return folder


def training_options(world, initial, out, **settings) -> list[str]:
    """List arguments of 03 for four small steps."""
    options = {"model": initial, "data": world / "data/train", "out": out, "steps": 4}
    options |= {"batch_size": 12, "learning_rate": 3e-4, "checkpoint_every": 0, "warmup": 0.5}
    arguments = []
    for name, value in (options | settings).items():
        arguments += [f"--{name}", str(value)]
    return arguments


def run_training(world, initial, out, *more, ranks: int, **settings):
    """Train; return the exported weights and the lines of metrics.jsonl."""
    from safetensors.torch import load_file

    arguments = training_options(world, initial, out, **settings)
    torchrun("03_train.py", *arguments, *more, ranks=ranks)
    weights = load_file(out / "model.safetensors") | load_file(out / "reward_head.safetensors")
    return weights, [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The embedded world at a twentieth of its size, prepared by 01 on two ranks; its folder."""
    folder = tmp_path_factory.mktemp("world")
    torchrun("01_data.py", "--out", folder / "data", "--world_size", 0.05, "--shard_size", 64)
    return folder


def write_jsonl(path: Path, lines: list) -> Path:
    """Write objects as JSON, one a line, and texts as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path
