"""Stage 1: turn preference data into shards of token ids and image bytes

Preference data has one JSON object a line. This is one (wrapped here):

    {"prompt": [{"role": "user", "content": "What is it?"}], "images": ["pictures/0.png"],
     "chosen": "A red circle.", "rejected": "A blue square."}

This stage turns it into a Comparison: token ids of the prompt and of each response, and the bytes
of the picture. The other stages read Comparisons and nothing else.

    torchrun --standalone --nproc_per_node=2 01_data.py                           # embedded world
    torchrun --standalone --nproc_per_node=2 01_data.py --source my_pairs.jsonl   # your own pairs
    torchrun --standalone --nproc_per_node=2 01_data.py --source rlaif-v:DIR@0.1  # a published set
    torchrun --standalone --nproc_per_node=2 01_data.py --mix basereward --mix_folder DIR

In    Lines like the one above; or a published set, by its name in SOURCES; or no --source: then
      the embedded world draws coloured shapes, asks about them and knows the answers.
Out   artifacts/data/<name>/: shards of comparisons; index.safetensors, their lengths; dataset.json,
      how they were made; rejected.jsonl, every unusable line with its file, number and reason.
      Lines read = lines kept or held out + lines rejected, always.

The idea: everything in the recipe compares responses to the *same* prompt. A training pair has
N = 2 responses, a ranking or a benchmark item any N, a group of GRPO rollouts N = G, a question to
a policy N = 0. One class holds them all, and one forward of the model (02) scores them all.

The paper (BaseReward, arXiv 2509.16127) trains on 2.8 M pairs of seven published sets, multimodal
and text-only. It keeps or drops whole sets and filters no samples. It does not state image size or
length; we take at most 501,760 pixels and 4,096 tokens, as in the authors' public command for a
text-only reward model.
"""

from __future__ import annotations

import base64
import csv
import gc
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import string
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, HfArgumentParser
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.hub import cached_file

FORMAT = 5  # of the shards; raise it when their layout changes


@dataclass
class Comparison:
    """One prompt and N responses to it, ready for the model. Token ids are int32."""

    prompt: np.ndarray  # [P], with as many image tokens as the vision tower gives features
    responses: list[np.ndarray]  # N arrays [R_i], each ends with the end-of-turn token
    ranks: list[int]  # [N]; 1 is best, equal ranks tie
    images: list[bytes] = field(default_factory=list)  # encoded files, as they came
    # [images, 3]: time (or tiles), height and width of each image in patches
    grids: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    record: dict = field(default_factory=dict)  # id, category, answer, ...: fields carried along
    origin: str = ""  # where it was read

    def __str__(self) -> str:
        """Name the comparison in messages."""
        return f"{self.origin} (id {self.record['id']})" if "id" in self.record else self.origin

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all pairs of responses that do not tie."""
        return ordered_pairs(self.ranks)

    @property
    def weight(self) -> int:
        """Weight in the loss: how many lines became this ranking (`join_pairs`, appendix), or 1."""
        return self.record.get("joined", 1)

    @property
    def length(self) -> int:
        """Tokens of the packed row [prompt | response 1 | ... | response N]."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def patches(self) -> int:
        """Patches of all images."""
        return int(self.grids.prod(1).sum())


def ordered_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) for all pairs of places in `ranks` that do not tie."""
    places = range(len(ranks))
    return [(i, j) for i in places for j in places if ranks[i] < ranks[j]]


# --------------------------------------------------------------------------------------------------
# 1. A record, the dict of one line, becomes a Comparison.
#
# How a picture enters a language model: the vision tower turns each patch of 14 x 14 pixels into a
# vector and merges 2 x 2 of them into one. The prompt has a placeholder, the image token, for each
# merged vector; in the model (02) that vector takes the place of the token's embedding. So a larger
# picture makes a longer prompt. For a picture 56 pixels high and 84 wide, so of 4 x 6 patches and
# 2 x 3 image tokens:
#
#     record      {"prompt": [{"role": "user", "content": "What is it?"}], "images": ["0.png"], ...}
#     messages    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}]
#     rendered    <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>
#                 \n<|im_start|>assistant\n         (one string; a system turn, if any, comes first)
#     token ids   the same with six times <|image_pad|>
#     Comparison  prompt [20], responses [[..., <|im_end|>], [...]], ranks [1, 2], grids [[1, 4, 6]]
#
# `processors` (appendix) come with the backbone's checkpoint:
#     tokenizer; image_token, end_token     ids of <|image_pad|> and <|im_end|>
#     image_processor                       None if the backbone is text-only
#     vision.patch, vision.merge            14 pixels, 2
#     family                                how this family of models differs from Qwen2.5-VL
# `require(condition, reason)` raises Unusable, and the line goes to rejected.jsonl. Functions that
# are not defined in this lesson do what their names say; they are in the appendix.


def encode_record(
    record, processors, max_length, folder=Path(), without_images=False, within=None
) -> Comparison:
    """Make one record a Comparison; raise Unusable with the reason if that is impossible.

    Image paths are relative to `folder`. They have to lie in one of the folders `within`, if given,
    so that a downloaded data file cannot make us read other files of this machine.
    """
    check(record, RECORD)  # the schema
    texts, ranks = responses_of(record)
    messages = check_messages(record["prompt"], without_images)
    images = [] if without_images else images_in(record)
    prompt, files, grids = encode_prompt(messages, images, processors, folder, within)
    responses = [encode_response(text, processors) for text in texts]
    check_length(prompt, responses, max_length)
    return Comparison(prompt, responses, ranks, files, grids, carried_fields(record, texts))


def encode_prompt(messages, images, processors, folder=Path(), within=None):
    """Tokenize a prompt and its images up to where the assistant's answer begins.

    Returns token ids [P], the images' encoded bytes, and their grids [images, 3]. Raises Unusable.
    """
    messages = check_messages(messages)  # also for callers that skip `encode_record`
    images = images_in_order(messages, images)  # and adds missing image parts to `messages`
    require(not images or processors.image_processor, "images: the backbone is text-only")
    files = [read_image(image, folder, within) for image in images]
    grids = [patch_grid(open_image(file).size, processors) for file in files]
    grids = np.array(grids, np.int32).reshape(-1, 3)
    ids = tokenize_chat(messages, processors.tokenizer)  # one image token for each image
    if files:
        ids = expand_image_tokens(ids, grids, processors)
    return ids, files, grids


def tokenize_chat(messages: list[dict], tokenizer) -> np.ndarray:
    """Render messages with the backbone's chat template and tokenize them, [P].

    A special token of the template, like <|im_start|>, becomes one id. The same characters in a
    user's text must stay text, or a user could end his own turn. So `mark_special` swaps them for
    marks before rendering, and `tokenize_marked` tokenizes them as ordinary characters.
    """
    marked, cut = mark_special(messages, tokenizer)
    # The rendering ends with <|im_start|>assistant, where a response begins.
    rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    return np.array(tokenize_marked(rendered, cut, tokenizer), np.int32)


def tokenize_text(text: str, tokenizer) -> list[int]:
    """Tokenize a text in which '<|im_end|>' is ten characters, not one token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(text: str, processors: Processors) -> np.ndarray:
    """Tokenize a response, [R]. It ends with the end-of-turn token, where its score is read."""
    return np.array([*tokenize_text(text, processors.tokenizer), processors.end_token], np.int32)


def patch_grid(size: tuple[int, int], processors: Processors) -> tuple[int, int, int]:
    """Patches (time, height, width) of an image of `size` (width, height) in pixels.

    Qwen-VL scales an image, nearly keeping its aspect ratio, so that both sides are multiples of
    patch * merge (28 pixels for Qwen2.5-VL) and its area lies between two limits.
    """
    if processors.family.tiles:  # InternVL cuts an image into tiles (appendix)
        return tile_grid(size, processors)
    width, height = size
    patch = processors.vision.patch
    unit = patch * processors.vision.merge
    # transformers calls the two limits edges, but they are areas, in pixels. Where the aspect ratio
    # is absurd, it raises ValueError, which becomes Unusable with our text.
    limits = processors.image_processor.size
    with explaining(f"unusable image of {width} x {height} pixels", ValueError, Unusable):
        height, width = smart_resize(
            height, width, unit, limits["shortest_edge"], limits["longest_edge"]
        )
    return 1, height // patch, width // patch


def expand_image_tokens(ids: np.ndarray, grids: np.ndarray, processors: Processors) -> np.ndarray:
    """Repeat each image's token, one for each 2 x 2 of its patches; images come in order."""
    if processors.family.around:  # InternVL sets a marker before and after an image
        ids = surround_image_tokens(ids, processors)
    repeats = np.ones(len(ids), int)
    repeats[ids == processors.image_token] = grids.prod(1) // processors.vision.merge**2
    return np.repeat(ids, repeats)


# --------------------------------------------------------------------------------------------------
# 2. Comparisons are kept in shards: safetensors files of flat arrays, with the offsets at which
# each comparison begins. Later stages map them into memory and read one without the others. If you
# are here for the method, this is all that you need of the rest of this lesson:
#     comparisons = Comparisons("artifacts/data/train")  # a torch Dataset, in the appendix
#     comparisons[7]                                     # a Comparison
#     comparisons.sizes()                                # tokens and patches of all, [n] each
# Every rank makes the shards of its own chunks of lines. A line is (file, number, read), and only
# the rank that owns it calls `read()` for the record; for JSONL this is what parses the line.


def prepare(name: str, lines, processors, settings, holdout: float, within=None) -> None:
    """Prepare one data set; all ranks call it with the same lines.

    A chunk of `shard_size` lines becomes a file in each folder. Its name hashes line numbers,
    settings, size and time of the data's files, so an interrupted run finds its shards and goes on.
    The hash misses a changed picture, so a finished set (it has a dataset.json) is made anew. The
    result does not depend on the number of ranks. Memory holds the index: 24 bytes a comparison, 8
    an image.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    folders = [Path(settings.out, name), Path(settings.out, f"{name}_holdout")]
    remove_finished(folders)  # also what was held out before
    if holdout <= 0:
        folders.pop()
    shards = []  # file names
    progress = tqdm(desc=name, unit=" lines", disable=rank > 0, mininterval=1)
    while chunk := list(itertools.islice(lines, settings.shard_size)):
        progress.update(len(chunk))
        number = len(shards)
        key = chunk_key(chunk, processors, settings, holdout)  # the hash
        shards.append(f"shard-{number:05d}-{key}.safetensors")
        paths = [folder / shards[number] for folder in folders]
        if number % world != rank or all(path.is_file() for path in paths):
            continue
        kept, held_out, notes = encode_chunk(chunk, processors, settings, holdout, within)
        # For 04's overlap check, `write_shard` also hashes prompts, without their image tokens.
        write_shard(paths[0], kept, processors.image_token, **notes)
        if holdout > 0:
            write_shard(paths[1], held_out, processors.image_token)
    progress.close()
    dist.barrier()
    if rank == 0:
        finish(folders, shards, processors, settings)  # index, dataset.json, rejected.jsonl


def encode_chunk(chunk: list[Line], processors, settings, holdout: float, within):
    """Return the comparisons to keep and to hold out, and notes on lines and fields not used."""
    kept, held_out, rejected, unused = [], [], [], Counter()
    length, without_images = settings.max_length, settings.without_images
    for file, number, read in chunk:
        folder = Path(file).parent
        try:
            record = read()
            comparison = encode_record(record, processors, length, folder, without_images, within)
        except Unusable as error:
            rejected.append({"file": file, "line": number, "reason": str(error)[:500]})
            continue
        # A hash of the prompt decides the side, so the same prompt is never on both.
        share = share_of(comparison.prompt.tobytes() + b"".join(comparison.images))
        side = held_out if share < holdout else kept
        side.append(comparison)
        unused.update(sorted(record.keys() - USED))
    notes = {"rejected": rejected, "unused": unused}
    if settings.join:
        kept, notes["joined"] = join_pairs(kept)  # in the appendix
    return kept, held_out, notes


def main(settings: Settings) -> None:
    processors = load_processors(settings.backbone, settings.max_pixels)
    if settings.source or settings.mix:
        name, lines, holdout, within = open_sources(settings)  # in the appendix, like `world_sets`
        prepare(name, lines, processors, settings, holdout, within)
    else:
        name = "train"  # the embedded world's training set
        settings.join = False  # it has rankings where it wants them
        for part, lines, holdout in world_sets(settings):
            prepare(part, lines, processors, settings, holdout)
    if dist.get_rank() == 0:
        folder = Path(settings.out, name)
        if not len(Comparisons(folder)):
            print(f"{folder} is empty: nothing to go on with; rejected.jsonl has the reasons")
        elif not settings.judge_request:
            option = f" --data {folder}" if settings.source else ""
            print(f"Next: torchrun --standalone --nproc_per_node=2 02_model.py{option}")


# --------------------------------------------------------------------------------------------------
# Appendix: file formats and the JSON form. First what all stages share: errors in one line, files
# that are whole or absent, the process group, the command line.


def option(default, help: str, **metadata):
    """Declare a setting: its default and its text in --help. A list may be given repeatedly."""
    metadata["help"] = help
    if isinstance(default, list):
        metadata["action"] = "extend"
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    source: list[str] = option(
        [],
        "what to prepare, repeatable; none: the embedded world. A JSONL file of your own; or "
        "name:PATH, a published set (names: SOURCES in 01_data.py), PATH its file, folder, pattern "
        "of files, or name on the hub, and if empty the published one; or world:PART@COUNT. @LIMIT "
        "behind it takes so many rows, or that share of them (below 1)",
    )
    mix: str = option("", "a mixture of published sets; known: basereward, the paper's")
    mix_folder: str = option("", "folder of the mixture's sets, each in a folder owner/name")
    out: str = option("artifacts/data", "folder that gets a folder for each data set")
    name: str = option("", "name of the data set; empty: that of the mixture or the first source")
    backbone: str = option(
        "tests/tiny/qwen2_5_vl", "checkpoint with the tokenizer and image processor"
    )
    max_length: int = option(4096, "most tokens of a prompt and a response; longer is rejected")
    max_pixels: int = option(501760, "larger images are scaled down; 0: the backbone's own limit")
    holdout: float = option(0.05, "share of the prompts that go to <name>_holdout, for validation")
    without_images: bool = option(False, "leave out all images, keep the text")
    judge_request: str = option(
        "", "make of each pair two questions to a judge, for 06: 'Which is better, A or B?'"
    )
    join: bool = option(
        True,
        "unless --holdout is 0: make consecutive pairs of one prompt one comparison, if together "
        "they are a ranking; 03 then counts it as one of a batch, with the weight of its pairs",
    )
    allow_outside: bool = option(False, "also read images outside the folders of --source")
    shard_size: int = option(512, "lines of input that make one shard")
    world_size: float = option(1.0, "size of the embedded world, as a multiple of the default")
    seed: int = option(0, "seed of the embedded world")


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class Unusable(ValueError):
    """The reason why a line of data, or a comparison, cannot be used."""


def require(condition: object, reason: str) -> None:
    if not condition:
        raise Unusable(reason)


@contextmanager
def explaining(subject: str, errors, kind: type = UserError, hint: str = ""):
    """Turn errors into one line, a `kind`: "subject: reason; hint"."""
    try:
        yield
    except (kind, UserError):
        raise
    except errors as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        missing = "missing: " if isinstance(error, KeyError) else ""
        line = f"{subject}: {missing}{reason.splitlines()[0]}"
        raise kind(f"{line}; {hint}" if hint else line) from None


def reading(path: str | Path, hint: str = "run 01_data.py again"):
    """Turn whatever breaks while a file of ours is read into one line."""
    return explaining(f"{path}: damaged", Exception, hint=hint)


def writing(path: str | Path):
    """Turn a full disk, or somebody else's folder, into one line."""
    hint = "free space, or take another --out, then again"
    return explaining(f"{path}: could not be written", (OSError, SafetensorError), hint=hint)


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to, then rename: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    with in_place_of(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def append_line(path: Path, line: dict) -> None:
    """Append a dict to a JSONL file."""
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def hash_of(content: bytes) -> int:
    """64 bits of the SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def share_of(content: bytes) -> float:
    """A number in [0, 1) that follows from the bytes: those below 0.1 are a tenth of all."""
    return (hash_of(content) >> 32) / 2**32


def start_distributed() -> tuple[int, int, torch.device]:
    """Join torchrun's processes, or be the only one; return rank, number of ranks and device."""
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:  # of torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cpu")
    if cuda:
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            sys.exit(f"one rank per GPU, and here are {gpus}: --nproc_per_node={gpus}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        # transformers would wait for the GPU in every forward to compare counts of image tokens.
        os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    return dist.get_rank(), dist.get_world_size(), device


def run_stage(main: Callable, settings_class: type, doc: str) -> None:
    """Run main(settings) with settings from the command line; a user's error ends in one line."""
    parser = HfArgumentParser(settings_class, description=doc.split("\n\n")[0])
    parser.error = refuse  # argparse prints the whole usage
    start_distributed()
    store = dist.distributed_c10d._get_default_store()  # it outlives ranks that fail
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            refuse(f"unknown: {' '.join(unknown)}")
        main(settings)
        dist.barrier()
    except (UserError, Unusable) as error:
        store.set("failed", "")
        if store.add(str(error), 1) == 1:  # several ranks may run into the same error
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError:  # may come from the end of another rank, which has printed its reason
        if not store.check(["failed"]):
            raise
        sys.exit(1)
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model that outlives its process group can abort the exit
            dist.destroy_process_group()


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists all options")


# --------------------------------------------------------------------------------------------------
# Appendix: shards. Ragged arrays: vectors of different lengths lie one after the other in a flat
# array, and vector i is flat[offsets[i] : offsets[i + 1]].

RAGGED = {
    "rows": np.int32,  # of each comparison, the tokens of its prompt and responses
    "layouts": np.uint8,  # of each comparison, JSON: lengths in its row, ranks, its images, ...
    "images": np.uint8,  # the encoded files, each once, however many comparisons share it
}
INDEX = {  # numbers of each comparison or image, for planning and for overlap checks
    "tokens": np.int32,
    "patches": np.int32,
    "response_counts": np.int32,
    "weights": np.int32,
    "prompt_hashes": np.uint64,
    "image_hashes": np.uint64,
}


def flatten(arrays: list, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate vectors; return them flat, and their offsets [vectors + 1]."""
    flat = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
    return flat, np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def write_shard(path: Path, comparisons: list[Comparison], image_token=None, **notes) -> None:
    """Write comparisons, and notes as JSON, to one safetensors file."""
    images = list(dict.fromkeys(image for c in comparisons for image in c.images))  # each once
    places = dict(zip(images, range(len(images))))
    rows, layouts, index = [], [], defaultdict(list)
    for c in comparisons:
        rows.append(np.concatenate([c.prompt, *c.responses]))
        layout = {
            "lengths": [len(c.prompt), *map(len, c.responses)],
            "ranks": c.ranks,
            "images": [places[image] for image in c.images],
            "grids": c.grids.tolist(),
            "record": c.record,
        }
        layouts.append(np.frombuffer(json.dumps(layout).encode(), np.uint8))
        index["tokens"].append(c.length)
        index["patches"].append(c.patches)
        index["response_counts"].append(len(c.responses))
        index["weights"].append(c.weight)
        index["prompt_hashes"].append(hash_of(c.prompt[c.prompt != image_token].tobytes()))
    index["image_hashes"] = list(map(hash_of, images))
    images = [np.frombuffer(image, np.uint8) for image in images]
    tensors = {name: np.array(index[name], dtype) for name, dtype in INDEX.items()}
    for (name, dtype), vectors in zip(RAGGED.items(), (rows, layouts, images)):
        tensors[name], tensors[f"{name}_offsets"] = flatten(vectors, dtype)
    notes["comparisons"] = len(comparisons)
    write_file(path, save(tensors, {"notes": json.dumps(notes)}))


class Shard:
    """One memory-mapped shard: `shard[i]` reads comparison i and nothing else."""

    def __init__(self, path: Path):
        self.path = path
        with reading(path):
            self.file = safe_open(path, framework="np")
            self.offsets = {name: self.file.get_tensor(f"{name}_offsets") for name in RAGGED}

    def vector(self, name: str, i: int) -> np.ndarray:
        start, end = map(int, self.offsets[name][i : i + 2])
        return self.file.get_slice(name)[start:end]

    def __getitem__(self, i: int) -> Comparison:
        with reading(self.path):
            layout = json.loads(self.vector("layouts", i).tobytes())
            splits = np.cumsum(layout["lengths"])[:-1]
            prompt, *responses = np.split(self.vector("rows", i), splits)
            images = [self.vector("images", place).tobytes() for place in layout["images"]]
            grids = np.array(layout["grids"], np.int32).reshape(-1, 3)
            return Comparison(prompt, responses, layout["ranks"], images, grids, layout["record"])


open_shard = lru_cache(512)(Shard)  # a process may have only so many files open


class Comparisons(torch.utils.data.Dataset):
    """A prepared data set: `comparisons[i]` reads one Comparison, at random, from its shards.

    `expect` is the fingerprint of the tokenizer that is going to read it; token ids of another
    tokenizer would be noise, and raise UserError. `text_only` leaves out comparisons with images.
    """

    def __init__(self, folder: str, expect: str | None = None, text_only: bool = False):
        self.folder = Path(folder)
        path = self.folder / "dataset.json"
        if not path.is_file():
            raise UserError(f"{folder}: no prepared data set there; run 01_data.py first")
        with reading(path):
            self.info = json.loads(path.read_bytes())
            if self.info["format"] != FORMAT:
                formats = f"shards of format {self.info['format']}, this code reads {FORMAT}"
                raise UserError(f"{folder}: {formats}; run 01_data.py again")
            if expect and self.info["tokenizer"] != expect:
                reason = f"prepared with another tokenizer, that of {self.info['backbone']}"
                hint = "run 01_data.py again with --backbone set to this model"
                raise UserError(f"{folder}: {reason}; {hint}")
            sizes = [size for _, size in self.info["shards"]]
            self.starts = np.cumsum([0, *sizes])  # [shards + 1]
        path = self.folder / "index.safetensors"
        with reading(path):
            self.index = load_file(path)  # see INDEX
            entries, expected = len(self.index["tokens"]), self.starts[-1]
            require(entries == expected, f"{entries} entries for {expected} comparisons")
        self.numbers = np.arange(self.starts[-1])  # [len(self)], numbers in the order of shards
        if text_only:
            self.numbers = np.flatnonzero(self.index["patches"] == 0)

    def response_counts(self) -> np.ndarray:
        """N of every comparison, [len(self)]."""
        return self.index["response_counts"][self.numbers]

    def weights(self) -> np.ndarray:
        """Read `Comparison.weight` of each, [len(self)]."""
        return self.index["weights"][self.numbers]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the packed row and image patches of every comparison, [len(self)] each."""
        return self.index["tokens"][self.numbers], self.index["patches"][self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Comparison:
        number = int(self.numbers[i])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        file = self.folder / self.info["shards"][shard][0]
        comparison = open_shard(file)[number - self.starts[shard]]
        comparison.origin = f"{self.folder}[{number}]"
        return comparison


# The beginning and the end of `prepare`.


def remove_finished(folders: list[Path]) -> None:
    """Delete a finished set, since its pictures may have been mended after it was made.

    What it held out has shards of the same names; another data set of that name stays.
    """
    if dist.get_rank() == 0 and (folders[0] / "dataset.json").is_file():
        shards = {file.name for file in folders[0].glob("shard-*")}
        for folder in folders:
            if shards == {file.name for file in folder.glob("shard-*")}:
                for name in ["dataset.json", *shards]:
                    (folder / name).unlink(missing_ok=True)
    dist.barrier()


def chunk_key(chunk: list[Line], processors, settings, holdout: float) -> str:
    """Hash all that the shards of a chunk are made of. Files count by size and time."""
    lines = [(file, number) for file, number, _ in chunk]
    files = {file for file, _ in lines} | {__file__, str(WORLD), str(WORLD_SAMPLES)}
    stats = [os.stat(file) for file in sorted(files) if os.path.exists(file)]
    times = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    options = vars(settings) | {"out": "", "holdout": holdout}
    made_of = [FORMAT, lines, times, options, processors.fingerprint, processors.pixels]
    return f"{hash_of(json.dumps(made_of).encode()):016x}"


def finish(folders: list[Path], shards: list[str], processors, settings) -> None:
    """Write rejected.jsonl, index.safetensors and dataset.json; print a summary."""
    sizes = {folder: [] for folder in folders}  # (shard, number of comparisons)
    columns = defaultdict(partial(defaultdict, list))  # {folder: {column of the index: arrays}}
    counts, rejected, unused, joined = Counter(), 0, Counter(), Counter()
    with in_place_of(folders[0] / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for folder, shard in itertools.product(folders, shards):
            with reading(folder / shard), safe_open(folder / shard, framework="np") as opened:
                notes = json.loads(opened.metadata()["notes"])
                for column in INDEX:
                    columns[folder][column].append(opened.get_tensor(column))
            sizes[folder].append((shard, notes["comparisons"]))
            counts[folder] += notes["comparisons"]
            unused.update(notes.get("unused", {}))
            joined.update(notes.get("joined", {}))
            for line in notes.get("rejected", []):
                file.write(json.dumps(line) + "\n")
                rejected += 1
    kept = counts.total() + joined["pairs"] - joined["comparisons"]  # lines
    info = vars(settings) | {
        "format": FORMAT,
        "read": kept + rejected,
        "rejected": rejected,
        "unused_fields": unused,
        "metric": official_metric(settings.source),
        "tokenizer": processors.fingerprint,
        "pixels": processors.pixels,
    }
    del info["out"]
    with_images = 0
    for folder in reversed(folders):  # the data set's own dataset.json comes last: all is there
        strays = {*folder.glob("shard-*"), *folder.glob(".*")}  # of runs with other settings
        for stray in strays - {folder / shard for shard in shards}:
            stray.unlink()
        index = {}
        for column, dtype in INDEX.items():
            index[column], _ = flatten(columns[folder][column], dtype)
        write_file(folder / "index.safetensors", save(index))  # to open a set opens no shard
        info |= {"name": folder.name, "shards": sizes[folder]}
        write_file(folder / "dataset.json", json.dumps(info, indent=1))
        with_images += np.count_nonzero(index["patches"])

    summary = f"read {kept + rejected} = kept {kept} + rejected {rejected}"
    held_out = f"{counts.total() - counts[folders[0]]} held out"
    images = "WITHOUT IMAGES" if settings.without_images else f"{with_images} with pictures"
    print(f"{folders[0]}: {summary}; {held_out}, {images}", flush=True)
    if joined:
        share = joined["tokens"] / joined["tokens before"]
        made = f"{joined['pairs']} pairs became {joined['comparisons']} comparisons"
        print(f"  joined: {made} with {share:.0%} of their tokens")
    for name, count in sorted(unused.items()):
        print(f"  not used: {name} ({count} lines)")


# Pairs of one prompt. In sets whose prompts have several ranked responses, a line is often one pair
# of them, and all pairs of a prompt follow one another.


JOINED_TOKENS = 8192  # at most, so that a joined comparison fits 03's default --micro_tokens


def join_pairs(comparisons: list[Comparison]) -> tuple[list[Comparison], dict[str, int]]:
    """Join consecutive pairs of one prompt where they are all the pairs of a ranking.

    Returns the comparisons, and how many pairs became how many comparisons, with tokens of both.
    """
    joined = []
    counts = Counter()
    for _, same_prompt in itertools.groupby(comparisons, prompt_and_labels):
        pairs = list(same_prompt)
        together = as_ranking(pairs)
        joined += together
        if len(together) < len(pairs):
            counts["pairs"] += len(pairs)
            counts["comparisons"] += 1
            counts["tokens before"] += sum(pair.length for pair in pairs)
            counts["tokens"] += together[0].length
    return joined, counts


def prompt_and_labels(comparison: Comparison) -> tuple:
    labels = [comparison.record.get(name) for name in ("source", "category", "group", "answer")]
    return comparison.prompt.tobytes(), comparison.images, labels


def as_ranking(pairs: list[Comparison]) -> list[Comparison]:
    """Return one comparison if the pairs are all those of a ranking with ties, else the pairs.

    Its weight is their number, so in the loss each pair counts as before.
    """
    if len(pairs) < 2 or any(pair.ranks != [1, 2] for pair in pairs):
        return pairs
    first = pairs[0]
    responses, characters, critiques = {}, {}, {}
    beats = []  # (better, worse)
    for pair in pairs:
        keys = tuple(map(bytes, pair.responses))
        responses |= zip(keys, pair.responses)
        characters |= zip(keys, pair.record["characters"])
        for key, critique in zip(keys, pair.record.get("critiques", [])):
            if critiques.setdefault(key, critique) != critique:  # each says something of its pair
                return pairs
        beats.append(keys)
    names = list(responses)
    lost = Counter(worse for _, worse in beats)
    ranks = [1 + lost[name] for name in names]  # after all that are better
    implied = [(names[i], names[j]) for i, j in ordered_pairs(ranks)]
    if sorted(implied) != sorted(beats):
        return pairs
    record = first.record | {"joined": len(pairs), "characters": list(characters.values())}
    record.pop("critiques", None)
    if len(critiques) == len(responses):
        record["critiques"] = [critiques[name] for name in names]
    ranking = replace(first, responses=list(responses.values()), ranks=ranks, record=record)
    return [ranking] if ranking.length <= JOINED_TOKENS else pairs


# The JSON form of a record. A type stands for a value of it, {a, b} for one of these texts, [form]
# for a list, (form, form) for either, {key: form} for an object; a "key?" may be missing or null.

TEXT = {"type?": {"text"}, "text": str}
PART = {"type": {"text", "image"}, "text?": str, "image?": object}
ANSWER = {"role": {"assistant"}, "content": (str, [TEXT])}
RESPONSE = (str, ANSWER, [ANSWER])
PROMPT = (str, [{"role": {"system", "user", "assistant"}, "content": (str, [PART])}])
LABEL = (str, int, float)
CARRIED = {  # what a comparison keeps in its `record`
    "id?": LABEL,
    "category?": str,
    "subset?": str,
    "source?": str,
    "group?": LABEL,  # of comparisons that belong together, as two questions about one picture
    "critiques?": [str],  # one of each response, for critics (02)
    "answer?": LABEL,  # to a question for a policy (06); null: an open question
    "rule?": object,  # how 06 checks an answer, see check_rule
    "truth?": object,  # what the embedded world knows
    "judged?": dict,  # what a judge model gets to see
}
RECORD = {
    "prompt": PROMPT,
    "images?": [object],  # see read_image
    "chosen?": RESPONSE,  # either these two,
    "rejected?": RESPONSE,
    "responses?": [RESPONSE],  # or these two, 1 is best; or neither, in a question for a policy
    "ranks?": [int],
    **CARRIED,
}
USED = {key.removesuffix("?") for key in RECORD}  # other fields are counted and printed
NAMES = {str: "a text", int: "an integer", float: "a number", list: "a list", dict: "an object"}


def check(value: object, form: object, place: str = "") -> None:
    """Raise Unusable with the place and the reason unless the value has the form."""
    forms = {}  # type -> the form that a value of this type must have
    for option in form if isinstance(form, tuple) else (form,):
        kind = str if isinstance(option, set) else type(option)
        forms[option if kind is type else kind] = option
    if object in forms:
        return
    if type(value) not in forms:
        name = NAMES.get(type(value), type(value).__name__)
        wanted = " or ".join(NAMES[kind] for kind in forms)
        raise Unusable(f"{place}: {name} where {wanted} should be")
    form = forms[type(value)]
    if isinstance(form, set) and value not in form:
        raise Unusable(f"{place}: {value!r}, not one of {sorted(form)}")
    if isinstance(value, str):  # JSON can have half of a surrogate pair, UTF-8 cannot
        half = not value.isascii() and re.search("[\ud800-\udfff]", value)
        require(not half, f"{place}: half of a surrogate pair")
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check(item, form[0], f"{place}[{i}]")
    elif isinstance(form, dict):
        for key, part in form.items():
            name = key.removesuffix("?")
            if value.get(name) is not None:
                check(value[name], part, f"{place}.{name}" if place else name)
            elif name == key:
                raise Unusable(f"missing field: {place}{place and '.'}{name}")


def check_messages(prompt: str | list, without_images: bool = False) -> list[dict]:
    """Check a prompt; return its turns, whose `content` is a list of parts only with images."""
    check(prompt, PROMPT, "prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = []
    for turn in turns:
        content = turn["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part["type"]
                has_text = kind != "text" or part.get("text") is not None
                require(has_text, "prompt: a part of type text without text")
                if kind == "text" or not without_images:  # other keys could mislead the template
                    parts.append({"type": kind, kind: part.get(kind)})
            only_text = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if only_text else parts
        elif without_images:
            content = content.replace("<image>", "")  # the mark of a place
        messages.append({"role": turn["role"], "content": content})
    last = messages[-1]["role"] if messages else "of nobody"
    require(last == "user", f"prompt: ends with the role {last!r}, not 'user'")
    return messages


def image_parts(messages: list[dict]) -> list[dict]:
    lists = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return [part for part in itertools.chain(*lists) if part["type"] == "image"]


def images_in_order(messages: list[dict], images: list) -> list:
    """Give each image a place in the messages; return the images in the order of their places.

    A part of type image is a place, and may hold its image itself. Without such parts, <image> in
    the text marks the places, as in LLaVA's data. Without marks images come first, as in TRL.
    """
    users = [turn for turn in messages if turn["role"] == "user"]
    places = image_parts(messages)
    images = [part["image"] for part in places if part["image"] is not None] or images
    if images and not places:
        if not any("<image>" in turn["content"] for turn in users):
            users[0]["content"] = "<image>" * len(images) + users[0]["content"]
        for turn in users:
            turn["content"] = with_images(turn["content"])
        places = image_parts(messages)
    counts = f"{len(images)} given, but the prompt has {len(places)} places for them"
    require(len(images) == len(places), f"images: {counts}")
    require(images or any(turn["content"].strip() for turn in users), "prompt: empty")
    return images


def with_images(text: str) -> list[dict]:
    """Split a text into parts; <image> marks the place of a picture."""
    parts = []
    for piece in re.split("(<image>)", text):
        if piece == "<image>":
            parts.append({"type": "image", "image": None})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def images_in(record: dict) -> list:
    hint = "pictures are in `images`, a list; --source trl:FILE reads this, too"
    require(record.get("image") is None, f"image: {hint}")
    images = record.get("images") or []
    require(isinstance(images, list), "images: not a list")
    return images


def text_of(response: str | dict | list, name: str) -> str:
    """Check a response, a string or one assistant message or a list of it; return its text."""
    check(response, RESPONSE, name)
    if isinstance(response, list):
        require(len(response) == 1, f"{name}: {len(response)} messages, not one")
        response = response[0]
    if isinstance(response, dict):
        response = response["content"]
    if isinstance(response, list):
        response = "".join(part["text"] for part in response)
    require(response.strip(), f"{name}: empty response")
    return response


def responses_of(record: dict) -> tuple[list[str], list[int]]:
    """Texts and ranks of a record's responses, [N] each; a question for a policy has none."""
    if record.get("responses") is not None:
        texts = [text_of(text, f"responses[{i}]") for i, text in enumerate(record["responses"])]
        ranks = record.get("ranks") or []
        require(len(ranks) == len(texts), "responses and ranks: not two lists of the same length")
        require(len(texts) > 1, "responses: at least two are needed")
        require(all(0 < rank < 2**31 for rank in ranks), "ranks: a rank is 1 (best) or more")
        require(len(set(ranks)) > 1, "ranks: all equal, so there is nothing to learn or to score")
        require(len(set(texts)) > 1, "responses: all identical")
        return texts, ranks
    if record.keys() & {"chosen", "rejected"}:
        for name in ("chosen", "rejected"):
            require(record.get(name) is not None, f"missing field: {name}")
        texts = [text_of(record[name], name) for name in ("chosen", "rejected")]
        require(texts[0] != texts[1], "chosen and rejected are identical")
        return texts, [1, 2]
    fields = "chosen and rejected, or responses and ranks, or answer (null: an open question)"
    require(record.keys() & {"answer", "truth", "judged"}, f"missing field: {fields}")
    return [], []


def carried_fields(record: dict, texts: list[str]) -> dict:
    """Return the fields that stay with a comparison; check those that depend on others."""
    names = [key.removesuffix("?") for key in CARRIED]
    carried = {name: record[name] for name in names if record.get(name) is not None}
    critiques = len(carried.get("critiques", texts))
    require(critiques == len(texts), f"critiques: {critiques} for {len(texts)} responses")
    if "rule" in carried:
        check_rule(carried["rule"], carried.get("answer"))
    return carried | {"characters": [len(text) for text in texts]}  # for 04's 'longer wins'


def mark_special(messages: list[dict], tokenizer) -> tuple[list[dict], list[str]]:
    """Replace special tokens in a user's texts by marks; return messages and what was cut out.

    The marks are two characters of Unicode's private use area around a number; a user's own such
    characters are cut out, too.
    """
    special = [*tokenizer.get_added_vocab(), "\ue000", "\ue001"]
    special = re.compile("|".join(map(re.escape, special)))
    cut = []

    def mark(match: re.Match) -> str:
        cut.append(match[0])
        return f"\ue000{len(cut) - 1}\ue001"

    marked = []
    for turn in messages:
        content = turn["content"]
        if isinstance(content, str):
            content = special.sub(mark, content)
        else:
            content = [dict(part) for part in content]
            for part in content:
                if "text" in part:
                    part["text"] = special.sub(mark, part["text"])
        marked.append({"role": turn["role"], "content": content})
    return marked, cut


def tokenize_marked(rendered: str, cut: list[str], tokenizer) -> list[int]:
    """Tokenize a rendered prompt, and as ordinary text what `mark_special` has cut out of it."""
    ids = []
    for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):  # text, number, text, ...
        if i % 2:
            ids += tokenize_text(cut[int(piece)], tokenizer)
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def check_length(prompt: np.ndarray, responses: list[np.ndarray], max_length: int) -> None:
    longest = len(prompt) + max(map(len, responses), default=0)
    require(longest <= max_length, f"{longest} tokens, more than --max_length {max_length}")


# Pictures.

PICTURES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")  # for EPS, pillow runs Ghostscript


def read_image(image: object, folder: Path, within: list[Path] | None = None) -> bytes:
    """Return an image's encoded bytes.

    It is bytes, a path relative to `folder`, either as {"bytes": ..., "path": ...} as in parquet
    files of the hub, or a PIL image. A path in data could name any file of this machine: it has to
    lead, links followed, into one of the folders `within`, if these are given.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return file.getvalue()
    require(isinstance(image, str), f"images: a {type(image).__name__} where a path should be")
    reason = f"unreadable image: {image[:200]}"
    with explaining(reason, Exception, Unusable):
        path = (folder / image).resolve()
        outside = within is not None and not any(path.is_relative_to(root) for root in within)
        require(not outside, f"image outside the data's folder: {image}; --allow_outside reads it")
        size = path.stat().st_size
        require(path.is_file(), f"{reason}: not a file")  # a pipe would block
        require(size <= 2**28, f"{reason}: a file of more than 256 MB")
        return path.read_bytes()


def open_image(content: bytes) -> Image.Image:
    """Decode a picture to RGB as a viewer shows it: turned as EXIF says, first frame, on white.

    Raises Unusable if it cannot be decoded to its end, or has more than 89 million pixels (pillow's
    limit), before memory is taken for them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, odd palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=PICTURES)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            require(image.mode not in ("I", "F"), f"pixels of mode {image.mode}: range not known")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        reason = f"none of {', '.join(PICTURES)}; the file begins with {content[:16]!r}"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # damaged files trip pillow's decoders in many ways
        reason = str(error) or type(error).__name__
    raise Unusable(f"unreadable image: {reason}")


# Backbones.


@dataclass
class Processors:
    """A backbone's tokenizer and image processor, and what the stages need to know of it."""

    tokenizer: object
    image_processor: object | None  # None: the backbone is text-only
    family: Family
    image_token: int | None  # id of <|image_pad|>
    end_token: int  # id of <|im_end|>, the token that ends the assistant's turn
    vision: VisionShape | None  # its sides of patches and windows
    fingerprint: str  # hash of vocabulary, merges and chat template

    def save(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.image_processor:
            self.image_processor.save_pretrained(folder)

    @property
    def pixels(self) -> dict | None:
        """The image processor's limits, on which the number of an image's tokens depends."""
        if self.image_processor is None:
            return None
        if self.family.tiles:
            return {"tiles": self.image_processor.max_patches}
        return dict(self.image_processor.size)

    @pixels.setter
    def pixels(self, limits: dict) -> None:
        if self.family.tiles:
            self.image_processor.max_patches = limits["tiles"]
        else:
            self.image_processor.size = dict(limits)


def load_processors(path: str, max_pixels: int = 0) -> Processors:
    """Read the tokenizer and the image processor of a Hugging Face checkpoint.

    Larger images are scaled down to `max_pixels`; 0 keeps the checkpoint's own limit.
    """
    with explaining(f"{path}: no tokenizer and config in the Hugging Face layout", Exception):
        config = AutoConfig.from_pretrained(path)
        family = family_of(config, path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        image = None
        if family.vision:  # "pil" needs pillow alone, no torchvision
            image = AutoImageProcessor.from_pretrained(path, backend="pil")
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template_file(path)
    vision = None
    if family.tiles:
        vision = set_up_tiles(image, config, max_pixels)
    elif family.vision:
        if max_pixels:
            least = min(image.size["shortest_edge"], max_pixels)
            image.size = {"shortest_edge": least, "longest_edge": max_pixels}
        window = getattr(config.vision_config, "window_size", 0)
        table = math.isqrt(getattr(config.vision_config, "num_position_embeddings", 0))
        vision = VisionShape(image.patch_size, image.merge_size, window, table)
    image_token = config.image_token_id if vision else None
    end_token = end_of_turn(tokenizer)
    vocabulary = tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template
    fingerprint = f"{hash_of(vocabulary.encode()):016x}"
    return Processors(tokenizer, image, family, image_token, end_token, vision, fingerprint)


def ready_for_images(processors: Processors, sets: list[Comparisons]) -> None:
    """Set the image processor's pixel limits to those that the data was prepared with.

    Raises UserError if the data has images and the processors are those of a text-only model.
    """
    for data_set in sets:
        if processors.image_processor is None and data_set.sizes()[1].any():
            raise UserError(f"{data_set.folder}: has images, but the model is text-only")
    limits = [data_set.info["pixels"] for data_set in sets if data_set.info["pixels"]]
    if any(other != limits[0] for other in limits):
        raise UserError("the data sets have different --max_pixels; prepare them with the same")
    if limits and processors.image_processor:
        processors.pixels = limits[0]


def open_images(comparison: Comparison, processors: Processors) -> list[Image.Image]:
    """Decode the images of a comparison for the model."""
    with explaining(str(comparison), Unusable):
        return [open_image(image) for image in comparison.images]


@dataclass(frozen=True)
class Family:
    """How the backbones of one `model_type` differ from others; 02 asks for this, too."""

    language: str = ""  # path of the decoder in the transformers model; "": it is the model
    vision: str = ""  # path of the vision tower; "": there is none
    blocks: str = ""  # path of the tower's layers, from the tower
    half: str = ""  # model_type of the decoder alone; "": its text_config says
    mrope: bool = False  # the positions of an image's tokens are rows and columns
    tiles: bool = False  # an image is cut into square tiles instead of scaled to whole patches
    around: tuple = ()  # tokens before and after an image that the chat template leaves out


MARKS = ("<img>", "</img>")
FAMILIES = {
    "qwen2_5_vl": Family("language_model", "visual", "blocks", "qwen2", mrope=True),
    "qwen2_vl": Family("language_model", "visual", "blocks", "qwen2", mrope=True),
    "qwen3_vl": Family("language_model", "visual", "blocks", "qwen3", mrope=True),
    "internvl": Family("language_model", "vision_tower", "encoder.layer", tiles=True, around=MARKS),
    "qwen2": Family(),
    "qwen3": Family(),
    "llama": Family(),
}


@dataclass(frozen=True)
class VisionShape:
    """How a vision tower lays out its patches."""

    patch: int  # side of a patch in pixels
    merge: int  # merge x merge patches become one token
    window: int = 0  # side of an attention window in pixels; 0: attention over whole images
    table: int = 0  # rows of the learned position table, stretched over each image; 0: none


def family_of(config, path: str) -> Family:
    """Return the family of a backbone; raise UserError if it is not supported."""
    family, text = FAMILIES.get(config.model_type), config.get_text_config()
    if family is None:
        raise UserError(f"{path}: a {config.model_type}; supported are {', '.join(FAMILIES)}")
    if not family.half and text.model_type not in FAMILIES:
        decoders = ", ".join(name for name, family in FAMILIES.items() if not family.vision)
        reason = f"{config.model_type} with a decoder of type {text.model_type}"
        raise UserError(f"{path}: {reason}; supported are {decoders}")
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        raise UserError(f"{path}: layers with a sliding attention window are not supported")
    if getattr(text, "attention_dropout", 0):
        raise UserError(f"{path}: attention dropout is not supported; set it to 0 in config.json")
    return family


def chat_template_file(path: str) -> str:
    """Read the chat template that older checkpoints have in a file of its own."""
    file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if not file:
        raise UserError(f"{path}: its tokenizer has no chat template; take a checkpoint for chat")
    return json.loads(Path(file).read_text())["chat_template"]


def end_of_turn(tokenizer) -> int:
    """Return the id of the first special token after an assistant's turn in the chat template.

    It need not be the tokenizer's eos token, which is <|endoftext|> in Qwen's base models.
    """
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\ue000"}]
    ending = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("\ue000")[2]
    special = tokenizer.get_added_vocab().values()
    for token in tokenizer.encode(ending, add_special_tokens=False):
        if token in special:
            return token
    return tokenizer.eos_token_id


def set_up_tiles(image, config, max_pixels: int) -> VisionShape:
    """Let InternVL's image processor cut tiles, of at most `max_pixels` without the thumbnail."""
    image.crop_to_patches = True  # as InternVLProcessor does, against preprocessor_config.json
    if max_pixels:
        tiles = max_pixels // image.size["height"] ** 2
        image.max_patches = max(1, min(image.max_patches, tiles))
    return VisionShape(config.vision_config.patch_size[0], round(1 / config.downsample_ratio))


def tile_grid(size: tuple[int, int], processors: Processors) -> tuple[int, int, int]:
    """(tiles, height and width of a tile in patches) of an image of (width, height) pixels."""
    side = processors.image_processor.size["height"] // processors.vision.patch
    return processors.image_processor.get_number_of_image_patches(size[1], size[0]), side, side


def surround_image_tokens(ids: np.ndarray, processors: Processors) -> np.ndarray:
    """Put the family's tokens, <img> and </img>, around the token of each image."""
    before, after = processors.tokenizer.convert_tokens_to_ids(processors.family.around)
    ids = np.insert(ids, np.flatnonzero(ids == processors.image_token) + 1, after)
    return np.insert(ids, np.flatnonzero(ids == processors.image_token), before)


# File formats. A Line is a file, a number, and a function that reads the record: each rank walks
# over all lines and reads its own.

Line = tuple[str, int, Callable[[], dict]]
DATA_FILES = (".parquet", ".json", ".jsonl", ".gz", ".tsv")


def read_json(line: bytes) -> dict:
    """Parse one line of JSON."""
    with explaining("not a line of JSON", (ValueError, RecursionError), Unusable):
        record = json.loads(line.decode("utf-8-sig"))
    require(isinstance(record, dict), f"not a JSON object but {type(record).__name__}")
    return record


def parquet_rows(path: str) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    for batch in ParquetFile(path).iter_batches(64):
        yield from batch.to_pylist()


def file_rows(path: str) -> Iterator[Callable[[], dict]]:
    """Yield a function for each row of a file, which reads that row.

    The file is .parquet, .tsv, a .json that is one list (held in memory), or has one JSON object a
    line, also as .gz. An empty line is a line like others: rejected, not skipped.
    """
    if path.endswith(".parquet"):
        for row in parquet_rows(path):
            yield partial(dict, row)
    elif path.endswith(".tsv"):
        csv.field_size_limit(2**31 - 1)  # a field may hold a picture
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                yield partial(dict, row)
    else:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            if path.endswith(".json") and file.peek(64).lstrip().startswith(b"["):
                for row in json.load(file):
                    yield partial(dict, row)
            for line in file:
                yield partial(read_json, line)


def read_rows(path: str, convert=dict, pattern: str = "**/*", with_file=False) -> Iterator[Line]:
    """Yield the rows of a file, of the files in a folder that match `pattern`, or of a glob.

    `convert` makes a row a record in the JSON form, or raises Unusable; `with_file`, it also gets
    the row's file, for facts that stand in its path. Raises UserError for a file that ends early.
    """
    files = [path]
    if not Path(path).is_file():
        matches = Path(path).glob(pattern) if Path(path).is_dir() else glob.glob(path)
        files = sorted(str(match) for match in matches if str(match).endswith(DATA_FILES))
    if not files:
        raise UserError(f"--source {path}: no data files there that match {pattern}")
    for file in files:
        of_file = partial(convert, file=Path(file)) if with_file else convert
        with explaining(f"{file}: cannot be read to its end", Exception):
            for number, read in enumerate(file_rows(file), 1):
                yield file, number, partial(convert_row, read, of_file)


def convert_row(read: Callable[[], dict], convert: Callable[[dict], dict]) -> dict:
    try:
        return convert(read())
    except Unusable:
        raise
    except KeyError as error:
        raise Unusable(f"missing field: {error.args[0]}") from None
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"not a row of this data set: {type(error).__name__}: {error}") from None


# --source.


def split_source(source: str) -> tuple[str, str, float]:
    """Split name:PATH@LIMIT into (name, PATH, LIMIT); a path without a name is "jsonl".

    LIMIT is a number of rows, below 1 a share of them, inf: all.
    """
    limit = math.inf
    if match := re.fullmatch(r"(.*)@(\d+|0?\.\d+)", source):  # any other @ belongs to the path
        source, limit = match[1], float(match[2])
    name, colon, path = source.partition(":")
    if name in SOURCES and (colon or not Path(source).exists()):
        return name, path, limit
    return "jsonl", source, limit


def open_source(source: str, seed: int = 0) -> Iterator[Line]:
    """Find a --source, at once; return its lines, which are read later."""
    name, path, limit = split_source(source)
    if name == "world":
        parts = embedded_world().SOURCES
        if path not in parts or not 1 <= limit < math.inf:
            form = f"world:PART@COUNT, PART one of {', '.join(parts)}"
            raise UserError(f"--source {source}: should be {form}")
        if limit > (there_are := embedded_world().lines_of(path, "train")):
            raise UserError(f"--source {source}: there are {there_are}")
        return read_world(path, "train", int(limit), str(seed))
    entry, path = SOURCES[name], locate(name, path)
    if entry.read:
        lines = entry.read(path)
    else:
        lines = read_rows(path, entry.convert, entry.files, entry.with_file)
    if limit < 1:  # by hashes of the numbers, so that all ranks choose the same
        lines = (line for i, line in enumerate(lines) if share_of(b"%d" % i) < limit)
    elif limit < math.inf:
        lines = itertools.islice(lines, int(limit))
    if name == "jsonl":
        return lines
    return ((file, number, partial(add_source, name, read)) for file, number, read in lines)


def open_sources(settings: Settings) -> tuple[str, Iterator[Line], float, list[Path] | None]:
    """Find all --source and those of --mix.

    Returns the data set's name, the lines, the share to hold out, and the folders that pictures
    have to lie in.
    """
    if settings.mix:
        settings.source += mix_sources(settings.mix, settings.mix_folder)
    name = settings.name or settings.mix or default_name(settings.source[0])
    lines = itertools.chain(*[open_source(source, settings.seed) for source in settings.source])
    holdout = settings.holdout
    if official_metric(settings.source):
        holdout = 0  # a benchmark stays whole
    if settings.judge_request:
        lines = as_judge_questions(lines, settings.judge_request)
        holdout = 0  # it would separate the two questions of a pair
    settings.join = settings.join and holdout > 0  # pairs of a benchmark stay apart
    within = [data_folder(source) for source in settings.source]
    return name, lines, holdout, None if settings.allow_outside else within


def add_source(name: str, read: Callable[[], dict]) -> dict:
    return {"source": name} | read()


def as_judge_questions(lines: Iterator[Line], request: str) -> Iterator[Line]:
    """Make each line two questions, with the better response as A and as B."""
    for file, number, read in lines:
        for answer in "AB":
            yield file, number, partial(judge_question, read, request, answer)


def judge_question(read: Callable[[], dict], request: str, answer: str) -> dict:
    """Make a pair, or the best and the worst of a ranking, a question whose answer is a letter.

    It reads as in a judge of 02, so 06 with --reward rule trains such a judge.
    """
    record = read()
    check(record, RECORD)
    texts, ranks = responses_of(record)
    require(texts, "no responses to compare")
    best = texts[ranks.index(min(ranks))]
    worst = texts[ranks.index(max(ranks))]
    first, second = (best, worst) if answer == "A" else (worst, best)
    turns = check_messages(record["prompt"])
    turns.append({"role": "assistant", "content": f"A:\n{first} B:\n{second}"})
    turns.append({"role": "user", "content": request})
    kept = {key: record[key] for key in ("id", "source", "category", "images") if key in record}
    return kept | {"prompt": turns, "answer": answer, "rule": "verdict"}


def data_folder(source: str) -> Path:
    """Return the folder that the pictures of a --source have to lie in."""
    name, path, _ = split_source(source)
    if name == "world":
        return Path()
    path = Path(locate(name, path)).resolve()
    while not path.exists():  # a pattern: up to the folder above its first wildcard
        path = path.parent
    folder = path if path.is_dir() else path.parent
    # The files of a download are links out of snapshots/REVISION, into the hub's cache.
    return folder.parents[1] if folder.parent.name == "snapshots" else folder


def default_name(source: str) -> str:
    """Name a data set after its file or folder, or like its source."""
    name, path, _ = split_source(source)
    if Path(path).is_file():
        return Path(path.removesuffix(".gz")).stem
    return name if "*" in path else Path(path).name or name


def official_metric(sources: list[str]) -> str:
    """Return the metric (04, 06) that scores these sources; "": they are training data."""
    names = [split_source(source)[0] for source in sources]
    metrics = {SOURCES[name].metric for name in names} or {""}
    if len(metrics) > 1:
        together = f"{' and '.join(names)} are not scored together"
        raise UserError(f"--source: {together}; prepare each by itself")
    return metrics.pop()


# The embedded world: it draws pictures, asks about them, and knows the answers.

WORLD = Path(__file__).parent / "tests" / "tiny" / "world.py"
WORLD_SAMPLES = WORLD.with_name("sampled.jsonl.gz")


@lru_cache
def embedded_world():
    if not WORLD.is_file():
        raise UserError(f"{WORLD}: the embedded world is not there; give your own data by --source")
    spec = importlib.util.spec_from_file_location("embedded_world", WORLD)
    module = sys.modules["embedded_world"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_world(source: str, split: str, count: int, seed: str) -> Iterator[Line]:
    for i in range(count):
        read = partial(embedded_world().record, source, split, seed, i)
        yield f"world/{source}/{split}", i + 1, read


def world_sets(settings: Settings) -> Iterator[tuple[str, Iterator[Line], float]]:
    """Yield name, lines and holdout of each data set of the embedded world."""
    if settings.judge_request:
        raise UserError("--judge_request: give the pairs by --source")
    for name, (parts, holdout) in embedded_world().SETS.items():
        lines = []
        for source, split, count in parts:
            there_are = embedded_world().lines_of(source, split)
            count = int(min(count * settings.world_size, there_are))
            lines.append(read_world(source, split, count, f"{settings.seed}/{name}"))
        yield name, itertools.chain(*lines), holdout


# --------------------------------------------------------------------------------------------------
# Appendix: published data sets, as data. SOURCES, after the functions, has one entry for each set:
# a converter, which makes a published row a record of the JSON form or raises Unusable with the
# reason; the set's name on the Hugging Face hub; a pattern of the files to read; for a benchmark
# its metric, by its name in 04 (for questions to a policy: in 06). To add a set, add one entry.
# Comments give facts from the set's card or its authors' loader; "unconfirmed" marks a guess.
# An example:
#
#     # 83,132 pairs, each with one picture inside the parquet file
#     "rlaif-v": Source(
#         partial(pair, prompt="question", images="image", id="idx", category="origin_dataset"),
#         "openbmb/RLAIF-V-Dataset", PARQUET),
#
# `pair` takes `chosen` and `rejected` from columns of these names; a keyword fills a field of the
# record from another column. If no converter fits, write a function row -> record.


@dataclass
class Source:
    """Say where the files of a published set are and how its rows become records."""

    convert: Callable = dict  # row -> record; dict: the row already has the JSON form
    hub: str = ""  # owner/name; empty: not on the hub
    files: str = "**/*"  # pattern inside the set's folder
    metric: str = ""  # empty: training data
    with_file: bool = False  # call convert(row, file): the path tells something about the row
    read: Callable | None = None  # PATH -> lines, instead of `convert`: rows depend on one another


# Converters: row (dict) -> record (dict). A keyword says what fills a field of the record.


def pick(row, columns):
    """Fill each field of a record from a column, a list of columns, or by a function of the row."""
    record = {}
    for key, source in columns.items():
        if callable(source):
            record[key] = source(row)
        elif isinstance(source, list):
            record[key] = [row[column] for column in source]
        else:
            record[key] = row[source]
    if not isinstance(record.get("images", []), list):
        record["images"] = [record["images"]]
    return record


def pair(row, prompt="prompt", **columns):
    """Convert a row with one chosen and one rejected response."""
    return pick(row, {"prompt": prompt, "chosen": "chosen", "rejected": "rejected", **columns})


def several(row, **columns):
    """Convert a row with a list of chosen and a list of rejected responses."""
    record = pick(row, {"prompt": "prompt", "id": "id", **columns})
    record["responses"] = [*row["chosen"], *row["rejected"]]
    record["ranks"] = [1] * len(row["chosen"]) + [2] * len(row["rejected"])
    return record


def choice(row, label, first, second, **columns):
    """Convert two `responses` and a label, `first` if the first one is better, else `second`."""
    record = pick(row, columns)
    count = len(record["responses"])
    reason = f"{row[label]!r} does not say which of two is better; there are {count} responses"
    require(row[label] in (first, second) and count == 2, reason)
    record["ranks"] = [1, 2] if row[label] == first else [2, 1]
    return record


def message(speaker, content):
    """Make one turn of a conversation, whatever the set calls its speakers."""
    roles = {"human": "user", "gpt": "assistant"}
    return {"role": roles.get(speaker.lower(), speaker.lower()), "content": content}


def conversations(row):
    """Convert two whole conversations. All turns but the last must agree; they are the prompt."""
    chosen = [message(turn["role"], turn["content"]) for turn in row["chosen"]]
    rejected = [message(turn["role"], turn["content"]) for turn in row["rejected"]]
    same = chosen[:-1] == rejected[:-1]
    require(same, "chosen and rejected do not share everything up to the last assistant turn")
    record = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if row.get("id") is not None:
        record["id"] = row["id"]
    return record


def first_match(text, /, **patterns):
    """Return the name of the first pattern that matches somewhere in the text."""
    for name, pattern in patterns.items():
        if re.search(pattern, text):
            return name
    raise Unusable(f"{text!r} names no category, one of {', '.join(patterns)}")


def pictures(row, file, frames):
    """List a row's picture, or `frames` evenly spread frames of its video, which is a folder."""
    if row.get("image"):
        return [row["image"]]
    video = row["video"]
    names = [path.name for path in (file.parent / video).glob("*")]
    names.sort(key=lambda name: (len(name), name))  # 9.png before 10.png
    spread = np.linspace(0, len(names) - 1, min(frames, len(names))).astype(int)
    return [f"{video}/{names[i]}" for i in spread] or [video]  # no frames: an unreadable image


# Training sets that need a function.


def trl(row):
    """Convert a row. Without a prompt, the common beginning of both responses is the prompt."""
    record = dict(row)
    image = record.pop("image", None)
    record["images"] = row.get("images") or ([image] if image else [])
    if row.get("prompt"):
        return record
    if isinstance(row["chosen"], list):
        return record | conversations(row)
    start = os.path.commonprefix([row["chosen"], row["rejected"]])
    prompt = re.match(r"(.*\s)?", start, re.DOTALL)[0]  # whole words; TRL cuts them
    require(prompt, "no prompt, and chosen and rejected begin with different words")
    record["prompt"] = prompt.rstrip()
    record["chosen"] = row["chosen"].removeprefix(prompt)
    record["rejected"] = row["rejected"].removeprefix(prompt)
    return record


def llama_factory(row):
    """Convert rows with `conversations`, or with `instruction`, `input` and `history`."""
    for key in ("tools", "videos", "audios"):
        require(not row.get(key), f"{key}: not supported")
    record = {"chosen": row["chosen"], "rejected": row["rejected"]}
    turns = [("system", row["system"])] if row.get("system") else []
    if row.get("conversations"):
        turns += [(turn["from"], turn["value"]) for turn in row["conversations"]]
        record = {key: response["value"] for key, response in record.items()}
    else:
        for instruction, response in row.get("history") or []:
            turns += [("human", instruction), ("gpt", response)]
        texts = filter(None, [row["instruction"], row.get("input")])
        turns.append(("human", "\n".join(texts)))
    record["prompt"] = [message(speaker, with_images(text)) for speaker, text in turns]
    record["images"] = row.get("images") or []
    return record


def mmif(row, file):
    """Find the pictures below one of the folders above the file."""
    record = llama_factory(row)
    for folder in file.absolute().parents:
        images = [str(folder / image) for image in record["images"]]
        if all(map(os.path.isfile, images)):
            return record | {"images": images}
    return record


def read_mmpr(path):
    """Read the annotations that meta.json names, {name: {root of the pictures, annotation}}."""

    def convert(row, root):
        record = pair(row, prompt="question", images="image")
        record["prompt"] = [message("user", with_images(record["prompt"]))]
        record["images"] = [str(root / image) for image in record["images"] if image]
        return record

    folder = Path(path).resolve()
    if not (folder / "meta.json").is_file():
        raise UserError(f"--source mmpr:{path}: no meta.json there; PATH is the set's folder")
    for part in json.loads((folder / "meta.json").read_bytes()).values():
        root = folder / part["root"].removeprefix("MMPR-v1.2/")
        annotation = folder / part["annotation"].removeprefix("MMPR-v1.2/")
        yield from read_rows(str(annotation), partial(convert, root=root))


def mm_rlhf(row, file):
    record = pair(row)
    record["prompt"] = [message("user", with_images(row["prompt"]))]
    record["images"] = pictures(row, file, frames=8)
    record["category"] = record["images"][0].split("/")[0]
    critiques = [row.get("chosen_reason"), row.get("rejected_reason")]
    if all(critiques):
        record["critiques"] = critiques
    return record


def r1_reward(row):
    """Take both responses from `message`, a judge's prompt in JSON."""
    parts = [part for turn in json.loads(row["message"]) for part in turn["content"]]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    both = r"\[Response 1\]:(.*?)#+ *\[Response 2\]:(.*?)(?:#+ *\*\*Output Format|$)"
    responses = re.search(both, "".join(texts), re.DOTALL)
    better = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", row["answer"][0])
    require(better, f"answer: {row['answer'][0]!r}")
    require(responses, "message without [Response 1] and [Response 2]")
    image = row["image"]
    require(image or len(texts) == len(parts), "image: empty, though the message shows one")
    if isinstance(image, str) and len(image) > 1000:  # base64, not a path (unconfirmed)
        image = base64.b64decode(image.rpartition(",")[2], validate=True)
    return {
        "prompt": row["question"],
        "responses": [responses[1].strip(), responses[2].strip()],
        "ranks": [1, 2] if better[1] == "1" else [2, 1],
        "images": [image] if image else [],
    }


def ultrafeedback(row, hard=False):
    """Rank up to four responses by score, equal ones tie; `hard` keeps the best and the worst."""
    answers = row["completions"]
    scores = [float(answer["overall_score"]) for answer in answers]
    require(all(map(math.isfinite, scores)), "overall_score: not a number")
    order = sorted(scores, reverse=True)
    ranks = [order.index(score) + 1 for score in scores]
    record = {"prompt": row["instruction"], "ranks": ranks, "category": row["source"]}
    record["responses"] = [answer["response"] for answer in answers]
    record["critiques"] = [answer["critique"] for answer in answers]
    if hard:
        extremes = [ranks.index(min(ranks)), ranks.index(max(ranks))]
        for key in ("responses", "ranks", "critiques"):
            record[key] = [record[key][i] for i in extremes]
    return record


def shp(row):
    require(row["score_ratio"] >= 2, "score_ratio below 2")
    columns = {"prompt": "history", "responses": ["human_ref_A", "human_ref_B"]}
    return choice(row, "labels", first=1, second=0, id="post_id", category="domain", **columns)


def read_shp(path):
    """Keep the first 5 usable pairs of a post. Every rank parses all rows, to count alike."""
    pairs = Counter()
    for file, line, read in read_rows(path, shp, "**/train*.json*"):
        try:
            post = read()["id"]
        except Unusable:
            yield file, line, read  # raises again for the rank that owns the line
            continue
        pairs[post] += 1
        if pairs[post] > 5:
            read = partial(require, False, "more than 5 pairs of this post")
        yield file, line, read


def swe_arena(row):
    vote = row["feedback"]["vote_type"]
    require(vote in ("vote_model_A", "vote_model_B"), f"no better response: {vote}")
    chosen = [message(*turn) for turn in row["states"]["model_A"]["messages"]]
    rejected = [message(*turn) for turn in row["states"]["model_B"]["messages"]]
    if vote == "vote_model_B":
        chosen, rejected = rejected, chosen
    return conversations({"chosen": chosen, "rejected": rejected, "id": row["chat_session_id"]})


def hh_rlhf(row):
    """Cut two transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ...", into turns."""

    def turns(transcript):
        start, *pieces = re.split("\n\n(Human|Assistant):", transcript)
        require(pieces and not start.strip(), "no transcript that begins with Human: or Assistant:")
        return [message(who, text.strip()) for who, text in zip(pieces[::2], pieces[1::2])]

    return conversations({"chosen": turns(row["chosen"]), "rejected": turns(row["rejected"])})


# Benchmarks. The right response gets rank 1. Responses stay in the published order, so that another
# system's scores fit; the order decides nothing. `category` is the benchmark's own grouping.


def mm_rlhf_rewardbench(row, file):
    record = pair(row, id="id", group="id")
    media = row.get("image") or row["video"]
    kinds = {"mcq": "mcq", "long": "long", "short": "short", "safety": "safety", "video": "video"}
    record["category"] = first_match(media, **kinds)
    record["images"] = pictures(row, file, frames=32)  # as in the benchmark's own code
    return record


def multimodal_rewardbench_category(row):
    """Split two categories by the id, as the official script does."""
    id = row["ID"].lower()
    if row["Category"] == "safety":
        return "safety/bias" if id.startswith("pairs") else "safety/toxicity"
    if row["Category"] == "reasoning":
        return "reasoning/math" if id.startswith("math") else "reasoning/coding"
    return row["Category"]


def rewardbench_prior_set(row, file):
    record = conversations(row) if isinstance(row["chosen"], list) else pair(row)
    record["category"] = re.split(r"[-.]", file.name)[0]  # of shp-00000.parquet
    return record


def rm_bench(row, file):
    counts = (len(row["chosen"]), len(row["rejected"]))
    require(counts == (3, 3), f"{counts[0]} chosen and {counts[1]} rejected, not 3 styles of each")
    record = several(row)
    domain = row.get("domain") or file.name  # chat_filtered.json has no column for it
    record["category"] = first_match(domain, chat="chat", code="code", math="math", safety="safety")
    return record


def llmbar(row, file):
    columns = {"prompt": "input", "responses": ["output_1", "output_2"]}
    record = choice(row, "label", first=1, second=2, **columns)
    record["category"] = file.parent.name if file.stem == "dataset" else file.stem
    return record


# Questions to a policy: a prompt in the benchmark's words, `answer`, and the `rule` by which 06
# checks it. A question without an answer, as in most test splits, is unusable.

RULES = {  # kind: (form of the answers that it can check, types of the rule's further fields)
    "text": (r"(?s).*\w.*", {}),
    "letter": (r"[A-Z]", {"options": list}),
    "verdict": (r"A|B", {}),
    "yes_no": (r"(?i)yes|no", {}),
    "number": (r".*\d.*", {"type": str, "precision": int, "unit": str}),
}
LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA's words


def check_rule(rule: object, answer: object) -> None:
    """Raise Unusable unless the rule, a kind or {"kind": ..., fields}, can check the answer."""
    fields = dict(rule) if isinstance(rule, dict) else {"kind": rule}
    kind = fields.pop("kind", None)
    require(kind in list(RULES), f"rule: {kind!r}; known are {', '.join(RULES)}")
    form, types = RULES[kind]
    for key, value in fields.items():
        require(isinstance(value, types.get(key, ())), f"rule: {kind} with {key} = {value!r}")
    text = str(answer).strip()
    require(re.fullmatch(form, text), f"answer: {answer!r} is none that the rule {kind} can check")
    if fields.get("options"):
        count = len(fields["options"])
        require(ord(text) - ord("A") < count, f"answer: {answer!r} of {count} options")


def ask(text, image, **fields):
    """Make a record that asks about one picture, which stands before the text."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"prompt": [message("user", content)], "images": [image], **fields}


def question(row, text="question", rule="", **columns):
    """Convert a question on one picture; the rule "letter" also asks for the letter.

    Without a rule a judge model compares answers; `judged` has what else its file needs.
    """
    prompt = row[text].strip()
    if rule == "letter" and LETTER not in prompt:
        prompt += f"\n{LETTER}"
    record = ask(prompt, row["image"])
    record |= pick(row, {"id": "question_id", "category": "category", **columns})
    if rule:
        record |= {"rule": rule, "answer": record["answer"].strip()}
    return record


def lettered(options):
    """Write options one a line, each after its letter: "A. red", "B. blue"."""
    letters = string.ascii_uppercase
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))


def vstar(row):
    """Cut off the list of objects before the question, as DeepEyes does (arXiv 2505.14362).

    Check the Yes or No that begins an answer. Few policies match other answers, whole sentences,
    so there the reward model has to tell right from wrong.
    """
    require(row["target_instances"], "no target_instances: not a question about objects")
    text = row["conversations"][0]["value"].split("<object>.\n")[-1]
    text = text.replace("<image>", "").strip()
    answer = row["conversations"][1]["value"]
    verdict = re.match(r"(Yes|No)([,.]|$)", answer)
    if verdict:
        return ask(text, row["image"], answer=verdict[1], rule="yes_no", category="vstar")
    return ask(text, row["image"], answer=answer, rule="text", category="vstar")


def arxivqa(row):
    """Clean options ("red" or "A) red", some are separators) and labels ("B", "B)", "[B] blue")."""
    options = [option.strip() for option in row["options"]]
    odd = any(option in ("", "-") or option.startswith("#") for option in options)
    require(not odd, "options: one of them is empty, a separator or a heading")
    own = r"[(\[]?%s[.):\]]+\s*(.+)"  # an option with its letter
    bare = [re.match(own % chr(ord("A") + i), option) for i, option in enumerate(options)]
    if all(bare):  # else "B. cereus" would lose its genus
        options = [match[1] for match in bare]
    label = re.match(r"[(\[]?([A-Z])(?![A-Za-z])", row["label"].strip())
    require(label, f"label: {row['label']!r} does not begin with a letter")
    text = f"{row['question']}\n{lettered(options)}\n{LETTER}"
    rule = {"kind": "letter", "options": options}
    return ask(text, row["image"], id=row["id"], answer=label[1], rule=rule, category="arxivqa")


def thinklite_vl(row):
    """Choose the rule by the answer's form."""
    text = row["problem"].replace("<image>", "").strip()
    answer = str(row["answer"]).strip()
    forms = {"letter": "^[A-Z]$", "yes_no": "(?i)^(yes|no)$", "number": r"^-?[\d,]*\.?\d+$"}
    rule = first_match(answer, **forms, text="")
    return ask(text, row["image"], id=row["id"], answer=answer, rule=rule, category="thinklite-vl")


def read_mmbench(path):
    """Fill in pictures: a rotation has, instead of one, the index of the row that has it."""
    images = {}  # index: picture in base64
    for file, line, read in read_rows(path, dict, "**/*.tsv"):
        row = read()
        image = row.get("image") or ""
        if len(image) > 64:  # VLMEvalKit's test for a picture
            images[row.get("index")] = image
        row["image"] = images.get(image, image)
        yield file, line, partial(convert_row, partial(dict, row), mmbench)


def mmbench(row):
    """Ask as VLMEvalKit's ImageMCQDataset does; a question and its rotations are one group."""
    row = {key: value for key, value in row.items() if value not in (None, "", "nan")}
    require("answer" in row, "no answer: the answers of the test split are not published")
    options = list(itertools.takewhile(bool, map(row.get, "ABCDEFGH")))
    text = f"Hint: {row['hint']}\n" if "hint" in row else ""
    text += f"Question: {row['question']}\nOptions:\n{lettered(options)}\n"
    text += "Please select the correct answer from the options above. \n"
    record = ask(text, base64.b64decode(row["image"], validate=True), answer=row["answer"])
    record["rule"] = {"kind": "letter", "options": options}
    record["id"] = row["index"]
    record["group"] = int(row["index"]) % 1_000_000  # index = rotation * 1,000,000 + question
    record["category"] = row.get("l2-category") or row.get("L2-category") or row["category"]
    return record


def mathvista(row):
    """Check a multiple choice, whose answer is an option's text, by its letter."""
    answer = row["answer"]
    require(answer not in (None, ""), "no answer: only the split testmini has them")
    if row["question_type"] == "multi_choice":
        choices = list(row["choices"])
        require(answer in choices, f"answer: {answer!r} is none of the choices")
        answer = string.ascii_uppercase[choices.index(answer)]
        rule = {"kind": "letter", "options": choices}
    else:
        rule = {"kind": "number", "type": row["answer_type"]}
        if row["precision"] is not None:
            rule["precision"] = int(row["precision"])
        if row["unit"]:
            rule["unit"] = row["unit"]
    record = ask(row["query"], row["decoded_image"], id=row["pid"], answer=answer, rule=rule)
    record["category"] = row["metadata"]["task"]
    return record


PARQUET = "**/*.parquet"
# fmt: off
SOURCES = {
    "jsonl": Source(),  # rows in the JSON form
    "world": Source(),  # the embedded world, which open_source draws

    # --- Training sets ---
    # Forms that many sets have: TRL's docs, Dataset formats; LLaMA-Factory's data/README.md
    "trl": Source(trl),
    "llama-factory": Source(llama_factory),
    # 83,132 pairs, each with one picture inside the parquet file
    "rlaif-v": Source(
        partial(pair, prompt="question", images="image", id="idx", category="origin_dataset"),
        "openbmb/RLAIF-V-Dataset", PARQUET),
    # About 2 M pairs. cat images.zip_* > images.zip && unzip images.zip && unzip annotations.zip
    "mmpr": Source(read=read_mmpr, hub="OpenGVLab/MMPR-v1.2"),
    # About 80,000 pairs; unzip long.zip, mcq.zip, safety.zip, short.zip and video.zip
    "mm-rlhf": Source(mm_rlhf, "yifanzhang114/MM-RLHF", "dpo_pairs.jsonl", with_file=True),
    # 17,261 pairs
    "r1-reward": Source(r1_reward, "yifanzhang114/R1-Reward-RL", "**/train-*.parquet"),
    # 23,000 pairs in LLaMA-Factory's form; the folder of the pictures is unconfirmed
    "mmif": Source(mmif, "ChrisDing1105/MMIF-23k", "**/dpo/*.json", with_file=True),
    # About 133,000 pairs; unpack images.tar. As in the authors' train_dpo.py the picture comes
    # before the prompt, wherever <image> stands
    "omnialign-v-dpo": Source(
        partial(pair, prompt=lambda row: row["prompt"].replace("<image>", "").strip(),
                images="image"),
        "PhoenixZ/OmniAlign-V-DPO", "*.jsonl"),
    # 63,967 prompts. The paper's Ultra-Hard keeps the pair with the largest score difference; the
    # copy called "binarized" pairs the best response with a random other
    "ultrafeedback-all": Source(ultrafeedback, "openbmb/UltraFeedback"),
    "ultrafeedback-hard": Source(partial(ultrafeedback, hard=True), "openbmb/UltraFeedback"),
    # 348,718 pairs; as is common, score ratios of at least 2 and at most 5 pairs of a post
    "shp": Source(read=read_shp, hub="stanfordnlp/SHP"),
    # 378,000, 65,551 and 41,600 pairs, and WildChat in five named splits
    "olmo-2": Source(conversations, "allenai/olmo-2-0425-1b-preference-mix", PARQUET),
    "tulu-3-if": Source(conversations, "allenai/tulu-3-IF-augmented-on-policy-70b", PARQUET),
    "tulu-3-ultrafeedback": Source(
        conversations, "allenai/tulu-3-ultrafeedback-cleaned-on-policy-70b", PARQUET),
    "wildchat": Source(conversations, "allenai/tulu-3-wildchat-ultrafeedback", PARQUET),
    # About 5,000 votes, now BigCodeArena; that messages are [role, text] is unconfirmed
    "swe-arena": Source(swe_arena, "bigcode/bigcodearena-preference-5k", PARQUET),
    "hh-rlhf": Source(hh_rlhf, "Anthropic/hh-rlhf", "**/train.jsonl.gz"),

    # --- Benchmarks ---
    # arXiv 2411.17451, 1250 pairs; ids are not unique
    "vl-rewardbench": Source(
        partial(choice, prompt="query", images="image", responses="response", id="id",
                label="human_ranking", first=[0, 1], second=[1, 0],  # places, 0 is better
                category=lambda row: first_match(  # the grouping of the official repository
                    row["id"], hallucination="^(hallucination|RLAIF|RLHF)",
                    reasoning="^(mathverse|mmmu)", general="")),
        "MMInstruction/VL-RewardBench", metric="vl-rewardbench"),
    # arXiv 2502.10391, 170 pairs of 46 ids; 32 frames of a video need a large --max_length
    "mm-rlhf-rewardbench": Source(
        mm_rlhf_rewardbench,
        "yifanzhang114/MM-RLHF-RewardBench", "**/*.jsonl", "mm-rlhf-rewardbench", with_file=True),
    # arXiv 2502.14191; github.com/facebookresearch/multimodal_rewardbench
    "multimodal-rewardbench": Source(
        partial(choice, prompt="Text", images="Image", responses=["Output1", "Output2"], id="ID",
                label="Better", first="Output1", second="Output2",
                category=multimodal_rewardbench_category),
        "", "**/all_data.json", "multimodal-rewardbench"),
    # arXiv 2403.13787, the split `filtered`, 2985 pairs
    "rewardbench": Source(
        partial(pair, id="id", category="subset"),
        "allenai/reward-bench", "**/filtered*", "rewardbench"),
    # Older sets, which count half in RewardBench's score
    "rewardbench-prior-sets": Source(
        rewardbench_prior_set,
        "allenai/preference-test-sets", metric="rewardbench", with_file=True),
    # arXiv 2506.01937, 1865 prompts; one right of four, of Ties several
    "rewardbench-2": Source(
        partial(several, category="subset"),
        "allenai/reward-bench-2", metric="rewardbench-2"),
    # arXiv 2410.16184, 1327 prompts with 3 styles: concise, detailed plain, detailed markdown
    "rm-bench": Source(
        rm_bench, "THU-KEG/RM-Bench", "**/total_dataset.json", "rm-bench", with_file=True),
    # arXiv 2410.12784, 350 pairs of GPT-4o's and 270 of Claude 3.5 Sonnet's
    "judgebench": Source(
        partial(choice, prompt="question", responses=["response_A", "response_B"], id="pair_id",
                label="label", first="A>B", second="B>A", subset="response_model",
                category=lambda row: first_match(
                    row["source"], knowledge="^mmlu-pro", reasoning="^livebench-reasoning",
                    math="^livebench-math", coding="^livecodebench")),
        "ScalerLab/JudgeBench", metric="judgebench"),
    # arXiv 2310.07641, 419 pairs; github.com/princeton-nlp/LLMBar, its folder Dataset/LLMBar
    "llmbar": Source(llmbar, "", "**/dataset.json", "llmbar", with_file=True),

    # --- Questions to train a policy on; of the first two we have not seen files (unconfirmed) ---
    # SEAL's training data with gqa/images/, coco2014/train2014/ and coco2017/train2017/ beside it
    "vstar": Source(vstar, "craigwu/seal_vqa_data", "**/*_data.json"),
    # Written by GPT-4V and not cleaned; unpack images.tgz
    "arxivqa": Source(arxivqa, "MMInstruction/ArxivQA", "**/*.jsonl"),
    # 11,000 questions; that the answer to a multiple choice is its letter is unconfirmed
    "thinklite-vl": Source(thinklite_vl, "russwang/ThinkLite-VL-hard-11k", PARQUET),

    # --- Questions to judge a policy by ---
    # VLMEvalKit's MMBench_DEV_EN.tsv; the paper has version 1.1
    "mmbench": Source(read=read_mmbench, metric="circular"),
    # Two questions on each picture, one answered Yes and one No; the paper has MME-RealWorld-Lite
    "mme": Source(
        partial(question, rule="yes_no", answer="answer", group="question_id"),
        "lmms-lab/MME", PARQUET, "mme"),
    # The question has its options in it; 6 categories
    "mmstar": Source(
        partial(question, rule="letter", answer="answer", id="index"),
        "Lin-Chen/MMStar", PARQUET, "accuracy"),
    # `query` is the benchmark's own zero-shot prompt
    "mathvista": Source(mathvista, "AI4Math/MathVista", "**/testmini*.parquet", "accuracy"),
    # Or lmms-lab/vstar-bench. SEAL's own evaluation compares the options' likelihoods instead
    "vstar-bench": Source(
        partial(question, text="text", rule="letter", answer="label"),
        "craigwu/vstar_bench", "**/test_questions.jsonl", "accuracy"),
    # The categories are conv, detail and complex
    "llava-in-the-wild": Source(
        partial(question, text="text", images=lambda row: f"images/{row['image']}",
                judged=lambda row: {"question_id": row["question_id"], "prompt": row["text"]}),
        "liuhaotian/llava-bench-in-the-wild", "**/questions.jsonl", "llava-in-the-wild"),
    # The version of 0617
    "wildvision": Source(
        partial(question, text="instruction", category=lambda row: "wildvision",
                judged=lambda row: {"question_id": row["question_id"], "language": row["language"],
                                    "instruction": row["instruction"]}),
        "WildVision/wildvision-bench", "**/vision_bench_0617/*.parquet", "wildvision"),
}

# The paper's training data, reconstructed: seven sets, each whole, 2.8 M pairs. Its "R1-Reward" is
# that model's SFT set, 200 k pairs of MM-RLHF, VL-Feedback and RLHF-V, of which we know no release:
# MM-RLHF and R1-Reward's RL set, 97 k, stand in. Its "Others" (63 k) names WildChat and swe-arena;
# with 41 k of UltraFeedback the sizes add up.
MIXES = {
    "basereward": [
        "rlaif-v", "mmpr", "tulu-3-if", "olmo-2",  # 83 k, 2 M, 65 k, 378 k
        "ultrafeedback-hard",  # 63 k
        "mm-rlhf", "r1-reward",  # R1-Reward
        "swe-arena", "tulu-3-ultrafeedback",  # Others
        "wildchat:data/wildchat_reused_on_policy_70b-*",
    ]
}
# fmt: on


@lru_cache
def locate(name: str, path: str) -> str:
    """Return PATH if something is there, else download the set and return its folder in the cache.

    All ranks do: a lock of the hub's client lets one of them download, and the others find it.
    """
    if path and (Path(path).exists() or glob.glob(path)):
        return path
    hub, problem = SOURCES[name].hub, f"--source {path or name}: nothing there"
    repo = path or hub
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.endswith(DATA_FILES):
        hint = f"A source is a file or name:PATH, name one of {', '.join(SOURCES)}"
        raise UserError(f"{problem}. {download_command(hub, 'DIR') if hub else hint}")
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        return snapshot_download(repo, repo_type="dataset")
    except Exception as error:  # the hub's client raises many kinds, whose names say enough
        reason = f"download failed ({type(error).__name__})"
        command = f"{download_command(repo, repo)}, then --source {name}:{repo}"
        raise UserError(f"{problem}; {reason}. Fetch it: {command}") from None


def download_command(repo: str, folder: str) -> str:
    return f"hf download {repo} --repo-type dataset --local-dir {folder}"


def mix_sources(mix: str, folder: str) -> list[str]:
    """List a mixture's sources, each in `folder` under its name on the hub.

    Raises: UserError with the commands that download what is missing.
    """
    if mix not in MIXES:
        raise UserError(f"--mix {mix}: not one of {', '.join(MIXES)}")
    sources, missing = [], []
    for part in MIXES[mix]:
        name, pattern, _ = split_source(part)
        place = f"{folder or '.'}/{SOURCES[name].hub}"
        sources.append(f"{name}:{place}/{pattern}")
        if not Path(place).is_dir():
            missing.append(download_command(SOURCES[name].hub, place))
    if missing:
        problem = f"--mix {mix}: {len(missing)} of its sets are missing in --mix_folder:"
        raise UserError("\n    ".join([problem, *missing]))
    return sources


if __name__ == "__main__":
    run_stage(main, Settings, __doc__)
