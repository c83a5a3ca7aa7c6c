"""Stage 3 · training the reward model: FSDP2 written out, the plain pairwise ranking loss

    torchrun --standalone --nproc_per_node=2 03_train.py                   # artifacts/model on artifacts/data/train
    torchrun --standalone --nproc_per_node=8 03_train.py --learning_rate 3e-6 --batch_size 128 --micro_tokens 16384
    python 03_train.py --plan --gpus 64                                    # what would that compute, need and take?

In    An initial reward model (02) and prepared comparisons (01); their holdout, if there is one, for validation.
Out   artifacts/reward/: the trained reward model; metrics.jsonl, one line a step; checkpoints/, from which --resume
      continues the very same run, on the same or another number of ranks. SIGTERM, which a machine that is taken away
      sends, ends the run with a checkpoint.

The loss is -log sigmoid(r_w - r_l), w the better response and l the worse, the mean over the batch, and nothing else,
as in the paper. Of a ranking of N > 2 responses it is the mean over its ordered pairs (InstructGPT, arXiv 2203.02155).
Both regularisers of the paper (Algorithm 1) are there and off, as it found neither to help: a penalty on (r_w + r_l)^2,
and r / log(length + 1). The other kinds of reward model (02, --kind) learn to write as well: a critic the data's
critiques, beside the ranking of responses with these critiques; a judge the letter of the better response, in both
orders, and nothing else.

The paper trains with learning rate 3e-6 and batches of 128 pairs on 64 GPUs. It does not state epochs, optimizer,
schedule or whether the vision tower was frozen. The defaults fill that in from the authors' public command for a
text-only reward model (AdamW with weight decay 0.1 and beta2 0.95, 5% warm-up, cosine; it freezes the vision tower:
--freeze_vision), but for learning rate, batch size and epochs, which suit the embedded backbone of 1.7 M parameters.

The gradient of a step does not depend on the number of ranks: which comparisons make up a step follows from the seed
alone; they are dealt to ranks by length; and each loss is divided by the number of comparisons in the step, whoever
holds them. No rank holds more than its shards: the model is sharded while it is empty, then filled. The export gathers
a tensor at a time, and rank 0 keeps in main memory as many as make one file (--export_file_size).

On several nodes, which have to see the same files, each runs its own line of

    torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr NODE0 03_train.py --shard_size 8

where --shard_size keeps parameters from travelling between nodes, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name
the network between them (tests/multinode.sh rehearses it).

In this order: settings; who reads what in which step; the loss; loading; the model in shards; the loop. After it what
it calls now and then; checkpoints; where a run begins; at last --plan.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
option, Processors, UserError = data.option, data.Processors, data.UserError
PackedRow, RewardModel = model_stage.PackedRow, model_stage.RewardModel


@dataclass
class Recipe:
    """What the trained weights follow from. An interrupted run goes on with the same, unless --resume_changed."""

    model: str = option(
        "artifacts/model", "initial reward model (02), or a trained one to go on from, head and all"
    )
    data: list[str] = option(
        [], "prepared comparisons (01) to train on, repeatable; none: artifacts/data/train"
    )
    steps: int = option(0, "optimizer steps; 0: as many as --epochs make")
    epochs: float = option(2.0, "passes over the data, where --steps is 0 (authors: 1)")
    batch_size: int = option(64, "comparisons a step, over all ranks (paper: 128)")
    learning_rate: float = option(2e-4, "AdamW's, at its peak (paper: 3e-6, for 7B)")
    warmup: float = option(
        0.05, "share of the steps in which it rises linearly; then a cosine to 0 (authors: 0.05)"
    )
    weight_decay: float = option(0.1, "AdamW's, of matrices only (authors: 0.1)")
    beta2: float = option(0.95, "AdamW's, of the mean squared gradient (authors: 0.95)")
    clip: float = option(
        1.0, "largest norm of a step's gradient; a longer one is scaled down to it; 0: never"
    )
    zero_coefficient: float = option(
        0.0, "weight of (r_w + r_l)^2 as a penalty (paper: 0; tried 0.001, 0.01, 0.1)"
    )
    length_normalisation: bool = option(
        False, "train on r / log(tokens of the response + 1) (paper: tried, not used)"
    )
    critique_coefficient: float = option(
        1.0, "critic: weight of the critiques' loss beside the ranking loss"
    )
    freeze_vision: bool = option(
        False, "do not train the vision tower (authors' command: frozen; paper: not said)"
    )
    seed: int = option(0, "of the order of the data")

    def __post_init__(self):
        self.data = self.data or ["artifacts/data/train"]


@dataclass
class Settings(Recipe):
    out: str = option(
        "artifacts/reward", "folder for the trained reward model, metrics.jsonl and checkpoints/"
    )
    validation: str = option(
        "auto",
        "prepared comparisons to validate on; auto: the first --data's <data>_holdout if there; '' for none",
    )
    validate_every: int = option(25, "steps between validations; 0: only at the end")
    validation_size: int = option(256, "comparisons of a validation, always the same")
    checkpoint_every: int = option(
        50, "steps between checkpoints, of which the last two are kept; 0: none"
    )
    resume: bool = option(
        False, "continue from the newest checkpoint in --out; from the start where there is none"
    )
    resume_changed: bool = option(
        False, "with --resume, continue though settings or data that change the run differ"
    )
    non_finite: Literal["stop", "skip"] = option(
        "stop",
        "at a step whose loss or gradient is not finite: stop the run, or skip its update and say so",
    )
    micro_tokens: int = option(
        8192, "tokens that a rank computes at a time, as many as its memory allows (--plan)"
    )
    activation_checkpointing: bool = option(
        False, "recompute layers in backward: less memory, a third more time"
    )
    shard_size: int = option(
        0, "ranks that share one copy of the model, usually the GPUs of one node; 0: all of them"
    )
    compile: bool = option(False, "torch.compile each layer: for GPUs; takes minutes to start")
    workers: int = option(
        1, "processes a rank that read and decode ahead of the step; 0: the step does it itself"
    )
    export_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "of the exported backbone: fp32 is what was trained, to the bit; bf16 is half as large (head: float32)",
    )
    export_file_size: str = option(
        "5GB", "largest file of the export, which is what rank 0 gathers at a time"
    )
    plan: bool = option(
        False, "train nothing: print what a run would compute, need and take (next 7 settings)"
    )
    gpus: int = option(0, "GPUs to plan for; 0: as many as there are ranks now (paper: 64)")
    gpu_memory: float = option(80.0, "memory of a GPU in GB (80: an H100)")
    gpu_flops: float = option(
        989e12, "peak of a GPU in FLOP/s, bfloat16, not sparse (989e12: an H100 SXM)"
    )
    utilisation: float = option(
        0.4, "share of the peak that is reached: an assumption, which a first run replaces"
    )
    gpu_link: float = option(
        50e9, "bytes/s a GPU receives from the others (50e9: 400 Gb/s each, between nodes)"
    )
    plan_comparisons: int = option(
        0, "comparisons to plan for, like those in --data; 0: those (paper: 2.8 M)"
    )
    plan_lengths: list[int] = option(
        [],
        "assumed instead of --data: tokens of the prompt's text, of its image, of each response (150 512 300 300)",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The plan of a run: which rank reads which comparisons in which micro-batch of which step. It follows from lengths and
# the seed, so all ranks know it without a word. To copy it takes numpy and nothing else of this project.


def order_of_training(n: int, settings: Settings) -> list[list[int]]:
    """The comparisons of every step: one shuffle an epoch, all from the seed. A last incomplete batch is filled from
    the next shuffle, so nothing is left out."""
    steps = settings.steps or math.ceil(n * settings.epochs / settings.batch_size)
    needed = steps * settings.batch_size
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(n) for _ in range(-(-needed // n))])[:needed]
    return order.reshape(steps, settings.batch_size).tolist()


@dataclass
class MicroBatch:
    step: int
    indices: list[int]  # this rank's comparisons
    last: bool  # of its step
    step_size: int  # comparisons in the whole step, over all ranks and micro-batches
    dummy_image: bool  # another rank has an image here and this one has none
    loads: list[int]  # of every rank's share, in tokens


def deal(indices: list[int], cost: np.ndarray, bins: int) -> list[list[int]]:
    """Spreads comparisons over bins of nearly equal cost: the dearest first, each into the bin that is lightest."""
    dealt, load = [[] for _ in range(bins)], [0] * bins
    for i in sorted(indices, key=lambda i: (-cost[i], i)):
        lightest = load.index(min(load))
        dealt[lightest].append(i)
        load[lightest] += cost[i]
    return dealt


def plan(
    steps: list[list[int]],
    tokens: np.ndarray,
    patches: np.ndarray,
    micro_tokens: int,
    rank: int,
    world: int,
) -> list[MicroBatch]:
    """The micro-batches of one rank. In each, all ranks have about equal work, of at most `micro_tokens` tokens unless
    a single comparison is longer; every rank has the same number of them, some possibly empty.

    Args: the comparisons of each step; of all comparisons the tokens and image patches, [n] each.
    """
    cost = (
        tokens + patches // 4
    )  # a patch counts as a quarter of a token: the vision tower is the smaller model
    work, micro_batches = lambda comparisons: int(cost[comparisons].sum()), []
    for step, indices in enumerate(steps):
        count = max(1, -(-work(indices) // (micro_tokens * world)))
        dealt = deal(indices, cost, count * world)
        while count * world < len(indices) and max(map(work, dealt)) > micro_tokens:
            count += 1
            dealt = deal(indices, cost, count * world)
        dealt.sort(
            key=work, reverse=True
        )  # neighbours, which run at the same time, cost about the same
        for k in range(count):
            together = dealt[k * world : (k + 1) * world]
            has_image = [bool(patches[comparisons].any()) for comparisons in together]
            dummy, costs = any(has_image) and not has_image[rank], list(map(work, together))
            micro_batches.append(
                MicroBatch(step, together[rank], k == count - 1, len(indices), dummy, costs)
            )
    return micro_batches


def imbalance(micro_batches: list[MicroBatch]) -> float:
    """How much longer all ranks take than if all had equal work, since each waits for the slowest: 0 is perfect."""
    slowest = sum(max(batch.loads) for batch in micro_batches)
    return slowest / (sum(sum(batch.loads) / len(batch.loads) for batch in micro_batches) or 1) - 1


# ---------------------------------------------------------------------------------------------------------------------
# The loss. To copy `ranking_loss` takes `Pairs` and what makes them; `written` is for critics and judges alone.


@dataclass
class Pairs:
    """All (better, worse) pairs within the comparisons of a row, as indices into its N scores."""

    better: Tensor  # [pairs]
    worse: Tensor  # [pairs]
    weight: Tensor  # [pairs] 1 / (pairs of the same comparison): each comparison counts once
    lengths: Tensor  # [N] tokens of each response

    def to(self, device: torch.device) -> "Pairs":
        return model_stage.change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Pairs":
        return model_stage.change_tensors(self, Tensor.pin_memory)


def pairs_of(comparisons: list) -> Pairs:
    """All pairs of these comparisons."""
    better, worse, weight, start = [], [], [], 0
    for comparison in comparisons:
        found = comparison.pairs
        better += [start + i for i, _ in found]
        worse += [start + j for _, j in found]
        weight += [1 / max(1, len(found))] * len(found)
        start += len(comparison.responses)
    lengths = [len(response) for comparison in comparisons for response in comparison.responses]
    as_long = lambda values: torch.tensor(values, dtype=torch.long)
    return Pairs(as_long(better), as_long(worse), torch.tensor(weight), as_long(lengths))


def ranking_loss(
    scores: Tensor, pairs: Pairs, zero_coefficient: float = 0.0, length_normalisation: bool = False
) -> Tensor:
    """The paper's loss (Algorithm 1), summed over comparisons; the caller divides by their number.

    Args: scores [N], pairs within them. Each comparison counts once, however many pairs it has.
    """
    if length_normalisation:
        scores = scores / torch.log(pairs.lengths + 1.0)
    better, worse = scores[pairs.better], scores[pairs.worse]  # [pairs]
    loss = -F.logsigmoid(better - worse) + zero_coefficient * (better + worse) ** 2
    return (pairs.weight * loss).sum()


def losses(
    model: nn.Module, row: PackedRow, pairs: Pairs, settings: Settings
) -> tuple[Tensor, Tensor]:
    """What a kind of reward model learns from, summed over comparisons like the ranking loss, and the scores [N]."""
    scores, log_p = (model(row), None) if model.kind == "naive" else model(row, row.written)
    ranking = ranking_loss(scores, pairs, settings.zero_coefficient, settings.length_normalisation)
    if log_p is None:
        return ranking, scores
    writing = -(
        row.written.weight * log_p
    ).sum()  # of each comparison the mean over the tokens that it has to write
    return (
        writing
        if model.kind == "generative"
        else ranking + settings.critique_coefficient * writing,
        scores,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading: from the comparisons of a micro-batch to tensors on the device, in processes of its own, ahead of the step.


def pack_micro_batch(
    batch: MicroBatch, comparisons: Dataset, processors: Processors, pack=model_stage.pack
) -> tuple[list, PackedRow]:
    """The comparisons and the row of a planned micro-batch. Where there are fewer comparisons than ranks, one that
    nobody reads: all ranks step together."""
    read = [comparisons[i] for i in batch.indices]
    if not read and not batch.dummy_image:
        read = [data.Comparison(np.array([processors.end_token], np.int32), [], [])]
    return read, pack(read, processors, batch.dummy_image)


class MicroBatches(Dataset):
    """Reads, decodes and packs the micro-batches of a plan; runs in the loader's worker processes."""

    def __init__(
        self, comparisons: Dataset, micro_batches: list[MicroBatch], processors: Processors, pack
    ):
        self.comparisons, self.plan, self.processors, self.pack = (
            comparisons,
            micro_batches,
            processors,
            pack,
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int):
        """(micro-batch, row, pairs), or the UserError, which would leave a worker process only with its traceback."""
        try:
            read, row = pack_micro_batch(self.plan[k], self.comparisons, self.processors, self.pack)
        except UserError as error:
            return error
        return self.plan[k], row, pairs_of(read)


def ignore_sigterm(worker: int) -> None:
    """SIGTERM may come to all processes, and the step that it ends still needs its data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load(
    comparisons: Dataset,
    micro_batches: list[MicroBatch],
    model: RewardModel,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[MicroBatch, PackedRow, Pairs]]:
    """Yields (micro-batch, row, pairs) with the tensors on the device."""
    dataset = MicroBatches(comparisons, micro_batches, model.processors, model.pack)
    pin = device.type == "cuda"
    how = {
        "batch_size": None,
        "num_workers": workers,
        "pin_memory": pin,
        "worker_init_fn": ignore_sigterm,
    }
    for loaded in torch.utils.data.DataLoader(dataset, **how):
        if isinstance(loaded, UserError):
            raise loaded
        batch, row, pairs = loaded
        yield batch, row.to(device), pairs.to(device)


class Rewritten(Dataset):
    """Comparisons as a critic or a judge reads them, with what it is asked and has to write. Those in which there is
    nothing to write are left out. To know which, and how long each is, every rank reads its share of them first."""

    def __init__(self, comparisons: Dataset, patches: np.ndarray, rewrite, device: torch.device):
        self.comparisons, self.rewrite = comparisons, rewrite
        tokens, rank = (
            torch.zeros(len(comparisons), dtype=torch.long, device=device),
            dist.get_rank(),
        )
        mine, bar = (
            range(rank, len(tokens), dist.get_world_size()),
            {"desc": "measure", "unit": " comparisons"},
        )
        for i in tqdm(mine, **bar, disable=rank > 0, mininterval=1):
            read = rewrite(comparisons[i])
            tokens[i] = read.length if read.responses else 0
        dist.all_reduce(tokens)
        self.chosen = np.flatnonzero(tokens.cpu().numpy())
        needed = "a critic needs critiques, one for each response, and a judge two responses"
        if not len(self.chosen):
            raise UserError(f"no comparison to learn from: {needed}")
        if rank == 0 and len(self.chosen) < len(tokens):
            print(
                f"{len(tokens) - len(self.chosen)} of {len(tokens)} comparisons left out: {needed}"
            )
        self.size = tokens.cpu().numpy()[self.chosen], patches[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int):
        return self.rewrite(self.comparisons[int(self.chosen[i])])

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """As those of Comparisons: tokens and image patches, [n] each."""
        return self.size


def open_data(settings: Settings, processors: Processors) -> tuple:
    """The training comparisons, their sizes in tokens and patches [n], and the comparisons to validate on, or None.

    Raises UserError where they are no training data for this model."""
    sets = [data.Comparisons(folder, processors.fingerprint) for folder in settings.data]
    comparisons = torch.utils.data.ConcatDataset(sets)
    tokens, patches = (np.concatenate(sizes) for sizes in zip(*(each.sizes() for each in sets)))
    named = ", ".join(settings.data)
    if not len(comparisons):
        raise UserError(f"{named}: no comparisons in there; see rejected.jsonl for why")
    for each in sets:
        if metric := each.info["metric"]:
            raise UserError(
                f"{each.folder}: the benchmark {metric}, which is to score models and not to train them"
            )
    if not all(np.concatenate([each.response_counts() for each in sets])):
        raise UserError(
            f"{named}: has prompts without responses; a reward model is trained on pairs or rankings"
        )
    if processors.image is None and patches.any():
        raise UserError(
            f"{named}: {(patches > 0).sum()} comparisons have images, and {settings.model} is text-only"
        )
    data.use_pixel_limits(processors, sets)
    validation = settings.validation
    if validation == "auto":
        beside = f"{settings.data[0].rstrip('/')}_holdout"
        validation = beside if Path(beside, "dataset.json").is_file() else ""
    held_out = data.Comparisons(validation, processors.fingerprint) if validation else []
    return comparisons, tokens, patches, held_out if len(held_out) else None


# ---------------------------------------------------------------------------------------------------------------------
# The model in shards: FSDP2, in the order in which it has to be done. To copy `load_weights` takes `checkpoint_tensors`
# and an exception, `shard` also `parts_of`, which says where the layers of a model are.


def shard(
    model: nn.Module,
    backbone: nn.Module,
    device: torch.device,
    activation_checkpointing: bool = False,
    in_float32: tuple = (),
    shard_size: int = 0,
    compile: bool = False,
) -> None:
    """Shards a model's parameters, in place; `backbone` is the transformers model in it. An empty one stays on the meta
    device, the rest moves to `device`.

    Shards are dealt over all ranks, or over each `shard_size` neighbouring ones, so that every such group has a copy of
    the model and only gradients pass between groups (hybrid sharding): for several nodes with a slow network between.

    On a GPU the float32 masters stay sharded, layers compute in bfloat16 and gradients are reduced in float32: with
    bfloat16 parameters a step of 3e-6 would be rounded away. On a CPU all is float32. Units that are gathered together:
    the vision tower, each decoder layer, then what is left. What is named in `in_float32`, the reward head, is its own
    unit and stays float32.
    """
    world = dist.get_world_size()
    shard_size = shard_size or world
    if shard_size < 0 or world % shard_size:
        raise UserError(f"--shard_size {shard_size}: has to divide the number of ranks, {world}")
    # One dimension is the default process group; more would be groups of their own.
    sizes = (
        {"replicate": world // shard_size, "shard": shard_size}
        if shard_size < world
        else {"shard": world}
    )
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    mixed = (
        {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        if device.type == "cuda"
        else {}
    )
    policy = MixedPrecisionPolicy(**mixed)
    parts = model_stage.parts_of(backbone)
    if activation_checkpointing:
        backbone.activation_checkpointing_enable()
        backbone.disable_input_require_grads()  # comes with it, and would send a frozen vision tower through a backward
    for layer in [*parts.language.layers, *parts.blocks] if compile else []:
        layer.compile(dynamic=True)  # before it is sharded; lengths differ from row to row
    if parts.vision is not None:
        fully_shard(parts.vision, mesh=mesh, mp_policy=policy)
    for layer in parts.language.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for module in in_float32:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def checkpoint_tensors(backbone: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yields every tensor of a Hugging Face checkpoint, a directory or a hub name: its name there, its name in the
    transformers model, and a slice, of which only the rows are read that are asked for.

    Published checkpoints have older names than transformers' modules; the renaming is that of `from_pretrained`.
    """
    transforms = get_model_conversion_mapping(backbone)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = backbone.state_dict()
    try:
        single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        index = None if single else cached_file(path, "model.safetensors.index.json")
        for each in [single] if single else get_checkpoint_shard_files(path, index)[0]:
            with safe_open(each, framework="pt") as file:
                for key in file.keys():
                    name, converter = rename_source_key(
                        key, renamings, converters, backbone.base_model_prefix, names
                    )
                    if converter:
                        raise UserError(
                            f"{path}: {key} has to be rearranged for the model, which is not supported"
                        )
                    yield key, name, file.get_slice(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole checkpoint: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def load_weights(backbone: nn.Module, path: str, device: torch.device) -> None:
    """Fills a transformers model that was built empty and then sharded, from its checkpoint, whatever the dtype stored.

    A rank has memory for its own shards only, and reads only their rows of the memory-mapped files, tensor by tensor.
    `backbone` is what transformers made, every parameter of it sharded by `fully_shard`; a head of yours is not in it.

    Raises:
        UserError: names the tensor that is missing, or does not belong to the model, or has the wrong shape.
    """
    backbone.to_empty(device=device)
    backbone.tie_weights()  # `to_empty` parts an LM head from the embeddings whose weights it shares
    missing = dict(backbone.named_parameters())  # shared weights once, as the embeddings
    for parameter in missing.values():
        parameter._is_hf_initialized = True
    backbone.initialize_weights()  # so only of what no checkpoint holds, the buffers of rotary frequencies
    for key, name, tensor in checkpoint_tensors(backbone, path):
        if name not in missing and name.endswith(("lm_head.weight", "rotary_emb.inv_freq")):
            continue  # a head that the model has not, or that is the embeddings; old Llamas' frequencies, which follow
        if name not in missing:
            raise UserError(
                f"{path}: {key} is not a weight of a {type(backbone).__name__} as config.json describes it"
            )
        parameter = missing.pop(name)  # a DTensor, [rows, ...], of which FSDP deals whole rows
        if tensor.get_shape() != list(parameter.shape):
            shapes = (
                f"{tensor.get_shape()} in the checkpoint, {list(parameter.shape)} by config.json"
            )
            raise UserError(f"{path}: {key} has the wrong shape: {shapes}")
        mesh, dim = (
            parameter.device_mesh,
            parameter.placements.index(Shard(0)),
        )  # not that of replicas
        rows, start = Shard.local_shard_size_and_offset(
            len(parameter), mesh.size(dim), mesh.get_local_rank(dim)
        )
        parameter.to_local().copy_(tensor[start : start + rows])
        if not parameter.to_local().isfinite().all():
            raise UserError(f"{path}: {key} has weights that are not finite")
    if missing:
        raise UserError(
            f"{path}: {next(iter(missing))} is missing ({len(missing)} of the model's weights are)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, its state allocated. Decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True
    )
    allocate_state(optimizer)
    return optimizer


def allocate_state(optimizer: torch.optim.AdamW) -> None:
    """What AdamW would do in its first step: a checkpoint needs something to load into."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments


def learning_rate_at(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return (
        settings.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    )


def forward_backward(
    model: nn.Module, batch: MicroBatch, row: PackedRow, pairs: Pairs, settings: Settings
) -> Tensor:
    """Adds a micro-batch's share to the gradients; returns its loss, right pairs and margin, summed over comparisons
    [3]."""
    loss, scores = losses(model, row, pairs, settings)
    # FSDP averages gradients over all ranks, of all replicas; times their number that is the sum, and the sum over all
    # comparisons of the step divided by their number is what one rank would have computed.
    (loss * dist.get_world_size() / batch.step_size).backward()
    with torch.no_grad():
        margins = scores[pairs.better] - scores[pairs.worse]  # [pairs]
        return torch.stack(
            [loss, (pairs.weight * (margins > 0)).sum(), (pairs.weight * margins).sum()]
        )


def train(settings: Settings) -> dict:
    """Trains a reward model as the settings say and exports it to `settings.out`; returns the last line of metrics."""
    rank, world, device = data.start_distributed()
    torch.manual_seed(settings.seed)
    model = RewardModel.from_pretrained(settings.model, empty=True)
    processors, began_with = model.processors, model.trained_with
    comparisons, tokens, patches, held_out = open_data(settings, processors)
    held_out_name = held_out and held_out.folder
    if model.rewrite:  # a critic or a judge
        comparisons = Rewritten(comparisons, patches, model.rewrite, device)
        tokens, patches = comparisons.sizes()
        held_out = held_out and Rewritten(held_out, held_out.sizes()[1], model.rewrite, device)
    order = order_of_training(len(comparisons), settings)
    steps, micro_batches = (
        len(order),
        plan(order, tokens, patches, settings.micro_tokens, rank, world),
    )

    vision = model_stage.parts_of(model.backbone).vision
    if settings.freeze_vision and vision is not None:
        vision.requires_grad_(False)
    heads = (model.head,) if model.head else ()
    how = {
        "activation_checkpointing": settings.activation_checkpointing,
        "compile": settings.compile,
    }
    shard(model, model.backbone, device, in_float32=heads, shard_size=settings.shard_size, **how)
    load_weights(model.backbone, settings.model, device)
    model.train()
    optimizer = make_optimizer(model, settings)
    about = {
        "settings": dataclasses.asdict(settings),
        "data": fingerprint(settings.data),
    }  # in every checkpoint
    start = begin(settings, model, optimizer, about)
    checkpoints, log = Path(settings.out, "checkpoints"), Path(settings.out, "metrics.jsonl")
    if rank == 0:
        head = "a new head"
        if began_with:
            head = f"its head, trained on {', '.join(began_with['data'])} for {began_with['steps']} steps"
        images, differs = int((patches > 0).sum()), 100 * imbalance(micro_batches)
        read = f"{len(comparisons)} comparisons of {', '.join(settings.data)}, {images} with images"
        print(f"{settings.model} with {head}; {read}; validating on {held_out_name or 'nothing'}")
        if sum(p.numel() for p in model.parameters()) > 1e8 and settings.learning_rate > 5e-5:
            rate = f"--learning_rate {settings.learning_rate:g} suits small models"
            print(f"{rate}; for pretrained ones of this size the paper takes 3e-6")
        print(
            f"steps {start + 1} to {steps} of {settings.batch_size} comparisons on {world} rank(s), ",
            end="",
        )
        print(f"whose work differs by {differs:.1f}%", flush=True)

    stop = []  # not empty: SIGTERM has come
    if settings.checkpoint_every:
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    bar = {
        "total": steps * settings.batch_size,
        "initial": start * settings.batch_size,
        "unit": " comparisons",
    }
    progress = tqdm(desc=f"step {start}/{steps}", **bar, disable=rank > 0, mininterval=1)
    line, shown = {}, {}
    sums = torch.zeros(
        4, device=device
    )  # of a step: loss, right pairs, margins, how many ranks are to stop
    began = asked = time.perf_counter()
    waited = 0.0
    remaining = [batch for batch in micro_batches if batch.step >= start]
    for batch, row, pairs in load(comparisons, remaining, model, device, settings.workers):
        waited += time.perf_counter() - asked
        sums[:3] += forward_backward(model, batch, row, pairs, settings)
        asked = time.perf_counter()
        if not batch.last:
            continue

        # Of all ranks' gradients together, before they are scaled down.
        norm = clip_grad_norm_(model.parameters(), settings.clip or math.inf).full_tensor()
        sums[3] = len(stop)
        dist.all_reduce(sums)
        # On a GPU the only place in a step where the CPU waits for it. From here on all ranks know the same.
        *totals, stopping, norm = [*sums.tolist(), norm.item()]
        loss, accuracy, margin = (total / batch.step_size for total in totals)
        done, skipped = batch.step + 1, {}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(batch.step, steps, settings)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
        else:
            of_step = [each for each in micro_batches if each.step == batch.step]
            skipped = stop_or_skip(loss, norm, model, of_step, comparisons, device, settings)
        optimizer.zero_grad()
        sums.zero_()

        line = (
            {
                "step": done,
                "loss": loss,  # all that is trained: ranking, regularisers, what a critic or a judge writes
                "accuracy": accuracy,  # share of training pairs whose better response scores higher (a critic's with the
                # data's critiques, which give it away)
                "margin": margin,  # mean score of the better response minus that of the worse
                "grad_norm": norm,  # before clipping
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens": int(
                    tokens[order[batch.step]].sum()
                ),  # of the packed rows, over all ranks
                "seconds": time.perf_counter() - began,
                "data_seconds": waited,  # of these, this rank's wait for the loader
            }
            | skipped
        )
        due = settings.validate_every and done % settings.validate_every == 0
        if held_out is not None and (due or done == steps):
            line |= validate(model, held_out, settings, device)
        if rank == 0:
            with data.writing(log), open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        shown |= {
            name: line[name] for name in ("loss", "accuracy", "validation_accuracy") if name in line
        }
        progress.set_description(f"step {done}/{steps}", refresh=False)
        progress.set_postfix(shown, refresh=False)
        progress.update(batch.step_size)
        due = settings.checkpoint_every and done % settings.checkpoint_every == 0
        if (due or stopping) and done < steps:
            save_checkpoint(checkpoints, done, training_state(model, optimizer), about)
            if stopping:
                raise UserError(
                    f"stopped by SIGTERM after step {done}, which has a checkpoint; continue with --resume"
                )
        began = asked = time.perf_counter()
        waited = 0.0
    progress.close()
    if settings.checkpoint_every:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    model.trained_with = {"data": settings.data, "steps": began_with.get("steps", 0) + steps}
    model.trained_with |= {"learning_rate": settings.learning_rate, "seed": settings.seed}
    with data.writing(settings.out):
        model.save_pretrained(
            settings.out, model_stage.DTYPES[settings.export_dtype], settings.export_file_size
        )
    dist.barrier()
    return line


# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls now and then.


@torch.no_grad()
def validate(
    model: nn.Module, comparisons: Dataset, settings: Settings, device: torch.device
) -> dict[str, float]:
    """Ranking loss, without regularisers and what is written, and pair accuracy over the first --validation_size
    comparisons, each counting once."""
    chosen = list(range(min(settings.validation_size, len(comparisons))))
    rank, world = dist.get_rank(), dist.get_world_size()
    micro_batches = plan([chosen], *comparisons.sizes(), settings.micro_tokens, rank, world)
    sums = torch.zeros(3, device=device)
    model.eval()
    for _, row, pairs in load(comparisons, micro_batches, model, device, workers=0):
        scores = model(row)
        right = (pairs.weight * (scores[pairs.better] > scores[pairs.worse])).sum()
        sums += torch.stack([ranking_loss(scores, pairs), right, pairs.weight.sum()])
    dist.all_reduce(sums)
    model.train()
    model.reshard()  # without a backward the embeddings, of the root, stay gathered, and no checkpoint can have that
    # The data's critiques, which a critic reads here, give away which response is better. Only 04 makes it write.
    accuracy = "validation_accuracy" + ("_with_given_critiques" if model.kind == "critic" else "")
    return {"validation_loss": (sums[0] / sums[2]).item(), accuracy: (sums[1] / sums[2]).item()}


def stop_or_skip(
    loss: float,
    norm: float,
    model: nn.Module,
    micro_batches: list[MicroBatch],
    comparisons: Dataset,
    device: torch.device,
    settings: Settings,
) -> dict:
    """Names the comparisons that made a step's loss or gradient not finite, and raises UserError, or with --non_finite
    skip returns what the log says of the step; the same on all ranks.

    Each micro-batch is computed again by itself. Of one with losses that are finite, it is the comparisons of all
    ranks, whose gradients are summed.
    """
    named = []
    for batch in micro_batches:
        model.zero_grad()
        read, row = pack_micro_batch(batch, comparisons, model.processors, model.pack)
        again = forward_backward(model, batch, row.to(device), pairs_of(read).to(device), settings)[
            0
        ]
        mine, everyone = [str(each) for each in read if each.origin], [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (bool(again.isfinite()), mine))
        if not clip_grad_norm_(model.parameters(), math.inf).full_tensor().isfinite():
            guilty = [names for finite, names in everyone if not finite] or [
                names for _, names in everyone
            ]
            named += [name for names in guilty for name in names]
    found = f"step {micro_batches[0].step + 1}: loss {loss:g}, norm of the gradient {norm:g}, from {len(named)} "
    found += f"comparison(s): {', '.join(named)}"
    if settings.non_finite == "stop":
        raise UserError(
            f"{found}; the weights are as before. Mend the data, or go on with --non_finite skip"
        )
    if dist.get_rank() == 0:
        print(f"{found}; its update is skipped", flush=True)
    return dict.fromkeys(("loss", "accuracy", "margin", "grad_norm")) | {
        "skipped": named
    }  # JSON has no word for nan


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: model and optimizer as sharded safetensors, written by torch.distributed.checkpoint, which reads them
# back on any number of ranks. The position in the data is the step, since the plan follows from the seed. To copy them
# takes `writing`, `reading` and `write_file` of 01, an AdamW whose state is allocated (`allocate_state`), and a process
# group that has gloo for what is on the CPU ("cpu:gloo,cuda:nccl").


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and what the optimizer keeps of each, as one flat dict of tensors, each the very one in use. No
    buffers, which no step changes here, and nothing that follows from the step, as the learning rate does."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        state |= {
            f"{key}.{name}": tensor for key, tensor in optimizer.state.get(parameter, {}).items()
        }
    return state


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Tensor], about: dict, keep: int = 2
) -> None:
    """Writes `step_000050/` under a temporary name and renames it when all ranks are done; then removes old ones, again
    by renaming first. So what is called step_... is whole, and there is one at any moment after the first. Its run.json
    says what the run is `about`, anything that JSON can hold."""
    final, unfinished = folder / f"step_{step:06d}", folder / f".writing_{step:06d}"
    with data.writing(final):
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        try:
            dcp.save(
                state,
                storage_writer=dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
            )
        except dcp.CheckpointException as error:  # on all ranks, with what went wrong on each
            shutil.rmtree(unfinished, ignore_errors=True)
            reason = next(iter(error.failures.values()))[0]
            raise (
                reason if isinstance(reason, OSError) else OSError(str(reason).splitlines()[0])
            ) from None
        if dist.get_rank() == 0:
            files = {file.name: file.stat().st_size for file in unfinished.glob("*.safetensors")}
            data.write_file(
                unfinished / "run.json",
                json.dumps({"step": step, **about, "files": files}, indent=1),
            )
            remove(final)
            unfinished.rename(final)
            for old in sorted(folder.glob("step_*"), key=step_of)[:-keep]:
                remove(old)
        dist.barrier()


def remove(checkpoint: Path) -> None:
    """Killed amid this, it leaves nothing behind that looks like a checkpoint."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".old_{checkpoint.name}")))


def check_checkpoint(checkpoint: Path, state: dict[str, Tensor]) -> dict:
    """What run.json says of a checkpoint; UserError where it is not whole or not of this model.

    Every tensor of `state` has to be there, in pieces that cover its rows without a gap. Reads no more than headers:
    safetensors compares what they declare with the size of the file."""
    with data.reading(checkpoint, "remove it"):
        run = json.loads((checkpoint / "run.json").read_bytes())
        for key, kind in (("step", int), ("files", dict)):
            if not isinstance(run[key], kind):
                raise data.Unusable(f"run.json: {key} is no {kind.__name__}")
        there = {file.name: file.stat().st_size for file in checkpoint.glob("*.safetensors")}
        if run["step"] != step_of(checkpoint) or run["files"] != there:
            raise data.Unusable("its files are not those that run.json lists")
        saved = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata()
        for piece, stored in saved.storage_data.items():
            tensor = state.get(piece.fqn)
            if tensor is None or (stored.dtype, stored.shape[1:]) != (
                tensor.dtype,
                tensor.shape[1:],
            ):
                raise data.Unusable(
                    f"{Path(stored.relative_path).name}: {piece.fqn} is none of this run's tensors"
                )
        for name, tensor in state.items():
            pieces = (
                saved.state_dict_metadata[name].chunks if name in saved.state_dict_metadata else []
            )
            end = 0
            for piece in sorted(pieces, key=lambda piece: piece.offsets) if tensor.ndim else []:
                if piece.offsets[0] != end:
                    raise data.Unusable(f"{name}: row {end} is missing")
                end += piece.sizes[0]
            if not pieces or tensor.ndim and end != len(tensor):
                raise data.Unusable(f"{name} is not all there")
    return run


def newest_whole(folder: Path, state: dict[str, Tensor]) -> Path | None:
    """The newest checkpoint that is whole, the same on all ranks; None where there is none. Says so where a newer one
    is damaged; raises UserError where all are."""
    there = sorted(folder.glob("step_*"), key=step_of, reverse=True) if dist.get_rank() == 0 else []
    found, damaged = torch.tensor(0), []  # found: its step
    for checkpoint in there:
        try:
            check_checkpoint(checkpoint, state)
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"{damaged[0]}; {checkpoint} is the newest whole one", flush=True)
        found += step_of(checkpoint)
        break
    if damaged and not found:
        raise UserError(f"no whole checkpoint: {damaged[0]}")
    dist.broadcast(found, 0)
    return folder / f"step_{int(found):06d}" if found else None


def load_checkpoint(checkpoint: Path, state: dict[str, Tensor]) -> None:
    """Reads a checkpoint that is whole into the tensors of `state`, of which each rank has its shards."""
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    for name, tensor in state.items():
        if not (tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all():
            raise UserError(
                f"{checkpoint}: {name} has numbers that are not finite; remove it to continue from another"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Where a run begins.


def begin(settings: Settings, model: nn.Module, optimizer: Optimizer, about: dict) -> int:
    """Readies --out for a run; with --resume loads its newest checkpoint, which has to be `about` the same settings and
    data. Returns the step after which the run begins."""
    checkpoints, log, start = (
        Path(settings.out, "checkpoints"),
        Path(settings.out, "metrics.jsonl"),
        0,
    )
    refuse_unfinished(settings, checkpoints)
    state = training_state(model, optimizer)
    if settings.resume and (newest := newest_whole(checkpoints, state)):
        if not settings.resume_changed:
            check_same_run(newest, about)
        load_checkpoint(newest, state)
        start = step_of(newest)
    dist.barrier()  # before what they have read is removed
    if dist.get_rank() == 0:
        if not settings.resume:
            shutil.rmtree(checkpoints, ignore_errors=True)
        for unfinished in checkpoints.glob(".*"):  # what a killed run was writing or removing
            shutil.rmtree(unfinished)
        # Its last line may be half written, after the checkpoint.
        logged = log.read_text().splitlines()[:start] if start and log.is_file() else []
        data.write_file(log, "".join(f"{line}\n" for line in logged))
    return start


def refuse_unfinished(settings: Settings, checkpoints: Path) -> None:
    """Raises UserError where a new run would remove the checkpoints of one that has not been exported."""
    found = sorted(checkpoints.glob("step_*"), key=step_of)
    head = Path(settings.out, "reward_head.safetensors")
    exported = head.is_file() and found and head.stat().st_mtime > found[-1].stat().st_mtime
    if found and not exported and not settings.resume:
        raise UserError(
            f"{found[-1]} is of a run that has not ended; --resume continues it, or remove {checkpoints}"
        )


def fingerprint(folders: list[str]) -> str:
    """Of training data: what it was made with, and lengths and hashes of all its comparisons."""
    made_of = hashlib.sha256()
    for folder in folders:
        for name in ("dataset.json", "index.safetensors"):
            made_of.update(hashlib.sha256(Path(folder, name).read_bytes()).digest())
    return made_of.hexdigest()[:16]


def check_same_run(checkpoint: Path, about: dict) -> None:
    """Raises UserError where a checkpoint was made with another recipe or other data."""
    with data.reading(checkpoint, "remove it, or continue with --resume_changed"):
        made_with = json.loads((checkpoint / "run.json").read_text())
        was, its_data = dict(made_with["settings"]), made_with["data"]
    now = about["settings"]
    names = [field.name for field in dataclasses.fields(Recipe)]
    differ = [
        f"--{name} {was.get(name)} (now {now[name]})"
        for name in names
        if was.get(name) != now[name]
    ]
    if its_data != about["data"]:
        differ.append("other data in --data than is there now")
    if differ:
        wanted = "give the same, continue so with --resume_changed, or start anew in another --out"
        raise UserError(f"{checkpoint} was made with {', '.join(differ)}; {wanted}")


# ---------------------------------------------------------------------------------------------------------------------
# --plan, before anyone rents a GPU: what a run computes, needs and takes, from the lengths in the shards and the shapes
# in config.json. Nothing above needs any of this.


@dataclass
class Work:
    """What the cost of comparisons follows from: arrays [n], one number each, or their sums."""

    tokens: np.ndarray  # of the packed rows
    pairs: np.ndarray  # (query, key) in a decoder layer: P^2 / 2 + sum of (R P + R^2 / 2)
    joined: (
        np.ndarray
    )  # keys that attention copies to put a prompt before each response: sum of (P + R)
    patches: np.ndarray  # of the images
    image_pairs: np.ndarray  # (query, key) in a vision block that attends over whole images
    window_pairs: np.ndarray  # in one that attends within windows


def work_of(
    config: PreTrainedConfig,
    prompts: np.ndarray,
    responses: np.ndarray,
    starts: np.ndarray,
    grids: np.ndarray,
    image_starts: np.ndarray,
) -> np.ndarray:
    """The fields of Work, [n, 6], of n comparisons: tokens of their prompts [n], of all responses [N], and where each
    one's responses begin [n + 1]; all images' grids in patches [images, 3], and where each one's begin [n + 1]."""
    summed = lambda values, starts: np.diff(np.concatenate([[0], np.cumsum(values)])[starts])
    answers, (time, height, width) = summed(responses, starts), grids.astype(float).T
    vision = getattr(config, "vision_config", None)
    side = vision.window_size // vision.patch_size if vision else 1  # of a window, in patches
    squares = lambda length: (
        length // side * side**2 + (length % side) ** 2
    )  # windows at the edge are smaller
    columns = [
        prompts + answers,
        prompts**2 / 2 + prompts * answers + summed(responses**2, starts) / 2,
        np.diff(starts) * prompts + answers,
        summed(time * height * width, image_starts),
        summed(time * (height * width) ** 2, image_starts),
        summed(time * squares(height) * squares(width), image_starts),
    ]
    return np.stack(columns, axis=1)


def work_to_plan(settings: Settings, config: PreTrainedConfig) -> tuple[np.ndarray, str]:
    """The fields of Work for every comparison in the shards, or for the assumed one, [n, 6], and in words what they are
    of. The tokenizer of the shards is not compared with the model's."""
    if settings.plan_lengths:
        if (
            len(settings.plan_lengths) < 3
            or settings.plan_lengths[1]
            and not hasattr(config, "vision_config")
        ):
            raise UserError(
                "--plan_lengths: tokens of text, of an image (0 for a text-only model), of each response"
            )
        text, image, *responses = settings.plan_lengths
        merge = config.vision_config.spatial_merge_size if image else 1
        grids = np.full((int(image > 0), 3), [1, *[merge * image**0.5] * 2])  # square
        starts, of_image = np.array([0, len(responses)]), np.array([0, len(grids)])
        found = work_of(
            config, np.array([text + image]), np.array(responses), starts, grids, of_image
        )
        return (
            found,
            f"assumed: {text} tokens of text, {image} of an image, responses of {responses}",
        )

    def of_shard(shard) -> np.ndarray:
        prompts, responses = np.diff(shard.offsets["prompts"]), np.diff(shard.offsets["responses"])
        grids = shard.grids[shard.image_index]
        return work_of(
            config, prompts, responses, shard.offsets["ranks"], grids, shard.offsets["image_index"]
        )

    sets = [data.Comparisons(folder) for folder in settings.data]
    named = ", ".join(f"{each.folder} (tokens of {each.info['backbone']})" for each in sets)
    found = [of_shard(each.open(k)) for each in sets for k in range(len(each.info["shards"]))]
    if not found:
        raise UserError(f"{named}: no comparisons in there; see rejected.jsonl for why")
    found = np.concatenate(found)
    return found, f"the mean of {len(found):,} in {named}"


def flops(
    config: PreTrainedConfig,
    work: Work,
    freeze_vision: bool = False,
    activation_checkpointing: bool = False,
) -> dict[str, float]:
    """Floating-point operations of forward and backward, by part; a multiply-add is two.

    A matmul's backward is two of its size. Activation checkpointing repeats each layer's forward but for the last
    matmul, whose output nothing needs. Counted are matmuls, the patch convolution and attention (QK' and its product
    with V; a kernel that computes the scores again in its backward does a little more), not the reward head.
    Source: the modules of transformers' modeling_qwen2_5_vl.py.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    hidden, mlp = (
        text.hidden_size,
        text.hidden_size * text.intermediate_size,
    )  # mlp: weights of one of its three
    keys = (
        hidden // text.num_attention_heads * text.num_key_value_heads
    )  # width of all keys, and of all values
    last = 2 * work.tokens * mlp
    layer = (
        2 * work.tokens * (2 * hidden**2 + 2 * hidden * keys) + 3 * last + 4 * work.pairs * hidden
    )
    counted = {
        "language model": text.num_hidden_layers
        * (3 * layer + activation_checkpointing * (layer - last))
    }
    if vision is not None:
        width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
        last = 2 * work.patches * width * vision.intermediate_size
        whole = len(vision.fullatt_block_indexes)
        attention = (
            4 * width * (whole * work.image_pairs + (vision.depth - whole) * work.window_pairs)
        )
        blocks = vision.depth * (2 * work.patches * 4 * width**2 + 3 * last) + attention
        merger = (
            2
            * work.patches
            / vision.spatial_merge_size**2
            * merged
            * (merged + vision.out_hidden_size)
        )
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        embedding = (
            2 * work.patches * patch * width
        )  # in backward, only for its weights: pixels have no gradient
        again = activation_checkpointing * (blocks - vision.depth * last)
        trained = 3 * (blocks + merger) + 2 * embedding + again
        counted["vision tower"] = blocks + merger + embedding if freeze_vision else trained
    return counted


def activations(
    config: PreTrainedConfig,
    row: Work,
    freeze_vision: bool = False,
    activation_checkpointing: bool = False,
    width: int = 2,
) -> dict[str, float]:
    """Bytes that autograd keeps of one micro-batch, by part; `width` is the bytes of a number in the layers.

    Each layer: both norms keep their input in float32, its normalised form and their output; attention its queries,
    keys, values, output, and that once more as the projection's input; the MLP gate, SiLU(gate), up and their product.
    With activation checkpointing each layer keeps its input, and one at a time is there whole, recomputed.
    Source: the modules of transformers' modeling_qwen2_5_vl.py. The masks of attention are not counted.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    kept = lambda layer, inputs, depth: (
        depth * inputs + layer if activation_checkpointing else depth * layer
    )
    hidden, keys = (
        text.hidden_size,
        text.hidden_size // text.num_attention_heads * text.num_key_value_heads,
    )
    layer = row.tokens * (8 * hidden + width * (7 * hidden + 2 * keys + 4 * text.intermediate_size))
    layer += row.joined * width * 2 * keys  # the prompt's keys and values before each response's
    parts = {
        "language model": kept(layer, row.tokens * width * hidden, text.num_hidden_layers),
        "vision tower": 0.0,
    }
    if vision is not None and not freeze_vision:
        hidden = (
            vision.hidden_size
        )  # queries, keys and values also stay as one tensor, from before the rotation
        block = row.patches * (8 * hidden + width * (11 * hidden + 4 * vision.intermediate_size))
        merger = row.patches * hidden * (4 + 4 * width)
        parts["vision tower"] = kept(block, row.patches * width * hidden, vision.depth) + merger
    return parts


def memory(
    model: nn.Module,
    row: Work,
    ranks: int,
    freeze_vision: bool = False,
    activation_checkpointing: bool = False,
    width: int = 2,
) -> dict[str, float]:
    """Bytes on one of the `ranks` that share `model` (it may be on the meta device), by part, at the moment of a step
    when they are most, with micro-batches like `row`; `width` is 2 where layers compute in bfloat16, 4 in float32.

    Not in it: what single operations need for themselves, the CUDA context, NCCL's buffers, fragmentation.
    """
    size = lambda module: sum(p.numel() for p in module.parameters()) if module is not None else 0
    parts = model_stage.parts_of(model.backbone)
    layers = parts.language.layers
    everything, vision, layer = size(model), size(parts.vision), size(layers[0])
    root = (
        everything - vision - len(layers) * layer
    )  # FSDP's last unit: the embedding, for the most part
    trained = everything - freeze_vision * vision
    kept = activations(model.backbone.config, row, freeze_vision, activation_checkpointing, width)
    # Of a unit that is reduced: its gradient, that in float32 for the reduce-scatter, and the shard that comes of it.
    reduced = width + 4 + 4 / ranks
    moments = [  # activations; gathered parameters; gradients on their way
        # Backward begins; gathered are the root, the layer in use and the next one.
        (*kept.values(), width * (root + 2 * layer), reduced * layer),
        # It comes to the vision tower, one unit, which is received in one piece and copied into its parameters.
        (0.0, kept["vision tower"], width * (root + vision + (ranks > 1) * vision), 0.0),
        # It ends with the gradients of the largest units.
        (0.0, 0.0, width * root, reduced * max(root, vision - freeze_vision * vision)),
    ]
    names = (
        *(f"activations, {part}" for part in kept),
        "gathered parameters",
        "gradients on their way",
    )
    sharded = {
        "parameters": 4 * everything,
        "gradients": 4 * trained,
        "AdamW's two moments": 8 * trained,
    }
    return {part: count / ranks for part, count in sharded.items()} | dict(
        zip(names, max(moments, key=sum))
    )


def model_to_plan(path: str) -> RewardModel:
    """A naive reward model with the shapes of the config.json in `path`, on the meta device. Raises UserError where it
    is of a kind or family whose cost is not known here."""
    started = Path(path, model_stage.HEAD_FILE).is_file()
    if started and (kind := RewardModel.from_pretrained(path, empty=True).kind) != "naive":
        raise UserError(f"{path}: only naive reward models are planned, and this one is {kind}")
    backbone = model_stage.load_backbone(path, empty=True)
    if not data.FAMILIES[backbone.config.model_type].planned:
        known = ", ".join(name for name, family in data.FAMILIES.items() if family.planned)
        raise UserError(
            f"{path}: a {backbone.config.model_type}, which --plan does not know; it knows {known}"
        )
    with torch.device("meta"):
        head = model_stage.RewardHead(backbone.config.get_text_config().hidden_size)
        return RewardModel(backbone, head, None)


def print_plan(settings: Settings) -> None:
    """Prints what the run that the settings describe computes, needs and takes, with every assumption. Reads lengths
    from the shards and shapes from config.json; loads no weights and trains nothing."""
    model, gpus = model_to_plan(settings.model), settings.gpus or dist.get_world_size()
    if settings.shard_size and gpus % settings.shard_size:
        raise UserError(f"--shard_size {settings.shard_size}: has to divide the {gpus} GPUs")
    config, how = model.backbone.config, (settings.freeze_vision, settings.activation_checkpointing)
    work, source = work_to_plan(settings, config)
    count = settings.plan_comparisons or len(work)
    steps = settings.steps or math.ceil(count * settings.epochs / settings.batch_size)

    # The micro-batches of a few steps as they will be. `plan` gives the heaviest of those that run at the same time to
    # the first rank, so its are the largest, and the others wait for them. The longest comparison may be in none.
    order = order_of_training(len(work), dataclasses.replace(settings, steps=min(steps, 20)))
    tokens, patches = work[:, 0].astype(int), work[:, 3].astype(int)
    micro_batches = plan(order, tokens, patches, settings.micro_tokens, 0, gpus)
    rows, cost = [batch.indices for batch in micro_batches], tokens + patches // 4
    largest = max([*rows, [int(cost.argmax())]], key=lambda row: cost[row].sum())
    row, mean = Work(*work[largest].sum(axis=0)), Work(*work.mean(axis=0))
    waiting = 1 + imbalance(micro_batches)

    shards = settings.shard_size or gpus
    parts = memory(model, row, shards, *how)
    spent = flops(config, mean, *how)  # on a comparison
    reached = gpus * settings.gpu_flops * settings.utilisation
    computing = sum(spent.values()) * settings.batch_size * waiting / reached
    everything = sum(p.numel() for p in model.parameters())
    # Of every micro-batch: parameters in bfloat16 for forward and backward, then gradients in float32. Within groups of
    # --shard_size, which have a fast network of their own, that is free; between them gradients are reduced and sent.
    per_step = len(micro_batches) / len(order)
    travelling = (
        (2 * 2 + 4) * (gpus - 1) / gpus if shards == gpus else 2 * 4 / shards
    )  # bytes of each parameter
    traffic = per_step * travelling * everything
    moving = traffic / settings.gpu_link
    hours = steps * max(computing, moving) / 3600

    heading = lambda title, unit: print(f"\n{title:<30}{unit:>14}")
    line = lambda name, number, note="": print(
        f"  {name:<28}{number:>14,.4g}{note and f'  {note}'}"
    )

    run = steps * settings.batch_size
    tower, kept = ("frozen" if how[0] else "trained"), ("recomputed" if how[1] else "kept")
    print(f"model  {settings.model}: {everything:,} parameters with a reward head of two layers")
    print(f"data   {count:,} comparisons; {source}")
    print(
        f"run    {steps:,} steps of {settings.batch_size}, {run / count:.2f} epochs, on {gpus} GPUs;",
        end=" ",
    )
    print(f"vision tower {tower}, activations {kept}")
    heading("work", "a comparison")
    line("tokens", mean.tokens, f"{mean.tokens * run:.3g} in the run")
    line("image patches", mean.patches, f"{mean.patches * run:.3g} in the run")
    for part, each in spent.items():
        line(f"TFLOP, {part}", each / 1e12, f"{each * run / 1e12:.3g}")

    heading("memory of a GPU", "GB")
    for part, each in parts.items():
        line(part, each / 1e9)
    needed = sum(parts.values()) / 1e9
    fits = "fits in" if needed < 0.9 * settings.gpu_memory else "does NOT fit in"
    line(
        "all of it",
        needed,
        f"{fits} {settings.gpu_memory:g} GB, a tenth kept free for what is not counted",
    )
    print(
        f"  a step is {per_step:.1f} micro-batches; its largest {row.tokens:,.0f} tokens, {row.patches:,.0f} patches"
    )

    heading("disk", "GB")
    if every := settings.checkpoint_every:
        kept = shards * (
            parts["parameters"] + parts["AdamW's two moments"]
        )  # of all ranks that share the model
        line("a checkpoint", kept / 1e9, f"every {every} steps; two stay, a third is written")
    line(
        "the trained model",
        (2 if settings.export_dtype == "bf16" else 4) * everything / 1e9,
        settings.export_dtype,
    )

    heading("time", "s a step")
    speed = f"at {settings.utilisation:.0%} of {settings.gpu_flops / 1e12:g} TFLOP/s"
    line("computing", computing, f"{speed}; the fullest GPU has {waiting:.2f} times the mean work")
    moved = f"{traffic / 1e9:.1f} GB through each GPU at {settings.gpu_link / 1e9:g} GB/s"
    line("communicating", moving, f"{moved}, while it computes")
    print(
        f"{hours:,.1f} hours, {hours * gpus:,.0f} GPU-hours: the longer of both, without validations and checkpoints"
    )


# ---------------------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    data.check_least(settings, batch_size=1, steps=0, validation_size=1, micro_tokens=1)
    if not settings.steps and settings.epochs <= 0:
        raise UserError(f"--epochs {settings.epochs:g}: has to be more than 0")
    if settings.plan:
        if dist.get_rank() == 0:
            print_plan(settings)
        return
    last = train(settings)
    if dist.get_rank() == 0:
        validated = (
            f", validation accuracy {last['validation_accuracy']:.3f}"
            if "validation_accuracy" in last
            else ""
        )
        print(
            f"{settings.out}: the trained reward model{validated}; metrics in {settings.out}/metrics.jsonl"
        )
        data.say_next("04_eval.py", model=data.unless_default(settings, "out"))


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
