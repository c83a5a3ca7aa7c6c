"""Stage 3: train the reward model with FSDP2 and the pairwise ranking loss

    torchrun --standalone --nproc_per_node=2 03_train.py
    torchrun --standalone --nproc_per_node=8 03_train.py --learning_rate 3e-6 --batch_size 128
    python 03_train.py --plan --gpus 64    # train nothing: print what such a run needs

In    artifacts/model, a reward model (02), and artifacts/data/train, comparisons (01)
Out   artifacts/reward: the trained model, metrics.jsonl with a line per step, checkpoints/

The loss is -log sigmoid(r_w - r_l), with r_w the score of the better response and r_l of the worse:
Bradley-Terry's negative log-likelihood, if w wins with probability sigmoid(r_w - r_l). A ranking of
N > 2 responses contributes the mean over its ordered pairs (InstructGPT, arXiv 2203.02155); one
that 01 joined from separate pairs contributes their sum.

Keep one idea in mind: the gradient of a step does not depend on the number of ranks. The seed
decides which comparisons make up a step, bin packing deals them to ranks, no score depends on the
row that a comparison is packed into (02), and every loss is divided by the weight of the whole
step, the sum of `Comparison.weight`. So a run may continue on another number of ranks.

The paper trains with learning rate 3e-6 and batches of 128 on 64 GPUs. It does not state optimizer,
schedule, epochs, or whether the vision tower is frozen: settings marked "authors" are those of the
authors' public command for a text-only reward model. Other defaults suit the embedded backbone.
"""

import dataclasses
import heapq
import importlib
import json
import math
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

data = importlib.import_module("01_data")  # `import 01_data` would be a syntax error
model_stage = importlib.import_module("02_model")
option = data.option
UserError = data.UserError
RewardModel = model_stage.RewardModel


# --------------------------------------------------------------------------------------------------
# 1. Who reads what. Every rank computes the same plan from the lengths and the seed.


def order_of_training(count: int, settings: "Settings") -> list[list[int]]:
    """Cut one shuffle per epoch into steps, as lists of indices.

    If the epochs do not fill the last step, the next shuffle does.
    """
    steps = settings.steps or math.ceil(count * settings.epochs / settings.batch_size)
    needed = steps * settings.batch_size
    rng = np.random.default_rng(settings.seed)
    epochs = [rng.permutation(count) for _ in range(math.ceil(needed / count))]
    return np.concatenate(epochs)[:needed].reshape(steps, settings.batch_size).tolist()


def deal(indices: list[int], cost: np.ndarray, bins: int) -> list[list[int]]:
    """Greedy bin packing: the most expensive comparison first, each into the emptiest bin."""
    dealt = [[] for _ in range(bins)]
    filled = [(0, k) for k in range(bins)]  # a heap of (cost, bin): the emptiest comes first
    for i in sorted(indices, key=lambda i: (-cost[i], i)):
        cost_of_bin, k = filled[0]
        dealt[k].append(i)
        heapq.heapreplace(filled, (cost_of_bin + cost[i], k))
    return dealt


@dataclass
class MicroBatch:
    step: int
    indices: list[int]  # this rank's comparisons; if none, the row is a prompt without responses
    last: bool  # the step's last micro-batch: the optimizer steps after it
    step_weight: int  # sum of Comparison.weight over the whole step, all ranks
    dummy_image: bool  # another rank has an image here and this one has none
    costs: list[int]  # of each rank's part of this micro-batch


def plan(steps, tokens, patches, micro_tokens, rank, world, weights=None) -> list[MicroBatch]:
    """Deal the comparisons of each step to micro-batches and ranks; return those of one rank.

    All ranks get equally many micro-batches, since FSDP's all-gathers need all ranks, and about
    equal work, since all wait for the slowest. A rank without an image would skip the vision tower
    while the others wait in the tower's all-gather forever: it reads a blank one (`dummy_image`),
    whose gradient is zero. `steps` are lists of indices; `tokens`, `patches`, `weights` are [n].

    A bin is what one rank reads in one micro-batch; a round is one bin per rank. Example: 2 ranks,
    at most 6 a bin, costs 5, 4, 3, 2, 2. Two bins hold 12 of the 16, so it takes two rounds, four
    bins: [5], [4], [3], [2, 2]. Sorted by cost, the ranks read [5] and [4], then [2, 2] and [3].
    """
    cost = tokens + patches // 4  # a guess: in the smaller tower a patch costs a quarter token

    def work(indices: list[int]) -> int:
        return int(cost[indices].sum())

    micro_batches = []
    for step, indices in enumerate(steps):
        rounds = max(1, math.ceil(work(indices) / (micro_tokens * world)))
        bins = deal(indices, cost, rounds * world)
        weight = len(indices) if weights is None else int(weights[indices].sum())
        budget = max([micro_tokens, *cost[indices]])  # one long comparison may exceed micro_tokens
        while max(map(work, bins)) > budget:  # ends at the latest with one comparison per bin
            rounds = math.ceil(1.01 * rounds)  # one more, or 1% where there are many
            bins = deal(indices, cost, rounds * world)
        bins.sort(key=work, reverse=True)  # bins that run at the same time cost about the same
        for k in range(rounds):
            together = bins[k * world : (k + 1) * world]  # one bin per rank
            has_image = [bool(patches[part].any()) for part in together]
            dummy = any(has_image) and not has_image[rank]
            costs = list(map(work, together))
            last = k == rounds - 1
            micro_batches.append(MicroBatch(step, together[rank], last, weight, dummy, costs))
    return micro_batches


# --------------------------------------------------------------------------------------------------
# 2. The loss.


@dataclass
class Pairs:
    """All (better, worse) pairs of a row, as indices into its N scores."""

    better: Tensor  # [pairs]
    worse: Tensor  # [pairs]
    weight: Tensor  # [pairs] Comparison.weight / number of its pairs
    lengths: Tensor  # [N] tokens of each response

    def to(self, device: torch.device) -> "Pairs":
        return model_stage.change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def pairs_of(comparisons: list) -> Pairs:
    """List the pairs of the comparisons of a row. Where all responses tie, there are none."""
    better, worse, weight, lengths = [], [], [], []
    for comparison in comparisons:
        start = len(lengths)  # responses of the comparisons before
        pairs = comparison.pairs
        better += [start + i for i, _ in pairs]
        worse += [start + j for _, j in pairs]
        weight += [comparison.weight / max(1, len(pairs))] * len(pairs)
        lengths += map(len, comparison.responses)
    index = partial(torch.tensor, dtype=torch.long)
    return Pairs(index(better), index(worse), torch.tensor(weight), index(lengths))


def ranking_loss(
    scores: Tensor, pairs: Pairs, zero_coefficient: float = 0.0, length_normalisation: bool = False
) -> Tensor:
    """Sum the paper's loss (Algorithm 1) over the comparisons of a row; its scores are [N].

    The paper tried both regularisers and uses neither. The first pulls scores to zero, since the
    loss leaves their offset open; the second divides them by log(tokens + 1).
    """
    if length_normalisation:
        scores = scores / torch.log(pairs.lengths + 1.0)
    better = scores[pairs.better]  # [pairs]
    worse = scores[pairs.worse]  # [pairs]
    loss = -F.logsigmoid(better - worse) + zero_coefficient * (better + worse) ** 2
    return (pairs.weight * loss).sum()


def loss_and_scores(model, row, pairs: Pairs, settings: "Settings") -> tuple[Tensor, Tensor]:
    """Score a packed row; return its loss, summed over comparisons, and the scores [N]."""
    scores = model(row)
    loss = ranking_loss(scores, pairs, settings.zero_coefficient, settings.length_normalisation)
    return loss, scores


# --------------------------------------------------------------------------------------------------
# 3. FSDP2. Each rank stores a share of every parameter, gradient and AdamW moment. `fully_shard`
# makes a module a unit: its parameters are gathered before its forward and backward (all-gather),
# its gradients are averaged over ranks, each rank keeping its share (reduce-scatter). In order:
#   a. Build the backbone (not the small head) empty, on the meta device. Else every rank of a node
#      would hold a whole copy first, 31 GB for a 7B.
#   b. Freeze what is not trained, before c: FSDP then neither makes nor reduces gradients for it.
#   c. Shard from the inside out, as a unit takes the parameters that no inner unit has.
#   d. Load the weights: rank 0 reads the checkpoint, every rank keeps its share. A sharded
#      parameter is a DTensor, and `full_tensor()` gathers it.
#   e. Make the optimizer after c, which replaces parameters by their shards: it must hold those.
# Gradient accumulation needs no switch: each micro-batch adds its reduced gradients to the shards.
# Reducing once per step (`set_requires_gradient_sync`) would save traffic, but each rank would hold
# all gradients whole in float32, 31 GB for a 7B.


def shard(
    model: nn.Module,
    backbone: nn.Module,
    device: torch.device,
    activation_checkpointing: bool = False,
    in_float32: list[nn.Module] = (),
    shard_size: int = 0,
    compile: bool = False,
) -> None:
    """Shard `model`, which contains the transformers model `backbone`, in place (c)."""
    mesh = mesh_of(device, shard_size)
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        # AdamW updates shards in float32, where a step of 3e-6 is not rounded away. FSDP casts what
        # it gathers to bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = model_stage.parts_of(backbone)
    if activation_checkpointing:
        backbone.activation_checkpointing_enable()
        # It also makes embeddings require gradients: a frozen tower would run backward for nothing.
        backbone.disable_input_require_grads()
    if compile:
        for layer in [*parts.language.layers, *parts.blocks]:
            layer.compile(dynamic=True)  # lengths differ from row to row
    if parts.vision is not None:  # one unit: it is small, and one gather beats one per block
        fully_shard(parts.vision, mesh=mesh, mp_policy=policy)
    for layer in parts.language.layers:  # a unit each: only one or two are whole at a time
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for module in in_float32:  # the reward head
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the rest: embeddings and last norm


def make_optimizer(model: nn.Module, settings: "Settings") -> torch.optim.AdamW:
    """Make AdamW (e) and allocate its state, since a checkpoint is loaded into existing tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    betas = (0.9, settings.beta2)
    optimizer = torch.optim.AdamW([matrices, vectors], settings.learning_rate, betas, fused=True)
    allocate_moments(optimizer, trained)  # in the appendix
    return optimizer


# --------------------------------------------------------------------------------------------------
# 4. Training.


@dataclass
class Recipe:
    """The settings that decide the trained weights: an interrupted run resumes with the same."""

    model: str = option("artifacts/model", "reward model from 02, or a trained one to continue")
    data: list[str] = option([], "comparisons (01), repeatable; none: artifacts/data/train")
    steps: int = option(0, "optimizer steps; 0: as many as --epochs take")
    epochs: float = option(1.0, "passes over the data if --steps is 0 (authors: 1)")
    batch_size: int = option(64, "comparisons per step, over all ranks (paper: 128)")
    learning_rate: float = option(4e-4, "peak learning rate of AdamW (paper: 3e-6, for 7B)")
    warmup: float = option(0.05, "fraction of the steps for linear warm-up (authors: 0.05)")
    weight_decay: float = option(0.1, "AdamW weight decay, matrices only (authors: 0.1)")
    beta2: float = option(0.95, "AdamW beta2 (authors: 0.95)")
    clip: float = option(1.0, "largest norm of a step's gradient; 0: any")
    zero_coefficient: float = option(0.0, "weight of (r_w + r_l)^2 (paper: 0, tried up to 0.1)")
    length_normalisation: bool = option(False, "train on r / log(tokens + 1) (paper: tried, off)")
    critique_coefficient: float = option(1.0, "critics: weight of the critiques' loss")
    freeze_vision: bool = option(False, "do not train the vision tower (authors: frozen)")
    lora_rank: int = option(0, "train adapters of this rank and the head alone; 0: all (paper)")
    seed: int = option(0, "seed of the order of the data")

    def __post_init__(self):
        self.data = self.data or ["artifacts/data/train"]


def learning_rate_at(step: int, steps: int, settings: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(settings: "Settings") -> dict:
    """Train a reward model, export it to `settings.out`, and return the last line of metrics."""
    rank, world, device = data.start_distributed()
    model = RewardModel.from_pretrained(settings.model, empty=True)  # a
    comparisons, held_out = open_data(settings, model.processors, model.rewrite)
    tokens, patches = comparisons.sizes()
    order = order_of_training(len(comparisons), settings)
    weights = comparisons.weights()
    micro_batches = plan(order, tokens, patches, settings.micro_tokens, rank, world, weights)

    freeze(model.backbone, settings, device)  # b
    heads = [module for module in model.modules() if isinstance(module, model_stage.RewardHead)]
    recompute = settings.activation_checkpointing
    options = {"shard_size": settings.shard_size, "compile": settings.compile}
    shard(model, model.backbone, device, recompute, in_float32=heads, **options)  # c
    load_weights(model.backbone, settings.model, device)  # d (b and d: appendix)
    optimizer = make_optimizer(model, settings)  # e

    state = training_state(model, optimizer)
    run = describe_run(settings)
    start = begin(settings, state, run)  # 0, or the step of a checkpoint
    log = Log(settings, model, micro_batches, patches, start)  # metrics.jsonl and a progress bar
    sigterm = []  # filled when the machine is about to be taken away (spot preemption)
    signal.signal(signal.SIGTERM, lambda *_: sigterm.append(True))
    sums = torch.zeros(4, device=device)  # of a step: loss, right pairs, margins; SIGTERMs
    rest = [micro for micro in micro_batches if micro.step >= start]
    model.train()
    # Worker processes pack rows while the model trains on earlier ones.
    for micro, row, pairs in log.timing(load(comparisons, rest, model, device, settings.workers)):
        # Gradients add up until the step's last micro-batch. Let g_k be the gradient of rank k's
        # loss, a sum over comparisons. FSDP leaves the mean over ranks; the factor
        # world / step_weight makes it (g_0 + g_1 + ...) / step_weight: what a single rank would
        # compute from the whole step, but for rounding.
        loss, scores = LOSSES[model.kind](model, row, pairs, settings)  # naive: `loss_and_scores`
        (loss * world / micro.step_weight).backward()
        margins = (scores[pairs.better] - scores[pairs.worse]).detach()  # [pairs]
        right = (pairs.weight * (margins > 0)).sum()
        sums[:3] += torch.stack([loss.detach(), right, (pairs.weight * margins).sum()])
        if not micro.last:
            continue

        # Clip, and add up the figures of all ranks. Only here does the CPU wait for a GPU.
        norm = clip_grad_norm_(model.parameters(), settings.clip or math.inf).full_tensor()
        sums[3] = len(sigterm)
        dist.all_reduce(sums)
        stopping = sums[3].item() > 0  # one rank's signal stops all
        loss, accuracy, margin = (sums[:3] / micro.step_weight).tolist()
        norm = norm.item()
        step = micro.step + 1
        if not math.isfinite(loss + norm):
            names = [str(comparisons[i]) for i in order[micro.step]]
            bad = f"step {step}: loss {loss:g}, norm of the gradient {norm:g}"
            raise UserError(f"{bad}, from {len(names)} comparison(s): {', '.join(names)}")

        # Update.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(micro.step, len(order), settings)
        optimizer.step()
        optimizer.zero_grad()
        sums.zero_()

        # Validate and log.
        line = {
            "step": step,
            "loss": loss,
            "accuracy": accuracy,  # fraction of right pairs, a weighted mean over comparisons
            "margin": margin,  # mean score of the better response minus the worse
            "grad_norm": norm,  # before clipping
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens": int(tokens[order[micro.step]].sum()),  # of the packed rows of all ranks
            **log.seconds(),
        }
        validation_due = step % (settings.validate_every or math.inf) == 0
        if held_out and (validation_due or step == len(order)):
            line |= validate(model, held_out, settings, device)
        log.write(line)

        # Save a checkpoint; on SIGTERM exit.
        checkpoint_due = step % (settings.checkpoint_every or math.inf) == 0
        if (checkpoint_due or stopping) and step < len(order):
            save_checkpoint(Path(settings.out, "checkpoints"), step, state, run)
            if stopping:
                raise UserError(f"stopped by SIGTERM after step {step}; continue with --resume")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    export(model, settings, len(order), log.line)
    return log.line


# --------------------------------------------------------------------------------------------------
# 5. A checkpoint holds
#   - what is trained and AdamW's state as safetensors, of which each rank writes its share;
#   - run.json: the step, the recipe, hashes of the data and of the head that training began with.
# Nothing else is needed: order and learning rate follow from seed and step, there is no dropout.
# Each file says which slice of a parameter it holds, and any number of ranks reads the slices it
# needs; on as many as before, the run ends in the same weights, bit for bit. `begin` (appendix)
# finds the newest one, compares its run.json and removes what a crash has left unfinished.


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect by name, without copies, the trained parameters and their optimizer tensors."""
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state[f"model.{name}"] = parameter.detach()
        for key, tensor in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = tensor
    return state


def save_checkpoint(folder: Path, step: int, state: dict, run: dict, keep: int = 2) -> None:
    """Write a checkpoint under another name and rename it when all ranks are done.

    So a folder called step_000050 is whole. `run` goes into its run.json.
    """
    final = folder / f"step_{step:06d}"
    unfinished = folder / f".writing_{step:06d}"
    with data.writing(final), one_error():  # a full disk gives one line
        if dist.get_rank() == 0:
            unfinished.mkdir(parents=True)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(state, storage_writer=writer)  # on rank 0 it returns when all ranks have written
        if dist.get_rank() == 0:
            data.write_file(unfinished / "run.json", json.dumps({"step": step, **run}, indent=1))
            unfinished.rename(final)
            for old in sorted(folder.glob("step_*"))[:-keep]:
                # Rename first: a crash while deleting must not leave half a folder called step_...
                shutil.rmtree(old.rename(folder / f".old_{old.name}"))
        dist.barrier()


def load_checkpoint(checkpoint: Path, state: dict) -> None:
    """Read a checkpoint into the tensors of `state`, of which each rank has a share."""
    with data.reading(checkpoint, "remove it"), one_error():
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))


# --------------------------------------------------------------------------------------------------
# Appendix: settings that do not change the trained weights.


@dataclass
class Settings(Recipe):
    """All settings of this stage."""

    out: str = option("artifacts/reward", "folder for the model, metrics.jsonl and checkpoints/")
    validation: str = option("auto", "comparisons; auto: <data>_holdout of the first; '': none")
    validate_every: int = option(25, "steps between validations; 0: only at the end")
    validation_size: int = option(256, "comparisons of a validation, always the same")
    checkpoint_every: int = option(50, "steps between checkpoints (two stay); 0: on SIGTERM only")
    resume: bool = option(False, "continue from the newest checkpoint in --out, if there is one")
    resume_changed: bool = option(False, "with --resume: even if recipe or data have changed")
    micro_tokens: int = option(8192, "tokens of a forward on one rank, as memory allows (--plan)")
    activation_checkpointing: bool = option(False, "recompute layers in backward: less memory")
    shard_size: int = option(0, "ranks that share a copy of the model, as in one node; 0: all")
    compile: bool = option(False, "torch.compile each layer, for GPUs; takes minutes to start")
    workers: int = option(1, "processes of a rank that read ahead; 0: the step reads")
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "dtype of the exported backbone")
    plan: bool = option(False, "train nothing: print what a run computes, needs and takes")
    gpus: int = option(0, "--plan: GPUs; 0: as many as there are ranks now (paper: 64)")
    gpu_memory: float = option(80.0, "--plan: memory of a GPU in GB (80: H100)")
    gpu_flops: float = option(989e12, "--plan: peak FLOP/s in bfloat16 (989e12: H100 SXM)")
    gpu_link: float = option(50e9, "--plan: bytes/s into a GPU (50e9: 400 Gb/s between nodes)")
    utilisation: float = option(0.4, "--plan: assumed share of the peak")
    plan_comparisons: int = option(0, "--plan: comparisons; 0: those in --data (paper: 2.8 M)")
    plan_lengths: list[int] = option([], "--plan: not --data but tokens of text, image, responses")


# --------------------------------------------------------------------------------------------------
# Appendix: data and validation. Worker processes read, decode and pack ahead of the step.


class Mixture(ConcatDataset):
    """Several sets of comparisons as one."""

    def sizes(self) -> np.ndarray:
        """Tokens and image patches of all comparisons, [2, n]."""
        return np.hstack([part.sizes() for part in self.datasets])

    def weights(self) -> np.ndarray:
        return np.concatenate([part.weights() for part in self.datasets])


def open_data(settings: Settings, processors, rewrite=None) -> tuple:
    """Open the comparisons to train on, and those to validate on or None."""
    sets = [data.Comparisons(folder, processors.fingerprint) for folder in settings.data]
    validation = settings.validation
    if validation == "auto":
        beside = f"{settings.data[0].rstrip('/')}_holdout"
        validation = beside if Path(beside, "dataset.json").is_file() else ""
    held_out = data.Comparisons(validation, processors.fingerprint) if validation else []
    for part in sets:
        if not len(part):
            raise UserError(f"{part.folder}: no comparisons in there; see rejected.jsonl for why")
        if metric := part.info["metric"]:
            raise UserError(f"{part.folder}: the benchmark {metric}, which is to score models")
    every = [*sets, held_out] if validation else sets
    data.ready_for_images(processors, every)
    for part in every:
        if not np.all(part.response_counts()):
            raise UserError(f"{part.folder}: has prompts without responses, for 06 and not for 03")
    comparisons = Mixture(sets)
    if rewrite:
        comparisons = Rewritten(comparisons, rewrite)
        held_out = held_out and Rewritten(held_out, rewrite)
    return comparisons, held_out or None


def pack_micro_batch(micro: MicroBatch, comparisons: Dataset, processors, pack=model_stage.pack):
    """Read a micro-batch; return it, its packed row, and the row's pairs."""
    read = [comparisons[i] for i in micro.indices]
    if not read and not micro.dummy_image:  # a rank's bin may be empty: one token
        read = [data.Comparison(np.array([processors.end_token], np.int32), [], [])]
    return micro, pack(read, processors, micro.dummy_image), pairs_of(read)


def ignore_sigterm(worker: int) -> None:
    """Keep a worker alive: SIGTERM may reach all processes, and the step needs its data.

    Such a worker would block its rank's exit forever. So keep no reference to a loader: when an
    error ends the loop over it, the loader and its workers end, too.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load(comparisons: Dataset, micro_batches: list[MicroBatch], model, device, workers: int):
    """Yield (micro-batch, packed row, pairs), the tensors on the device."""
    source = {"comparisons": comparisons, "processors": model.processors, "pack": model.pack}
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        collate_fn=partial(pack_micro_batch, **source),
        num_workers=workers,
        worker_init_fn=ignore_sigterm,
        pin_memory=device.type == "cuda",  # so that copies overlap with computing
    )
    try:
        for micro, row, pairs in loader:
            yield micro, row.to(device), pairs.to(device)
    except UserError as error:  # a worker puts its traceback in front
        raise UserError(str(error).split("UserError: ")[-1].strip()) from None


@torch.no_grad()
def validate(model, comparisons, settings: Settings, device) -> dict[str, float]:
    """Mean ranking loss and pair accuracy of the first --validation_size comparisons, and mean and
    deviation of all scores (for 06 --standardise)."""
    steps = [list(range(min(settings.validation_size, len(comparisons))))]
    ranks = dist.get_rank(), dist.get_world_size()
    micro_batches = plan(steps, *comparisons.sizes(), settings.micro_tokens, *ranks)
    sums = torch.zeros(6, device=device)  # loss, right pairs, comparisons; scores: n, sum, squares
    model.eval()
    for _, row, pairs in load(comparisons, micro_batches, model, device, workers=0):
        scores = model(row)
        right = (pairs.weight * (scores[pairs.better] > scores[pairs.worse])).sum()
        sums[:3] += torch.stack([ranking_loss(scores, pairs), right, pairs.weight.sum()])
        sums[3:] += torch.stack([scores**0, scores, scores**2]).sum(1)
    dist.all_reduce(sums)
    model.train()
    model.reshard()  # a forward leaves the root gathered; a checkpoint needs shards
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    mean, square = (sums[4:] / sums[3]).tolist()
    return {
        "validation_loss": loss,
        validation_accuracy_of(model): accuracy,
        "score_mean": mean,
        "score_deviation": math.sqrt(max(0, square - mean**2)),
    }


# --------------------------------------------------------------------------------------------------
# Appendix: how a run begins and ends.


def describe_run(settings: Settings) -> dict:
    """Say what the weights follow from: the recipe, data and model."""
    run = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Recipe)}
    run["content of the data"] = hash_of_data(settings.data)
    head = Path(settings.model, model_stage.HEAD_FILE)  # a new model in this folder has another
    run["head of the model"] = f"{data.hash_of(head.read_bytes()):016x}"
    return run


def allocate_moments(optimizer: torch.optim.Optimizer, trained: Iterable[Tensor]) -> None:
    """Create AdamW's moments, as its first step would."""
    for p in trained:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}


def hash_of_data(folders: list[str]) -> str:
    """Hash how data was made, and the lengths, prompts and images of all comparisons."""
    content = b""
    for folder in folders:
        for name in ("dataset.json", "index.safetensors"):
            content += Path(folder, name).read_bytes()
    return f"{data.hash_of(content):016x}"


def mesh_of(device: torch.device, shard_size: int = 0):
    """Lay out the ranks for `shard`: in one group, or in groups of `shard_size` neighbours.

    Hybrid sharding: each group holds one copy of the model, and only gradients pass between groups,
    for nodes with a slow network between them.
    """
    world = dist.get_world_size()
    shard_size = shard_size or world
    if shard_size < 0 or world % shard_size:
        raise UserError(f"--shard_size {shard_size}: has to divide the number of ranks, {world}")
    sizes = {"shard": world}
    if shard_size < world:
        sizes = {"replicate": world // shard_size, "shard": shard_size}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def load_weights(backbone: nn.Module, path: str, device: torch.device) -> None:
    """Fill an empty, sharded transformers model (d): rank 0 reads its checkpoint, a full float32
    copy in main memory (31 GB for a 7B), and broadcasts it."""
    full = {}
    if dist.get_rank() == 0:
        lm_head = hasattr(backbone, "lm_head")
        loaded = model_stage.load_backbone(path, lm_head=lm_head)
        if adapters := [m for m in backbone.modules() if isinstance(m, LoRALinear)]:
            add_adapters(loaded, adapters[0].rank)
        full = loaded.state_dict()
    backbone.to_empty(device=device)
    backbone.tie_weights()  # `to_empty` separates an LM head from embeddings it shares
    # `initialize_weights` skips marked parameters: it computes only what no checkpoint holds, the
    # rotary frequencies.
    for parameter in backbone.parameters():
        parameter._is_hf_initialized = True
    backbone.initialize_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(backbone, full, options=options)


def freeze(backbone: nn.Module, settings: Settings, device: torch.device) -> None:
    """Freeze what is not trained (b)."""
    vision = model_stage.parts_of(backbone).vision
    if vision is not None:
        vision.requires_grad_(not settings.freeze_vision)
    if settings.lora_rank:
        backbone.requires_grad_(False)
        if device.type == "cuda":  # as it computes; the rotary frequencies, buffers, stay float32
            for parameter in backbone.parameters():
                parameter.data = parameter.to(torch.bfloat16)
        add_adapters(backbone, settings.lora_rank)


def begin(settings: Settings, state: dict, run: dict, last_file=model_stage.HEAD_FILE) -> int:
    """Ready --out, with --resume load its newest checkpoint, and return the steps that are done.

    `last_file` is written when a run ends: if it is newer than a checkpoint, that run has ended.
    """
    folder = Path(settings.out, "checkpoints")
    newest = max(folder.glob("step_*"), default=None)
    last = Path(settings.out, last_file)
    ended = newest and last.is_file() and last.stat().st_mtime > newest.stat().st_mtime
    if newest and not ended and not settings.resume:
        raise UserError(f"{newest}: of a run that has not ended; --resume it, or remove {folder}")
    step = 0
    if newest and settings.resume:
        with data.reading(newest, "remove it"):
            saved = json.loads((newest / "run.json").read_bytes())
            step = saved["step"]
        changes = [f"{k} was {saved.get(k)}, is {v}" for k, v in run.items() if saved.get(k) != v]
        if changes and not settings.resume_changed:
            raise UserError(f"{newest}: {'; '.join(changes)}. Undo that, or --resume_changed")
        load_checkpoint(newest, state)
    dist.barrier()  # all ranks have read what rank 0 removes
    if dist.get_rank() == 0:
        for leftover in folder.glob(".*" if settings.resume else "*"):
            shutil.rmtree(leftover)
        log = Path(settings.out, "metrics.jsonl")
        lines = log.read_text().splitlines(keepends=True) if step else []
        data.write_file(log, "".join(lines[:step]))
    dist.barrier()
    return step


@contextmanager
def one_error():
    """Raise the first rank's error in place of the report on all ranks."""
    try:
        yield
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(str(reason).splitlines()[0]) from None


def imbalance(micro_batches: list[MicroBatch]) -> float:
    """Fraction of time lost to load imbalance: 0 is perfect."""
    slowest = sum(max(micro.costs) for micro in micro_batches)
    mean = sum(sum(micro.costs) / len(micro.costs) for micro in micro_batches)
    return slowest / max(1, mean) - 1


class Log:
    """Say what is trained, write metrics.jsonl and show progress, on rank 0; measure times."""

    def __init__(self, settings: Settings, model, micro_batches, patches, start: int):
        self.path = Path(settings.out, "metrics.jsonl")
        self.rank = dist.get_rank()
        self.size = settings.batch_size
        self.line = {}
        if self.rank == 0:
            trained = model.trained_with
            head = f"its head, trained on {', '.join(trained['data'])}" if trained else "a new head"
            print(f"{settings.model} with {head}; {len(patches)} comparisons,", end=" ")
            print(f"{(patches > 0).sum()} with images; {start} steps are done;", end=" ")
            print(f"load imbalance {imbalance(micro_batches):.1%}", flush=True)
            large = size_of(model) > 1e8 and not settings.lora_rank
            if large and settings.learning_rate > 5e-5:
                print(f"--learning_rate {settings.learning_rate:g}: the paper takes 3e-6 for a 7B")
        total = (micro_batches[-1].step + 1) * self.size
        counts = {"total": total, "initial": start * self.size, "unit": " comparisons"}
        self.bar = tqdm(**counts, disable=self.rank > 0)
        self.began, self.waited = time.perf_counter(), 0.0

    def timing(self, batches: Iterable) -> Iterator:
        """Hand on micro-batches and measure how long the loader takes to give them.

        Nothing but the training loop may hold `batches`: then an error ends the loader's workers.
        """
        start = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
            micro, _, _ = batch
            if micro.last:
                self.began, self.waited = start, 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds of this step, and of these the wait for the loader."""
        return {"seconds": time.perf_counter() - self.began, "data_seconds": self.waited}

    def write(self, line: dict) -> None:
        self.line = line
        if self.rank == 0:
            data.append_line(self.path, line)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        self.bar.update(self.size)


def export(model, settings: Settings, steps: int, line: dict) -> None:
    """Write the trained model to --out; `line` is the last one of its metrics."""
    merge_adapters(model.backbone)
    steps += model.trained_with.get("steps", 0)
    sets = [*model.trained_with.get("data", []), *settings.data]
    model.trained_with = {"data": list(dict.fromkeys(sets)), "steps": steps}
    model.trained_with |= {"learning_rate": settings.learning_rate, "seed": settings.seed}
    if model.kind == "naive" and "score_mean" in line:  # for 06 --standardise
        scores = {"mean": line["score_mean"], "deviation": line["score_deviation"]}
        model.trained_with["scores"] = scores
    dtype = model_stage.DTYPES[settings.export_dtype]
    with data.writing(settings.out):
        model.save_pretrained(settings.out, dtype)


# --------------------------------------------------------------------------------------------------
# Appendix: LoRA (arXiv 2106.09685). The weights W of the language model's linear layers stay as
# they are, and a product of two small matrices learns beside each: y = (W + up down) x, without a
# scale (alpha = rank). Trained are these adapters and the reward head; a checkpoint
# holds nothing else. The export is W + up down. The learning rate is higher than otherwise, 1e-4.


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; it has the layer's names and at first computes the same."""

    def __init__(self, linear: nn.Linear, rank: int):
        inputs, outputs = linear.in_features, linear.out_features
        super().__init__(inputs, outputs, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank = rank
        device = linear.weight.device
        self.down = nn.Linear(inputs, rank, bias=False, device=device)
        self.up = nn.Linear(rank, outputs, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.up(self.down(hidden))


def add_adapters(backbone: nn.Module, rank: int) -> None:
    """Give every linear layer of the language model an adapter, always the same at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in list(model_stage.parts_of(backbone).language.layers.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, LoRALinear(child, rank))


@torch.no_grad()
def merge_adapters(backbone: nn.Module) -> None:
    """Add the adapters, sharded as the weights are, to the weights, and remove them.

    The sum is float32: bfloat16 would round most of an update away. FSDP does not know the new
    parameters, so afterwards the model can only be exported.
    """
    for module in list(backbone.modules()):
        if isinstance(module, LoRALinear):
            weight = module.weight
            update = module.up.weight.to_local() @ module.down.weight.full_tensor()
            merged = weight.to_local().float() + update
            layout = (weight.device_mesh, weight.placements)
            shape = {"shape": weight.shape, "stride": weight.stride()}
            merged = DTensor.from_local(merged, *layout, **shape)
            module.weight = nn.Parameter(merged, requires_grad=False)
            del module.up, module.down
            module.__class__ = nn.Linear


# --------------------------------------------------------------------------------------------------
# Appendix: critics and judges (02, --kind). A critic also learns to write the critiques of the
# data; a judge learns to write the letter of the better response, for both orders, and with
# --rationale the critiques before it.


class Rewritten(Dataset):
    """Comparisons as a critic or a judge reads them, without those that teach nothing to write.

    To know their lengths, the ranks first read all of them.
    """

    def __init__(self, comparisons: Dataset, rewrite: Callable):
        rank, world, device = data.start_distributed()
        lengths = torch.zeros(len(comparisons), dtype=torch.long, device=device)
        for i in tqdm(range(rank, len(lengths), world), desc="measure", disable=rank > 0):
            read = rewrite(comparisons[i])
            lengths[i] = read.length if read.responses else 0
        dist.all_reduce(lengths)
        self.comparisons = comparisons
        self.rewrite = rewrite
        self.lengths = lengths.cpu().numpy()  # of all comparisons; 0: left out
        self.chosen = np.flatnonzero(self.lengths)
        needs = "a critic needs a critique of each response, a judge two, or with --rationale both"
        if not len(self):
            raise UserError(f"no comparison to learn from: {needs}")
        left_out = len(comparisons) - len(self)
        if rank == 0 and left_out:
            print(f"{left_out} of {len(comparisons)} comparisons left out: {needs}")

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int):
        return self.rewrite(self.comparisons[int(self.chosen[i])])

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        _, patches = self.comparisons.sizes()
        return self.lengths[self.chosen], patches[self.chosen]

    def weights(self) -> np.ndarray:
        return self.comparisons.weights()[self.chosen]


def critic_loss(model, row, pairs: Pairs, settings: Settings) -> tuple[Tensor, Tensor]:
    scores, log_p = model(row, written=True)
    loss = ranking_loss(scores, pairs, settings.zero_coefficient, settings.length_normalisation)
    return loss - settings.critique_coefficient * (row.weight * log_p).sum(), scores


def judge_loss(model, row, pairs: Pairs, settings: Settings) -> tuple[Tensor, Tensor]:
    scores, log_p = model(row, written=True)
    return -(row.weight * log_p).sum(), scores


LOSSES = {"naive": loss_and_scores, "critic": critic_loss, "generative": judge_loss}


def validation_accuracy_of(model) -> str:
    """Name the metric. The data's critiques give the answer away; in 04 a model writes its own."""
    if model.kind == "critic" or model.kind == "generative" and model.asks["rationale"]:
        return "validation_accuracy_with_given_critiques"
    return "validation_accuracy"


# --------------------------------------------------------------------------------------------------
# Appendix: --plan. A forward and backward on the meta device, whose tensors have shapes and no
# numbers, runs the code that trains, for every family, and counts its operations and its memory.


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
    """Stand in for attention as it is on a GPU, where it stores no T x T weights."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class Meter(TorchDispatchMode):
    """Count operations, and the bytes of the tensors that are alive, without the parameters."""

    def __init__(self, parameters):
        super().__init__()
        self.counted = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.flops = self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.counted:
                storage = tensor.untyped_storage()
                self.counted.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.bytes -= size


def measure(model: nn.Module, row) -> Meter:
    """Run a packed row forward and backward on the meta device."""
    for parameter in model.parameters():
        if parameter.requires_grad:  # FSDP frees a gradient when it has reduced it
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    attention = mock.patch.object(F, "scaled_dot_product_attention", flash_attention)
    # transformers would compare numbers of image tokens, and on this device there are none.
    unchecked = mock.patch.dict("os.environ", {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"})
    with Meter(model.parameters()) as meter, attention, unchecked:
        model(row).sum().backward()
    return meter


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained_size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def memory(model: nn.Module, activations: int, ranks: int) -> dict[str, float]:
    """Bytes on one of the `ranks` that share `model` when the backward of a step begins, by part.

    Not counted: the CUDA context, NCCL's buffers, fragmentation.
    """
    parts = model_stage.parts_of(model.backbone)
    everything = size_of(model)
    trained = trained_size_of(model)
    frozen = 4  # bytes of a frozen parameter: float32, but with LoRA what it computes in
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        frozen = next(model.backbone.parameters()).element_size()
    layer = size_of(parts.language.layers[0])
    trained_layer = trained_size_of(parts.language.layers[0])
    root = everything - len(parts.language.layers) * layer
    if parts.vision is not None:
        root -= size_of(parts.vision)
    width = next(model.backbone.parameters()).element_size()
    return {
        "parameters": (4 * trained + frozen * (everything - trained)) / ranks,
        "gradients": 4 * trained / ranks,
        "AdamW's two moments": 8 * trained / ranks,
        "activations": activations,
        "gathered parameters": width * (root + 2 * layer),  # one layer in use and the next
        # one layer's: as computed, in float32 to be summed over ranks, and this rank's share of it
        "gradients on their way": (width + 4 + 4 / ranks) * trained_layer,
    }


def add_without_mask(hidden: Tensor, mask: Tensor, images: Tensor) -> Tensor:
    return hidden + images.sum()


def model_to_plan(settings: Settings) -> RewardModel:
    """Build the model on the meta device from its folder or hub name, which needs no weights."""
    if Path(settings.model, model_stage.HEAD_FILE).is_file():
        kind = RewardModel.from_pretrained(settings.model, empty=True).kind
        if kind != "naive":
            only = "only naive reward models are planned, and this one is"
            raise UserError(f"{settings.model}: {only} {kind}")
    backbone = model_stage.load_backbone(settings.model, empty=True)
    freeze(backbone, settings, torch.device("meta"))
    backbone.to(torch.bfloat16)
    with torch.device("meta"):
        head = model_stage.RewardHead(backbone.config.get_text_config().hidden_size)
    if settings.activation_checkpointing:
        backbone.activation_checkpointing_enable()
        backbone.disable_input_require_grads()
    parts = model_stage.parts_of(backbone)
    # Skip two cheap steps, in which InternVL and Qwen3-VL read numbers: this device has none.
    parts.language.rotary_emb.rope_type = "default"
    parts.language._deepstack_process = add_without_mask
    return RewardModel(backbone, head, data.load_processors(settings.model)).train()


def assumed_comparison(lengths: list[int], processors):
    """Make a comparison of --plan_lengths: tokens of text, of an image, and of each response."""
    text, image, *responses = lengths
    prompt = np.zeros(text, np.int32)
    answers = [np.zeros(length, np.int32) for length in responses]
    comparison = data.Comparison(prompt, answers, [1] * len(answers))
    if image and processors.image_processor is None:
        raise UserError("--plan_lengths: has an image, and the model is text-only")
    if image:
        height = 2 ** int(math.log2(image) / 2)  # in tokens; the picture is not quite square
        blank = model_stage.blank_comparison(processors, height, round(image / height))
        comparison.prompt = np.append(prompt, blank.prompt)
        comparison.images, comparison.grids = blank.images, blank.grids
    return comparison


def print_plan(settings: Settings) -> None:
    """Print what the run of these settings would compute, need and take, with its assumptions."""
    model = model_to_plan(settings)
    gpus = settings.gpus or dist.get_world_size()
    ranks = settings.shard_size or gpus
    if gpus % ranks:
        raise UserError(f"--shard_size {ranks}: has to divide the {gpus} GPUs")
    if settings.plan_lengths:
        comparisons = [assumed_comparison(settings.plan_lengths, model.processors)]
        tokens = np.array([comparisons[0].length])
        patches = np.array([comparisons[0].patches])
    else:
        comparisons = open_data(settings, model.processors)[0]
        tokens, patches = comparisons.sizes()
    count = settings.plan_comparisons or len(comparisons)
    steps = settings.steps or math.ceil(count * settings.epochs / settings.batch_size)

    # Plan the first steps as the run will. Rank 0 has the largest micro-batches; the others wait.
    beginning = dataclasses.replace(settings, steps=min(steps, 20))
    order = order_of_training(len(comparisons), beginning)
    micro_batches = plan(order, tokens, patches, settings.micro_tokens, 0, gpus)
    largest = max(micro_batches, key=lambda micro: micro.costs[0])
    _, row, _ = pack_micro_batch(largest, comparisons, model.processors)
    row = row.to(torch.device("meta"))
    whole = measure(model, row)
    text = measure(model, dataclasses.replace(row, images=None))
    row_tokens = tokens[largest.indices].sum()
    row_patches = patches[largest.indices].sum()
    of_language = text.flops / row_tokens * tokens.mean()
    of_vision = (whole.flops - text.flops) / max(1, row_patches) * patches.mean()
    parts = memory(model, whole.peak, ranks)
    needed = sum(parts.values())
    number = 2 if settings.export_dtype == "bf16" else 4

    # Each micro-batch gathers bfloat16 parameters twice and reduces float32 gradients. Within the
    # groups of --shard_size that is free; between groups only gradients of the shards travel.
    trained = trained_size_of(model)
    if ranks == gpus:
        traffic = 4 * (size_of(model) + trained) * (gpus - 1) / gpus
    else:
        traffic = 8 * trained / ranks
    traffic *= len(micro_batches) / len(order)
    flops = (of_language + of_vision) * settings.batch_size * (1 + imbalance(micro_batches))
    computing = flops / (gpus * settings.gpu_flops * settings.utilisation)
    communicating = traffic / settings.gpu_link
    hours = steps * max(computing, communicating) / 3600

    print(f"model  {settings.model}: {size_of(model):,} parameters with a head of two layers")
    print(f"run    {steps:,} steps of {settings.batch_size} for {count:,} comparisons, {gpus} GPUs")
    work = {
        "tokens": tokens.mean(),
        "image patches": patches.mean(),
        "TFLOP, language model": of_language / 1e12,
        "TFLOP, vision tower": of_vision / 1e12,
    }
    print_table("work", "a comparison", work)
    print_table("memory of a GPU", "GB", {name: size / 1e9 for name, size in parts.items()})
    fits = "fits in" if needed < 0.9e9 * settings.gpu_memory else "does NOT fit in"
    print(
        f"  all of it, {needed / 1e9:.4g} GB, {fits} {settings.gpu_memory:g} GB, a tenth kept free"
    )
    print(f"  largest micro-batch: {row_tokens:,} tokens, {row_patches:,} patches")
    checkpoint = 12 * trained  # parameters and two moments
    disk = {"a checkpoint": checkpoint / 1e9, "the trained model": number * size_of(model) / 1e9}
    print_table("disk", "GB", disk)
    print_table("time", "s a step", {"computing": computing, "communicating": communicating})
    print(f"  at {settings.utilisation:.0%} of the peak; the longer of both counts:")
    print(f"{hours:,.1f} hours, {hours * gpus:,.0f} GPU-hours, without validations and checkpoints")


def print_table(title: str, unit: str, rows: dict[str, float]) -> None:
    print(f"\n{title:<30}{unit:>14}")
    for name, value in rows.items():
        print(f"  {name:<28}{value:>14,.4g}")


def main(settings: Settings) -> None:
    if settings.batch_size < 1:
        raise UserError(f"--batch_size {settings.batch_size}: has to be at least 1")
    if settings.lora_rank < 0:
        raise UserError(f"--lora_rank {settings.lora_rank}: has to be at least 0")
    if settings.plan:
        return print_plan(settings) if dist.get_rank() == 0 else None
    train(settings)
    if dist.get_rank() == 0:
        print(f"{settings.out}: the trained reward model; metrics in {settings.out}/metrics.jsonl")
        print("Next: torchrun --standalone --nproc_per_node=2 04_eval.py")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
