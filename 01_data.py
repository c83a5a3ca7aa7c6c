"""Stage 1 · preference data -> shards of token ids and image bytes

    torchrun --standalone --nproc_per_node=2 01_data.py                             # the embedded world
    torchrun --standalone --nproc_per_node=2 01_data.py --source my_pairs.jsonl     # your own pairs
    torchrun --standalone --nproc_per_node=2 01_data.py --source rlaif-v:DIR@0.1    # a tenth of a published set
    torchrun --standalone --nproc_per_node=2 01_data.py --mix basereward --mix_folder DIR      # the paper's mixture

In    One JSON object a line (a prompt, a chosen and a rejected response, pictures); or a published set as it was
      published, by its name in SOURCES; or nothing at all: then the embedded world draws pictures of coloured
      shapes, asks about them, and knows which answers are right.
Out   artifacts/data/<name>/: safetensors shards of comparisons, ready to be read at random by every later
      stage; dataset.json, which says what they were made with; rejected.jsonl, every line that could not be
      used, with its file, line number and reason. Lines read = comparisons kept + lines rejected, always.

The unit of this codebase is the COMPARISON: one prompt (text and pictures) and N responses to it. A training pair
is N = 2, a benchmark item or a ranking any N, a group of GRPO rollouts N = G, a question to a policy N = 0.

What the paper (BaseReward, arXiv 2509.16127) says about data: 2.8 M pairs from seven published sets, multimodal and
text-only mixed, whole sets kept or dropped, no filter on single samples. What it leaves open, and what we
took: at most 501760 pixels an image and 4096 tokens a response with its prompt, as in the authors' public command
for a text-only reward model; the chat template of the backbone as it is.

Every chunk of `shard_size` lines becomes one shard and belongs to one rank, so the result does not depend on how
many ranks there were.

This file reads from here to `main`, the way that a line takes to a shard and back; after `main` stands an appendix,
a catalogue of the published sets that can be read.
"""

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
import shlex
import string
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.hub import cached_file

FORMAT = 3  # of the shards; raise it when their layout changes


def option(default: Any, help: str, **more) -> Any:
    """A field of a stage's settings: its default and what --help says of it. A list may be given repeatedly."""
    if isinstance(default, list):
        return field(
            default_factory=lambda: list(default),
            metadata={"help": help, "action": "extend", **more},
        )
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Settings:
    source: list[str] = option(
        [],
        "what to prepare, repeatable; none: the embedded world. A JSONL file of your own, or name:PATH, a published "
        "set (SOURCES in 01_data.py has the names): PATH is its file, its folder, a pattern of files, or its name on "
        "the hub, from where it is downloaded; name alone takes the published one. With @LIMIT after it, at most that "
        "many rows (an integer), or that share of them (like 0.5). world:PART@COUNT is a part of the embedded world",
    )
    mix: str = option(
        "",
        "a mixture of published sets to prepare as one; known: basereward, the paper's training data",
    )
    mix_folder: str = option(
        "", "folder of the mixture's sets, each in a folder by its name on the hub, owner/name"
    )
    out: str = option("artifacts/data", "folder that receives one folder for each data set")
    name: str = option(
        "",
        "name of the data set made from --source or --mix; empty: the mixture's or the first file's",
    )
    backbone: str = option(
        "tests/tiny", "checkpoint whose tokenizer, chat template and image processor are used"
    )
    max_length: int = option(4096, "longest prompt + response, in tokens; longer ones are rejected")
    max_pixels: int = option(
        501760,
        "largest picture in pixels, larger ones are scaled down (the authors': 501760); 0: the backbone's limit",
    )
    holdout: float = option(
        0.05, "share of the prompts set aside in <name>_holdout for validation; of a benchmark none"
    )
    without_images: bool = option(
        False, "leave all pictures out, where they are not at hand; the text is kept"
    )
    allow_outside: bool = option(
        False, "read pictures whose paths or links lead out of the folders of --source, too"
    )
    shard_size: int = option(512, "lines of input that make one shard")
    world_size: float = option(
        1.0, "size of the embedded world's data sets, as a multiple of the default"
    )
    seed: int = option(0, "seed of the embedded world")


# ---------------------------------------------------------------------------------------------------------------------
# What all stages share: errors in one line, the command line, the process group, files that are whole or absent.


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class Unusable(ValueError):
    """Why one line of data, or one comparison, cannot be used."""


def require(fine: object, reason: str) -> None:
    """Raises Unusable with that reason unless `fine`."""
    if not fine:
        raise Unusable(reason)


STORE = None  # what all ranks can read and write without waiting for each other


def start_distributed() -> tuple[int, int, torch.device]:
    """Joins torchrun's process group (or makes one of a single process); returns rank, world size and device."""
    global STORE
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        if "RANK" in os.environ:  # torchrun's
            STORE, rank, world = next(dist.rendezvous("env://"))
        else:  # plain `python`
            STORE, rank, world = dist.HashStore(), 0, 1
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=STORE, rank=rank, world_size=world
        )
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
        # transformers compares image tokens with image features in every forward, for which it waits for the GPU; our
        # loader has compared the grids that both come from.
        os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    return dist.get_rank(), dist.get_world_size(), device


def run_stage(main: Callable, cls, doc: str) -> None:
    """Runs a stage's `main(settings)`, the dataclass `cls` read from the command line, where --help begins with the
    script's own docstring `doc`; what the user got wrong ends in one line from one rank, not in tracebacks."""
    parser = HfArgumentParser(
        cls, description=doc.split("\n\n")[0], epilog="The script's docstring says more."
    )

    def refuse(message: str) -> None:  # argparse's own way prints the whole usage, from every rank
        raise UserError(f"{message}; --help lists all options")

    parser.error = refuse
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            refuse(f"unknown: {' '.join(unknown)}")
        start_distributed()
        main(settings)
        dist.barrier()
    except (UserError, Unusable) as error:
        start_distributed()  # where it has not been, to say it once
        say_once(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(1)
    except RuntimeError:
        if STORE is None or not STORE.check(["ended"]):
            raise
        sys.exit(1)  # another rank has said why, and left this one alone
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model, a cycle of references, that outlives its process group can abort the exit
            dist.destroy_process_group()


def check_least(settings: Any, **least: float) -> None:
    """Raises UserError where a setting is below its least value."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise UserError(f"--{name} {getattr(settings, name)}: has to be at least {value}")


def say_next(script: str, **options: str | None) -> None:
    """Prints the command of the next stage, on as many ranks as this one; options that are None are left out."""
    given = "".join(
        f" --{name} {shlex.quote(value)}" for name, value in options.items() if value is not None
    )
    print(f"Next: torchrun --standalone --nproc_per_node={dist.get_world_size()} {script}{given}")


def unless_default(settings: Any, name: str) -> str | None:
    """A setting for `say_next`, which leaves out what is the default anyway."""
    value = getattr(settings, name)
    return None if value == getattr(type(settings), name) else value


def say_once(message: str) -> None:
    """Prints what one rank or several have to say before they end; who is not the first waits until it is said, since
    torchrun ends all ranks with the first that exits."""
    try:
        STORE.set("ended", "")
        if STORE.add(f"to say: {message}", 1) > 1:
            return STORE.wait([f"said: {message}"], timedelta(seconds=10))
        print(message, file=sys.stderr, flush=True)
        STORE.set(f"said: {message}", "")
    except RuntimeError:  # the store's host has ended
        print(message, file=sys.stderr, flush=True)


@contextmanager
def explaining(
    what: str, errors: tuple | type, kind: type = Unusable, then: str = ""
) -> Iterator[None]:
    """Turns such errors into one line of that `kind`: what is wrong, why, and what to do then."""
    try:
        yield
    except errors as error:
        if isinstance(error, kind):  # has been explained
            raise
        reason = f"missing: {error}" if isinstance(error, KeyError) else str(error)
        if getattr(
            error, "strerror", None
        ):  # the system's words, and the file where it is another; not a temporary
            name = Path(str(error.filename or what)).name
            reason = (
                error.strerror
                if name in what or name.startswith(".")
                else f"{name}: {error.strerror}"
            )
        raise kind(
            f"{what}: {reason.splitlines()[0] if reason else type(error).__name__}{then}"
        ) from None


def reading(path: Path, then: str = "run 01_data.py again") -> AbstractContextManager:
    """What is wrong with a file that an earlier stage wrote, but may come from anywhere, ends in one line."""
    damage = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError)
    return explaining(f"{path}: damaged", damage, UserError, f"; {then}")


def writing(path: str | Path) -> AbstractContextManager:
    """What goes wrong while `path` is written, a full disk or somebody else's folder, ends in one line."""
    then = "; free space, or another --out, then again"
    return explaining(f"{path}: could not be written", (OSError, SafetensorError), UserError, then)


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write under, then renames, so that the file is there whole or not at all, whenever the
    process is killed or the machine stops."""
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


def make_readable(file: Path) -> None:
    """The rights of any new file; safetensors writes its own for this user alone."""
    mask = os.umask(0)  # which tells it only by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_file(path: Path, content: str | bytes) -> None:
    with in_place_of(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with in_place_of(path) as temporary:
        save_file(tensors, temporary, metadata)
        make_readable(temporary)


def hash_of(content: bytes) -> int:
    """64 bits that say which bytes these are."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def share_of(content: bytes) -> float:
    """A number from 0 to 1, always the same for the same bytes: those below 0.1 are a tenth of all."""
    return (hash_of(content) >> 32) / 2**32


# ---------------------------------------------------------------------------------------------------------------------
# From files to records. A Line is where it stands and a function that reads it, so that a rank reads only its own.

Line = tuple[str, int, Callable[[], dict]]  # file, line number, what makes it a record
LONGEST_LINE = 2**26  # bytes; of a longer one no more is held
DATA_FILES = (".parquet", ".json", ".jsonl", ".gz", ".tsv")


def read_json(line: bytes) -> dict:
    """One line of JSON, in UTF-8 as the format wants it, and without what only Python takes for JSON."""
    require(len(line) <= LONGEST_LINE, f"a line of more than {LONGEST_LINE >> 20} MB")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8: byte {line[error.start]:#x} at {error.start}") from None
    with explaining("not a line of JSON", (ValueError, RecursionError)):
        record = json.loads(text, parse_constant=not_json)
    require(isinstance(record, dict), f"not a JSON object but {type(record).__name__}")
    return record


def not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def parquet_file(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    with explaining(f"{path}: not a parquet file", (OSError, ValueError), UserError):
        return pyarrow.parquet.ParquetFile(path)


@lru_cache(1)
def parquet_rows(path: str, group: int) -> list[dict]:
    with explaining(f"row group {group} is damaged", (OSError, ValueError)):
        return parquet_file(path).read_row_group(group).to_pylist()


def file_rows(path: str) -> Iterator[Callable[[], dict]]:
    """What reads each row of a file, one function a row: .parquet, .tsv, .json if it is one list (which is read whole),
    else one JSON object a line, UTF-8, also as .gz. Empty lines are lines like others: rejected, not skipped."""
    if path.endswith(".parquet"):
        file = parquet_file(path).metadata
        for group in range(file.num_row_groups):
            for i in range(file.row_group(group).num_rows):
                yield lambda group=group, i=i: parquet_rows(path, group)[i]
        return
    if path.endswith(".tsv"):
        csv.field_size_limit(2**31 - 1)  # a field may hold a picture
        with open(path, newline="", encoding="utf-8") as file:
            yield from (partial(dict, row) for row in csv.DictReader(file, delimiter="\t"))
        return
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        if path.endswith(".json") and file.peek()[:64].lstrip().startswith(b"["):
            with explaining(f"{path}: not a list in JSON", (ValueError, RecursionError), UserError):
                rows = json.load(file)  # to the end
            yield from (partial(dict, row) for row in rows)
        while line := file.readline(LONGEST_LINE + 1):
            yield partial(read_json, line)
            while len(line) > LONGEST_LINE and not line.endswith(
                b"\n"
            ):  # the rest of one that is too long
                line = file.readline(LONGEST_LINE + 1)


def read_file(path: str) -> Iterator[Line]:
    """The rows of one file as they are; UserError where it cannot be read on, as one that is cut off."""
    broken = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)
    with explaining(f"{path}: cannot be read to its end", broken, UserError):
        for number, read in enumerate(file_rows(path), 1):
            yield path, number, read


def read_rows(
    path: str, convert: Callable = dict, pattern: str = "**/*", with_file: bool = False
) -> Iterator[Line]:
    """The rows of a published file, of all files that match `path`, or of those in the folder `path` that match
    `pattern`, in the order of their names; `convert` makes a row a record in this project's JSON form, or raises
    Unusable. `with_file`, it is also given the row's file, for what lies beside it, or its name."""
    files = [path]
    if not Path(path).is_file():
        found = Path(path).glob(pattern) if Path(path).is_dir() else glob.glob(path)
        files = sorted(file for file in map(str, found) if file.endswith(DATA_FILES))
    if not files:
        raise UserError(
            f"--source {path}: no data files there{f' that match {pattern}' if pattern != '**/*' else ''}"
        )
    for name in files:
        convert_one = partial(convert, file=Path(name)) if with_file else convert
        for _, number, read in read_file(name):
            yield name, number, partial(convert_row, read, convert_one)


def convert_row(read: Callable[[], dict], convert: Callable[[dict], dict]) -> dict:
    try:
        return convert(read())
    except Unusable:
        raise
    except KeyError as error:
        raise Unusable(f"missing field: {error.args[0]}") from None
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"not a row of this data set: {type(error).__name__}: {error}") from None


# Where the embedded world is: it draws the pictures, asks the questions and knows the answers.
WORLD = Path(__file__).parent / "tests" / "tiny" / "world.py"


@lru_cache
def embedded_world() -> ModuleType:
    if not WORLD.is_file():
        raise UserError(
            f"{WORLD}: the embedded world is not there; give your own data with --source"
        )
    spec = importlib.util.spec_from_file_location("embedded_world", WORLD)
    module = sys.modules["embedded_world"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_world(source: str, split: str, count: int, seed: str) -> Iterator[Line]:
    for index in range(count):
        yield (
            f"world/{source}/{split}",
            index + 1,
            partial(embedded_world().record, source, split, seed, index),
        )


# What --source says: a file of one's own, or a name that is looked up in SOURCES (in the appendix, after main).


def split_source(source: str) -> tuple[str, str, float]:
    """`name:PATH@LIMIT` as (name, PATH, LIMIT). What has no name in SOURCES is a path in this project's JSON form, what
    follows an @ and is no number belongs to the path. LIMIT is a number of rows, below 1 a share of them, inf: all."""
    found = re.fullmatch(r"(.*)@(\d+|0?\.\d+)", source)
    source, limit = (found[1], float(found[2])) if found else (source, math.inf)
    name, colon, path = source.partition(":")
    return (
        (name, path, limit)
        if name in SOURCES and (colon or not Path(source).exists())
        else ("jsonl", source, limit)
    )


def open_source(source: str, seed: int = 0) -> Iterator[Line]:
    """The lines of one --source, which is located at once. A share of them is chosen by a hash of the line's number, so
    that all ranks choose the same. `seed` is for the embedded world's."""
    name, path, limit = split_source(source)
    if name == "world":
        parts = embedded_world().SOURCES
        if path not in parts or not 1 <= limit < math.inf:
            raise UserError(
                f"--source {source}: should be world:PART@COUNT, PART one of {', '.join(parts)}"
            )
        return read_world(path, "train", int(limit), str(seed))
    source, path = SOURCES[name], locate(name, path)
    if source.read:
        lines = source.read(path)
    else:
        lines = read_rows(path, source.convert, source.files, source.with_file)
    if limit < 1:
        lines = (line for i, line in enumerate(lines) if share_of(b"%d" % i) < limit)
    elif limit < math.inf:
        lines = itertools.islice(lines, int(limit))
    known = {} if name == "jsonl" else {"source": name}
    return (
        (file, number, partial(lambda read: known | read(), read)) for file, number, read in lines
    )


def data_folder(source: str) -> Path:
    """Where the pictures of a --source have to be: its folder, or that of its file; of a download, whose files are
    links into the cache, the data set's part of that."""
    name, path, _ = split_source(source)
    if name == "world":
        return Path()
    folder = Path(locate(name, path)).resolve()
    folder = folder if folder.is_dir() else folder.parent
    return folder.parents[1] if folder.parent.name == "snapshots" else folder


def default_name(source: str) -> str:
    """What a data set made of this source is called: after its file or folder, or like the source itself."""
    name, path, _ = split_source(source)
    if Path(path).is_file():
        return Path(path.removesuffix(".gz")).stem
    return name if "*" in path else Path(path).name or name


def official_metric(sources: list[str]) -> str:
    """The metric by which a data set made of these sources is scored; empty if they are no benchmark."""
    names = [split_source(source)[0] for source in sources]
    metrics = {SOURCES[name].metric for name in names}
    if len(metrics) > 1:
        raise UserError(
            f"--source: {' and '.join(names)} are not scored together; prepare each by itself"
        )
    return metrics.pop() if metrics else ""


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: what of them decides how text and pictures become tokens. FAMILIES says all that differs between the
# families that are supported; a new one is a line there, where it goes one of these ways.


@dataclass(frozen=True)
class Family:
    """What the backbones of one `model_type` have of their own; those for text alone have nothing."""

    language: str = ""  # where in the transformers model the decoder is; empty: it is the model
    vision: str = ""  # where the vision tower is (Qwen-VL's merger is in it, InternVL's projector is not); empty: none
    blocks: str = ""  # where in the tower its layers are
    mrope: bool = False  # the positions of an image's tokens are its rows and columns; else they count on as in text
    tiles: bool = (
        False  # an image is cut into square tiles of one size; else scaled to whole patches
    )
    around: tuple[str, str] = (
        "",
        "",
    )  # the tokens before and after an image's that the chat template does not have
    half: str = ""  # model_type of the decoder alone; empty: its text_config says, and that has to be supported too
    planned: bool = False  # 03 --plan knows what it computes and needs


QWEN_VL = {"language": "language_model", "vision": "visual", "blocks": "blocks", "mrope": True}
INTERN_VL = {
    "language": "language_model",
    "vision": "vision_tower",
    "blocks": "encoder.layer",
    "tiles": True,
}
FAMILIES = {
    "qwen2_5_vl": Family(**QWEN_VL, half="qwen2", planned=True),
    "qwen2_vl": Family(**QWEN_VL, half="qwen2"),
    "qwen3_vl": Family(**QWEN_VL, half="qwen3"),
    "internvl": Family(**INTERN_VL, around=("<img>", "</img>")),  # as OpenGVLab/InternVL3-8B-hf
    "qwen2": Family(planned=True),  # and Qwen2.5
    "qwen3": Family(),
    "llama": Family(),
}


def family_of(config: PreTrainedConfig, path: str) -> Family:
    """The family of a backbone by its config; raises UserError with what is supported where it is none of them."""
    text = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"{path}: a {config.model_type}; supported are {', '.join(FAMILIES)}")
    if not family.half and text.model_type not in FAMILIES:
        known = ", ".join(name for name, each in FAMILIES.items() if not each.vision)
        raise UserError(
            f"{path}: {config.model_type} with a decoder of type {text.model_type}; supported are {known}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        raise UserError(
            f"{path}: has layers with a sliding attention window, which are not supported"
        )
    if getattr(text, "attention_dropout", 0):
        raise UserError(
            f"{path}: has attention dropout, which is not supported; set it to 0 in config.json"
        )
    return family


@dataclass(frozen=True)
class VisionShape:
    """What of a vision tower decides how its patches are laid out."""

    patch: int  # side of a patch in pixels
    merge: int  # merge x merge patches become one token
    window: int = 0  # side of the attention windows in pixels; 0: attention over whole images
    table: int = 0  # side of a learned table of positions that is stretched over each image; 0: none, or not stretched


@dataclass
class Processors:
    """The tokenizer and image processor of a backbone; `image` is None for a text-only one."""

    tokenizer: object
    image: object | None
    family: Family
    image_token: (
        int | None
    )  # id of the token that stands for a piece of an image, <|image_pad|> or <IMG_CONTEXT>
    end_token: int  # id of what ends the assistant's turn, <|im_end|> or <|eot_id|>
    vision: VisionShape | None
    fingerprint: str  # of the vocabulary, the merges and the chat template: shards of another tokenizer are noise

    def save(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.image is not None:
            self.image.save_pretrained(folder)

    @property
    def pixels(self) -> dict | None:
        """The image processor's limits, from which the number of an image's tokens follows."""
        if self.image is None:
            return None
        return {"tiles": self.image.max_patches} if self.family.tiles else dict(self.image.size)

    @pixels.setter
    def pixels(self, limits: dict) -> None:
        if self.family.tiles:
            self.image.max_patches = limits["tiles"]
        else:
            self.image.size = dict(limits)


def load_processors(backbone: str, max_pixels: int = 0) -> Processors:
    """Reads them from a checkpoint directory. The image processor is the one that needs only pillow. Images have the
    pixel limits of the checkpoint, or at most `max_pixels`; of one that is cut into tiles these are those of all tiles
    together, without the thumbnail that comes with several."""
    with explaining(
        f"{backbone}: no tokenizer and config in the Hugging Face layout",
        (OSError, ValueError),
        UserError,
    ):
        config = AutoConfig.from_pretrained(backbone)
        tokenizer, family = AutoTokenizer.from_pretrained(backbone), family_of(config, backbone)
        image = (
            AutoImageProcessor.from_pretrained(backbone, backend="pil") if family.vision else None
        )
    if (
        not tokenizer.chat_template
    ):  # older checkpoints of vision-language models have it in a file of its own
        found = cached_file(
            backbone, "chat_template.json", _raise_exceptions_for_missing_entries=False
        )
        if not found:
            raise UserError(
                f"{backbone}: its tokenizer has no chat template; take a checkpoint made for chat"
            )
        tokenizer.chat_template = json.loads(Path(found).read_text())["chat_template"]
    vision, shape = None, getattr(config, "vision_config", None)
    if family.tiles:
        image.crop_to_patches = InternVLProcessor.images_kwargs[
            "crop_to_patches"
        ]  # goes before preprocessor_config's
        if max_pixels:
            image.max_patches = max(
                1, min(image.max_patches, max_pixels // image.size["height"] ** 2)
            )
        vision = VisionShape(shape.patch_size[0], round(1 / config.downsample_ratio))
    elif family.vision:
        if max_pixels:
            image.size = {
                "shortest_edge": min(image.size["shortest_edge"], max_pixels),
                "longest_edge": max_pixels,
            }
        table = math.isqrt(getattr(shape, "num_position_embeddings", 0))
        vision = VisionShape(
            image.patch_size, image.merge_size, getattr(shape, "window_size", 0), table
        )
    made_of = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    fingerprint = f"{hash_of(made_of.encode()):016x}"
    image_token = config.image_token_id if family.vision else None
    return Processors(
        tokenizer, image, family, image_token, end_of_turn(tokenizer), vision, fingerprint
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the first special token that the chat template sets after an assistant's turn. It need not be the
    tokenizer's eos token, which is <|endoftext|> in Qwen's base models."""
    turns = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("\ue001")[2]
    special = set(tokenizer.get_added_vocab().values())
    ends = (
        token for token in tokenizer.encode(behind, add_special_tokens=False) if token in special
    )
    return next(ends, tokenizer.eos_token_id)


def use_pixel_limits(processors: Processors, sets: list["Comparisons"]) -> None:
    """Gives the image processor the pixel limits that the shards were prepared with, so that patches and tokens
    agree."""
    limits = [each.info["pixels"] for each in sets if each.info["pixels"]]
    if any(other != limits[0] for other in limits):
        raise UserError(
            "the data sets were prepared with different --max_pixels; prepare them with the same"
        )
    if limits and processors.image is not None:
        processors.pixels = limits[0]


# ---------------------------------------------------------------------------------------------------------------------
# From a record to a comparison.


@dataclass
class Comparison:
    """One prompt and N responses to it, ready for the model. Arrays are int32 token ids."""

    prompt: np.ndarray  # [P], image tokens expanded
    responses: list[np.ndarray]  # N x [R_i], each ending in the end-of-turn token
    ranks: list[int]  # N; 1 is best, equal ranks tie
    images: list[bytes] = field(default_factory=list)  # encoded files
    # [images, 3] patches: time or tiles, height, width
    grids: np.ndarray = field(default_factory=partial(np.zeros, (0, 3), np.int32))
    record: dict = field(default_factory=dict)  # id, category, answer, ...: what is carried along
    origin: str = ""  # where it was read

    def __str__(self) -> str:
        """What messages call it."""
        return f"{self.origin} (id {self.record['id']})" if "id" in self.record else self.origin

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all pairs of responses that do not tie."""
        return ordered_pairs(self.ranks)

    @property
    def length(self) -> int:
        """Tokens of the packed row [prompt | response 1 | ... | response N]."""
        return len(self.prompt) + sum(map(len, self.responses))


def ordered_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) for all pairs of one comparison's responses that do not tie."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


# From a record to a comparison, 1: its pictures.

# Not all that pillow reads: for EPS it would start Ghostscript.
PICTURES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
LARGEST_FILE = 2**28  # bytes of an encoded picture


def read_image(image: object, folder: Path, within: list[Path] | None = None) -> bytes:
    """An image as its encoded bytes: a path relative to `folder`, the bytes themselves, a PIL image, or either of the
    first two as parquet files of the hub have it, {"bytes": ..., "path": ...}.

    A path that comes from data could name any file of this machine, so it has to lead, links followed, into one of the
    folders `within`; None: anywhere."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return file.getvalue()
    require(isinstance(image, str), f"images: a {type(image).__name__} where a path should be")
    with explaining(
        f"unreadable image: {image}", (OSError, ValueError, RuntimeError)
    ):  # the last: links in a circle
        path = (folder / image).resolve()
        inside = within is None or any(path.is_relative_to(each) for each in within)
        require(inside, f"image outside the data's folder: {image}; --allow_outside reads it")
        require(path.is_file() or not path.exists(), f"unreadable image: {image}: not a file")
        large = f"unreadable image: {image}: a file of more than {LARGEST_FILE >> 20} MB"
        require(path.stat().st_size <= LARGEST_FILE, large)
        return path.read_bytes()


def open_image(content: bytes, draft: tuple | None = None) -> Image.Image:
    """A picture as a viewer shows it, in RGB: turned as EXIF says; the first frame of an animation; on white where it
    is transparent, as Qwen's own utilities do; 16 bits scaled down to 8, where pillow's `convert` would clip. It is
    here that 01 learns its size and the loader its pixels.

    `draft` is for pillow's `Image.draft`. Raises Unusable for what cannot be read to its end, and, before memory is
    taken for them, for more than Image.MAX_IMAGE_PIXELS pixels (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=PICTURES)
            if draft:
                image.draft(*draft)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            require(
                image.mode not in ("I", "F"),
                f"its pixels are of mode {image.mode}, whose range is not known",
            )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        start = f"begins with {content[:16]!r}" if content else "is empty"
        reason = f"none of {', '.join(PICTURES)}; the file {start}"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # a damaged file trips pillow's decoders in many ways
        reason = str(error) or type(error).__name__
    raise Unusable(f"unreadable image: {reason}")


def patch_grid(size: tuple[int, int], processors: Processors) -> tuple[int, int, int]:
    """(time, height, width) in patches of an image of size (width, height) pixels, after Qwen-VL's resizing; or (tiles,
    height, width of each) where it is cut into tiles."""
    image, patch = processors.image, processors.vision.patch
    if processors.family.tiles:
        return image.get_number_of_image_patches(size[1], size[0]), *[
            image.size["height"] // patch
        ] * 2
    unit, limits = patch * processors.vision.merge, image.size
    with explaining(f"unusable image of {size[0]} x {size[1]} pixels", ValueError):
        height, width = smart_resize(
            size[1], size[0], unit, limits["shortest_edge"], limits["longest_edge"]
        )
    return 1, height // patch, width // patch


# 2: its texts and its prompt.


def text_in(value: object, what: str) -> str:
    """A text that can be encoded: JSON's \\ud800 alone is half of a character."""
    require(isinstance(value, str), f"{what}: {type(value).__name__} where a text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{what}: half of a surrogate pair at character {error.start}") from None
    return value


def text_of(message: object, what: str) -> str:
    """The text of a response: a string, one assistant message, or a list of exactly one."""
    if isinstance(message, list) and len(message) == 1:
        message = message[0]
    if isinstance(message, dict):
        role, message = message.get("role"), message.get("content")
        require(role == "assistant", f"{what}: role is {role!r}, not 'assistant'")
        if isinstance(message, list):
            texts = all(
                isinstance(part, dict) and part.get("type", "text") == "text" for part in message
            )
            require(texts, f"{what}: has a part that is no text")
            message = "".join(text_in(part.get("text"), what) for part in message)
    require(isinstance(message, str), f"{what}: not a text or a list of one assistant message")
    require(message.strip(), f"{what}: empty response")
    return text_in(message, what)


def check_messages(prompt: object, without_images: bool = False) -> list[dict]:
    """The prompt's turns, `content` a string where there is only text and a list of parts where there are images."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    require(isinstance(turns, list) and turns, "prompt: not a list of messages")
    messages = []
    for turn in turns:
        known = isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
        require(known, "prompt: a message without the role system, user or assistant")
        content, parts = turn.get("content"), []
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        are_parts = isinstance(given, list) and all(isinstance(part, dict) for part in given)
        require(are_parts, "prompt: content is neither a string nor a list of parts")
        for part in given:
            kind = part.get("type")
            require(
                kind in ("text", "image"),
                f"prompt: a part of type {kind!r}; known are text and image",
            )
            if kind == "text":
                text_in(part.get("text"), "prompt")
            if kind == "text" or not without_images:
                # without what else a part says, which the chat template might take for an image
                parts.append({key: part[key] for key in ("type", kind) if key in part})
        only_text = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if only_text else parts
        messages.append({"role": turn["role"], "content": content})
    last = messages[-1]["role"]
    require(last == "user", f"prompt: ends with the role {last!r}, not 'user'")
    return messages


def with_images(text: str) -> list[dict]:
    """The parts of a text in which <image> marks the place of each picture."""
    pieces = re.split("(<image>)", text)
    return [
        {"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def encode_prompt(
    messages: list,
    images: list,
    processors: Processors,
    folder: Path = Path(),
    within: list[Path] | None = None,
) -> tuple[np.ndarray, list[bytes], np.ndarray]:
    """Renders and tokenizes a prompt up to where the assistant's answer begins.

    Returns its token ids [P] with every image placeholder expanded to as many tokens as the vision tower will give, the
    images' encoded bytes, and their patch grids [images, 3]. Raises Unusable.
    """
    messages = check_messages(messages)
    parts = [
        part for turn in messages if isinstance(turn["content"], list) for part in turn["content"]
    ]
    slots = [part for part in parts if part["type"] == "image"]
    images = [part["image"] for part in slots if part.get("image") is not None] or list(images)
    if (
        images and not slots
    ):  # their places are marked in the text, as in LLaVA's data; else they come first, as in TRL
        asked = [turn for turn in messages if turn["role"] == "user"]
        if not any("<image>" in turn["content"] for turn in asked):
            asked[0]["content"] = "<image>" * len(images) + asked[0]["content"]
        for turn in asked:
            turn["content"] = with_images(turn["content"])
            slots += [part for part in turn["content"] if part["type"] == "image"]
    require(
        len(images) == len(slots),
        f"images: {len(images)} given, but the prompt has {len(slots)} places for them",
    )
    require(not images or processors.image is not None, "images: the backbone is text-only")
    asks = images or any(turn["content"].strip() for turn in messages if turn["role"] == "user")
    require(asks, "prompt: empty")
    files = [read_image(image, folder, within) for image in images]
    grids = np.array(
        [patch_grid(open_image(file).size, processors) for file in files], np.int32
    ).reshape(-1, 3)
    ids = tokenize_chat(messages, processors.tokenizer)
    if files:
        names = ([name] if name else [] for name in processors.family.around)
        before, after = map(
            processors.tokenizer.convert_tokens_to_ids, names
        )  # one id each, or none
        counts = grids.prod(1) // processors.vision.merge**2
        expanded = iter([[*before, *[processors.image_token] * count, *after] for count in counts])
        pieces = (next(expanded) if token == processors.image_token else [token] for token in ids)
        ids = np.array([*itertools.chain.from_iterable(pieces)], np.int32)
    return ids, files, grids


def tokenize_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The chat template's rendering as token ids [P], ending where the assistant's answer begins.

    The template's own special tokens become single ids; the same strings inside a user's text stay text. For that they
    are taken out before rendering, put back afterwards, and tokenized as ordinary characters.
    """
    # \ue000 and \ue001, private to this function, mark where something was taken out; a user's own are taken out too.
    special = re.compile(
        "|".join(map(re.escape, [*tokenizer.get_added_vocab(), "\ue000", "\ue001"]))
    )
    taken = []

    def safe(content: str | list[dict]) -> str | list[dict]:
        if isinstance(content, str):
            return special.sub(
                lambda found: taken.append(found[0]) or f"\ue000{len(taken) - 1}\ue001", content
            )
        return [
            part if part["type"] == "image" else {**part, "text": safe(part["text"])}
            for part in content
        ]

    messages = [{**turn, "content": safe(turn["content"])} for turn in messages]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template, *rest = re.split(
        "\ue000(\\d+)\ue001", rendered
    )  # then the number of what was taken, template, ...
    ids = tokenizer.encode(template, add_special_tokens=False)
    for number, template in zip(rest[::2], rest[1::2]):
        ids += tokenize_text(taken[int(number)], tokenizer) + tokenizer.encode(
            template, add_special_tokens=False
        )
    return np.array(ids, np.int32)


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(text: str, processors: Processors) -> np.ndarray:
    """A response's token ids [R]: its text and the end-of-turn token, where its score will be read."""
    return np.array(tokenize_text(text, processors.tokenizer) + [processors.end_token], np.int32)


# 3: what is carried along with it, unchanged: {field: what it has to be}; null is like not saying it.
CARRIED = {
    "id": (str | int | float | None, "a text or a number"),
    "category": (str, "a text"),
    "subset": (str, "a text"),
    "source": (str, "a text"),
    "group": (str | int | float, "a text or a number"),
    "answer": (str | int | float | None, "a text or a number"),
    "rule": None,  # see check_rule, in the appendix
    "truth": None,
    "judged": None,
    "critiques": (list | None, "a list"),
}


# Fields of a record that are read; others are counted.
USED = {"prompt", "chosen", "rejected", "responses", "ranks", "images", *CARRIED}


def check_carried(record: dict, responses: int) -> dict:
    """What is carried along with a comparison; raises Unusable where later stages could not read it."""
    carried = {key: record[key] for key in CARRIED if key in record}
    for key, value in carried.items():
        if CARRIED[key]:
            types, name = CARRIED[key]
            fits = isinstance(value, types) and not isinstance(value, bool)
            require(fits, f"{key}: {type(value).__name__} where {name} should be")
    critiques = carried.get("critiques")
    if critiques is not None:
        fit = len(critiques) == responses and all(isinstance(each, str) for each in critiques)
        require(fit, f"critiques: not a list of {responses} texts, one for each response")
    with explaining(
        f"{', '.join(carried)}: cannot be written as JSON", (ValueError, TypeError, RecursionError)
    ):
        json.dumps(carried, ensure_ascii=False).encode()
    return carried


def ranked_texts(record: dict) -> tuple[list[str], list[int]]:
    """The responses of a record in the JSON form and their ranks; none of either where it is a question to a policy."""
    if "responses" in record:
        answers, ranks = record["responses"], record.get("ranks")
        lists = isinstance(answers, list) and isinstance(ranks, list) and len(answers) == len(ranks)
        require(lists, "responses and ranks: not two lists of the same length")
        numbers = len(answers) > 1 and all(type(rank) is int and 0 < rank < 2**31 for rank in ranks)
        require(
            numbers,
            "responses and ranks: at least two responses, each with a rank of 1 (best) or more",
        )
        require(
            len(set(ranks)) > 1, "ranks: all equal, so there is nothing to learn from or to score"
        )
        texts = [text_of(answer, f"responses[{i}]") for i, answer in enumerate(answers)]
        require(len(set(texts)) > 1, "responses: all identical")
        return texts, ranks
    if "chosen" in record or "rejected" in record:
        for key in ("chosen", "rejected"):
            require(key in record, f"missing field: {key}")
        texts = [text_of(record[key], key) for key in ("chosen", "rejected")]
        require(texts[0] != texts[1], "chosen and rejected are identical")
        return texts, [1, 2]
    question = "answer" in record or "truth" in record or "judged" in record
    require(
        question,
        "missing field: chosen and rejected, or responses and ranks, or answer (null: an open question)",
    )
    return [], []


def images_in(record: dict) -> list:
    """A record's images; raises Unusable where they are given otherwise than as a list, and would be lost."""
    require(
        record.get("image") is None,
        "image: pictures are in `images`, a list; --source trl:FILE reads this, too",
    )
    images = record.get("images") or []
    require(isinstance(images, list), "images: not a list")
    return images


def check_length(prompt: np.ndarray, responses: list[np.ndarray], max_length: int) -> None:
    longest = len(prompt) + max(map(len, responses), default=0)
    require(longest <= max_length, f"{longest} tokens, more than --max_length {max_length}")


def encode_record(
    record: dict,
    processors: Processors,
    max_length: int,
    folder: Path = Path(),
    without_images: bool = False,
    within: list[Path] | None = None,
) -> Comparison:
    """Checks one record in the JSON form and makes it a Comparison; raises Unusable with the reason if it is none.

    Args: the folder that image paths are relative to, and those that they have to stay in (`read_image`)."""
    require("prompt" in record, "missing field: prompt")
    texts, ranks = ranked_texts(record)
    if "rule" in record:
        check_rule(record["rule"], record.get("answer"))
    carried = check_carried(record, len(texts)) | {"characters": [len(text) for text in texts]}
    prompt, images = record["prompt"], images_in(record)
    if without_images:
        prompt, images = check_messages(prompt, without_images), []
    prompt, files, grids = encode_prompt(prompt, images, processors, folder, within)
    responses = [encode_response(text, processors) for text in texts]
    check_length(prompt, responses, max_length)
    return Comparison(prompt, responses, ranks, files, grids, carried)


# ---------------------------------------------------------------------------------------------------------------------
# Shards. A list of vectors lies flat, one after the other, with offsets: vector i is flat[offset[i] : offset[i + 1]].

RAGGED = {  # one vector for each comparison, but for
    "prompts": np.int32,
    "responses": np.int32,  # one for each response; the offsets of the ranks say whose it is
    "ranks": np.int32,
    "images": np.uint8,  # one for each file
    "image_index": np.int32,  # which of the files are this comparison's
    "records": np.uint8,  # as JSON
}
SAFETENSORS = {
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "U64": np.uint64,
}  # what we write, by its name there
METADATA = {"comparisons": f"format {FORMAT}"}  # one key: the order of several is not fixed


def flatten(items: list, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    flat = (
        np.concatenate([np.asarray(item, dtype) for item in items]) if items else np.zeros(0, dtype)
    )
    return flat, np.cumsum([0, *map(len, items)], dtype=np.int64)


def prompt_hash(prompt: np.ndarray, image_token: int | None) -> int:
    """Of a prompt's text alone: the same for the same words about another picture."""
    return hash_of(prompt[prompt != image_token].astype(np.int32).tobytes())


def look_of(content: bytes) -> int:
    """64 bits that scaled or recompressed copies of a picture share, or nearly: where on a grid of 8 x 8 it is darker
    than to the right (dHash)."""
    image = open_image(
        content, draft=("L", (64, 64))
    )  # of a JPEG, decodes no more than is needed for this size
    small = np.asarray(image.convert("L").resize((9, 8)), int)
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


def write_shard(path: Path, comparisons: list[Comparison], image_token: int | None = None) -> None:
    """Writes comparisons as one safetensors file; an image that several share is stored once. The hashes are for
    finding what training data and a benchmark share."""
    grids = {file: grid for each in comparisons for file, grid in zip(each.images, each.grids)}
    places = {file: i for i, file in enumerate(grids)}
    items = {
        "prompts": [each.prompt for each in comparisons],
        "responses": [response for each in comparisons for response in each.responses],
        "ranks": [each.ranks for each in comparisons],
        "images": [np.frombuffer(file, np.uint8) for file in grids],
        "image_index": [[places[file] for file in each.images] for each in comparisons],
        "records": [
            np.frombuffer(json.dumps(each.record).encode(), np.uint8) for each in comparisons
        ],
    }
    tensors = {
        "grids": np.array([*grids.values()], np.int32).reshape(-1, 3),
        "prompt_hashes": np.array(
            [prompt_hash(each.prompt, image_token) for each in comparisons], np.uint64
        ),
        "image_hashes": np.array([hash_of(file) for file in grids], np.uint64),
        "image_looks": np.array([look_of(file) for file in grids], np.uint64),
    }
    for name, dtype in RAGGED.items():
        tensors[name], tensors[f"{name}_offsets"] = flatten(items[name], dtype)
    write_tensors(path, tensors, METADATA)


def vector(file, name: str, dtype: type) -> np.ndarray:
    """A vector of an open safetensors file; raises Unusable before it is read if its dtype or shape is another."""
    found = file.get_slice(name)
    fits = SAFETENSORS.get(found.get_dtype()) == dtype and len(found.get_shape()) == 1
    require(
        fits, f"{name}: {found.get_dtype()} {found.get_shape()}, not a vector of {np.dtype(dtype)}"
    )
    return file.get_tensor(name)


class Shard:
    """One memory-mapped shard; nothing but offsets and grids is read before a comparison is asked for.

    Raises UserError where they do not fit each other or the file: what is read later is within it."""

    def __init__(self, path: Path):
        with reading(path):
            self.path, self.file = path, safe_open(path, framework="np")
            self.offsets = {name: vector(self.file, f"{name}_offsets", np.int64) for name in RAGGED}
            self.image_index = vector(self.file, "image_index", np.int32)
            self.grids = self.file.get_tensor("grids")  # [images, 3]
            self.check()

    def check(self) -> None:
        index, grids, images = self.image_index, self.grids, len(self.grids)
        comparisons = len(self.offsets["prompts"]) - 1
        items = {
            "responses": int(self.offsets["ranks"][-1]),
            "images": images,
        }  # of the others, as many as comparisons
        for name, dtype in RAGGED.items():
            offsets, flat = self.offsets[name], self.file.get_slice(name)
            fits = (
                SAFETENSORS.get(flat.get_dtype()) == dtype
                and 0 < len(offsets) == items.get(name, comparisons) + 1
            )
            require(fits, f"{name}: {flat.get_dtype()}, {len(offsets) - 1} items")
            lengths = np.diff(offsets)
            fits = (
                offsets[0] == 0
                and flat.get_shape() == [offsets[-1]]
                and lengths.min(initial=0) >= 0
            )
            require(fits, f"{name}: offsets that do not fit its {flat.get_shape()} numbers")
            filled = name not in ("prompts", "responses") or lengths.min(initial=1) > 0
            require(filled, f"{name}: one of them is empty")
        fits = (
            grids.dtype == np.int32
            and grids.shape == (images, 3)
            and ((grids > 0) & (grids < 2**15)).all()
        )
        require(fits, f"grids: {grids.dtype} {list(grids.shape)}")
        fits = index.min(initial=0) >= 0 and index.max(initial=-1) < images
        require(fits, f"image_index: an image that is none of the {images} there are")

    def item(self, name: str, i: int) -> np.ndarray:
        start, end = map(int, self.offsets[name][i : i + 2])
        return self.file.get_slice(name)[start:end] if start < end else np.zeros(0, RAGGED[name])

    def __getitem__(self, i: int) -> Comparison:
        first, last = self.offsets["ranks"][i : i + 2]
        index = self.item("image_index", i)
        with reading(self.path):
            record = json.loads(self.item("records", i).tobytes())
            check_carried(record, int(last - first))
        return Comparison(
            self.item("prompts", i),
            [self.item("responses", int(j)) for j in range(first, last)],
            self.item("ranks", i).tolist(),
            [self.item("images", int(j)).tobytes() for j in index],
            self.grids[index],
            record,
        )

    def planning(self) -> dict[str, np.ndarray]:
        """PLANNING of all its comparisons."""
        summed = np.cumsum(
            [0, *self.grids.astype(np.int64).prod(1)[self.image_index]]
        )  # patches of all images
        responses = np.diff(self.offsets["responses"][self.offsets["ranks"]])
        found = {
            "tokens": np.diff(self.offsets["prompts"]) + responses,
            "patches": np.diff(summed[self.offsets["image_index"]]),
            "responses": np.diff(self.offsets["ranks"]),
        }
        return {name: found[name].astype(dtype) for name, dtype in PLANNING.items()}


# What index.safetensors holds of all shards: of every comparison the tokens of its packed row, its image patches and
# responses, [n] each; and all hashes.
PLANNING = {"tokens": np.int32, "patches": np.int32, "responses": np.int32}
HASHES = {"prompt_hashes": np.uint64, "image_hashes": np.uint64, "image_looks": np.uint64}


def write_index(folder: Path, shards: list[tuple[str, int]]) -> None:
    """Writes index.safetensors, so that opening a data set takes no longer the more shards it has."""
    columns = {name: [np.zeros(0, dtype)] for name, dtype in (PLANNING | HASHES).items()}
    for file, _ in shards:
        shard = Shard(folder / file)
        found = shard.planning() | {
            name: vector(shard.file, name, dtype) for name, dtype in HASHES.items()
        }
        for name, column in columns.items():
            column.append(found[name])
    index = {name: np.concatenate(column) for name, column in columns.items()}
    write_tensors(folder / "index.safetensors", index, METADATA)


def check_info(info: dict) -> None:
    """Raises Unusable or KeyError unless dataset.json says all that later stages ask for, and names nothing outside of
    its folder."""
    is_count = lambda value: type(value) is int and 0 <= value < 2**40
    for key in ("name", "backbone", "tokenizer", "metric"):
        require(isinstance(info[key], str), f"{key}: not a text")
    for name in (info["name"], *(name for name, _ in info["shards"])):
        require(
            re.fullmatch(r"[^/\0]+", name) and name not in (".", ".."),
            f"{name!r} is no name of a file",
        )
    counts = [
        info["read"],
        info["rejected"],
        info["comparisons"],
        *(count for _, count in info["shards"]),
    ]
    require(all(map(is_count, counts)), "read, rejected, comparisons and shards: have to be counts")
    known = {source.metric for source in SOURCES.values()}
    require(info["metric"] in known, f"metric: {info['metric']!r} is not known")
    limits = info["pixels"]
    if limits is not None:
        known = set(limits) in ({"tiles"}, {"shortest_edge", "longest_edge"})
        require(
            known and all(is_count(each) and each for each in limits.values()), f"pixels: {limits}"
        )
        require(
            limits.get("shortest_edge", 0) <= limits.get("longest_edge", 0), f"pixels: {limits}"
        )
    info["without_images"] = bool(info["without_images"])


class Comparisons(torch.utils.data.Dataset):
    """A prepared data set: `data[i]` is a Comparison, read at random from memory-mapped shards.

    `expect` is the fingerprint of the tokenizer that is going to read it; another one raises UserError. With
    `text_only`, only its comparisons without images.
    """

    def __init__(self, folder: str, expect: str | None = None, text_only: bool = False):
        self.folder, path = Path(folder), Path(folder, "dataset.json")
        if not path.is_file():
            raise UserError(
                f"{folder}: no prepared data set there (dataset.json is missing); run 01_data.py first"
            )
        with reading(path):
            self.info = json.loads(path.read_bytes())
            if (found := self.info["format"]) != FORMAT:
                raise UserError(
                    f"{folder}: shards of format {found}, this code reads {FORMAT}; run 01_data.py again"
                )
            check_info(self.info)
        if expect and self.info["tokenizer"] != expect:
            raise UserError(
                f"{folder}: prepared with another tokenizer or chat template ({self.info['backbone']}); "
                "run 01_data.py again with --backbone set to this model"
            )
        self.starts = np.cumsum([0, *(count for _, count in self.info["shards"])])  # [shards + 1]
        self.opened: dict[int, Shard] = {}
        with reading(self.folder / "index.safetensors"):
            self.index = self.columns(PLANNING)
            for name, column in self.index.items():
                fits = len(column) == self.starts[-1] and column.min(initial=0) >= 0
                require(fits, f"{name}: {len(column)} numbers for {self.starts[-1]} comparisons")
        everything = np.arange(self.starts[-1])
        self.chosen = (
            everything[self.index["patches"] == 0] if text_only else everything
        )  # [n] places in the shards

    def columns(self, dtypes: dict) -> dict[str, np.ndarray]:
        """These of the index."""
        with reading(self.folder / "index.safetensors"):
            with safe_open(self.folder / "index.safetensors", framework="np") as index:
                return {name: vector(index, name, dtype) for name, dtype in dtypes.items()}

    def hashes(self, name: str) -> np.ndarray:
        """Those of HASHES, of all prompts or images in the shards, in no order that matters."""
        return self.columns({name: HASHES[name]})[name]

    def response_counts(self) -> np.ndarray:
        """N of every comparison, [n]."""
        return self.index["responses"][self.chosen]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """For planning: tokens of the packed row [n] and image patches [n]."""
        return self.index["tokens"][self.chosen], self.index["patches"][self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Comparison:
        at = int(self.chosen[i])
        k = int(np.searchsorted(self.starts, at, side="right")) - 1
        comparison = self.open(k)[at - int(self.starts[k])]
        comparison.origin = f"{self.folder}[{at}]"
        characters = comparison.record.get("characters")
        if not isinstance(characters, list) or list(map(type, characters)) != [int] * len(
            comparison.ranks
        ):
            raise UserError(
                f"{comparison.origin}: damaged: its record does not say how long its responses are"
            )
        return comparison

    def open(self, k: int) -> Shard:
        """The k-th shard; up to 512 stay open."""
        if k not in self.opened:
            if len(self.opened) == 512:
                del self.opened[next(iter(self.opened))]
            shard = self.opened[k] = Shard(self.folder / self.info["shards"][k][0])
            for name, column in shard.planning().items():
                if not np.array_equal(
                    column, self.index[name][self.starts[k] : self.starts[k + 1]]
                ):
                    raise UserError(
                        f"{shard.path}: not the shard that index.safetensors is of; run 01_data.py again"
                    )
        return self.opened[k]

    def __getstate__(self) -> dict:
        """For loader processes, which open the files themselves."""
        return vars(self) | {"opened": {}}


def open_images(comparison: Comparison, processors: Processors) -> list[Image.Image]:
    """The decoded images of a comparison that goes to a model; UserError where its tokens are none of the model's or
    do not fit its images, as in shards that were damaged or made to harm."""
    if comparison.origin:
        ids = np.concatenate([comparison.prompt, *comparison.responses])
        wrong = ids[(ids < 0) | (ids >= len(processors.tokenizer))]
        if len(wrong):
            raise UserError(
                f"{comparison}: damaged: token {wrong[0]} of {len(processors.tokenizer)}"
            )
        patches, tokens = comparison.grids.prod(1).sum(), (ids == processors.image_token).sum()
        if processors.image is not None and patches != tokens * processors.vision.merge**2:
            raise UserError(f"{comparison}: damaged: {tokens} image tokens for {patches} patches")
    with explaining(str(comparison), Unusable, UserError):
        return [open_image(file) for file in comparison.images]


# ---------------------------------------------------------------------------------------------------------------------
# All that this stage does: every rank makes shards of its own chunks of lines, then rank 0 says what became of them.

RECORD_NAME, SHARD_NAME = (
    ".chunk-{:05d}.json".format,
    "shard-{:05d}.safetensors".format,
)  # of a chunk's number


def prepare(
    name: str,
    lines: Iterator[Line],
    processors: Processors,
    settings: Settings,
    holdout: float,
    within: list[Path] | None = None,
) -> None:
    """Prepares one data set: every rank its own chunks of lines, then rank 0 the index and the list of rejected lines.
    Pictures are read from the folders `within`; None: from anywhere.

    What was interrupted continues: a chunk whose record, .chunk-<number>.json, says that it was made of the same lines
    of the same files (by size and time) with the same settings, tokenizer and code, is not made again. Pictures beside
    the data files are not compared. What was finished is prepared anew.

    Memory does not grow with the number of lines, but for the index: 20 bytes a comparison and 16 an image, twice while
    it is written.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names = [name, f"{name}_holdout"] if holdout > 0 else [name]
    folders = {each: Path(settings.out, each) for each in names}
    if rank == 0:
        finished = (folders[name] / "dataset.json").is_file()
        for folder in folders.values():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for pattern in (
                ("dataset.json", ".chunk-*", "shard-*") if finished else ("dataset.json",)
            ):
                for old in folder.glob(pattern):
                    old.unlink()
    dist.barrier()

    progress = tqdm(desc=name, unit=" lines", disable=rank > 0, mininterval=1)
    for number in itertools.count():
        chunk = list(itertools.islice(lines, settings.shard_size))
        if not chunk:
            break
        progress.update(len(chunk))
        if number % world != rank:
            continue
        record = folders[name] / RECORD_NAME(number)
        shards = {each: folder / SHARD_NAME(number) for each, folder in folders.items()}
        made_of = fingerprint(chunk, processors, settings, holdout)
        made = json.loads(record.read_text()) if record.is_file() else {}
        if made.get("made_of") == made_of and all(
            shards[each].is_file() for each, n in made["kept"].items() if n
        ):
            continue
        kept, rejected, unused = {each: [] for each in folders}, [], Counter()
        for file, line, read in chunk:
            try:
                fields = read()
                comparison = encode_record(
                    fields,
                    processors,
                    settings.max_length,
                    Path(file).parent,
                    settings.without_images,
                    within,
                )
                unused.update(fields.keys() - USED)
            except Unusable as error:
                rejected.append({"file": file, "line": line, "reason": str(error)})
                continue
            held_out = share_of(comparison.prompt.tobytes() + b"".join(comparison.images)) < holdout
            kept[f"{name}_holdout" if held_out else name].append(
                comparison
            )  # the same prompt is never on both sides
        for each, comparisons in kept.items():
            if comparisons:
                write_shard(shards[each], comparisons, processors.image_token)
        counts = {each: len(comparisons) for each, comparisons in kept.items()}
        with_images = sum(
            bool(comparison.images) for comparisons in kept.values() for comparison in comparisons
        )
        told = {
            "made_of": made_of,
            "kept": counts,
            "with_images": with_images,
            "rejected": rejected,
            "unused": unused,
        }
        write_file(record, json.dumps(told))
    progress.close()
    dist.barrier()
    if rank == 0:
        finish(name, folders, number, processors, settings)


def fingerprint(
    chunk: list[Line], processors: Processors, settings: Settings, holdout: float
) -> str:
    """Of all that a chunk's shard is made of. Files count by their size and time, the code among them."""
    lines = [(file, line) for file, line, _ in chunk]
    files = sorted({file for file, _ in lines} | {__file__, str(WORLD)})
    stats = [
        (file, os.stat(file).st_size, os.stat(file).st_mtime_ns)
        for file in files
        if os.path.exists(file)
    ]
    made_of = [FORMAT, lines, stats, vars(settings), holdout, processors.fingerprint]
    return f"{hash_of(json.dumps(made_of).encode()):016x}"


def finish(
    name: str, folders: dict[str, Path], chunks: int, processors: Processors, settings: Settings
) -> None:
    """Says what became of so many chunks: rejected.jsonl, the index, dataset.json, and a line for the user."""
    shards, rejected, with_images, unused = {each: [] for each in folders}, 0, 0, Counter()
    with in_place_of(folders[name] / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for number in range(chunks):
            chunk = json.loads((folders[name] / RECORD_NAME(number)).read_text())
            file.writelines(json.dumps(line) + "\n" for line in chunk["rejected"])
            rejected += len(chunk["rejected"])
            with_images += chunk["with_images"]
            unused.update(chunk["unused"])
            for each, count in chunk["kept"].items():
                shards[each] += [(SHARD_NAME(number), count)] if count else []
    kept = {each: sum(count for _, count in shards[each]) for each in folders}
    read = sum(kept.values()) + rejected
    for each, folder in reversed(
        folders.items()
    ):  # the data set's own dataset.json last: it says that all is there
        for stray in {file.name for file in folder.glob("shard-*")} - {
            shard for shard, _ in shards[each]
        }:
            (folder / stray).unlink()  # of an interrupted run with other settings
        write_index(folder, shards[each])
        info = {
            "format": FORMAT,
            "name": each,
            "comparisons": kept[each],
            "read": read,
            "rejected": rejected,
            "sources": settings.source or embedded_world().SETS[name][0],
            "metric": official_metric(settings.source),
            "without_images": settings.without_images,
            "unused_fields": unused,
            "seed": settings.seed,
            "backbone": settings.backbone,
            "tokenizer": processors.fingerprint,
            "max_length": settings.max_length,
            "pixels": processors.pixels,
            "shards": shards[each],
        }
        write_file(folder / "dataset.json", json.dumps(info, indent=1))
    for folder in folders.values():
        for hidden in folder.glob(
            ".*"
        ):  # the records, and what a run that was killed had not renamed yet
            hidden.unlink()
    held_out = (
        f" ({kept[f'{name}_holdout']} of them held out in {name}_holdout)"
        if len(folders) > 1
        else ""
    )
    reasons = f"; reasons in {folders[name] / 'rejected.jsonl'}" if rejected else ""
    reasons += "; WITHOUT IMAGES, the text alone" if settings.without_images else ""
    kept = f"kept {sum(kept.values())}{held_out} + rejected {rejected}"
    print(
        f"{folders[name]}: read {read} = {kept}{reasons}; {with_images} with pictures", flush=True
    )
    if unused:
        print(
            f"  not used: {', '.join(f'{field} ({count} lines)' for field, count in sorted(unused.items()))}"
        )


def say_what_is_next(settings: Settings, name: str) -> None:
    """A published benchmark is scored, questions are for a policy, and all else is to train on."""
    folder, backbone = (
        f"{settings.out}/{name if settings.source else 'train'}",
        unless_default(settings, "backbone"),
    )
    counts, benchmark = Comparisons(folder).response_counts(), official_metric(settings.source)
    if not len(counts):
        print(
            f"{folder} is empty: nothing to go on with; its lines are held out, or in rejected.jsonl with the reason"
        )
    elif not counts.any():  # questions
        held_out = (
            f"{folder}_holdout" if Path(f"{folder}_holdout", "dataset.json").is_file() else ""
        )
        given = {"benchmark": folder} if benchmark else {"data": folder, "benchmark": held_out}
        say_next("06_grpo.py", backbone=backbone, **given)
    elif benchmark:
        say_next("04_eval.py", benchmark=folder)
    else:
        default = not settings.source and settings.out == Settings.out
        say_next("02_model.py", backbone=backbone, data=None if default else folder)


def main(settings: Settings) -> None:
    processors = load_processors(settings.backbone, settings.max_pixels)
    if settings.mix:
        settings.source += mix_sources(settings.mix, settings.mix_folder)
    if settings.source:
        name = settings.name or settings.mix or default_name(settings.source[0])
        lines = itertools.chain.from_iterable(
            [open_source(source, settings.seed) for source in settings.source]
        )
        holdout = (
            0 if official_metric(settings.source) else settings.holdout
        )  # a benchmark is kept whole
        within = (
            None if settings.allow_outside else [data_folder(source) for source in settings.source]
        )
        prepare(name, lines, processors, settings, holdout, within)
    else:
        for name, (parts, holdout) in embedded_world().SETS.items():
            sized = [
                (source, split, int(count * settings.world_size)) for source, split, count in parts
            ]
            lines = (
                line for part in sized for line in read_world(*part, f"{settings.seed}/{name}")
            )
            prepare(name, lines, processors, settings, holdout)
    if dist.get_rank() == 0:
        say_what_is_next(settings, name)


# ---------------------------------------------------------------------------------------------------------------------
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
    """Convert rows with a prompt, or without one: then it is what both responses begin with."""
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
    """Keep the first 5 usable pairs of a post. Every rank counts all rows, so all ranks agree."""
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
    """Give rotations of a question the picture of the row whose index they have in its place."""
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
    # VLMEvalKit's MMBench_DEV_EN.tsv
    "mmbench": Source(read=read_mmbench, metric="circular"),
    # Two questions on each picture, one answered Yes and one No
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

# The paper's training data: seven sets, each whole, 2.85 M pairs by its count. We infer which sets
# it calls R1-Reward (200 k) and Others (63 k: 5 k chat, 41 k UltraFeedback, 17 k WildChat).
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

    Rank 0 downloads first; the others then find the files.
    """
    if path and (Path(path).exists() or glob.glob(path)):
        return path
    hub, problem = SOURCES[name].hub, f"--source {path or name}: nothing there"
    repo = path or hub
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.endswith(DATA_FILES):
        hint = f"A source is a file or name:PATH, name one of {', '.join(SOURCES)}"
        raise UserError(f"{problem}. {download_command(hub, 'DIR') if hub else hint}")
    from huggingface_hub import snapshot_download  # comes with transformers

    if dist.get_rank() > 0:
        dist.barrier()
    try:
        return snapshot_download(repo, repo_type="dataset")
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        command = f"{download_command(repo, repo)}, then --source {name}:{repo}"
        raise UserError(f"{problem}; download failed ({reason}). Fetch it: {command}") from None
    finally:
        if dist.get_rank() == 0:
            dist.barrier()


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
