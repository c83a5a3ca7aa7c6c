"""Shared by the benchmarks: a model and comparisons of a stated size, the peers' way to score them,
alternating timing, tables.

TRL, LLaMA-Factory and ms-swift train and score a reward model with one row for each response, the
prompt and its images in every row, and all rows padded to the longest and read in one forward. The
score is read at each row's last token. First come the chosen rows, then the rejected ones.
"""

import importlib
import io
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Qwen2_5_VLConfig, Qwen2_5_VLModel

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "tiny" / "qwen2_5_vl")
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
data, model_stage, training = map(importlib.import_module, ("01_data", "02_model", "03_train"))
Comparison, RewardModel = data.Comparison, model_stage.RewardModel


def machine() -> str:
    """Describe the machine, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{cpu}, {threads}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def vision_language_config(
    hidden: int = 256, layers: int = 6, vision: int = 160, depth: int = 6
) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL with about the published proportions, at a size that a laptop trains.

    As in the 3B, an image token costs the vision tower about what it costs the language model. The
    vocabulary is the tiny backbone's, whose tokenizer and image processor serve.
    """
    config = Qwen2_5_VLConfig.from_pretrained(TINY)
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12],
        },
        "layer_types": ["full_attention"] * layers,
    }
    tower = {
        "hidden_size": vision,
        "intermediate_size": 2 * vision,
        "depth": depth,
        "num_heads": vision // 80,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": list(range(7, depth, 8)) or [depth - 1],  # published: every eighth
    }
    made = config.to_dict()
    made["text_config"] |= text
    made["vision_config"] |= tower
    return Qwen2_5_VLConfig.from_dict(made)


def make_models(folder: Path, config, cls=Qwen2_5_VLModel) -> tuple[RewardModel, torch.nn.Module]:
    """The same random weights twice: our reward model, and a plain transformers model."""
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    data.load_processors(TINY).save(str(folder))
    ours = RewardModel.from_backbone(str(folder), model_stage.HeadSettings())
    return ours, AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def make_comparison(
    rng, processors, image_tokens: int, prompt: int, responses: list[int]
) -> Comparison:
    """Random text of these lengths in tokens, and a picture of about `image_tokens`, if any."""

    def text(length: int) -> np.ndarray:
        return rng.integers(0, 512, length, dtype=np.int32)

    ids, files, grids = text(prompt), [], np.zeros((0, 3), np.int32)
    if image_tokens:
        unit = processors.vision.patch * processors.vision.merge
        height = max(1, round((image_tokens * rng.uniform(0.6, 1.6)) ** 0.5))
        size = (unit * max(1, round(image_tokens / height)), unit * height)
        noise = rng.integers(0, 256, (size[1] // 7, size[0] // 7, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
        files = [file.getvalue()]
        grids = np.array([data.patch_grid(size, processors)], np.int32)
        tokens = grids.prod() // processors.vision.merge**2
        ids = np.insert(ids, prompt // 4, np.full(tokens, processors.image_token))
    end = np.array([processors.end_token], np.int32)
    texts = [np.concatenate([text(length - 1), end]) for length in responses]
    return Comparison(ids, texts, list(range(1, len(responses) + 1)), files, grids)


def make_comparisons(
    processors, count: int, image=(64, 256), prompt=(20, 80), response=(20, 200), n=2, seed=0
) -> list:
    """Comparisons with lengths in tokens drawn evenly from the given ranges."""
    rng = np.random.default_rng(seed)

    def draw(limits: tuple[int, int]) -> int:
        return int(rng.integers(limits[0], limits[1] + 1))

    comparisons = []
    for _ in range(count):
        lengths = [draw(image) if image else 0, draw(prompt), [draw(response) for _ in range(n)]]
        comparisons.append(make_comparison(rng, processors, *lengths))
    return comparisons


# --------------------------------------------------------------------------------------------------
# The peers' way.


def padded_rows(comparisons: list[Comparison], processors) -> dict[str, torch.Tensor]:
    """Pad a row for each response, its images in each: all first responses, then all second."""
    rows = []  # (comparison, token ids)
    for k in range(max(len(c.responses) for c in comparisons)):
        for c in comparisons:
            ids = np.concatenate([c.prompt, c.responses[k]]).astype(np.int64)
            rows.append((c, torch.from_numpy(ids)))
    ids = [row for _, row in rows]
    pad = processors.tokenizer.pad_token_id
    batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)}
    lengths = torch.tensor([len(row) for row in ids])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    images = [data.open_image(file) for c, _ in rows for file in c.images]
    if images:
        pixels = processors.image_processor(images, return_tensors="pt")
        batch |= {
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }
        batch["mm_token_type_ids"] = (batch["input_ids"] == processors.image_token).int()
    return batch


def padded_scores(backbone, head, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[rows] scores, each read at its row's last token that is not padding."""
    hidden = backbone(**batch, use_cache=False).last_hidden_state  # [rows, longest, hidden]
    last = batch["attention_mask"].sum(1) - 1
    return head(hidden[torch.arange(len(last)), last])


# --------------------------------------------------------------------------------------------------
# Timing and tables.


def alternate(
    ways: dict[str, callable], repetitions: int = 7, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way; ways alternate, so that a slow moment of the machine hits all."""
    seconds = {name: [] for name in ways}
    for repetition in range(warm_up + repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repetition >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def flops(way: callable) -> int:
    """Floating-point operations of a way, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over repetitions of the ratio within a repetition."""
    return statistics.median(s / f for s, f in zip(slow, fast))


def spread(values: list[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"


def print_table(rows: list[list]) -> None:
    """Markdown; the first row is the head."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
