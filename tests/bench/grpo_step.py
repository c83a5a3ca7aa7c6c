"""One step of GRPO, here and in TRL's GRPOTrainer: the same text policy, prompts and reward model, fp32, one process

    python tests/bench/grpo_step.py

8 prompts of 100-300 tokens, 8 answers to each of exactly 96 tokens (the end-of-turn token is never sampled), a KL term
to the frozen start. Timed alone: writing the answers, scoring them with the reward model, and the update (log-
probabilities under the policy and the start, loss, backward, AdamW, and here the copy to the model that samples). The
log-probabilities that both compute of the same answers are compared first. TRL generates with transformers, as it does
where there is no vLLM.
"""

import importlib
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from trl import GRPOConfig, GRPOTrainer

grpo = importlib.import_module("06_grpo")
PROMPTS, GROUP, LENGTH = 8, 8, 96


def make_checkpoints(folder: Path) -> None:
    """A policy and a backbone for the reward model, 6 layers of width 256, random weights."""
    tokenizer = common.data.load_processors(common.TINY).tokenizer
    shape = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    shape |= {"vocab_size": 576, "num_key_value_heads": 2}
    shape |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, cls in (("policy", Qwen2ForCausalLM), ("judge", Qwen2Model)):
        torch.manual_seed(0)
        cls(Qwen2Config(**shape)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


class Ours:
    def __init__(self, folder: Path, prompts: list[np.ndarray]):
        _, _, device = common.data.start_distributed()
        self.settings = grpo.Settings(
            backbone=str(folder / "policy"),
            group_size=GROUP,
            max_new_tokens=LENGTH,
            reward="model",
            micro_tokens=16384,
        )
        self.policy, self.actor, self.frozen = (
            grpo.Policy(self.settings.backbone, 1.0) for _ in range(3)
        )
        for copy in (self.actor, self.frozen):
            copy.eval().requires_grad_(False)
            copy.forbidden = torch.cat(
                [copy.forbidden, torch.tensor([copy.processors.tokenizer.eos_token_id])]
            )
        self.judge = common.RewardModel.from_backbone(
            str(folder / "judge"), common.model_stage.HeadSettings(head_layers=1)
        )
        common.training.shard(self.policy, self.policy.lm.model, device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.prompts = [common.Comparison(ids, [], [], record={}) for ids in prompts]
        self.steps = 0

    def step(self) -> dict[str, float]:
        """As in 06_grpo.train; seconds of each part."""
        self.steps += 1
        times = [time.perf_counter()]
        seeds = [[self.steps, i] for i in range(PROMPTS)]
        samples = grpo.sample(
            self.actor, self.prompts, seeds, self.settings
        )  # [prompts, GROUP, LENGTH]
        texts = grpo.texts_of(samples.flatten(0, 1), self.policy.processors)
        times.append(time.perf_counter())
        texts = [texts[i : i + GROUP] for i in range(0, len(texts), GROUP)]
        *_, reward = grpo.reward_answers(self.judge, self.prompts, texts, self.settings)
        times.append(time.perf_counter())
        advantage = reward - reward.mean(1, keepdim=True)
        grpo.update(
            self.policy,
            self.frozen,
            self.optimizer,
            self.prompts,
            samples,
            advantage,
            self.settings,
        )
        grpo.copy_weights(self.policy, self.actor)
        times.append(time.perf_counter())
        assert (samples >= 0).all()
        self.samples = samples
        return dict(zip(("rollout", "scoring", "update"), np.diff(times).tolist()))


class Theirs:
    def __init__(self, folder: Path, prompts: list[str]):
        tokenizer = common.data.load_processors(str(folder / "policy")).tokenizer
        policy = Qwen2ForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        judge = AutoModelForSequenceClassification.from_pretrained(
            folder / "judge", dtype=torch.float32, num_labels=1
        )
        arguments = GRPOConfig(
            str(folder / "trl"),
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            beta=0.1,
            learning_rate=1e-6,
            generation_kwargs={"suppress_tokens": sorted(tokenizer.get_added_vocab().values())},
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        self.trainer = GRPOTrainer(policy, judge, arguments, data, processing_class=tokenizer)
        self.trainer.current_gradient_accumulation_steps = 1  # which its loop sets
        self.optimizer = self.trainer.create_optimizer()
        self.inputs = next(iter(self.trainer.get_train_dataloader()))
        self.seconds = {}
        self.trainer._generate = self.timed("rollout", self.trainer._generate)
        self.trainer._calculate_rewards = self.timed("scoring", self.trainer._calculate_rewards)

    def timed(self, part: str, function):
        def call(*arguments, **more):
            began = time.perf_counter()
            result = function(*arguments, **more)
            self.seconds[part] = time.perf_counter() - began
            return result

        return call

    def step(self) -> dict[str, float]:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.trainer.training_step(self.trainer.model, self.inputs, None)
        self.optimizer.step()
        whole = time.perf_counter() - began
        return self.seconds | {"update": whole - sum(self.seconds.values())}


def log_probabilities_agree(ours: Ours, theirs: Theirs) -> None:
    """Of the answers just sampled, before any weight has changed."""
    groups = [
        common.Comparison(p.prompt, [row.numpy().astype(np.int32) for row in group], [])
        for p, group in zip(ours.prompts, ours.samples)
    ]
    model = theirs.trainer.model.eval()
    with torch.no_grad():
        here = ours.frozen(common.model_stage.pack(groups, ours.frozen.processors))[0].view(
            -1, LENGTH
        )
        for group, part in zip(groups, here.split(GROUP)):
            ids = torch.from_numpy(
                np.stack([np.concatenate([group.prompt, r]) for r in group.responses]).astype(
                    np.int64
                )
            )
            logits = (
                model(ids)
                .logits[:, -LENGTH - 1 : -1]
                .index_fill(-1, ours.frozen.forbidden, -torch.inf)
            )
            there = logits.log_softmax(-1).gather(-1, ids[:, -LENGTH:, None])[..., 0]
            torch.testing.assert_close(part, there, atol=1e-4, rtol=1e-4)
    model.train()


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    make_checkpoints(folder)
    tokenizer = common.data.load_processors(common.TINY).tokenizer
    rng = np.random.default_rng(0)
    texts = [
        "".join(chr(c) for c in rng.integers(97, 123, rng.integers(150, 450)))
        for _ in range(PROMPTS)
    ]
    prompts = [
        np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in texts
    ]
    ours, theirs = Ours(folder, prompts), Theirs(folder, texts)
    seconds = {"ours": [ours.step()], "theirs": [theirs.step()]}
    log_probabilities_agree(ours, Theirs(folder, texts))
    seconds = {"ours": [], "theirs": []}
    for _ in range(5):
        seconds["ours"].append(ours.step())
        seconds["theirs"].append(theirs.step())
    for steps in seconds.values():
        for step in steps:
            step["step"] = sum(step.values())
    print(
        f"\n{common.machine()}; prompts of {min(map(len, prompts))}-{max(map(len, prompts))} tokens\n"
    )
    table = [["GRPO", "here, seconds", "TRL, seconds", "times as fast"]]
    for part in ("rollout", "scoring", "update", "step"):
        here, there = ([step[part] for step in seconds[who]] for who in ("ours", "theirs"))
        cells = [f"{common.median(each):.2f} ({common.spread(each)})" for each in (here, there)]
        table.append([part, *cells, f"{common.ratio(there, here):.2f}"])
    common.print_table(table)


if __name__ == "__main__":
    main()
