"""Stage 3, --plan: it counts the work that is done and expects the memory that is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import families
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, stages, torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "tests/bench"))
import plan_memory  # noqa: E402

data, model, train = stages.data, stages.model, stages.train

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 151655,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": ROPE,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


# ---- work


def count(run) -> tuple[int, int]:
    """FLOPs of a run as torch counts them: of attention, and of the rest."""
    with FlopCounterMode(display=False) as counter:
        run()
    operations = counter.get_flop_counts()["Global"]
    attention = 0
    for operation, flops in operations.items():
        if operation == torch.ops.aten.bmm or "attention" in str(operation):
            attention += flops
    return attention, counter.get_total_flops() - attention


@pytest.mark.parametrize("image", [0, 64], ids=["text", "image"])
@pytest.mark.parametrize("frozen, recompute", [(False, False), (False, True), (True, True)])
def test_flops_on_the_meta_device_are_those_of_a_run(image, frozen, recompute):
    settings = {"freeze_vision": frozen, "activation_checkpointing": recompute}
    planned = plan_memory.meta_model(TINY, **settings)
    row = plan_memory.random_row(planned.processors, image, copies=2)
    meters = []
    meta = row.to(torch.device("meta"))
    attention, rest = count(lambda: meters.append(train.measure(planned, meta)))
    assert meters[0].flops == attention + rest
    if not image and not recompute:  # 4 Q K d forward, and 2.5 times as much backward
        text = planned.backbone.config.get_text_config()
        squares = 2 * (210 * 210 + 120 * 330 + 80 * 290)  # of query and key, a prompt's and more
        expected = 4 * 3.5 * squares * text.hidden_size * text.num_hidden_layers
        assert attention == pytest.approx(expected)

    reward = model.RewardModel.from_backbone(TINY, model.HeadSettings())
    reward.backbone.visual.requires_grad_(not frozen)
    if recompute:
        reward.backbone.activation_checkpointing_enable()
        reward.backbone.disable_input_require_grads()
    reward.train()
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = count(lambda: reward(row).sum().backward())
    assert rest == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_family_is_planned(name, tmp_path, capsys):
    families.write(name, tmp_path)
    data.start_distributed()
    vision = name in families.IMAGES
    lengths = [50, 256 * vision, 20, 30]
    settings = train.Settings(model=str(tmp_path), plan_lengths=lengths, plan_comparisons=1000)
    train.print_plan(settings)
    lines = numbers_in(capsys.readouterr().out)
    assert lines["TFLOP, language model"] > 0 and lines["activations"] > 0
    assert (lines["TFLOP, vision tower"] > 0) == vision


# ---- memory


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    plan_memory.write_model(folder)
    return folder


@pytest.mark.parametrize(
    "ranks, options", [(1, []), (1, ["--freeze_vision", "--activation_checkpointing"]), (2, [])]
)
def test_the_memory_of_a_step_is_within_15_percent_of_what_is_measured(
    ranks, options, random_model
):
    arguments = [random_model, "--written", "--json", *options]
    script = "tests/bench/plan_memory.py"
    done = torchrun(script, *arguments, ranks=ranks, **plan_memory.MALLOC)
    for part, sizes in json.loads(done.stdout.splitlines()[-1]).items():
        rel = 0.15 if part == "peak" else 1e-3  # uneven shards
        assert sizes["estimated"] == pytest.approx(sizes["measured"], rel=rel), part


# ---- the command


def plain_python(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "03_train.py", "--plan", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "env": environment}
    return subprocess.run(command, **how)


def numbers_in(text: str) -> dict[str, float]:
    """The number behind each name of a printed plan."""
    found = re.findall(r"^  (\S.*?) {2,}([\d.,e+-]+)$", text, re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in found}


def test_the_papers_run_is_planned_in_seconds_without_weights(tmp_path, capsys):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{TINY}/{file}", tmp_path)
    shutil.copy(f"{TINY}/preprocessor_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_VL_7B))
    paper = ["--model", tmp_path, "--gpus", 64, "--batch_size", 128, "--epochs", 1]
    paper += ["--plan_comparisons", 2_800_000, "--plan_lengths", 150, 512, 300, 300]
    began = time.perf_counter()
    done = plain_python(*paper)
    assert not done.returncode, done.stderr
    assert time.perf_counter() - began < 60
    lines = numbers_in(done.stdout)
    assert "21,875 steps" in done.stdout and "fits in 80 GB" in done.stdout
    # 8,292,166,656 of the published checkpoint, less its LM head of 152064 * 3584 and with a reward
    # head of 3584 * 3584 + 2 * 3584
    assert "7,760,021,504 parameters" in done.stdout
    assert lines["tokens"] == 1262 and lines["image patches"] == 2048
    # The usual rule of 6 FLOPs a token and parameter, for the 6.5e9 without the embedding.
    assert lines["TFLOP, language model"] == pytest.approx(6 * 6.525e-3 * 1262, rel=0.03)
    done = torchrun("03_train.py", "--plan", *paper, "--gpus", 1, ranks=1)
    assert "does NOT fit" in done.stdout
    lora = train.Settings(model=str(tmp_path), gpus=1, lora_rank=16, plan_comparisons=100)
    lora.plan_lengths = [150, 512, 300, 300]
    train.print_plan(lora)
    printed = capsys.readouterr().out
    assert "fits in 80 GB" in printed
    adapters = 28 * 16 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    trained = adapters + 3584 * 3584 + 2 * 3584
    lines = numbers_in(printed)
    assert lines["a checkpoint"] == pytest.approx(12 * trained / 1e9, rel=1e-3)
    frozen = 7_760_021_504 - (3584 * 3584 + 2 * 3584)
    assert lines["parameters"] == pytest.approx((2 * frozen + 4 * trained) / 1e9, rel=1e-3)


def test_the_plan_of_a_run_has_its_steps_tokens_and_sizes_on_disk(world, initial, tmp_path):
    names = ("new_scenes", "new_text")  # 50 comparisons: 5 steps of 10
    sets = [world / "data" / name for name in names]
    settings = ["--data", *sets, "--batch_size", 10, "--epochs", 1, "--validation="]
    run = ["--model", initial, "--out", tmp_path / "out", "--checkpoint_every", 2]
    torchrun("03_train.py", *settings, *run, ranks=2)
    folders = list((tmp_path / "out/checkpoints").glob("step_*"))
    checkpoint = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    planned = torchrun("03_train.py", "--plan", *settings, *run[:2], "--gpus", 2, ranks=1)
    lines = numbers_in(planned.stdout)
    logged = [json.loads(line) for line in open(tmp_path / "out/metrics.jsonl")]
    assert len(logged) == sum(len(data.Comparisons(str(folder))) for folder in sets) / 10 == 5
    tokens = np.mean([line["tokens"] / 10 for line in logged])
    assert tokens == pytest.approx(lines["tokens"], rel=1e-3)
    assert checkpoint / len(folders) / 1e9 == pytest.approx(lines["a checkpoint"], rel=0.02)
    exported = (tmp_path / "out/model.safetensors").stat().st_size + 4 * 192 * 192
    assert exported / 1e9 == pytest.approx(lines["the trained model"], rel=0.02)


def test_a_model_without_a_config_is_refused_by_name(tmp_path):
    done = torchrun("03_train.py", "--plan", "--model", tmp_path / "nothing", ranks=1, check=False)
    assert done.returncode and "no model in the Hugging Face layout" in done.stderr
    assert "Traceback" not in done.stderr
