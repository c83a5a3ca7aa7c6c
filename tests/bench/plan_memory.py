"""What 03_train.py --plan says a step needs beside what it needs, for a random Qwen2.5-VL of 29 M parameters on a CPU.

    python tests/bench/plan_memory.py [--activation_checkpointing] [--freeze_vision]
    torchrun --standalone --nproc_per_node=2 tests/bench/plan_memory.py

One optimizer step of two micro-batches, as 03_train.py does it, so that gradients are there when the second one's
activations are. Parameters, gradients, optimizer and activations are counted from the tensors themselves; the peak is
that of the process's anonymous memory (Linux), above what it had when everything was imported and gloo set up.
"""

import argparse
import gc
import importlib
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}  # freed tensors go back to the system at once
if __name__ == "__main__" and not MALLOC.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModel, Qwen2_5_VLConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
data, model_stage, train = (
    importlib.import_module(name) for name in ("01_data", "02_model", "03_train")
)

SHAPES = {
    "text_config": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12],
        },
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    },
    "vision_config": {
        "depth": 6,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_heads": 8,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [2, 5],
    },
}
# With a short row, such a one needs most where the gradient of the whole vision tower is reduced.
LARGE_VISION = {
    **SHAPES,
    "vision_config": {**SHAPES["vision_config"], "depth": 12, "hidden_size": 640},
}


def random_model(shapes: dict = SHAPES):
    """A reward model of these shapes with random weights, which attends as those of stage 2 do."""
    config = Qwen2_5_VLConfig(**shapes, image_token_id=9)
    attention = model_stage.attention_of(config)
    backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model_stage.prepare_vision(backbone)
    return model_stage.RewardModel(
        backbone, model_stage.RewardHead(config.text_config.hidden_size), None
    )


def random_row(config, prompt: int = 300, responses=(120, 80), grid=(1, 18, 20), copies: int = 1):
    """`copies` comparisons of a prompt with an image of `grid` patches, or none, in one row, and its Work."""
    tokens, grids = copies * (prompt + sum(responses)), [grid] * copies if grid else []
    ids = torch.randint(10, 500, (copies, prompt + sum(responses)))
    if grid:
        ids[:, : int(np.prod(grid)) // 4] = config.image_token_id
    lengths = [(prompt, list(responses))] * copies
    row = model_stage.PackedRow(
        lengths=lengths,
        input_ids=ids.reshape(1, -1),
        position_ids=torch.arange(tokens).expand(3, 1, -1),
        last=torch.arange(1, copies + 1) * (tokens // copies) - 1,
        segments=model_stage.Segments.of_comparisons(lengths),
    )
    if grid:
        pixels = torch.randn(copies * int(np.prod(grid)), 1176)
        shape = data.VisionShape(14, 2, config.vision_config.window_size)
        row.images = model_stage.pack_images(pixels, torch.tensor(grids), shape)
    starts = np.arange(copies + 1)
    work = train.work_of(
        config,
        np.full(copies, prompt),
        np.array(responses * copies),
        starts * len(responses),
        np.array(grids).reshape(-1, 3),
        starts * bool(grid),
    )
    return row, train.Work(*work.sum(axis=0))


def anonymous_memory(which: str) -> int:
    """Bytes of this process that are no file's: now ("VmRSS"), or at most so far ("VmHWM")."""
    status = {
        name: int(kB)
        for name, kB in re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text())
    }
    return 1024 * (status[which] - status["RssFile"] - status["RssShmem"])


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(arguments) -> dict[str, dict[str, float]]:
    """{part: {"estimated": bytes, "measured": bytes}} on this rank."""
    rank, ranks, device = data.start_distributed()
    dist.barrier()
    before = anonymous_memory("VmRSS")

    torch.manual_seed(0)
    model = random_model(LARGE_VISION if arguments.large_vision else SHAPES)
    row, work = random_row(model.backbone.config, copies=arguments.comparisons)
    how = {
        "freeze_vision": arguments.freeze_vision,
        "activation_checkpointing": arguments.activation_checkpointing,
    }
    estimated = train.memory(model, work, ranks, **how, width=4)
    model.backbone.visual.requires_grad_(not arguments.freeze_vision)
    train.shard(
        model, model.backbone, device, arguments.activation_checkpointing, in_float32=(model.head,)
    )
    model.train()
    optimizer = train.make_optimizer(model, train.Settings())
    for _ in range(2):
        model(row).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    peak = anonymous_memory("VmHWM") - before

    parameters = list(model.parameters())
    measured = {
        "parameters": bytes_of(p.to_local() for p in parameters),
        "gradients": bytes_of(p.grad.to_local() for p in parameters if p.grad is not None),
        "AdamW's two moments": bytes_of(
            state[key].to_local()
            for state in optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ),
    }
    if not arguments.activation_checkpointing:  # which keeps the layers' inputs elsewhere
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(row)
        # Weights are among them, but those of layers are no longer gathered and their storage is empty.
        measured["activations"] = sum(storage.nbytes() for storage in kept.values())
        del scores
    measured["peak"], estimated["peak"] = peak, sum(estimated.values())
    estimated["activations"] = sum(
        train.activations(model.backbone.config, work, **how, width=4).values()
    )
    return {part: {"estimated": estimated[part], "measured": measured[part]} for part in measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--comparisons", type=int, default=3, help="in a micro-batch, of 500 tokens and 360 patches"
    )
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--freeze_vision", action="store_true")
    parser.add_argument(
        "--large_vision", action="store_true", help="most parameters are the vision tower's"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    parts = measure(arguments)
    if dist.get_rank() == 0:
        print(
            json.dumps(parts)
            if arguments.json
            else f"{'MB on rank 0':<22}{'estimated':>10}{'measured':>10}"
        )
        for part, counts in {} if arguments.json else parts.items():
            print(f"{part:<22}{counts['estimated'] / 1e6:10.1f}{counts['measured'] / 1e6:10.1f}")
    dist.barrier()
    gc.collect()  # as in 01_data.run_stage
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
