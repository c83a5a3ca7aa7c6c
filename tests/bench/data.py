"""Preparing pairs with pictures, and waiting for them in training

    python tests/bench/data.py                       # 20,000 pairs, each with its own JPEG of about 280 x 210 pixels

`01_data.py` under torchrun with 2 ranks against `datasets.map` with 2 processes, both from the command line to the
finished files. The map does what preference trainers do before training: chat template, image processor for the number
of image tokens, tokens of prompt + chosen and of prompt + rejected; pictures stay where they are. 01 also copies the
pictures into its shards and checks that each can be decoded to its end. Token ids are compared first.

Then `03_train.py` on these shards, on 1 rank with 1 thread and on 2 ranks, with the pictures decoded by a worker
process for each rank: what share of a step's time the step waits for data.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
from PIL import Image

WORDS = "the a red blue large small cat dog sits stands on under near house tree not very and with of in picture".split()


def write_pairs(folder: Path, count: int) -> Path:
    """Pairs in the JSONL form, prompts of 8-30 words, responses of 15-100, a photograph-like JPEG each."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    text = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(count):
            coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            size = (int(rng.integers(240, 320)), int(rng.integers(180, 240)))
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
                folder / f"pictures/{i}.jpg", quality=90
            )
            prompt = [{"type": "image"}, {"type": "text", "text": text(8, 30)}]
            answer = lambda: [
                {"role": "assistant", "content": f"{text(15, 100)} {rng.integers(1000)}"}
            ]
            pair = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": answer(),
                "rejected": answer(),
            }
            file.write(json.dumps(pair | {"images": [f"pictures/{i}.jpg"]}) + "\n")
    return folder / "pairs.jsonl"


def map_pairs(source: Path, out: Path) -> None:
    """The peers' way; runs as a process of its own."""
    from datasets import load_dataset

    processors = common.data.load_processors(common.TINY, max_pixels=501760)
    tokenizer, image = processors.tokenizer, processors.image

    def encode(pair: dict) -> dict:
        picture = Image.open(source.parent / pair["images"][0]).convert("RGB")
        grid = image([picture], return_tensors="np")["image_grid_thw"][0]
        content = [
            {key: value for key, value in part.items() if value}
            for part in pair["prompt"][0]["content"]
        ]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace(
            "<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // image.merge_size**2)
        )
        row = lambda answer: tokenizer.encode(
            prompt + answer[0]["content"] + "<|im_end|>", add_special_tokens=False
        )
        return {"chosen_ids": row(pair["chosen"]), "rejected_ids": row(pair["rejected"])}

    rows = load_dataset("json", data_files=str(source), split="train", cache_dir=str(out / "cache"))
    rows.map(encode, num_proc=2, remove_columns=["prompt", "chosen", "rejected"]).save_to_disk(
        str(out / "mapped")
    )


def run(*command, ranks: int = 2) -> float:
    """Seconds of a command, run under torchrun where `ranks` is not 0."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began


def assert_same_tokens(shards: Path, mapped: Path, sample: int = 200) -> None:
    from datasets import load_from_disk

    ours, theirs = common.data.Comparisons(str(shards)), load_from_disk(str(mapped))
    assert len(ours) == len(theirs)
    for i in np.linspace(0, len(ours) - 1, sample).astype(int).tolist():
        for response, key in zip(ours[i].responses, ("chosen_ids", "rejected_ids")):
            assert np.concatenate([ours[i].prompt, response]).tolist() == theirs[i][key], (i, key)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        help="training steps of 16 pairs in which the wait is measured",
    )
    parser.add_argument("--map", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.map:
        return map_pairs(*arguments.map)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = write_pairs(folder / "source", arguments.pairs)
        counter = iter(range(1000))
        prepare = lambda: run(
            "01_data.py", "--source", source, "--holdout", 0, "--out", folder / "ours"
        )
        theirs = lambda: run(__file__, "--map", source, folder / f"theirs{next(counter)}", ranks=0)
        seconds = common.alternate(
            {"ours": prepare, "theirs": theirs}, arguments.repetitions, warm_up=0
        )
        assert_same_tokens(folder / "ours/pairs", folder / "theirs0/mapped")
        print(f"\n{common.machine()}\n")
        table = [
            [f"{arguments.pairs} pairs with pictures", "seconds", "pairs a second", "times as fast"]
        ]
        for name, who in (("datasets.map, 2 processes", "theirs"), ("01_data.py, 2 ranks", "ours")):
            each = seconds[who]
            faster = f"{common.ratio(seconds['theirs'], each):.2f}"
            cell = f"{common.median(each):.1f} ({common.spread(each)})"
            table.append([name, cell, round(arguments.pairs / common.median(each)), faster])
        common.print_table(table)

        common.make_models(folder / "backbone", common.vision_language_config())
        run(
            "02_model.py",
            "--backbone",
            folder / "backbone",
            "--out",
            folder / "model",
            "--data",
            "",
            ranks=1,
        )
        table = [["03_train.py, 16 pairs a step", "seconds a step", "of which waiting for data"]]
        for ranks in (1, 2):
            options = [
                "--data",
                folder / "ours/pairs",
                "--model",
                folder / "model",
                "--out",
                folder / f"reward{ranks}",
            ]
            options += ["--steps", arguments.steps, "--batch_size", 16, "--checkpoint_every", 0]
            run("03_train.py", *options, ranks=ranks)
            lines = [
                json.loads(line)
                for line in (folder / f"reward{ranks}/metrics.jsonl").read_text().splitlines()
            ]
            lines = lines[2:]  # the first two start the worker
            step, wait = (
                sum(line[key] for line in lines) / len(lines) for key in ("seconds", "data_seconds")
            )
            table.append(
                [
                    f"{ranks} rank(s), 1 worker each",
                    f"{step:.2f}",
                    f"{wait:.3f} ({100 * wait / step:.1f}%)",
                ]
            )
        print()
        common.print_table(table)


if __name__ == "__main__":
    main()
