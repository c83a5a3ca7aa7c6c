"""Compare a plain load of checkpoints with that of stage 3, which shards an empty model first.

    torchrun --standalone --nproc_per_node=2 tests/sharded_load.py FOLDER...

Compare every parameter and buffer, and the size of each rank's shard.
"""

import gc
import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
data = importlib.import_module("01_data")
model = importlib.import_module("02_model")
train = importlib.import_module("03_train")
grpo = importlib.import_module("06_grpo")


def compare(plain: torch.nn.Module, sharded: torch.nn.Module, title: str) -> None:
    parameters = dict(sharded.named_parameters())
    buffers = dict(sharded.named_buffers())
    for name, expected in plain.named_parameters():
        parameter = parameters.pop(name)
        assert parameter.dtype == torch.float32, (title, name)
        assert torch.equal(parameter.full_tensor(), expected), (title, name)
        most_rows = -(-len(expected) // dist.get_world_size())
        assert len(parameter.to_local()) <= most_rows, (title, name)
    for name, expected in plain.named_buffers():
        assert torch.equal(buffers.pop(name), expected), (title, name)
    assert not parameters and not buffers, title
    print("same as a plain load:", title, flush=True)


def compare_loads(folder: str, device: torch.device) -> None:
    """Load a reward model; or a checkpoint without its LM head, as a policy, and with it."""
    if Path(folder, model.HEAD_FILE).is_file():
        plain = model.RewardModel.from_pretrained(folder)
        sharded = model.RewardModel.from_pretrained(folder, empty=True)
        train.shard(sharded, sharded.backbone, device, in_float32=(sharded.head,))
        train.load_weights(sharded.backbone, folder, device)
        return compare(plain, sharded, f"{folder}, a reward model")
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32)
    sharded = model.load_backbone(folder, empty=True)
    train.shard(torch.nn.Sequential(sharded), sharded, device)
    train.load_weights(sharded, folder, device)
    compare(plain, sharded, f"{folder}, without LM head")
    plain = grpo.Policy(folder, 1.0)
    sharded = grpo.Policy(folder, 1.0, empty=True)
    train.shard(sharded, sharded.lm, device)
    train.load_weights(sharded.lm, folder, device)
    compare(plain, sharded, f"{folder}, a policy")
    with_head = type(plain.lm).from_pretrained(folder, dtype=torch.float32)
    compare(with_head, sharded.lm, f"{folder}, with LM head")
    tied = set()
    for lm in (with_head, sharded.lm):
        tied.add(lm.lm_head.weight is lm.get_input_embeddings().weight)
    assert len(tied) == 1, folder


def main() -> None:
    _, _, device = data.start_distributed()
    for folder in sys.argv[1:]:
        compare_loads(folder, device)
        dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
