"""Memory that each of two ranks takes to load and export a model: sharded while empty and filled by
rank 0, as 03 does; and loaded whole on every rank first.

    python tests/bench/loading.py           # a random Qwen2.5-VL of 1 GB in float32

Counted is anonymous memory (RssAnon), sampled every millisecond. The checkpoint's memory-mapped
pages belong to the page cache, which all ranks share and the kernel takes back when it needs them.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT, data, model_stage, training = common.ROOT, common.data, common.model_stage, common.training


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write a random reward model with wide layers: bfloat16 as published ones, a file a layer."""
    shutil.copytree(
        common.TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((folder / "config.json").read_text())
    text = {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
    }
    text |= {"layer_types": ["full_attention"] * layers, "vocab_size": 32768}
    text["rope_parameters"] = config["text_config"]["rope_parameters"] | {
        "mrope_section": [16, 24, 24]
    }
    config["text_config"] |= text
    config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    files = {}
    for name, parameter in model.model.named_parameters():
        layer = name.partition(".layers.")[2].partition(".")[
            0
        ]  # empty: the vision tower, the embeddings, the norm
        files.setdefault(layer, {})[name] = parameter
    weight_map = {}
    for i, weights in enumerate(files.values(), 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        weights = {
            name: torch.randn(parameter.shape).bfloat16() for name, parameter in weights.items()
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    head = model_stage.RewardHead(text["hidden_size"])
    about = json.dumps({"kind": "naive", "head": head.settings, "trained_with": {}})
    save_file(head.state_dict(), folder / "reward_head.safetensors", {"reward_head": about})


def anonymous_memory() -> float:
    """MB of this process that no file backs."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024 / 1e6


class Watched:
    """Anonymous memory of what runs within: `before`, `peak`, `after` in MB."""

    def __enter__(self):
        self.before = self.peak = anonymous_memory()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.done.is_set():
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.after = anonymous_memory()
        self.done.set()
        self.watcher.join()

    def row(self) -> list[str]:
        """Before, at most, and what that and the end are more than before."""
        return [
            f"{each:.0f}"
            for each in (self.before, self.peak, self.peak - self.before, self.after - self.before)
        ]


def measure(folder: str, way: str) -> None:
    rank, world, device = data.start_distributed()
    with Watched() as loading:
        model = load(folder, way, device)

    def size(tensor) -> float:
        return tensor.numel() * tensor.element_size() / 1e6

    own = sum(size(parameter.to_local()) for parameter in model.parameters())
    largest = max(size(parameter) for parameter in model.parameters())
    dist.barrier()
    with Watched() as exporting:
        model.save_pretrained(f"{folder}/export", file_size="100MB" if way == "sharded" else "5GB")
    rows = [
        [f"{way}, rank {rank} loads", *loading.row()],
        [f"{way}, rank {rank} exports", *exporting.row()],
    ]
    everyone = [None] * world
    dist.all_gather_object(everyone, rows)
    if rank == 0:
        found = {"rows": [row for rows in everyone for row in rows], "own": own, "largest": largest}
        Path(folder, f"{way}.json").write_text(json.dumps(found))
    del model
    gc.collect()  # as in 01_data.run_stage
    dist.destroy_process_group()


def load(folder: str, way: str, device: torch.device):
    model = model_stage.RewardModel.from_pretrained(folder, empty=way == "sharded")
    training.shard(model, model.backbone, device, in_float32=(model.head,))
    if way == "sharded":
        training.load_weights(model.backbone, folder, device)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=8, help="decoder layers, of about 100 MB each in float32"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--load", nargs=2, help=argparse.SUPPRESS
    )  # what each rank is started with: folder and way
    arguments = parser.parse_args()
    if arguments.load:
        return measure(*arguments.load)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments.layers)
        for way in ("sharded", "whole"):  # each in fresh processes
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += [f"--nproc_per_node={arguments.ranks}", __file__, "--load", folder, way]
            subprocess.run(torchrun, check=True)
        found = [
            json.loads(Path(folder, f"{way}.json").read_text()) for way in ("sharded", "whole")
        ]
        head = [
            "MB of anonymous memory",
            "before",
            "at most",
            "more than before",
            "more at the end",
        ]
        common.print_table([head, *(row for each in found for row in each["rows"])])
        print(
            "\na rank's own shards {own:.0f} MB, the largest tensor {largest:.0f} MB".format(
                **found[0]
            )
        )


if __name__ == "__main__":
    main()
