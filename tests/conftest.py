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
from types import SimpleNamespace

import pytest
from forks import ROOT, STAGES
from PIL import Image

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; two would mostly wait for each other here
sys.path.insert(0, str(ROOT))
stages = SimpleNamespace(**{name[3:]: importlib.import_module(name) for name in STAGES})

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

TINY = str(ROOT / "tests" / "tiny" / "qwen2_5_vl")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # of ranks
CAN_FORK = (
    sys.platform == "linux" and not torch.cuda.is_available()
)  # a GPU that was looked for is lost in a fork


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

    `fresh`, or with `more` in the environment, by torchrun, as a user would; else by forks.py, the
    same for much less work."""
    command, environment = (
        [str(script), *map(str, arguments)],
        {**os.environ, **ENVIRONMENT, **more},
    )
    if fresh or more or not CAN_FORK:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
        run = {"cwd": cwd, "env": environment, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run([*start, *command], **run)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            told = {
                "command": command,
                "ranks": ranks,
                "cwd": cwd,
                "stdout": stdout,
                "stderr": stderr,
            }
            print(json.dumps(told, default=str), file=forks().stdin, flush=True)
            status = forks().stdout.readline()
            assert status, "tests/forks.py has ended"
            done = subprocess.CompletedProcess(
                command, int(status), stdout.read_text(), stderr.read_text()
            )
    if check and done.returncode:
        own = done.stderr.split("torch.distributed.elastic")[
            0
        ]  # without torchrun's own report behind it
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{own[-4000:]}")
    return done


@cache
def forks() -> subprocess.Popen:
    """The process that ranks are forked from. It ends with this one, as its input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/forks.py"], env={**os.environ, **ENVIRONMENT}, **pipes
    )


def prepare_here(**settings) -> None:
    """01 in this process."""
    stages.data.start_distributed()
    try:
        stages.data.main(stages.data.Settings(**{"holdout": 0, **settings}))
    finally:
        stages.data.dist.destroy_process_group()


def picture(width: int = 56, height: int = 56, seed: int = 0) -> bytes:
    """A PNG of coloured noise in large blocks."""
    rng = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
    file = io.BytesIO()
    small.resize((width, height)).save(file, "PNG")
    return file.getvalue()


def user(text: str, *images) -> dict:
    return {
        "role": "user",
        "content": [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": text},
        ],
    }


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
    made = []
    for prompt in PROMPTS.values():
        ids, files, grids = stages.data.encode_prompt(prompt, [], processors)
        made.append(
            stages.data.Comparison(
                ids,
                [stages.data.encode_response(text, processors) for text in RESPONSES],
                [1, 2, 3],
                files,
                grids,
            )
        )
    return made


def reward_on(backbone: str, seed: int = 1):
    """A reward model on a backbone with a new head whose scores differ visibly."""
    torch.manual_seed(seed)
    model = stages.model.RewardModel.from_backbone(backbone, stages.model.HeadSettings()).eval()
    torch.nn.init.normal_(model.head.mlp[-1].weight, std=0.5)
    return model


@pytest.fixture(scope="session")
def reward():
    return reward_on(TINY)


@pytest.fixture(scope="session")
def initial(tmp_path_factory):
    """A reward model that is not trained; its folder."""
    folder = str(tmp_path_factory.mktemp("initial"))
    torch.manual_seed(0)
    stages.model.RewardModel.from_backbone(TINY, stages.model.HeadSettings()).save_pretrained(
        folder
    )
    return folder


def training_options(world, initial, out, **settings) -> list[str]:
    """Arguments of 03 for four small steps."""
    arguments = {"model": initial, "data": world / "data/train", "out": out, "steps": 4}
    arguments |= {"batch_size": 12, "learning_rate": 3e-4, "checkpoint_every": 0, "warmup": 0.5}
    return [str(x) for key, value in (arguments | settings).items() for x in (f"--{key}", value)]


def run_training(world, initial, out, *more, ranks: int, **settings):
    """Train; return the exported weights and the lines of metrics.jsonl."""
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
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path
