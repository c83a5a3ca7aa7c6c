"""Stage 3: train the reward model with FSDP2 and the pairwise ranking loss

    torchrun --standalone --nproc_per_node=2 03_train.py
    torchrun --standalone --nproc_per_node=8 03_train.py --learning_rate 3e-6 --batch_size 128
    python 03_train.py --plan --gpus 64    # train nothing: print what such a run needs

In:   artifacts/model, a reward model (02), and artifacts/data/train, comparisons (01)
Out:  artifacts/reward: the trained model, metrics.jsonl with a line per step, checkpoints/

The loss is -log sigmoid(r_w - r_l), with r_w the score of the better response and r_l of the worse.
This is Bradley-Terry: if w wins with probability sigmoid(r_w - r_l), it is the negative
log-likelihood of the data. A ranking of N > 2 responses contributes the mean over its ordered pairs
(InstructGPT, arXiv 2203.02155).

Keep one idea in mind: the gradient of a step does not depend on the number of ranks. The seed
decides which comparisons make up a step, bin packing deals them to ranks, and every loss is divided
by the number of comparisons in the whole step. So a run may continue on another number of ranks.

The paper trains with learning rate 3e-6 and batches of 128 on 64 GPUs. It does not state optimizer,
schedule, epochs, or whether the vision tower is frozen. Settings marked "authors" come from the
authors' public command for a text-only reward model. The defaults for learning rate, batch size and
epochs suit the embedded backbone of 1.7 M parameters.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

data = importlib.import_module("01_data")  # `import 01_data` would be a syntax error
model_stage = importlib.import_module("02_model")
option, UserError, RewardModel = data.option, data.UserError, model_stage.RewardModel


# --------------------------------------------------------------------------------------------------
# 1. Who reads what. Every rank computes the same plan from the lengths and the seed, and needs to
# ask no other.


def order_of_training(count: int, settings: "Settings") -> list[list[int]]:
    """Shuffle `count` comparisons once per epoch and cut them into steps, as lists of indices.

    The last batch is filled up from a further shuffle, so no comparison is dropped.
    """
    steps = settings.steps or math.ceil(count * settings.epochs / settings.batch_size)
    needed = steps * settings.batch_size
    rng = np.random.default_rng(settings.seed)
    epochs = [rng.permutation(count) for _ in range(math.ceil(needed / count))]
    return np.concatenate(epochs)[:needed].reshape(steps, settings.batch_size).tolist()


def deal(indices: list[int], cost: np.ndarray, bins: int) -> list[list[int]]:
    """Greedy bin packing: the most expensive comparison first, each into the emptiest bin."""
    dealt = [[] for _ in range(bins)]
    loads = [0] * bins
    for i in sorted(indices, key=lambda i: (-cost[i], i)):
        emptiest = loads.index(min(loads))
        dealt[emptiest].append(i)
        loads[emptiest] += cost[i]
    return dealt


@dataclass
class MicroBatch:
    """The comparisons of one rank in one forward and backward."""

    step: int
    indices: list[int]  # perhaps none
    last: bool  # of its step
    step_size: int  # comparisons of the whole step, over all ranks and micro-batches
    dummy_image: bool  # another rank has an image here and this one has none
    loads: list[int]  # work of each rank in this micro-batch, in tokens


def plan(steps, tokens, patches, micro_tokens: int, rank: int, world: int) -> list[MicroBatch]:
    """Deal the comparisons of all steps to micro-batches and ranks; return those of one rank.

    FSDP's all-gathers need all ranks, so each rank gets the same number of micro-batches, and about
    equal work, since all wait for the slowest. A rank whose micro-batch has no image would skip the
    vision tower, and the others would wait in the tower's all-gather forever. It reads a blank
    image instead (`dummy_image`), whose gradient is zero.

    Args:
        steps: indices of the comparisons of each step.
        tokens, patches: sizes of all comparisons, [n] each.
        micro_tokens: most tokens of a forward, unless a single comparison is longer.
    """
    cost = tokens + patches // 4  # in tokens: the vision tower is the smaller model

    def work(indices: list[int]) -> int:
        return int(cost[indices].sum())

    micro_batches = []
    for step, indices in enumerate(steps):
        count = max(1, math.ceil(work(indices) / (micro_tokens * world)))
        bins = deal(indices, cost, count * world)
        while count * world < len(indices) and max(map(work, bins)) > micro_tokens:
            count += 1
            bins = deal(indices, cost, count * world)
        bins.sort(key=work, reverse=True)  # bins that run at the same time cost about the same
        for k in range(count):
            together = bins[k * world : (k + 1) * world]  # one bin per rank
            has_image = [bool(patches[part].any()) for part in together]
            dummy = any(has_image) and not has_image[rank]
            loads = list(map(work, together))
            last = k == count - 1
            micro_batches.append(MicroBatch(step, together[rank], last, len(indices), dummy, loads))
    return micro_batches


# --------------------------------------------------------------------------------------------------
# 2. The loss.


@dataclass
class Pairs:
    """All (better, worse) pairs of a row, as indices into its N scores."""

    better: Tensor  # [pairs]
    worse: Tensor  # [pairs]
    weight: Tensor  # [pairs] 1 / (pairs of the same comparison): each comparison counts once
    lengths: Tensor  # [N] tokens of each response

    def to(self, device: torch.device) -> "Pairs":
        return model_stage.change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def pairs_of(comparisons: list) -> Pairs:
    """List the pairs of the comparisons of a row."""
    better, worse, weight, lengths = [], [], [], []
    for comparison in comparisons:
        start = len(lengths)  # responses of the comparisons before
        pairs = comparison.pairs
        better += [start + i for i, _ in pairs]
        worse += [start + j for _, j in pairs]
        weight += [1 / max(1, len(pairs))] * len(pairs)
        lengths += map(len, comparison.responses)
    index = partial(torch.tensor, dtype=torch.long)
    return Pairs(index(better), index(worse), torch.tensor(weight), index(lengths))


def ranking_loss(
    scores: Tensor, pairs: Pairs, zero_coefficient: float = 0.0, length_normalisation: bool = False
) -> Tensor:
    """Sum the paper's loss (Algorithm 1) over the comparisons of a row with scores [N].

    The paper tried two regularisers and uses neither: `zero_coefficient` pulls scores to zero, as
    the loss leaves their offset open; `length_normalisation` divides r by log(tokens + 1).
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
# its gradients summed over ranks after the backward, each rank keeping its share (reduce-scatter).
# The order matters:
#   a. Build the model empty, on the meta device, since no rank has memory for all of it.
#   b. Freeze what is not trained: FSDP reduces no gradient for it, and AdamW gets no state.
#   c. Shard from the inside out, since a unit takes the parameters that no inner unit has: vision
#      tower, decoder layers, reward head, root.
#   d. Load the weights, now that each rank has room for its share.
#   e. Make the optimizer, which holds the shards.
# Gradient accumulation needs no switch: every micro-batch adds its reduced gradients to the shards.
# Reducing once per step (`set_requires_gradient_sync`) would save traffic, but each rank would hold
# all gradients whole in float32, 31 GB for a 7B.


def shard(
    model,
    backbone,
    device,
    activation_checkpointing=False,
    in_float32=(),
    shard_size=0,
    compile=False,
) -> None:
    """Shard `model` in place (c); `backbone` is the transformers model in it.

    With a `shard_size`, every so many neighbouring ranks hold one copy of the model, and only
    gradients pass between such groups (hybrid sharding, for nodes with a slow network between).
    """
    world = dist.get_world_size()
    shard_size = shard_size or world
    if shard_size < 0 or world % shard_size:
        raise UserError(f"--shard_size {shard_size}: has to divide the number of ranks, {world}")
    sizes = {"shard": world}
    if shard_size < world:
        sizes = {"replicate": world // shard_size, "shard": shard_size}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    # Float32 weights, bfloat16 compute: a bfloat16 weight of 0.02 has a spacing of 1e-4, and AdamW
    # steps of 3e-6 would round to nothing.
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = model_stage.parts_of(backbone)
    if activation_checkpointing:
        backbone.activation_checkpointing_enable()
        backbone.disable_input_require_grads()  # would send a frozen tower through a backward
    if compile:
        for layer in [*parts.language.layers, *parts.blocks]:
            layer.compile(dynamic=True)  # lengths differ from row to row
    if parts.vision is not None:  # one unit: it is small, and one gather beats one per block
        fully_shard(parts.vision, mesh=mesh, mp_policy=policy)
    for layer in parts.language.layers:  # a unit each: only one or two are whole at a time
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for module in in_float32:  # the reward head: near 4, bfloat16 has a spacing of 0.03
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the rest: embeddings and last norm


def load_weights(backbone: nn.Module, path: str, device: torch.device) -> None:
    """Fill an empty, sharded transformers model from its checkpoint (d).

    Rank 0 reads the checkpoint and broadcasts it tensor by tensor; each rank keeps its share. The
    price is one full float32 copy in the main memory of rank 0, 31 GB for a 7B.
    """
    full = {}
    if dist.get_rank() == 0:
        lm_head = hasattr(backbone, "lm_head")
        full = model_stage.load_backbone(path, lm_head=lm_head).state_dict()
    backbone.to_empty(device=device)
    backbone.tie_weights()  # `to_empty` parts an LM head from the embeddings it shares
    for parameter in backbone.parameters():
        parameter._is_hf_initialized = True
    backbone.initialize_weights()  # so only of what no checkpoint holds: rotary frequencies
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(backbone, full, options=options)


def make_optimizer(model: nn.Module, settings: "Settings") -> torch.optim.AdamW:
    """Make AdamW (e) and allocate its state, since a checkpoint is loaded into existing tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1]}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [matrices, vectors],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    for p in trained:  # what AdamW does in its first step
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


# --------------------------------------------------------------------------------------------------
# 4. Training.


@dataclass
class Recipe:
    """The settings that decide the trained weights: an interrupted run resumes with the same."""

    model: str = option("artifacts/model", "reward model from 02, or a trained one to continue")
    data: list[str] = option([], "comparisons (01), repeatable; none: artifacts/data/train")
    steps: int = option(0, "optimizer steps; 0: as many as --epochs take")
    epochs: float = option(2.0, "passes over the data if --steps is 0 (authors: 1)")
    batch_size: int = option(64, "comparisons per step, over all ranks (paper: 128)")
    learning_rate: float = option(2e-4, "peak learning rate of AdamW (paper: 3e-6, for 7B)")
    warmup: float = option(0.05, "fraction of the steps for linear warm-up (authors: 0.05)")
    weight_decay: float = option(0.1, "AdamW weight decay, matrices only (authors: 0.1)")
    beta2: float = option(0.95, "AdamW beta2 (authors: 0.95)")
    clip: float = option(1.0, "largest norm of a step's gradient; 0: any")
    zero_coefficient: float = option(0.0, "weight of (r_w + r_l)^2 (paper: 0, tried up to 0.1)")
    length_normalisation: bool = option(False, "train on r / log(tokens + 1) (paper: tried, off)")
    critique_coefficient: float = option(1.0, "critics: weight of the critiques' loss")
    freeze_vision: bool = option(False, "do not train the vision tower (authors: frozen)")
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
    model = RewardModel.from_pretrained(settings.model, empty=True)
    comparisons, held_out = open_data(settings, model.processors, model.rewrite)
    tokens, patches = comparisons.sizes()
    order = order_of_training(len(comparisons), settings)
    micro_batches = plan(order, tokens, patches, settings.micro_tokens, rank, world)

    vision = model_stage.parts_of(model.backbone).vision
    if vision is not None:
        vision.requires_grad_(not settings.freeze_vision)
    heads = [module for module in model.modules() if isinstance(module, model_stage.RewardHead)]
    recompute = settings.activation_checkpointing
    shard(model, model.backbone, device, recompute, heads, settings.shard_size, settings.compile)
    load_weights(model.backbone, settings.model, device)
    optimizer = make_optimizer(model, settings)
    model.train()

    state = training_state(model, optimizer)
    start = begin(settings, state)  # 0, or the step of a checkpoint
    if rank == 0:
        print_start(settings, model, comparisons, held_out, micro_batches, start)
    sigterm = []  # filled when the machine is taken away (spot preemption)
    if settings.checkpoint_every:
        signal.signal(signal.SIGTERM, lambda *_: sigterm.append(True))
    bar = tqdm(total=len(order), initial=start, unit=" steps", disable=rank > 0)
    sums = torch.zeros(4, device=device)  # of a step: loss, right pairs, margins, ranks to stop
    line = {}
    waited = 0.0
    began = loading = time.perf_counter()
    remaining = [micro for micro in micro_batches if micro.step >= start]
    for micro, row, pairs in load(comparisons, remaining, model, device, settings.workers):
        waited += time.perf_counter() - loading

        # Forward and backward. FSDP averages gradients over ranks. Times `world` that is their sum,
        # and divided by the comparisons of the whole step it is the gradient of one rank that reads
        # them all in one row, however they are dealt to ranks and micro-batches.
        loss, scores = LOSSES[model.kind](model, row, pairs, settings)
        (loss * world / micro.step_size).backward()
        margins = (scores[pairs.better] - scores[pairs.worse]).detach()  # [pairs]
        right = (pairs.weight * (margins > 0)).sum()
        sums[:3] += torch.stack([loss.detach(), right, (pairs.weight * margins).sum()])
        loading = time.perf_counter()
        if not micro.last:
            continue

        # Clip, and agree on the step. On a GPU the CPU waits for it here and nowhere else.
        norm = clip_grad_norm_(model.parameters(), settings.clip or math.inf).full_tensor()
        sums[3] = len(sigterm)
        dist.all_reduce(sums)
        loss, accuracy, margin, stopping = (sums / micro.step_size).tolist()
        norm = norm.item()
        step = micro.step + 1
        if not math.isfinite(loss + norm):
            names = [str(comparisons[i]) for i in order[micro.step]]
            raise UserError(
                f"step {step}: loss {loss:g}, norm of the gradient {norm:g}, "
                f"from {len(names)} comparison(s): {', '.join(names)}; the weights are as before"
            )

        # Update.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(micro.step, len(order), settings)
        optimizer.step()
        optimizer.zero_grad()
        sums.zero_()

        # Log and validate.
        line = {
            "step": step,
            "loss": loss,
            "accuracy": accuracy,  # fraction of training pairs whose better response scores higher
            "margin": margin,  # mean score of the better response minus the worse
            "grad_norm": norm,  # before clipping
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens": int(tokens[order[micro.step]].sum()),  # of the packed rows of all ranks
            "seconds": time.perf_counter() - began,
            "data_seconds": waited,  # of these, rank 0's wait for the loader
        }
        due = settings.validate_every and step % settings.validate_every == 0
        if held_out and (due or step == len(order)):
            line |= validate(model, held_out, settings, device)
        if rank == 0:
            with open(Path(settings.out, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
        bar.update()

        # Save.
        due = settings.checkpoint_every and step % settings.checkpoint_every == 0
        if (due or stopping) and step < len(order):
            save_checkpoint(Path(settings.out, "checkpoints"), step, state, run_of(settings))
            if stopping:
                raise UserError(f"stopped by SIGTERM after step {step}; continue with --resume")
        began = loading = time.perf_counter()
        waited = 0.0

    bar.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    steps_before = model.trained_with.get("steps", 0)
    model.trained_with = {"data": settings.data, "steps": steps_before + len(order)}
    model.trained_with |= {"learning_rate": settings.learning_rate, "seed": settings.seed}
    dtype = model_stage.DTYPES[settings.export_dtype]
    with data.writing(settings.out):
        model.save_pretrained(settings.out, dtype, settings.export_file_size)
    return line


@torch.no_grad()
def validate(model, comparisons, settings: "Settings", device) -> dict[str, float]:
    """Mean ranking loss and pair accuracy of the first --validation_size comparisons."""
    indices = list(range(min(settings.validation_size, len(comparisons))))
    sizes = comparisons.sizes()
    rank, world = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(3, device=device)  # loss, right pairs, comparisons
    model.eval()
    micro_batches = plan([indices], *sizes, settings.micro_tokens, rank, world)
    for _, row, pairs in load(comparisons, micro_batches, model, device, workers=0):
        scores = model(row)
        right = (pairs.weight * (scores[pairs.better] > scores[pairs.worse])).sum()
        sums += torch.stack([ranking_loss(scores, pairs), right, pairs.weight.sum()])
    dist.all_reduce(sums)
    model.train()
    model.reshard()  # without a backward the root stays gathered, and no checkpoint may have that
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return {"validation_loss": loss, VALIDATION_ACCURACY[model.kind]: accuracy}


# --------------------------------------------------------------------------------------------------
# 5. Checkpoints: model and optimizer as safetensors, each rank writing its share. The step is the
# position in the data, since the plan follows from the seed. `torch.distributed.checkpoint` reads
# them on any number of ranks; on as many as before, the run ends in the same weights, bit for bit.


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect the parameters and the optimizer's tensors of each, as they are in use, by name."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, tensor in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = tensor
    return state


def save_checkpoint(folder: Path, step: int, state: dict, run: dict, keep: int = 2) -> None:
    """Write `step_000050/` under a temporary name and rename it when all ranks are done.

    So a folder called step_... is whole. Old ones are renamed before they are deleted. `run` goes
    into run.json.
    """
    final = folder / f"step_{step:06d}"
    unfinished = folder / f".writing_{step:06d}"
    with data.writing(final), one_error():
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(state, storage_writer=writer)
        if dist.get_rank() == 0:
            data.write_file(unfinished / "run.json", json.dumps({"step": step, **run}, indent=1))
            old = sorted(folder.glob("step_*"))
            unfinished.rename(final)
            for checkpoint in old[: 1 - keep]:
                shutil.rmtree(checkpoint.rename(folder / f".old_{checkpoint.name}"))
        dist.barrier()


def load_checkpoint(checkpoint: Path, state: dict, run: dict, allow_changes: bool = False) -> int:
    """Read a checkpoint of the same `run` into the tensors of `state`; return its step."""
    with data.reading(checkpoint, "remove it"), one_error():
        saved = json.loads((checkpoint / "run.json").read_bytes())
        changes = [f"{k} was {saved.get(k)}, is {v}" for k, v in run.items() if saved.get(k) != v]
        if changes and not allow_changes:
            message = f"{checkpoint} is from another run: {'; '.join(changes)}"
            raise UserError(f"{message}. Give the same, or --resume_changed")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    return saved["step"]


@contextmanager
def one_error():
    """Raise the first rank's error in place of the report on all ranks."""
    try:
        yield
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(str(reason).splitlines()[0]) from None


# --------------------------------------------------------------------------------------------------
# Appendix: settings that do not change the weights.


@dataclass
class Settings(Recipe):
    """All settings of this stage."""

    out: str = option("artifacts/reward", "folder for the model, metrics.jsonl and checkpoints/")
    validation: str = option("auto", "comparisons; auto: <data>_holdout of the first; '': none")
    validate_every: int = option(25, "steps between validations; 0: only at the end")
    validation_size: int = option(256, "comparisons of a validation, always the same")
    checkpoint_every: int = option(50, "steps between checkpoints (two stay); 0: none")
    resume: bool = option(False, "continue from the newest checkpoint in --out, if there is one")
    resume_changed: bool = option(False, "with --resume: even if recipe or data have changed")
    micro_tokens: int = option(8192, "tokens of a forward on one rank, as memory allows (--plan)")
    activation_checkpointing: bool = option(False, "recompute layers in backward: less memory")
    shard_size: int = option(0, "ranks that share a copy of the model, as in one node; 0: all")
    compile: bool = option(False, "torch.compile each layer, for GPUs; takes minutes to start")
    workers: int = option(1, "processes of a rank that read ahead; 0: the step reads")
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "dtype of the exported backbone")
    export_file_size: str = option("5GB", "largest file of the export")
    plan: bool = option(False, "train nothing: print what a run computes, needs and takes")
    gpus: int = option(0, "--plan: GPUs; 0: as many as there are ranks now (paper: 64)")
    gpu_memory: float = option(80.0, "--plan: memory of a GPU in GB (80: H100)")
    gpu_flops: float = option(989e12, "--plan: peak FLOP/s in bfloat16 (989e12: H100 SXM)")
    gpu_link: float = option(50e9, "--plan: bytes/s into a GPU (50e9: 400 Gb/s between nodes)")
    utilisation: float = option(0.4, "--plan: assumed share of the peak")
    plan_comparisons: int = option(0, "--plan: comparisons; 0: those in --data (paper: 2.8 M)")
    plan_lengths: list[int] = option([], "--plan: not --data but tokens of text, image, responses")


# --------------------------------------------------------------------------------------------------
# Appendix: data. Worker processes read, decode and pack ahead of the step.


class Mixture(ConcatDataset):
    """Several sets of comparisons as one."""

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and image patches of all comparisons, [n] each."""
        tokens = [part.sizes()[0] for part in self.datasets]
        patches = [part.sizes()[1] for part in self.datasets]
        return np.concatenate(tokens), np.concatenate(patches)


def open_data(settings: Settings, processors, rewrite=None) -> tuple:
    """Open the comparisons to train on, and to validate on or None."""
    sets = [data.Comparisons(folder, processors.fingerprint) for folder in settings.data]
    data.use_pixel_limits(processors, sets)
    for part in sets:
        problem = ""
        if not len(part):
            problem = "no comparisons in there; see rejected.jsonl for why"
        elif part.info["metric"]:
            problem = f"the benchmark {part.info['metric']}, which is to score models"
        elif not all(part.response_counts()):
            problem = "has prompts without responses; a reward model trains on pairs or rankings"
        elif processors.image is None and part.sizes()[1].any():
            problem = f"has images, and {settings.model} reads only text"
        if problem:
            raise UserError(f"{part.folder}: {problem}")
    validation = settings.validation
    if validation == "auto":
        beside = f"{settings.data[0].rstrip('/')}_holdout"
        validation = beside if Path(beside, "dataset.json").is_file() else ""
    held_out = data.Comparisons(validation, processors.fingerprint) if validation else []
    comparisons = Mixture(sets)
    if rewrite:  # a critic or a judge
        comparisons = Rewritten(comparisons, comparisons.sizes()[1], rewrite)
        held_out = held_out and Rewritten(held_out, held_out.sizes()[1], rewrite)
    return comparisons, held_out or None


def pack_micro_batch(micro: MicroBatch, comparisons: Dataset, processors, pack=model_stage.pack):
    """Read the comparisons of a micro-batch; return them and their packed row."""
    read = [comparisons[i] for i in micro.indices]
    if not read and not micro.dummy_image:  # fewer comparisons than ranks: a token nobody reads
        read = [data.Comparison(np.array([processors.end_token], np.int32), [], [])]
    return read, pack(read, processors, micro.dummy_image)


def read_micro_batch(micro: MicroBatch, comparisons: Dataset, processors, pack) -> tuple:
    read, row = pack_micro_batch(micro, comparisons, processors, pack)
    return micro, row, pairs_of(read)


def ignore_sigterm(worker: int) -> None:
    """SIGTERM may reach all processes, but the current step still needs its data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load(comparisons: Dataset, micro_batches: list[MicroBatch], model, device, workers: int):
    """Yield (micro-batch, packed row, pairs), the tensors on the device."""
    read = partial(
        read_micro_batch, comparisons=comparisons, processors=model.processors, pack=model.pack
    )
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        collate_fn=read,
        num_workers=workers,
        worker_init_fn=ignore_sigterm,
        pin_memory=device.type == "cuda",  # so that copies overlap with computing
    )
    try:
        for micro, row, pairs in loader:
            yield micro, row.to(device), pairs.to(device)
    except UserError as error:  # a worker puts its traceback in front
        raise UserError(str(error).split("UserError: ")[-1]) from None


# --------------------------------------------------------------------------------------------------
# Appendix: the beginning of a run.


def run_of(settings: Settings) -> dict:
    """Describe a run for its checkpoints: the recipe, and a fingerprint of its data."""
    run = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Recipe)}
    content = hashlib.sha256()
    for folder in settings.data:
        comparisons = data.Comparisons(folder)
        content.update(json.dumps(comparisons.info, sort_keys=True).encode())
        for array in (*comparisons.sizes(), comparisons.hashes("prompt_hashes")):
            content.update(np.ascontiguousarray(array))
    return {**run, "content of the data": content.hexdigest()[:16]}


def begin(settings: Settings, state: dict) -> int:
    """Ready --out, with --resume load its newest checkpoint, and return the steps that are done."""
    folder = Path(settings.out, "checkpoints")
    newest = max(folder.glob("step_*"), default=None)
    head = Path(settings.out, model_stage.HEAD_FILE)
    exported = newest and head.is_file() and head.stat().st_mtime > newest.stat().st_mtime
    if newest and not exported and not settings.resume:
        raise UserError(
            f"{newest} is of a run that has not ended; --resume continues it, or remove {folder}"
        )
    start = 0
    if newest and settings.resume:
        start = load_checkpoint(newest, state, run_of(settings), settings.resume_changed)
    dist.barrier()  # all ranks have read what rank 0 removes
    if dist.get_rank() == 0:
        for leftover in folder.glob(".*" if settings.resume else "*"):
            shutil.rmtree(leftover)
        log = Path(settings.out, "metrics.jsonl")
        lines = log.read_text().splitlines(keepends=True) if start else []
        data.write_file(log, "".join(lines[:start]))
    return start


def imbalance(micro_batches: list[MicroBatch]) -> float:
    """Fraction of time lost to load imbalance: 0 is perfect."""
    slowest = sum(max(micro.loads) for micro in micro_batches)
    mean = sum(sum(micro.loads) / len(micro.loads) for micro in micro_batches)
    return slowest / max(1, mean) - 1


def print_start(settings: Settings, model, comparisons, held_out, micro_batches, start) -> None:
    """Say which model trains on which data, and warn of a learning rate for small models."""
    head = "a new head"
    if trained := model.trained_with:
        head = f"its head, trained on {', '.join(trained['data'])} for {trained['steps']} steps"
    images = (comparisons.sizes()[1] > 0).sum()
    print(f"{settings.model} with {head}; {len(comparisons)} comparisons, {images} with images")
    if sum(p.numel() for p in model.parameters()) > 1e8 and settings.learning_rate > 5e-5:
        rate = settings.learning_rate
        print(
            f"--learning_rate {rate:g} suits small models; for pretrained ones the paper takes 3e-6"
        )
    print(
        f"{len(held_out or [])} comparisons to validate on; training begins after step {start}; "
        f"load imbalance {imbalance(micro_batches):.1%}",
        flush=True,
    )


# --------------------------------------------------------------------------------------------------
# Appendix: critics and judges (02, --kind). A critic also learns to write the critiques of the
# data; a judge learns only to write the letter of the better response, for both orders.


class Rewritten(Dataset):
    """Comparisons as a critic or a judge reads them; those with nothing to write are left out.

    Every rank first reads its share of them, to measure how long they are.
    """

    def __init__(self, comparisons, patches: np.ndarray, rewrite, device=None):
        self.comparisons = comparisons
        self.rewrite = rewrite
        rank, world, device = data.start_distributed()
        tokens = torch.zeros(len(comparisons), dtype=torch.long, device=device)
        for i in tqdm(range(rank, len(tokens), world), desc="measure", disable=rank > 0):
            read = rewrite(comparisons[i])
            tokens[i] = read.length if read.responses else 0
        dist.all_reduce(tokens)
        lengths = tokens.cpu().numpy()
        self.chosen = np.flatnonzero(lengths)
        self.size = lengths[self.chosen], patches[self.chosen]
        needs = "a critic needs critiques, one for each response, and a judge two responses"
        if not len(self.chosen):
            raise UserError(f"no comparison to learn from: {needs}")
        if rank == 0 and len(self.chosen) < len(lengths):
            left_out = len(lengths) - len(self.chosen)
            print(f"{left_out} of {len(lengths)} comparisons left out: {needs}")

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int):
        return self.rewrite(self.comparisons[int(self.chosen[i])])

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.size


def writing_loss(row, log_p: Tensor) -> Tensor:
    """Mean over the tokens that a comparison has to write, summed over comparisons."""
    return -(row.written.weight * log_p).sum()


def critic_loss(model, row, pairs: Pairs, settings: Settings) -> tuple[Tensor, Tensor]:
    scores, log_p = model(row, row.written)
    loss = ranking_loss(scores, pairs, settings.zero_coefficient, settings.length_normalisation)
    return loss + settings.critique_coefficient * writing_loss(row, log_p), scores


def judge_loss(model, row, pairs: Pairs, settings: Settings) -> tuple[Tensor, Tensor]:
    scores, log_p = model(row, row.written)
    return writing_loss(row, log_p), scores


LOSSES = {"naive": loss_and_scores, "critic": critic_loss, "generative": judge_loss}
# The critiques of the data give away which response is better; only 04 makes a critic write.
VALIDATION_ACCURACY = {
    "naive": "validation_accuracy",
    "critic": "validation_accuracy_with_given_critiques",
    "generative": "validation_accuracy",
}


def main(settings: Settings) -> None:
    last = train(settings)
    if dist.get_rank() == 0:
        print(f"{settings.out}: the trained reward model; metrics in {settings.out}/metrics.jsonl")
        print("Next: torchrun --standalone --nproc_per_node=2 04_eval.py")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
