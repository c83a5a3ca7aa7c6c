"""Stage 3, --plan: its work and memory are those that torch counts and measures."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, stages, torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "tests/bench"))
import plan_memory  # noqa: E402

data, model, train = stages.data, stages.model, stages.train

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
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
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


@pytest.fixture(scope="module")
def process_group():
    data.start_distributed()
    yield
    torch.distributed.destroy_process_group()


# ---- work


def counted(reward, row, freeze_vision: bool, activation_checkpointing: bool) -> int:
    """Count FLOPs of forward and backward with torch."""
    if hasattr(reward.backbone, "visual"):
        reward.backbone.visual.requires_grad_(not freeze_vision)
    train.shard(reward, reward.backbone, torch.device("cpu"), activation_checkpointing)
    reward.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reward(row).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "grid", [None, (1, 12, 20), (1, 16, 16)], ids=["text", "ragged windows", "whole windows"]
)
@pytest.mark.parametrize("how", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", ["tiny", "larger"])
def test_flops_are_those_that_torch_counts(size, how, grid, process_group):
    """Torch counts the whole square of masked attention, so the pairs are given as that here."""
    prompt, responses = 150, (70, 40)
    if size == "tiny":
        reward = model.RewardModel.from_backbone(TINY, model.HeadSettings())
    else:
        reward = plan_memory.random_model()
    row, work = plan_memory.random_row(reward.backbone.config, prompt, responses, grid, copies=2)
    assert work.pairs == 2 * sum((prompt**2 / 2, *(R * prompt + R**2 / 2 for R in responses)))
    work.pairs = 2 * sum((prompt**2, *(R * (prompt + R) for R in responses)))
    expected = sum(train.flops(reward.backbone.config, work, *how).values())
    assert expected == pytest.approx(counted(reward, row, *how), rel=5e-3)


def test_lengths_read_from_the_offsets_are_those_of_the_comparisons(world):
    config = data.AutoConfig.from_pretrained(TINY)
    folder = str(world / "data/train")
    work, _ = train.work_to_plan(train.Settings(data=[folder]), config)
    comparisons = data.Comparisons(folder)
    side = 8  # of a window in patches
    for i in range(0, len(comparisons), 7):
        c = comparisons[i]
        P = len(c.prompt)
        Rs = [len(response) for response in c.responses]
        windows = []
        for _, h, w in c.grids.tolist():
            for y in range(0, h, side):
                for x in range(0, w, side):
                    windows.append(min(side, h - y) * min(side, w - x))
        assert work[i].tolist() == [
            c.length,
            P * P / 2 + sum(R * P + R * R / 2 for R in Rs),
            sum(P + R for R in Rs),
            c.grids.prod(1).sum(),
            (c.grids.prod(1) ** 2).sum(),
            sum(n * n for n in windows),
        ]


# ---- memory


@pytest.mark.parametrize(
    "ranks, options",
    [
        (1, []),
        (1, ["--activation_checkpointing"]),
        (1, ["--freeze_vision", "--activation_checkpointing"]),
        (2, []),
        (2, ["--comparisons", "1", "--large_vision"]),
    ],
)
def test_the_memory_of_a_step_is_within_15_percent_of_what_is_measured(ranks, options):
    done = torchrun("tests/bench/plan_memory.py", "--json", *options, ranks=ranks)
    parts = json.loads(done.stdout.splitlines()[-1])
    for part in ("parameters", "gradients", "AdamW's two moments"):
        measured = pytest.approx(parts[part]["measured"], rel=1e-3)  # uneven shards
        assert parts[part]["estimated"] == measured, part
    for part in parts.keys() & {"activations", "peak"}:
        measured = pytest.approx(parts[part]["measured"], rel=0.15)
        assert parts[part]["estimated"] == measured, part


# ---- the command


def plain_python(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "03_train.py", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )


def printed_plan(*arguments, fresh: bool = False) -> tuple[str, dict[str, list[float]]]:
    """Return the output of `03_train.py --plan`, whole and as {name of a line: its numbers}."""
    if fresh:
        done = plain_python("--plan", *arguments)
    else:
        done = torchrun("03_train.py", "--plan", *arguments, ranks=1)
    assert not done.returncode, done.stderr
    found = re.findall(r"^ *(\S.*?) {2,}([\d.,]+)(?:  (\d[\d.e+]*))?", done.stdout, re.MULTILINE)
    lines = {}
    for name, *numbers in found:
        lines[name] = [float(number.replace(",", "")) for number in numbers if number]
    return done.stdout, lines


def test_the_papers_run_is_planned_in_seconds_from_a_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_VL_7B))
    paper = ["--model", tmp_path, "--gpus", 64, "--batch_size", 128, "--epochs", 1]
    paper += ["--plan_comparisons", 2_800_000, "--plan_lengths", 150, 512, 300, 300]
    began = time.perf_counter()
    text, lines = printed_plan(*paper, fresh=True)
    assert time.perf_counter() - began < 60
    assert "21,875 steps" in text and "fits in 80 GB" in text
    assert "7,760,021,504 parameters" in text
    # 8,292,166,656 of the published checkpoint - its LM head + a reward head
    assert 8_292_166_656 - 152064 * 3584 + 3584 * 3584 + 2 * 3584 == 7_760_021_504
    assert lines["tokens"] == [1262, pytest.approx(1262 * 2.8e6, rel=1e-2)]
    # The usual rule: 6 FLOPs a token and parameter; the language model has 6.5e9 of them without
    # the embedding.
    assert lines["TFLOP, language model"][0] == pytest.approx(6 * 6.525e-3 * 1262, rel=0.03)
    text, _ = printed_plan(*paper, "--gpus", 1)
    assert "does NOT fit" in text


def test_the_plan_of_the_embedded_data_has_the_steps_and_tokens_of_the_run(world, tmp_path):
    settings = ["--data", world / "data/train", "--batch_size", 16, "--epochs", 1]
    torchrun("02_model.py", "--data", world / "data/train", "--out", tmp_path / "model", ranks=1)
    run = ["--model", tmp_path / "model", "--out", tmp_path / "out", "--checkpoint_every", 5]
    torchrun("03_train.py", *settings, *run, ranks=2)
    kept = [folder.iterdir() for folder in (tmp_path / "out/checkpoints").glob("step_*")]
    checkpoint = sum(file.stat().st_size for files in kept for file in files) / len(kept)
    _, lines = printed_plan(*settings, "--model", TINY, "--gpus", 2)
    logged = [json.loads(line) for line in open(tmp_path / "out/metrics.jsonl")]
    comparisons = data.Comparisons(str(world / "data/train"))
    assert len(logged) == -(-len(comparisons) // 16)
    # The run also reads tokens of blank images, and its last step comparisons of the next epoch.
    assert sum(line["tokens"] for line in logged) == pytest.approx(lines["tokens"][-1], rel=0.02)
    assert [checkpoint / 1e9] == pytest.approx(lines["a checkpoint"], rel=0.02)
    exported = (tmp_path / "out/model.safetensors").stat().st_size + 4 * 192 * 192
    assert [exported / 1e9] == pytest.approx(lines["the trained model"], rel=0.02)


def test_the_first_rank_has_the_largest_rows(world):
    """The plan looks at its rows only."""
    tokens, patches = data.Comparisons(str(world / "data/train")).sizes()
    cost = tokens + patches // 4
    steps = [list(range(start, start + 40)) for start in (0, 40, 80)]
    plans = [train.plan(steps, tokens, patches, 600, rank, 3) for rank in range(3)]
    for together in zip(*plans, strict=True):
        costs = [cost[batch.indices].sum() if batch.indices else 0 for batch in together]
        assert np.argmax(costs) == 0


def test_a_model_without_a_config_is_refused_by_name(tmp_path):
    done = plain_python("--plan", "--model", tmp_path / "nothing")
    assert done.returncode and "no model in the Hugging Face layout" in done.stderr
    assert "Traceback" not in done.stderr
