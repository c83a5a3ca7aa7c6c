"""Training steps (forward, backward, AdamW) of the same weights on the same comparisons, fp32

    python tests/bench/train_step.py

Pictures: the packed row against the peers' way (common.py), three batches of 8 pairs with pictures
of 64-256 tokens, prompts of 20-80, responses of 20-200. Rankings: three batches of 2 prompts with 4
ranked responses each, against two padded rows for each of the 6 pairs, and against 4 padded rows.
Text: against TRL's own RewardTrainer (its collator and compute_loss, then backward and AdamW),
three batches of 16 pairs with prompts of 30-250 tokens and responses of 30-350. One process;
batches are in memory before the clock starts. Losses and gradients are compared first. "FLOPs say"
is the ratio of floating-point operations, as PyTorch counts them in both.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2Model
from trl import RewardConfig, RewardTrainer

TEXT_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
TEXT_LENGTHS = {"image": None, "prompt": (30, 250), "response": (30, 350)}
HEADER = ["training step", "tokens", "seconds a step (range)"]
HEADER += ["times as fast", "FLOPs say", "of what FLOPs say"]


@dataclass
class Way:
    """One way to train; calling it takes a step on each batch."""

    optimizer: torch.optim.Optimizer
    batches: list
    loss_of: Callable  # batch -> loss
    tokens: int  # of all batches, padding included

    def backward(self, batch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss_of(batch)
        loss.backward()
        return loss.item()

    def __call__(self) -> None:
        for batch in self.batches:
            self.backward(batch)
            self.optimizer.step()

    def flops(self) -> int:
        return sum(common.flops(partial(self.backward, batch)) for batch in self.batches)


def optimizer_of(*modules: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


def packed_way(model, batches: list[list]) -> Way:
    """Train as the loop of 03_train.py does."""

    def loss_of(batch):
        row, pairs = batch
        return common.training.ranking_loss(model(row), pairs) / len(batches[0])

    packed = []
    for batch in batches:
        row = common.model_stage.pack(batch, model.processors)
        packed.append((row, common.training.pairs_of(batch)))
    tokens = sum(row.input_ids.numel() for row, _ in packed)
    return Way(optimizer_of(model), packed, loss_of, tokens)


def padded_way(backbone, head, batches: list[list], processors) -> Way:
    """Train as the peers do: a row for each response; all first responses come first."""
    n = len(batches[0][0].responses)

    def loss_of(rows):
        scores = common.padded_scores(backbone, head, rows).view(n, -1)  # [responses, prompts]
        better, worse = torch.triu_indices(n, n, 1)  # the first response is the best
        return -F.logsigmoid(scores[better] - scores[worse]).mean()

    padded = [common.padded_rows(batch, processors) for batch in batches]
    tokens = sum(rows["input_ids"].numel() for rows in padded)
    return Way(optimizer_of(backbone, head), padded, loss_of, tokens)


def trl_way(model, batches: list[list], processors, folder: Path) -> Way:
    """Train text as TRL's RewardTrainer does."""
    datasets = []
    for batch in batches:
        rows = []
        for c in batch:
            chosen, rejected = (np.concatenate([c.prompt, part]).tolist() for part in c.responses)
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
        datasets.append(rows)
    arguments = RewardConfig(
        str(folder),
        per_device_train_batch_size=len(batches[0]),
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        max_length=None,
    )
    trainer = RewardTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(datasets[0]),
        processing_class=processors.tokenizer,
    )
    collated = [dict(trainer.data_collator(rows)) for rows in datasets]
    tokens = sum(inputs["input_ids"].numel() for inputs in collated)

    def loss_of(inputs):
        return trainer.compute_loss(model, dict(inputs))

    return Way(optimizer_of(model), collated, loss_of, tokens)


def pairs_apart(batch: list) -> list:
    """Make a comparison of each pair."""
    pairs = []
    for c in batch:
        for better, worse in c.pairs:
            responses = [c.responses[better], c.responses[worse]]
            pairs.append(common.Comparison(c.prompt, responses, [1, 2], c.images, c.grids))
    return pairs


def compare(title: str, name: str, here: Way, there: Way, same: list[tuple]) -> list[list]:
    """Compare losses, and gradients of the `same` parameters; then times, in two table lines."""
    for batch, other in zip(here.batches, there.batches):
        losses = [here.backward(batch), there.backward(other)]
        assert abs(losses[0] - losses[1]) < 1e-5, losses
        for mine, theirs in same:
            tolerance = 1e-4 * float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, atol=tolerance, rtol=1e-3)
    flops = there.flops() / here.flops()
    seconds = common.alternate({"there": there, "here": here})
    faster = common.ratio(seconds["there"], seconds["here"])
    cells = {}
    for way, times in seconds.items():
        of_step = [total / len(here.batches) for total in times]
        cells[way] = f"{common.median(of_step):.2f} ({common.spread(of_step)})"
    ratios = [f"{faster:.2f}", f"{flops:.2f}", f"{faster / flops:.2f}"]
    return [
        [f"{title}: {name}", there.tokens, cells["there"], "1", "1", ""],
        [f"{title}: here", here.tokens, cells["here"], *ratios],
    ]


def compare_pictures(folder: Path) -> list[list]:
    model, plain = common.make_models(folder, common.vision_language_config())
    processors = model.processors
    head = common.model_stage.RewardHead(**model.head.settings)
    head.load_state_dict(model.head.state_dict())
    same = []
    for backbone in (model.backbone, plain):
        decoder = backbone.language_model.layers[0].mlp.up_proj.weight
        same.append((decoder, backbone.visual.blocks[0].mlp.up_proj.weight))
    same = list(zip(*same))
    pairs = [common.make_comparisons(processors, 8, seed=seed) for seed in range(3)]
    here = packed_way(model, pairs)
    there = padded_way(plain, head, pairs, processors)
    lines = compare("pictures", "padded rows", here, there, same)
    rankings = [common.make_comparisons(processors, 2, n=4, seed=seed) for seed in range(3)]
    here = packed_way(model, rankings)
    there = padded_way(plain, head, [pairs_apart(batch) for batch in rankings], processors)
    lines += compare("rankings of 4", "6 padded pairs", here, there, same)
    there = padded_way(plain, head, rankings, processors)
    lines += compare("rankings of 4", "4 padded rows", here, there, same)
    return lines


def compare_text(folder: Path) -> list[list]:
    processors = common.data.load_processors(common.TINY)
    torch.manual_seed(0)
    config = Qwen2Config(**TEXT_SHAPE, pad_token_id=processors.tokenizer.pad_token_id)
    Qwen2Model(config).save_pretrained(folder)
    processors.tokenizer.save_pretrained(folder)
    head = common.model_stage.HeadSettings(head_layers=1)
    model = common.RewardModel.from_backbone(str(folder), head)
    trls = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1
    )
    trls.score.weight.data.copy_(model.head.mlp[0].weight)
    batches = [
        common.make_comparisons(processors, 16, **TEXT_LENGTHS, seed=seed) for seed in range(3)
    ]
    here = packed_way(model, batches)
    there = trl_way(trls, batches, processors, folder / "trl")
    mine, theirs = model.backbone.layers[0].mlp, trls.model.layers[0].mlp
    same = [(mine.up_proj.weight, theirs.up_proj.weight)]
    return compare("text", "TRL's RewardTrainer", here, there, same)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    table = [HEADER, *compare_pictures(folder / "pictures"), *compare_text(folder / "text")]
    print(f"\n{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
