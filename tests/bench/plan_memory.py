"""The memory that 03_train.py --plan expects of a step beside the memory that a step takes, for a
random Qwen2.5-VL of 29 M parameters on a CPU.

    python tests/bench/plan_memory.py [--activation_checkpointing] [--freeze_vision]
    torchrun --standalone --nproc_per_node=2 tests/bench/plan_memory.py

One optimizer step of two micro-batches, as 03_train.py does it, so that gradients are there when
the second one's activations are. Parameters, gradients and optimizer are counted from the tensors
themselves; the peak is that of the process's anonymous memory (Linux), above what it had when
everything was imported and gloo set up.
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
# Freed tensors go back to the system at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
if __name__ == "__main__" and not MALLOC.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/tiny/qwen2_5_vl")
sys.path.insert(0, str(ROOT))
data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
train = importlib.import_module("03_train")

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
TEXT = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": ROPE}
TEXT |= {"layer_types": ["full_attention"] * 6}
VISION = {"depth": 6, "hidden_size": 320, "intermediate_size": 864, "num_heads": 8}
VISION |= {"out_hidden_size": 512, "fullatt_block_indexes": [2, 5]}


def write_model(folder: Path) -> None:
    """Write a backbone of these shapes with random weights and tests/tiny's processors."""
    config = Qwen2_5_VLConfig.from_pretrained(TINY).to_dict()
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    torch.manual_seed(0)
    Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(config)).save_pretrained(folder)
    data.load_processors(TINY).save(str(folder))


def random_row(processors, image: int = 90, copies: int = 1):
    """Pack comparisons of 210 tokens of text, an image, and responses of 120 and 80."""
    comparison = train.assumed_comparison([210, image, 120, 80], processors)
    return model_stage.pack([comparison] * copies, processors)


def meta_model(folder: str, **settings):
    """Build the model as --plan does, in float32 as on a CPU."""
    model = train.model_to_plan(train.Settings(model=folder, **settings))
    model.backbone.to(torch.float32)
    return model


def anonymous_memory(name: str) -> int:
    """Bytes of this process that are no file's: now ("VmRSS"), or at most so far ("VmHWM")."""
    status = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text())
    sizes = {key: int(size) for key, size in status}
    return 1024 * (sizes[name] - sizes["RssFile"] - sizes["RssShmem"])


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(
    folder: str, comparisons: int, written: bool, **settings
) -> dict[str, dict[str, float]]:
    """Return {part: {"estimated": bytes, "measured": bytes}} on this rank."""
    rank, ranks, device = data.start_distributed()
    if rank == 0 and not written:
        write_model(Path(folder))
    dist.barrier()
    planned = meta_model(folder, **settings)
    row = random_row(planned.processors, copies=comparisons)
    meter = train.measure(planned, row.to(torch.device("meta")))
    estimated = train.memory(planned, meter.peak, ranks)
    dist.barrier()
    gc.collect()
    before = anonymous_memory("VmRSS")

    model = model_stage.RewardModel.from_backbone(folder, model_stage.HeadSettings())
    model.backbone.visual.requires_grad_(not settings["freeze_vision"])
    recompute = settings["activation_checkpointing"]
    train.shard(model, model.backbone, device, recompute, in_float32=(model.head,))
    model.train()
    optimizer = train.make_optimizer(model, train.Settings())
    for _ in range(2):
        model(row).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    peak = anonymous_memory("VmHWM") - before

    parameters = list(model.parameters())
    moments = []
    for state in optimizer.state.values():
        moments += [state["exp_avg"].to_local(), state["exp_avg_sq"].to_local()]
    measured = {
        "parameters": bytes_of(p.to_local() for p in parameters),
        "gradients": bytes_of(p.grad.to_local() for p in parameters if p.grad is not None),
        "AdamW's two moments": bytes_of(moments),
        "peak": peak,
    }
    estimated["peak"] = sum(estimated.values())
    return {p: {"estimated": estimated[p], "measured": measured[p]} for p in measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    default = "artifacts/plan_memory"  # ignored by git
    parser.add_argument("folder", nargs="?", default=default, help="for a random model")
    parser.add_argument("--comparisons", type=int, default=3, help="of a micro-batch")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--freeze_vision", action="store_true")
    parser.add_argument("--written", action="store_true", help="the folder has the model")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = vars(parser.parse_args())
    as_json = arguments.pop("json")
    parts = measure(**arguments)
    if dist.get_rank() == 0 and as_json:
        print(json.dumps(parts))
    elif dist.get_rank() == 0:
        print(f"{'MB on rank 0':<22}{'estimated':>10}{'measured':>10}")
        for part, sizes in parts.items():
            print(f"{part:<22}{sizes['estimated'] / 1e6:10.1f}{sizes['measured'] / 1e6:10.1f}")
    dist.barrier()
    gc.collect()  # as in 01_data.run_stage
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
