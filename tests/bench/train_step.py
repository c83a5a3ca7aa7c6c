"""Training steps (forward, backward, AdamW) of the same weights on the same comparisons, fp32

    python tests/bench/train_step.py

Multimodal: this codebase against the peers' way (common.py), three batches of 8 pairs with pictures
of 64-256 tokens, prompts of 20-80, responses of 20-200; and three of 2 prompts with 4 ranked
responses each, against two padded rows for each of the 6 pairs, and against 4 padded rows. Text:
against TRL's own RewardTrainer (its collator and compute_loss, then backward and AdamW), three
batches of 16 pairs with prompts of 30-250 tokens and responses of 30-350. One process; batches are
in memory before the clock starts.
Losses and gradients are compared first. The ideal is the ratio of floating-point operations, as
PyTorch counts them in both.
"""

import tempfile
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2Model
from trl import RewardConfig, RewardTrainer


class Way:
    """One way to train: calling it takes a step on each batch. `loss_of(batch)` is what differs."""

    def __init__(self, parameters, batches: list, loss_of):
        self.optimizer, self.batches, self.loss_of = (
            torch.optim.AdamW(parameters, lr=1e-6, fused=True),
            batches,
            loss_of,
        )

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


def ours(model, batches: list[list]) -> Way:
    """As the loop of 03_train.py."""
    packed = [
        (common.model_stage.pack(batch, model.processors), common.training.pairs_of(batch))
        for batch in batches
    ]
    return Way(
        model.parameters(),
        packed,
        lambda each: common.training.ranking_loss(model(each[0]), each[1]) / len(batches[0]),
    )


def padded(backbone, head, batches: list[list], processors) -> Way:
    """The peers' way: a row for each response, all first ones, then all second ones, and so on."""
    n = len(batches[0][0].responses)

    def loss_of(batch):
        scores = common.padded_scores(backbone, head, batch).view(n, -1)  # [responses, prompts]
        better, worse = torch.triu_indices(n, n, 1)  # the first is best
        return -F.logsigmoid(scores[better] - scores[worse]).mean()

    parameters = [*backbone.parameters(), *head.parameters()]
    return Way(parameters, [common.padded_rows(batch, processors) for batch in batches], loss_of)


def pairs_apart(batch: list) -> list:
    """Make a comparison of each pair."""
    pairs = []
    for c in batch:
        for better, worse in c.pairs:
            responses = [c.responses[better], c.responses[worse]]
            pairs.append(common.Comparison(c.prompt, responses, [1, 2], c.images, c.grids))
    return pairs


def trl(model, batches: list[list], processors, folder: Path) -> Way:
    def rows_of(batch) -> list[dict]:
        def row(c, response) -> list[int]:
            return np.concatenate([c.prompt, response]).tolist()

        return [
            {"chosen_ids": row(c, c.responses[0]), "rejected_ids": row(c, c.responses[1])}
            for c in batch
        ]

    off = {"gradient_checkpointing": False, "bf16": False, "report_to": "none", "max_length": None}
    arguments = RewardConfig(
        str(folder), per_device_train_batch_size=len(batches[0]), use_cpu=True, **off
    )
    rows = [rows_of(batch) for batch in batches]
    trainer = RewardTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows[0]),
        processing_class=processors.tokenizer,
    )
    inputs = [dict(trainer.data_collator(each)) for each in rows]
    return Way(model.parameters(), inputs, lambda each: trainer.compute_loss(model, dict(each)))


def compare(title: str, name: str, here: Way, there: Way, same: list[tuple]) -> list[list]:
    """Compare losses, and gradients of the `same` parameters; then times, in two table lines."""
    for batch, other in zip(here.batches, there.batches):
        losses = here.backward(batch), there.backward(other)
        assert abs(losses[0] - losses[1]) < 1e-5, losses
        for mine, theirs in same:
            torch.testing.assert_close(
                mine.grad, theirs.grad, atol=1e-4 * float(theirs.grad.abs().max()), rtol=1e-3
            )
    tokens = (
        sum(row.input_ids.numel() for row, _ in here.batches),
        sum(b["input_ids"].numel() for b in there.batches),
    )
    ideal = there.flops() / here.flops()
    seconds = common.alternate({"there": there, "here": here})
    faster = common.ratio(seconds["there"], seconds["here"])

    def cell(seconds: list[float]) -> str:
        of_step = [total / len(here.batches) for total in seconds]
        return f"{common.median(of_step):.2f} ({common.spread(of_step)})"

    return [
        [f"{title}: {name}", tokens[1], cell(seconds["there"]), "1", "1", ""],
        [
            f"{title}: here",
            tokens[0],
            cell(seconds["here"]),
            f"{faster:.2f}",
            f"{ideal:.2f}",
            f"{faster / ideal:.2f}",
        ],
    ]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    model, plain = common.make_models(folder / "vl", common.vision_language_config())
    processors = model.processors
    batches = [common.make_comparisons(processors, 8, seed=seed) for seed in range(3)]
    head = common.model_stage.RewardHead(**model.head.settings)
    head.load_state_dict(model.head.state_dict())
    here, there = ours(model, batches), padded(plain, head, batches, processors)

    def pick(backbone) -> tuple:
        decoder = backbone.language_model.layers[0].mlp.up_proj.weight
        return decoder, backbone.visual.blocks[0].mlp.up_proj.weight

    same = list(zip(pick(model.backbone), pick(plain)))
    table = [
        [
            "training step",
            "tokens",
            "seconds a step (range)",
            "times as fast",
            "FLOPs say",
            "of what FLOPs say",
        ]
    ]
    table += compare("pictures", "padded rows", here, there, same)
    ranked = [common.make_comparisons(processors, 2, n=4, seed=seed) for seed in range(3)]
    here = ours(model, ranked)
    there = padded(plain, head, list(map(pairs_apart, ranked)), processors)
    table += compare("4 responses", "6 padded pairs", here, there, same)
    there = padded(plain, head, ranked, processors)
    table += compare("4 responses", "4 padded rows", here, there, same)

    shape = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    shape |= {
        "vocab_size": 576,
        "num_key_value_heads": 2,
        "pad_token_id": processors.tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    Qwen2Model(Qwen2Config(**shape)).save_pretrained(folder / "text")
    processors.tokenizer.save_pretrained(folder / "text")
    model = common.RewardModel.from_backbone(
        str(folder / "text"), common.model_stage.HeadSettings(head_layers=1)
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder / "text", dtype=torch.float32, num_labels=1
    )
    theirs.score.weight.data.copy_(model.head.mlp[0].weight)
    lengths = {"image": None, "prompt": (30, 250), "response": (30, 350)}
    batches = [common.make_comparisons(processors, 16, **lengths, seed=seed) for seed in range(3)]
    here, there = ours(model, batches), trl(theirs, batches, processors, folder / "trl")
    same = [
        (model.backbone.layers[0].mlp.up_proj.weight, theirs.model.layers[0].mlp.up_proj.weight)
    ]
    table += compare("text", "TRL's RewardTrainer", here, there, same)
    print(f"\n{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
