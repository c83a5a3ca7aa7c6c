"""The cost of a training step as prompts, responses, batches and ranks grow, and of opening shards

    python tests/bench/scaling.py

A step is that of 03_train.py: micro-batches of at most 8192 tokens, forward and backward of each,
AdamW; FSDP2 on 1 and 2 ranks of one thread each, fp32, batches in memory before the clock starts.
Memory is the anonymous memory of rank 0 (Linux, glibc), at its peak within a step that is not
timed, above what it was before.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import common
import numpy as np
import torch.distributed as dist

SHORT = {"image": (16, 64), "prompt": (20, 80), "response": (20, 100)}


def settings_of(processors) -> dict[str, list]:
    """Comparisons of each setting."""

    def make(count: int, **lengths) -> list:
        return common.make_comparisons(processors, count, **SHORT | lengths)

    made = {f"{count} comparisons": make(count) for count in (8, 16, 32, 64, 128)}
    made |= {
        f"16 with prompts of {length} tokens": make(16, image=None, prompt=(length,) * 2)
        for length in (64, 256, 1024)
    }
    return made | {f"16 with N = {n}": make(16, n=n) for n in (2, 4, 8, 16)}


class Peak:
    """Anonymous memory in MiB: `before` and the largest since."""

    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)  # gives back to the system what earlier steps have freed
        self.before = self.most = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    @staticmethod
    def now() -> float:
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["RssAnon"].split()[0]) / 1024

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.now())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


def measure(folder: str, repetitions: int = 5) -> None:
    """On every rank under torchrun; rank 0 prints a line of JSON for each setting."""
    rank, world, device = common.data.start_distributed()
    model = common.RewardModel.from_backbone(folder, common.model_stage.HeadSettings())
    common.training.shard(model, model.backbone, device, in_float32=(model.head,))
    optimizer = common.training.make_optimizer(model, common.training.Settings())
    steps = {}
    for name, comparisons in settings_of(model.processors).items():
        tokens = np.array([c.length for c in comparisons])
        patches = np.array([c.patches for c in comparisons])
        plan = common.training.plan(
            [list(range(len(comparisons)))], tokens, patches, 8192, rank, world
        )
        batches = common.training.load(comparisons, plan, model, device, workers=0)
        steps[name] = {"tokens": int(tokens.sum()), "batches": list(batches), "seconds": []}
    for repetition in range(1 + repetitions):
        for step in steps.values():
            dist.barrier()
            with Peak() if repetition == 0 else nullcontext() as peak:
                began = time.perf_counter()
                for batch, row, pairs in step["batches"]:
                    (
                        common.training.ranking_loss(model(row), pairs) * world / batch.step_weight
                    ).backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds = time.perf_counter() - began
            step["seconds"].append(seconds)
            if peak:
                step["peak"] = peak.most - peak.before
    for name, step in steps.items():
        times = step["seconds"][1:]
        line = {
            "name": name,
            "tokens": step["tokens"],
            "micro": len(step["batches"]),
            "peak": step["peak"],
        }
        if rank == 0:
            print("JSON" + json.dumps(line | {"seconds": common.median(times)}), flush=True)
    del model, optimizer
    gc.collect()  # as in 01_data.run_stage
    dist.destroy_process_group()


def open_shards(folder: Path) -> list[list]:
    """Seconds to open 2,000 comparisons in more and more shards, and to read one of them."""
    lines = folder / "pairs.jsonl"
    pair = {"prompt": "Is it?", "chosen": "yes", "rejected": "no"}
    lines.write_text("".join(json.dumps(pair | {"id": str(i)}) + "\n" for i in range(2000)))
    rows = [["shards", "comparisons", "seconds to open and plan a step", "seconds to read one"]]
    common.data.start_distributed()
    for size in (500, 50, 5):
        how = {"source": [str(lines)], "out": str(folder), "holdout": 0, "shard_size": size}
        common.data.main(common.data.Settings(name=f"of_{size}", **how))
        path = str(folder / f"of_{size}")

        def opened(path=path):
            sizes = common.data.Comparisons(path).sizes()
            common.training.plan([list(range(64))], *sizes, 8192, 0, 2)

        comparisons = common.data.Comparisons(path)
        ways = {"open": opened, "read": lambda comparisons=comparisons: comparisons[999]}
        seconds = [f"{common.median(each):.4f}" for each in common.alternate(ways, 9).values()]
        rows.append([2000 // size, 2000, *seconds])
    dist.destroy_process_group()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure)
    with tempfile.TemporaryDirectory() as folder:
        common.make_models(Path(folder, "model"), common.vision_language_config())
        lines = {}
        for ranks in (1, 2):
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={ranks}",
            ]
            done = subprocess.run(
                [*launcher, __file__, "--measure", f"{folder}/model"],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                sys.exit(done.stderr)
            found = [
                json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JSON")
            ]
            lines[ranks] = {line["name"]: line for line in found}
        head = ["seconds, {}", "µs a token, {}", "peak MiB of a rank, {}"]
        table = [
            [
                "a step of",
                "tokens",
                *(each.format(ranks) for ranks in ("1 rank", "2 ranks") for each in head),
            ]
        ]
        for name, line in lines[1].items():
            cells = []
            for each in (line, lines[2][name]):
                of_token = 1e6 * each["seconds"] / each["tokens"]
                cells += [f"{each['seconds']:.2f}", f"{of_token:.0f}", f"{each['peak']:.0f}"]
            table.append([name, line["tokens"], *cells])
        print(f"\n{common.machine()}\n")
        common.print_table(table)
        print()
        common.print_table(open_shards(Path(folder)))


if __name__ == "__main__":
    main()
