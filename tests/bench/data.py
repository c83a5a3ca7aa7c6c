"""Preparing pairs with pictures, and waiting for them in training

    python tests/bench/data.py                  # 20,000 pairs, each with a JPEG of about 280 x 210

`01_data.py` on 2 ranks against `datasets.map` with 2 processes, both from the command line to the
finished files. The map does what preference trainers do before training: chat template, image
processor for the number of image tokens, tokens of prompt + chosen and prompt + rejected; pictures
stay where they are. 01 also copies the pictures into its shards and decodes each to its end. Token
ids are compared first.

Then `03_train.py` on these shards, on 1 rank and on 2, with a worker process for each rank that
decodes pictures: which share of a step's time it waits for data.
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

WORDS = (
    "the a red blue large small cat dog sits stands on under near house tree not very and with of"
)
WORDS = [*WORDS.split(), "in", "picture"]


def write_pairs(folder: Path, count: int) -> Path:
    """Write JSONL of pairs: prompts of 8-30 words, responses of 15-100, a photograph-like JPEG."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    def answer() -> list[dict]:
        return [{"role": "assistant", "content": f"{text(15, 100)} {rng.integers(1000)}"}]

    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            size = (int(rng.integers(240, 320)), int(rng.integers(180, 240)))
            image = coarse.resize(size, Image.Resampling.BICUBIC)
            image.save(folder / f"pictures/{i}.jpg", quality=90)
            content = [{"type": "image"}, {"type": "text", "text": text(8, 30)}]
            pair = {"prompt": [{"role": "user", "content": content}], "chosen": answer()}
            pair |= {"rejected": answer(), "images": [f"pictures/{i}.jpg"]}
            file.write(json.dumps(pair) + "\n")
    return folder / "pairs.jsonl"


def map_pairs(source: Path, out: Path) -> None:
    """The peers' way; runs as a process of its own."""
    from datasets import load_dataset

    processors = common.data.load_processors(common.TINY, max_pixels=501760)
    tokenizer, image = processors.tokenizer, processors.image_processor

    def encode(pair: dict) -> dict:
        picture = Image.open(source.parent / pair["images"][0]).convert("RGB")
        grid = image([picture], return_tensors="np")["image_grid_thw"][0]
        parts = pair["prompt"][0]["content"]
        content = [{key: value for key, value in part.items() if value} for part in parts]
        messages = [{"role": "user", "content": content}]
        options = {"tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(messages, **options)
        tokens = int(grid.prod()) // image.merge_size**2
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)

        def row(answer: list[dict]) -> list[int]:
            text = prompt + answer[0]["content"] + "<|im_end|>"
            return tokenizer.encode(text, add_special_tokens=False)

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

        def prepare() -> float:
            options = ["--source", source, "--holdout", 0, "--out", folder / "ours"]
            return run("01_data.py", *options)

        def theirs() -> float:
            return run(__file__, "--map", source, folder / f"theirs{next(counter)}", ranks=0)

        ways = {"ours": prepare, "theirs": theirs}
        seconds = common.alternate(ways, arguments.repetitions, warm_up=0)
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
