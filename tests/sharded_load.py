"""Loads checkpoints as stage 3 does, sharded while empty and then filled, and compares every parameter and buffer, and
who holds how much, with a plain load.

    torchrun --standalone --nproc_per_node=2 tests/sharded_load.py FOLDER...
"""

import gc
import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data, model, train, grpo = (
    importlib.import_module(name) for name in ("01_data", "02_model", "03_train", "06_grpo")
)


def compare(plain: torch.nn.Module, sharded: torch.nn.Module, what: str) -> None:
    parameters, buffers = dict(sharded.named_parameters()), dict(sharded.named_buffers())
    for name, expected in plain.named_parameters():
        parameter = parameters.pop(name)
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter.full_tensor(), expected
        ), (what, name)
        assert len(parameter.to_local()) <= -(-len(expected) // dist.get_world_size()), (what, name)
    for name, expected in plain.named_buffers():
        assert torch.equal(buffers.pop(name), expected), (what, name)
    assert not parameters and not buffers, what
    print("same as a plain load:", what, flush=True)


def compare_loads(folder: str, device: torch.device) -> None:
    """Of a reward model; or of a checkpoint, without its LM head, with it, and as a policy."""
    if Path(folder, model.HEAD_FILE).is_file():
        plain, sharded = (
            model.RewardModel.from_pretrained(folder, empty) for empty in (False, True)
        )
        train.shard(sharded, sharded.backbone, device, in_float32=(sharded.head,))
        train.load_weights(sharded.backbone, folder, device)
        return compare(plain, sharded, f"{folder}, a reward model")
    sharded = model.load_backbone(folder, empty=True)
    train.shard(torch.nn.Sequential(sharded), sharded, device)
    train.load_weights(sharded, folder, device)
    compare(
        AutoModel.from_pretrained(folder, dtype=torch.float32),
        sharded,
        f"{folder}, without LM head",
    )
    plain, sharded = (grpo.Policy(folder, 1.0, empty) for empty in (False, True))
    train.shard(sharded, sharded.lm, device)
    train.load_weights(sharded.lm, folder, device)
    compare(plain, sharded, f"{folder}, a policy")
    with_head = type(plain.lm).from_pretrained(folder, dtype=torch.float32)
    compare(with_head, sharded.lm, f"{folder}, with LM head")
    shared = (
        each.lm_head.weight is each.get_input_embeddings().weight
        for each in (with_head, sharded.lm)
    )
    assert len({*shared}) == 1, folder


def main() -> None:
    _, _, device = data.start_distributed()
    for folder in sys.argv[1:]:
        compare_loads(folder, device)
        dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
