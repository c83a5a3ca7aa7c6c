"""Fuzzes what reads data from elsewhere: lines and pictures through stage 1, and prepared data sets through the loader.

    python tests/fuzz.py --seconds 600 --seed 0

Whatever is done to good input, it has to be read, or refused as Unusable or UserError, within 20 seconds and 2 GB.
Prints executions, how they ended, and each finding once: where it was raised and the seed that gives it again."""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import TINY, stages  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_bad_input import LINES, PAIR, PICTURES, RANKED, SEE  # noqa: E402

data, pack = stages.data, stages.model.pack
ODD = [
    *(
        None,
        True,
        0,
        -1,
        2**31,
        10**40,
        1.5,
        1e308,
        "",
        " ",
        "x" * 3000,
        "\0",
        "\ud800",
        "\ue0003\ue001",
        "<|image_pad|>",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"type": "image"},
        {"role": "assistant", "content": "a"},
        "../a.png",
        "/dev/zero",
        "plain.png",
    ),
    *(
        {"kind": "number"},
        {"kind": "letter", "options": ["a"]},
        "user",
        "assistant",
        "system",
        "text",
        "image",
        [1, 2, 3],
    ),
]
WORDS = [
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "ranks",
    "images",
    "answer",
    "truth",
    "judged",
    "rule",
    "id",
    "kind",
]
WORDS += [
    "category",
    "critiques",
    "group",
    "role",
    "content",
    "type",
    "text",
    "image",
    "bytes",
    "path",
    "source",
    "subset",
]
FULL = [
    PAIR,
    RANKED,
    {
        **PAIR,
        "prompt": SEE,
        "images": ["plain.png"],
        "id": 1,
        "category": "c",
        "critiques": ["a", "b"],
    },
    {
        "prompt": [{"role": "system", "content": "s"}, *SEE],
        "images": ["plain.jpg"],
        "answer": "B",
        "rule": "letter",
    },
    {
        "prompt": "q",
        "answer": "2",
        "rule": {"kind": "number", "type": "integer", "precision": 2, "unit": "m"},
    },
    {
        **RANKED,
        "responses": ["a", ["b"], [{"role": "assistant", "content": "c"}]],
        "ranks": [1, 2, 2],
        "group": "g",
    },
]


def change_value(value, rng: random.Random):
    """One random change somewhere within a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.randrange(5)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {rng.choice(WORDS): rng.choice(ODD)}
        return value | {key: change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i, kind = rng.randrange(len(value)), rng.randrange(5)
        if kind == 0:
            return value[:i] + value[i + 1 :]
        if kind == 1:
            return value[:i] + [rng.choice(ODD)] + value[i:]
        return value[:i] + [change_value(value[i], rng)] + value[i + 1 :]
    if isinstance(value, str) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        return (
            value[:i]
            + chr(rng.choice([0, 7, 0x202E, 0xD800, 0xE000, 0xFFFF, 0x1F642, *range(32, 127)]))
            + value[i:]
        )
    return rng.choice(ODD)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """One random change: bytes overwritten, cut out, repeated or put in."""
    i = rng.randrange(len(content) + 1)
    n = rng.choice([1, 1, 1, 2, 4, 8, 64])
    some = bytes(rng.choice([0, 255, 1, 127, 128, rng.randrange(256)]) for _ in range(n))
    changed = (
        content[:i] + some + content[i + n :],
        content[:i] + content[i + n :],
        content[:i] + some + content[i:],
    )
    return rng.choice(
        [*changed, content[:i], content[:i] + content[i : i + n] * 3 + content[i + n :]]
    )


def fuzz_line(rng: random.Random, folder: Path, processors) -> None:
    record = rng.choice(FULL)
    line = json.dumps(record).encode()
    if rng.random() < 0.3:
        line = rng.choice([entry[0] for entry in LINES.values()])
        line = (
            line
            if isinstance(line, bytes)
            else (line if isinstance(line, str) else json.dumps(line)).encode()
        )
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 4)):
            record = change_value(record, rng)
        line = json.dumps(record).encode()
    else:
        for _ in range(rng.randint(1, 3)):
            line = change_bytes(line, rng)
    read_back(data.read_json(line), folder, processors)


def fuzz_picture(rng: random.Random, folder: Path, processors) -> None:
    content = rng.choice([entry[0] for entry in PICTURES.values() if len(entry) == 3])
    for _ in range(rng.randint(1, 8)):
        content = change_bytes(content, rng)
    read_back({**PAIR, "prompt": SEE, "images": [content]}, folder, processors)


def read_back(record: dict, folder: Path, processors) -> None:
    """As 01 writes a record and the loader reads it."""
    comparison = data.encode_record(record, processors, 4096, folder, False, [folder.resolve()])
    data.write_shard(folder / "shard", [comparison, comparison], processors.image_token)
    pack([data.Shard(folder / "shard")[1]], processors)


def fuzz_set(rng: random.Random, folder: Path, processors) -> None:
    copy = folder / "set"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "good", copy)
    path = rng.choice(sorted(copy.iterdir()))
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        tensors = load_file(path)
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(sorted(tensors))
            array = tensors[name].copy()
            if array.size and rng.random() < 0.8:
                large = rng.choice([-1, 0, 1, 2**31 - 1, 2**62, rng.randrange(-(2**40), 2**40)])
                array.flat[rng.randrange(array.size)] = (
                    large % 2 ** (8 * array.itemsize - 1) * rng.choice([1, 1, 0])
                )
            else:
                array = rng.choice(
                    [array[:-1], array.astype("f4"), array[None], array.repeat(2, axis=0)]
                )
            tensors[name] = array
        save_file(tensors, path)
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(change_value(json.loads(path.read_bytes()), rng)))
    else:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    comparisons = data.Comparisons(str(copy), processors.fingerprint)
    data.use_pixel_limits(processors, [comparisons])
    for i in range(len(comparisons)):
        pack([comparisons[i]], processors)
    stages.eval.Items.of(comparisons)


def prepare_good(folder: Path, processors) -> None:
    """A small prepared data set, and the pictures that lines speak of."""
    for name, (content, *_) in PICTURES.items():
        (folder / name).write_bytes(content)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in FULL[:4]))
    settings = data.Settings(
        source=[str(folder / "pairs.jsonl")], out=str(folder), name="good", shard_size=2
    )
    lines = data.open_source(settings.source[0])
    data.prepare("good", lines, processors, settings, 0.0, [folder])


def too_slow(*_):
    raise TimeoutError("took more than 20 seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--once", type=int, help="only the execution of this number, with its traceback"
    )
    asked = parser.parse_args()
    data.start_distributed()
    processors = data.load_processors(TINY)
    limits = dict(processors.image.size)
    endings, findings, began = Counter(), {}, time.time()
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare_good(folder, processors)
        used = (
            int(
                next(
                    line for line in open("/proc/self/status") if line.startswith("VmSize")
                ).split()[1]
            )
            * 1024
        )
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30,) * 2)
        number = asked.once or 0
        while time.time() - began < asked.seconds:
            rng = random.Random(f"{asked.seed}/{number}")
            fuzz = rng.choice([fuzz_line, fuzz_line, fuzz_picture, fuzz_set])
            processors.image.size = dict(limits)
            signal.alarm(20)
            try:
                fuzz(rng, folder, processors)
                end = "read"
            except (data.Unusable, data.UserError):
                end = "refused"
            except Exception as error:
                end, last = "FOUND", traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__}: {str(error)[:100]} at {Path(last.filename).name}:{last.lineno}"
                if asked.once is not None:
                    raise
                if place not in findings:
                    findings[place] = number
                    print(
                        f"seed {asked.seed}, execution {number}, {fuzz.__name__}: {place}",
                        flush=True,
                    )
            finally:
                signal.alarm(0)
            endings[f"{fuzz.__name__} {end}"] += 1
            number += 1
            if asked.once is not None:
                break
    print(
        f"{sum(endings.values())} executions in {time.time() - began:.0f} s, {len(findings)} findings"
    )
    for name, count in sorted(endings.items()):
        print(f"  {name:<22} {count}")


if __name__ == "__main__":
    main()
