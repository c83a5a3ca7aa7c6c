"""Stage 1 · preference data -> shards of token ids and image bytes

Preference data has one JSON object a line. This is one (broken here to fit):

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
      Lines read = comparisons kept + lines rejected, always.

The idea: everything in the recipe compares responses to the *same* prompt. A training pair has
N = 2 responses, a ranking or a benchmark item any N, a group of GRPO rollouts N = G, a question to
a policy N = 0. One class holds them all, and one forward of the model (02) scores them all.

The paper (BaseReward, arXiv 2509.16127) trains on 2.8 M pairs of seven published sets, multimodal
and text-only. It keeps or drops whole sets and filters no samples. It does not state image size or
length; we take at most 501,760 pixels and 4,096 tokens, as its authors do for text-only rewards.
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
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, HfArgumentParser
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.hub import cached_file

FORMAT = 4  # of the shards; raise it when their layout changes


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
    origin: str = ""  # where it was read, for messages

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all pairs of responses that do not tie."""
        return ordered_pairs(self.ranks)

    @property
    def length(self) -> int:
        """Tokens of the packed row [prompt | response 1 | ... | response N]."""
        return len(self.prompt) + sum(map(len, self.responses))


def ordered_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) for all pairs of places in `ranks` that do not tie."""
    places = range(len(ranks))
    return [(i, j) for i in places for j in places if ranks[i] < ranks[j]]


# --------------------------------------------------------------------------------------------------
# 1. A record, the dict of one line, becomes a Comparison. `processors` holds the tokenizer and the
# image processor of the backbone; load_processors (appendix) reads them from its checkpoint.


def encode_record(
    record, processors, max_length, folder=Path(), without_images=False, within=None
) -> Comparison:
    """Make one record a Comparison; raise Unusable with the reason if that is impossible.

    Image paths are relative to `folder` and have to lie in one of the folders `within`, if given.
    """
    check(record, RECORD)  # the schema, in the appendix
    texts, ranks = responses_of(record)
    messages = check_messages(record["prompt"], without_images)
    images = [] if without_images else images_in(record)
    prompt, files, grids = encode_prompt(messages, images, processors, folder, within)
    responses = [encode_response(text, processors) for text in texts]
    check_length(prompt, responses, max_length)
    carried = carried_fields(record, texts)
    return Comparison(prompt, responses, ranks, files, grids, carried)


def encode_prompt(messages, images, processors, folder=Path(), within=None):
    """Tokenize a prompt and its images up to where the assistant's answer begins.

    Returns token ids [P], the images' encoded bytes, and their grids [images, 3]. Raises Unusable.
    """
    messages = check_messages(messages)
    images = place_images(messages, images)
    require(not images or processors.image, "images: the backbone is text-only")
    files = [read_image(image, folder, within) for image in images]
    grids = [patch_grid(open_image(file).size, processors) for file in files]
    grids = np.array(grids, np.int32).reshape(-1, 3)
    ids = tokenize_chat(messages, processors.tokenizer)  # one image token for each image
    if files:
        ids = expand_image_tokens(ids, grids, processors)
    return ids, files, grids


def tokenize_chat(messages: list[dict], tokenizer) -> np.ndarray:
    """Render messages with the backbone's chat template and tokenize them, [P].

    The template's special tokens become single ids, as in <|im_start|>user\\nHi<|im_end|>. The same
    strings in a user's text stay text: they are cut out before rendering, with a mark in their
    place, and tokenized as ordinary characters afterwards.
    """
    # The marks are two characters of Unicode's private use area around a number.
    special = [*tokenizer.get_added_vocab(), "\ue000", "\ue001"]
    special = re.compile("|".join(map(re.escape, special)))
    cut = []

    def mark(match: re.Match) -> str:
        cut.append(match[0])
        return f"\ue000{len(cut) - 1}\ue001"

    def mark_part(part: dict) -> dict:
        return part | {"text": special.sub(mark, part["text"])} if "text" in part else part

    marked = []
    for turn in messages:
        if isinstance(turn["content"], str):
            content = special.sub(mark, turn["content"])
        else:
            content = [mark_part(part) for part in turn["content"]]
        marked.append({"role": turn["role"], "content": content})
    rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)

    ids = []
    for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):  # text, number, text, ...
        if i % 2:
            ids += tokenize_text(cut[int(piece)], tokenizer)
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return np.array(ids, np.int32)


def tokenize_text(text: str, tokenizer) -> list[int]:
    """Tokenize a text in which '<|im_end|>' is ten characters, not one token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(text: str, processors: Processors) -> np.ndarray:
    """Tokenize a response, [R]. It ends with the end-of-turn token, where its score is read."""
    return np.array([*tokenize_text(text, processors.tokenizer), processors.end_token], np.int32)


def patch_grid(size: tuple[int, int], processors: Processors) -> tuple[int, int, int]:
    """Patches (time, height, width) of an image of `size` (width, height) in pixels.

    Qwen-VL scales an image, about keeping its shape, so that both sides are multiples of
    patch * merge = 28 pixels and its area lies between two limits.
    """
    if processors.family.tiles:
        return tile_grid(size, processors)
    width, height = size
    patch, limits = processors.vision.patch, processors.image.size
    unit = patch * processors.vision.merge
    with explaining(f"unusable image of {width} x {height} pixels", ValueError, Unusable):
        height, width = smart_resize(
            height, width, unit, limits["shortest_edge"], limits["longest_edge"]
        )
    return 1, height // patch, width // patch


def expand_image_tokens(ids: np.ndarray, grids: np.ndarray, processors: Processors) -> np.ndarray:
    """Repeat the token of each image as often as the vision tower gives features for the image.

    The tower merges 2 x 2 patches into one feature: an image of 8 x 6 patches has 12 tokens.
    """
    if processors.family.around:
        ids = surround_image_tokens(ids, processors)
    repeats = np.ones(len(ids), int)
    repeats[ids == processors.image_token] = grids.prod(1) // processors.vision.merge**2
    return np.repeat(ids, repeats)


# --------------------------------------------------------------------------------------------------
# 2. Comparisons are kept in shards, safetensors files that later stages map into memory.

RAGGED = {  # vectors of different lengths, one after the other in a flat array:
    "rows": np.int32,  # of each comparison, the tokens of its prompt and responses
    "layouts": np.uint8,  # of each comparison, JSON: lengths in its row, ranks, its images, ...
    "images": np.uint8,  # the encoded files, each once, however many comparisons share it
}  # vector i is flat[offsets[i] : offsets[i + 1]]
INDEX = {  # numbers of each comparison or image, for planning and for overlap checks
    "tokens": np.int32,
    "patches": np.int32,
    "response_counts": np.int32,
    "prompt_hashes": np.uint64,
    "image_hashes": np.uint64,
}


def flatten(arrays: list, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate vectors; return them flat, and their offsets [vectors + 1]."""
    flat = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
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
        index["patches"].append(c.grids.prod(1).sum())
        index["response_counts"].append(len(c.responses))
        index["prompt_hashes"].append(prompt_hash(c.prompt, image_token))
    index["image_hashes"] = list(map(hash_of, images))
    images = [np.frombuffer(image, np.uint8) for image in images]
    tensors = {name: np.array(index[name], dtype) for name, dtype in INDEX.items()}
    for (name, dtype), vectors in zip(RAGGED.items(), (rows, layouts, images)):
        tensors[name], tensors[f"{name}_offsets"] = flatten(vectors, dtype)
    notes["comparisons"] = len(comparisons)
    write_tensors(path, tensors, {"notes": json.dumps(notes)})


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
        with reading(self.folder / "index.safetensors"):
            self.index = load_file(self.folder / "index.safetensors")  # see INDEX
        if len(self.index["tokens"]) != self.starts[-1]:
            raise UserError(f"{folder}: index.safetensors is of other shards; run 01_data.py again")
        self.chosen = np.arange(self.starts[-1])  # [len(self)], numbers in the order of shards
        if text_only:
            self.chosen = np.flatnonzero(self.index["patches"] == 0)

    def hashes(self, name: str) -> np.ndarray:
        """All "prompt_hashes" or "image_hashes" in the shards."""
        return self.index[name]

    def response_counts(self) -> np.ndarray:
        """N of every comparison, [len(self)]."""
        return self.index["response_counts"][self.chosen]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the packed row and image patches of every comparison, [len(self)] each."""
        return self.index["tokens"][self.chosen], self.index["patches"][self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Comparison:
        number = int(self.chosen[i])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        file = self.folder / self.info["shards"][shard][0]
        comparison = open_shard(file)[number - self.starts[shard]]
        comparison.origin = f"{self.folder}[{number}]"
        if "id" in comparison.record:
            comparison.origin += f" (id {comparison.record['id']})"
        return comparison


# --------------------------------------------------------------------------------------------------
# 3. The stage. Every rank makes shards of its own chunks of lines; rank 0 writes the index.


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
    backbone: str = option("tests/tiny", "checkpoint with the tokenizer and image processor")
    max_length: int = option(4096, "most tokens of a prompt and a response; longer is rejected")
    max_pixels: int = option(501760, "larger images are scaled down; 0: the backbone's own limit")
    holdout: float = option(0.05, "share of the prompts that go to <name>_holdout, for validation")
    without_images: bool = option(False, "leave out all images, keep the text")
    allow_outside: bool = option(False, "also read images outside the folders of --source")
    shard_size: int = option(512, "lines of input that make one shard")
    world_size: float = option(1.0, "size of the embedded world, as a multiple of the default")
    seed: int = option(0, "seed of the embedded world")


def prepare(name: str, lines, processors, settings, holdout: float, within=None) -> None:
    """Prepare one data set; all ranks call it with the same lines.

    A chunk of `shard_size` lines becomes one file, whose name has a hash of all it is made of. A
    file that is there is done, so an interrupted run continues. The result does not depend on the
    number of ranks. Memory does not grow with the number of lines, except for the index: 20 bytes a
    comparison and 8 an image.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names = [name, f"{name}_holdout"] if holdout > 0 else [name]
    folders = [Path(settings.out, name) for name in names]
    if rank == 0 and (folders[0] / "dataset.json").is_file():
        # The last run was finished. Begin anew: pictures may have been mended since then.
        for folder in folders:
            for old in [folder / "dataset.json", *folder.glob("shard-*")]:
                old.unlink(missing_ok=True)
    dist.barrier()

    shards = []  # names of files
    progress = tqdm(desc=name, unit=" lines", disable=rank > 0, mininterval=1)
    while chunk := list(itertools.islice(lines, settings.shard_size)):
        progress.update(len(chunk))
        number = len(shards)
        key = chunk_key(chunk, processors, settings, holdout)
        shards.append(f"shard-{number:05d}-{key}.safetensors")
        paths = [folder / shards[number] for folder in folders]
        if number % world != rank or all(path.is_file() for path in paths):
            continue
        kept, held_out, notes = encode_chunk(chunk, processors, settings, holdout, within)
        write_shard(paths[0], kept, processors.image_token, **notes)
        if holdout > 0:
            write_shard(paths[1], held_out, processors.image_token)
    progress.close()
    dist.barrier()
    if rank == 0:
        finish(folders, shards, processors, settings)  # index, dataset.json, rejected.jsonl


def chunk_key(chunk: list[Line], processors, settings, holdout: float) -> str:
    """Hash all that the shards of a chunk are made of. Files count by size and time."""
    lines = [(file, number) for file, number, _ in chunk]
    files = {file for file, _ in lines} | {__file__, str(WORLD)}
    stats = [os.stat(file) for file in sorted(files) if os.path.exists(file)]
    times = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    options = vars(settings) | {"out": "", "holdout": holdout}
    made_of = [FORMAT, lines, times, options, processors.fingerprint, processors.pixels]
    return f"{hash_of(json.dumps(made_of).encode()):016x}"


def encode_chunk(chunk: list[Line], processors, settings, holdout: float, within):
    """Return the comparisons to keep and to hold out, and notes on lines and fields not used."""
    kept, held_out, rejected, unused = [], [], [], Counter()
    length, text_only = settings.max_length, settings.without_images
    for file, number, read in chunk:
        folder = Path(file).parent
        try:
            record = read()
            comparison = encode_record(record, processors, length, folder, text_only, within)
        except Unusable as error:
            rejected.append({"file": file, "line": number, "reason": str(error)[:500]})
            continue
        # A hash of the prompt decides the side, so the same prompt is never on both.
        share = share_of(comparison.prompt.tobytes() + b"".join(comparison.images))
        side = held_out if share < holdout else kept
        side.append(comparison)
        unused.update(sorted(record.keys() - USED))
    return kept, held_out, {"rejected": rejected, "unused": unused}


def main(settings: Settings) -> None:
    processors = load_processors(settings.backbone, settings.max_pixels)
    if settings.mix:
        settings.source += mix_sources(settings.mix, settings.mix_folder)
    name = "train"  # of the embedded world's
    if settings.source:
        name = settings.name or settings.mix or default_name(settings.source[0])
        parts = [open_source(source, settings.seed) for source in settings.source]
        holdout = 0 if official_metric(settings.source) else settings.holdout  # benchmarks: whole
        folders = [data_folder(source) for source in settings.source]
        within = None if settings.allow_outside else folders
        prepare(name, itertools.chain(*parts), processors, settings, holdout, within)
    else:
        for part, lines, holdout in world_sets(settings):
            prepare(part, lines, processors, settings, holdout)
    if dist.get_rank() == 0:
        folder = Path(settings.out, name)
        if len(Comparisons(folder)):
            print("Next: torchrun --standalone --nproc_per_node=2 02_model.py")
        else:
            print(f"{folder} is empty: nothing to go on with; rejected.jsonl has the reasons")


# --------------------------------------------------------------------------------------------------
# Appendix: file formats and the JSON form. First what all stages share: errors in one line, files
# that are whole or absent, the process group, the command line.


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


def make_readable(path: Path) -> None:
    """Give a file the rights of any new file; safetensors writes its own for this user alone."""
    mask = os.umask(0)  # setting it is the only way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_file(path: Path, content: str | bytes) -> None:
    with in_place_of(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with in_place_of(path) as temporary:
        save_file(tensors, temporary, metadata)
        make_readable(temporary)


def hash_of(content: bytes) -> int:
    """64 bits of the SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def prompt_hash(prompt: np.ndarray, image_token: int | None) -> int:
    """Hash a prompt's text: the same for the same words about another picture."""
    return hash_of(prompt[prompt != image_token].astype(np.int32).tobytes())


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
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
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


# The end of `prepare`, on rank 0.


def finish(folders: list[Path], shards: list[str], processors, settings) -> None:
    """Write rejected.jsonl, index.safetensors and dataset.json; print a summary."""
    sizes = {folder: [] for folder in folders}  # (shard, number of comparisons)
    counts, rejected, unused = Counter(), 0, Counter()
    with in_place_of(folders[0] / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for folder, shard in itertools.product(folders, shards):
            with reading(folder / shard), safe_open(folder / shard, framework="np") as opened:
                notes = json.loads(opened.metadata()["notes"])
            sizes[folder].append((shard, notes["comparisons"]))
            counts[folder] += notes["comparisons"]
            unused.update(notes.get("unused", {}))
            for line in notes.get("rejected", []):
                file.write(json.dumps(line) + "\n")
                rejected += 1
    kept = counts.total()
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
        write_index(folder, sizes[folder])
        info |= {"name": folder.name, "shards": sizes[folder]}
        write_file(folder / "dataset.json", json.dumps(info, indent=1))
        with_images += np.count_nonzero(Comparisons(folder).sizes()[1])

    summary = f"read {kept + rejected} = kept {kept} + rejected {rejected}"
    held_out = f"{kept - counts[folders[0]]} held out"
    images = "WITHOUT IMAGES" if settings.without_images else f"{with_images} with pictures"
    print(f"{folders[0]}: {summary}; {held_out}, {images}", flush=True)
    for name, count in sorted(unused.items()):
        print(f"  not used: {name} ({count} lines)")


def write_index(folder: Path, shards: list[tuple[str, int]]) -> None:
    """Gather the INDEX of all shards in one file, so that opening a data set opens no shard."""
    columns = {name: [np.zeros(0, dtype)] for name, dtype in INDEX.items()}
    for shard, _ in shards:
        with safe_open(folder / shard, framework="np") as file:
            for name in INDEX:
                columns[name].append(file.get_tensor(name))
    index = {name: np.concatenate(column) for name, column in columns.items()}
    write_tensors(folder / "index.safetensors", index, {"format": str(FORMAT)})


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
    "rule?": (str, dict),  # how 06 checks an answer
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
        forms.setdefault(option if kind is type else kind, option)
    if object in forms:
        return
    name = NAMES.get(type(value), type(value).__name__)
    wanted = " or ".join(NAMES[kind] for kind in forms)
    require(type(value) in forms, f"{place}: {name} where {wanted} should be")
    form = forms[type(value)]
    if isinstance(form, set):
        require(value in form, f"{place}: {value!r}, not one of {sorted(form)}")
    elif isinstance(value, str):
        half = re.search("[\ud800-\udfff]", value)  # JSON can have one, UTF-8 cannot
        require(not half, f"{place}: half of a surrogate pair")
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check(item, form[0], f"{place}[{i}]")
    elif isinstance(form, dict):
        for key, part in form.items():
            inner = key.removesuffix("?")
            path = f"{place}.{inner}" if place else inner
            if value.get(inner) is not None:
                check(value[inner], part, path)
            else:
                require(inner != key, f"missing field: {path}")


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
        messages.append({"role": turn["role"], "content": content})
    last = messages[-1]["role"] if messages else "of nobody"
    require(last == "user", f"prompt: ends with the role {last!r}, not 'user'")
    return messages


def image_parts(messages: list[dict]) -> list[dict]:
    lists = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return [part for part in itertools.chain(*lists) if part["type"] == "image"]


def place_images(messages: list[dict], images: list) -> list:
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
    with explaining(f"unreadable image: {image}", Exception, Unusable):
        path = (folder / image).resolve()
        outside = within is not None and not any(path.is_relative_to(root) for root in within)
        require(not outside, f"image outside the data's folder: {image}; --allow_outside reads it")
        size = path.stat().st_size
        require(path.is_file(), f"unreadable image: {image}: not a file")  # a pipe would block
        require(size <= 2**28, f"unreadable image: {image}: a file of more than 256 MB")
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
    image: object | None  # the image processor; None: the backbone is text-only
    family: Family
    image_token: int | None  # id of <|image_pad|>
    end_token: int  # id of <|im_end|>, the token that ends the assistant's turn
    vision: VisionShape | None  # its sides of patches and windows
    fingerprint: str  # hash of vocabulary, merges and chat template

    def save(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.image:
            self.image.save_pretrained(folder)

    @property
    def pixels(self) -> dict | None:
        """The image processor's limits, on which the number of an image's tokens depends."""
        if self.image is None:
            return None
        return {"tiles": self.image.max_patches} if self.family.tiles else dict(self.image.size)

    @pixels.setter
    def pixels(self, limits: dict) -> None:
        if self.family.tiles:
            self.image.max_patches = limits["tiles"]
        else:
            self.image.size = dict(limits)


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


def use_pixel_limits(processors: Processors, sets: list[Comparisons]) -> None:
    """Give the image processor the limits of prepared data, so that tokens and patches agree."""
    limits = [data_set.info["pixels"] for data_set in sets if data_set.info["pixels"]]
    if any(other != limits[0] for other in limits):
        raise UserError("the data sets have different --max_pixels; prepare them with the same")
    if limits and processors.image:
        processors.pixels = limits[0]


def open_images(comparison: Comparison, processors: Processors) -> list[Image.Image]:
    """Decode the images of a comparison for the model."""
    with explaining(comparison.origin, Unusable):
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
    table: int = 0  # side of a table of positions that is stretched over each image; 0: none


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
    side = processors.image.size["height"] // processors.vision.patch
    return processors.image.get_number_of_image_patches(size[1], size[0]), side, side


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


def add_source(name: str, read: Callable[[], dict]) -> dict:
    return {"source": name} | read()


def data_folder(source: str) -> Path:
    """Return the folder that the pictures of a --source have to lie in."""
    name, path, _ = split_source(source)
    if name == "world":
        return Path()
    path = Path(locate(name, path)).resolve()
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
    for name, (parts, holdout) in embedded_world().SETS.items():
        lines = []
        for source, split, count in parts:
            count = int(count * settings.world_size)
            lines.append(read_world(source, split, count, f"{settings.seed}/{name}"))
        yield name, itertools.chain(*lines), holdout


# --------------------------------------------------------------------------------------------------
# Appendix: published data sets. First how they are found,


@dataclass
class Source:
    """Where published data comes from: how its files are read, what they are called on the hub, how it is scored."""

    read: Callable[[str], Iterator[Line]]  # of a downloaded file or folder
    hub: str = ""  # "owner/name" of the data set, for the download
    metric: str = (
        ""  # of a benchmark: its official one, a name in 04 (of questions for a policy: in 06)
    )


# By the names that --source takes; all published ones enter themselves below.
SOURCES = {"jsonl": Source(read_rows), "world": Source(read_world)}


def published(
    name: str,
    hub: str = "",
    pattern: str = "**/*",
    metric: str = "",
    with_file: bool = False,
    reader: bool = False,
) -> Callable:
    """Enters the decorated function into SOURCES: what converts the rows of such files (see read_rows), or a `reader`
    that is given PATH."""

    def enter(function: Callable) -> Callable:
        of_rows = partial(read_rows, convert=function, pattern=pattern, with_file=with_file)
        SOURCES[name] = Source(function if reader else of_rows, hub, metric)
        return function

    return enter


@lru_cache
def locate(name: str, path: str) -> str:
    """PATH where something is there; otherwise the data set of that name on the hub, or the source's own, downloaded
    into the hub's cache. Rank 0 goes first, so that what other ranks ask for is there already."""
    if path and (Path(path).exists() or glob.glob(path)):
        return path
    repo = path or SOURCES[name].hub
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.endswith(DATA_FILES):
        what = f"A source is a file or name:PATH, name one of {', '.join(SOURCES)}"
        if SOURCES[name].hub:
            folder = (
                str(Path(path).parent)
                if path.endswith(DATA_FILES) or glob.has_magic(path)
                else path
            )
            what = f"{download_command(SOURCES[name].hub, folder)} fetches it"
        raise UserError(f"--source {path or name}: nothing there. {what}")
    from huggingface_hub import snapshot_download  # comes with transformers

    if dist.get_rank() > 0:
        dist.barrier()
    try:
        return snapshot_download(repo, repo_type="dataset")
    except Exception as error:  # offline, no such set, not logged in, disk full: the hub's client raises many kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise UserError(
            f"--source {path or name}: nothing there, nor could it be downloaded ({reason}). Where the hub can be "
            f"reached: {download_command(repo, repo)}, then --source {name}:{repo}"
        ) from None
    finally:
        if dist.get_rank() == 0:
            dist.barrier()


def download_command(repo: str, folder: str) -> str:
    return f"hf download {repo} --repo-type dataset --local-dir {folder}"


# The paper's training data, 2.85 M pairs by its count: the seven sets that it keeps, whole, so none has a limit.
MIXES = {
    "basereward": [
        "rlaif-v",  # 83 k
        "mmpr",  # 2 M
        # R1-Reward, 200 k, is not published as one set: the paper links MM-RLHF, its authors released R1-Reward-RL.
        "mm-rlhf",
        "r1-reward",
        "tulu-3-if",  # 65 k
        "olmo-2",  # 378 k
        "ultrafeedback-hard",  # 63 k
        # Others, 63 k: 5 k of chat, 41 k of UltraFeedback and 17 k of WildChat; which sets and splits is inferred from
        # these numbers.
        "swe-arena",
        "tulu-3-ultrafeedback",
        "wildchat:data/wildchat_reused_on_policy_70b-*",
    ]
}


def mix_sources(mix: str, folder: str) -> list[str]:
    """The sources of a mixture, in `folder` by their names on the hub; UserError says how to get what is missing."""
    if mix not in MIXES:
        raise UserError(f"--mix {mix}: not one of {', '.join(MIXES)}")
    parts = [split_source(part)[:2] for part in MIXES[mix]]
    repos = [(SOURCES[name].hub, f"{folder or '.'}/{SOURCES[name].hub}") for name, _ in parts]
    missing = [download_command(*repo) for repo in repos if not Path(repo[1]).is_dir()]
    if missing:
        said = f"--mix {mix}: {len(missing)} of its sets are missing in --mix_folder:"
        raise UserError("\n    ".join([said, *missing]))
    return [f"{name}:{place}/{path}" for (name, path), (_, place) in zip(parts, repos)]


# then a catalogue to look things up in and add to rather than read through. An entry is a function that makes a row as
# published a record in this project's JSON form, or raises Unusable with the reason; above it stand its name for
# --source, the set's name on the hub, which of its files are read, and how a benchmark is scored. Fields are those of
# the sets' cards on the hub or of their authors' loaders; "unconfirmed" marks what neither says.


def message(who: str, text: str | list) -> dict:
    """One turn of a conversation, whatever its set calls the two sides."""
    return {
        "role": {"human": "user", "gpt": "assistant"}.get(who.lower(), who.lower()),
        "content": text,
    }


def question(text: str) -> list[dict]:
    return [message("user", with_images(text))]


def pair(row: dict, prompt: object, **more) -> dict:
    """A record of a row that calls its two responses chosen and rejected."""
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], **more}


def last_turns(chosen: list[dict], rejected: list[dict], **more) -> dict:
    """Two whole conversations as one prompt and two responses: everything up to the last turn has to be the same."""
    keys = ("role", "content")
    chosen, rejected = (
        [{key: turn[key] for key in keys} for turn in each] for each in (chosen, rejected)
    )
    require(
        chosen[:-1] == rejected[:-1],
        "chosen and rejected do not share everything up to the last assistant turn",
    )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], **more}


def list_of(image: object) -> list:
    return image if isinstance(image, list) else [image]


def video_frames(video: str, folder: Path, count: int) -> list[str]:
    """At most `count` pictures, evenly spread, of a video that is published as a folder of frames. Without frames it is
    the video's own path, which will be an unreadable image."""
    names = [path.name for path in (folder / video).glob("*") if path.is_file()]
    names.sort(key=lambda name: (len(name), name))  # frame 9 before frame 10
    spread = np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)
    return [f"{video}/{names[i]}" for i in spread] or [video]


# Training sets; first two forms that many sets have.


@published("trl")
def trl(row: dict) -> dict:
    """TRL's forms of preference data (its docs, Dataset formats): conversations or strings, with `prompt` or with an
    implicit one. Of two strings the prompt is what both begin with, up to a whole word, where TRL would cut words."""
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    if row.get("prompt"):
        return {key: value for key, value in row.items() if key != "image"} | {"images": images}
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        return last_turns(chosen, rejected, images=images)
    same = re.match(r"(.*\s)?", os.path.commonprefix([chosen, rejected]), re.DOTALL).end()
    require(same, "no prompt, and chosen and rejected begin with different words")
    return {
        "prompt": chosen[:same].rstrip(),
        "chosen": chosen[same:],
        "rejected": rejected[same:],
        "images": images,
    }


@published("llama-factory")
def llama_factory(row: dict) -> dict:
    """LLaMA-Factory's preference data (its data/README.md): `conversations` of {from, value} with chosen and rejected
    {from, value}, or `instruction` and `input` with chosen and rejected strings; `system`, `history` and `images` where
    there are any."""
    for key in ("tools", "videos", "audios"):
        require(not row.get(key), f"{key}: not supported")
    if row.get("conversations"):
        turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        row = row | {key: row[key]["value"] for key in ("chosen", "rejected")}
    else:
        turns = [
            turn
            for asked, said in row.get("history") or []
            for turn in (("human", asked), ("gpt", said))
        ]
        turns.append(("human", "\n".join(filter(None, (row["instruction"], row.get("input"))))))
    if row.get("system"):
        turns.insert(0, ("system", row["system"]))
    return pair(
        row,
        [message(who, with_images(text)) for who, text in turns],
        images=row.get("images") or [],
    )


@published("rlaif-v", "openbmb/RLAIF-V-Dataset", "**/*.parquet")
def rlaif_v(row: dict) -> dict:
    """83,132 pairs with one picture, inside the parquet file. origin_split is a JSON string, not a split."""
    return pair(
        row, row["question"], images=[row["image"]], id=row["idx"], category=row["origin_dataset"]
    )


@published("mmpr", "OpenGVLab/MMPR-v1.2", reader=True)
def read_mmpr(path: str) -> Iterator[Line]:
    """About 2 M pairs: meta.json is {name: {root, annotation}}, both below "MMPR-v1.2/"; image is one path or several,
    below root, and the question may have <image> marks. It comes packed:

    cat images.zip_* > images.zip && unzip images.zip && unzip annotations.zip
    """

    def convert(row: dict, root: Path) -> dict:
        images = [str(root / image) for image in list_of(row["image"]) if image]
        return pair(row, question(row["question"]), images=images)

    folder = Path(path).resolve()
    if not (folder / "meta.json").is_file():
        raise UserError(f"--source mmpr:{path}: no meta.json there; PATH is the set's folder")
    for entry in json.loads((folder / "meta.json").read_bytes()).values():
        root, annotation = (
            folder / entry[key].removeprefix("MMPR-v1.2/") for key in ("root", "annotation")
        )
        yield from read_rows(str(annotation), partial(convert, root=root))


@published("mm-rlhf", "yifanzhang114/MM-RLHF", "dpo_pairs.jsonl", with_file=True)
def mm_rlhf(row: dict, file: Path) -> dict:
    """About 80,000 pairs, beside the unpacked long.zip, mcq.zip, safety.zip, short.zip and video.zip: the path of a
    picture or of the folder of a video's frames, of which 8 are taken. The reasons for the ranking, where both are
    there, are critiques."""
    path, reasons = (
        row.get("image") or row["video"],
        [row.get("chosen_reason"), row.get("rejected_reason")],
    )
    images = [path] if row.get("image") else video_frames(path, file.parent, 8)
    more = {"critiques": reasons} if all(reasons) else {}
    return pair(row, question(row["prompt"]), images=images, category=path.split("/")[0], **more)


@published("r1-reward", "yifanzhang114/R1-Reward-RL", "**/train-*.parquet")
def r1_reward(row: dict) -> dict:
    """17,261 rows. `message` is the JSON of a judge's prompt that holds both responses, `answer` is
    ["<answer>2</answer>"]; `image` is a string, by its size the picture itself in base64 (unconfirmed), else a path."""
    parts = [part for turn in json.loads(row["message"]) for part in turn["content"]]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    found = re.search(
        r"\[Response 1\]:(.*?)#+ *\[Response 2\]:(.*?)(?:#+ *\*\*Output Format|$)", text, re.DOTALL
    )
    better = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", row["answer"][0])
    require(better, f"answer: {row['answer'][0]!r}")
    require(found, "message without [Response 1] and [Response 2]")
    image = row["image"]
    require(
        image or all(part["type"] == "text" for part in parts),
        "image: empty, though the message shows one",
    )
    if isinstance(image, str) and len(image) > 1000:  # no path
        image = base64.b64decode(
            image.rpartition(",")[2], validate=True
        )  # without "data:image/jpeg;base64,"
    responses = [found[1].strip(), found[2].strip()]
    return one_of_two(
        row["question"], responses, ("1", "2"), better[1], images=[image] if image else []
    )


@published("mmif", "ChrisDing1105/MMIF-23k", reader=True)
def read_mmif(path: str) -> Iterator[Line]:
    """MMIF-23k: LLaMA-Factory's form, in a .json below dpo/ (beside one for fine-tuning); that picture paths are
    relative to the set's folder is unconfirmed."""
    folder = (Path(path) if Path(path).is_dir() else Path(path).parent).resolve()

    def convert(row: dict) -> dict:
        record = llama_factory(row)
        return record | {"images": [str(folder / image) for image in record["images"]]}

    return read_rows(path, convert, "**/dpo/*.json")


@published("omnialign-v-dpo", "PhoenixZ/OmniAlign-V-DPO", "*.jsonl")
def omnialign_v_dpo(row: dict) -> dict:
    """About 133,000 pairs in one .jsonl for each kind, beside the unpacked images.tar; keys as in the authors'
    train_dpo.py, which sets the picture before the prompt whatever place <image> has."""
    return pair(row, row["prompt"].replace("<image>", "").strip(), images=list_of(row["image"]))


@published("ultrafeedback-all", "openbmb/UltraFeedback")
def ultrafeedback_all(row: dict) -> dict:
    """63,967 prompts, each with up to four responses ranked by overall_score, as one comparison; equal scores tie."""
    answers = row["completions"]
    scores = [float(answer["overall_score"]) for answer in answers]
    require(all(map(math.isfinite, scores)), "overall_score: not a number")
    return {
        "prompt": row["instruction"],
        "responses": [answer["response"] for answer in answers],
        "ranks": [1 + sum(other > score for other in scores) for score in scores],
        "critiques": [answer["critique"] for answer in answers],
        "category": row["source"],
    }


@published("ultrafeedback-hard", "openbmb/UltraFeedback")
def ultrafeedback_hard(row: dict) -> dict:
    """The same, of each prompt only the pair with the largest score difference: the paper's Ultra-Hard. (The copy
    called "binarized" pairs the best with a random other.)"""
    record = ultrafeedback_all(row)
    extremes = [record["ranks"].index(extreme(record["ranks"])) for extreme in (min, max)]
    return record | {
        key: [record[key][i] for i in extremes] for key in ("responses", "ranks", "critiques")
    }


def shp(row: dict) -> dict:
    """SHP: 348,718 pairs of comments on a post; labels is 1 where A is the better one, 0 where B is. As is common, only
    pairs whose scores are in a ratio of 2 or more are taken, and of a post the first 5 (read_shp)."""
    require(row["score_ratio"] >= 2, "score_ratio below 2")
    require(row["labels"] in (0, 1), f"labels: {row['labels']!r}, neither 1 nor 0")
    chosen, rejected = (row[f"human_ref_{letter}"] for letter in ("AB" if row["labels"] else "BA"))
    more = {"id": row["post_id"], "category": row["domain"]}
    return {"prompt": row["history"], "chosen": chosen, "rejected": rejected, **more}


@published("shp", "stanfordnlp/SHP", reader=True)
def read_shp(path: str) -> Iterator[Line]:
    """A folder for each of 18 subjects, JSON lines in train.json. Every rank reads all, to count a post's pairs."""
    pairs = Counter()
    for file, number, read in read_rows(path, shp, "**/train*.json*"):
        try:
            post = read()["id"]
        except Unusable:
            pass  # said again by whoever the row belongs to
        else:
            pairs[post] += 1
            read = (
                partial(require, False, "more than 5 pairs of this post")
                if pairs[post] > 5
                else read
            )
        yield file, number, read


@published("olmo-2", "allenai/olmo-2-0425-1b-preference-mix", "**/*.parquet")  # 378,000
@published(
    "wildchat", "allenai/tulu-3-wildchat-ultrafeedback", "**/*.parquet"
)  # five named splits, no "train"
@published(
    "tulu-3-ultrafeedback", "allenai/tulu-3-ultrafeedback-cleaned-on-policy-70b", "**/*.parquet"
)  # 41,600
@published("tulu-3-if", "allenai/tulu-3-IF-augmented-on-policy-70b", "**/*.parquet")  # 65,551
def conversations(row: dict) -> dict:
    """chosen and rejected are whole conversations, user turns included; `prompt` is a string or missing."""
    return last_turns(row["chosen"], row["rejected"], id=row.get("id"))


@published("swe-arena", "bigcode/bigcodearena-preference-5k", "**/*.parquet")
def swe_arena(row: dict) -> dict:
    """SWE-arena, now BigCodeArena: about 5,000 votes on two conversations with the same user; messages are [role, text]
    (what the two are is unconfirmed). Ties and votes for neither are dropped, and so are conversations of several turns
    in which the two models' earlier answers differ."""
    vote = row["feedback"]["vote_type"]
    require(vote in ("vote_model_A", "vote_model_B"), f"no better response: {vote}")
    ranked = ("model_A", "model_B") if vote == "vote_model_A" else ("model_B", "model_A")
    chosen, rejected = (
        [message(*turn) for turn in row["states"][model]["messages"]] for model in ranked
    )
    return last_turns(chosen, rejected, id=row["chat_session_id"])


@published("hh-rlhf", "Anthropic/hh-rlhf", "**/train.jsonl.gz")
def hh_rlhf(row: dict) -> dict:
    """Two transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ...", that should differ in the last answer only."""

    def turns(transcript: str) -> list[dict]:
        start, *pieces = re.split("\n\n(Human|Assistant):", transcript)
        require(pieces and not start.strip(), "no transcript that begins with Human: or Assistant:")
        return [message(who, text.strip()) for who, text in zip(pieces[::2], pieces[1::2])]

    return last_turns(turns(row["chosen"]), turns(row["rejected"]))


# Benchmarks. What a benchmark calls right gets rank 1; the responses stay in the published order, so that another
# system's scores fit, and that order decides nothing. A row that does not say clearly which response is right is
# Unusable. "category" is the benchmark's own grouping. The metrics are in 04, by the same names.


def several_of_each(row: dict, **more) -> dict:
    """A record of a row that has lists of responses under chosen and rejected, all of them right, or wrong."""
    chosen, rejected = row["chosen"], row["rejected"]
    ranks = [1] * len(chosen) + [2] * len(rejected)
    return {
        "prompt": row["prompt"],
        "responses": [*chosen, *rejected],
        "ranks": ranks,
        "id": row["id"],
        **more,
    }


def one_of_two(prompt: object, responses: list, labels: tuple, label: object, **more) -> dict:
    """`label` is the one of the two `labels` that says that the first, or the second, response is right."""
    if label not in labels or len(responses) != 2:
        raise Unusable(
            f"{label!r} does not say which of two is better; there are {len(responses)} responses"
        )
    return {
        "prompt": prompt,
        "responses": responses,
        "ranks": [1, 2] if label == labels[0] else [2, 1],
        **more,
    }


@published("vl-rewardbench", "MMInstruction/VL-RewardBench", metric="vl-rewardbench")
def vl_rewardbench(row: dict) -> dict:
    """arXiv 2411.17451, 1250 pairs; human_ranking holds the places of the two responses, 0 is better. The grouping is
    that of the official repository, by where an item comes from. Ids are not unique."""
    if row["id"].startswith(("hallucination", "RLAIF", "RLHF")):
        category = "hallucination"
    else:
        category = "reasoning" if row["id"].startswith(("mathverse", "mmmu")) else "general"
    more = {"id": row["id"], "category": category, "images": [row["image"]]}
    return one_of_two(
        row["query"], list(row["response"]), ([0, 1], [1, 0]), list(row["human_ranking"]), **more
    )


@published(
    "mm-rlhf-rewardbench",
    "yifanzhang114/MM-RLHF-RewardBench",
    "**/*.jsonl",
    "mm-rlhf-rewardbench",
    with_file=True,
)
def mm_rlhf_rewardbench(row: dict, file: Path) -> dict:
    """arXiv 2502.10391, 170 pairs over 46 ids; the category is the first of the keywords that is in the path. A video's
    frames are given as pictures, 32 as the benchmark's own code takes, not as Qwen-VL's video input; so many want a
    large --max_length."""
    media = row.get("image") or row.get("video") or ""
    category = next(
        (word for word in ("mcq", "long", "short", "safety", "video") if word in media), None
    )
    require(category, f"image or video: {media!r} names no category")
    images = [media] if row.get("image") else video_frames(media, file.parent, 32)
    return pair(row, row["prompt"], id=row["id"], group=row["id"], category=category, images=images)


# Not on the hub: github.com/facebookresearch/multimodal_rewardbench
@published("multimodal-rewardbench", "", "**/all_data.json", "multimodal-rewardbench")
def multimodal_rewardbench(row: dict) -> dict:
    """arXiv 2502.14191; the official script splits two categories by the id."""
    category, id = row["Category"], row["ID"].lower()
    if category == "safety":
        category = "safety/bias" if id.startswith("pairs") else "safety/toxicity"
    elif category == "reasoning":
        category = "reasoning/math" if id.startswith("math") else "reasoning/coding"
    more = {"id": row["ID"], "category": category, "images": [row["Image"]]}
    return one_of_two(
        row["Text"], [row["Output1"], row["Output2"]], ("Output1", "Output2"), row["Better"], **more
    )


@published("rewardbench", "allenai/reward-bench", "**/filtered*", "rewardbench")
def rewardbench(row: dict) -> dict:
    """arXiv 2403.13787, the split `filtered`, 2985 pairs; the category is the subset."""
    return pair(row, row["prompt"], id=row["id"], category=row["subset"])


@published(
    "rewardbench-prior-sets", "allenai/preference-test-sets", metric="rewardbench", with_file=True
)
def rewardbench_prior_set(row: dict, file: Path) -> dict:
    """The older test sets that count half in RewardBench's score; a file's name begins with the set, shp-00000.parquet.
    `chosen` and `rejected` are texts after the turns in `prompt`, or whole conversations."""
    category = re.split(r"[-.]", file.name)[0]
    if isinstance(row["chosen"], list):
        return last_turns(row["chosen"], row["rejected"], category=category)
    return pair(row, row["prompt"], category=category)


@published("rewardbench-2", "allenai/reward-bench-2", metric="rewardbench-2")
def rewardbench_2(row: dict) -> dict:
    """arXiv 2506.01937, 1865 prompts: one right response of four; of Ties several right, many wrong."""
    right, wrong, correct, total = (
        row[key] for key in ("chosen", "rejected", "num_correct", "total_completions")
    )
    counts = f"{len(right)} chosen and {len(wrong)} rejected, but {correct} correct of {total}"
    require(len(right) == correct and len(right) + len(wrong) == total, counts)
    return several_of_each(row, category=row["subset"])


@published("rm-bench", "THU-KEG/RM-Bench", "**/total_dataset.json", "rm-bench", with_file=True)
def rm_bench(row: dict, file: Path) -> dict:
    """arXiv 2410.16184, 1327 prompts, 3 chosen and 3 rejected: concise, detailed plain, detailed markdown.
    total_dataset.json has the domain in each row; chat_filtered.json and the like only in their names."""
    right, wrong = len(row["chosen"]), len(row["rejected"])
    require(right == wrong == 3, f"{right} chosen and {wrong} rejected, not 3 styles of each")
    place = row.get("domain") or file.name
    domain = next(
        (domain for domain in ("chat", "code", "math", "safety") if domain in place), None
    )
    require(domain, f"domain: {place!r} is none of chat, code, math and safety")
    return several_of_each(row, category=domain)


@published("judgebench", "ScalerLab/JudgeBench", metric="judgebench")
def judgebench(row: dict) -> dict:
    """arXiv 2410.12784: 350 pairs of GPT-4o's responses and 270 of Claude 3.5 Sonnet's, one file each. The category is
    the first part of `source`, "mmlu-pro-law"."""
    categories = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"}
    categories |= {"livebench-math": "math", "livecodebench": "coding"}
    category = next(
        (name for start, name in categories.items() if row["source"].startswith(start)), None
    )
    require(category, f"source: {row['source']!r} begins with none of {', '.join(categories)}")
    more = {"id": row["pair_id"], "category": category, "subset": row["response_model"]}
    return one_of_two(
        row["question"],
        [row["response_A"], row["response_B"]],
        ("A>B", "B>A"),
        row["label"],
        **more,
    )


# Not on the hub: github.com/princeton-nlp/LLMBar, its folder Dataset/LLMBar
@published("llmbar", "", "**/dataset.json", "llmbar", with_file=True)
def llmbar(row: dict, file: Path) -> dict:
    """arXiv 2310.07641, 419 pairs in files dataset.json, each in a folder named after its subset."""
    subset = file.parent.name if file.stem == "dataset" else file.stem
    return one_of_two(
        row["input"], [row["output_1"], row["output_2"]], (1, 2), row["label"], category=subset
    )


# Questions for a policy: the prompt in the words of the benchmark, `answer`, and the `rule` by which 06 checks it. One
# without an answer, as in most test splits, is rejected. First three sets to train on.

RULES = {  # how 06 can check an answer: what the answer looks like, and what a rule may say beside its kind
    "text": (r"(?s).*\w.*", {}),
    "letter": (r"[A-Z]", {"options": list}),
    "yes_no": (r"(?i)yes|no", {}),
    "number": (r".*\d.*", {"type": str, "precision": int, "unit": str}),
}
LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA's words, since then everyone's


def check_rule(rule: object, answer: object) -> None:
    """Raises Unusable unless `rule`, a kind of RULES or {"kind": ..., and what it may say}, can check `answer`."""
    said = rule if isinstance(rule, dict) else {"kind": rule}
    kind, text = said.get("kind"), str(answer).strip()
    require(
        isinstance(kind, str) and kind in RULES, f"rule: {kind!r}; known are {', '.join(RULES)}"
    )
    form, may_say = RULES[kind]
    for key, value in said.items():
        if key != "kind" and not isinstance(value, may_say.get(key, ())):
            raise Unusable(f"rule: {kind} with {key} = {value!r}")
    require(re.fullmatch(form, text), f"answer: {answer!r} is none that the rule {kind} can check")
    if said.get("options"):
        count = len(said["options"])
        require(ord(text) - ord("A") < count, f"answer: {answer!r} of {count} options")


def ask(text: str, image: str | bytes | dict, **more) -> dict:
    """A record that asks about one picture, which stands before the text."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"prompt": [message("user", content)], "images": [image], **more}


def lettered(options: list[str]) -> str:
    """Options one a line, each after its letter: "A. red", "B. blue"."""
    return "\n".join(
        f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)
    )


@published("vstar", "craigwu/seal_vqa_data", "**/*_data.json")
def vstar(row: dict) -> dict:
    """The training data of SEAL: GQA_data, vaw_attribute_data, spatial_relation_data and llava_focus_data.json, with
    the pictures in gqa/images/, coco2014/train2014/ and coco2017/train2017/ beside them. The first turn names the
    objects to look at before the question, in front of which "<object>." ends the line; it is cut off there, and rows
    without objects (negative_data and llava_instruct_data.json) are left out, both as DeepEyes did (arXiv 2505.14362),
    whose three sets of prompts are the paper's. The answers are sentences. Of those that begin with Yes or No that word
    is checked; the others have to be matched whole, which few policies will do, so it is the reward model that tells
    their answers apart. (DeepEyes had a language model compare them.) Fields as in SEAL's train.py and in readers of
    others; the files themselves we have not seen."""
    require(row["target_instances"], "no target_instances: not a question about objects")
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    text = asked.split("<object>.\n")[-1].replace("<image>", "").strip()
    said = re.match(r"(Yes|No)([,.]|$)", answered)
    answer, rule = (said[1], "yes_no") if said else (answered, "text")
    return ask(text, row["image"], answer=answer, rule=rule, category="vstar")


@published("arxivqa", "MMInstruction/ArxivQA", "**/*.jsonl")
def arxivqa(row: dict) -> dict:
    """arxivqa.jsonl and images.tgz, written by GPT-4V and not cleaned: options with and without letters ("A) red");
    labels like "B", "B)", "[B]" or the whole option; separators and headings among the options, rows with which are
    left out. The set has no prompt of its own. Fields and flaws as in readers of others; the file we have not seen."""
    options = [option.strip() for option in row["options"]]
    odd = any(option in ("", "-") or option.startswith("#") for option in options)
    require(not odd, "options: one of them is empty, a separator or a heading")
    own = [
        re.match(rf"[(\[]?{a}[.):\]]+\s*(.+)", option)
        for a, option in zip(string.ascii_uppercase, options)
    ]
    if all(own):  # else "B. cereus" would lose the genus
        options = [found[1] for found in own]
    label = re.match(r"[(\[]?([A-Z])(?![A-Za-z])", row["label"].strip())
    require(label, f"label: {row['label']!r} does not begin with a letter")
    text, rule = (
        f"{row['question']}\n{lettered(options)}\n{LETTER}",
        {"kind": "letter", "options": options},
    )
    return ask(text, row["image"], id=row["id"], answer=label[1], rule=rule, category="arxivqa")


@published("thinklite-vl", "russwang/ThinkLite-VL-hard-11k", "**/*.parquet")
def thinklite_vl(row: dict) -> dict:
    """The problem is "<image>", then the question with its options and instruction. There are also ground_truth and
    choices; `answer` is what the authors' own search is given (mcts.py). What it looks like decides its rule. Fields as
    in the authors' code; that a multiple choice's answer is its letter is unconfirmed."""
    answer = str(row["answer"]).strip()
    kinds = {"letter": r"[A-Z]", "yes_no": r"(?i)yes|no", "number": r"-?[\d,]*\.?\d+"}
    rule = next((kind for kind, form in kinds.items() if re.fullmatch(form, answer)), "text")
    text = row["problem"].replace("<image>", "").strip()
    return ask(text, row["image"], id=row["id"], answer=answer, rule=rule, category="thinklite-vl")


# Questions to judge a policy by; the metrics are in 06.


@published("mmbench", metric="circular", reader=True)
def read_mmbench(path: str) -> Iterator[Line]:
    """MMBench (MMBench_DEV_EN.tsv and its like from VLMEvalKit). To save space the rotations of a question have the
    index of another row where the picture should be; that row stands before them."""
    images: dict[str, str] = {}
    for file, number, read in read_rows(path, pattern="**/*.tsv"):
        row = read()
        image = row.get("image") or ""
        if len(image) > 64:  # VLMEvalKit's test of which it is
            images[row.get("index")] = image
        yield (
            file,
            number,
            partial(convert_row, partial(dict, row, image=images.get(image, image)), mmbench),
        )


def mmbench(row: dict) -> dict:
    """index, question, hint, A, B, C, D, answer, category, image (base64), l2-category (also L2-category), split.
    What is missing is empty or "nan"; the test split has no answers. The prompt is VLMEvalKit's, ImageMCQDataset.

    index = rotation * 1,000,000 + question: each question is asked again with its options rotated, and those rows are
    one group, for CircularEval."""
    given = {key: value for key, value in row.items() if value not in (None, "", "nan")}
    require("answer" in given, "no answer: the answers of the test split are not published")
    options = list(itertools.takewhile(bool, (given.get(letter) for letter in "ABCDEFGH")))
    text = f"Hint: {given['hint']}\n" if "hint" in given else ""
    text += f"Question: {given['question']}\nOptions:\n{lettered(options)}\n"
    text += "Please select the correct answer from the options above. \n"
    category = given.get("l2-category") or given.get("L2-category") or given["category"]
    more = {"id": given["index"], "group": int(given["index"]) % 1_000_000, "category": category}
    more |= {"answer": given["answer"], "rule": {"kind": "letter", "options": options}}
    return ask(text, base64.b64decode(given["image"], validate=True), **more)


@published("mme", "lmms-lab/MME", "**/*.parquet", "mme")
def mme(row: dict) -> dict:
    """Two questions with the same question_id for each picture, one answered Yes and one No. "Please answer yes or no."
    is part of the question."""
    more = {"id": row["question_id"], "group": row["question_id"], "category": row["category"]}
    return ask(row["question"], row["image"], answer=row["answer"].strip(), rule="yes_no", **more)


@published("mmstar", "Lin-Chen/MMStar", "**/*.parquet", "accuracy")
def mmstar(row: dict) -> dict:
    """The question has its options in it, "Options: A: ..., B: ..."; there are 6 categories, and 18 l2_category."""
    more = {
        "id": row["index"],
        "category": row["category"],
        "answer": row["answer"].strip(),
        "rule": "letter",
    }
    return ask(f"{row['question'].strip()}\n{LETTER}", row["image"], **more)


@published("mathvista", "AI4Math/MathVista", "**/testmini*.parquet", "accuracy")
def mathvista(row: dict) -> dict:
    """`query` is the benchmark's zero-shot prompt: a hint about the form, the question with its unit, the choices.
    `image` is a path, precision a float. The answer to a multiple choice is the choice's text; the test split has no
    answers."""
    answer = row["answer"]
    require(
        answer not in (None, ""),
        "no answer: the answers of the test split are not published; testmini has them",
    )
    if row["question_type"] == "multi_choice":
        choices = list(row["choices"])
        require(answer in choices, f"answer: {answer!r} is none of the choices")
        answer, rule = (
            string.ascii_uppercase[choices.index(answer)],
            {"kind": "letter", "options": choices},
        )
    else:
        rule = {"kind": "number", "type": row["answer_type"]}
        if row["precision"] is not None:
            rule["precision"] = int(row["precision"])
        if row["unit"]:
            rule["unit"] = row["unit"]
    more = {"id": row["pid"], "category": row["metadata"]["task"]}
    return ask(row["query"], row["decoded_image"], answer=answer, rule=rule, **more)


@published("vstar-bench", "craigwu/vstar_bench", "**/test_questions.jsonl", "accuracy")
def vstar_bench(row: dict) -> dict:
    """test_questions.jsonl, its pictures beside it; or lmms-lab/vstar-bench's parquet. The text has the options in it,
    "(A) rubber". SEAL's own evaluation compares the options' likelihoods instead of asking for a letter."""
    text = row["text"].strip()
    text = (
        text if text.endswith(LETTER) else f"{text}\n{LETTER}"
    )  # there are copies with and without it
    more = {
        "id": row["question_id"],
        "category": row["category"],
        "answer": row["label"].strip(),
        "rule": "letter",
    }
    return ask(text, row["image"], **more)


# Two benchmarks need a judge model. Their questions have no answer but `judged`: what, beside the policy's answer, is
# in a line of the file that their judge reads. 06 writes it.


@published(
    "llava-in-the-wild",
    "liuhaotian/llava-bench-in-the-wild",
    "**/questions.jsonl",
    "llava-in-the-wild",
)
def llava_in_the_wild(row: dict) -> dict:
    """The image is a name in images/; the categories are conv, detail and complex."""
    judged = {"question_id": row["question_id"], "prompt": row["text"]}
    more = {"id": row["question_id"], "category": row["category"]}
    return ask(row["text"], f"images/{row['image']}", judged=judged, **more)


@published(
    "wildvision", "WildVision/wildvision-bench", "**/vision_bench_0617/*.parquet", "wildvision"
)
def wildvision(row: dict) -> dict:
    """The version of 0617."""
    judged = {key: row[key] for key in ("question_id", "instruction", "language")}
    return ask(
        row["instruction"],
        row["image"],
        judged=judged,
        id=row["question_id"],
        category="wildvision",
    )


if __name__ == "__main__":
    run_stage(main, Settings, __doc__)
