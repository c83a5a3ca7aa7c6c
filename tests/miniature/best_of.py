"""Best of N: sample answers from a policy and keep the one that the reward model scores highest

    python tests/miniature/best_of.py --model artifacts/reward --out artifacts/best_of

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


@dataclass
class Settings(grpo.Settings):
    out: str = data.option("artifacts/best_of", "folder for best_of.json")


def grades_of(prompts, texts) -> torch.Tensor:
    """Grade texts [B][G] of closed and open questions from 0 to 1, [B, G]."""
    closed, match = grpo.matches(prompts, texts)
    grade = data.embedded_world().grade
    for i, (prompt, group) in enumerate(zip(prompts, texts)):
        if not closed[i]:
            match[i] = torch.tensor([grade(text, prompt.record["truth"]) for text in group])
    return match


def main(settings: Settings) -> None:
    _, _, device = data.start_distributed()
    policy = model_stage.place(grpo.Policy(settings.backbone, settings.temperature), device)
    reward_model = model_stage.place(model_stage.load_reward(settings.model, ""), device)
    questions, _ = grpo.open_questions(settings, [policy, reward_model])
    prompts = [questions[i] for i in range(min(settings.evaluate_size, len(questions)))]
    noise = np.random.default_rng(settings.seed)
    noise = noise.random((len(prompts), settings.group_size, settings.max_new_tokens))
    _, _, texts = grpo.sample(policy, prompts, noise, settings)
    score = grpo.score_groups(reward_model, prompts, texts, settings)  # [B, G]
    grade = grades_of(prompts, texts)  # [B, G]
    closed = torch.tensor(["truth" not in prompt.record for prompt in prompts])
    chosen = grade.gather(1, score.argmax(1, keepdim=True))[:, 0]
    answers = {"mean": grade.mean(1), "chosen": chosen, "best": grade.amax(1)}
    measured = {}
    for name, grades in answers.items():
        of_closed = grades[closed].mean().item()
        of_open = grades[~closed].mean().item()
        measured[f"{name}: closed"] = of_closed
        measured[f"{name}: open"] = of_open
        measured[f"{name}: average"] = (of_closed + of_open) / 2
    data.write_file(Path(settings.out, "best_of.json"), json.dumps(measured, indent=1))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
