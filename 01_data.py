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
import string
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, HfArgumentParser
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.hub import cached_file

FORMAT = 3  # of the shards; raise it when their layout changes


def option(default, help: str, **more):
    """A field of a stage's settings: its default and what --help says of it. A list may be given repeatedly."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, "action": "extend", **more})
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Settings:
    source: list[str] = option(
        [],
        "what to prepare, repeatable; none: the embedded world. A JSONL file of your own, or name:PATH, a published "
        "set (SOURCES in 01_data.py has the names): PATH is its file, its folder, a pattern of files, or its name on "
        "the hub, from where it is downloaded; name alone takes the published one. With @LIMIT behind it, at most that "
        "many rows (an integer), or that share of them (like 0.5). world:PART@COUNT is a part of the embedded world",
    )
    mix: str = option("", "a mixture of published sets to prepare as one; known: basereward, the paper's training data")
    mix_folder: str = option("", "folder of the mixture's sets, each in a folder by its name on the hub, owner/name")
    out: str = option("artifacts/data", "folder that receives one folder for each data set")
    name: str = option("", "name of the data set made from --source or --mix; empty: the mixture's or the first file's")
    backbone: str = option("tests/tiny", "checkpoint whose tokenizer, chat template and image processor are used")
    max_length: int = option(4096, "longest prompt + response, in tokens; longer ones are rejected")
    max_pixels: int = option(
        501760, "largest picture in pixels, larger ones are scaled down (the authors': 501760); 0: the backbone's limit"
    )
    holdout: float = option(
        0.05, "share of the prompts set aside in <name>_holdout for validation; of a benchmark none"
    )
    without_images: bool = option(False, "leave all pictures out, where they are not at hand; the text is kept")
    allow_outside: bool = option(False, "read pictures whose paths or links lead out of the folders of --source, too")
    shard_size: int = option(512, "lines of input that make one shard")
    world_size: float = option(1.0, "size of the embedded world's data sets, as a multiple of the default")
    seed: int = option(0, "seed of the embedded world")


# ---------------------------------------------------------------------------------------------------------------------
# What all stages share: the command line, the process group, one-line errors, files that are whole or absent.


def read_settings(cls, doc: str):
    """Parses the command line into the dataclass `cls`; --help shows the script's own docstring `doc`."""
    parser = HfArgumentParser(cls, description=doc.split("\n\n")[0], epilog="The script's docstring says more.")
    return parser.parse_args_into_dataclasses(look_for_args_file=False)[0]


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
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=STORE, rank=rank, world_size=world)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # transformers compares image tokens with image features in every forward, for which it waits for the GPU; our
        # loader has compared the grids that both come from.
        os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    return dist.get_rank(), dist.get_world_size(), device


def run_stage(main: Callable, cls, doc: str) -> None:
    """Runs a stage's `main(settings)`; what the user got wrong ends in one line from one rank, not in tracebacks."""
    settings = read_settings(cls, doc)
    try:
        start_distributed()
        main(settings)
        dist.barrier()
    except (UserError, Unusable) as error:
        say_once(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(1)
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model, a cycle of references, that outlives its process group can abort the exit
            dist.destroy_process_group()


def say_once(message: str) -> None:
    """Prints what several ranks may have to say; who is not the first waits until it is said, since torchrun ends all
    ranks with the first that exits."""
    try:
        if STORE.add(f"to say: {message}", 1) > 1:
            return STORE.wait([f"said: {message}"], timedelta(seconds=10))
        print(message, file=sys.stderr, flush=True)
        STORE.set(f"said: {message}", "")
    except RuntimeError:  # the store's host has ended
        print(message, file=sys.stderr, flush=True)


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class Unusable(ValueError):
    """Why one line of data, or one comparison, cannot be used."""


@contextmanager
def writing(path: str | Path):
    """What goes wrong while `path` is written, a full disk or somebody else's folder, ends in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: could not be written: {reason}; free space, or another --out, then again") from None


@contextmanager
def in_place_of(path: Path):
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


def write_file(path: Path, content: str | bytes) -> None:
    with in_place_of(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with in_place_of(path) as temporary:
        save_file(tensors, temporary, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each yields (file, line number, a function that reads the line), so that a rank reads only its own lines.

Line = tuple[str, int, Callable[[], dict]]
WORLD = Path(__file__).parent / "tests" / "tiny" / "world.py"


@lru_cache
def embedded_world():
    """The embedded world, tests/tiny/world.py: it draws the pictures, asks the questions and knows the answers."""
    if not WORLD.is_file():
        raise UserError(f"{WORLD}: the embedded world is not there; give your own data with --source")
    spec = importlib.util.spec_from_file_location("embedded_world", WORLD)
    module = sys.modules["embedded_world"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_world(source: str, split: str, count: int, seed: str) -> Iterator[Line]:
    for index in range(count):
        yield f"world/{source}/{split}", index + 1, partial(embedded_world().record, source, split, seed, index)


def read_json(line: bytes) -> dict:
    """One line of JSON, in UTF-8 as the format wants it, and without what only Python takes for JSON."""
    if len(line) > LONGEST_LINE:
        raise Unusable(f"a line of more than {LONGEST_LINE >> 20} MB")
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=not_json)
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8: byte {line[error.start]:#x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise Unusable(f"not a JSON object but {type(record).__name__}")
    return record


def not_json(constant: str):
    raise ValueError(f"{constant} is not JSON")


LONGEST_LINE = 2**26  # bytes; of a longer one no more is held


def lines_of(file) -> Iterator[bytes]:
    """The lines of a binary file; of one that is too long, its beginning, which is too long as well."""
    while line := file.readline(LONGEST_LINE + 1):
        rest = line
        while rest and len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield line


@lru_cache(1)
def parquet_rows(file: str, group: int) -> list[dict]:
    try:
        return parquet_file(file).read_row_group(group).to_pylist()
    except (OSError, ValueError) as error:
        raise Unusable(f"row group {group} is damaged: {error}") from None


def parquet_file(file: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a parquet file: {error}") from None


def read_file(path: str) -> Iterator[Line]:
    """The rows of one file as they are; UserError where it cannot be read on, as one that is cut off."""
    try:
        yield from read_rows_of(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read to its end: {error}") from None


def read_rows_of(path: str) -> Iterator[Line]:
    """The rows of one file as they are, read only when asked for: .parquet, .tsv, .json if it is one list (which is
    read whole), else one JSON object a line, UTF-8, also as .gz. Empty lines are lines like others: they are rejected,
    not skipped."""
    if path.endswith(".parquet"):
        file = parquet_file(path).metadata
        counts = [file.row_group(k).num_rows for k in range(file.num_row_groups)]
        places = ((k, i) for k, count in enumerate(counts) for i in range(count))
        for number, (k, i) in enumerate(places, 1):
            yield path, number, partial(lambda k, i: parquet_rows(path, k)[i], k, i)
        return
    if path.endswith(".tsv"):
        csv.field_size_limit(2**31 - 1)  # a field may hold a picture
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1):
                yield path, number, partial(dict, row)
        return
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        if path.endswith(".json") and file.read(64).lstrip().startswith(b"["):
            try:
                rows = json.loads(Path(path).read_bytes())
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: not a list in JSON: {error}") from None
            for number, row in enumerate(rows, 1):
                yield path, number, partial(dict, row)
            return
        file.seek(0)
        for number, line in enumerate(lines_of(file), 1):
            yield path, number, partial(read_json, line)


DATA_FILES = (".parquet", ".json", ".jsonl", ".gz", ".tsv")


def read_rows(path: str, convert: Callable[[dict], dict] = dict, pattern: str = "**/*") -> Iterator[Line]:
    """The rows of a published file, of all files that match `path`, or of those in the folder `path` that match
    `pattern`, in the order of their names; `convert` makes a row a record in this project's JSON form, or raises
    Unusable."""
    if Path(path).is_file():
        files = [path]
    else:
        found = Path(path).glob(pattern) if Path(path).is_dir() else glob.glob(path)
        files = sorted(file for file in map(str, found) if file.endswith(DATA_FILES))
    if not files:
        raise UserError(f"--source {path}: no data files there{f' that match {pattern}' if pattern != '**/*' else ''}")
    for file in files:
        for name, number, read in read_file(file):
            yield name, number, partial(convert_row, read, convert)


def convert_row(read: Callable[[], dict], convert: Callable[[dict], dict]) -> dict:
    try:
        return convert(read())
    except Unusable:
        raise
    except KeyError as error:
        raise Unusable(f"missing field: {error.args[0]}") from None
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"not a row of this data set: {type(error).__name__}: {error}") from None


def read_rows_with_file(path: str, convert: Callable[[dict, Path], dict], pattern: str = "**/*") -> Iterator[Line]:
    """read_rows for rows that are not complete without the file they stand in: what lies beside it, or its name."""
    for file, number, read in read_rows(path, pattern=pattern):
        yield file, number, partial(convert_row, read, partial(lambda file, row: convert(row, file), Path(file)))


# ---------------------------------------------------------------------------------------------------------------------
# Families of backbones: all that differs between them. A new one is a line here, where it goes one of these ways.


@dataclass(frozen=True)
class Family:
    """What the backbones of one `model_type` have of their own; those for text alone have nothing."""

    language: str = ""  # where in the transformers model the decoder is; empty: it is the model
    vision: str = ""  # where the vision tower is (Qwen-VL's merger is in it, InternVL's projector is not); empty: none
    blocks: str = ""  # where in the tower its layers are
    mrope: bool = False  # the positions of an image's tokens are its rows and columns; else they count on as in text
    tiles: bool = False  # an image is cut into square tiles of one size; else scaled to whole patches
    around: tuple[str, str] = ("", "")  # the tokens before and behind an image's that the chat template does not have
    half: str = ""  # model_type of the decoder alone; empty: its text_config says, and that has to be supported too
    planned: bool = False  # 03 --plan knows what it computes and needs


QWEN_VL = {"language": "language_model", "vision": "visual", "blocks": "blocks", "mrope": True}
INTERN_VL = {"language": "language_model", "vision": "vision_tower", "blocks": "encoder.layer", "tiles": True}
FAMILIES = {
    "qwen2_5_vl": Family(**QWEN_VL, half="qwen2", planned=True),
    "qwen2_vl": Family(**QWEN_VL, half="qwen2"),
    "qwen3_vl": Family(**QWEN_VL, half="qwen3"),
    "internvl": Family(**INTERN_VL, around=("<img>", "</img>")),  # as OpenGVLab/InternVL3-8B-hf
    "qwen2": Family(planned=True),  # and Qwen2.5
    "qwen3": Family(),
    "llama": Family(),
}


def family_of(config, path: str) -> Family:
    """The family of a backbone by its config; raises UserError with what is supported where it is none of them."""
    text = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"{path}: a {config.model_type}; supported are {', '.join(FAMILIES)}")
    if not family.half and text.model_type not in FAMILIES:
        known = ", ".join(name for name, each in FAMILIES.items() if not each.vision)
        raise UserError(f"{path}: {config.model_type} with a decoder of type {text.model_type}; supported are {known}")
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        raise UserError(f"{path}: has layers with a sliding attention window, which are not supported")
    return family


# ---------------------------------------------------------------------------------------------------------------------
# A record becomes a comparison: checked, rendered by the chat template, tokenized, image tokens expanded.


@dataclass
class Comparison:
    """One prompt and N responses to it, ready for the model. Arrays are int32 token ids."""

    prompt: np.ndarray  # [P], image tokens expanded
    responses: list[np.ndarray]  # N x [R_i], each ending in the end-of-turn token
    ranks: list[int]  # N; 1 is best, equal ranks tie
    images: list[bytes] = field(default_factory=list)  # encoded files
    grids: np.ndarray = field(
        default_factory=partial(np.zeros, (0, 3), np.int32)
    )  # [images, 3] patches: time or tiles, height, width
    record: dict = field(default_factory=dict)  # id, category, answer, ...: what is carried along
    place: str = ""  # where it was read

    def __str__(self) -> str:
        """What messages call it."""
        return f"{self.place} (id {self.record['id']})" if "id" in self.record else self.place

    @property
    def length(self) -> int:
        """Tokens of the packed row [prompt | response 1 | ... | response N]."""
        return len(self.prompt) + sum(map(len, self.responses))


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
    image_token: int | None  # id of the token that stands for a piece of an image, <|image_pad|> or <IMG_CONTEXT>
    end_token: int  # id of what ends the assistant's turn, <|im_end|> or <|eot_id|>
    vision: "VisionShape | None"
    fingerprint: str  # of the vocabulary, the merges and the chat template: shards of another tokenizer are noise

    def save(self, folder: str) -> None:
        for part in (self.tokenizer, self.image):
            if part is not None:
                part.save_pretrained(folder)

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
    try:
        config = AutoConfig.from_pretrained(backbone)
        tokenizer, family = AutoTokenizer.from_pretrained(backbone), family_of(config, backbone)
        image = AutoImageProcessor.from_pretrained(backbone, backend="pil") if family.vision else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{backbone}: no tokenizer and config in the Hugging Face layout: {str(error).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template:  # older checkpoints of vision-language models have it in a file of its own
        found = cached_file(backbone, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if not found:
            raise UserError(f"{backbone}: its tokenizer has no chat template; take a checkpoint made for chat")
        tokenizer.chat_template = json.loads(Path(found).read_text())["chat_template"]
    vision, shape = None, getattr(config, "vision_config", None)
    if family.tiles:
        image.crop_to_patches = InternVLProcessor.images_kwargs["crop_to_patches"]  # goes before preprocessor_config's
        if max_pixels:
            image.max_patches = max(1, min(image.max_patches, max_pixels // image.size["height"] ** 2))
        vision = VisionShape(shape.patch_size[0], round(1 / config.downsample_ratio))
    elif family.vision:
        if max_pixels:
            image.size = {"shortest_edge": min(image.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
        table = math.isqrt(getattr(shape, "num_position_embeddings", 0))
        vision = VisionShape(image.patch_size, image.merge_size, getattr(shape, "window_size", 0), table)
    made_of = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    image_token = config.image_token_id if family.vision else None
    return Processors(tokenizer, image, family, image_token, end_of_turn(tokenizer), vision, fingerprint)


def end_of_turn(tokenizer) -> int:
    """The id of the first special token that the chat template sets behind an assistant's turn. It need not be the
    tokenizer's eos token, which is <|endoftext|> in Qwen's base models."""
    turns = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("\ue001")[2]
    special = set(tokenizer.get_added_vocab().values())
    ends = (token for token in tokenizer.encode(behind, add_special_tokens=False) if token in special)
    return next(ends, tokenizer.eos_token_id)


def use_pixel_limits(processors: Processors, sets: list) -> None:
    """Gives the image processor the pixel limits that the shards were prepared with, so that patches and tokens
    agree."""
    limits = [each.info["pixels"] for each in sets if each.info["pixels"]]
    if any(other != limits[0] for other in limits):
        raise UserError("the data sets were prepared with different --max_pixels; prepare them with the same")
    if limits and processors.image is not None:
        processors.pixels = limits[0]


# Not all that pillow reads: for EPS it would start Ghostscript.
PICTURES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
LARGEST_FILE = 2**28  # bytes of an encoded picture


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
            if image.mode in ("I", "F"):
                raise Unusable(f"unreadable image: its pixels are of mode {image.mode}, whose range is not known")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Unusable:
        raise
    except UnidentifiedImageError:
        start = f"begins with {content[:16]!r}" if content else "is empty"
        raise Unusable(f"unreadable image: none of {', '.join(PICTURES)}; the file {start}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable(f"unreadable image: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # a damaged file trips pillow's decoders in many ways
        raise Unusable(f"unreadable image: {error or type(error).__name__}") from None


def open_images(comparison: "Comparison", processors: "Processors") -> list[Image.Image]:
    """The decoded images of a comparison that goes to a model; UserError where its tokens are none of the model's or
    do not fit its images, as in shards that were damaged or made to harm."""
    if comparison.place:
        ids = np.concatenate([comparison.prompt, *comparison.responses])
        wrong = ids[(ids < 0) | (ids >= len(processors.tokenizer))]
        if len(wrong):
            raise UserError(f"{comparison}: damaged: token {wrong[0]} of {len(processors.tokenizer)}")
        patches, tokens = comparison.grids.prod(1).sum(), (ids == processors.image_token).sum()
        if processors.image is not None and patches != tokens * processors.vision.merge**2:
            raise UserError(f"{comparison}: damaged: {tokens} image tokens for {patches} patches")
    try:
        return [open_image(file) for file in comparison.images]
    except Unusable as error:
        raise UserError(f"{comparison}: {error}") from None


def text_in(value, what: str) -> str:
    """A text that can be encoded: JSON's \\ud800 alone is half of a character."""
    if not isinstance(value, str):
        raise Unusable(f"{what}: {type(value).__name__} where a text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{what}: half of a surrogate pair at character {error.start}") from None
    return value


def text_of(message, what: str) -> str:
    """The text of a response: a string, one assistant message, or a list of exactly one."""
    if isinstance(message, list) and len(message) == 1:
        message = message[0]
    if isinstance(message, dict):
        if message.get("role") != "assistant":
            raise Unusable(f"{what}: role is {message.get('role')!r}, not 'assistant'")
        message = message.get("content")
        if isinstance(message, list):
            if not all(isinstance(part, dict) and part.get("type", "text") == "text" for part in message):
                raise Unusable(f"{what}: has a part that is no text")
            message = "".join(text_in(part.get("text"), what) for part in message)
    if not isinstance(message, str):
        raise Unusable(f"{what}: not a text or a list of one assistant message")
    if not message.strip():
        raise Unusable(f"{what}: empty response")
    return text_in(message, what)


def check_messages(prompt) -> list[dict]:
    """The prompt's turns, `content` a string where there is only text and a list of parts where there are images."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise Unusable("prompt: not a list of messages")
    messages = []
    for turn in prompt:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise Unusable("prompt: a message without the role system, user or assistant")
        content = turn.get("content")
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
            raise Unusable("prompt: content is neither a string nor a list of parts")
        parts = []  # without what else a part says, which the chat template might take for an image
        for part in given:
            if part.get("type") == "text":
                parts.append({"type": "text", "text": text_in(part.get("text"), "prompt")})
            elif part.get("type") == "image":
                parts.append({key: part[key] for key in ("type", "image") if key in part})
            else:
                raise Unusable(f"prompt: a part of type {part.get('type')!r}; known are text and image")
        only_text = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if only_text else parts
        messages.append({"role": turn["role"], "content": content})
    if messages[-1]["role"] != "user":
        raise Unusable(f"prompt: ends with the role {messages[-1]['role']!r}, not 'user'")
    return messages


def text_alone(prompt) -> list[dict]:
    """The prompt's turns without their images."""
    turns = check_messages(prompt)
    for turn in turns:
        if isinstance(turn["content"], list):
            turn["content"] = [part for part in turn["content"] if part["type"] == "text"]
    return turns


def read_image(image, folder: Path, within: list[Path] | None = None) -> bytes:
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
    if not isinstance(image, str):
        raise Unusable(f"images: a {type(image).__name__} where a path should be")
    try:
        path = (folder / image).resolve()
        if within is not None and not any(path.is_relative_to(each) for each in within):
            raise Unusable(f"image outside the data's folder: {image}; --allow_outside reads it")
        if path.exists() and not path.is_file():
            raise Unusable(f"unreadable image: {image}: not a file")
        if path.stat().st_size > LARGEST_FILE:
            raise Unusable(f"unreadable image: {image}: a file of more than {LARGEST_FILE >> 20} MB")
        return path.read_bytes()
    except Unusable:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise Unusable(f"unreadable image: {image}: {getattr(error, 'strerror', None) or error}") from None


def encode_prompt(
    messages: list, images: list, processors: Processors, folder: Path = Path(), within: list[Path] | None = None
) -> tuple[np.ndarray, list[bytes], np.ndarray]:
    """Renders and tokenizes a prompt up to where the assistant's answer begins.

    Returns its token ids [P] with every image placeholder expanded to as many tokens as the vision tower will give, the
    images' encoded bytes, and their patch grids [images, 3]. Raises Unusable.
    """
    messages = check_messages(messages)
    parts = [part for turn in messages if isinstance(turn["content"], list) for part in turn["content"]]
    slots = [part for part in parts if part["type"] == "image"]
    images = [part["image"] for part in slots if part.get("image") is not None] or list(images)
    if images and not slots:  # as in TRL: images without a place stand before the first user turn's text
        first = next(turn for turn in messages if turn["role"] == "user")
        first["content"] = [{"type": "image"}] * len(images) + [{"type": "text", "text": first["content"]}]
        slots = images
    if len(images) != len(slots):
        raise Unusable(f"images: {len(images)} given, but the prompt has {len(slots)} places for them")
    if images and processors.image is None:
        raise Unusable("images: the backbone is text-only")
    if not images and not any(turn["content"].strip() for turn in messages if turn["role"] == "user"):
        raise Unusable("prompt: empty")
    files = [read_image(image, folder, within) for image in images]
    grids = np.array([patch_grid(open_image(file).size, processors) for file in files], np.int32).reshape(-1, 3)
    ids = tokenize_chat(messages, processors.tokenizer)
    if files:
        counts = iter(grids.prod(1) // processors.vision.merge**2)
        names = ([name] if name else [] for name in processors.family.around)
        before, after = map(processors.tokenizer.convert_tokens_to_ids, names)
        expand = lambda token: (
            [*before, *[token] * next(counts), *after] if token == processors.image_token else [token]
        )
        ids = np.array([each for token in ids for each in expand(token)], np.int32)
    return ids, files, grids


def patch_grid(size: tuple[int, int], processors: Processors) -> tuple[int, int, int]:
    """(time, height, width) in patches of an image of size (width, height) pixels, after Qwen-VL's resizing; or (tiles,
    height, width of each) where it is cut into tiles."""
    image, patch = processors.image, processors.vision.patch
    if processors.family.tiles:
        return image.get_number_of_image_patches(size[1], size[0]), *[image.size["height"] // patch] * 2
    try:
        limits = image.size
        unit = patch * processors.vision.merge
        height, width = smart_resize(size[1], size[0], unit, limits["shortest_edge"], limits["longest_edge"])
    except ValueError as error:
        raise Unusable(f"unusable image of {size[0]} x {size[1]} pixels: {error}") from None
    return 1, height // patch, width // patch


def tokenize_chat(messages: list[dict], tokenizer) -> np.ndarray:
    """The chat template's rendering as token ids [P], ending where the assistant's answer begins.

    The template's own special tokens become single ids; the same strings inside a user's text stay text. For that they
    are taken out before rendering, put back afterwards, and tokenized as ordinary characters.
    """
    # \ue000 and \ue001, private to this function, mark where something was taken out; a user's own are taken out too.
    special = re.compile("|".join(map(re.escape, [*tokenizer.get_added_vocab(), "\ue000", "\ue001"])))
    taken = []

    def safe(content: str | list[dict]) -> str | list[dict]:
        if isinstance(content, str):
            return special.sub(lambda found: taken.append(found[0]) or f"\ue000{len(taken) - 1}\ue001", content)
        return [part if part["type"] == "image" else {**part, "text": safe(part["text"])} for part in content]

    messages = [{**turn, "content": safe(turn["content"])} for turn in messages]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = []
    for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):  # at odd places, the numbers of what was taken
        ids += (
            tokenize_text(taken[int(piece)], tokenizer) if i % 2 else tokenizer.encode(piece, add_special_tokens=False)
        )
    return np.array(ids, np.int32)


def tokenize_text(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(text: str, processors: Processors) -> np.ndarray:
    """A response's token ids [R]: its text and the end-of-turn token, where its score will be read."""
    return np.array(tokenize_text(text, processors.tokenizer) + [processors.end_token], np.int32)


CARRIED = ("id", "category", "subset", "source", "group", "answer", "rule", "truth", "judged", "critiques")
TYPES = {  # of what a user may say; None is like not saying it
    "id": (str | int | float | None, "a text or a number"),
    "category": (str, "a text"),
    "subset": (str, "a text"),
    "source": (str, "a text"),
    "group": (str | int | float, "a text or a number"),
    "answer": (str | int | float | None, "a text or a number"),
    "critiques": (list | None, "a list"),
}

RULES = {  # how 06 can check an answer: what the answer looks like, and what a rule may say beside its kind
    "text": (r"(?s).*\w.*", {}),
    "letter": (r"[A-Z]", {"options": list}),
    "yes_no": (r"(?i)yes|no", {}),
    "number": (r".*\d.*", {"type": str, "precision": int, "unit": str}),
}


def check_rule(rule, answer) -> None:
    """Raises Unusable unless `rule`, a kind of RULES or {"kind": ..., and what it may say}, can check `answer`."""
    said = rule if isinstance(rule, dict) else {"kind": rule}
    kind = said.get("kind")
    if not isinstance(kind, str) or kind not in RULES:
        raise Unusable(f"rule: {kind!r}; known are {', '.join(RULES)}")
    form, may_say = RULES[kind]
    for key, value in said.items():
        if key != "kind" and not isinstance(value, may_say.get(key, ())):
            raise Unusable(f"rule: {kind} with {key} = {value!r}")
    if not re.fullmatch(form, str(answer).strip()):
        raise Unusable(f"answer: {answer!r} is none that the rule {kind} can check")
    if said.get("options") and ord(str(answer).strip()) - ord("A") >= len(said["options"]):
        raise Unusable(f"answer: {answer!r} of {len(said['options'])} options")


def check_carried(record: dict, responses: int) -> dict:
    """What is carried along with a comparison; raises Unusable where later stages could not read it."""
    carried = {key: record[key] for key in CARRIED if key in record}
    for key, value in carried.items():
        if key in TYPES and (not isinstance(value, TYPES[key][0]) or isinstance(value, bool)):
            raise Unusable(f"{key}: {type(value).__name__} where {TYPES[key][1]} should be")
    critiques = carried.get("critiques")
    if critiques is not None and (len(critiques) != responses or not all(isinstance(each, str) for each in critiques)):
        raise Unusable(f"critiques: not a list of {responses} texts, one for each response")
    try:
        json.dumps(carried, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, RecursionError) as error:
        raise Unusable(f"{', '.join(carried)}: cannot be written as JSON: {error}") from None
    return carried


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
    if "prompt" not in record:
        raise Unusable("missing field: prompt")
    if "responses" in record:
        answers, ranks = record["responses"], record.get("ranks")
        if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks):
            raise Unusable("responses and ranks: not two lists of the same length")
        if len(answers) < 2 or not all(type(rank) is int and 0 < rank < 2**31 for rank in ranks):
            raise Unusable("responses and ranks: at least two responses, each with a rank of 1 (best) or more")
        if len(set(ranks)) == 1:
            raise Unusable("ranks: all equal, so there is nothing to learn from or to score")
        texts = [text_of(answer, f"responses[{i}]") for i, answer in enumerate(answers)]
        if len(set(texts)) == 1:
            raise Unusable("responses: all identical")
    elif "chosen" in record or "rejected" in record:
        for key in ("chosen", "rejected"):
            if key not in record:
                raise Unusable(f"missing field: {key}")
        texts, ranks = [text_of(record[key], key) for key in ("chosen", "rejected")], [1, 2]
        if texts[0] == texts[1]:
            raise Unusable("chosen and rejected are identical")
    elif "answer" in record or "truth" in record or "judged" in record:
        texts, ranks = [], []  # a question for a policy
    else:
        raise Unusable("missing field: chosen and rejected, or responses and ranks, or answer")
    if "rule" in record:
        check_rule(record["rule"], record.get("answer"))
    carried = check_carried(record, len(texts)) | {"characters": [len(text) for text in texts]}
    prompt, images = record["prompt"], record.get("images") or []
    if not isinstance(images, list):
        raise Unusable("images: not a list")
    if without_images:
        prompt, images = text_alone(prompt), []
    prompt, files, grids = encode_prompt(prompt, images, processors, folder, within)
    responses = [encode_response(text, processors) for text in texts]
    longest = len(prompt) + max(map(len, responses), default=0)
    if longest > max_length:
        raise Unusable(f"{longest} tokens, more than --max_length {max_length}")
    return Comparison(prompt, responses, ranks, files, grids, carried)


# ---------------------------------------------------------------------------------------------------------------------
# Shards. Ragged lists lie flat, one behind the other, with int64 offsets: item i is flat[offset[i] : offset[i + 1]].

RAGGED = {
    "prompts": np.int32,
    "responses": np.int32,
    "ranks": np.int32,
    "images": np.uint8,
    "image_index": np.int32,
    "records": np.uint8,
}


def hash_of(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def prompt_hash(prompt: np.ndarray, image_token: int | None) -> int:
    """Of a prompt's text alone: the same for the same words about another picture."""
    return hash_of(prompt[prompt != image_token].astype(np.int32).tobytes())


def look_of(content: bytes) -> int:
    """64 bits that scaled or recompressed copies of a picture share, or nearly: where on a grid of 8 x 8 it is darker
    than to the right (dHash)."""
    image = open_image(content, draft=("L", (64, 64)))  # of a JPEG, decodes no more than is needed for this size
    small = np.asarray(image.convert("L").resize((9, 8)), int)
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


def flatten(items: list, dtype) -> tuple[np.ndarray, np.ndarray]:
    flat = np.concatenate([np.asarray(item, dtype) for item in items]) if items else np.zeros(0, dtype)
    return flat, np.cumsum([0, *map(len, items)], dtype=np.int64)


def write_shard(path: Path, comparisons: list[Comparison], image_token: int | None = None) -> None:
    """Writes comparisons as one safetensors file; an image that several share is stored once. The hashes are for
    finding what training data and a benchmark share."""
    files: dict[bytes, int] = {}
    grids, index = [], []
    for comparison in comparisons:
        for file, grid in zip(comparison.images, comparison.grids):
            if file not in files:
                files[file] = len(files)
                grids.append(grid)
        index.append([files[file] for file in comparison.images])
    items = {
        "prompts": [comparison.prompt for comparison in comparisons],
        "responses": [response for comparison in comparisons for response in comparison.responses],
        "ranks": [comparison.ranks for comparison in comparisons],  # its offsets also say whose responses are whose
        "images": [np.frombuffer(file, np.uint8) for file in files],
        "image_index": index,
        "records": [np.frombuffer(json.dumps(comparison.record).encode(), np.uint8) for comparison in comparisons],
    }
    tensors = {
        "grids": np.array(grids, np.int32).reshape(-1, 3),
        "prompt_hashes": np.array([prompt_hash(each.prompt, image_token) for each in comparisons], np.uint64),
        "image_hashes": np.array([hash_of(file) for file in files], np.uint64),
        "image_looks": np.array([look_of(file) for file in files], np.uint64),
    }
    for name, dtype in RAGGED.items():
        tensors[name], tensors[f"{name}_offsets"] = flatten(items[name], dtype)
    write_tensors(path, tensors, {"comparisons": f"format {FORMAT}"})  # one key: the order of several is not fixed


@contextmanager
def reading(path: Path, then: str = "run 01_data.py again"):
    """What is wrong with a file that an earlier stage wrote, but may come from anywhere, ends in one line."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        reason = f"missing: {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: damaged: {reason}; {then}") from None


def columns_of(file, dtypes: dict) -> dict[str, np.ndarray]:
    """Vectors of an open safetensors file; raises Unusable before any is read whose dtype or shape is another."""
    for name, dtype in dtypes.items():
        column = file.get_slice(name)
        if np.dtype(SAFETENSORS.get(column.get_dtype())) != dtype or len(column.get_shape()) != 1:
            raise Unusable(f"{name}: {column.get_dtype()} {column.get_shape()}, not a vector of {np.dtype(dtype)}")
    return {name: file.get_tensor(name) for name in dtypes}


SAFETENSORS = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}  # what we write, by its name there


class Shard:
    """One memory-mapped shard; nothing but offsets and grids is read before a comparison is asked for.

    Raises UserError where they do not fit each other or the file: what is read later is within it."""

    def __init__(self, path: Path):
        with reading(path):
            self.path, self.file = path, safe_open(path, framework="np")
            offsets = columns_of(self.file, {f"{name}_offsets": np.int64 for name in RAGGED})
            self.offsets = {name: offsets[f"{name}_offsets"] for name in RAGGED}
            self.image_index = columns_of(self.file, {"image_index": np.int32})["image_index"]
            self.grids = self.file.get_tensor("grids")
            self.check()

    def check(self) -> None:
        comparisons = len(self.offsets["prompts"]) - 1
        images = len(self.grids)
        items = {"responses": int(self.offsets["ranks"][-1]), "images": images}  # of the others, as many as comparisons
        for name, dtype in RAGGED.items():
            offsets, flat = self.offsets[name], self.file.get_slice(name)
            if SAFETENSORS.get(flat.get_dtype()) != dtype or not 0 < len(offsets) == items.get(name, comparisons) + 1:
                raise Unusable(f"{name}: {flat.get_dtype()}, {len(offsets) - 1} items")
            lengths = np.diff(offsets)
            if [offsets[0], [offsets[-1]]] != [0, flat.get_shape()] or lengths.min(initial=0) < 0:
                raise Unusable(f"{name}: offsets that do not fit its {flat.get_shape()} numbers")
            if name in ("prompts", "responses") and lengths.min(initial=1) < 1:
                raise Unusable(f"{name}: one of them is empty")
        index, grids = self.image_index, self.grids
        if grids.dtype != np.int32 or grids.shape != (images, 3) or not ((grids > 0) & (grids < 2**15)).all():
            raise Unusable(f"grids: {grids.dtype} {list(grids.shape)}")
        if index.min(initial=0) < 0 or index.max(initial=-1) >= images:
            raise Unusable(f"image_index: an image that is none of the {images} there are")

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
        summed = np.cumsum([0, *self.grids.astype(np.int64).prod(1)[self.image_index]])  # patches of all images
        responses = np.diff(self.offsets["responses"][self.offsets["ranks"]])
        found = {
            "tokens": np.diff(self.offsets["prompts"]) + responses,
            "patches": np.diff(summed[self.offsets["image_index"]]),
            "responses": np.diff(self.offsets["ranks"]),
        }
        return {name: found[name].astype(dtype) for name, dtype in PLANNING.items()}


PLANNING = {"tokens": np.int32, "patches": np.int32, "responses": np.int32}
HASHES = {"prompt_hashes": np.uint64, "image_hashes": np.uint64, "image_looks": np.uint64}


def write_index(folder: Path, shards: list[tuple[str, int]]) -> None:
    """Writes index.safetensors, what planning needs to know of every comparison, so that opening a data set takes no
    longer the more shards it has: tokens of the packed row [n], image patches [n], responses [n]; and all hashes."""
    columns = {name: [] for name in (*PLANNING, *HASHES)}
    for file, _ in shards:
        shard = Shard(folder / file)
        found = shard.planning() | columns_of(shard.file, HASHES)
        for name, column in columns.items():
            column.append(found[name])
    index = {name: np.concatenate(column or [[]]).astype((PLANNING | HASHES)[name]) for name, column in columns.items()}
    write_tensors(folder / "index.safetensors", index, {"comparisons": f"format {FORMAT}"})


def check_info(info: dict) -> None:
    """Raises Unusable or KeyError unless dataset.json says all that later stages ask for, and names nothing outside of
    its folder."""
    for key in ("name", "backbone", "tokenizer", "metric"):
        if not isinstance(info[key], str):
            raise Unusable(f"{key}: not a text")
    for name in (info["name"], *(name for name, _ in info["shards"])):
        if not re.fullmatch(r"[^/\0]+", name) or name in (".", ".."):
            raise Unusable(f"{name!r} is no name of a file")
    counts = [info["read"], info["rejected"], info["comparisons"], *(count for _, count in info["shards"])]
    if not all(type(count) is int and 0 <= count < 2**40 for count in counts):
        raise Unusable("read, rejected, comparisons and shards: have to be counts")
    if info["metric"] not in {source.metric for source in SOURCES.values()}:
        raise Unusable(f"metric: {info['metric']!r} is not known")
    limits = info["pixels"]
    if limits is not None:
        known = set(limits) in ({"tiles"}, {"shortest_edge", "longest_edge"})
        if not known or not all(type(limit) is int and 0 < limit < 2**40 for limit in limits.values()):
            raise Unusable(f"pixels: {limits}")
        if limits.get("shortest_edge", 0) > limits.get("longest_edge", 0):
            raise Unusable(f"pixels: {limits}")
    info["without_images"] = bool(info["without_images"])


class Comparisons(torch.utils.data.Dataset):
    """A prepared data set: `data[i]` is a Comparison, read at random from memory-mapped shards.

    `expect` is the fingerprint of the tokenizer that is going to read it; another one raises UserError. With
    `text_only`, only its comparisons without images.
    """

    def __init__(self, folder: str, expect: str | None = None, text_only: bool = False):
        path = Path(folder, "dataset.json")
        if not path.is_file():
            raise UserError(f"{folder}: no prepared data set there (dataset.json is missing); run 01_data.py first")
        self.folder = Path(folder)
        with reading(path):
            self.info = json.loads(path.read_bytes())
            written_with = self.info["format"]
        if written_with != FORMAT:
            raise UserError(
                f"{folder}: shards of format {written_with}, this code reads {FORMAT}; run 01_data.py again"
            )
        with reading(path):
            check_info(self.info)
        if expect and self.info["tokenizer"] != expect:
            raise UserError(
                f"{folder}: prepared with another tokenizer or chat template ({self.info['backbone']}); "
                "run 01_data.py again with --backbone set to this model"
            )
        self.starts = np.cumsum([0, *(count for _, count in self.info["shards"])])  # [shards + 1]
        self.opened: dict[int, Shard] = {}
        with reading(self.folder / "index.safetensors"):
            with safe_open(self.folder / "index.safetensors", framework="np") as index:
                self.index = columns_of(index, PLANNING)
            for name, column in self.index.items():
                if len(column) != self.starts[-1] or column.min(initial=0) < 0:
                    raise Unusable(f"{name}: {len(column)} numbers for {self.starts[-1]} comparisons")
        everything = np.arange(self.starts[-1])
        self.chosen = everything[self.index["patches"] == 0] if text_only else everything  # [n] places in the shards

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Comparison:
        at = int(self.chosen[i])
        k = int(np.searchsorted(self.starts, at, side="right")) - 1
        comparison, place = self.open(k)[at - int(self.starts[k])], f"{self.folder}[{at}]"
        characters = comparison.record.get("characters")
        if not isinstance(characters, list) or list(map(type, characters)) != [int] * len(comparison.ranks):
            raise UserError(f"{place}: damaged: its record does not say how long its responses are")
        return replace(comparison, place=place)

    def open(self, k: int) -> Shard:
        """The k-th shard; up to 512 stay open."""
        if k not in self.opened:
            if len(self.opened) == 512:
                del self.opened[next(iter(self.opened))]
            shard = self.opened[k] = Shard(self.folder / self.info["shards"][k][0])
            for name, column in shard.planning().items():
                if not np.array_equal(column, self.index[name][self.starts[k] : self.starts[k + 1]]):
                    raise UserError(f"{shard.path}: not the shard that index.safetensors is of; run 01_data.py again")
        return self.opened[k]

    def __getstate__(self) -> dict:
        """For loader processes, which open the files themselves."""
        return vars(self) | {"opened": {}}

    def hashes(self, name: str) -> np.ndarray:
        """Those of HASHES, of all prompts or images in the shards, in no order that matters."""
        with reading(self.folder / "index.safetensors"):
            with safe_open(self.folder / "index.safetensors", framework="np") as index:
                return columns_of(index, {name: HASHES[name]})[name]

    def response_counts(self) -> np.ndarray:
        """N of every comparison, [n]."""
        return self.index["responses"][self.chosen]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """For planning: tokens of the packed row [n] and image patches [n]."""
        return self.index["tokens"][self.chosen], self.index["patches"][self.chosen]


def data_folder(source: str) -> Path:
    """Where the pictures of a --source have to be: its folder, or that of its file; of a download, whose files are
    links into the cache, the data set's part of that."""
    name, path, _ = split_source(source)
    if name == "world":
        return Path()
    folder = Path(locate(name, path)).resolve()
    folder = folder if folder.is_dir() else folder.parent
    return folder.parents[1] if folder.parent.name == "snapshots" else folder


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
    folders = {each: Path(settings.out, each) for each in (name, f"{name}_holdout")[: 1 + (holdout > 0)]}
    if rank == 0:
        finished = (folders[name] / "dataset.json").is_file()
        for folder in folders.values():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for pattern in ("dataset.json", ".chunk-*", "shard-*")[: 3 if finished else 1]:
                for old in folder.glob(pattern):
                    old.unlink()
    dist.barrier()

    shard_name, record_name = "shard-{:05d}.safetensors".format, ".chunk-{:05d}.json".format
    progress = tqdm(desc=name, unit=" lines", disable=rank > 0, mininterval=1)
    for number in itertools.count():
        chunk = list(itertools.islice(lines, settings.shard_size))
        if not chunk:
            break
        progress.update(len(chunk))
        if number % world != rank:
            continue
        record = folders[name] / record_name(number)
        made_of = fingerprint(chunk, processors, settings, holdout)
        if is_made(record, made_of, {each: folder / shard_name(number) for each, folder in folders.items()}):
            continue
        kept, rejected = {each: [] for each in folders}, []
        for file, line, read in chunk:
            try:
                how = (settings.max_length, Path(file).parent, settings.without_images, within)
                comparison = encode_record(read(), processors, *how)
            except Unusable as error:
                rejected.append({"file": file, "line": line, "reason": str(error)})
                continue
            prompt = hashlib.sha256(comparison.prompt.tobytes() + b"".join(comparison.images)).digest()
            held_out = uniform(prompt) < holdout  # by prompt: the same one is never on both sides
            kept[f"{name}_holdout" if held_out else name].append(comparison)
        for each, comparisons in kept.items():
            if comparisons:
                write_shard(folders[each] / shard_name(number), comparisons, processors.image_token)
        counts = {each: len(comparisons) for each, comparisons in kept.items()}
        write_file(record, json.dumps({"made_of": made_of, "kept": counts, "rejected": rejected}))
    progress.close()
    dist.barrier()
    if rank > 0:
        return

    shards, rejected = {each: [] for each in folders}, 0
    with in_place_of(folders[name] / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for i in range(number):
            chunk = json.loads((folders[name] / record_name(i)).read_text())
            file.writelines(json.dumps(line) + "\n" for line in chunk["rejected"])
            rejected += len(chunk["rejected"])
            for each, count in chunk["kept"].items():
                shards[each] += [(shard_name(i), count)] if count else []
    kept = {each: sum(count for _, count in shards[each]) for each in folders}
    read = sum(kept.values()) + rejected
    for each, folder in reversed(folders.items()):  # the data set's own dataset.json last: it says that all is there
        for stray in {file.name for file in folder.glob("shard-*")} - {shard for shard, _ in shards[each]}:
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
            "seed": settings.seed,
            "backbone": settings.backbone,
            "tokenizer": processors.fingerprint,
            "max_length": settings.max_length,
            "pixels": processors.pixels,
            "shards": shards[each],
        }
        write_file(folder / "dataset.json", json.dumps(info, indent=1))
    for folder in folders.values():
        for hidden in folder.glob(".*"):  # the records, and what a run that was killed had not renamed yet
            hidden.unlink()
    held_out = f" ({kept[f'{name}_holdout']} of them held out in {name}_holdout)" if len(folders) > 1 else ""
    reasons = f"; reasons in {folders[name] / 'rejected.jsonl'}" if rejected else ""
    reasons += "; WITHOUT IMAGES, the text alone" if settings.without_images else ""
    print(
        f"{folders[name]}: read {read} = kept {sum(kept.values())}{held_out} + rejected {rejected}{reasons}", flush=True
    )


def fingerprint(chunk: list[Line], processors: Processors, settings: Settings, holdout: float) -> str:
    """Of all that a chunk's shard is made of. Files count by their size and time, the code among them."""
    lines = [(file, line) for file, line, _ in chunk]
    files = sorted({file for file, _ in lines} | {__file__, str(WORLD)})
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files if os.path.exists(file)]
    made_of = [FORMAT, lines, stats, vars(settings), holdout, processors.fingerprint]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def is_made(record: Path, made_of: str, shards: dict[str, Path]) -> bool:
    """Whether a chunk's record and shards are there and were made of the same."""
    chunk = json.loads(record.read_text()) if record.is_file() else {}
    return chunk.get("made_of") == made_of and all(shards[each].is_file() for each, n in chunk["kept"].items() if n)


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets. This is an appendix, to be looked up and added to rather than read through: each function takes a
# row as published and returns a record in this project's JSON form, or raises Unusable with the reason; SOURCES, at the
# end, names them. Fields are those of the sets' cards on the hub or of their authors' loaders; "unconfirmed" marks what
# neither says.
#
# Training sets.


def message(who: str, text: str) -> dict:
    """One turn of a conversation, whatever its set calls the two sides."""
    return {"role": {"human": "user", "gpt": "assistant"}.get(who.lower(), who.lower()), "content": text}


def with_images(text: str) -> list[dict]:
    """The parts of a text in which <image> marks the place of each picture. Where there are pictures and no mark, they
    stand before the text (encode_prompt)."""
    pieces = re.split("(<image>)", text)
    return [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces if piece]


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": with_images(text)}]


def last_turns(chosen: list[dict], rejected: list[dict]) -> dict:
    """Two whole conversations as one prompt and two responses: everything up to the last turn has to be the same."""
    chosen, rejected = (
        [{key: turn[key] for key in ("role", "content")} for turn in each] for each in (chosen, rejected)
    )
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected do not share everything up to the last assistant turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def rlaif_v(row: dict) -> dict:
    """RLAIF-V: 83,132 pairs with one picture, inside the parquet file. origin_split is a JSON string, not a split."""
    more = {"id": row["idx"], "category": row["origin_dataset"], "images": [row["image"]]}
    return {"prompt": row["question"], "chosen": row["chosen"], "rejected": row["rejected"], **more}


def mmpr(row: dict, root: Path) -> dict:
    """MMPR-v1.2: image is one path or several, relative to the root that meta.json gives its annotation file; the
    question may have <image> marks."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    paths = [str(root / image) for image in images if image]
    return {"prompt": question(row["question"]), "chosen": row["chosen"], "rejected": row["rejected"], "images": paths}


def read_mmpr(path: str) -> Iterator[Line]:
    """MMPR-v1.2 (about 2 M pairs): meta.json is {name: {root, annotation}}, both below "MMPR-v1.2/". It comes packed:

    cat images.zip_* > images.zip && unzip images.zip && unzip annotations.zip
    """
    folder = Path(path).resolve()
    if not (folder / "meta.json").is_file():
        raise UserError(f"--source mmpr:{path}: no meta.json there; PATH is the set's folder")
    for entry in json.loads((folder / "meta.json").read_bytes()).values():
        root, annotation = (folder / entry[key].removeprefix("MMPR-v1.2/") for key in ("root", "annotation"))
        yield from read_rows(str(annotation), partial(mmpr, root=root))


def video_frames(video: str, folder: Path, count: int) -> list[str]:
    """At most `count` pictures, evenly spread, of a video that is published as a folder of frames. Without frames it is
    the video's own path, which will be an unreadable image."""
    names = [path.name for path in (folder / video).glob("*") if path.is_file()]
    names.sort(key=lambda name: (len(name), name))  # frame 9 before frame 10
    spread = np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)
    return [f"{video}/{names[i]}" for i in spread] or [video]


def mm_rlhf(row: dict, file: Path) -> dict:
    """MM-RLHF (about 80,000 pairs): dpo_pairs.jsonl beside the unpacked long.zip, mcq.zip, safety.zip, short.zip and
    video.zip: a path to a picture or to the folder of a video's frames, of which 8 are taken; the reasons for the
    ranking, where both are there, are critiques."""
    path, reasons = row.get("image") or row["video"], [row.get("chosen_reason"), row.get("rejected_reason")]
    more = {"critiques": reasons} if all(reasons) else {}
    more |= {"category": path.split("/")[0]}
    more |= {"images": [path] if row.get("image") else video_frames(path, file.parent, 8)}
    return {"prompt": question(row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"], **more}


def r1_reward(row: dict) -> dict:
    """R1-Reward-RL: 17,261 rows. `message` is the JSON of a judge's prompt that holds both responses, `answer` is
    ["<answer>2</answer>"]; `image` is a string, by its size the picture itself in base64 (unconfirmed), else a path."""
    parts = [part for turn in json.loads(row["message"]) for part in turn["content"]]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    found = re.search(r"\[Response 1\]:(.*?)#+ *\[Response 2\]:(.*?)(?:#+ *\*\*Output Format|$)", text, re.DOTALL)
    better = re.fullmatch(r"\s*<answer>\s*([12])\s*</answer>\s*", row["answer"][0])
    if not found or not better:
        raise Unusable("message without [Response 1] and [Response 2]" if better else f"answer: {row['answer'][0]!r}")
    responses, ranks = [found[1].strip(), found[2].strip()], [1, 2] if better[1] == "1" else [2, 1]
    image = row["image"]
    if not image and any(part["type"] != "text" for part in parts):
        raise Unusable("image: empty, though the message shows one")
    if isinstance(image, str) and len(image) > 1000:  # no path
        image = base64.b64decode(image.rpartition(",")[2], validate=True)  # without "data:image/jpeg;base64,"
    return {"prompt": row["question"], "responses": responses, "ranks": ranks, "images": [image] if image else []}


def llama_factory(row: dict) -> dict:
    """LLaMA-Factory's preference data (its data/README.md): `conversations` of {from, value} with chosen and rejected
    {from, value}, or `instruction` and `input` with chosen and rejected strings; `system`, `history` and `images` where
    there are any."""
    for key in ("tools", "videos", "audios"):
        if row.get(key):
            raise Unusable(f"{key}: not supported")
    if row.get("conversations"):
        turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        chosen, rejected = row["chosen"]["value"], row["rejected"]["value"]
    else:
        turns = [turn for asked, said in row.get("history") or [] for turn in (("human", asked), ("gpt", said))]
        turns.append(("human", "\n".join(filter(None, (row["instruction"], row.get("input"))))))
        chosen, rejected = row["chosen"], row["rejected"]
    if row.get("system"):
        turns.insert(0, ("system", row["system"]))
    prompt = [message(who, with_images(text)) for who, text in turns]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": row.get("images") or []}


def read_mmif(path: str) -> Iterator[Line]:
    """MMIF-23k: LLaMA-Factory's form, in a .json below dpo/ (beside one for fine-tuning); that picture paths are
    relative to the set's folder is unconfirmed."""

    folder = (Path(path) if Path(path).is_dir() else Path(path).parent).resolve()

    def convert(row: dict) -> dict:
        record = llama_factory(row)
        return record | {"images": [str(folder / image) for image in record["images"]]}

    return read_rows(path, convert, "**/dpo/*.json")


def omnialign_v_dpo(row: dict) -> dict:
    """OmniAlign-V-DPO: about 133,000 pairs in one .jsonl for each kind, beside the unpacked images.tar; keys as in the
    authors' train_dpo.py, which sets the picture before the prompt whatever place <image> has."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    prompt = row["prompt"].replace("<image>", "").strip()
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], "images": images}


def ultrafeedback_all(row: dict) -> dict:
    """UltraFeedback: 63,967 prompts, each with up to four responses ranked by overall_score, as one comparison; equal
    scores tie."""
    answers = row["completions"]
    scores = [float(answer["overall_score"]) for answer in answers]
    if not all(map(math.isfinite, scores)):
        raise Unusable("overall_score: not a number")
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    more = {"critiques": [answer["critique"] for answer in answers], "category": row["source"]}
    responses = [answer["response"] for answer in answers]
    return {"prompt": row["instruction"], "responses": responses, "ranks": ranks, **more}


def ultrafeedback_hard(row: dict) -> dict:
    """The same, of each prompt only the pair with the largest score difference: the paper's Ultra-Hard. (The copy
    called "binarized" pairs the best with a random other.)"""
    record = ultrafeedback_all(row)
    pair = [record["ranks"].index(extreme) for extreme in (min(record["ranks"]), max(record["ranks"]))]
    return record | {key: [record[key][i] for i in pair] for key in ("responses", "ranks", "critiques")}


def shp(row: dict) -> dict:
    """SHP: 348,718 pairs of comments on a post; labels is 1 where A is the better one, 0 where B is. As is common, only
    pairs whose scores are in a ratio of 2 or more are taken, and of a post the first 5 (read_shp)."""
    if row["score_ratio"] < 2:
        raise Unusable("score_ratio below 2")
    if row["labels"] not in (0, 1):
        raise Unusable(f"labels: {row['labels']!r}, neither 1 nor 0")
    chosen, rejected = (row[f"human_ref_{letter}"] for letter in ("AB" if row["labels"] else "BA"))
    more = {"id": row["post_id"], "category": row["domain"]}
    return {"prompt": row["history"], "chosen": chosen, "rejected": rejected, **more}


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
            read = partial(reject, "more than 5 pairs of this post") if pairs[post] > 5 else read
        yield file, number, read


def reject(reason: str) -> dict:
    raise Unusable(reason)


def conversations(row: dict) -> dict:
    """Tulu-3 IF (65,551), Tulu-3's UltraFeedback (41,600) and WildChat (five named splits, no "train"), OLMo-2's mix
    (378,000): chosen and rejected are whole conversations, user turns included; `prompt` is a string or missing."""
    return last_turns(row["chosen"], row["rejected"]) | {"id": row.get("id")}


def swe_arena(row: dict) -> dict:
    """SWE-arena, now BigCodeArena: about 5,000 votes on two conversations with the same user; messages are [role, text]
    (what the two are is unconfirmed). Ties and votes for neither are dropped, and so are conversations of several turns
    in which the two models' earlier answers differ."""
    better = {"vote_model_A": "model_A", "vote_model_B": "model_B"}.get(row["feedback"]["vote_type"])
    if not better:
        raise Unusable(f"no better response: {row['feedback']['vote_type']}")
    worse = "model_B" if better == "model_A" else "model_A"
    chosen, rejected = ([message(*turn) for turn in row["states"][model]["messages"]] for model in (better, worse))
    return last_turns(chosen, rejected) | {"id": row["chat_session_id"]}


def hh_rlhf(row: dict) -> dict:
    """HH-RLHF: two transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ...", that should differ in the last answer only."""

    def turns(transcript: str) -> list[dict]:
        start, *pieces = re.split("\n\n(Human|Assistant):", transcript)
        if start.strip() or not pieces:
            raise Unusable("no transcript that begins with Human: or Assistant:")
        return [message(who, text.strip()) for who, text in zip(pieces[::2], pieces[1::2])]

    return last_turns(turns(row["chosen"]), turns(row["rejected"]))


def trl(row: dict) -> dict:
    """TRL's forms of preference data (its docs, Dataset formats): conversations or strings, with `prompt` or with an
    implicit one. Of two strings the prompt is what both begin with, up to a whole word, where TRL would cut words."""
    images = row.get("images") or [row["image"]] if row.get("image") else row.get("images")
    if row.get("prompt"):
        return row | {"images": images}
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):
        return last_turns(chosen, rejected) | {"images": images}
    same = re.match(r"(.*\s)?", os.path.commonprefix([chosen, rejected]), re.DOTALL).end()
    if not same:
        raise Unusable("no prompt, and chosen and rejected begin with different words")
    return {"prompt": chosen[:same].rstrip(), "chosen": chosen[same:], "rejected": rejected[same:], "images": images}


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks. What a benchmark calls right gets rank 1; the responses stay in the published order, so that another
# system's scores fit, and that order decides nothing. A row that does not say clearly which response is right is
# Unusable. "category" is the benchmark's own grouping. The metrics are in 04, by the same names.


def right_first(prompt, chosen: list, rejected: list, **more) -> dict:
    ranks = [1] * len(chosen) + [2] * len(rejected)
    return {"prompt": prompt, "responses": [*chosen, *rejected], "ranks": ranks, **more}


def one_of_two(prompt, responses: list, labels: tuple, label, **more) -> dict:
    """`label` is the one of the two `labels` that says that the first, or the second, response is right."""
    if label not in labels or len(responses) != 2:
        raise Unusable(f"{label!r} does not say which of two is better; there are {len(responses)} responses")
    return {"prompt": prompt, "responses": responses, "ranks": [1, 2] if label == labels[0] else [2, 1], **more}


def vl_rewardbench(row: dict) -> dict:
    """VL-RewardBench (arXiv 2411.17451), 1250 pairs; human_ranking holds the places of the two responses, 0 is better.

    The grouping is that of the official repository, by where an item comes from. Ids are not unique."""
    if row["id"].startswith(("hallucination", "RLAIF", "RLHF")):
        category = "hallucination"
    else:
        category = "reasoning" if row["id"].startswith(("mathverse", "mmmu")) else "general"
    more = {"id": row["id"], "category": category, "images": [row["image"]]}
    return one_of_two(row["query"], list(row["response"]), ([0, 1], [1, 0]), list(row["human_ranking"]), **more)


def mm_rlhf_rewardbench(row: dict, file: Path) -> dict:
    """MM-RLHF-RewardBench (arXiv 2502.10391), 170 pairs over 46 ids; its category is the first keyword in the path.

    A video's frames are given as pictures, 32 as the benchmark's own code takes, not as Qwen-VL's video input; so many
    want a large --max_length."""
    media = row.get("image") or row.get("video") or ""
    category = next((word for word in ("mcq", "long", "short", "safety", "video") if word in media), None)
    if category is None:
        raise Unusable(f"image or video: {media!r} names no category")
    images = [media] if row.get("image") else video_frames(media, file.parent, 32)
    more = {"id": row["id"], "group": row["id"], "category": category, "images": images}
    return right_first(row["prompt"], [row["chosen"]], [row["rejected"]], **more)


def multimodal_rewardbench(row: dict) -> dict:
    """Multimodal RewardBench (arXiv 2502.14191), all_data.json; the official script splits two categories by the id."""
    category = row["Category"]
    if category == "safety":
        category = "safety/bias" if row["ID"].lower().startswith("pairs") else "safety/toxicity"
    elif category == "reasoning":
        category = "reasoning/math" if row["ID"].lower().startswith("math") else "reasoning/coding"
    more = {"id": row["ID"], "category": category, "images": [row["Image"]]}
    return one_of_two(row["Text"], [row["Output1"], row["Output2"]], ("Output1", "Output2"), row["Better"], **more)


def rewardbench(row: dict) -> dict:
    """RewardBench (arXiv 2403.13787), the split `filtered`, 2985 pairs; the category is the subset."""
    return right_first(row["prompt"], [row["chosen"]], [row["rejected"]], id=row["id"], category=row["subset"])


def rewardbench_prior_set(row: dict, file: Path) -> dict:
    """The older test sets that count half in RewardBench's score; a file's name begins with the set, shp-00000.parquet.

    `chosen` and `rejected` are texts after the turns in `prompt`, or whole conversations."""
    pair = {key: row[key] for key in ("chosen", "rejected")}
    pair = last_turns(**pair) if isinstance(pair["chosen"], list) else pair | {"prompt": row["prompt"]}
    name = re.split(r"[-.]", file.name)[0]
    return right_first(pair["prompt"], [pair["chosen"]], [pair["rejected"]], category=name)


def rewardbench_2(row: dict) -> dict:
    """RewardBench 2 (arXiv 2506.01937), 1865 prompts: one right response of four; of Ties several right, many wrong."""
    chosen, rejected, correct, total = (row[k] for k in ("chosen", "rejected", "num_correct", "total_completions"))
    if len(chosen) != correct or len(chosen) + len(rejected) != total:
        raise Unusable(f"{len(chosen)} chosen and {len(rejected)} rejected, but {correct} correct of {total}")
    return right_first(row["prompt"], chosen, rejected, id=row["id"], category=row["subset"])


def rm_bench(row: dict, file: Path) -> dict:
    """RM-Bench (arXiv 2410.16184), 1327 prompts, 3 chosen and 3 rejected: concise, detailed plain, detailed markdown.

    total_dataset.json has the domain in each row; chat_filtered.json and the like only in their names."""
    chosen, rejected = row["chosen"], row["rejected"]
    if len(chosen) != 3 or len(rejected) != 3:
        raise Unusable(f"{len(chosen)} chosen and {len(rejected)} rejected, not 3 styles of each")
    place = row.get("domain") or file.name
    domain = next((domain for domain in ("chat", "code", "math", "safety") if domain in place), None)
    if domain is None:
        raise Unusable(f"domain: {place!r} is none of chat, code, math and safety")
    return right_first(row["prompt"], chosen, rejected, id=row["id"], category=domain)


def judgebench(row: dict) -> dict:
    """JudgeBench (arXiv 2410.12784): 350 pairs of GPT-4o's responses and 270 of Claude 3.5 Sonnet's, one file each. The
    category is the first part of `source`, "mmlu-pro-law"."""
    categories = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"}
    categories |= {"livebench-math": "math", "livecodebench": "coding"}
    category = next((name for start, name in categories.items() if row["source"].startswith(start)), None)
    if category is None:
        raise Unusable(f"source: {row['source']!r} begins with none of {', '.join(categories)}")
    more = {"id": row["pair_id"], "category": category, "subset": row["response_model"]}
    responses = [row["response_A"], row["response_B"]]
    return one_of_two(row["question"], responses, ("A>B", "B>A"), row["label"], **more)


def llmbar(row: dict, file: Path) -> dict:
    """LLMBar (arXiv 2310.07641), 419 pairs in files dataset.json, each in a folder named after its subset."""
    subset = file.parent.name if file.stem == "dataset" else file.stem
    return one_of_two(row["input"], [row["output_1"], row["output_2"]], (1, 2), row["label"], category=subset)


# ---------------------------------------------------------------------------------------------------------------------
# Questions with answers that a rule can check.
#
# Each function makes one published row a question: the prompt in the words of the benchmark, `answer`, and the `rule`
# by which 06 checks it. A row without an answer, as in most test splits, is rejected.

LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA's words, since then everyone's


def picture_question(text: str, image: str | bytes | dict, **more) -> dict:
    """A record that asks about one picture, which stands before the text."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return {"prompt": [{"role": "user", "content": content}], "images": [image], **more}


def lettered(options: list[str]) -> str:
    """Options one a line, each behind its letter: "A. red", "B. blue"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options))


def vstar(row: dict) -> dict:
    """V*, the training data of SEAL (craigwu/seal_vqa_data): GQA_data, vaw_attribute_data, spatial_relation_data and
    llava_focus_data.json, lists of {image, conversations: [{from, value}, ...], target_instances: [{name, bbox}]}.
    `image` is a path below the folder of the JSON file: gqa/images/, coco2014/train2014/, coco2017/train2017/.

    The first turn names the objects to look at before the question, in front of which "<object>." ends the line; it is
    cut off there, and rows without objects (negative_data and llava_instruct_data.json) are left out, both as DeepEyes
    did (arXiv 2505.14362), whose three sets of prompts are the paper's. The answers are sentences. Of those that begin
    with Yes or No that word is checked; the others have to be matched whole, which few policies will do, so it is the
    reward model that tells their answers apart. (DeepEyes had a language model compare them.)
    Fields as in SEAL's train.py and in readers of others; the files themselves we have not seen."""
    if not row["target_instances"]:
        raise Unusable("no target_instances: not a question about objects")
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    text = asked.split("<object>.\n")[-1].replace("<image>", "").strip()
    said = re.match(r"(Yes|No)([,.]|$)", answered)
    answer, rule = (said[1], "yes_no") if said else (answered, "text")
    return picture_question(text, row["image"], answer=answer, rule=rule, category="vstar")


def arxivqa(row: dict) -> dict:
    """ArXivQA (MMInstruction/ArxivQA, arxivqa.jsonl and images.tgz): id, image (a path), question, options, label,
    rationale. Written by GPT-4V and not cleaned: options with or without their letters ("A) red"), labels like "B",
    "B)", "[B]" or the whole option, separators and headings among the options; rows with those are left out.
    The set has no prompt of its own. Fields and flaws as in readers of others; the file itself we have not seen."""
    options = [option.strip() for option in row["options"]]
    if any(option in ("", "-") or option.startswith("#") for option in options):
        raise Unusable("options: one of them is empty, a separator or a heading")
    own = [re.match(rf"[(\[]?{a}[.):\]]+\s*(.+)", option) for a, option in zip(string.ascii_uppercase, options)]
    if all(own):  # else "B. cereus" would lose the genus
        options = [found[1] for found in own]
    label = re.match(r"[(\[]?([A-Z])(?![A-Za-z])", row["label"].strip())
    if not label:
        raise Unusable(f"label: {row['label']!r} does not begin with a letter")
    text = f"{row['question']}\n{lettered(options)}\n{LETTER}"
    rule = {"kind": "letter", "options": options}
    return picture_question(text, row["image"], id=row["id"], answer=label[1], rule=rule, category="arxivqa")


def thinklite_vl(row: dict) -> dict:
    """ThinkLite-VL (russwang/ThinkLite-VL-hard-11k, parquet): id, problem ("<image>", then the question with its
    options and instruction), answer, image (bytes); also ground_truth and choices, which are not read: `answer` is what
    the authors' own search is given (mcts.py). What an answer looks like decides its rule. Fields as in the authors'
    code; that a multiple choice's answer is its letter is unconfirmed."""
    answer = str(row["answer"]).strip()
    kinds = {"letter": r"[A-Z]", "yes_no": r"(?i)yes|no", "number": r"-?[\d,]*\.?\d+"}
    rule = next((kind for kind, form in kinds.items() if re.fullmatch(form, answer)), "text")
    text = row["problem"].replace("<image>", "").strip()
    return picture_question(text, row["image"], id=row["id"], answer=answer, rule=rule, category="thinklite-vl")


def read_mmbench(path: str) -> Iterator[Line]:
    """MMBench (MMBench_DEV_EN.tsv and its like from VLMEvalKit). To save space the rotations of a question have the
    index of another row where the picture should be; that row stands before them."""
    images: dict[str, str] = {}
    for file, number, read in read_rows(path, pattern="**/*.tsv"):
        row = read()
        image = row.get("image") or ""
        if len(image) > 64:  # VLMEvalKit's test of which it is
            images[row.get("index")] = image
        yield file, number, partial(convert_row, partial(dict, row, image=images.get(image, image)), mmbench)


def mmbench(row: dict) -> dict:
    """index, question, hint, A, B, C, D, answer, category, image (base64), l2-category (also L2-category), split.
    What is missing is empty or "nan"; the test split has no answers. The prompt is VLMEvalKit's, ImageMCQDataset.

    index = rotation * 1,000,000 + question: each question is asked again with its options rotated, and those rows are
    one group, for CircularEval."""
    given = {key: value for key, value in row.items() if value not in (None, "", "nan")}
    if "answer" not in given:
        raise Unusable("no answer: the answers of the test split are not published")
    options = list(itertools.takewhile(bool, (given.get(letter) for letter in "ABCDEFGH")))
    text = f"Hint: {given['hint']}\n" if "hint" in given else ""
    text += f"Question: {given['question']}\nOptions:\n{lettered(options)}\n"
    text += "Please select the correct answer from the options above. \n"
    category = given.get("l2-category") or given.get("L2-category") or given["category"]
    more = {"id": given["index"], "group": int(given["index"]) % 1_000_000, "category": category}
    rule = {"kind": "letter", "options": options}
    image = base64.b64decode(given["image"], validate=True)
    return picture_question(text, image, answer=given["answer"], rule=rule, **more)


def mme(row: dict) -> dict:
    """MME (lmms-lab/MME, parquet): question_id, image, question, answer, category; two questions with the same
    question_id for each picture, one answered Yes and one No. "Please answer yes or no." is part of the question."""
    more = {"id": row["question_id"], "group": row["question_id"], "category": row["category"]}
    return picture_question(row["question"], row["image"], answer=row["answer"].strip(), rule="yes_no", **more)


def mmstar(row: dict) -> dict:
    """MMStar (Lin-Chen/MMStar, mmstar.parquet): index, question (its options in it, "Options: A: ..., B: ..."), image,
    answer (a letter), category (6), l2_category (18), meta_info."""
    text = f"{row['question'].strip()}\n{LETTER}"
    more = {"id": row["index"], "category": row["category"]}
    return picture_question(text, row["image"], answer=row["answer"].strip(), rule="letter", **more)


def mathvista(row: dict) -> dict:
    """MathVista (AI4Math/MathVista, testmini*.parquet): pid, question, image (a path), decoded_image, choices, unit,
    precision (a float), answer, question_type, answer_type, metadata {task, ...}, query. `query` is the benchmark's
    zero-shot prompt, built from the others: a hint about the form, the question with its unit, the choices. The answer
    to a multiple choice is the choice's text; the test split has no answers."""
    answer = row["answer"]
    if answer in (None, ""):
        raise Unusable("no answer: the answers of the test split are not published; testmini has them")
    if row["question_type"] == "multi_choice":
        choices = list(row["choices"])
        if answer not in choices:
            raise Unusable(f"answer: {answer!r} is none of the choices")
        answer, rule = string.ascii_uppercase[choices.index(answer)], {"kind": "letter", "options": choices}
    else:
        rule = {"kind": "number", "type": row["answer_type"]}
        if row["precision"] is not None:
            rule["precision"] = int(row["precision"])
        if row["unit"]:
            rule["unit"] = row["unit"]
    more = {"id": row["pid"], "category": row["metadata"]["task"]}
    return picture_question(row["query"], row["decoded_image"], answer=answer, rule=rule, **more)


def vstar_bench(row: dict) -> dict:
    """V*Bench (craigwu/vstar_bench: test_questions.jsonl, its pictures beside it; or lmms-lab/vstar-bench's parquet):
    image, text (the question and its options, "(A) rubber"), category (direct_attributes, relative_position),
    question_id, label. SEAL's own evaluation compares the options' likelihoods instead of asking for a letter."""
    text = row["text"].strip()
    text = text if text.endswith(LETTER) else f"{text}\n{LETTER}"  # there are copies with and without it
    more = {"id": row["question_id"], "category": row["category"]}
    return picture_question(text, row["image"], answer=row["label"].strip(), rule="letter", **more)


# Two benchmarks need a judge model. Their questions have no answer but `judged`: what, beside the policy's answer, is
# in a line of the file that their judge reads. 06 writes it.


def llava_in_the_wild(row: dict) -> dict:
    """LLaVA-Bench in the Wild (liuhaotian/llava-bench-in-the-wild, questions.jsonl): question_id, image (a name in
    images/), text, category (conv, detail, complex)."""
    judged = {"question_id": row["question_id"], "prompt": row["text"]}
    more = {"id": row["question_id"], "category": row["category"]}
    return picture_question(row["text"], f"images/{row['image']}", judged=judged, **more)


def wildvision(row: dict) -> dict:
    """WildVision-Bench (WildVision/wildvision-bench, vision_bench_0617): question_id, instruction, image, language."""
    judged = {key: row[key] for key in ("question_id", "instruction", "language")}
    return picture_question(
        row["instruction"], row["image"], judged=judged, id=row["question_id"], category="wildvision"
    )


# ---------------------------------------------------------------------------------------------------------------------
# All of them by name.


@dataclass
class Source:
    """Where published data comes from: how its files are read, what they are called on the hub, how it is scored."""

    read: Callable[[str], Iterator[Line]]  # of a downloaded file or folder
    hub: str = ""  # "owner/name" of the data set, for the download
    metric: str = ""  # of a benchmark: its official one, a name in 04 (of questions for a policy: in 06)


def rows(convert: Callable, pattern: str = "**/*", with_file: bool = False) -> Callable[[str], Iterator[Line]]:
    return partial(read_rows_with_file if with_file else read_rows, convert=convert, pattern=pattern)


SOURCES: dict[str, Source] = {
    "jsonl": Source(read_rows),
    "world": Source(read_world),  # see open_source
    "trl": Source(rows(trl)),
    "llama-factory": Source(rows(llama_factory)),
    "rlaif-v": Source(rows(rlaif_v, "**/*.parquet"), "openbmb/RLAIF-V-Dataset"),
    "mmpr": Source(read_mmpr, "OpenGVLab/MMPR-v1.2"),
    "mm-rlhf": Source(rows(mm_rlhf, "dpo_pairs.jsonl", with_file=True), "yifanzhang114/MM-RLHF"),
    "r1-reward": Source(rows(r1_reward, "**/train-*.parquet"), "yifanzhang114/R1-Reward-RL"),
    "mmif": Source(read_mmif, "ChrisDing1105/MMIF-23k"),
    "omnialign-v-dpo": Source(rows(omnialign_v_dpo, "*.jsonl"), "PhoenixZ/OmniAlign-V-DPO"),
    "ultrafeedback-all": Source(rows(ultrafeedback_all), "openbmb/UltraFeedback"),
    "ultrafeedback-hard": Source(rows(ultrafeedback_hard), "openbmb/UltraFeedback"),
    "shp": Source(read_shp, "stanfordnlp/SHP"),
    "tulu-3-if": Source(rows(conversations, "**/*.parquet"), "allenai/tulu-3-IF-augmented-on-policy-70b"),
    "tulu-3-ultrafeedback": Source(
        rows(conversations, "**/*.parquet"), "allenai/tulu-3-ultrafeedback-cleaned-on-policy-70b"
    ),
    "wildchat": Source(rows(conversations, "**/*.parquet"), "allenai/tulu-3-wildchat-ultrafeedback"),
    "olmo-2": Source(rows(conversations, "**/*.parquet"), "allenai/olmo-2-0425-1b-preference-mix"),
    "swe-arena": Source(rows(swe_arena, "**/*.parquet"), "bigcode/bigcodearena-preference-5k"),
    "hh-rlhf": Source(rows(hh_rlhf, "**/train.jsonl.gz"), "Anthropic/hh-rlhf"),
    "vl-rewardbench": Source(rows(vl_rewardbench), "MMInstruction/VL-RewardBench", "vl-rewardbench"),
    "mm-rlhf-rewardbench": Source(
        rows(mm_rlhf_rewardbench, "**/*.jsonl", with_file=True),
        "yifanzhang114/MM-RLHF-RewardBench",
        "mm-rlhf-rewardbench",
    ),
    "multimodal-rewardbench": Source(  # not on the hub: github.com/facebookresearch/multimodal_rewardbench
        rows(multimodal_rewardbench, "**/all_data.json"), metric="multimodal-rewardbench"
    ),
    "rewardbench": Source(rows(rewardbench, "**/filtered*"), "allenai/reward-bench", "rewardbench"),
    "rewardbench-prior-sets": Source(
        rows(rewardbench_prior_set, "**/*", with_file=True), "allenai/preference-test-sets", "rewardbench"
    ),
    "rewardbench-2": Source(rows(rewardbench_2), "allenai/reward-bench-2", "rewardbench-2"),
    "rm-bench": Source(rows(rm_bench, "**/total_dataset.json", with_file=True), "THU-KEG/RM-Bench", "rm-bench"),
    "judgebench": Source(rows(judgebench), "ScalerLab/JudgeBench", "judgebench"),
    "llmbar": Source(  # github.com/princeton-nlp/LLMBar, its folder Dataset/LLMBar
        rows(llmbar, "**/dataset.json", with_file=True), metric="llmbar"
    ),
    # Questions for a policy: to train on,
    "vstar": Source(rows(vstar, "**/*_data.json"), "craigwu/seal_vqa_data"),
    "arxivqa": Source(rows(arxivqa, "**/*.jsonl"), "MMInstruction/ArxivQA"),
    "thinklite-vl": Source(rows(thinklite_vl, "**/*.parquet"), "russwang/ThinkLite-VL-hard-11k"),
    # to evaluate on,
    "mmbench": Source(read_mmbench, metric="circular"),
    "mme": Source(rows(mme, "**/*.parquet"), "lmms-lab/MME", "mme"),
    "mmstar": Source(rows(mmstar, "**/*.parquet"), "Lin-Chen/MMStar", "accuracy"),
    "mathvista": Source(rows(mathvista, "**/testmini*.parquet"), "AI4Math/MathVista", "accuracy"),
    "vstar-bench": Source(rows(vstar_bench, "**/test_questions.jsonl"), "craigwu/vstar_bench", "accuracy"),
    # and for a judge model to read.
    "llava-in-the-wild": Source(
        rows(llava_in_the_wild, "**/questions.jsonl"), "liuhaotian/llava-bench-in-the-wild", "llava-in-the-wild"
    ),
    "wildvision": Source(
        rows(wildvision, "**/vision_bench_0617/*.parquet"), "WildVision/wildvision-bench", "wildvision"
    ),
}

# The seven sets that the paper keeps, 2.85 M pairs by its count. It keeps or drops whole sets, so none has a limit.
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


def split_source(source: str) -> tuple[str, str, float]:
    """`name:PATH@LIMIT` as (name, PATH, LIMIT). What has no name in SOURCES is a path in this project's JSON form, what
    follows an @ and is no number belongs to the path. LIMIT is a number of rows, below 1 a share of them, inf: all."""
    found = re.fullmatch(r"(.*)@(\d+|0?\.\d+)", source)
    source, limit = (found[1], float(found[2])) if found else (source, math.inf)
    name, colon, path = source.partition(":")
    return (name, path, limit) if name in SOURCES and (colon or not Path(source).exists()) else ("jsonl", source, limit)


def open_source(source: str, seed: int = 0) -> Iterator[Line]:
    """The lines of one --source, which is located at once. A share of them is chosen by a hash of the line's number, so
    that all ranks choose the same. `seed` is for the embedded world's."""
    name, path, limit = split_source(source)
    if name == "world":
        parts = embedded_world().SOURCES
        if path not in parts or not 1 <= limit < math.inf:
            raise UserError(f"--source {source}: should be world:PART@COUNT, PART one of {', '.join(parts)}")
        return read_world(path, "train", int(limit), str(seed))
    lines = SOURCES[name].read(locate(name, path))
    if limit < 1:
        lines = (line for i, line in enumerate(lines) if uniform(hashlib.sha256(b"%d" % i).digest()) < limit)
    elif limit < math.inf:
        lines = itertools.islice(lines, int(limit))
    known = {} if name == "jsonl" else {"source": name}
    return ((file, number, partial(lambda read: known | read(), read)) for file, number, read in lines)


def default_name(source: str) -> str:
    """What a data set made of this source is called: after its file or folder, or like the source itself."""
    name, path, _ = split_source(source)
    if Path(path).is_file():
        return Path(path.removesuffix(".gz")).stem
    return name if "*" in path else Path(path).name or name


def uniform(digest: bytes) -> float:
    """A hash as a number from 0 to 1."""
    return int.from_bytes(digest[:4], "big") / 2**32


@lru_cache
def locate(name: str, path: str) -> str:
    """PATH where something is there; otherwise the data set of that name on the hub, or the source's own, downloaded
    into the hub's cache. Rank 0 goes first, so that what other ranks ask for is there already."""
    if path and (Path(path).exists() or glob.glob(path)):
        return path
    repo = path or SOURCES[name].hub
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.endswith(DATA_FILES):
        raise UserError(
            f"--source {path or name}: nothing there. A source is a file or name:PATH, name one of {', '.join(SOURCES)}"
        )
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


def mix_sources(mix: str, folder: str) -> list[str]:
    """The sources of a mixture, in `folder` by their names on the hub; UserError says how to get what is missing."""
    if mix not in MIXES:
        raise UserError(f"--mix {mix}: not one of {', '.join(MIXES)}")
    parts = [split_source(part)[:2] for part in MIXES[mix]]
    repos = [(SOURCES[name].hub, f"{folder or '.'}/{SOURCES[name].hub}") for name, _ in parts]
    missing = [download_command(*repo) for repo in repos if not Path(repo[1]).is_dir()]
    if missing:
        raise UserError(
            "\n    ".join([f"--mix {mix}: {len(missing)} of its sets are missing in --mix_folder:", *missing])
        )
    return [f"{name}:{place}/{path}" for (name, path), (_, place) in zip(parts, repos)]


def official_metric(sources: list[str]) -> str:
    """The metric by which a data set made of these sources is scored; empty if they are no benchmark."""
    names = [split_source(source)[0] for source in sources]
    metrics = {SOURCES[name].metric for name in names}
    if len(metrics) > 1:
        raise UserError(f"--source: {' and '.join(names)} are not scored together; prepare each by itself")
    return metrics.pop() if metrics else ""


# ---------------------------------------------------------------------------------------------------------------------
# All that this stage does.


def main(settings: Settings) -> None:
    processors = load_processors(settings.backbone, settings.max_pixels)
    if settings.mix:
        settings.source += mix_sources(settings.mix, settings.mix_folder)
    if settings.source:
        name = settings.name or settings.mix or default_name(settings.source[0])
        lines = itertools.chain.from_iterable([open_source(source, settings.seed) for source in settings.source])
        holdout = 0 if official_metric(settings.source) else settings.holdout  # a benchmark is kept whole
        within = None if settings.allow_outside else [data_folder(source) for source in settings.source]
        prepare(name, lines, processors, settings, holdout, within)
    else:
        for name, (parts, holdout) in embedded_world().SETS.items():
            sized = [(source, split, int(count * settings.world_size)) for source, split, count in parts]
            lines = (line for part in sized for line in read_world(*part, f"{settings.seed}/{name}"))
            prepare(name, lines, processors, settings, holdout)
    if dist.get_rank() == 0:
        print("Next: torchrun --standalone --nproc_per_node=2 02_model.py")


if __name__ == "__main__":
    run_stage(main, Settings, __doc__)
