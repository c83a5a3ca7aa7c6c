"""Best of N: sample answers from a policy and keep the one that the reward model scores highest

    python tests/miniature/best_of.py --model artifacts/reward

Nothing is trained, so this shows how well the reward model sees what a policy could learn from it.
It writes best_of.json: the mean answer, the best by reward model, and the best there was, as shares
of closed questions answered exactly and as grades of descriptions.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
grpo = importlib.import_module("06_grpo")
option = data.option


@dataclass
class Settings:
    backbone: str = option("tests/tiny/policy", "policy")
    model: str = option("artifacts/reward", "reward model")
    data: str = option("artifacts/data/new_questions", "prepared questions")
    out: str = option("artifacts/best_of", "folder for best_of.json")
    group_size: int = option(8, "answers to a question")
    max_new_tokens: int = option(96, "longest answer, in tokens")
    rollout_batch: int = option(64, "questions to sample from at a time")
    micro_tokens: int = option(8192, "tokens of one forward")
    seed: int = option(0, "of sampling")


def grades_of(prompts, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which questions are closed, [B], and grades of texts [B][G] from 0 to 1, [B, G]."""
    closed, grades = grpo.matches(prompts, texts)
    grade = data.embedded_world().grade
    for i, (prompt, group) in enumerate(zip(prompts, texts)):
        if not closed[i]:
            grades[i] = torch.tensor([grade(text, prompt.record["truth"]) for text in group])
    return closed[:, 0], grades


def main(settings: Settings) -> None:
    _, _, device = data.start_distributed()
    policy = model_stage.place(grpo.Policy(settings.backbone, temperature=1.0), device)
    reward_model = model_stage.place(model_stage.load_reward(settings.model, ""), device)
    questions = data.Comparisons(settings.data, policy.fingerprint)
    prompts = [questions[i] for i in range(len(questions))]
    noise = np.random.default_rng(settings.seed)
    noise = noise.random((len(prompts), settings.group_size, settings.max_new_tokens))
    _, _, texts = grpo.sample(policy, prompts, noise, settings)
    score = grpo.score_groups(reward_model, prompts, texts, settings)  # [B, G]
    closed, grades = grades_of(prompts, texts)  # [B] and [B, G]
    chosen = grades.gather(1, score.argmax(1, keepdim=True))[:, 0]
    answers = {"mean": grades.mean(1), "chosen": chosen, "best": grades.amax(1)}
    measured = {}
    for name, grade in answers.items():  # [B]
        of_closed = grade[closed].mean().item()
        of_open = grade[~closed].mean().item()
        measured[f"{name}: closed"] = of_closed
        measured[f"{name}: open"] = of_open
        measured[f"{name}: average"] = (of_closed + of_open) / 2
    data.write_file(Path(settings.out, "best_of.json"), json.dumps(measured, indent=1))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
