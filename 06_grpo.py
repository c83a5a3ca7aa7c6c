"""Stage 6 · GRPO with the hybrid reward: the reward model improves a policy

    torchrun --standalone --nproc_per_node=2 06_grpo.py                          # tests/tiny on the embedded questions
    torchrun --standalone --nproc_per_node=2 06_grpo.py --reward rule

In    A policy (a vision-language model with its LM head), a reward model (03), prepared questions (01), closed ones
      with an `answer` and open ones.
Out   artifacts/policy/: the trained policy in the Hugging Face layout, metrics.jsonl, evaluation.json (shares, not
      percent), and samples.jsonl with its answers to the held-out questions before and after. Benchmarks that need a
      judge model get those answers in the form that their judge reads, answers_before.jsonl and answers_after.jsonl.

For each prompt the policy writes G answers; each is rewarded; what is better than its group's mean becomes likelier.
Rewards, as in the paper (Table 11): `rule`, 1 on an exact match, or by another rule that the question carries (RULES);
`model`, the reward model's raw score (with a generative judge, the sum over all ordered pairs of a group: R1-Reward's
place in the paper); `hybrid`, 1 on a match, else sigmoid(score). The paper's run: Qwen2.5-VL-3B, 8 rollouts, 1 epoch,
batch 256; KL, learning rate, clipping, temperature not stated.

Deviations from GRPO as published (DeepSeekMath, arXiv 2402.03300), and from the paper's hybrid:
  - The advantage is reward - group mean, not divided by the group's standard deviation (--advantage group does that).
    With the hybrid reward a group that is all wrong has rewards like 0.48-0.52, and dividing blows their noise up to
    advantages of 1.4, as large as that of a right answer: phantom advantages, whose share is logged. Rule and hybrid
    are within 0 and 1, so that the KL coefficient means the same beside either. A reward model's raw scores can have
    any scale; for them there is --advantage batch, which divides by the deviation within the whole batch. With the
    hybrid reward it makes phantoms, too, once most groups are all right (tests/test_grpo.py).
  - The loss is the sum over all tokens of the step divided by their number over all ranks, not a mean within each
    answer first, which favours long wrong answers.
  - One update for each batch of rollouts, so the probability ratio is 1 and clipping would be inert: there is none.
  - The KL divergence to the start (the k3 estimator, as published) is averaged over tokens like the loss.
  - An answer cut at the length limit is rewarded as it stands. Special tokens, vision tokens above all, are never
    sampled: a policy that writes <|image_pad|> crashes some hundred steps later.
  - hybrid: sigmoid(score) of a wrong closed answer is scaled by --fallback_scale, so that no wrong answer that the
    reward model likes comes near a right one.
"""

import importlib
import json
import math
import re
import string
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
training = importlib.import_module("03_train")
option, Comparison, Comparisons, UserError = (
    data.option,
    data.Comparison,
    data.Comparisons,
    data.UserError,
)
PackedRow, Reward = model_stage.PackedRow, model_stage.Reward
texts_of = model_stage.texts_of


@dataclass
class Settings:
    backbone: str = option(
        "tests/tiny", "the policy to start from, with its LM head (paper: Qwen2.5-VL-3B)"
    )
    model: str = option("artifacts/reward", "the reward model")
    text_model: str = option(
        "", "text-only reward model for what has no image (the paper's advice); '' for none"
    )
    data: str = option("artifacts/data/questions", "prepared questions to train on")
    benchmark: str = option(
        "artifacts/data/new_questions", "prepared questions to evaluate on; '' for none"
    )
    out: str = option(
        "artifacts/policy", "folder for the trained policy, its metrics and its answers"
    )
    reward: Literal["rule", "model", "hybrid"] = option(
        "hybrid", "of an answer, by what (paper's best: hybrid)"
    )
    steps: int = option(60, "updates; each from fresh rollouts")
    batch_size: int = option(32, "prompts a step, over all ranks (paper: 256)")
    group_size: int = option(8, "rollouts a prompt (paper: 8)")
    max_new_tokens: int = option(96, "longest answer, in tokens")
    rollout_batch: int = option(
        64, "prompts that one rank answers at a time; their keys and values take memory"
    )
    temperature: float = option(1.0, "of sampling; the loss uses the same")
    learning_rate: float = option(
        1e-4, "peak of AdamW, after 5 warm-up steps, then linear to 0 (for 3B about 1e-6)"
    )
    advantage: Literal["centred", "batch", "group"] = option(
        "centred",
        "reward - group mean; by its deviation in the batch, for raw scores; in the group, as published",
    )
    fallback_scale: float = option(
        0.5, "hybrid: factor on sigmoid(score) of a wrong closed answer (paper: 1)"
    )
    kl_coefficient: float = option(
        0.1, "weight of the KL divergence to the start; 0: it is only logged"
    )
    clip: float = option(1.0, "largest norm of the gradient")
    micro_tokens: int = option(
        8192, "budget of one forward on one rank, in tokens of the packed row"
    )
    evaluate_size: int = option(
        400, "held-out questions of the evaluation; 0: all, as a published score needs"
    )
    export_dtype: Literal["fp32", "bf16"] = option(
        "fp32", "of the exported policy; bf16 is half as large"
    )
    export_file_size: str = option(
        "5GB", "largest file of the export, which is what rank 0 gathers at a time"
    )
    seed: int = option(
        0,
        "of the order of the prompts and of sampling; rollouts do not depend on the number of ranks",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The policy. Its log-probabilities come from the same packed row as a reward model's scores: a group is a comparison.


class Policy(model_stage.Writer):
    """`policy(row)` gives the log-probability of every response token of a PackedRow. `empty` leaves the weights to be
    filled in, as in `load_backbone`."""

    def __init__(self, path: str, temperature: float, empty: bool = False):
        lm = model_stage.load_backbone(path, lm_head=True, empty=empty)
        super().__init__(lm, data.load_processors(path), temperature)

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (without gradient) at each response token of the row, both [response tokens]."""
        places, predictors = row.response_tokens()
        hidden = model_stage.run_backbone(self.lm, row)[predictors]
        log_p = self.logits(hidden).log_softmax(-1)  # [tokens, vocabulary]
        taken = log_p.gather(-1, row.input_ids[0, places, None])
        taken = taken.sum(-1)  # of one element; a view would trip FSDP's backward hooks
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
        return taken, entropy


def rollout(
    policy: Policy,
    prompts: list[Comparison],
    group: int,
    max_new_tokens: int,
    noise: np.ndarray | None,
) -> Tensor:
    """Samples `group` answers to each prompt: token ids [prompts, group, max_new_tokens], -1 after the end-of-turn
    token; `noise` is as in `write`, None decodes greedily."""
    bare = [replace(prompt, responses=[], ranks=[]) for prompt in prompts]
    row = model_stage.pack(bare, policy.processors).to(policy.forbidden.device)
    return model_stage.write(policy, row, group, max_new_tokens, noise)


# ---------------------------------------------------------------------------------------------------------------------
# GRPO, tensors in, tensors out: rewards, advantages, loss. These four need nothing but torch.


def reward_of(
    kind: Literal["rule", "model", "hybrid"],
    match: Tensor,
    closed: Tensor,
    score: Tensor | None,
    fallback_scale: float,
) -> Tensor:
    """Rewards [groups, G] of the paper's Table 11: `rule` 1 on a match, `model` the raw score, `hybrid` 1 on a match,
    else sigmoid(score), of closed questions times `fallback_scale`.

    From matches [groups, G], 0 or 1, which questions are closed [groups, 1], and raw scores [groups, G]."""
    if kind == "rule":
        return match
    if kind == "model":
        return score
    if kind == "hybrid":
        return torch.where(
            match > 0, 1.0, torch.sigmoid(score) * torch.where(closed, fallback_scale, 1.0)
        )
    raise ValueError(f"reward {kind!r}: known are rule, model and hybrid")


def advantage_of(reward: Tensor, scale: Literal["centred", "batch", "group"]) -> Tensor:
    """Advantages from rewards, [B, G] each: what a reward is above its group's mean; as it is, or in units of the
    standard deviation of the batch's centred rewards, or of the group's."""
    centred = reward - reward.mean(1, keepdim=True)
    if scale == "centred":
        return centred
    if scale == "batch":
        return centred / (centred.std() + 1e-4)
    if scale == "group":
        return centred / (reward.std(1, keepdim=True) + 1e-4)
    raise ValueError(f"advantage {scale!r}: known are centred, batch and group")


def phantom_share(advantage: Tensor, match: Tensor, closed: Tensor) -> float:
    """How much of all |advantage| [B, G] is in groups of closed questions [B, 1] without a right answer, so is nothing
    but the reward model's opinion on which wrong answer is better."""
    size = advantage.abs().sum(1)  # [B]
    return (size[closed[:, 0] & (match.sum(1) == 0)].sum() / size.sum().clamp(min=1e-9)).item()


def grpo_loss(
    log_p: Tensor, start_log_p: Tensor, advantage: Tensor, kl_coefficient: float
) -> tuple[Tensor, Tensor]:
    """The loss, and of it the KL divergence to the start, both summed over sampled tokens, from [tokens] each: their
    log-probability by the policy, with gradient, and by its start, and the advantage of the answer that each is of.

    loss = sum over tokens of  beta (q / p - log(q / p) - 1)  -  A p / p',  p by the policy, q by its start

    DeepSeekMath (arXiv 2402.03300), equations 3 and 4, where the answers are of this very policy: the ratio of p to p',
    the same without gradient, is 1, and clipping it would do nothing. The KL term is Schulman's estimator k3 (2020,
    joschu.net/blog/kl-approx.html), unbiased and never negative. Divide by the number of tokens in the whole step.
    """
    kl = (start_log_p - log_p).exp() - (start_log_p - log_p) - 1
    ratio = (log_p - log_p.detach()).exp()
    return (kl_coefficient * kl - advantage * ratio).sum(), kl.detach().sum()


# ---------------------------------------------------------------------------------------------------------------------
# Rules: whether an answer is right. One is a function of the answer's text, the right answer and what the question's
# rule says; 01 has the same names. What is not clear is wrong: a policy learns whatever a rule rewards.


def normalise(text: str) -> str:
    """What an exact match compares: lower case, no leading article, no punctuation but in numbers, single spaces."""
    words = re.findall(r"[+-]?\d+(?:[.,]\d+)*|\w+", text.lower())
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def is_text(text: str, answer: str, rule: dict) -> bool:
    """Exact match."""
    return normalise(text) == normalise(answer)


def letter_of(text: str, options: list) -> str | None:
    """The option that an answer chooses; None if it is not clear which.

    In this order: a letter and nothing else; the last "the answer is B" (or "Answer: B", "option B"); the only letter
    in brackets, "(B) rubber"; a letter in front, "B. rubber"; an option's text, bare or after "the answer is".
    """
    letters = string.ascii_uppercase[: len(options) or 8]
    # A before a small word is the article, except in "A because".
    one = rf"([{letters[1:]}]|A(?! [a-z])|A(?= because| since))(?![\w'’])"
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    said = re.findall(rf"(?i:answer|option|choice)(?i: is)?:?[\s\"(\[*]*{one}", text)
    front = re.match(rf"\W*{one}(?:[.:)\]*\"]+(?![A-Z]\.)|\s*\n)", text)
    bracketed = {*re.findall(rf"\({one}\)", text)}
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    if said:
        return said[-1]
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    if front:
        return front[1]
    whole = {normalise(text), normalise(re.split(r"(?i)answer(?: is)?:?", text)[-1])} - {""}
    named = [letter for letter, option in zip(letters, options) if normalise(str(option)) in whole]
    return named[0] if len(named) == 1 else None


def is_letter(text: str, answer: str, rule: dict) -> bool:
    """The right option, by its letter or its text. Where it finds nothing else MathVista takes the option nearest in
    spelling, and VLMEvalKit one that a short answer mentions; here such answers are wrong."""
    return letter_of(text, rule.get("options", [])) == answer.strip()


def is_yes_no(text: str, answer: str, rule: dict) -> bool:
    """The first word, or the word after "the answer is". MME looks for the letters in the first four characters, which
    finds a "no" in "None" and "Not sure" as well."""
    said = re.match(r"\W*(?:the answer is|answer:)?\W*(yes|no)\b", text.lower())
    return said is not None and said[1] == answer.strip().lower()


NUMBER = re.compile(  # -3, 1,000, 2.5, .5, 2e-3; in 2007-2008 the hyphen is no sign
    r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\w))?"
)


def numbers_of(text: str) -> list[float]:
    numbers = [float(found.replace(",", "")) for found in NUMBER.findall(text.replace("−", "-"))]
    return [number for number in numbers if math.isfinite(number)]


def list_of(text: str) -> list[float]:
    """The numbers of the last list in brackets, of the whole text if it has none."""
    lists = re.findall(r"\[([^\[\]]*)\]", text)
    return [
        number
        for part in (lists[-1].split(",") if lists else [text])
        for number in numbers_of(part)
    ]


def is_number(text: str, answer: str, rule: dict) -> bool:
    """The last number of a text; of type "list", all numbers of its last list.

    As in MathVista's calculate_score.py an "integer" loses what is after its point, others are rounded to `precision`
    places; where no precision is given they must be equal. (MathVista first has a language model find the number.) The
    unit is cut out, so that the 2 of cm^2 is no number; that an answer is in another unit is not noticed.
    """
    text = text.replace(rule["unit"], " ") if rule.get("unit") else text
    if rule.get("type") == "list":
        return list_of(text) == list_of(answer)
    found, right = numbers_of(text)[-1:], numbers_of(answer)[-1:]
    if rule.get("type") == "integer":
        found, right = ([int(number) for number in each] for each in (found, right))
    elif rule.get("precision") is not None:
        found, right = (
            [round(number, rule["precision"]) for number in each] for each in (found, right)
        )
    return found == right != []


RULES = {"text": is_text, "letter": is_letter, "yes_no": is_yes_no, "number": is_number}


def is_match(text: str, answer: object, rule: str | dict = "text") -> bool:
    """Whether a text is the answer, by the question's rule; never where there is no answer to match."""
    rule = rule if isinstance(rule, dict) else {"kind": rule}
    return answer is not None and RULES[rule["kind"]](text, str(answer), rule)


def is_right(text: str, record: dict) -> bool:
    """The same for a prepared question's record."""
    return is_match(text, record.get("answer"), record.get("rule", "text"))


# ---------------------------------------------------------------------------------------------------------------------
# One step: sample, reward, update. B prompts, G answers to each; what a function returns is the same on all ranks.


def sample(
    actor: Policy, prompts: list[Comparison], seeds: list | None, settings: Settings
) -> Tensor:
    """Every rank answers its share of the prompts; all ranks get all answers, [B, G, max_new_tokens], -1 after the end.

    `seeds` has one for each prompt, so that its answers do not depend on who else is asked, nor by which rank. Without
    seeds there is one answer to each, the likeliest, and prompts are read when it is their turn."""
    rank, world, device = data.start_distributed()
    shape = (settings.group_size if seeds else 1, settings.max_new_tokens)
    samples = torch.full((len(prompts), *shape), -1, device=device)
    mine = list(range(rank, len(prompts), world))
    if seeds:  # ranks are to take equally long in every step
        mine = training.deal(
            list(range(len(prompts))), np.array([len(p.prompt) for p in prompts]), world
        )[rank]
    parts = [
        mine[start : start + settings.rollout_batch]
        for start in range(0, len(mine), settings.rollout_batch)
    ]
    for part in tqdm(
        parts, desc="held-out questions", unit=" batch", disable=rank > 0 or seeds is not None
    ):
        noise = (
            np.stack([np.random.default_rng(seeds[i]).random(shape) for i in part])
            if seeds
            else None
        )
        samples[part] = rollout(actor, [prompts[i] for i in part], *shape, noise)
    dist.all_reduce(samples, dist.ReduceOp.MAX)
    return samples


def score_groups(
    reward_model: Reward | None,
    prompts: list[Comparison],
    texts: list[list[str]],
    settings: Settings,
) -> Tensor:
    """The reward model's scores [groups, G]. Answers are tokenized anew, as the reward model saw them in training."""
    encoded = [
        [data.encode_response(text, reward_model.processors) for text in group] for group in texts
    ]
    groups = [
        replace(prompt, responses=answers, ranks=[]) for prompt, answers in zip(prompts, encoded)
    ]
    return reward_model.score_encoded(groups, settings.micro_tokens).view(len(groups), -1)


def reward_answers(
    reward_model: Reward | None,
    prompts: list[Comparison],
    texts: list[list[str]],
    settings: Settings,
) -> tuple:
    """Which prompts are closed [B, 1], exact matches, raw scores (0 without a reward model) and rewards, all [B, G]."""
    rank, world, device = data.start_distributed()
    closed = torch.tensor([[p.record.get("answer") is not None] for p in prompts], device=device)
    right = [[is_right(text, p.record) for text in group] for p, group in zip(prompts, texts)]
    match = torch.tensor(right, dtype=torch.float32, device=device)
    score = torch.zeros_like(match)
    mine = list(range(rank, len(prompts), world))
    if reward_model and mine:
        score[mine] = score_groups(
            reward_model, [prompts[i] for i in mine], [texts[i] for i in mine], settings
        )
    dist.all_reduce(score)
    return (
        closed,
        match,
        score,
        reward_of(settings.reward, match, closed, score, settings.fallback_scale),
    )


def update(
    policy: Policy,
    frozen: Policy,
    optimizer: Optimizer,
    prompts: list[Comparison],
    samples: Tensor,
    advantage: Tensor,
    settings: Settings,
) -> dict[str, float]:
    """One optimizer step on the groups, packed and dealt as in 03. `samples` [B, G, tokens], `advantage` [B, G]."""
    rank, world, device = data.start_distributed()
    lengths = (samples >= 0).sum(-1)  # [B, G]
    answers = [
        [tokens[tokens >= 0].cpu().numpy().astype(np.int32) for tokens in group]
        for group in samples
    ]
    groups = [replace(prompt, responses=group, ranks=[]) for prompt, group in zip(prompts, answers)]
    sizes = np.array([group.length for group in groups])
    patches = np.array([group.grids.prod(1).sum() for group in groups], int)
    total = int(lengths.sum())  # tokens of all answers on all ranks
    sums = torch.zeros(2, device=device)
    for batch in training.plan(
        [list(range(len(groups)))], sizes, patches, settings.micro_tokens, rank, world
    ):
        row = training.pack_micro_batch(batch, groups, policy.processors)[1].to(device)
        log_p, entropy = policy(row)  # [tokens of the answers]
        with torch.no_grad():
            start_log_p = frozen(row)[0]
        of_tokens = [advantage[i].repeat_interleave(lengths[i]) for i in batch.indices]
        of_tokens = torch.cat([log_p.new_zeros(0), *of_tokens])  # [tokens of the answers]
        loss, kl = grpo_loss(log_p, start_log_p, of_tokens, settings.kl_coefficient)
        (loss * world / total).backward()  # FSDP takes the mean over ranks
        sums += torch.stack([kl, entropy.sum()])
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip).full_tensor().item()
    if not math.isfinite(norm):  # on all ranks, which have summed their gradients
        at = f"({norm}) at the questions {', '.join(map(str, prompts))}"
        raise UserError(f"the gradient is not finite {at}; lower --learning_rate, or mend them")
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    kl, entropy = (sums / total).tolist()
    return {"kl": kl, "entropy": entropy, "grad_norm": norm}


@torch.no_grad()
def copy_weights(policy: Policy, actor: Policy) -> None:
    """Gives the copy that samples the weights of the sharded policy."""
    for target, source in zip(actor.parameters(), policy.parameters()):
        target.copy_(source.full_tensor())


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation. An outcome is (category, group, whether the answer is right); a metric makes a list of them named shares.
# Which metric is a benchmark's own stands beside its source in 01.

Outcomes = list[tuple[str, object, bool]]
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def accuracy(outcomes: Outcomes) -> dict[str, float]:
    """The share of right answers in each category."""
    categories = sorted({category for category, _, _ in outcomes})
    return {
        name: float(np.mean([right for category, _, right in outcomes if category == name]))
        for name in categories
    }


def all_right(outcomes: Outcomes) -> Outcomes:
    """One outcome for each group: whether all its answers are right."""
    groups = {}
    for category, group, right in outcomes:
        groups[category, group] = groups.get((category, group), True) and right
    return [(*key, right) for key, right in groups.items()]


def circular(outcomes: Outcomes) -> dict[str, float]:
    """MMBench's CircularEval: a question counts if it is answered right with its options in every rotation. What is not
    clear is wrong, VLMEvalKit's policy `exact_matching`; published numbers often have a language model read it."""
    groups = all_right(outcomes)
    return {"circular": float(np.mean([right for _, _, right in groups]))} | accuracy(groups)


def mme(outcomes: Outcomes) -> dict[str, float]:
    """MME's score: in each category accuracy, plus accuracy+, the share of pictures whose two questions are both
    answered right; summed over the 10 categories of perception and the 4 of cognition. Published (and printed) times
    100: at most 2000 and 800."""
    single, both = accuracy(outcomes), accuracy(all_right(outcomes))
    points = {category: single[category] + both[category] for category in single}
    cognition = sum(points[category] for category in points if category in MME_COGNITION)
    total = sum(points.values())
    return points | {"perception": total - cognition, "cognition": cognition, "total": total}


METRICS = {"accuracy": accuracy, "circular": circular, "mme": mme}  # of what has none: accuracy


def evaluate(
    policy: Policy, questions: Comparisons, settings: Settings
) -> tuple[dict[str, float], list[dict]]:
    """Greedy answers to held-out questions: matches of closed ones, the world's grade of open ones.

    Returns {"exact_match" if any are closed, "open_grade" if any are graded, how many are "closed" and "open", and what
    the benchmark's metric gives}, and the answers.
    """
    if not questions:
        return {}, []
    n = min(settings.evaluate_size or len(questions), len(questions))
    tokens = sample(policy, torch.utils.data.Subset(questions, range(n)), None, settings)[
        :, 0
    ]  # [n, max_new_tokens]
    answers, outcomes, grades = [], [], []
    for i, text in enumerate(texts_of(tokens, policy.processors)):
        record = questions[i].record
        answers.append({"id": record.get("id", i), "answer": text})
        if record.get("answer") is not None:
            outcomes.append(
                (record.get("category", "closed"), record.get("group", i), is_right(text, record))
            )
        elif "truth" in record:
            grades.append(data.embedded_world().grade(text, record["truth"]))
    found = {"exact_match": [right for _, _, right in outcomes], "open_grade": grades}
    result = {name: float(np.mean(values)) for name, values in found.items() if values}
    result |= {"closed": len(outcomes), "open": len(grades)}
    return result | (
        METRICS.get(questions.info["metric"], accuracy)(outcomes) if outcomes else {}
    ), answers


def llava_line(record: dict, answer: str, model: str, tokens: int) -> dict:
    """As LLaVA's model_vqa.py writes it and eval_gpt_review_bench.py reads it, beside answers_gpt4.jsonl."""
    named = {"answer_id": f"{model}-{record['question_id']}", "model_id": model, "metadata": {}}
    return {**record, "text": answer, **named}


def wildvision_line(record: dict, answer: str, model: str, tokens: int) -> dict:
    """As WildVision-Bench's gen_answers.py writes it and get_judgement.py reads it, from model_answers/<model>.jsonl;
    there the tokens are counted by GPT-3.5's tokenizer, here by the policy's."""
    return {**record, "output": answer, "model": model, "token_len": tokens}


# By metric, the benchmarks that need a judge model.
JUDGES = {"llava-in-the-wild": llava_line, "wildvision": wildvision_line}


def write_for_judge(
    path: Path,
    questions: Comparisons,
    answers: list[dict],
    model: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes the policy's answers, in the order of the questions, in the form that the benchmark's judge reads."""
    line_of, lines = JUDGES[questions.info["metric"]], []
    for i, answer in enumerate(answers):
        text = answer["answer"]
        line = line_of(
            questions[i].record["judged"], text, model, len(data.tokenize_text(text, tokenizer))
        )
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    data.write_file(path, "".join(lines))


def write_evaluation(
    settings: Settings,
    questions: Comparisons,
    before: tuple,
    after: tuple,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """What `evaluate` found before and after: evaluation.json, samples.jsonl, and answers for the benchmark's judge."""
    out = Path(settings.out)
    results = {"reward": settings.reward, "before": before[0], "after": after[0]}
    data.write_file(out / "evaluation.json", json.dumps(results, indent=1))
    both = [
        {"id": b["id"], "before": b["answer"], "after": a["answer"]}
        for b, a in zip(before[1], after[1])
    ]
    data.write_file(out / "samples.jsonl", "".join(json.dumps(answers) + "\n" for answers in both))
    if questions and questions.info["metric"] in JUDGES:
        write_for_judge(
            out / "answers_before.jsonl",
            questions,
            before[1],
            Path(settings.backbone).name,
            tokenizer,
        )
        write_for_judge(out / "answers_after.jsonl", questions, after[1], out.name, tokenizer)
        of = f"{len(both)} of the {questions.info['read']} questions of {questions.info['metric']}"
        print(
            f"{out}/answers_before.jsonl and answers_after.jsonl: {of}, for its judge model to score"
        )


# ---------------------------------------------------------------------------------------------------------------------
# All that this stage does.


def train(settings: Settings) -> dict:
    """Trains the policy; returns {"before": ..., "after": ...} of the evaluation."""
    rank, _, device = data.start_distributed()
    data.check_least(
        settings,
        steps=1,
        batch_size=1,
        group_size=2,
        max_new_tokens=1,
        rollout_batch=1,
        micro_tokens=1,
    )
    policy = Policy(settings.backbone, settings.temperature, empty=True)  # trained and sharded
    frozen = model_stage.place(Policy(settings.backbone, settings.temperature), device)  # the start
    # A whole copy samples: a sharded one would gather its weights anew for every token.
    actor = model_stage.place(Policy(settings.backbone, settings.temperature), device)
    processors, reward_model = policy.processors, None
    if settings.reward != "rule":
        reward_model = model_stage.place(
            model_stage.load_reward(settings.model, settings.text_model), device
        )
        if reward_model.fingerprint != processors.fingerprint:
            other = "has another tokenizer or chat template than the policy"
            raise UserError(f"{settings.model} {other}, {settings.backbone}")
    questions = data.Comparisons(settings.data, processors.fingerprint)
    if settings.benchmark and not Path(settings.benchmark, "dataset.json").is_file():
        raise UserError(
            f"--benchmark {settings.benchmark}: no prepared questions there; '' evaluates on none"
        )
    held_out = (
        data.Comparisons(settings.benchmark, processors.fingerprint) if settings.benchmark else None
    )
    if not len(questions):
        raise UserError(f"{settings.data}: no questions to train on")
    for model in (policy, actor, frozen, reward_model):
        if model:
            data.use_pixel_limits(
                model.processors, [questions, held_out] if held_out else [questions]
            )
    training.shard(policy, policy.lm, device)
    training.load_weights(policy.lm, settings.backbone, device)
    adam = {"lr": settings.learning_rate, "weight_decay": 0.0, "betas": (0.9, 0.99), "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), **adam)
    before = evaluate(actor, held_out, settings)
    log = Path(settings.out, "metrics.jsonl")
    if rank == 0:
        data.write_file(log, "")
        for name, kind in (("exact_match", "closed"), ("open_grade", "open")):
            if name in before[0]:
                print(
                    f"before: {name} {before[0][name]:.3f} of {before[0][kind]} {kind} questions",
                    flush=True,
                )

    B, G = settings.batch_size, settings.group_size
    epochs = math.ceil(settings.steps * B / len(questions))
    shuffles = [
        np.random.default_rng([settings.seed, epoch]).permutation(len(questions))
        for epoch in range(epochs)
    ]
    order = np.concatenate([*shuffles, []]).astype(int)
    progress = tqdm(
        range(settings.steps), desc="grpo", unit=" step", disable=rank > 0, mininterval=1
    )
    for step in progress:
        times = [time.perf_counter()]
        chosen = order[step * B : (step + 1) * B].tolist()
        prompts = [questions[i] for i in chosen]
        samples = sample(
            actor, prompts, [[settings.seed, step, i] for i in chosen], settings
        )  # [B, G, max_new_tokens]
        texts = texts_of(samples.flatten(0, 1), processors)
        texts = [texts[i : i + G] for i in range(0, B * G, G)]
        times.append(time.perf_counter())

        closed, match, score, reward = reward_answers(reward_model, prompts, texts, settings)
        advantage = advantage_of(reward, settings.advantage)  # [B, G]
        times.append(time.perf_counter())

        for group in optimizer.param_groups:
            group["lr"] = (
                settings.learning_rate * min(1, (step + 1) / 5) * (1 - step / settings.steps)
            )
        updated = update(policy, frozen, optimizer, prompts, samples, advantage, settings)
        copy_weights(policy, actor)
        times.append(time.perf_counter())

        cut = (samples[..., -1] >= 0) & (samples[..., -1] != processors.end_token)  # [B, G]
        equal = reward.amax(1) - reward.amin(1) < 1e-6  # [B]
        line = {
            "step": step + 1,
            "reward": reward.mean().item(),
            "reward_std": reward.std().item(),
            "match": (
                match.sum() / max(1, G * closed.sum())
            ).item(),  # exact matches among answers to closed questions
            "phantom": phantom_share(
                advantage, match, closed
            ),  # of all advantage, what is between wrong answers
            "score": score.mean().item(),  # the reward model's, raw
            "score_std": score.std().item(),
            "zero_variance": equal.float().mean().item(),  # groups that teach nothing
            "cut": cut.float().mean().item(),  # answers that reached the length limit
            "length": (samples >= 0).float().sum(-1).mean().item(),  # mean tokens of an answer
            **updated,  # KL to the start and entropy, both per token; norm of the gradient before clipping
            **dict(
                zip(("seconds_sample", "seconds_judge", "seconds_update"), np.diff(times).tolist())
            ),
        }
        for part, rewards in (("closed", reward[closed[:, 0]]), ("open", reward[~closed[:, 0]])):
            if len(rewards):  # by the rule (with hybrid, where it matches), by the reward model
                line |= {
                    f"reward_{part}": rewards.mean().item(),
                    f"reward_std_{part}": rewards.std().item(),
                }
        truths = [
            (p.record["truth"], group) for p, group in zip(prompts, texts) if "truth" in p.record
        ]
        if grades := [
            data.embedded_world().grade(text, truth) for truth, group in truths for text in group
        ]:
            line["open_grade"] = float(np.mean(grades))
        if rank == 0:
            with data.writing(log), open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        progress.set_postfix(
            reward=f"{line['reward']:.3f}", match=f"{line['match']:.2f}", refresh=False
        )

    after = evaluate(actor, held_out, settings)
    with data.writing(settings.out):
        dtype = model_stage.DTYPES[settings.export_dtype]
        model_stage.export(policy.lm, processors, settings.out, dtype, settings.export_file_size)
    if rank == 0:
        write_evaluation(settings, held_out, before, after, processors.tokenizer)
    dist.barrier()
    return {"before": before[0], "after": after[0]}


def main(settings: Settings) -> None:
    result = train(settings)
    if dist.get_rank() > 0:
        return
    before, after = result["before"], result["after"]
    rows = [name for name in before if name not in ("closed", "open")]
    if rows:
        print(
            f"\n| held-out questions | {'before':>6} | {'after':>6} |\n|--------------------|--------|--------|"
        )
    for name in rows:
        print(f"| {name:<18} | {100 * before[name]:6.1f} | {100 * after[name]:6.1f} |")
    print(
        f"\n{settings.out}: the trained policy, metrics.jsonl, evaluation.json, samples.jsonl. All six stages done."
    )


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
