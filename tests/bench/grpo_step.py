"""One step of GRPO, here and in TRL's GRPOTrainer: same text policy, prompts and reward model

    python tests/bench/grpo_step.py

In float32, in one process: 8 prompts of 245 to 376 tokens, 8 responses to each of exactly 96 tokens
(the end-of-turn token is never sampled), a KL term to the frozen start. Timed separately: the
rollout, scoring by the reward model, and the update (log-probabilities by policy and reference,
loss, backward, AdamW, and here the copy to the actor). First the log-probabilities that both
compute for the same responses are compared. TRL generates with transformers, as it does without
vLLM.
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
PARTS = ("rollout", "scoring", "update")


def make_checkpoints(folder: Path) -> None:
    """Write a policy and a backbone for the reward model, 6 layers of width 256, random weights."""
    tokenizer = common.data.load_processors(common.TINY).tokenizer
    config = Qwen2Config(
        vocab_size=640,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for name, cls in (("policy", Qwen2ForCausalLM), ("judge", Qwen2Model)):
        torch.manual_seed(0)
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


class Ours:
    def __init__(self, folder: Path, prompts: list[np.ndarray]):
        _, _, device = common.data.start_distributed()
        path = str(folder / "policy")
        sizes = {"group_size": GROUP, "max_new_tokens": LENGTH, "micro_tokens": 16384}
        self.settings = grpo.Settings(backbone=path, reward="model", **sizes)
        self.policy = grpo.Policy(path, 1.0)
        self.actor = grpo.Policy(path, 1.0)
        self.reference = grpo.Policy(path, 1.0)
        end = torch.tensor([self.policy.processors.end_token])
        for model in (self.actor, self.reference):
            model.eval().requires_grad_(False)
            model.forbidden = torch.cat([model.forbidden, end])
        self.judge = common.RewardModel.from_backbone(
            str(folder / "judge"), common.model_stage.HeadSettings(head_layers=1)
        )
        common.training.shard(self.policy, self.policy.lm.model, device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.prompts = [common.Comparison(ids, [], [], record={}) for ids in prompts]
        self.noise = np.random.default_rng(0)

    def step(self) -> dict[str, float]:
        """As in 06_grpo.train; seconds of each part."""
        times = [time.perf_counter()]
        noise = self.noise.random((PROMPTS, GROUP, LENGTH))
        self.samples, self.log_p, texts = grpo.sample(
            self.actor, self.prompts, noise, self.settings
        )
        assert (self.samples >= 0).all()
        times.append(time.perf_counter())
        reward = grpo.score_groups(self.judge, self.prompts, texts, self.settings)
        times.append(time.perf_counter())
        advantage = grpo.advantage_of(reward, "centred")
        models = (self.policy, self.reference, self.optimizer)
        rollouts = self.prompts, self.samples, self.log_p, advantage
        grpo.update(*models, *rollouts, self.settings)
        with torch.no_grad():
            for target, source in zip(self.actor.parameters(), self.policy.parameters()):
                target.copy_(source.full_tensor())
        times.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(times).tolist()))


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
        self.trainer.current_gradient_accumulation_steps = 1  # its loop sets this
        self.optimizer = self.trainer.create_optimizer()
        self.inputs = next(iter(self.trainer.get_train_dataloader()))
        self.seconds = {}
        self.trainer._generate = self.timed("rollout", self.trainer._generate)
        self.trainer._calculate_rewards = self.timed("scoring", self.trainer._calculate_rewards)

    def timed(self, part: str, function):
        def call(*arguments, **options):
            began = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] = time.perf_counter() - began
            return result

        return call

    def step(self) -> dict[str, float]:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.trainer.training_step(self.trainer.model, self.inputs, None)
        self.optimizer.step()
        seconds = time.perf_counter() - began
        return self.seconds | {"update": seconds - sum(self.seconds.values())}


@torch.no_grad()
def log_probabilities_agree(ours: Ours, theirs: Theirs) -> None:
    """Compare both on the responses just sampled, before any weight has changed."""
    reference = ours.reference
    model = theirs.trainer.model.eval()
    for prompt, samples in zip(ours.prompts, ours.samples):
        responses = list(samples.numpy().astype(np.int32))
        group = common.Comparison(prompt.prompt, responses, [])
        here, _ = reference(common.model_stage.pack([group], reference.processors))
        rows = [np.concatenate([prompt.prompt, response]) for response in responses]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits = model(ids).logits[:, -LENGTH - 1 : -1]
        log_p = logits.index_fill(-1, reference.forbidden, -torch.inf).log_softmax(-1)
        there = log_p.gather(-1, ids[:, -LENGTH:, None])[..., 0]
        torch.testing.assert_close(here.view(GROUP, LENGTH), there, atol=1e-4, rtol=1e-4)
    model.train()


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    make_checkpoints(folder)
    tokenizer = common.data.load_processors(common.TINY).tokenizer
    rng = np.random.default_rng(0)
    texts, prompts = [], []
    for _ in range(PROMPTS):
        letters = rng.integers(97, 123, rng.integers(150, 450))
        texts.append("".join(map(chr, letters)))
        ids = tokenizer.encode(texts[-1], add_special_tokens=False)
        prompts.append(np.array(ids, np.int32))
    ours, theirs = Ours(folder, prompts), Theirs(folder, texts)
    ours.step()  # warms up
    theirs.step()
    log_probabilities_agree(ours, Theirs(folder, texts))
    seconds = {"ours": [], "theirs": []}
    for _ in range(5):
        seconds["ours"].append(ours.step())
        seconds["theirs"].append(theirs.step())
    for steps in seconds.values():
        for step in steps:
            step["step"] = sum(step.values())
    lengths = [len(prompt) for prompt in prompts]
    print(f"\n{common.machine()}; prompts of {min(lengths)}-{max(lengths)} tokens\n")
    table = [["GRPO", "here, seconds", "TRL, seconds", "times as fast"]]
    for part in (*PARTS, "step"):
        here = [step[part] for step in seconds["ours"]]
        there = [step[part] for step in seconds["theirs"]]
        row = [part]
        for times in (here, there):
            row.append(f"{common.median(times):.2f} ({common.spread(times)})")
        table.append([*row, f"{common.ratio(there, here):.2f}"])
    common.print_table(table)


if __name__ == "__main__":
    main()
