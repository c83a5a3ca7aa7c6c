"""Fuzz stage 1's readers: lines, pictures, and prepared data sets.

    python tests/fuzz.py --seconds 600 --seed 0

Good input is changed at random. It has to be read, or refused as Unusable or UserError, within
20 seconds and 2 GB. Prints executions, how they ended, and each finding once, with its seed."""

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
from test_bad_input import LINES, PAIR, PICTURES, RANKED, SEE, as_bytes  # noqa: E402

data, pack = stages.data, stages.model.pack
ODD = [None, True, 0, -1, 2**31, 10**40, 1.5, 1e308, "", " ", "x" * 3000, "\0", "\ud800"]
ODD += ["\ue0003\ue001", "<|image_pad|>", "<image>", "../a.png", "/dev/zero", "plain.png"]
ODD += [[], {}, [[]], [None], [1, 2, 3], {"type": "image"}, {"role": "assistant", "content": "a"}]
ODD += [{"kind": "number"}, {"kind": "letter", "options": ["a"]}, "user", "assistant", "system"]
WORDS = "prompt chosen rejected responses ranks images answer truth judged rule id kind category"
WORDS += " critiques group role content type text image bytes path source subset"
CONTROL = [0, 7, 0x202E, 0xD800, 0xE000, 0xFFFF, 0x1F642]

NUMBER = {"kind": "number", "type": "integer", "precision": 2, "unit": "m"}
ABOUT = {"images": ["plain.png"], "id": 1, "category": "c", "critiques": ["a", "b"]}
THREE = ["a", "b", [{"role": "assistant", "content": "c"}]]
SYSTEM = {"role": "system", "content": "s"}
FULL = [
    PAIR,
    RANKED,
    {**PAIR, "prompt": SEE, **ABOUT},
    {"prompt": [SYSTEM, *SEE], "images": ["plain.jpg"], "answer": "B", "rule": "letter"},
    {"prompt": "q", "answer": "2", "rule": NUMBER},
    {**RANKED, "responses": THREE, "ranks": [1, 2, 2], "group": "g"},
]


def change_value(value, rng: random.Random):
    """One random change somewhere within a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value, key, kind = dict(value), rng.choice(list(value)), rng.randrange(5)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[rng.choice(WORDS.split())] = rng.choice(ODD)
        else:
            value[key] = change_value(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value, i, kind = list(value), rng.randrange(len(value)), rng.randrange(5)
        if kind == 0:
            del value[i]
        elif kind == 1:
            value.insert(i, rng.choice(ODD))
        else:
            value[i] = change_value(value[i], rng)
        return value
    if isinstance(value, str) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        return value[:i] + chr(rng.choice([*CONTROL, *range(32, 127)])) + value[i:]
    return rng.choice(ODD)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """One random change: bytes overwritten, cut out, put in, cut off or repeated."""
    i, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 1, 2, 4, 8, 64])
    some = bytes(rng.choice([0, 255, 1, 127, 128, rng.randrange(256)]) for _ in range(n))
    start, rest = content[:i], content[i + n :]
    repeated = content[i : i + n] * 3
    changes = [start + some + rest, start + rest, start + some + content[i:], start]
    return rng.choice([*changes, start + repeated + rest])


def fuzz_line(rng: random.Random, folder: Path, processors) -> None:
    record = rng.choice(FULL)
    line = as_bytes(record)
    if rng.random() < 0.3:
        line = as_bytes(rng.choice(list(LINES.values()))[0])
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
    """A damaged file of a prepared data set; its numbers are trusted and not looked at."""
    copy = folder / f"set{rng.random()}"
    shutil.copytree(folder / "good", copy)
    try:
        path = rng.choice(sorted(copy.iterdir()))
        if path.suffix == ".safetensors" and rng.random() < 0.6:
            tensors = load_file(path)
            name = rng.choice(sorted(tensors))
            array = tensors[name]
            changes = [array[:-1], array.astype("f4"), array[None], array.repeat(2, axis=0)]
            tensors[name] = rng.choice(changes)
            save_file(tensors, path)
        else:
            path.write_bytes(change_bytes(path.read_bytes(), rng))
        comparisons = data.Comparisons(str(copy), processors.fingerprint)
        for i in range(len(comparisons)):
            data.open_images(comparisons[i], processors)
    finally:
        shutil.rmtree(copy)


def prepare_good(folder: Path, processors) -> None:
    """A small prepared data set, and the pictures that lines speak of."""
    for name, (content, *_) in PICTURES.items():
        (folder / name).write_bytes(content)
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in FULL[:4]))
    settings = data.Settings(source=[str(file)], out=str(folder), name="good", shard_size=2)
    data.prepare("good", data.open_source(str(file)), processors, settings, 0.0, [folder])


def too_slow(*_):
    raise TimeoutError("took more than 20 seconds")


def memory_used() -> int:
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmSize"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", type=int, help="only this execution, with its traceback")
    options = parser.parse_args()
    data.start_distributed()
    processors = data.load_processors(TINY)
    endings, findings, start = Counter(), {}, time.time()
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare_good(folder, processors)
        resource.setrlimit(resource.RLIMIT_AS, (memory_used() + 2 * 2**30,) * 2)
        number = options.once or 0
        while time.time() - start < options.seconds:
            rng = random.Random(f"{options.seed}/{number}")
            fuzz = rng.choice([fuzz_line, fuzz_line, fuzz_picture, fuzz_set])
            signal.alarm(20)
            try:
                fuzz(rng, folder, processors)
                end = "read"
            except (data.Unusable, data.UserError):
                end = "refused"
            except Exception as error:
                if options.once is not None:
                    raise
                end, last = "FOUND", traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}:{last.lineno}"
                finding = f"{type(error).__name__}: {str(error)[:100]} at {place}"
                if finding not in findings:
                    findings[finding] = number
                    execution = f"seed {options.seed}, execution {number}, {fuzz.__name__}"
                    print(f"{execution}: {finding}", flush=True)
            finally:
                signal.alarm(0)
            endings[f"{fuzz.__name__} {end}"] += 1
            number += 1
            if options.once is not None:
                break
    seconds = time.time() - start
    print(f"{endings.total()} executions in {seconds:.0f} s, {len(findings)} findings")
    for name, count in sorted(endings.items()):
        print(f"  {name:<22} {count}")


if __name__ == "__main__":
    main()
