"""Stage 2 · the reward model: a Qwen-VL backbone and a 2-layer SiLU head, and the one forward of this codebase

    torchrun --standalone --nproc_per_node=2 02_model.py                            # tests/tiny + a new head
    torchrun --standalone --nproc_per_node=8 02_model.py --backbone Qwen/Qwen2.5-VL-7B-Instruct

In    A backbone in the Hugging Face layout: Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL3, or Qwen2, Qwen2.5, Qwen3 or
      Llama for text alone (FAMILIES in 01_data.py).
Out   artifacts/model/: the same layout without the LM head, plus reward_head.safetensors; printed: what it is made of,
      and the shapes on one comparison's way through it.

A comparison is encoded ONCE. The row is [prompt | response 1 | ... | response N]. Every response attends to the prompt
and to itself, never to a sibling; each one's positions continue where the prompt's end; its score is read at its own
last token, the <|im_end|> (or whatever the chat template has) that closes it. Comparisons stand one after the other in
one row with no padding. The scores are those of one forward per response, for about N(P + R) / (P + NR) times less work
and N times fewer images:

                     keys   prompt      response 1   response 2
      queries  prompt       causal
               response 1   all         causal
               response 2   all                      causal

The paper: the LM head is replaced by an MLP of 2 layers with SiLU between, chosen from depths 1-5 and no activation,
tanh, SiLU. It does not give the width (we take the hidden size, as its predecessor MM-RLHF does) nor the token at which
the score is read (we take the last, as the authors' public command).

It chose this naive kind of reward model over two others, which keep their LM head and are here too (--kind; the last
section has all that they need more):
  - critic: it first writes a critique of each response, then the head scores what stands at the critique's end. In the
    row a response is followed by the request for a critique, a turn of the user, and the critique.
  - generative: it is shown two responses and answers A or B. A response of the row is such a pair, with the question
    which is better after it, so the prompt is still read once for all N(N - 1) ordered pairs. A pair's score is the
    difference of the two letters' log-odds, averaged over both orders; a response's the sum over its pairs. It writes
    no rationale first: one token is the cheapest such judge there is, and its score is exact.
Deviation: the head computes in float32 even where the backbone computes in bfloat16, whose spacing near 4 is 0.03.
"""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards  # comes with transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    vision_utils,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

data = importlib.import_module(
    "01_data"
)  # a module name that starts with a digit cannot be written after `import`
option, Comparison, Processors, UserError = (
    data.option,
    data.Comparison,
    data.Processors,
    data.UserError,
)

INDEX_FILE, HEAD_FILE = "model.safetensors.index.json", "reward_head.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of an exported backbone or policy
ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass
class HeadSettings:
    head_layers: int = option(2, "linear layers of the reward head, 1 to 5 (paper: 2)")
    head_activation: Literal["none", "tanh", "relu", "silu"] = option(
        "silu", "between the head's layers (paper: silu)"
    )
    head_width: int = option(
        0, "width of the head's inner layers; 0: the backbone's hidden size (the paper gives none)"
    )
    kind: Literal["naive", "critic", "generative"] = option(
        "naive",
        "the head on the response (paper's choice), or on the response and its critique; or which of two, A or B",
    )
    request: str = option(
        "",
        "critic, generative: the user's turn that asks for it; '': as the embedded backbone knows",
    )
    critique_tokens: int = option(96, "critic: longest critique that it writes, in tokens")


@dataclass
class Settings(HeadSettings):
    backbone: str = option(
        "tests/tiny", "checkpoint in the Hugging Face layout: a directory or a hub name"
    )
    out: str = option("artifacts/model", "folder for the initial reward model")
    data: str = option(
        "artifacts/data/train",
        "prepared shards; their first comparison is shown on its way through",
    )
    seed: int = option(0, "seed of the head's initial weights")


# ---------------------------------------------------------------------------------------------------------------------
# The packed row: what a batch of comparisons looks like to the model.


@dataclass
class PackedRow:
    """Comparisons one after the other: T tokens in all, N responses in all, no padding."""

    lengths: list[tuple[int, list[int]]]  # per comparison: P, [R_1, ..., R_N]
    input_ids: Tensor  # [1, T]
    position_ids: (
        Tensor  # [3, 1, T]: time, height, width of M-RoPE; equal for text, and where there is none
    )
    last: Tensor  # [N] where each response's last token stands in the row
    segments: "Segments"  # which of its tokens attend to which
    images: "Images | None" = None

    def to(self, device: torch.device) -> "PackedRow":
        return change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedRow":
        """For the loader: only from pinned memory is a copy to the GPU made while it computes."""
        return change_tensors(self, Tensor.pin_memory)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """What the attention of decoder layer `layer` computes over the row, as `Segments.attend`."""
        return self.segments.attend(query, key, value, scale)

    def response_tokens(self) -> tuple[Tensor, Tensor]:
        """For language modelling, where each response token stands in the row, and where the one stands that predicts
        it: the token before it, for a response's first the prompt's last. Both [all response tokens]."""
        places, predictors, end = [], [], 0
        for P, Rs in self.lengths:
            end += P
            prompt_last = end - 1
            for R in Rs:
                places += range(end, end + R)
                predictors += [prompt_last, *range(end, end + R - 1)]
                end += R
        as_index = partial(torch.tensor, dtype=torch.long, device=self.input_ids.device)
        return as_index(places), as_index(predictors)


READ_ON_CPU = (
    "grid_thw",
    "image_cu_seqlens",
    "image_cu_window_seqlens",
)  # by us or by transformers: they stay there


def change_tensors(value: Any, change: Callable) -> Any:
    """The same dataclass with `change` applied to its tensors, and to those of dataclasses and dicts in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {
            name: part if name in READ_ON_CPU else change_tensors(part, change)
            for name, part in value.items()
        }
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **change_tensors(vars(value), change))
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a row. It can be taken along by itself: `Segments` with `has_varlen`, and `shared_prefix_attention` for
# transformers, to whose `forward` any `row` with such an `attend` is passed, in every call and beside the position ids.


@dataclass
class Segments:
    """Consecutive stretches of a row. With `prefixes` they are text and causal: a token sees the earlier tokens of its
    own stretch and, if the stretch has a prefix (the number of an earlier one), all of that too: a response its prompt.
    Without, they are images or windows of images, in which every patch sees every other."""

    lengths: list[int]
    prefixes: list[int | None]  # of each the segment whose keys stand before its own, or None
    starts: Tensor  # [segments + 1] int32, in the row
    keys: (
        Tensor | None
    )  # [all keys] where each segment's keys stand in the row; None: the segments themselves
    key_starts: Tensor  # [segments + 1] int32, in `keys`
    longest_keys: int
    masks: dict[int, Tensor] = field(
        default_factory=dict
    )  # [R, P + R] of those with a prefix, for a CPU

    @classmethod
    def of(cls, lengths: list[int], prefixes: list[int | None] = ()) -> "Segments":
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        keys, key_starts = None, starts
        if prefixes:
            own = np.split(np.arange(sum(lengths)), starts[1:-1])
            keys = [
                own[i] if p is None else np.concatenate([own[p], own[i]])
                for i, p in enumerate(prefixes)
            ]
            key_starts = np.cumsum([0, *map(len, keys)], dtype=np.int32)
            keys = torch.from_numpy(np.concatenate(keys))
        starts, key_starts, longest = (
            torch.from_numpy(starts),
            torch.from_numpy(key_starts),
            np.diff(key_starts).max(),
        )
        return cls(lengths, prefixes, starts, keys, key_starts, int(longest))

    @classmethod
    def of_comparisons(cls, lengths: list[tuple[int, list[int]]]) -> "Segments":
        """Of comparisons with P tokens of prompt and R_1 ... R_N of responses, which see prompt and themselves."""
        segments, prefixes = [], []
        for P, Rs in lengths:
            prefixes += [None, *[len(segments)] * len(Rs)]
            segments += [P, *Rs]
        return cls.of(segments, prefixes)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, heads, T, d]."""
        if has_varlen(query):
            return self.in_one_call(query, key, value, scale)
        return (
            self.one_by_one(query, key, value, scale)
            if self.prefixes
            else self.in_batches(query, key, value, scale)
        )

    def in_one_call(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """For a GPU: a variable-length call, for which the prompt's keys are copied to stand before each response's.
        Causal is aligned at the bottom right there: a response's first token sees all of its prompt and itself."""
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, d]
        window = (-1, -1)
        if self.prefixes:
            window, k, v = (-1, 0), k[self.keys], v[self.keys]  # [all keys, kv heads, d]
        ends = (self.starts, self.key_starts, max(self.lengths), self.longest_keys)
        more = {"scale": scale, "window_size": window, "enable_gqa": q.shape[1] != k.shape[1]}
        return varlen_attn(q, k, v, *ends, **more).transpose(0, 1)[None]

    def one_by_one(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """For text on a CPU: a call for each segment against [its prefix's keys | its own]. `split` rather than slices:
        the backward of a slice fills a whole row with zeros, that of `split` is one concatenation."""
        attention = partial(
            F.scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        q, k, v = (tensor.split(self.lengths, dim=2) for tensor in (query, key, value))
        outputs = []
        for i, prefix in enumerate(self.prefixes):
            if prefix is None:
                outputs.append(attention(q[i], k[i], v[i], is_causal=True))
                continue
            if (
                i not in self.masks
            ):  # the first layer makes it for all: True for all of the prompt, then causal
                P, R = self.lengths[prefix], self.lengths[i]
                self.masks[i] = torch.ones(R, P + R, dtype=torch.bool, device=query.device).tril(P)
            keys = torch.cat([k[prefix], k[i]], dim=2)  # [1, kv heads, P + R, d]
            values = torch.cat([v[prefix], v[i]], dim=2)
            outputs.append(attention(q[i], keys, values, attn_mask=self.masks[i]))
        return torch.cat(outputs, dim=2)

    def in_batches(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """For images on a CPU: neighbours of equal length are one batch."""
        runs = [(length, len(list(run))) for length, run in itertools.groupby(self.lengths)]
        parts = (
            tensor[0].split([length * count for length, count in runs], dim=1)
            for tensor in (query, key, value)
        )
        outputs = []
        for (length, count), *qkv in zip(runs, *parts):
            q, k, v = (
                part.unflatten(1, (count, length)).transpose(0, 1) for part in qkv
            )  # [count, heads, length, d]
            outputs.append(
                F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
            )
        return torch.cat(outputs).transpose(0, 1)[None]


def has_varlen(query: Tensor) -> bool:
    """Flash attention for segments of different lengths: on a GPU, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


# What transformers calls in every layer of the decoder with the `row`, of the vision tower with the `images` that we
# pass to `forward`. Lengths differ from row to row: kept out of torch.compile's graphs, they cause no recompilation.


@torch.compiler.disable
def shared_prefix_attention(module, query, key, value, attention_mask, scaling, row, **others):
    if others.get("dropout") or any(
        others.get(each) is not None for each in ("sliding_window", "softcap", "s_aux")
    ):
        raise ValueError(
            "attention over a row has no dropout, no sliding window, no softcap and no sinks"
        )
    return row.attend(module.layer_idx, query, key, value, scaling).transpose(
        1, 2
    ), None  # [1, T, heads, d]


@torch.compiler.disable
def image_attention(module, query, key, value, attention_mask, scaling, images=None, **_):
    segments = images.whole if module.attends_to_whole_images else images.windows
    return segments.attend(query, key, value, scaling).transpose(
        1, 2
    ), None  # [1, patches, heads, d]


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionInterface.register("packed_images", image_attention)


# ---------------------------------------------------------------------------------------------------------------------
# From comparisons to a row: in the loader's processes, on the CPU.


def prompt_positions(prompt: np.ndarray, grids: np.ndarray, image_token: int | None) -> np.ndarray:
    """Position ids [3, P] of a prompt [P] with M-RoPE (Qwen2-VL, arXiv 2409.12191), from its images' grids in tokens
    [images, 3], which are a processor's grid_thw // [1, merge, merge]; without images ([]) they count up.

    Text counts up on all three axes. The tokens of an image share one time, count rows and columns from there, and the
    text after it continues after the largest of them.
    """
    if len(grids) and np.prod(grids, axis=1).sum() != (prompt == image_token).sum():
        raise ValueError(
            "the prompt's image tokens are not as many as the grids say, in tokens, not in patches"
        )
    positions, start, next_position = [], 0, 0
    for t, h, w in grids:
        text = int(np.argmax(prompt[start:] == image_token))  # tokens before this image's
        positions.append(np.tile(np.arange(text) + next_position, (3, 1)))
        next_position += text
        positions.append(np.indices((t, h, w)).reshape(3, -1) + next_position)
        next_position += max(h, w)
        start += text + t * h * w
    positions.append(np.tile(np.arange(len(prompt) - start) + next_position, (3, 1)))
    return np.concatenate(positions, axis=1)


def pack_tokens(
    prompts: list[np.ndarray],
    responses: list[list[np.ndarray]],
    positions: list[np.ndarray] | None = None,
) -> PackedRow:
    """One row of token ids: prompts [P], and of each its responses [R]. `positions` are the prompts', [3, P]; without
    them they count up. All responses go on where their prompt ends."""
    positions = positions or [np.tile(np.arange(len(prompt)), (3, 1)) for prompt in prompts]
    ids, at, lengths = [], [], []
    for prompt, those, of_prompt in zip(prompts, responses, positions, strict=True):
        lengths.append((len(prompt), [len(response) for response in those]))
        ids += [prompt, *those]
        at += [
            of_prompt,
            *(np.tile(of_prompt.max() + 1 + np.arange(len(each)), (3, 1)) for each in those),
        ]
    segments = Segments.of_comparisons(lengths)
    ends = [
        end
        for end, prefix in zip(segments.starts[1:].tolist(), segments.prefixes)
        if prefix is not None
    ]
    input_ids = torch.from_numpy(np.concatenate(ids).astype(np.int64))[None]
    position_ids = torch.from_numpy(np.concatenate(at, axis=1).astype(np.int64))[:, None]
    return PackedRow(
        lengths, input_ids, position_ids, torch.tensor(ends, dtype=torch.long) - 1, segments
    )


def pack(
    comparisons: list[Comparison], processors: Processors, dummy_image: bool = False
) -> PackedRow:
    """Packs comparisons into one row and decodes their images.

    `dummy_image` appends a comparison that nobody reads: a prompt of one blank image and no responses. It contributes
    exactly zero to every gradient, and is for FSDP, where a rank without an image would not join the vision tower's
    all-gather and all ranks would wait for it for ever.
    """
    if dummy_image:
        comparisons = [*comparisons, blank_comparison(processors)]
    images = [
        image for comparison in comparisons for image in data.open_images(comparison, processors)
    ]
    positions = None
    if processors.family.mrope:
        merge = [1, processors.vision.merge, processors.vision.merge]  # patches of a token
        positions = [
            prompt_positions(c.prompt, c.grids // merge, processors.image_token)
            for c in comparisons
        ]
    row = pack_tokens(
        [c.prompt for c in comparisons], [c.responses for c in comparisons], positions
    )
    if images:
        grids = np.concatenate([comparison.grids for comparison in comparisons]).astype(np.int64)
        if not np.array_equal(grids, [data.patch_grid(image.size, processors) for image in images]):
            raise UserError(
                "the images' patch grids differ from those they were prepared with: "
                "the model's image processor has other pixel limits; run 01_data.py again with --backbone set to it"
            )
        pixels, grids = (
            processors.image(images, return_tensors="pt")["pixel_values"],
            torch.from_numpy(grids),
        )
        row.images = (
            Images(pixels, grids)
            if processors.family.tiles
            else pack_images(pixels, grids, processors.vision)
        )
    return row


@dataclass
class Images:
    """The images of a row, their patches one after the other, and which patches see each other in the vision tower.

    Qwen2.5-VL's tower attends within windows of 8 x 8 patches in most layers, within whole images in the others. It
    reorders the patches so that a window's stand together. Qwen3-VL's has a table of learned positions, of which each
    patch takes the four nearest, weighted. InternVL's gets tiles of one size, a batch like any other.
    """

    pixel_values: Tensor  # [patches, 3 * 2 * 14 * 14]; of tiles [tiles, 3, 448, 448]
    grid_thw: Tensor  # [images, 3] in patches
    layout: dict[str, Tensor] = field(
        default_factory=dict
    )  # by `forward`'s names, what more it takes; tiles: none
    whole: Segments | None = None  # the images; None: tiles
    windows: Segments | None = None  # None: a tower without windows

    def arguments(self) -> dict:
        """For `forward` of a transformers backbone."""
        more = {"image_grid_thw": self.grid_thw, "images": self} if self.layout else {}
        return {"pixel_values": self.pixel_values, **self.layout, **more}


@lru_cache(4096)
def image_layout(height: int, width: int, shape: data.VisionShape) -> tuple:
    """Of an image of height x width patches: the positions of its patches [patches, 2], in which order its merged
    patches stand so that windows are contiguous, large windows first, and the windows' sizes in merged patches."""
    grid, merge = torch.tensor([[1, height, width]]), shape.merge
    positions = vision_utils.get_vision_position_ids(grid, merge)
    if not shape.window:
        return positions, None, []
    order, ends = vision_utils.get_vision_window_index(grid, merge, shape.window, shape.patch)
    windows = sorted(order.split((ends.diff() // merge**2).tolist()), key=len, reverse=True)
    return positions, torch.cat(windows), [len(window) for window in windows]


def pack_images(pixel_values: Tensor, grids: Tensor, shape: data.VisionShape) -> Images:
    """The tower is told that all patches are one segment, which it hands to `image_attention` in one call, instead of
    looping over windows and waiting for the GPU to learn where they end."""
    layouts = [image_layout(height, width, shape) for _, height, width in grids.tolist()]
    positions, orders, windows = zip(*layouts)
    patches = [len(position) for position in positions]
    everything = torch.tensor([0, sum(patches)], dtype=torch.int32)
    layout = {
        "image_position_ids": torch.cat(positions),
        "image_cu_seqlens": everything,
    }  # [patches, 2] row and column
    whole, in_windows = Segments.of(patches), None
    if shape.window:
        before = np.cumsum([0, *patches]) // shape.merge**2  # merged patches of the images before
        order = torch.cat(
            [order + int(start) for order, start in zip(orders, before)]
        )  # [patches / merge**2]
        layout |= {"image_window_index": order, "image_cu_window_seqlens": everything}
        in_windows = Segments.of([length * shape.merge**2 for sizes in windows for length in sizes])
    if shape.table:
        how = {
            "align_corners": True,
            "spatial_merge_size": shape.merge,
        }  # as Qwen3VLVisionModel does it
        found = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, shape.table, **how
        )  # [patches, 4] each
        layout |= zip(("image_interp_indices", "image_interp_weights"), found)
    return Images(pixel_values, grids, layout, whole, in_windows)


def blank_comparison(processors: Processors) -> Comparison:
    """A prompt of the smallest possible image and no responses (of one token where the backbone is text-only)."""
    if processors.image is None:
        return Comparison(np.array([processors.end_token], np.int32), [], [])
    merge = processors.vision.merge
    side = processors.vision.patch * merge
    file = data.read_image(data.Image.new("RGB", (side, side)), Path())
    grid = np.array([data.patch_grid((side, side), processors)], np.int32)
    return Comparison(
        np.full(grid.prod() // merge**2, processors.image_token, np.int32), [], [], [file], grid
    )


# ---------------------------------------------------------------------------------------------------------------------
# From a row to scores.


def run_backbone(backbone: nn.Module, row: PackedRow) -> Tensor:
    """One forward of a transformers backbone, with or without an LM head -> its last hidden states [T, hidden].

    Position ids are ours: transformers would count through the row, and keeps stale offsets after `generate`.
    """
    inputs = {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "use_cache": False,
        "row": row,
    }
    if not data.FAMILIES[backbone.config.model_type].mrope:
        inputs["position_ids"] = row.position_ids[0]  # the same on all axes
    inputs |= row.images.arguments() if row.images else {}
    return getattr(backbone, "model", backbone)(**inputs).last_hidden_state[0]


class RewardHead(nn.Module):
    """Hidden states [N, hidden] -> scores [N]: `layers` linear layers with an activation between them.

    The last layer has no bias: it would cancel in every difference of two scores, and its gradient be rounding noise,
    of which AdamW makes whole steps.
    """

    def __init__(self, hidden: int, layers: int = 2, activation: str = "silu", width: int = 0):
        super().__init__()
        if not 1 <= layers <= 5:
            raise UserError(f"a reward head of {layers} layers (--head_layers): must be 1 to 5")
        self.settings = {
            "hidden": hidden,
            "layers": layers,
            "activation": activation,
            "width": width or hidden,
        }
        sizes = [hidden, *[width or hidden] * (layers - 1)]
        parts = []
        for before, after in zip(sizes, sizes[1:]):
            parts += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        last = nn.Linear(sizes[-1], 1, bias=False)
        nn.init.normal_(
            last.weight, std=1 / math.sqrt(sizes[-1] + 1)
        )  # small scores at first (arXiv 2009.01325)
        self.mlp = nn.Sequential(*parts, last)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.mlp[0].weight.dtype != torch.float32:
            raise UserError(
                "the reward head is to stay float32; `place(reward, device, dtype)` makes only the backbone less"
            )
        scores = self.mlp(hidden.float()).sum(
            -1
        )  # of one; a squeezed view would trip FSDP's backward hooks
        if scores.dtype != torch.float32:
            raise UserError(
                "the reward head is to compute in float32; call it with autocast switched off"
            )
        return scores


class RewardModel(nn.Module):
    """A backbone and a reward head: `model(row)` gives one score for each response of a PackedRow.

    reward = RewardModel.from_pretrained("artifacts/reward")
    reward.score(messages, ["A red circle.", "A blue square."])      # -> tensor of 2 scores
    """

    kind = "naive"
    pack = staticmethod(pack)  # for training
    rewrite = None  # of a critic or a judge: a function Comparison -> Asked, for training

    def __init__(
        self,
        backbone,
        head: RewardHead | None,
        processors,
        trained_with: dict | None = None,
        asks=None,
    ):
        super().__init__()
        self.backbone, self.head, self.processors = backbone, head, processors
        self.trained_with = trained_with or {}  # what the head was trained with; empty: not at all
        self.asks = asks or {}  # of a critic or a judge: its request and how long a critique may be
        self.cost = Counter()  # of all that it has scored: tokens read and written, image patches

    def hidden_states(self, row: PackedRow) -> Tensor:
        """The backbone's last hidden states, [T, hidden]."""
        return run_backbone(self.backbone, row)

    def forward(self, row: PackedRow) -> Tensor:
        return self.head(self.hidden_states(row)[row.last])  # [T, hidden] -> [N, hidden] -> [N]

    def score(self, messages: list[dict], responses: list[str], images: list = ()) -> Tensor:
        """Scores N responses to one prompt, [N] float32 on the CPU; they do not depend on their order, nor on each
        other, unless it is a judge that compares them. The model computes where and in what it is; on a GPU,
        `place(reward, "cuda")` is the fast way.

        Args:
            messages: the prompt's turns; an image is {"type": "image", "image": path, bytes or PIL image}, or {"type":
                "image"} with the images in order in `images`.
            responses: the assistant's answers.
        Raises:
            ValueError: says what is wrong with the prompt, an image or a response.
        """
        data.require(
            not isinstance(responses, str), "responses: a text where a list of texts should be"
        )
        texts = [data.text_of(text, f"responses[{i}]") for i, text in enumerate(responses)]
        return self.score_encoded([self.encode(messages, texts, images)]).cpu()

    def encode(
        self, messages: list[dict], texts: list[str], images: list = (), folder: Path = Path()
    ) -> Comparison:
        """A prompt and responses as `score` takes them, ready for `score_encoded`; image paths are relative to
        `folder`. Raises ValueError as `score` does."""
        prompt, files, grids = data.encode_prompt(messages, images, self.processors, folder)
        responses = [data.encode_response(text, self.processors) for text in texts]
        return Comparison(prompt, responses, [1] * len(responses), files, grids)

    @torch.inference_mode()
    def score_encoded(self, comparisons: list[Comparison], micro_tokens: int = 8192) -> Tensor:
        """The scores of all responses of all comparisons, one after the other, [N] float32 on the model's device, in
        forwards of at most `micro_tokens` tokens each."""
        scores = [self(self.row_of(row)) for row in split_into_rows(comparisons, micro_tokens)]
        return torch.cat([torch.zeros(0, device=self.device), *scores])

    def row_of(self, comparisons: list[Comparison]) -> PackedRow:
        """Packs a row that is going to be read on the model's device, and counts it in `cost`."""
        row = pack(comparisons, self.processors)
        patches = int(row.images.grid_thw.prod(1).sum()) if row.images else 0
        self.cost.update(read=row.input_ids.shape[1], patches=patches)
        return row.to(self.device)

    def model_for(self, has_image: bool) -> "RewardModel":
        return self  # a RewardRouter has two

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer with which prepared comparisons must have been encoded."""
        return self.processors.fingerprint

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def from_backbone(cls, path: str, settings: HeadSettings, max_pixels: int = 0) -> "RewardModel":
        """A backbone from a Hugging Face checkpoint with a new head, as the kind that the settings name."""
        kind, head, asks = settings.kind, None, None
        backbone = load_backbone(path, kind != "naive")
        if kind != "generative":
            hidden = backbone.config.get_text_config().hidden_size
            head = RewardHead(
                hidden, settings.head_layers, settings.head_activation, settings.head_width
            )
        if kind != "naive":
            asks = {
                "request": settings.request or REQUESTS[kind],
                "critique_tokens": settings.critique_tokens,
            }
        return KINDS[kind](backbone, head, data.load_processors(path, max_pixels), asks=asks)

    @classmethod
    def from_pretrained(cls, folder: str, empty: bool = False) -> "RewardModel":
        """A reward model that `save_pretrained` wrote, of the kind that it was; `empty` leaves the backbone's weights
        to be filled in, as in `load_backbone`. Raises UserError where there is none."""
        path = Path(folder, HEAD_FILE)
        if not path.is_file():
            raise UserError(
                f"{folder}: no reward model there (no {path.name}); run 02_model.py or 03_train.py first"
            )
        with (
            data.reading(path, "run 02_model.py or 03_train.py again"),
            safe_open(path, framework="pt") as file,
        ):
            about = {"kind": "naive"} | json.loads(
                file.metadata()["reward_head"]
            )  # older ones do not name their kind
            if about["kind"] not in KINDS:
                raise data.Unusable(f"its kind is {about['kind']!r}, none of {', '.join(KINDS)}")
            kind = KINDS[about["kind"]]
            with torch.device("meta"):  # takes no memory before the shapes are compared
                head = RewardHead(**about["head"]) if kind is not Judge else None
            shapes = (
                {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
                if head
                else {}
            )
            if shapes != {name: file.get_slice(name).get_shape() for name in file.keys()}:
                raise data.Unusable(
                    f"its tensors are not those of the head that it describes, {about['head']}"
                )
            if head:
                head.load_state_dict(
                    {name: file.get_tensor(name).float() for name in shapes}, assign=True
                )
                check_finite(head)
            trained_with, asks = about["trained_with"], None
            if kind is not RewardModel:
                asks = {
                    name: cast(about["asks"][name])
                    for name, cast in (("request", str), ("critique_tokens", int))
                }
        backbone = load_backbone(folder, kind is not RewardModel, empty)
        hidden = backbone.config.get_text_config().hidden_size
        if head and head.settings["hidden"] != hidden:
            raise UserError(
                f"{path}: a head for hidden states of {head.settings['hidden']}, the backbone has {hidden}"
            )
        return kind(backbone, head, data.load_processors(folder), trained_with, asks)

    def save_pretrained(
        self, folder: str, dtype: torch.dtype = torch.float32, file_size: str = "5GB"
    ) -> None:
        """Writes the Hugging Face layout (`export`) plus reward_head.safetensors, which is float32 whatever `dtype`
        the backbone gets; a judge's has no tensors. Where the model is sharded all ranks call it."""
        head = (
            {name: whole(tensor).cpu() for name, tensor in self.head.state_dict().items()}
            if self.head
            else {}
        )
        about = {
            "kind": self.kind,
            "head": self.head.settings if self.head else None,
            "asks": self.asks,
        }
        head_file = save(
            head, metadata={"reward_head": json.dumps(about | {"trained_with": self.trained_with})}
        )
        export(self.backbone, self.processors, folder, dtype, file_size, head_file)


def split_into_rows(comparisons: list[Comparison], micro_tokens: int) -> Iterator[list[Comparison]]:
    """Deals comparisons, in order, into rows of at most `micro_tokens` tokens (an image patch counts a quarter). One
    that is longer is cut between its responses and its prompt stands in each part; a single response is never cut."""
    row, size = [], 0
    for comparison in comparisons:
        patches, part = int(comparison.grids.prod(1).sum()) // 4, None
        for response in comparison.responses:
            if (
                row
                and size + (len(response) if part else comparison.length + patches) > micro_tokens
            ):
                yield row
                row, size, part = [], 0, None
            if part is None:
                part = dataclasses.replace(comparison, responses=[])
                row.append(part)
                size += len(comparison.prompt) + patches
            part.responses.append(response)
            size += len(response)
    if row:
        yield row


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints in the Hugging Face layout, in and out.


def attention_of(config: PreTrainedConfig) -> str | dict[str, str]:
    """The names under which a model's attention layers find our functions, for `attn_implementation`. Tiles of one size
    need none of ours."""
    family = data.FAMILIES[config.model_type]
    if not family.vision:
        return "shared_prefix"
    return {
        "text_config": "shared_prefix",
        "vision_config": "sdpa" if family.tiles else "packed_images",
    }


Parts = namedtuple("Parts", "language, vision, blocks")


def parts_of(backbone: nn.Module) -> Parts:
    """Where a backbone, with or without its LM head, has its language model (with `layers`), its vision tower or None,
    and the list of the tower's layers, whatever its family calls them."""
    family = data.FAMILIES[backbone.config.model_type]
    base = getattr(backbone, "model", backbone)
    if not family.vision:
        return Parts(base, None, [])
    vision = base.get_submodule(family.vision)
    return Parts(
        base.get_submodule(family.language), vision, list(vision.get_submodule(family.blocks))
    )


class PatchProjection(nn.Conv3d):
    """The vision tower's first layer. Its kernel is as large as a patch, so it is one matrix product, for which
    PyTorch's 3-D convolution takes several times as long."""

    def forward(self, patches: Tensor) -> Tensor:  # [patches, channels, time, height, width]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)  # [patches, hidden]


def prepare_vision(backbone: nn.Module) -> None:
    """Tells each attention layer of the vision tower whether it attends to whole images or to windows, for
    `image_attention`, and makes its patch embedding a matrix product. Weights and their names stay as they are."""
    parts = parts_of(backbone)
    if parts.vision is None or data.FAMILIES[backbone.config.model_type].tiles:
        return
    parts.vision.patch_embed.proj.__class__ = PatchProjection
    whole = getattr(parts.vision.config, "fullatt_block_indexes", None)
    for i, block in enumerate(parts.blocks):
        block.attn.attends_to_whole_images = whole is None or i in whole


def load_backbone(path: str, lm_head: bool = False, empty: bool = False) -> nn.Module:
    """A Hugging Face checkpoint, float32, whose decoder layers attend by `shared_prefix_attention`; without its LM head
    unless that is asked for. An `empty` one is on the meta device, shapes without weights, and takes no memory: for
    `shard` and then `load_weights` (03)."""
    transformers_logging.disable_progress_bar()
    try:
        config = data.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no model in the Hugging Face layout: {str(error).splitlines()[0]}"
        ) from None
    with_head = (
        AutoModelForImageTextToText if data.family_of(config, path).vision else AutoModelForCausalLM
    )
    auto = with_head if lm_head else AutoModel
    wanted = {"dtype": torch.float32, "attn_implementation": attention_of(config)}
    if empty:
        with torch.device("meta"):
            backbone = auto.from_config(config, **wanted).eval()
        if lm_head:
            with suppress(OSError):  # where there is none, it is made from the config
                backbone.generation_config = GenerationConfig.from_pretrained(path)
    else:
        with data.reading(
            path, "a model has to be whole"
        ):  # nothing is unpickled, and nothing made up
            backbone, found = auto.from_pretrained(
                path, **wanted, use_safetensors=True, output_loading_info=True
            )
            if found["missing_keys"]:
                name, *more = sorted(found["missing_keys"])
                raise data.Unusable(f"{name} is missing{f', and {len(more)} more' if more else ''}")
            check_finite(backbone)
    prepare_vision(backbone)
    return backbone


def check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise data.Unusable(f"{name} has weights that are not finite")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded, gathered; then all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def export(
    model: nn.Module,
    processors: Processors,
    folder: str,
    dtype: torch.dtype = torch.float32,
    file_size: str = "5GB",
    head_file: bytes = b"",
) -> None:
    """Writes a transformers model and its processors as `from_pretrained` reads them: weights under their published
    names, tied ones once, in several files with an index where they are more than `file_size`.

    Of a sharded model all ranks call this. A tensor is gathered at a time, on all of them, and rank 0 keeps it until
    the file that it belongs to is written: that takes memory for twice the largest tensor, and on rank 0 for one file.

    All files are first written beside their place. What makes a model whole, the file or index that `from_pretrained`
    looks for and the head of a reward model, is the first to go of an earlier one and the last to come of this one.

    Raises UserError where `file_size` is no size like 5GB.
    """
    state = model.state_dict(
        keep_vars=True
    )  # asked for it, FSDP also shards again what it has left gathered
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    state = revert_weight_conversion(model, state)
    shapes = {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta")
        for name, tensor in state.items()
    }
    try:
        files = split_torch_state_dict_into_shards(shapes, max_shard_size=file_size)
    except ValueError as error:
        raise UserError(f"--export_file_size {file_size}: {error}") from None
    contents = files.filename_to_tensors  # {file: [name, ...]}
    gathered = (whole(state[name].to(dtype)) for names in contents.values() for name in names)
    if any(isinstance(tensor, DTensor) for tensor in state.values()) and dist.get_rank() > 0:
        for _ in gathered:  # one at a time, forgotten at once
            pass
        return
    out, writing = Path(folder), Path(folder, ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    for file, names in contents.items():
        tensors = {name: next(gathered).cpu().contiguous() for name in names}
        save_file(tensors, writing / file, metadata={"format": "pt"})
        data.make_readable(writing / file)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        data.write_file(writing / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True))
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(writing)
    if model.can_generate():
        model.generation_config.save_pretrained(writing)
    processors.save(str(writing))
    if head_file:
        data.write_file(writing / HEAD_FILE, head_file)

    order = ["model.safetensors", INDEX_FILE, HEAD_FILE]  # the last to come and the first to go
    for name in reversed(order):
        (out / name).unlink(missing_ok=True)
    for old in out.glob("model-*.safetensors"):
        old.unlink()
    for path in sorted(
        writing.iterdir(), key=lambda path: order.index(path.name) if path.name in order else -1
    ):
        os.replace(path, out / path.name)
    writing.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# In use: on a device, two models as one, and as the reward of other people's training.


class RewardRouter(nn.Module):
    """A multimodal and a text-only reward model that are used as one: a comparison with an image goes to the first, one
    without to the second, which the paper finds better for text than any multimodal one.

    Their scores live on different scales, so compare those of one prompt only. Each model encodes text with its own
    tokenizer; comparisons that were encoded before, in shards, need two models that have the same.
    """

    def __init__(self, multimodal: RewardModel, text: RewardModel):
        super().__init__()
        if multimodal.processors.image is None:
            raise UserError("the multimodal reward model of the two is text-only")
        self.multimodal, self.text = multimodal, text

    @classmethod
    def from_pretrained(cls, multimodal: str, text: str) -> "RewardRouter":
        return cls(RewardModel.from_pretrained(multimodal), RewardModel.from_pretrained(text))

    def model_for(self, has_image: bool) -> RewardModel:
        return self.multimodal if has_image else self.text

    score = RewardModel.score  # with its own `encode` and `score_encoded`

    def encode(
        self, messages: list[dict], texts: list[str], images: list = (), folder: Path = Path()
    ) -> Comparison:
        """As `RewardModel.encode`, with the tokenizer of the model that will score it."""
        in_text = any(
            isinstance(turn["content"], list) for turn in data.check_messages(messages)
        )  # a list has images
        return self.model_for(in_text or bool(images)).encode(messages, texts, images, folder)

    def score_encoded(self, comparisons: list[Comparison], micro_tokens: int = 8192) -> Tensor:
        """As `RewardModel.score_encoded`."""
        scores = {}
        for images in (True, False):
            part = [
                i for i, comparison in enumerate(comparisons) if bool(comparison.images) == images
            ]
            found = self.model_for(images).score_encoded(
                [comparisons[i] for i in part], micro_tokens
            )
            scores |= (
                zip(part, found.split([len(comparisons[i].responses) for i in part]))
                if part
                else ()
            )
        return torch.cat(
            [torch.zeros(0, device=self.multimodal.device), *(scores[i] for i in sorted(scores))]
        )

    @property
    def fingerprint(self) -> str:
        """As `RewardModel.fingerprint`. Raises UserError where the two models have different tokenizers."""
        if self.multimodal.fingerprint != self.text.fingerprint:
            raise UserError(
                "the two reward models have different tokenizers or chat templates, and prepared data has one; "
                "from text, both can score together: 04_eval.py --score, or `score` in Python"
            )
        return self.multimodal.fingerprint

    @property
    def processors(self) -> Processors:
        return self.multimodal.processors

    @property
    def trained_with(self) -> dict:
        sets = [model.trained_with.get("data", []) for model in (self.multimodal, self.text)]
        return {"data": [*dict.fromkeys(itertools.chain(*sets))]}


def place(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> nn.Module:
    """Readies a model for inference on a device, in place, and returns it. Without `dtype` it computes in bfloat16 on a
    GPU and in float32 elsewhere. As in training that is for parameters only: a reward head stays float32, and so do
    rotary frequencies, which `model.to(dtype)` would round as well, and so be off by radians at position 1000."""
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False).to(device)
    exact = {
        p
        for module in model.modules()
        if isinstance(module, RewardHead)
        for p in module.parameters()
    }
    for parameter in model.parameters():
        if parameter not in exact:
            parameter.data = parameter.to(dtype)
    return model


Reward = RewardModel | RewardRouter


def load_reward(model: str, text_model: str = "") -> Reward:
    """The reward model of the command line's --model, or the router of --model and --text_model."""
    return (
        RewardRouter.from_pretrained(model, text_model)
        if text_model
        else RewardModel.from_pretrained(model)
    )


def trl_reward(
    reward: Reward,
    prompts: list,
    completions: list,
    images: list | None = None,
    image: list | None = None,
    log_metric: Callable | None = None,
    **_,
) -> list[float]:
    """A reward function of TRL's GRPOTrainer: GRPOTrainer(..., reward_funcs=partial(trl_reward, reward)).

    TRL gives a prompt anew with each of its completions. Prompts that are equal, images included, become one comparison
    here, which is encoded once; TRL logs how many completions that makes for each as "completions_per_prompt".

    Args: a RewardModel or RewardRouter; prompts and completions [n], texts or lists of messages; images, the data set's
        column of that name, a list for each prompt, or `image`, one or None for each; what else TRL passes is not used.
    Returns the raw scores [n]. Raises ValueError where a completion is more than one text, or a prompt is unusable.
    """
    given = images or [[] if each is None else [each] for each in image or [None] * len(prompts)]
    texts = [
        each[0]["content"] if isinstance(each, list) and len(each) == 1 else each
        for each in completions
    ]
    if not all(isinstance(text, str) for text in texts):  # an empty one is a text
        raise data.Unusable("completions: neither a text nor one assistant message with a text")
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(zip(prompts, given, strict=True)):
        groups.setdefault(hashable(prompt), []).append(i)
    comparisons = []
    for places in groups.values():
        first = places[0]
        comparisons.append(
            reward.encode(prompts[first], [texts[i] for i in places], given[first] or [])
        )
    if log_metric is not None:
        log_metric("completions_per_prompt", len(prompts) / len(groups))
    scores = dict(
        zip(itertools.chain(*groups.values()), reward.score_encoded(comparisons).tolist())
    )
    return [scores[i] for i in range(len(prompts))]


def hashable(value: Any) -> Hashable:
    """A prompt as something that is equal, and has the same hash, where two prompts are the same."""
    if isinstance(value, dict):
        return tuple((key, hashable(part)) for key, part in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, data.Image.Image):
        return value.mode, value.size, value.tobytes()
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Writing: a critic's critiques, and in 06 a policy's answers. Each prompt, with its images, is read once; its keys and
# values serve all its samples, and samples that have ended leave the row.


class Writer(nn.Module):
    """A transformers model with its LM head, `lm`, that writes at a temperature."""

    def __init__(self, lm: nn.Module, processors: Processors, temperature: float = 1.0):
        super().__init__()
        self.lm, self.processors, self.temperature = lm, processors, temperature
        tokenizer, size = processors.tokenizer, lm.config.get_text_config().vocab_size
        forbidden = {*tokenizer.get_added_vocab().values(), *range(len(tokenizer), size)} & {
            *range(size)
        }
        forbidden.remove(processors.end_token)
        self.register_buffer("forbidden", torch.tensor(sorted(forbidden)), persistent=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary], float32, at the temperature; what must not be written is at -inf."""
        logits = self.lm.lm_head(hidden).float() / self.temperature
        return logits.index_fill(-1, self.forbidden, -math.inf)


@dataclass
class KeptRow(PackedRow):
    """A packed row that keeps every layer's keys and values."""

    cache: dict = field(default_factory=dict)  # {layer: (keys, values)}, [1, kv heads, T, d] each

    def attend(self, layer, query, key, value, scale):
        self.cache[layer] = (key, value)
        return super().attend(layer, query, key, value, scale)


class DecodeRow:
    """One new token for each sample that goes on: n tokens of n different samples stand in one row.

    Queries attend to the keys of what they go on from (here the prompt), kept once for its G samples, and to their own.
    `texts` says where in the row that stands: a prompt, or a prompt and one response to it.
    """

    images = None

    def __init__(self, row: KeptRow, texts: list[Tensor], group: int, max_new_tokens: int):
        lengths, device = list(map(len, texts)), row.input_ids.device
        self.prompts, self.group, self.longest = len(lengths), group, max(lengths)
        self.padding = (
            torch.arange(self.longest, device=device)
            >= torch.tensor(lengths, device=device)[:, None]
        )

        def pad(packed):  # [1, kv heads, T, d] -> [prompts, kv heads, longest, d]
            each = [packed[0].transpose(0, 1)[places] for places in texts]
            return nn.utils.rnn.pad_sequence(each, batch_first=True).transpose(1, 2)

        def room(key):  # [samples, kv heads, max_new_tokens, d]
            return key.new_empty(self.prompts * group, key.shape[1], max_new_tokens, key.shape[3])

        self.prompt_cache = {
            layer: (pad(key), pad(value)) for layer, (key, value) in row.cache.items()
        }
        self.answer_cache = {layer: (room(key), room(key)) for layer, (key, _) in row.cache.items()}

    def advance(self, alive: Tensor, tokens: Tensor, positions: Tensor, t: int) -> "DecodeRow":
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
        own_k[self.alive, :, self.t], own_v[self.alive, :, self.t] = (
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
        )
        own_k, own_v = (
            own_k[self.alive, :, : self.t + 1],
            own_v[self.alive, :, : self.t + 1],
        )  # [n, kv, t + 1, d]
        q = (
            query[0].transpose(0, 1).reshape(n, kv, shared, d) * scale
        )  # [1, heads, n, d] -> [n, kv, shared, d]

        def by_prompt(
            x,
        ):  # [n, kv, shared, ...] -> [prompts, kv, group * shared, ...], zeros for ended samples
            grid = x.new_zeros(self.prompts * self.group, *x.shape[1:])
            grid[self.alive] = x
            return grid.view(self.prompts, self.group, kv, shared, -1).transpose(1, 2).flatten(2, 3)

        def by_sample(x):  # and back
            return x.unflatten(2, (self.group, shared)).transpose(1, 2).flatten(0, 1)[self.alive]

        scores = by_prompt(q) @ prompt_k.transpose(-1, -2)  # [prompts, kv, group * shared, longest]
        scores = by_sample(
            scores.masked_fill(self.padding[:, None, None], -math.inf)
        )  # [n, kv, shared, longest]
        scores = torch.cat(
            [scores, q @ own_k.transpose(-1, -2)], dim=-1
        )  # [n, kv, shared, longest + t + 1]
        to_prompt, to_own = scores.softmax(-1).split([self.longest, self.t + 1], dim=-1)
        out = by_sample(by_prompt(to_prompt) @ prompt_v) + to_own @ own_v  # [n, kv, shared, d]
        return out.reshape(1, n, heads, d).transpose(1, 2)


@torch.inference_mode()
def write(
    writer: Writer, row: PackedRow, group: int, max_new_tokens: int, noise: np.ndarray | None = None
) -> Tensor:
    """Goes on `group` times after every response of a row, or after a prompt that has none: token ids [texts, group,
    max_new_tokens], -1 after the end-of-turn token.

    `noise` [texts, group, max_new_tokens], uniform in [0, 1), decides every token by inversion of the distribution, so
    a sample does not depend on what else is in the batch; None writes what is likeliest.
    """
    end = writer.processors.end_token
    row, device = KeptRow(**vars(row)), row.input_ids.device
    hidden = run_backbone(writer.lm, row)  # [T, hidden]
    segments = row.segments.keys.split(row.segments.key_starts.diff().tolist())
    texts = [
        places for i, places in enumerate(segments) if i not in row.segments.prefixes
    ]  # nothing follows yet
    ends = torch.stack([places[-1] for places in texts])
    begin = torch.stack([row.position_ids[:, 0, places].max() + 1 for places in texts])
    hidden = hidden[ends].repeat_interleave(group, 0)  # [samples, hidden]
    begin = begin.repeat_interleave(group)  # [samples] position of the first new token
    tokens = torch.full((len(texts) * group, max_new_tokens), -1, device=device)
    uniform = (
        None
        if noise is None
        else torch.from_numpy(noise).to(device).view(len(tokens), max_new_tokens)
    )
    alive, decode = (
        torch.arange(len(tokens), device=device),
        DecodeRow(row, texts, group, max_new_tokens),
    )
    for t in range(max_new_tokens):
        logits = writer.logits(hidden)  # [n, vocabulary]
        if uniform is None:
            chosen = logits.argmax(-1)
        else:
            cumulated = logits.double().softmax(-1).cumsum(-1)
            chosen = torch.searchsorted(
                cumulated, uniform[alive, t, None] * cumulated[:, -1:], right=True
            )[:, 0]
        tokens[alive, t] = chosen
        going = chosen != end
        alive, chosen = alive[going], chosen[going]
        if len(alive) == 0 or t + 1 == max_new_tokens:
            break
        hidden = run_backbone(writer.lm, decode.advance(alive, chosen, begin[alive] + t, t))
    return tokens.view(len(texts), group, max_new_tokens)


def texts_of(tokens: Tensor, processors: Processors) -> list[str]:
    """[samples, max_new_tokens] -> the answers' texts, without the end-of-turn token."""
    answers = [
        [t for t in sample if t not in (-1, processors.end_token)] for sample in tokens.tolist()
    ]
    return [processors.tokenizer.decode(answer) for answer in answers]


# ---------------------------------------------------------------------------------------------------------------------
# The other two kinds, critic and judge: how they read a comparison, with a request after each response and what they
# have to write after that, and the models. Who wants the naive kind alone has seen all of it above.

REQUESTS = {"critic": "Is it right? Explain.", "generative": "Which is better, A or B?"}


@dataclass
class Asked(Comparison):
    """A comparison whose `responses` have a request after them and end in what the model has to write itself; and for
    training, what is to be learned from it."""

    learned: list[np.ndarray] = field(
        default_factory=list
    )  # of each response, its last tokens' weights in the loss
    judged: list[tuple[int, int]] = field(
        default_factory=list
    )  # judge: (better, worse) of `responses`; else by ranks

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return self.judged or data.ordered_pairs(self.ranks)


@dataclass
class Written:
    """The tokens in a row that the model has to write itself."""

    predictors: Tensor  # [tokens] where in the row each is predicted
    tokens: Tensor  # [tokens] token ids
    weight: Tensor  # [tokens] in the loss; they sum to 1 for each comparison, which counts once

    @classmethod
    def of(cls, row: PackedRow, comparisons: list[Comparison]) -> "Written":
        """Of a row of these comparisons; none where they are not Asked."""
        learned = [
            w for each in comparisons for w in getattr(each, "learned", [()] * len(each.responses))
        ]
        ends = (row.last + 1).tolist()
        places = [
            place for end, weights in zip(ends, learned) for place in range(end - len(weights), end)
        ]
        places, weight = (
            torch.tensor(places, dtype=torch.long),
            np.concatenate([(), *learned]).astype(np.float32),
        )
        return cls(places - 1, row.input_ids[0, places], torch.from_numpy(weight))

    def log_probabilities(self, lm: nn.Module, hidden: Tensor) -> Tensor:
        """Of the tokens, [tokens], from the row's hidden states [T, hidden]."""
        log_p = lm.lm_head(hidden[self.predictors]).float().log_softmax(-1)  # [tokens, vocabulary]
        # The sum of one: a squeezed view would trip FSDP's backward hooks.
        return log_p.gather(-1, self.tokens[:, None]).sum(-1)


@dataclass
class WrittenRow(PackedRow):
    """A packed row and the tokens in it that the model has to write itself."""

    written: Written | None = None


def pack_written(
    comparisons: list[Comparison], processors: Processors, dummy_image: bool = False
) -> WrittenRow:
    """As `pack`, of Asked comparisons."""
    row = pack(comparisons, processors, dummy_image)
    if dummy_image:
        comparisons = [*comparisons, blank_comparison(processors)]
    return WrittenRow(**vars(row), written=Written.of(row, comparisons))


def turn_after_answer(request: str, processors: Processors) -> np.ndarray:
    """The token ids that the chat template puts after an answer's end-of-turn token when the user goes on with
    `request`, up to where the assistant's next answer begins."""
    turns = [("user", "?"), ("assistant", "!"), ("user", request)]
    messages = [{"role": role, "content": text} for role, text in turns]
    before, whole = (
        data.tokenize_chat(some, processors.tokenizer) for some in (messages[:1], messages)
    )
    ends = np.flatnonzero(whole[len(before) :] == processors.end_token)
    if not len(ends):
        raise UserError(
            "the chat template sets no end-of-turn token after an answer, where a request could follow"
        )
    return whole[len(before) + ends[0] + 1 :]


def with_critiques(
    comparison: Comparison, critiques: list[np.ndarray], request: np.ndarray
) -> Asked:
    """A critic's: [response | request | critique]. Critiques are token ids, each ending in <|im_end|>."""
    responses = [
        np.concatenate([r, request, critique])
        for r, critique in zip(comparison.responses, critiques)
    ]
    tokens = sum(map(len, critiques))
    learned = [np.full(len(critique), 1 / tokens) for critique in critiques]
    return Asked(**vars(comparison) | {"responses": responses}, learned=learned)


def with_given_critiques(
    comparison: Comparison, request: np.ndarray, processors: Processors
) -> Asked:
    """The same with the critiques of the data; with no responses, so nothing to learn from, where it has none."""
    given = comparison.record.get("critiques")
    usable = isinstance(given, list) and len(given) == len(comparison.responses)
    usable = usable and all(isinstance(critique, str) and critique.strip() for critique in given)
    critiques = [data.encode_response(critique, processors) for critique in given] if usable else []
    return with_critiques(comparison, critiques, request)


def in_ordered_pairs(comparison: Comparison, request: np.ndarray, processors: Processors) -> Asked:
    """A judge's: [A: one response, B: another | request | the letter of the better one], for all ordered pairs. Of two
    that tie, either letter has a weight of 0."""
    encode = lambda text: np.array(data.tokenize_text(text, processors.tokenizer), np.int32)
    a, b, before_a, before_b = map(encode, ("A", "B", "A:\n", "\nB:\n"))
    ranks = comparison.ranks or [1] * len(comparison.responses)
    shown = {
        pair: k for k, pair in enumerate(itertools.permutations(range(len(ranks)), 2))
    }  # (A, B): place in the row
    # Of each two that do not tie, where the better is A, and where it is B.
    pairs = [(k, shown[j, i]) for (i, j), k in shown.items() if ranks[i] < ranks[j]]
    responses, learned = [], []
    for i, j in shown:
        # A without its end-of-turn token: the turn goes on.
        first, second, letter = (
            comparison.responses[i][:-1],
            comparison.responses[j],
            a if ranks[i] < ranks[j] else b,
        )
        responses.append(np.concatenate([before_a, first, before_b, second, request, letter]))
        learned.append([0.5 / len(pairs) if ranks[i] != ranks[j] else 0.0])
    return Asked(**vars(comparison) | {"responses": responses}, learned=learned, judged=pairs)


class Critic(RewardModel):
    """Writes a critique of each response; its score is the head's at the critique's end."""

    kind = "critic"
    pack = staticmethod(pack_written)  # for training

    def __init__(self, *made, **more):
        super().__init__(*made, **more)
        tokens, largest = (
            self.asks["critique_tokens"],
            self.backbone.config.get_text_config().max_position_embeddings,
        )
        if not 1 <= tokens <= largest:
            raise UserError(
                f"--critique_tokens {tokens}: must be 1 to {largest}, the backbone's positions"
            )
        self.request = turn_after_answer(
            self.asks["request"], self.processors
        )  # token ids after a response
        self.rewrite = partial(
            with_given_critiques, request=self.request, processors=self.processors
        )

    def forward(self, row: PackedRow, written: Written | None = None):
        """Scores [N]; with `written`, also the log-probabilities of the critiques' tokens."""
        hidden = self.hidden_states(row)
        scores = self.head(hidden[row.last])
        return (scores, written.log_probabilities(self.backbone, hidden)) if written else scores

    @torch.inference_mode()
    def write_critiques(
        self, comparisons: list[Comparison], micro_tokens: int = 8192
    ) -> list[np.ndarray]:
        """Its likeliest critique of each response of each comparison, as token ids; one cut at the length limit is
        ended there."""
        writer, end = (
            Writer(self.backbone, self.processors).to(self.device),
            self.processors.end_token,
        )
        ask = lambda comparison: [
            np.concatenate([response, self.request]) for response in comparison.responses
        ]
        asked, critiques = (
            [dataclasses.replace(each, responses=ask(each)) for each in comparisons],
            [],
        )
        for row in split_into_rows(asked, micro_tokens):
            tokens = write(writer, self.row_of(row), 1, self.asks["critique_tokens"])[:, 0]
            self.cost.update(written=int((tokens >= 0).sum()))
            written = ([t for t in each if t not in (-1, end)] for each in tokens.tolist())
            critiques += [np.array([*each, end], np.int32) for each in written]
        return critiques

    def score_encoded(self, comparisons: list[Comparison], micro_tokens: int = 8192) -> Tensor:
        critiques = iter(self.write_critiques(comparisons, micro_tokens))
        made = [
            with_critiques(each, [next(critiques) for _ in each.responses], self.request)
            for each in comparisons
        ]
        return super().score_encoded(made, micro_tokens)


class Judge(RewardModel):
    """Shown two responses it answers A or B; it has no head but its LM head.

    S(i, j), the score of a pair, is the difference of the letters' log-odds averaged over both orders, so S(j, i) is
    -S(i, j); a response's score is the sum over all others, as the paper makes R1-Reward a reward for RL (Table 11).
    """

    kind = "generative"
    pack = staticmethod(pack_written)  # for training

    def __init__(self, *made, **more):
        super().__init__(*made, **more)
        self.request = turn_after_answer(
            self.asks["request"], self.processors
        )  # token ids after a pair
        self.rewrite = partial(in_ordered_pairs, request=self.request, processors=self.processors)
        self.letters = [data.tokenize_text(letter, self.processors.tokenizer)[0] for letter in "AB"]

    def forward(self, row: PackedRow, written: Written | None = None):
        """Log-odds of A over B [ordered pairs]; with `written`, also the log-probabilities of the right letters."""
        hidden = self.hidden_states(row)
        a, b = self.backbone.lm_head.weight[self.letters].float()  # [hidden]
        odds = hidden[row.last - 1].float() @ (a - b)  # in float32 like the head's scores
        return (odds, written.log_probabilities(self.backbone, hidden)) if written else odds

    def score_encoded(self, comparisons: list[Comparison], micro_tokens: int = 8192) -> Tensor:
        """As `RewardModel.score_encoded`. A row may have some pairs of a comparison and the next row the others. Equal
        responses, which a policy writes many of, tie with each other and compare alike with others: one is read."""
        asked, places, scores = [], [], []
        for comparison in comparisons:
            once = {response.tobytes(): response for response in comparison.responses}
            place = {text: i for i, text in enumerate(once)}
            asked.append(
                self.rewrite(dataclasses.replace(comparison, responses=[*once.values()], ranks=[]))
            )
            places.append([place[response.tobytes()] for response in comparison.responses])
        odds = super().score_encoded(asked, micro_tokens)  # [ordered pairs]
        for at, of_pairs in zip(places, odds.split([len(each.responses) for each in asked])):
            M = max(at, default=-1) + 1
            table = odds.new_zeros(M, M)
            table[~torch.eye(M, dtype=torch.bool)] = of_pairs
            scores.append(((table - table.T) / 2)[at][:, at].sum(1))  # [N]
        return torch.cat([odds[:0], *scores])


KINDS = {"naive": RewardModel, "critic": Critic, "generative": Judge}


def refuse_to_replace(folder: str) -> None:
    """Raises UserError where a trained reward model would give way to an untrained one."""
    with suppress(
        OSError, SafetensorError, ValueError, TypeError, KeyError
    ):  # none there, or a damaged one
        with safe_open(Path(folder, HEAD_FILE), "pt") as file:
            if json.loads(file.metadata()["reward_head"])["trained_with"]:
                raise UserError(
                    f"--out {folder}: has a trained reward model; give another --out, or remove it first"
                )


def main(settings: Settings) -> None:
    if dist.get_rank() > 0:
        return
    refuse_to_replace(settings.out)
    given = data.unless_default(settings, "data") or None  # '' shows no comparison
    if given and not Path(given, "dataset.json").is_file():
        raise UserError(f"--data {given}: no prepared data set there; run 01_data.py first")
    torch.manual_seed(settings.seed)
    model = RewardModel.from_backbone(settings.backbone, settings)
    model.save_pretrained(settings.out)
    parts, head = parts_of(model.backbone), "a new reward head" if model.head else "its own LM head"
    print(
        f"{settings.out}: {settings.backbone} ({model.backbone.config.model_type}), {model.kind}, with {head}"
    )
    if model.head and Path(settings.backbone, HEAD_FILE).is_file():
        print(
            f"The trained head there is not taken; 03_train.py --model {settings.backbone} continues with it"
        )
    print("\nparameters")
    modules = {
        "vision tower": parts.vision,
        "language model": parts.language,
        "reward head": model.head,
        "all": model,
    }
    for name, module in modules.items():
        if module is not None:
            print(f"  {name:<15}{sum(p.numel() for p in module.parameters()):>13,}")
    print(
        f"  head: {' -> '.join(map(str, model.head.mlp)) if model.head else 'log-odds of A and B'}"
    )
    if Path(settings.data, "dataset.json").is_file():
        comparisons = data.Comparisons(settings.data, model.processors.fingerprint)
        data.use_pixel_limits(model.processors, [comparisons])
        comparison = comparisons[0]
        row = pack([model.rewrite(comparison) if model.rewrite else comparison], model.processors)
        hidden = model.hidden_states(row)
        lengths = " and ".join(str(len(response)) for response in comparison.responses)
        print(
            f"\none comparison of {settings.data}: {len(comparison.images)} image(s), a prompt of",
            end=" ",
        )
        print(f"{len(comparison.prompt)} tokens, responses of {lengths}")
        shapes = {"input_ids": row.input_ids, "position_ids": row.position_ids}
        shapes |= {"pixel_values": row.images and row.images.pixel_values}
        shapes |= {"image grids": row.images and row.images.grid_thw}
        shapes |= {
            "hidden states": hidden,
            "at each response's end": hidden[row.last],
            "scores": model(row),
        }
        for name, tensor in shapes.items():  # a judge's scores are of ordered pairs
            print(f"  {name:<23}{'none (text only)' if tensor is None else list(tensor.shape)}")
    print()
    data.say_next("03_train.py", model=data.unless_default(settings, "out"), data=given)


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
