"""Stage 2: the reward model, a vision-language backbone with a 2-layer SiLU head.

    torchrun --standalone --nproc_per_node=2 02_model.py
    python 02_model.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --data ''   # '': shows no example

In    a backbone in the Hugging Face layout: Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL3, or for
      text alone Qwen2, Qwen2.5, Qwen3 or Llama (FAMILIES in 01_data.py)
Out   artifacts/model/: the backbone without its LM head, and reward_head.safetensors

One idea carries this project: a comparison, a prompt with N responses, is encoded ONCE, in one row:

    [prompt | response 1 | ... | response N]

Each response attends to the prompt and to itself, never to another response, and its positions
count on from the prompt's last. So it cannot know that it has siblings: its score, read at its own
last token (the <|im_end|> that closes the turn), is the score that a forward over
[prompt | response] alone would give, to 1e-5 in float32. With P tokens of prompt and R of response
that takes N (P + R) / (P + N R) times fewer tokens, 4.9 for P = 1000, R = 100, N = 8, and N times
fewer images. Comparisons follow one another in the same row, so nothing is ever padded.

The paper (arXiv 2509.16127) replaces the LM head by an MLP of 2 layers with SiLU between them; it
compares depths 1 to 5 and no activation, tanh and SiLU. It does not state the MLP's width (we use
the hidden size, as its predecessor MM-RLHF does), nor the token at which the score is read (we use
the last, as in the authors' public command for a text-only reward model).
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, einsum
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, vision_utils
from transformers.modeling_utils import AttentionInterface

data = importlib.import_module("01_data")  # `import 01_data` would be a syntax error
option = data.option
Comparison = data.Comparison
Processors = data.Processors
UserError = data.UserError
HEAD_FILE = "reward_head.safetensors"

# --------------------------------------------------------------------------------------------------
# The packed row: which token attends to which.

Lengths = list[tuple[int, list[int]]]  # for each comparison (P, [R_1, ..., R_N]), in tokens


def dense_mask(lengths: Lengths) -> Tensor:
    """Return the mask of a packed row, [T, T] bool: rows are queries, columns are keys.

    This is the specification, for reading and for tests. The attention below follows it without
    building it.

    Two comparisons, one with a prompt of 2 tokens and responses of 2 and 1, the other with a prompt
    of 1 and a response of 1:

    >>> dense_mask([(2, [2, 1]), (1, [1])]).int()
    tensor([[1, 0, 0, 0, 0, 0, 0],      prompt
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],      response 1 sees the prompt and itself
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],      response 2 sees the prompt and itself, not response 1
            [0, 0, 0, 0, 0, 1, 0],      the next comparison sees nothing of the first
            [0, 0, 0, 0, 0, 1, 1]])
    """
    comparison_ids, segment_ids = [], []  # of each token; segment 0 is the prompt
    for c, (P, Rs) in enumerate(lengths):
        for s, length in enumerate([P, *Rs]):
            comparison_ids += [c] * length
            segment_ids += [s] * length
    comparison, segment = torch.tensor(comparison_ids), torch.tensor(segment_ids)  # [T] each

    T = len(segment)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    same_comparison = comparison[:, None] == comparison
    same_segment = segment[:, None] == segment
    key_in_prompt = segment == 0  # [T], the same for every query
    return same_comparison & causal & (key_in_prompt | same_segment)


@dataclass
class PackedRow:
    """Comparisons one after the other: T tokens and N responses in all, no padding."""

    lengths: Lengths
    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [3, 1, T] time, height and width of M-RoPE; all the same for text
    last: Tensor  # [N] index of each response's last token, where its score is read
    segments: "Segments"  # the mask, in the form that the attention below needs
    images: "Images | None" = None

    def to(self, device: torch.device) -> "PackedRow":
        return change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedRow":
        return change_tensors(self, Tensor.pin_memory)  # so that copies to a GPU overlap

    def attend(self, layer, query, key, value, scale) -> Tensor:
        return self.segments.attend(query, key, value, scale)  # a KV cache (appendix) needs `layer`


# --------------------------------------------------------------------------------------------------
# The same attention without building the mask, most of whose T x T cells are empty.
#
# Each layer looks up its attention function by a name, `attn_implementation`. `load_backbone`
# (appendix) sets ours for the language model, and another one for the vision tower.
# - transformers passes arguments of `model(...)` that it does not know on to that function. That is
#   how `row` gets there.
# - It builds a T x T causal mask only for names that also have a mask function. Ours has none, so
#   `attention_mask` is None and the row alone decides.
# The calls: shared_prefix_attention -> row.attend -> Segments.attend -> one_by_one or varlen.
# `compiler.disable`: in a compiled graph, every new row's lengths would trigger a recompilation.


@torch.compiler.disable
def shared_prefix_attention(module, query, key, value, attention_mask, scaling, row, **options):
    """Attend over a packed row: [1, heads, T, d] -> [1, T, heads, d]."""
    # Other models ask for more: a sliding window, a cap on logits, attention sinks (s_aux).
    others = [options.get(name) for name in ("sliding_window", "softcap", "s_aux")]
    if options.get("dropout") or any(other is not None for other in others):
        raise ValueError("over a row: no dropout, no sliding window, no softcap, no sinks")
    if len(query) != 1:
        raise ValueError(f"input_ids has {len(query)} rows: pack all comparisons into one")
    # In a trainer that uses autocast, rotary embeddings leave query and key in float32.
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    output = row.attend(module.layer_idx, query, key, value, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def bounds(sizes: list[int]) -> Tensor:
    """Return where parts of these sizes begin, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


@dataclass
class Segments:
    """The segments of a row, prompts and responses, and the attention among them.

    A prompt of 2 tokens with responses of 2 and 1:

        segment      prompt_of   starts   attends to   key_starts
        0 prompt     None        0        0 1          0
        1 response   0           2        0 1 2 3      2
        2 response   0           4        0 1 4        6
    """

    sizes: list[int]  # tokens of each segment
    prompt_of: list[int | None]  # the segment of a response's prompt
    starts: Tensor  # [segments + 1] int32; the last one is the end, 5 above
    key_indices: Tensor  # [K] the column "attends to", row after row: 0 1 0 1 2 3 0 1 4
    key_starts: Tensor  # [segments + 1] int32; the end is K, 9 above
    longest_keys: int  # most keys of one segment, 4 above
    masks: dict[int, Tensor] = field(default_factory=dict)  # of responses, for `one_by_one`

    @classmethod
    def of_comparisons(cls, lengths: Lengths) -> "Segments":
        """Lay out a row's segments, once, in the loader; all layers use this."""
        sizes, prompt_of, keys = [], [], []
        start = 0
        for P, Rs in lengths:
            prompt = len(sizes)  # number of its segment
            for s, size in enumerate([P, *Rs]):
                own = np.arange(start, start + size)
                keys.append(np.concatenate([keys[prompt], own]) if s else own)
                prompt_of.append(prompt if s else None)
                sizes.append(size)
                start += size
        key_sizes = list(map(len, keys))
        indices = torch.from_numpy(np.concatenate(keys))
        longest = max(key_sizes)
        return cls(sizes, prompt_of, bounds(sizes), indices, bounds(key_sizes), longest)

    def attend(self, query, key, value, scale: float) -> Tensor:
        """Attend as `dense_mask` says.

        query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, heads, T, d]
        """
        if has_varlen(query):
            return self.varlen(query, key, value, scale)
        return self.one_by_one(query, key, value, scale)

    def one_by_one(self, query, key, value, scale):
        """On a CPU, or a GPU in float32: one call per segment, with keys [prompt | own]."""
        # `split`, not slices: the backward of a slice allocates zeros as large as the whole row.
        queries = query.split(self.sizes, dim=2)
        keys = key.split(self.sizes, dim=2)
        values = value.split(self.sizes, dim=2)
        options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        attention = partial(F.scaled_dot_product_attention, **options)
        outputs = []
        for s, prompt in enumerate(self.prompt_of):
            if prompt is None:
                outputs.append(attention(queries[s], keys[s], values[s], is_causal=True))
                continue
            if s not in self.masks:  # built in the first layer, for all layers
                P, R = self.sizes[prompt], self.sizes[s]
                ones = torch.ones(R, P + R, dtype=torch.bool, device=query.device)
                # Query i of the response sees keys 0 to P + i. For P = 2, R = 2:  1 1 1 0
                #                                                                  1 1 1 1
                self.masks[s] = ones.tril(P)
            k = torch.cat([keys[prompt], keys[s]], dim=2)  # [1, kv heads, P + R, d]
            v = torch.cat([values[prompt], values[s]], dim=2)
            outputs.append(attention(queries[s], k, v, attn_mask=self.masks[s]))
        return torch.cat(outputs, dim=2)

    def varlen(self, query, key, value, scale):
        """On a GPU: one call of flash attention over segments of different lengths.

        Each response's keys are a copy of its prompt's, then its own; queries are never copied. The
        window (-1, 0) allows any key to the left and none to the right. Where there are more keys
        than queries, flash attention aligns their ends: the same mask as in `one_by_one`.
        """
        q = query[0].transpose(0, 1)  # [T, heads, d]
        k = key[0].transpose(0, 1)[self.key_indices]  # [K, kv heads, d]
        v = value[0].transpose(0, 1)[self.key_indices]
        # PyTorch's varlen_attn cuts queries at `starts` and keys at `key_starts` (appendix)
        return call_varlen(self, q, k, v, scale=scale, window_size=(-1, 0))


def has_varlen(query: Tensor) -> bool:
    """Flash attention needs a GPU and half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------
# From comparisons to a row. This runs on the CPU, in the loader's processes.


def prompt_positions(prompt, token_grids, image_token) -> np.ndarray:
    """Return the M-RoPE position ids [3, P] of a prompt [P] (Qwen2-VL, arXiv 2409.12191).

    Rotary embeddings turn each pair of a head's channels by an angle that grows with the position,
    so the product of a query and a key depends on how far apart they are. M-RoPE gives some
    channels the time, some the row, some the column: attention can tell where in a picture a token
    is. Text counts up on all three axes; a picture is one instant. Two tokens of text, a picture of
    2 x 3 tokens, one token of text:

        time    0 1  2 2 2 2 2 2  5
        height  0 1  2 2 2 3 3 3  5
        width   0 1  2 3 4 2 3 4  5

    A picture at p uses rows p to p + h - 1 and columns p to p + w - 1. The next text starts at
    p + max(h, w), the first number that no axis has used: no text token has a place in the picture,
    and 20 x 30 tokens take up 30 positions, not 600.

    `token_grids` [images, 3]: time, height and width of each image in tokens, not in patches.
    """
    sizes = [t * h * w for t, h, w in token_grids]
    if sizes and sum(sizes) != np.sum(prompt == image_token):
        raise ValueError("grids: not the prompt's image tokens; count in tokens, not in patches")
    parts = []
    start, position = 0, 0  # next index into the prompt; next free position
    for grid, size in zip(token_grids, sizes):
        text = int(np.argmax(prompt[start:] == image_token))  # tokens before the image
        parts.append(count_up(position, text))
        position += text
        parts.append(position + np.indices(grid).reshape(3, -1))  # time, row, column of each token
        position += max(grid[1:])
        start += text + size
    parts.append(count_up(position, len(prompt) - start))
    return np.concatenate(parts, axis=1)


def count_up(start: int, length: int) -> np.ndarray:
    """Return the positions of text, [3, length]."""
    return np.tile(np.arange(start, start + length), (3, 1))


def pack_tokens(prompts: list, responses: list, positions: list = ()) -> PackedRow:
    """Pack token ids into one row: prompts [P], and for each of them a list of responses [R].

    `positions` are the prompts' position ids [3, P]; without them they count up.
    """
    positions = positions or [count_up(0, len(prompt)) for prompt in prompts]
    lengths, ids, position_ids, last = [], [], [], []
    T = 0
    for prompt, answers, prompt_position in zip(prompts, responses, positions, strict=True):
        lengths.append((len(prompt), [len(answer) for answer in answers]))
        ids += [prompt, *answers]
        position_ids.append(prompt_position)
        T += len(prompt)
        for answer in answers:  # each counts on from the prompt's last position, on any axis
            position_ids.append(count_up(prompt_position.max() + 1, len(answer)))
            T += len(answer)
            last.append(T - 1)
    ids = torch.from_numpy(np.concatenate(ids)).long()  # [T]
    position_ids = torch.from_numpy(np.concatenate(position_ids, axis=1)).long()  # [3, T]
    last = torch.tensor(last, dtype=torch.long)
    segments = Segments.of_comparisons(lengths)
    return PackedRow(lengths, ids[None], position_ids[:, None], last, segments)


def pack(comparisons: list, processors: Processors, dummy_image: bool = False) -> PackedRow:
    """Pack comparisons into one row and decode their images.

    `dummy_image` appends a blank image without responses, for training: all ranks must enter a
    sharded vision tower together, forward and backward (03, `plan`). No score depends on the image,
    so the gradients that flow back through it are zero.
    """
    if dummy_image:
        comparisons = [*comparisons, blank_comparison(processors)]
    prompts = [comparison.prompt for comparison in comparisons]
    responses = [comparison.responses for comparison in comparisons]
    positions = None
    if processors.family.mrope:
        patches_per_token = [1, processors.vision.merge, processors.vision.merge]
        positions = []
        for comparison in comparisons:
            grids = comparison.grids // patches_per_token
            positions.append(prompt_positions(comparison.prompt, grids, processors.image_token))
    row = pack_tokens(prompts, responses, positions)
    # A patch: 3 channels x 2 frames (a picture is repeated) x 14 x 14 pixels. Layout: appendix
    row.images = pack_images_of(comparisons, processors)
    return row


# --------------------------------------------------------------------------------------------------
# From a row to scores.


def run_backbone(backbone: nn.Module, row: PackedRow, cache=None) -> Tensor:
    """Run a transformers model, with or without LM head: last hidden states [T, hidden]."""
    check_attention(backbone)  # another attention would ignore `row` silently
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids}
    inputs |= {"use_cache": cache is not None, "past_key_values": cache}
    if not data.FAMILIES[backbone.config.model_type].mrope:
        inputs["position_ids"] = row.position_ids[0]
    if row.images is not None:
        # transformers runs the vision tower and puts its vectors in place of the image tokens'.
        inputs |= row.images.arguments()
    without_lm_head = getattr(backbone, "model", backbone)
    return without_lm_head(**inputs, row=row).last_hidden_state[0]


ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


class RewardHead(nn.Module):
    """An MLP from hidden states [N, hidden] to scores [N].

    The last layer has no bias. A bias would cancel in every difference of scores, so its gradient
    is pure rounding noise, which AdamW would turn into full-size steps. The head computes in
    float32 even if the backbone computes in bfloat16, whose spacing near 4 is 0.03.
    """

    def __init__(self, hidden: int, layers: int = 2, activation: str = "silu", width: int = 0):
        super().__init__()
        if not 1 <= layers <= 5:
            raise UserError(f"--head_layers {layers}: must be 1 to 5")
        width = width or hidden
        self.settings = dict(hidden=hidden, layers=layers, activation=activation, width=width)
        sizes = [hidden] + [width] * (layers - 1)
        modules = []
        for inputs, outputs in itertools.pairwise(sizes):
            modules += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
        last = nn.Linear(sizes[-1], 1, bias=False)
        std = 1 / math.sqrt(sizes[-1] + 1)  # as arXiv 2009.01325
        nn.init.normal_(last.weight, std=std)
        self.mlp = nn.Sequential(*modules, last)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.mlp(hidden.to(self.mlp[0].weight.dtype))  # [N, 1]
        if scores.dtype != torch.float32:
            raise UserError("the reward head must stay float32 (use `place`), outside autocast")
        return scores.sum(-1)  # [N]; not `squeeze`: FSDP warns about outputs that are views


class RewardModel(nn.Module):
    """A backbone and a reward head: `model(row)` gives one score for each response of a PackedRow.

    reward = RewardModel.from_pretrained("artifacts/reward")
    reward.score(messages, ["A red circle.", "A blue square."])      # -> tensor of 2 scores
    """

    # For 03, which trains all three kinds; critics and judges (appendix) override these.
    kind = "naive"
    keeps_lm_head = False
    pack = staticmethod(pack)  # what 03's loader calls
    rewrite = None  # else a function that changes each comparison before it is packed

    def __init__(self, backbone, head, processors: Processors, trained_with: dict | None = None):
        super().__init__()
        self.backbone, self.head, self.processors = backbone, head, processors
        self.trained_with = trained_with or {}  # {"data": [...], "steps": ...}; {} for a new head
        self.cost = Counter()  # of all scoring: tokens read, tokens written, image patches

    def hidden_states(self, row: PackedRow) -> Tensor:
        return run_backbone(self.backbone, row)  # [T, hidden]

    def forward(self, row: PackedRow) -> Tensor:
        return self.head(self.hidden_states(row)[row.last])  # [T, hidden] -> [N, hidden] -> [N]

    def score(self, messages, responses: list[str], images=()) -> Tensor:
        """Score N responses to one prompt: [N] float32 on the CPU.

        `messages` are the prompt's turns; an image is {"type": "image", "image": path, bytes or PIL
        image}, or {"type": "image"} with the pictures in order in `images`. Raises ValueError.
        """
        data.require(not isinstance(responses, str), "responses: a text, not a list of texts")
        texts = [data.text_of(text, f"responses[{i}]") for i, text in enumerate(responses)]
        return self.score_encoded([self.encode(messages, texts, images)]).cpu()

    def encode(self, messages, texts, images=(), folder=Path()) -> Comparison:
        """Encode a prompt and its responses for `score_encoded`; image paths start at `folder`."""
        prompt, files, grids = data.encode_prompt(messages, images, self.processors, folder)
        responses = [data.encode_response(text, self.processors) for text in texts]
        ranks = [1] * len(responses)
        return Comparison(prompt, responses, ranks, files, grids)

    @torch.inference_mode()
    def score_encoded(self, comparisons: list, micro_tokens=8192) -> Tensor:
        """Score all responses, [N] float32, in forwards of at most `micro_tokens` tokens."""
        scores = [torch.zeros(0, device=self.device)]
        for part in split_into_rows(comparisons, micro_tokens):
            scores.append(self(self.row_of(part)))
        return torch.cat(scores)

    def row_of(self, comparisons: list) -> PackedRow:
        """Pack a row for scoring and count what it costs."""
        row = pack(comparisons, self.processors)
        patches = sum(comparison.patches for comparison in comparisons)
        self.cost.update(read=row.input_ids.shape[1], patches=patches)
        return row.to(self.device)

    def model_for(self, has_image: bool) -> "RewardModel":
        return self  # a router (appendix) has two

    @property
    def fingerprint(self) -> str:
        return self.processors.fingerprint  # of the tokenizer: shards of another one are refused

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # Loading and saving: the backbone's checkpoint, and the head in a file of its own.

    @classmethod
    def from_backbone(cls, path: str, settings: "HeadSettings", max_pixels: int = 0):
        """Put a new head on a Hugging Face checkpoint."""
        if settings.kind != cls.kind:
            return KINDS[settings.kind].from_backbone(path, settings, max_pixels)
        backbone = load_backbone(path)
        return cls(backbone, new_head(backbone, settings), data.load_processors(path, max_pixels))

    @classmethod
    def from_pretrained(cls, folder: str, empty: bool = False):
        """Load a model that `save_pretrained` wrote; `empty` leaves weights on the meta device."""
        kind, head, description = load_head(folder)  # appendix, like load_backbone
        backbone = load_backbone(folder, kind.keeps_lm_head, empty)
        return kind(backbone, head, data.load_processors(folder), **description)

    def save_pretrained(self, folder, dtype=torch.float32, file_size="5GB", **description) -> None:
        """Write the backbone in `dtype`, the head in float32. All ranks call this if sharded."""
        description |= {"kind": self.kind, "trained_with": self.trained_with}
        description["head"] = self.head.settings if self.head else None
        weights = full_weights(self.head) if self.head else {}
        head_file = save(weights, {"reward_head": json.dumps(description)})
        export(self.backbone, self.processors, folder, dtype, file_size, head_file)  # appendix


# --------------------------------------------------------------------------------------------------
# Appendix: plumbing of the row


def change_tensors(value, change: Callable):
    """Apply `change` to all tensors of a dataclass, and of the dataclasses and dicts in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: change_tensors(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return replace(value, **change_tensors(vars(value), change))
    return value


def new_head(backbone: nn.Module, settings: "HeadSettings") -> RewardHead:
    hidden = backbone.config.get_text_config().hidden_size
    return RewardHead(hidden, settings.head_layers, settings.head_activation, settings.head_width)


def call_varlen(segments: Segments, q, k, v, **options) -> Tensor:
    """Call PyTorch's flash attention for segments of different lengths."""
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    options["num_splits"] = 1  # a segment's bits then do not depend on the rest of the row
    ends = segments.starts, segments.key_starts
    longest = max(segments.sizes), segments.longest_keys
    out = varlen_attn(q, k, v, *ends, *longest, **options)
    return out.transpose(0, 1)[None]  # [1, heads, T, d]


# --------------------------------------------------------------------------------------------------
# Appendix: images, and where a family keeps its parts


class ImageSegments(Segments):
    """Images, or windows of images: each patch attends to all patches of its segment."""

    def varlen(self, query, key, value, scale):
        q = query[0].transpose(0, 1)  # [patches, heads, d]
        k = key[0].transpose(0, 1)
        v = value[0].transpose(0, 1)
        return call_varlen(self, q, k, v, scale=scale)

    def one_by_one(self, query, key, value, scale):
        """On a CPU, neighbours of equal length are one batch."""
        runs = [list(run) for _, run in itertools.groupby(self.sizes)]
        sizes = list(map(sum, runs))
        queries = query[0].split(sizes, dim=1)
        keys = key[0].split(sizes, dim=1)
        values = value[0].split(sizes, dim=1)
        outputs = []
        for run, q, k, v in zip(runs, queries, keys, values):
            shape = (len(run), run[0])
            q = q.unflatten(1, shape).transpose(0, 1)  # [windows, heads, length, d]
            k = k.unflatten(1, shape).transpose(0, 1)
            v = v.unflatten(1, shape).transpose(0, 1)
            output = F.scaled_dot_product_attention(q, k, v, scale=scale)
            outputs.append(output.transpose(0, 1).flatten(1, 2))  # [heads, windows * length, d]
        return torch.cat(outputs, dim=1)[None]


def image_segments(sizes: list[int]) -> ImageSegments:
    starts = bounds(sizes)
    return ImageSegments(sizes, [], starts, None, starts, max(sizes))


@dataclass
class Images:
    """The images of a row, patch after patch. InternVL's tiles of one size need no layout."""

    pixel_values: Tensor  # [patches, 3 * 2 * 14 * 14]; for tiles [tiles, 3, 448, 448]
    grids: np.ndarray  # [images, 3] in patches
    layout: dict[str, Tensor] = field(default_factory=dict)  # arguments of `forward`
    whole: ImageSegments | None = None  # the images
    windows: ImageSegments | None = None  # Qwen2.5-VL attends within windows in most layers

    def arguments(self) -> dict:
        """Return the arguments for `forward` of a transformers model."""
        arguments = {"pixel_values": self.pixel_values, **self.layout}
        if self.whole is not None:
            # Tell the tower that all patches are one segment: it then calls attention once a layer,
            # and `image_attention` looks up the segments. Given their lengths, the tower would read
            # these back from the GPU in every layer.
            patches = sum(self.whole.sizes)
            everything = torch.tensor([0, patches], dtype=torch.int32)
            arguments |= {"image_cu_seqlens": everything, "image_cu_window_seqlens": everything}
            arguments |= {"image_grid_thw": torch.from_numpy(self.grids), "images": self}
        return arguments


def pack_images_of(comparisons: list, processors: Processors) -> Images | None:
    """Decode the images of comparisons."""
    files = [data.open_images(comparison, processors) for comparison in comparisons]
    images = list(itertools.chain(*files))
    if not images:
        return None
    grids = np.concatenate([comparison.grids for comparison in comparisons])
    grids = grids.astype(np.int64)
    expected = [data.patch_grid(image.size, processors) for image in images]
    if not np.array_equal(grids, expected):
        raise UserError(
            "the images' patch grids differ from the prepared ones: this model has other pixel "
            "limits; run 01_data.py again with it as --backbone"
        )
    pixels = processors.image_processor(images, return_tensors="pt")["pixel_values"]
    if processors.family.tiles:
        return Images(pixels, grids)
    return pack_images(pixels, grids, processors.vision)


def pack_images(pixel_values: Tensor, grids, shape: "data.VisionShape") -> Images:
    """Lay out the patches of images for a Qwen vision tower."""
    grids = torch.as_tensor(grids)
    merged = shape.merge**2  # patches
    sizes = grids.prod(1)
    layout = {"image_position_ids": vision_utils.get_vision_position_ids(grids, shape.merge)}
    images = Images(pixel_values, grids.numpy(), layout, image_segments(sizes.tolist()))
    if shape.window:
        sides = (shape.merge, shape.window, shape.patch)
        order, ends = vision_utils.get_vision_window_index(grids, *sides)
        lengths = ends.diff() // merged
        windows = order.split(lengths.tolist())
        # An image's windows stay together, large ones first: then neighbours have equal lengths.
        image_of = np.repeat(np.arange(len(grids)), sizes // merged)  # [merged patches]
        windows = sorted(windows, key=lambda window: (image_of[window[0]], -len(window)))
        layout["image_window_index"] = torch.cat(windows)  # [merged patches]
        images.windows = image_segments([len(window) * merged for window in windows])
    if shape.table:  # Qwen3-VL: a patch mixes its 4 neighbours in a table of learned positions
        options = {"align_corners": True, "spatial_merge_size": shape.merge}
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, shape.table, **options
        )
        layout["image_interp_indices"] = indices  # [patches, 4]
        layout["image_interp_weights"] = weights
    return images


@torch.compiler.disable
def image_attention(module, query, key, value, attention_mask, scaling, images=None, **options):
    """Attend within images or windows: [1, heads, patches, d] -> [1, patches, heads, d]."""
    segments = images.whole if module.attends_to_whole_images else images.windows
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    output = segments.attend(query, key, value, scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("packed_images", image_attention)


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is one whole patch: a matrix product is several times faster."""

    def forward(self, patches: Tensor) -> Tensor:  # [patches, channels, time, height, width]
        kernel = self.weight.flatten(1)
        return F.linear(patches.flatten(1), kernel, self.bias)  # [patches, hidden]


def prepare_vision(backbone: nn.Module) -> None:
    """Make a Qwen vision tower fast; weights and their names stay."""
    parts = parts_of(backbone)
    if parts.vision is None or data.FAMILIES[backbone.config.model_type].tiles:
        return
    parts.vision.patch_embed.proj.__class__ = PatchProjection
    whole = getattr(parts.vision.config, "fullatt_block_indexes", range(len(parts.blocks)))
    for i, block in enumerate(parts.blocks):
        block.attn.attends_to_whole_images = i in whole


def blank_comparison(processors: Processors, height: int = 1, width: int = 1) -> Comparison:
    """Return a prompt of a black image, its sides in image tokens."""
    shape = processors.vision
    side = shape.patch * shape.merge  # pixels of an image token
    image = Image.new("RGB", (side * width, side * height))
    grids = np.array([data.patch_grid(image.size, processors)], np.int32)
    tokens = grids.prod() // shape.merge**2
    prompt = np.full(tokens, processors.image_token, np.int32)
    files = [data.read_image(image, Path())]
    return Comparison(prompt, [], [], files, grids)


Parts = namedtuple("Parts", "language, vision, blocks")


def parts_of(backbone: nn.Module) -> Parts:
    """Find the language model (with `layers`), the vision tower or None, and the tower's layers."""
    family = data.FAMILIES[backbone.config.model_type]
    base = getattr(backbone, "model", backbone)
    if not family.vision:
        return Parts(base, None, [])
    vision = base.get_submodule(family.vision)
    blocks = list(vision.get_submodule(family.blocks))
    return Parts(base.get_submodule(family.language), vision, blocks)


def attention_of(config: transformers.PreTrainedConfig) -> str | dict[str, str]:
    """Return `attn_implementation` for a backbone; tiles of one size need nothing of ours."""
    family = data.FAMILIES[config.model_type]
    if not family.vision:
        return "shared_prefix"
    vision = "sdpa" if family.tiles else "packed_images"
    return {"text_config": "shared_prefix", "vision_config": vision}


def check_attention(backbone: nn.Module) -> None:
    """Refuse a backbone whose attention was replaced, by `set_attn_implementation` or by another
    model made from the same config: responses would see each other."""
    parts = parts_of(backbone)
    used = parts.language.config._attn_implementation
    if parts.vision is not None:
        vision = parts.vision.config._attn_implementation
        used = {"text_config": used, "vision_config": vision}
    if used != attention_of(backbone.config):
        raise UserError(f"attention {used} cannot read a packed row; load it with `load_backbone`")


# --------------------------------------------------------------------------------------------------
# Appendix: loading, export, devices, rows of a limited size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of an export


def load_head(folder: str) -> tuple[type, RewardHead | None, dict]:
    """Read a head file: the class of its model, the head, and how it was made."""
    path = Path(folder, HEAD_FILE)
    if not path.is_file():
        raise UserError(f"{folder}: no reward model there; run 02_model.py or 03_train.py first")
    with data.reading(path, "run 02 or 03 again"), safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["reward_head"])
        kind = KINDS[description.pop("kind")]
        head = None
        if settings := description.pop("head"):
            with torch.device("meta"):  # takes neither memory nor random numbers
                head = RewardHead(**settings)
            # A tensor inside a memory-mapped file is aligned differently, which can select another
            # CPU kernel and change the last bits of a score: copy it.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}
            head.load_state_dict(weights, assign=True)
    return kind, head, description


def load_backbone(path: str, lm_head: bool = False, empty: bool = False) -> nn.Module:
    """Load a Hugging Face checkpoint in float32, with our attention and by default no LM head.

    An `empty` one is on the meta device, shapes without weights: 03 shards it before filling it.
    """
    transformers.utils.logging.disable_progress_bar()
    with data.explaining(f"{path}: no model in the Hugging Face layout", (OSError, ValueError)):
        config = AutoConfig.from_pretrained(path)
    family = data.family_of(config, path)
    auto = AutoModel
    if lm_head and family.vision:
        auto = transformers.AutoModelForImageTextToText
    elif lm_head:
        auto = transformers.AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": attention_of(config)}
    if empty:
        with torch.device("meta"):
            backbone = auto.from_config(config, **options).eval()
        with suppress(OSError):  # for an LM; a checkpoint need not have it
            backbone.generation_config = transformers.GenerationConfig.from_pretrained(path)
    else:
        options |= {"use_safetensors": True, "output_loading_info": True}
        with data.reading(path, "the checkpoint must be complete"):
            backbone, report = auto.from_pretrained(path, **options)
            if report["missing_keys"]:  # transformers would initialise them at random
                raise data.Unusable(f"{min(report['missing_keys'])} is missing")
    prepare_vision(backbone)  # appendix
    return backbone


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather one full copy of the weights in main memory, on rank 0; other ranks get {}."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def export(model, processors, folder, dtype=torch.float32, file_size="5GB", head_file=b"") -> None:
    """Write a transformers model and its processors as `from_pretrained` reads them.

    If the model is sharded, all ranks call this, and rank 0 gathers one full copy in main memory:
    31 GB for a 7B in float32. `file_size` is the most that one file takes.

    Files are written into a temporary folder, then moved. Those that mark a model complete are
    deleted first and written last, so a crash cannot leave a mixture of two models.
    """
    weights = full_weights(model)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    for name in model.all_tied_weights_keys:  # gathered copies no longer look tied
        weights.pop(name, None)
    for name, weight in weights.items():
        weights[name] = weight.to(dtype)
    out = Path(folder)
    temporary = out / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights, max_shard_size=file_size)
    model.config.dtype = dtype
    model.config.save_pretrained(temporary)
    for file in temporary.glob("*.safetensors"):  # safetensors lets only their owner read them
        shutil.copymode(temporary / "config.json", file)
    processors.save(str(temporary))
    if head_file:
        data.write_file(temporary / HEAD_FILE, head_file)

    last = ["model.safetensors", "model.safetensors.index.json", HEAD_FILE]
    for name in reversed(last):
        (out / name).unlink(missing_ok=True)
    for file in out.glob("model-*.safetensors"):
        file.unlink()
    others = [name for name in os.listdir(temporary) if name not in last]
    for name in others + last:
        if (temporary / name).exists():
            os.replace(temporary / name, out / name)
    temporary.rmdir()


def place(model: nn.Module, device, dtype=None) -> nn.Module:
    """Ready a model for inference on a device, in place, and return it.

    `dtype` is by default bfloat16 on a GPU, else float32. As in training only parameters change: a
    reward head stays float32, and so do rotary frequencies, which `model.to(dtype)` would round
    (an error of radians at position 1000).
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):  # all but a reward head
            for parameter in module.parameters():
                parameter.data = parameter.to(dtype)
    return model.to(device)


def split_into_rows(comparisons: list, micro_tokens: int) -> Iterator[list]:
    """Deal comparisons in order into rows of at most `micro_tokens`; 4 image patches count as one.

    A longer comparison is cut between responses and its prompt repeated; a response is never cut.
    """
    row, size = [], 0
    for comparison in comparisons:
        prompt_size = len(comparison.prompt) + comparison.patches // 4
        part = None
        for response in comparison.responses:
            needed = len(response)
            if part is None:
                needed = prompt_size + sum(map(len, comparison.responses))
            if row and size + needed > micro_tokens:
                yield row
                row, size, part = [], 0, None
            if part is None:
                part = replace(comparison, responses=[])
                row.append(part)
                size += prompt_size
            part.responses.append(response)
            size += len(response)
    if row:
        yield row


# --------------------------------------------------------------------------------------------------
# Appendix: sampling text, for the critic below and the policy of 06. A prompt is read once; its
# keys and values (the KV cache) serve all its samples.


def response_tokens(row: PackedRow) -> tuple[Tensor, Tensor]:
    """Return the indices of all response tokens and of the tokens that predict them, [tokens] each.
    A response's first token is predicted by its prompt's last."""
    targets, predictors = [], []
    end = 0
    for P, Rs in row.lengths:
        end += P
        prompt_last = end - 1
        for R in Rs:
            targets += range(end, end + R)
            predictors += [prompt_last, *range(end, end + R - 1)]
            end += R
    device = row.input_ids.device
    targets = torch.tensor(targets, dtype=torch.long, device=device)
    predictors = torch.tensor(predictors, dtype=torch.long, device=device)
    return targets, predictors


LOGITS_AT_ONCE = 2**27  # 0.5 GB in float32: those of 883 tokens over Qwen's vocabulary


def log_p_and_entropy(logits: Callable, hidden: Tensor, tokens: Tensor, vocabulary: int):
    """Return log-probability and entropy [n] of tokens [n] from the hidden states [n, hidden] that
    predict them, and from which `logits` computes [n, vocabulary]. It does so LOGITS_AT_ONCE at a
    time, and again in backward, which saves memory."""

    def of_part(hidden, tokens):
        log_p = logits(hidden).log_softmax(-1)  # [tokens, vocabulary]
        with torch.no_grad():
            finite = log_p.clamp(min=-1e9)  # 0 * -inf would be nan
            entropy = -(log_p.exp() * finite).sum(-1)
        # A squeezed view would trip FSDP's backward hooks.
        return log_p.gather(-1, tokens[:, None]).sum(-1), entropy

    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(tokens) <= size:
        return of_part(hidden, tokens)
    outputs = []
    for part in zip(hidden.split(size), tokens.split(size)):
        outputs.append(checkpoint(of_part, *part, use_reentrant=False))
    return tuple(map(torch.cat, zip(*outputs)))


class Writer(nn.Module):
    """A transformers model with its LM head, `lm`, that samples at a temperature."""

    def __init__(self, lm: nn.Module, processors: Processors, temperature=1.0):
        super().__init__()
        self.lm = lm
        self.processors = processors
        self.temperature = temperature
        # Not special tokens: a policy that writes <|image_pad|> crashes some hundred steps later.
        size = lm.config.get_text_config().vocab_size
        special = set(processors.tokenizer.get_added_vocab().values())
        special.update(range(len(processors.tokenizer), size))  # ids without a token
        special.discard(processors.end_token)
        forbidden = torch.tensor(sorted(token for token in special if token < size))
        self.register_buffer("forbidden", forbidden, persistent=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> float32 [n, vocabulary] at the temperature, forbidden tokens at -inf."""
        logits = self.lm.lm_head(hidden).float() / self.temperature
        return logits.index_fill(-1, self.forbidden, -math.inf)


class DecodeRow:
    """A row of one new token for each sample. Ended samples stay in it, and nobody reads them.

    Axes: p texts to continue, g samples of each, k key heads, s query heads that share one,
    l tokens of the longest text, t sampled tokens, d head width.
    """

    images = None

    def __init__(self, cache: transformers.Cache, texts: list, group: int, max_new_tokens: int):
        """`cache` is that of a packed row. `texts` has, for each text to continue, the indices in
        the row of the tokens that its new tokens attend to, [l] each."""
        lengths = [len(indices) for indices in texts]
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # pl
        self.padding = padding[:, None, None, None].to(texts[0].device)
        self.texts, self.samples = {}, {}
        for layer, cached in enumerate(cache.layers):
            packed = torch.cat([cached.keys, cached.values]).transpose(1, 2)  # [2, T, k, d]
            parts = [packed[:, indices].transpose(0, 1) for indices in texts]  # [l, 2, k, d]
            padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)  # [p, l, 2, k, d]
            padded = padded.permute(2, 0, 3, 1, 4)  # [2, p, k, l, d]
            self.texts[layer] = padded.contiguous()
            _, _, K, D = packed.shape
            shape = (2, len(texts), group, K, max_new_tokens, D)
            self.samples[layer] = packed.new_empty(shape)

    def advance(self, tokens, positions, t: int) -> None:
        """Hold the t-th tokens of all samples, at `positions`, [p * g] each."""
        self.t = t
        self.input_ids = tokens[None]
        self.position_ids = positions.expand(3, 1, -1)

    def attend(self, layer, query, key, value, scale):
        text_k, text_v = self.texts[layer]  # pkld
        own_k, own_v = self.samples[layer][..., : self.t + 1, :]  # pgktd
        P, G, K, T, D = own_k.shape
        new_key = key.transpose(1, 2).view(P, G, K, D)
        new_value = value.transpose(1, 2).view(P, G, K, D)
        own_k[..., self.t, :] = new_key
        own_v[..., self.t, :] = new_value
        q = query.transpose(1, 2).reshape(P, G, K, -1, D)  # pgksd
        q = q * scale
        to_text = einsum("pgksd,pkld->pgksl", q, text_k)
        to_text = to_text.masked_fill(self.padding, -math.inf)
        to_own = einsum("pgksd,pgktd->pgkst", q, own_k)
        weights = torch.cat([to_text, to_own], dim=-1).softmax(-1)
        on_text, on_own = weights.split([text_k.shape[2], T], dim=-1)
        out = einsum("pgksl,pkld->pgksd", on_text, text_v)
        out = out + einsum("pgkst,pgktd->pgksd", on_own, own_v)
        return out.reshape(1, P * G, -1, D).transpose(1, 2)  # [1, heads, p * g, d]


@torch.inference_mode()
def write(writer: Writer, row: PackedRow, group, max_new_tokens, noise=None):
    """Sample `group` continuations of each response of a row, or of the prompt if it has none.

    Returns token ids [texts, group, max_new_tokens], -1 after the end-of-turn token, and the
    tokens' log-probabilities, 0 after it. `noise`, of that shape and uniform in [0, 1), picks each
    token by inverting the cumulative distribution, so a sample does not depend on what else is in
    the batch; None is greedy decoding.
    """
    cache = transformers.DynamicCache()  # each layer's keys and values
    hidden = run_backbone(writer.lm, row, cache)  # [T, hidden]
    key_sizes = row.segments.key_starts.diff().tolist()
    texts = []  # what is continued: responses, and prompts without responses
    for i, indices in enumerate(row.segments.key_indices.split(key_sizes)):
        if i not in row.segments.prompt_of:
            texts.append(indices)
    last = torch.stack([indices[-1] for indices in texts])
    last = last.repeat_interleave(group)  # [samples]
    start = row.position_ids[0, 0, last] + 1  # position of the first new token
    decode = DecodeRow(cache, texts, group, max_new_tokens)
    hidden = hidden[last]  # [samples, hidden]
    tokens = last.new_full((len(last), max_new_tokens), -1)
    log_p = torch.zeros(tokens.shape, device=tokens.device)
    if noise is not None:
        noise = torch.from_numpy(noise).to(tokens.device).view_as(tokens)
    ended = torch.zeros_like(last, dtype=torch.bool)
    for t in range(max_new_tokens):
        logits = writer.logits(hidden)  # [samples, vocabulary]
        probabilities = logits.double().softmax(-1)
        if noise is None:
            chosen = logits.argmax(-1)
        else:
            cumulative = probabilities.cumsum(-1)
            threshold = noise[:, t, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        tokens[:, t] = chosen.masked_fill(ended, -1)
        probability = probabilities.gather(-1, chosen[:, None])[:, 0]
        log_p[:, t] = probability.log().masked_fill(ended, 0)
        ended |= chosen == writer.processors.end_token
        if ended.all() or t + 1 == max_new_tokens:
            break
        decode.advance(chosen, start + t, t)
        hidden = run_backbone(writer.lm, decode)
    shape = (len(texts), group, max_new_tokens)
    return tokens.view(shape), log_p.view(shape)


def token_ids_of(tokens: Tensor, processors: Processors) -> list[list[int]]:
    """List the token ids of samples [samples, max_new_tokens] without end-of-turn tokens."""
    samples = []
    for sample in tokens.cpu():
        is_text = (sample >= 0) & (sample != processors.end_token)
        samples.append(sample[is_text].tolist())
    return samples


def texts_of(tokens: Tensor, processors: Processors) -> list[str]:
    """Decode samples [samples, max_new_tokens] without their end-of-turn tokens."""
    return [processors.tokenizer.decode(ids) for ids in token_ids_of(tokens, processors)]


# --------------------------------------------------------------------------------------------------
# Appendix: critics and judges, the two kinds of reward model that the paper compares with.
# - A critic writes a critique of each response, and the head scores the critique's end:
#   [prompt | response 1, request, critique 1 | response 2, request, critique 2 | ...]
# - A judge (kind "generative") reads two responses and answers A or B. Ordered pairs take the place
#   of responses: [prompt | A: 1, B: 2, request, letter | A: 2, B: 1, request, letter | ...]
#   One token is the cheapest such judge. With --rationale it first writes a critique of each, and
#   behind the letter it ends its turn: 06 can sample such answers and train it further.

REQUESTS = {"critic": "Is it right? Explain.", "generative": "Which is better, A or B?"}
VERDICT = "\nAnswer:\n"  # between a judge's rationale and its letter


@dataclass
class Rewrite(Comparison):
    """A comparison whose responses end in a request and in the text that the model has to write."""

    learned: list[np.ndarray] = field(default_factory=list)  # [R] per response: the loss weight of
    # each token, 0 for tokens to read; they sum to the comparison's weight
    judged: list[tuple[int, int]] = field(default_factory=list)  # a judge's (better, worse)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return self.judged or data.ordered_pairs(self.ranks)


@dataclass
class WrittenRow(PackedRow):
    """A row in which the model has to write some tokens, [tokens] each."""

    predictors: Tensor | None = None  # index of the token that predicts it
    tokens: Tensor | None = None  # token id
    weight: Tensor | None = None  # in the loss


def pack_written(comparisons: list, processors: Processors, dummy_image=False) -> WrittenRow:
    """Pack rewritten comparisons."""
    row = pack(comparisons, processors, dummy_image)
    weights = [np.zeros(0)]
    for comparison in comparisons:
        weights += getattr(comparison, "learned", [])
    weight = torch.tensor(np.concatenate(weights), dtype=torch.float32)  # [response tokens]
    targets, predictors = response_tokens(row)
    learned = weight > 0
    tokens = row.input_ids[0, targets[learned]]
    return WrittenRow(
        **vars(row), predictors=predictors[learned], tokens=tokens, weight=weight[learned]
    )


def turn_after_answer(request: str, processors: Processors):
    """Return the token ids between the end of an answer and the next one, as the chat template
    renders the user's turn `request`."""
    turns = [("user", "?"), ("assistant", "!"), ("user", request)]
    messages = [{"role": role, "content": text} for role, text in turns]
    question = data.tokenize_chat(messages[:1], processors.tokenizer)
    tokens = data.tokenize_chat(messages, processors.tokenizer)[len(question) :]
    if processors.end_token not in tokens:
        raise UserError("the chat template has no end-of-turn token for a request to follow")
    end = np.flatnonzero(tokens == processors.end_token)[0]
    return tokens[end + 1 :]


def with_critiques(comparison: Comparison, critiques: list, request) -> Rewrite:
    """Append the request and a critique, token ids that end in <|im_end|>, to each response."""
    responses, learned = [], []
    total = sum(map(len, critiques))
    for response, critique in zip(comparison.responses, critiques):
        responses.append(np.concatenate([response, request, critique]))
        weight = np.zeros(len(responses[-1]))
        weight[-len(critique) :] = comparison.weight / total
        learned.append(weight)
    fields = vars(comparison) | {"responses": responses, "learned": learned}
    return Rewrite(**fields)


def with_data_critiques(comparison: Comparison, request, processors: Processors) -> Rewrite:
    """Append the critiques of the data; without critiques no response is left."""
    texts = comparison.record.get("critiques") or []
    critiques = [data.encode_response(text, processors) for text in texts]
    return with_critiques(comparison, critiques, request)


def in_ordered_pairs(
    comparison: Comparison, request, processors: Processors, rationales: list[str] | None = None
) -> Rewrite:
    """Show a judge all ordered pairs of responses, each with the letter of the better one.

    With `rationales`, one a pair, the model has to write rationale, letter and end of turn. The
    letter has half of the loss, and the other tokens share the rest.
    """
    encode = partial(data.tokenize_text, tokenizer=processors.tokenizer)
    ranks = comparison.ranks or [1] * len(comparison.responses)
    pairs = list(itertools.permutations(range(len(ranks)), 2))  # (response A, response B)
    if comparison.ranks:  # a tie teaches nothing
        pairs = [(i, j) for i, j in pairs if ranks[i] != ranks[j]]
    responses, learned, judged = [], [], []
    for k, (i, j) in enumerate(pairs):
        first = comparison.responses[i][:-1]  # no end-of-turn token: the turn goes on
        second = comparison.responses[j]
        question = np.concatenate([encode("A:\n"), first, encode(" B:\n"), second, request])
        answer = encode("A" if ranks[i] < ranks[j] else "B")
        weight = [1.0]
        if rationales:
            reason = encode(rationales[k] + VERDICT)
            answer = [*reason, *answer, processors.end_token]
            weight = [0.5 / (len(answer) - 1)] * len(answer)
            weight[-2] = 0.5  # the letter's
        responses.append(np.concatenate([question, answer]).astype(np.int32))
        learned.append(np.concatenate([np.zeros(len(question)), weight]))
        if ranks[i] < ranks[j]:
            judged.append((k, pairs.index((j, i))))
    share = comparison.weight / max(1, 2 * len(judged))
    learned = [share * weight for weight in learned]
    fields = vars(comparison) | {"responses": responses, "learned": learned, "judged": judged}
    return Rewrite(**fields)


def with_data_rationales(comparison: Comparison, request, processors: Processors) -> Rewrite:
    """Make rationales of the data's critiques; without critiques no pair is left."""
    critiques = comparison.record.get("critiques")
    if not critiques:
        return Rewrite(**vars(comparison) | {"responses": []})
    rationales = []
    for i, j in itertools.permutations(range(len(critiques)), 2):
        if comparison.ranks[i] != comparison.ranks[j]:
            rationales.append(f"A: {critiques[i]}\nB: {critiques[j]}")
    return in_ordered_pairs(comparison, request, processors, rationales)


class RequestModel(RewardModel):
    """A reward model that keeps its LM head and reads a request after each response."""

    keeps_lm_head = True
    pack = staticmethod(pack_written)

    def __init__(self, backbone, head, processors, trained_with=None, asks=None):
        super().__init__(backbone, head, processors, trained_with)
        # {"request": text, "critique_tokens": most tokens, "rationale": bool}
        self.asks = {"rationale": False} | asks
        self.request = turn_after_answer(asks["request"], processors)  # token ids
        self.rewrite = partial(self.rewriting, request=self.request, processors=processors)

    @classmethod
    def from_backbone(cls, path, settings, max_pixels=0):
        if settings.critique_tokens < 1:
            raise UserError(f"--critique_tokens {settings.critique_tokens}: must be at least 1")
        backbone = load_backbone(path, lm_head=True)
        head = new_head(backbone, settings) if cls is Critic else None
        request = settings.request or REQUESTS[cls.kind]
        asks = {"request": request, "critique_tokens": settings.critique_tokens}
        asks["rationale"] = settings.rationale
        return cls(backbone, head, data.load_processors(path, max_pixels), asks=asks)

    def save_pretrained(self, folder, dtype=torch.float32, file_size="5GB"):
        super().save_pretrained(folder, dtype, file_size, asks=self.asks)

    def forward(self, row: PackedRow, written: bool = False):
        """Return the scores; with `written`, also the log-probabilities of the tokens to write."""
        hidden = self.hidden_states(row)
        scores = self.scores(hidden, row)
        if not written:
            return scores
        vocabulary = self.backbone.lm_head.out_features
        predicting = hidden[row.predictors]
        log_p, _ = log_p_and_entropy(self.logits, predicting, row.tokens, vocabulary)
        return scores, log_p

    def logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.lm_head(hidden).float()

    @torch.inference_mode()
    def continue_responses(self, comparisons, micro_tokens) -> list[list[int]]:
        """Continue each response by greedy decoding; return new token ids, cut at the limit."""
        writer = Writer(self.backbone, self.processors).to(self.device)
        texts = []
        for part in split_into_rows(comparisons, micro_tokens):
            tokens, _ = write(writer, self.row_of(part), 1, self.asks["critique_tokens"])
            self.cost.update(written=int((tokens >= 0).sum()))
            texts += token_ids_of(tokens[:, 0], self.processors)
        return texts


class Critic(RequestModel):
    """Scores each response at the end of a critique, which it writes first."""

    kind = "critic"
    rewriting = staticmethod(with_data_critiques)

    def scores(self, hidden: Tensor, row: PackedRow) -> Tensor:
        return self.head(hidden[row.last])  # [N]

    def write_critiques(self, comparisons, micro_tokens=8192) -> list:
        """Write a critique of each response: token ids that end in <|im_end|>."""
        requests = []
        for comparison in comparisons:
            responses = [np.concatenate([r, self.request]) for r in comparison.responses]
            requests.append(replace(comparison, responses=responses))
        end = self.processors.end_token
        texts = self.continue_responses(requests, micro_tokens)
        return [np.array([*text, end], np.int32) for text in texts]

    def score_encoded(self, comparisons, micro_tokens=8192):
        critiques = iter(self.write_critiques(comparisons, micro_tokens))
        rewrites = []
        for comparison in comparisons:
            written = list(itertools.islice(critiques, len(comparison.responses)))
            rewrites.append(with_critiques(comparison, written, self.request))
        return super().score_encoded(rewrites, micro_tokens)


class Judge(RequestModel):
    """Answers which of two responses is better, A or B; it has no head but its LM head.

    S(i, j) is the difference of the letters' log-odds, averaged over both orders, so S(j, i) is
    -S(i, j). A response's score is the sum of S over all others, which is how the paper turns
    R1-Reward into a reward (Table 11).

    With --rationale it writes a rationale, and the log-odds are those after it. Trained further by
    06, it is an R1-Reward: see `read_verdict` there.
    """

    kind = "generative"

    @property
    def rewriting(self):
        return with_data_rationales if self.asks["rationale"] else in_ordered_pairs

    def scores(self, hidden: Tensor, row: PackedRow) -> Tensor:
        """Return the log-odds of A over B, [ordered pairs], in float32 like a head's scores."""
        # One by one: most tokenizers have a token "AB".
        letters = [data.tokenize_text(letter, self.processors.tokenizer)[-1] for letter in "AB"]
        a, b = self.backbone.lm_head.weight[letters].float()  # [hidden]
        # The last token is the letter, or behind a rationale the end of the turn after it.
        before_letter = row.last - (2 if self.asks["rationale"] else 1)
        return hidden[before_letter].float() @ (a - b)

    def score_encoded(self, comparisons, micro_tokens=8192):
        """As in RewardModel. A policy repeats itself, so equal responses are read once."""
        unlike, places, scores = [], [], []
        for comparison in comparisons:
            texts = [response.tobytes() for response in comparison.responses]
            unique = dict(zip(texts, comparison.responses))
            places.append([list(unique).index(text) for text in texts])
            responses = list(unique.values())
            unlike.append(replace(comparison, responses=responses, ranks=[]))
        in_pairs = partial(in_ordered_pairs, request=self.request, processors=self.processors)
        rewrites = [in_pairs(comparison) for comparison in unlike]
        if self.asks["rationale"]:
            rationales = iter(self.write_rationales(rewrites, micro_tokens))
            for k, (comparison, rewrite) in enumerate(zip(unlike, rewrites)):
                own = list(itertools.islice(rationales, len(rewrite.responses)))
                rewrites[k] = in_pairs(comparison, rationales=own)
        odds = super().score_encoded(rewrites, micro_tokens)  # [ordered pairs]
        counts = [len(rewrite.responses) for rewrite in rewrites]
        for place, pairs in zip(places, odds.split(counts)):
            M = max(place, default=-1) + 1
            table = odds.new_zeros(M, M)
            table[~torch.eye(M, dtype=torch.bool)] = pairs
            S = (table - table.T) / 2
            scores.append(S[place][:, place].sum(1))  # [N]
        return torch.cat([odds[:0], *scores])

    def write_rationales(self, rewrites, micro_tokens) -> list[str]:
        """Write a rationale for each pair, up to the verdict."""
        requests = []
        for rewrite in rewrites:
            without_letter = [response[:-1] for response in rewrite.responses]
            requests.append(replace(rewrite, responses=without_letter))
        texts = self.continue_responses(requests, micro_tokens)
        decode = self.processors.tokenizer.decode
        return [decode(text).split(VERDICT)[0] for text in texts]


KINDS = {"naive": RewardModel, "critic": Critic, "generative": Judge}

# --------------------------------------------------------------------------------------------------
# Appendix: two models as one, and the reward of other people's training


class RewardRouter(nn.Module):
    """A multimodal reward model for comparisons with images and a text-only one for the others,
    which the paper finds better at text. Their scores have different scales: compare only responses
    to one prompt. Prepared data needs two models with the same tokenizer."""

    score = RewardModel.score

    def __init__(self, multimodal: RewardModel, text: RewardModel):
        super().__init__()
        if multimodal.processors.image_processor is None:
            raise UserError("the multimodal reward model of the two is text-only")
        self.multimodal = multimodal
        self.text = text
        self.processors = multimodal.processors
        sets = []
        for model in (multimodal, text):
            sets += model.trained_with.get("data", [])
        self.trained_with = {"data": list(dict.fromkeys(sets))}

    @classmethod
    def from_pretrained(cls, multimodal: str, text: str):
        return cls(RewardModel.from_pretrained(multimodal), RewardModel.from_pretrained(text))

    def model_for(self, has_image: bool) -> RewardModel:
        return self.multimodal if has_image else self.text

    def encode(self, messages, texts, images=(), folder=Path()):
        turns = data.check_messages(messages)
        in_turns = any(isinstance(turn["content"], list) for turn in turns)  # a list has images
        model = self.model_for(in_turns or bool(images))
        return model.encode(messages, texts, images, folder)

    def score_encoded(self, comparisons, micro_tokens=8192):
        scores = {}
        for has_image in (True, False):
            indices = [i for i, c in enumerate(comparisons) if bool(c.images) == has_image]
            part = [comparisons[i] for i in indices]
            flat = self.model_for(has_image).score_encoded(part, micro_tokens)
            counts = [len(comparison.responses) for comparison in part]
            scores |= zip(indices, flat.split(counts))
        device = self.text.device
        in_order = [scores[i] for i in range(len(comparisons))]
        return torch.cat([torch.zeros(0, device=device), *in_order])

    @property
    def fingerprint(self) -> str:
        if self.multimodal.fingerprint != self.text.fingerprint:
            raise UserError(
                "the two reward models have different tokenizers or chat templates, and prepared "
                "data has one; from text, 04_eval.py --score and `score` in Python use both"
            )
        return self.multimodal.fingerprint


Reward = RewardModel | RewardRouter


def load_reward(model: str, text_model: str = "") -> Reward:
    """Load the reward model of --model, or the router of --model and --text_model."""
    if text_model:
        return RewardRouter.from_pretrained(model, text_model)
    return RewardModel.from_pretrained(model)


def trl_reward(
    reward: Reward, prompts, completions, images=None, image=None, log_metric=None, **_
) -> list[float]:
    """Score completions for TRL: GRPOTrainer(..., reward_funcs=partial(trl_reward, reward)).

    TRL repeats a prompt for each of its completions; neighbours with equal prompts and images
    become one comparison here. `prompts` and `completions` [n] are texts or lists of messages,
    `images` [n] a list for each prompt, `image` [n] one or None for each. Returns raw scores [n].
    ValueError for an unusable prompt, or a completion that is not one text.
    """
    if not images:
        image = image or [None] * len(prompts)
        images = [[] if picture is None else [picture] for picture in image]
    comparisons = []
    rows = zip(prompts, images, completions, strict=True)
    for (prompt, pictures), group in itertools.groupby(rows, lambda row: row[:2]):
        texts = [text_of_completion(completion) for _, _, completion in group]
        comparisons.append(reward.encode(prompt, texts, pictures or []))
    if log_metric is not None:
        log_metric("completions_per_prompt", len(prompts) / len(comparisons))
    return reward.score_encoded(comparisons).tolist()


def text_of_completion(completion: str | list[dict]) -> str:
    if isinstance(completion, list) and len(completion) == 1:
        completion = completion[0]["content"]
    data.require(isinstance(completion, str), "completions: not one text or assistant message")
    return completion


# --------------------------------------------------------------------------------------------------
# Appendix: the script makes a new reward model and shows one comparison on its way to scores


@dataclass
class HeadSettings:
    head_layers: int = option(2, "linear layers of the reward head, 1 to 5 (paper: 2)")
    head_activation: Literal["none", "tanh", "relu", "silu"] = option(
        "silu", "activation between the head's layers (paper: silu)"
    )
    head_width: int = option(0, "width of the inner layers; 0: the hidden size (paper: not stated)")
    kind: Literal["naive", "critic", "generative"] = option(
        "naive", "score the response (paper's choice), or a critique of it, or answer A or B"
    )
    request: str = option("", "critic, generative: what to ask; '': what the tiny backbone knows")
    critique_tokens: int = option(160, "critic, --rationale: longest text, in tokens")
    rationale: bool = option(False, "generative: write critiques of both responses, then A or B")


@dataclass
class Settings(HeadSettings):
    backbone: str = option(
        "tests/tiny/qwen2_5_vl", "checkpoint in Hugging Face layout: folder or hub name"
    )
    out: str = option("artifacts/model", "folder for the new reward model")
    data: str = option("artifacts/data/train", "prepared data to show one comparison of; '': none")
    seed: int = option(0, "seed of the head's initial weights")


def main(settings: Settings) -> None:
    if dist.get_rank() > 0:
        return
    if Path(settings.out, HEAD_FILE).is_file():
        _, _, description = load_head(settings.out)
        if description["trained_with"]:
            raise UserError(f"--out {settings.out}: has a trained reward model; give another --out")
    prepared = Path(settings.data, "dataset.json").is_file()
    if settings.data not in ("", Settings.data) and not prepared:
        raise UserError(f"--data {settings.data}: no prepared data set there; run 01_data.py first")
    torch.manual_seed(settings.seed)
    model = RewardModel.from_backbone(settings.backbone, settings)
    comparisons = []
    if prepared:
        comparisons = data.Comparisons(settings.data, model.fingerprint)
        data.ready_for_images(model.processors, [comparisons])
    model.save_pretrained(settings.out)
    print(f"{settings.out}: a new reward model ({model.kind}) on {settings.backbone}")
    if Path(settings.backbone, HEAD_FILE).is_file():
        command = f"03_train.py --model {settings.backbone}"
        print(f"The trained head there is not used; {command} continues with it")
    parts = parts_of(model.backbone)
    modules = {"vision tower": parts.vision, "language model": parts.language}
    modules |= {"reward head": model.head, "all": model}
    for name, module in modules.items():
        if module is not None:
            print(f"  {name:<15}{sum(p.numel() for p in module.parameters()):>14,} parameters")
    if len(comparisons):
        show_comparison(model, comparisons)
    command = f"03_train.py --model {settings.out}"
    if prepared:
        command += f" --data {settings.data}"
    print(f"\nNext: torchrun --standalone --nproc_per_node=2 {command}")


@torch.no_grad()
def show_comparison(model: RewardModel, comparisons) -> None:
    """Print the shapes of a prepared data set's first comparison on its way to scores."""
    comparison = comparisons[0]
    if model.rewrite:
        comparison = model.rewrite(comparison)
    row = pack([comparison], model.processors)
    hidden = model.hidden_states(row)
    shapes = {"input_ids": row.input_ids, "position_ids": row.position_ids}
    if row.images is not None:
        shapes["pixel_values"] = row.images.pixel_values
    shapes |= {"hidden states": hidden, "last tokens": hidden[row.last], "scores": model(row)}
    print(f"\n{comparison.origin}: (P, [R, ...]) = {row.lengths[0]}")
    for name, tensor in shapes.items():
        print(f"  {name:<15}{list(tensor.shape)}")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
