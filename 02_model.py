"""Stage 2 · the reward model: a Qwen-VL backbone and a 2-layer SiLU head, and the one forward of this codebase

    torchrun --standalone --nproc_per_node=2 02_model.py                            # tests/tiny + a new head
    torchrun --standalone --nproc_per_node=8 02_model.py --backbone Qwen/Qwen2.5-VL-7B-Instruct

In    A backbone in the Hugging Face layout: a Qwen2.5-VL, or a text-only Qwen2.
Out   artifacts/model/: the same layout without the LM head, plus reward_head.safetensors; printed: what it is made of,
      and the shapes on one comparison's way through it.

A comparison is encoded ONCE. The row is [prompt | response 1 | ... | response N]. Every response attends to the prompt
and to itself, never to a sibling; each one's positions continue where the prompt's end; its score is read at its own
last token, the <|im_end|> that closes it. Comparisons stand one behind the other in one row with no padding. The scores
are those of one forward per response, for about N(P + R) / (P + NR) times less work and N times fewer images:

                     keys   prompt      response 1   response 2
      queries  prompt       causal
               response 1   all         causal
               response 2   all                      causal

The paper: the LM head is replaced by an MLP of 2 layers with SiLU between, chosen from depths 1-5 and no activation,
tanh, SiLU. It does not give the width (we take the hidden size, as its predecessor MM-RLHF does) nor the token at which
the score is read (we take the last, as the authors' public command).

It chose this naive kind of reward model over two others, which keep their LM head and are here too (--kind):
  - critic: it first writes a critique of each response, then the head scores prompt, response and critique. In the row
    a response is followed by the request for a critique, a turn of the user, and the critique, at whose end the score
    is read.
  - generative: it is shown two responses and answers A or B. A response of the row is such a pair, with the question
    which is better behind it, so the prompt is still read once for all N(N - 1) ordered pairs. A pair's score is the
    difference of the two letters' log-odds, averaged over both orders; a response's the sum over its pairs. It writes
    no rationale first: one token is the cheapest such judge there is, and its score is exact.
Deviation: the head computes in float32 even where the backbone computes in bfloat16, whose spacing near 4 is 0.03.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

data = importlib.import_module("01_data")  # a module name that starts with a digit cannot be written after `import`
option, Comparison, Processors, UserError = data.option, data.Comparison, data.Processors, data.UserError

ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass
class HeadSettings:
    head_layers: int = option(2, "linear layers of the reward head, 1 to 5 (paper: 2)")
    head_activation: Literal["none", "tanh", "relu", "silu"] = option("silu", "between the head's layers (paper: silu)")
    head_width: int = option(
        0, "width of the head's inner layers; 0: the backbone's hidden size (the paper gives none)"
    )
    kind: Literal["naive", "critic", "generative"] = option(
        "naive",
        "the head on the response (paper's choice), or on the response and its critique; or which of two, A or B",
    )
    request: str = option(
        "", "critic, generative: the user's turn that asks for it; '': as the embedded backbone knows"
    )
    critique_tokens: int = option(96, "critic: longest critique that it writes, in tokens")


@dataclass
class Settings(HeadSettings):
    backbone: str = option("tests/tiny", "checkpoint in the Hugging Face layout: a directory or a hub name")
    out: str = option("artifacts/model", "folder for the initial reward model")
    data: str = option("artifacts/data/train", "prepared shards; their first comparison is shown on its way through")
    seed: int = option(0, "seed of the head's initial weights")


def change_tensors(value, change):
    """The same dataclass with `change` applied to its tensors. What is read on the CPU stays there."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if not dataclasses.is_dataclass(value):
        return value
    kept = ("grid_thw",)
    changed = {name: change_tensors(part, change) for name, part in vars(value).items() if name not in kept}
    return dataclasses.replace(value, **changed)


# ---------------------------------------------------------------------------------------------------------------------
# The packed row: what a batch of comparisons looks like to the model.


@dataclass
class Segments:
    """Stretches of a row that attend within themselves, or with keys from elsewhere in the row before their own."""

    lengths: list[int]
    starts: torch.Tensor  # [segments + 1] int32, in the row
    keys: torch.Tensor | None  # [all keys] where each segment's keys stand in the row; None: the segment itself
    key_starts: torch.Tensor  # [segments + 1] int32, in `keys`
    longest_keys: int

    @classmethod
    def of(cls, lengths: list[int], keys: list[np.ndarray] | None = None) -> "Segments":
        key_lengths = lengths if keys is None else list(map(len, keys))
        starts, key_starts = (
            torch.from_numpy(np.cumsum([0, *each], dtype=np.int32)) for each in (lengths, key_lengths)
        )
        places = None if keys is None else torch.from_numpy(np.concatenate(keys))
        return cls(lengths, starts, places, key_starts, max(key_lengths))

    @classmethod
    def of_comparisons(cls, lengths: list[tuple[int, list[int]]]) -> "Segments":
        """Of comparisons with P tokens of prompt and R_1 ... R_N of responses, which see prompt and themselves."""
        segments, keys, end = [], [], 0
        for P, Rs in lengths:
            prompt = np.arange(end, end + P)
            keys.append(prompt)
            end += P
            for R in Rs:
                keys.append(np.concatenate([prompt, np.arange(end, end + R)]))
                end += R
            segments += [P, *Rs]
        return cls.of(segments, keys)

    def attend(self, query, key, value, scale: float, causal: bool) -> torch.Tensor:
        """All segments in one variable-length call, [1, heads, T, d] each -> [1, heads, T, d]; for a GPU.

        `causal` is aligned at the bottom right: a response's first token sees all of its prompt and itself."""
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, d]
        if self.keys is not None:
            k, v = k[self.keys], v[self.keys]  # [all keys, kv heads, d]
        ends = (self.starts, self.key_starts, max(self.lengths), self.longest_keys)
        more = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1), "enable_gqa": q.shape[1] != k.shape[1]}
        return varlen_attn(q, k, v, *ends, **more).transpose(0, 1)[None]


@dataclass
class Images:
    """The images of a row, their patches one behind the other, and which patches see each other in the vision tower.

    Qwen2.5-VL's tower attends within windows of 8 x 8 patches in most layers, within whole images in the others. It
    reorders the patches so that a window's stand together.
    """

    pixel_values: torch.Tensor  # [patches, 3 * 2 * 14 * 14]
    grid_thw: torch.Tensor  # [images, 3] in patches; stays on the CPU, where it is read
    positions: torch.Tensor  # [patches, 2] row and column
    window_order: torch.Tensor | None  # [patches / merge**2]; None: a tower without windows
    whole: Segments
    windows: Segments | None

    def arguments(self) -> dict:
        """For `forward` of a transformers backbone. The tower is told that all patches are one segment, which it hands
        to `image_attention` in one call, instead of looping over windows and waiting for the GPU to learn where they
        end."""
        everything = torch.tensor([0, len(self.pixel_values)], dtype=torch.int32)
        given = {"pixel_values": self.pixel_values, "image_grid_thw": self.grid_thw, "images": self}
        given |= {"image_position_ids": self.positions, "image_cu_seqlens": everything}
        if self.window_order is not None:
            given |= {"image_window_index": self.window_order, "image_cu_window_seqlens": everything}
        return given


@dataclass
class PackedRow:
    """Comparisons one behind the other: T tokens in all, N responses in all, no padding."""

    lengths: list[tuple[int, list[int]]]  # per comparison: P, [R_1, ..., R_N]
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [3, 1, T]: time, height, width of M-RoPE; equal for text
    last: torch.Tensor  # [N] where each response's last token stands in the row
    segments: Segments
    images: Images | None = None
    written: "Written | None" = None  # what a critic or a judge has to write
    masks: list = field(default_factory=list)  # [R, P + R] of each response; made by the first layer for all

    def to(self, device: torch.device) -> "PackedRow":
        return change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedRow":
        """For the loader: only from pinned memory is a copy to the GPU made while it computes."""
        return change_tensors(self, torch.Tensor.pin_memory)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention over the row: query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, heads, T, d].

        On a GPU all is one variable-length call, for which the prompts' keys are copied to stand before each
        response's. On a CPU it is one call for each prompt, causal, and one for each response against [its prompt's
        keys | its own]. `split` rather than slices: the backward of a slice fills a whole row with zeros, that of
        `split` is one concatenation.
        """
        if has_varlen(query):
            return self.segments.attend(query, key, value, scale, causal=True)
        if not self.masks:  # True where a response's token (row) sees a key: all of the prompt, then causal
            ones = partial(torch.ones, dtype=torch.bool, device=query.device)
            self.masks = [ones(R, P + R).tril(P) for P, Rs in self.lengths for R in Rs]
        attention = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
        queries, keys, values = (iter(tensor.split(self.segments.lengths, dim=2)) for tensor in (query, key, value))
        masks, outputs = iter(self.masks), []
        for _, responses in self.lengths:
            k, v = next(keys), next(values)  # the prompt's, [1, kv heads, P, d]
            outputs.append(attention(next(queries), k, v, is_causal=True))
            for _ in responses:
                k_r = torch.cat([k, next(keys)], dim=2)  # [1, kv heads, P + R, d]
                v_r = torch.cat([v, next(values)], dim=2)
                outputs.append(attention(next(queries), k_r, v_r, attn_mask=next(masks)))
        return torch.cat(outputs, dim=2)

    def response_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For language modelling, two index tensors [all response tokens]: where each response token stands in the row,
        and where the token stands that predicts it (the prompt's last for a response's first, else the one before
        it)."""
        places, predictors, start = [], [], 0
        for prompt, responses in self.lengths:
            end = start + prompt
            for response in responses:
                places.append(torch.arange(end, end + response))
                predictors.append(torch.cat([torch.tensor([start + prompt - 1]), places[-1][:-1]]))
                end += response
            start = end
        return tuple(
            torch.cat(parts or [torch.zeros(0, dtype=torch.long)]).to(self.input_ids.device)
            for parts in (places, predictors)
        )


def has_varlen(query: torch.Tensor) -> bool:
    """Flash attention for segments of different lengths: on a GPU, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


# Lengths differ from row to row. Kept out of the graphs of torch.compile, they are no reason to compile again.
@torch.compiler.disable
def shared_prefix_attention(module, query, key, value, attention_mask, scaling, row=None, **_):
    """The attention function that transformers calls in every decoder layer; `row` is what we passed to `forward`."""
    return row.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None  # [1, T, heads, d]


@torch.compiler.disable
def image_attention(module, query, key, value, attention_mask, scaling, images=None, **_):
    """The same for the vision tower: query, key and value [1, heads, patches, d], all images in one call."""
    segments = images.whole if module.attends_to_whole_images else images.windows
    if has_varlen(query):
        return segments.attend(query, key, value, scaling, causal=False).transpose(1, 2), None
    outputs = []
    runs = [(length, len(list(run))) for length, run in itertools.groupby(segments.lengths)]  # of equal segments
    parts = (tensor[0].split([length * count for length, count in runs], dim=1) for tensor in (query, key, value))
    for (length, count), *qkv in zip(runs, *parts):
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in qkv)  # [count, heads, length, d]
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None  # [1, patches, heads, d]


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionInterface.register("packed_images", image_attention)


def prompt_positions(prompt: np.ndarray, grids: np.ndarray, image_token: int | None, merge: int) -> np.ndarray:
    """M-RoPE position ids [3, P] of a prompt (Qwen2-VL, arXiv 2409.12191).

    Text counts up on all three axes. The tokens of an image share one time, count rows and columns from there, and the
    text after it continues after the largest of them.
    """
    positions, start, next_position = [], 0, 0
    for time, height, width in grids:
        t, h, w = int(time), int(height) // merge, int(width) // merge
        at = start + int(np.argmax(prompt[start:] == image_token))  # where this image's tokens begin
        positions.append(np.tile(np.arange(at - start) + next_position, (3, 1)))
        next_position += at - start
        positions.append(
            np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)
            + next_position
        )
        next_position += max(h, w)
        start = at + t * h * w
    positions.append(np.tile(np.arange(len(prompt) - start) + next_position, (3, 1)))
    return np.concatenate(positions, axis=1)


def pack(comparisons: list[Comparison], processors: Processors, dummy_image: bool = False) -> PackedRow:
    """Packs comparisons into one row and decodes their images.

    `dummy_image` appends a comparison that nobody reads: a prompt of one blank image and no responses. It contributes
    exactly zero to every gradient, and is for FSDP, where a rank without an image would not join the vision tower's
    all-gather and all ranks would wait for it for ever.
    """
    if dummy_image:
        comparisons = [*comparisons, blank_comparison(processors)]
    merge = processors.image.merge_size if processors.image else 1
    ids, positions, lengths, last, end = [], [], [], [], 0
    for comparison in comparisons:
        P, Rs = len(comparison.prompt), [len(response) for response in comparison.responses]
        at = prompt_positions(comparison.prompt, comparison.grids, processors.image_token, merge)  # [3, P]
        ids += [comparison.prompt, *comparison.responses]
        positions += [
            at,
            *(np.tile(at.max() + 1 + np.arange(R), (3, 1)) for R in Rs),
        ]  # each goes on where the prompt ends
        last += (end + P + np.cumsum(Rs, dtype=int) - 1).tolist()
        lengths.append((P, Rs))
        end += P + sum(Rs)
    row = PackedRow(
        lengths,
        torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64))[:, None],
        torch.tensor(last, dtype=torch.long),
        Segments.of_comparisons(lengths),
    )
    images = [data.open_image(file) for comparison in comparisons for file in comparison.images]
    if images:
        pixels = processors.image(images, return_tensors="pt")
        prepared = np.concatenate([comparison.grids for comparison in comparisons])
        if not np.array_equal(prepared, pixels["image_grid_thw"].numpy()):
            raise UserError(
                "the images' patch grids differ from those they were prepared with: "
                "the model's image processor has other pixel limits; run 01_data.py again with --backbone set to it"
            )
        row.images = pack_images(pixels["pixel_values"], pixels["image_grid_thw"], processors.vision)
    asked = [comparison for comparison in comparisons if isinstance(comparison, Asked)]
    if all(isinstance(comparison, Asked) or not comparison.responses for comparison in comparisons):
        row.written = Written.of(row, asked)
    return row


@lru_cache(4096)
def image_layout(height: int, width: int, shape: data.VisionShape) -> tuple:
    """Of an image of height x width patches: the positions of its patches [patches, 2], in which order its merged
    patches stand so that windows are contiguous, large windows first, and the windows' sizes in merged patches."""
    grid, merge = torch.tensor([[1, height, width]]), shape.merge
    positions = get_vision_position_ids(grid, merge)
    if not shape.window:
        return positions, None, []
    order, ends = get_vision_window_index(grid, merge, shape.window, shape.patch)
    windows = sorted(order.split((ends.diff() // merge**2).tolist()), key=len, reverse=True)
    return positions, torch.cat(windows), [len(window) for window in windows]


def pack_images(pixel_values: torch.Tensor, grids: torch.Tensor, shape: data.VisionShape) -> Images:
    layouts = [image_layout(height, width, shape) for _, height, width in grids.tolist()]
    positions, orders, windows = zip(*layouts)
    patches = [len(position) for position in positions]
    before = np.cumsum([0, *patches]) // shape.merge**2  # merged patches of the images before
    return Images(
        pixel_values,
        grids,
        torch.cat(positions),
        torch.cat([order + int(start) for order, start in zip(orders, before)]) if shape.window else None,
        Segments.of(patches),
        Segments.of([length * shape.merge**2 for sizes in windows for length in sizes]) if shape.window else None,
    )


def blank_comparison(processors: Processors) -> Comparison:
    """A prompt of the smallest possible image and no responses (of one token where the backbone is text-only)."""
    if processors.image is None:
        return Comparison(np.array([processors.tokenizer.eos_token_id], np.int32), [], [])
    side = processors.image.patch_size * processors.image.merge_size
    file = data.read_image(data.Image.new("RGB", (side, side)), Path())
    grid = np.array([data.patch_grid((side, side), processors.image)], np.int32)
    tokens = int(grid.prod()) // processors.image.merge_size**2
    return Comparison(np.full(tokens, processors.image_token, np.int32), [], [], [file], grid)


# ---------------------------------------------------------------------------------------------------------------------
# The model.


class RewardHead(nn.Module):
    """Hidden states [N, hidden] -> scores [N]: `layers` linear layers with an activation between them.

    The last layer has no bias: it would cancel in every difference of two scores, and its gradient be rounding noise,
    of which AdamW makes whole steps.
    """

    def __init__(self, hidden: int, layers: int = 2, activation: str = "silu", width: int = 0):
        super().__init__()
        if not 1 <= layers <= 5:
            raise UserError(f"--head_layers {layers}: must be 1 to 5")
        self.settings = {"hidden": hidden, "layers": layers, "activation": activation, "width": width or hidden}
        sizes = [hidden, *[width or hidden] * (layers - 1)]
        parts = []
        for before, after in zip(sizes, sizes[1:]):
            parts += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        last = nn.Linear(sizes[-1], 1, bias=False)
        nn.init.normal_(last.weight, std=1 / math.sqrt(sizes[-1] + 1))  # small scores at first (arXiv 2009.01325)
        self.mlp = nn.Sequential(*parts, last)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden.float()).sum(-1)  # of one element; a view would trip FSDP's backward hooks


class RewardModel(nn.Module):
    """A backbone and a reward head: `model(row)` gives one score for each response of a PackedRow.

    reward = RewardModel.from_pretrained("artifacts/reward")
    reward.score(messages, ["A red circle.", "A blue square."])      # -> tensor of 2 scores
    """

    kind = "naive"
    reader = None  # how a critic and a judge read a comparison in training: a function Comparison -> Asked

    def __init__(
        self,
        backbone: nn.Module,
        head: RewardHead | None,
        processors: Processors,
        trained_with: dict | None = None,
        asks: dict | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.processors = backbone, head, processors
        self.trained_with = trained_with or {}  # what the head was trained with; empty: not at all
        self.asks = asks or {}  # of a critic or a judge: its request and how long a critique may be
        self.cost = {"tokens": 0, "patches": 0, "written": 0, "seconds": 0.0}  # of all that `scores_of` has scored

    @classmethod
    def from_backbone(cls, path: str, settings: HeadSettings, max_pixels: int = 0) -> "RewardModel":
        """A backbone from a Hugging Face checkpoint with a new head, as the kind that the settings name."""
        kind = settings.kind
        backbone, head, asks = load_backbone(path, AutoModel if kind == "naive" else lm_class(path)), None, None
        if kind != "generative":
            hidden = backbone.config.get_text_config().hidden_size
            head = RewardHead(hidden, settings.head_layers, settings.head_activation, settings.head_width)
        if kind != "naive":
            asks = {"request": settings.request or REQUESTS[kind], "critique_tokens": settings.critique_tokens}
        return KINDS[kind](backbone, head, data.load_processors(path, max_pixels), asks=asks)

    @classmethod
    def from_pretrained(cls, folder: str, empty: bool = False, kind: str = "") -> "RewardModel":
        """A reward model that `save_pretrained` wrote, of the kind that it was; `empty` leaves the backbone's weights
        to be filled in, as in `load_backbone`. Raises UserError where there is none, or one of another kind than
        `kind`."""
        path = Path(folder, "reward_head.safetensors")
        if not path.is_file():
            raise UserError(f"{folder}: no reward model there (no {path.name}); run 02_model.py or 03_train.py first")
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["reward_head"])
            found, head = about.get("kind", "naive"), None
            if kind not in ("", found):
                raise UserError(f"{folder}: its kind is {found}; 02_model.py --kind {kind} makes one of the other")
            if about["head"]:
                head = RewardHead(**about["head"])
                head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        backbone = load_backbone(folder, AutoModel if found == "naive" else lm_class(folder), empty)
        return KINDS[found](backbone, head, data.load_processors(folder), about["trained_with"], about.get("asks"))

    def save_pretrained(self, folder: str, state: dict | None = None) -> None:
        """Writes the Hugging Face layout plus reward_head.safetensors.

        `state` is a full state dict where the model's own is sharded. All files are written beside their place first;
        the head goes last and an old one first, so that a folder with a head is a whole model.
        """
        state = self.state_dict() if state is None else state

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}

        out = Path(folder)
        writing = out / ".writing"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        self.backbone.save_pretrained(writing, state_dict=part("backbone."))
        self.processors.save(str(writing))
        about = {"kind": self.kind, "head": self.head.settings if self.head else None, "asks": self.asks}
        about["trained_with"] = self.trained_with
        save_file(part("head."), writing / "reward_head.safetensors", metadata={"reward_head": json.dumps(about)})
        for old in [out / "reward_head.safetensors", *out.glob("model*.safetensors*")]:
            old.unlink(missing_ok=True)
        for path in sorted(writing.iterdir(), key=lambda path: path.name == "reward_head.safetensors"):
            os.replace(path, out / path.name)
        writing.rmdir()

    @property
    def base(self) -> nn.Module:
        """The backbone without its LM head, if it has one."""
        return getattr(self.backbone, "model", self.backbone)

    def hidden_states(self, row: PackedRow) -> torch.Tensor:
        """The backbone's last hidden states, [T, hidden]."""
        return run_backbone(self.base, row)

    def forward(self, row: PackedRow) -> torch.Tensor:
        return self.head(self.hidden_states(row)[row.last])  # [T, hidden] -> [N, hidden] -> [N]

    @torch.inference_mode()
    def score(self, messages: list[dict], responses: list[str], images: list = ()) -> torch.Tensor:
        """Scores N responses to one prompt, [N] float32; they do not depend on their order, nor on each other, unless a
        judge compares them.

        Args:
            messages: the prompt's turns; an image is {"type": "image", "image": path, bytes or PIL image}, or {"type":
                "image"} with the images in order in `images`.
            responses: the assistant's answers.
        Raises:
            ValueError: says what is wrong with the prompt, an image or a response.
        """
        prompt, files, grids = data.encode_prompt(messages, images, self.processors)
        texts = [data.text_of(text, f"responses[{i}]") for i, text in enumerate(responses)]
        encoded = [data.encode_response(text, self.processors) for text in texts]
        comparison = Comparison(prompt, encoded, [1] * len(encoded), files, grids)
        return self.scores_of([comparison]).cpu()

    @torch.inference_mode()
    def scores_of(self, comparisons: list[Comparison]) -> torch.Tensor:
        """The scores of all responses of some comparisons, [N], read in one row."""
        row = pack(comparisons, self.processors).to(self.device)
        self.count(row)
        return self(row)

    def count(self, row: PackedRow) -> None:
        self.cost["tokens"] += row.input_ids.shape[1]
        self.cost["patches"] += len(row.images.pixel_values) if row.images else 0

    def row_tokens(self, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """For planning, how many tokens comparisons are at most when they are scored, [n], from how many they have and
        how many responses, [n] each."""
        return tokens

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def lm_class(path: str):
    """The transformers class that loads a backbone with its LM head."""
    vision = hasattr(data.AutoConfig.from_pretrained(path), "vision_config")
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def load_backbone(path: str, auto=AutoModel, empty: bool = False) -> nn.Module:
    """A Hugging Face checkpoint, float32, whose decoder layers attend by `shared_prefix_attention`; without its LM head
    unless `auto` is a class that has one. An `empty` one is on the meta device, shapes without weights, and takes no
    memory: for `shard` and then `load_weights` (03)."""
    transformers_logging.disable_progress_bar()
    config = data.AutoConfig.from_pretrained(path)
    if config.model_type not in ("qwen2_5_vl", "qwen2"):
        raise UserError(f"{path}: a {config.model_type}; supported are qwen2_5_vl and qwen2")
    wanted = {"dtype": torch.float32, "attn_implementation": attention_of(config)}
    if empty:
        with torch.device("meta"):
            backbone = auto.from_config(config, **wanted).eval()
        if backbone.can_generate():
            backbone.generation_config = GenerationConfig.from_pretrained(path)
    else:
        backbone = auto.from_pretrained(path, **wanted)
    prepare_vision(backbone)
    return backbone


def attention_of(config) -> str | dict[str, str]:
    """The names under which a model's attention layers find our functions, for `attn_implementation`."""
    if not hasattr(config, "vision_config"):
        return "shared_prefix"
    return {"text_config": "shared_prefix", "vision_config": "packed_images"}


class PatchProjection(nn.Conv3d):
    """The vision tower's first layer. Its kernel is as large as a patch, so it is one matrix product, for which
    PyTorch's 3-D convolution takes several times as long."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:  # [patches, channels, time, height, width]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)  # [patches, hidden]


def prepare_vision(backbone: nn.Module) -> None:
    """Tells each attention layer of the vision tower whether it attends to whole images or to windows, for
    `image_attention`, and makes its patch embedding a matrix product. Weights and their names stay as they are."""
    base = getattr(backbone, "model", backbone)
    if not hasattr(base, "visual"):
        return
    base.visual.patch_embed.proj.__class__ = PatchProjection
    whole = getattr(base.config.vision_config, "fullatt_block_indexes", None)
    for i, block in enumerate(base.visual.blocks):
        block.attn.attends_to_whole_images = whole is None or i in whole


def run_backbone(backbone: nn.Module, row: PackedRow) -> torch.Tensor:
    """One forward of a transformers backbone over a packed row -> last hidden states [T, hidden].

    Position ids are ours: transformers would count through the row, and keeps stale offsets after `generate`.
    """
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False, "row": row}
    if hasattr(backbone.config, "vision_config"):
        inputs |= row.images.arguments() if row.images else {}
    else:
        inputs["position_ids"] = row.position_ids[0]  # M-RoPE on text alone is RoPE
    return backbone(**inputs).last_hidden_state[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing: a critic's critiques, and in 06 a policy's answers. Each prompt, with its images, is read once; its keys and
# values serve all its samples, and samples that have ended leave the row.


class Writer(nn.Module):
    """A transformers model with its LM head, `lm`, that writes at a temperature."""

    def __init__(self, lm: nn.Module, processors: Processors, temperature: float = 1.0):
        super().__init__()
        self.lm, self.processors, self.temperature = lm, processors, temperature
        tokenizer = processors.tokenizer
        forbidden = {
            *tokenizer.get_added_vocab().values(),
            *range(len(tokenizer), lm.config.get_text_config().vocab_size),
        } - {tokenizer.eos_token_id}
        self.register_buffer("forbidden", torch.tensor(sorted(forbidden)), persistent=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocabulary], float32, at the temperature; what must not be written is at -inf."""
        logits = self.lm.lm_head(hidden).float() / self.temperature
        return logits.index_fill(-1, self.forbidden, -math.inf)


class KeptRow(PackedRow):
    """A packed row that keeps every layer's keys and values."""

    def attend(self, layer, query, key, value, scale):
        self.cache[layer] = (key, value)  # [1, kv heads, T, d]
        return super().attend(layer, query, key, value, scale)


class DecodeRow:
    """One new token for each sample that goes on: n tokens of n different samples stand in one row.

    Queries attend to the keys of what they go on from (here the prompt), kept once for its G samples, and to their own.
    `texts` says where in the row that stands: a prompt, or a prompt and one response to it.
    """

    images = None

    def __init__(self, row: KeptRow, texts: list[torch.Tensor], group: int, max_new_tokens: int):
        lengths, device = list(map(len, texts)), row.input_ids.device
        self.prompts, self.group, self.longest = len(lengths), group, max(lengths)
        self.padding = torch.arange(self.longest, device=device) >= torch.tensor(lengths, device=device)[:, None]

        def pad(packed):  # [1, kv heads, T, d] -> [prompts, kv heads, longest, d]
            each = [packed[0].transpose(0, 1)[places] for places in texts]
            return nn.utils.rnn.pad_sequence(each, batch_first=True).transpose(1, 2)

        def room(key):  # [samples, kv heads, max_new_tokens, d]
            return key.new_empty(self.prompts * group, key.shape[1], max_new_tokens, key.shape[3])

        self.prompt_cache = {layer: (pad(key), pad(value)) for layer, (key, value) in row.cache.items()}
        self.answer_cache = {layer: (room(key), room(key)) for layer, (key, _) in row.cache.items()}

    def advance(self, alive: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, t: int) -> "DecodeRow":
        """The next row: `tokens` [n] at `positions` [n], the t-th of the samples `alive` [n]."""
        self.alive, self.t = alive, t
        self.input_ids, self.position_ids = tokens[None], positions.expand(3, 1, -1)
        return self

    def attend(self, layer, query, key, value, scale):
        heads, n, d = query.shape[1:]
        kv = key.shape[1]
        shared = heads // kv  # query heads that share a key
        prompt_k, prompt_v = self.prompt_cache[layer]
        own_k, own_v = self.answer_cache[layer]
        own_k[self.alive, :, self.t], own_v[self.alive, :, self.t] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        own_k, own_v = own_k[self.alive, :, : self.t + 1], own_v[self.alive, :, : self.t + 1]  # [n, kv, t + 1, d]
        q = query[0].transpose(0, 1).reshape(n, kv, shared, d) * scale

        def by_prompt(x):  # [n, kv, shared, ...] -> [prompts, kv, group * shared, ...], zeros for ended samples
            grid = x.new_zeros(self.prompts * self.group, *x.shape[1:])
            grid[self.alive] = x
            return grid.view(self.prompts, self.group, kv, shared, -1).transpose(1, 2).flatten(2, 3)

        def by_sample(x):  # and back
            return x.unflatten(2, (self.group, shared)).transpose(1, 2).flatten(0, 1)[self.alive]

        to_prompt = by_prompt(q) @ prompt_k.transpose(-1, -2)  # [prompts, kv, group * shared, longest]
        to_prompt = by_sample(to_prompt.masked_fill(self.padding[:, None, None], -math.inf))
        weights = torch.cat([to_prompt, q @ own_k.transpose(-1, -2)], dim=-1)  # [n, kv, shared, longest + t + 1]
        to_prompt, to_own = weights.softmax(-1).split([self.longest, self.t + 1], dim=-1)
        out = by_sample(by_prompt(to_prompt) @ prompt_v) + to_own @ own_v
        return out.reshape(1, n, heads, d).transpose(1, 2)


@torch.inference_mode()
def write(
    writer: Writer, row: PackedRow, group: int, max_new_tokens: int, noise: np.ndarray | None = None
) -> torch.Tensor:
    """Goes on `group` times behind every response of a row, or behind a prompt that has none: token ids [texts, group,
    max_new_tokens], -1 after the end-of-turn token.

    `noise` [texts, group, max_new_tokens], uniform in [0, 1), decides every token by inversion of the distribution, so
    a sample does not depend on what else is in the batch; None writes what is likeliest.
    """
    eos = writer.processors.tokenizer.eos_token_id
    row = KeptRow(**vars(row))
    row.cache, device = {}, row.input_ids.device
    hidden = run_backbone(writer.lm.model, row)  # [T, hidden]
    goes_on = [part for _, Rs in row.lengths for part in [not Rs, *[True] * len(Rs)]]  # which segments of the row
    keys = row.segments.keys.split(row.segments.key_starts.diff().tolist())
    texts = [places for places, wanted in zip(keys, goes_on) if wanted]  # where what is behind stands in the row
    ends = torch.stack([places[-1] for places in texts])
    begin = torch.stack([row.position_ids[:, 0, places].max() + 1 for places in texts])
    hidden = hidden[ends].repeat_interleave(group, 0)  # [samples, hidden]
    begin = begin.repeat_interleave(group)  # [samples] position of the first new token
    tokens = torch.full((len(texts) * group, max_new_tokens), -1, device=device)
    uniform = None if noise is None else torch.from_numpy(noise).to(device).view(len(tokens), max_new_tokens)
    alive, decode = torch.arange(len(tokens), device=device), DecodeRow(row, texts, group, max_new_tokens)
    for t in range(max_new_tokens):
        logits = writer.logits(hidden)  # [n, vocabulary]
        if uniform is None:
            chosen = logits.argmax(-1)
        else:
            cumulated = logits.double().softmax(-1).cumsum(-1)
            chosen = torch.searchsorted(cumulated, uniform[alive, t, None] * cumulated[:, -1:], right=True)[:, 0]
        tokens[alive, t] = chosen
        going = chosen != eos
        alive, chosen = alive[going], chosen[going]
        if len(alive) == 0 or t + 1 == max_new_tokens:
            break
        hidden = run_backbone(writer.lm.model, decode.advance(alive, chosen, begin[alive] + t, t))
    return tokens.view(len(texts), group, max_new_tokens)


def texts_of(tokens: torch.Tensor, tokenizer) -> list[str]:
    """[samples, max_new_tokens] -> the answers' texts, without the end-of-turn token."""
    return [
        tokenizer.decode([t for t in sample if t not in (-1, tokenizer.eos_token_id)]) for sample in tokens.tolist()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The other two kinds, critic and judge: how they read a comparison, with a request behind each response and what they
# have to write behind that, and the models. Who wants the naive kind alone has seen all of it above.

REQUESTS = {"naive": "", "critic": "Is it right? Explain.", "generative": "Which is better, A or B?"}


@dataclass
class Asked(Comparison):
    """A comparison whose `responses` have a request behind them and end in what the model has to write itself."""

    written: list[int] = field(default_factory=list)  # how many tokens that is, for each response
    weights: list[float] = field(default_factory=list)  # of each of these tokens in the loss
    shown: list[tuple[int, int]] = field(default_factory=list)  # judge: which two of the N each `response` shows
    judged: int = 0  # judge: N


@dataclass
class Written:
    """Of a whole row: the tokens that the model has to write itself, and which of N responses a judge compares."""

    predictors: torch.Tensor  # [tokens] where in the row each is predicted
    tokens: torch.Tensor  # [tokens] token ids
    weight: torch.Tensor  # [tokens] in the loss; they sum to 1 for each comparison, which counts once
    first: torch.Tensor  # [ordered pairs] the response, of N, that is shown as A
    second: torch.Tensor  # [ordered pairs] as B
    judged: int  # N

    @classmethod
    def of(cls, row: PackedRow, comparisons: list[Asked]) -> "Written":
        learned, weight, shown, judged = [np.zeros(0, bool)], [], [], 0
        for comparison in comparisons:
            for response, count, each in zip(comparison.responses, comparison.written, comparison.weights):
                learned.append(np.arange(len(response)) >= len(response) - count)
                weight += [each] * count
            shown += [(judged + i, judged + j) for i, j in comparison.shown]
            judged += comparison.judged
        places, predictors = (places[torch.from_numpy(np.concatenate(learned))] for places in row.response_tokens())
        first, second = torch.tensor(shown, dtype=torch.long).view(-1, 2).T
        return cls(predictors, row.input_ids[0, places], torch.tensor(weight), first, second, judged)


def turn_after_answer(request: str, processors: Processors) -> np.ndarray:
    """The token ids that the chat template puts behind an answer's end-of-turn token when the user goes on with
    `request`, up to where the assistant's next answer begins."""
    turns = [("user", "?"), ("assistant", "!"), ("user", request)]
    messages = [{"role": role, "content": text} for role, text in turns]
    before, whole = (data.tokenize_chat(some, processors.tokenizer) for some in (messages[:1], messages))
    ends = np.flatnonzero(whole[len(before) :] == processors.tokenizer.eos_token_id)
    if not len(ends):
        raise UserError("the chat template ends an answer with another token than the tokenizer's end-of-turn token")
    return whole[len(before) + ends[0] + 1 :]


def with_critiques(comparison: Comparison, critiques: list[np.ndarray], request: np.ndarray) -> Asked:
    """A critic's: [response | request | critique]. Critiques are token ids, each ending in <|im_end|>."""
    responses = [np.concatenate([r, request, critique]) for r, critique in zip(comparison.responses, critiques)]
    written = list(map(len, critiques))
    weights = [1 / max(1, sum(written))] * len(written)
    return Asked(**vars(comparison) | {"responses": responses}, written=written, weights=weights)


def with_given_critiques(comparison: Comparison, request: np.ndarray, processors: Processors) -> Asked:
    """The same with the critiques of the data; with no responses, so nothing to learn from, where it has none."""
    given = comparison.record.get("critiques")
    usable = isinstance(given, list) and len(given) == len(comparison.responses)
    usable = usable and all(isinstance(critique, str) and critique.strip() for critique in given)
    critiques = [data.encode_response(critique, processors) for critique in given] if usable else []
    return with_critiques(comparison, critiques, request)


def in_ordered_pairs(comparison: Comparison, request: np.ndarray, processors: Processors) -> Asked:
    """A judge's: [A: one response, B: another | request | the letter of the better one], for all ordered pairs. Of two
    that tie, either letter has a weight of 0."""
    a, b, before_a, before_b = (
        np.array(data.tokenize_text(text, processors.tokenizer), np.int32) for text in ("A", "B", "A:\n", "\nB:\n")
    )
    N = len(comparison.responses)
    ranks = comparison.ranks or [1] * N
    shown = [(i, j) for i in range(N) for j in range(N) if i != j]
    answers, untied = [], [float(ranks[i] != ranks[j]) for i, j in shown]
    for i, j in shown:
        pair = [before_a, comparison.responses[i][:-1], before_b, comparison.responses[j]]
        answers.append(np.concatenate([*pair, request, a if ranks[i] < ranks[j] else b]))
    weights = [each / max(1, sum(untied)) for each in untied]
    asked = {"written": [1] * len(shown), "weights": weights, "shown": shown, "judged": N}
    return Asked(**vars(comparison) | {"responses": answers} | asked)


def log_probabilities(lm: nn.Module, hidden: torch.Tensor, written: Written) -> torch.Tensor:
    """Of the tokens that a critic or a judge has to write, [tokens], from the row's hidden states [T, hidden]."""
    log_p = lm.lm_head(hidden[written.predictors]).float().log_softmax(-1)  # [tokens, vocabulary]
    return log_p.gather(-1, written.tokens[:, None]).sum(-1)  # of one element; a view would trip FSDP's backward hooks


class Critic(RewardModel):
    """Writes a critique of each response; its score is the head's at the critique's end."""

    kind = "critic"

    def __init__(self, *made, **more):
        super().__init__(*made, **more)
        self.request = turn_after_answer(self.asks["request"], self.processors)  # token ids behind a response
        self.reader = partial(with_given_critiques, request=self.request, processors=self.processors)

    def forward(self, row: PackedRow, learn: bool = False):
        """Scores [N]; to `learn`, also the log-probability of every token of the critiques."""
        hidden = self.hidden_states(row)
        scores = self.head(hidden[row.last])
        return (scores, log_probabilities(self.backbone, hidden, row.written)) if learn else scores

    @torch.inference_mode()
    def write_critiques(self, comparisons: list[Comparison]) -> list[list[np.ndarray]]:
        """Its likeliest critique of each response, as token ids; one cut at the length limit is ended there."""
        asked = [with_critiques(each, [self.request[:0]] * len(each.responses), self.request) for each in comparisons]
        row = pack(asked, self.processors).to(self.device)
        tokens = write(Writer(self.backbone, self.processors), row, 1, self.asks["critique_tokens"])[:, 0]
        self.count(row)
        self.cost["written"] += int((tokens >= 0).sum())
        end = self.processors.tokenizer.eos_token_id
        critiques = (np.array([t for t in each if t not in (-1, end)] + [end], np.int32) for each in tokens.tolist())
        return [[next(critiques) for _ in each.responses] for each in comparisons]

    def scores_of(self, comparisons: list[Comparison]) -> torch.Tensor:
        critiques = self.write_critiques(comparisons)
        return super().scores_of([with_critiques(*each, self.request) for each in zip(comparisons, critiques)])

    def row_tokens(self, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
        return tokens + responses * (len(self.request) + self.asks["critique_tokens"])


class Judge(RewardModel):
    """Shown two responses it answers A or B; it has no head but its LM head.

    S(i, j), the score of a pair, is the difference of the letters' log-odds averaged over both orders, so S(j, i) is
    -S(i, j); a response's score is the sum over all others, as the paper makes R1-Reward a reward for RL (Table 11).
    """

    kind = "generative"

    def __init__(self, *made, **more):
        super().__init__(*made, **more)
        self.request = turn_after_answer(self.asks["request"], self.processors)  # token ids behind a pair
        self.reader = partial(in_ordered_pairs, request=self.request, processors=self.processors)
        self.letters = [data.tokenize_text(letter, self.processors.tokenizer)[0] for letter in "AB"]

    def forward(self, row: PackedRow, learn: bool = False):
        """Scores [N]; to `learn`, also the log-probability of the right letter of every ordered pair."""
        hidden, written = self.hidden_states(row), row.written
        a, b = self.backbone.lm_head.weight[self.letters].float()  # [hidden]
        odds = hidden[written.predictors].float() @ (a - b)  # [ordered pairs], in float32 like the head's scores
        scores = odds.new_zeros(written.judged)
        scores = scores.index_add(0, written.first, odds / 2).index_add(0, written.second, -odds / 2)
        return (scores, log_probabilities(self.backbone, hidden, written)) if learn else scores

    def scores_of(self, comparisons: list[Comparison]) -> torch.Tensor:
        return super().scores_of([self.reader(comparison) for comparison in comparisons])

    def row_tokens(self, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
        others = np.maximum(responses - 1, 0)  # each response is shown with each of them, twice
        return np.maximum(1, 2 * others) * tokens + responses * others * (len(self.request) + 8)  # 8: "A:", "B:", A


KINDS = {"naive": RewardModel, "critic": Critic, "generative": Judge}


def main(settings: Settings) -> None:
    if dist.get_rank() > 0:
        return
    torch.manual_seed(settings.seed)
    model = RewardModel.from_backbone(settings.backbone, settings)
    model.save_pretrained(settings.out)
    count = lambda module: f"{sum(p.numel() for p in module.parameters()):>13,}"
    vision, language = (getattr(model.base, "visual", None), getattr(model.base, "language_model", model.base))
    print(
        f"{settings.out}: {settings.backbone} ({model.backbone.config.model_type}), {model.kind}, "
        f"with {'a new reward head' if model.head else 'its own LM head'}\n\nparameters"
    )
    for name, module in (
        ("vision tower", vision),
        ("language model", language),
        ("reward head", model.head),
        ("all", model),
    ):
        if module is not None:
            print(f"  {name:<15}{count(module)}")
    print(f"  head: {' -> '.join(map(str, model.head.mlp)) if model.head else 'log-odds of A and B'}")
    if Path(settings.data, "dataset.json").is_file():
        comparison = data.Comparisons(settings.data, model.processors.fingerprint)[0]
        row = pack([model.reader(comparison) if model.reader else comparison], model.processors)
        hidden = model.hidden_states(row)
        lengths = " and ".join(str(len(response)) for response in comparison.responses)
        print(f"\none comparison of {settings.data}: {len(comparison.images)} image(s), a prompt of", end=" ")
        print(f"{len(comparison.prompt)} tokens, responses of {lengths}")
        shapes = [
            ("input_ids", row.input_ids),
            ("position_ids", row.position_ids),
            ("pixel_values", row.images and row.images.pixel_values),
            ("image_grid_thw", row.images and row.images.grid_thw),
            ("hidden states", hidden),
            ("at each response's end", hidden[row.last]),
            ("scores", model(row)),
        ]
        for name, tensor in shapes:
            print(f"  {name:<23}{'none (text only)' if tensor is None else list(tensor.shape)}")
    print("\nNext: torchrun --standalone --nproc_per_node=2 03_train.py")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
