"""Stage 6: improve a policy by GRPO, with the reward model in a hybrid reward

    torchrun --standalone --nproc_per_node=2 06_grpo.py                  # the tiny policy learns
    torchrun --standalone --nproc_per_node=2 06_grpo.py --reward rule    # without a reward model

In    A policy (a vision-language model with its LM head), a reward model (03), and prepared
      questions (01): closed ones carry an `answer` that a rule can check, open ones do not.
Out   artifacts/policy/: the trained policy in the Hugging Face layout, metrics.jsonl, checkpoints,
      results before and after: evaluation.json (fractions), samples.jsonl (held-out responses).

GRPO (DeepSeekMath, arXiv 2402.03300): the policy samples G responses to a prompt, each gets a
reward, and those above their group's mean become likelier. The mean is the baseline, so there is no
value network. A group is a Comparison with G responses, so the packed row of 02 serves again.

The paper compares four rewards (Table 11): `rule`, 1 for an exact match; `model`, the raw score of
a reward model; R1-Reward, a generative judge (here --reward model with a judge of 02); and the
best, `hybrid`: 1 for a match, else sigmoid(score). It trains Qwen2.5-VL-3B with 8 rollouts a prompt
and batches of 256. KL coefficient, learning rate, clipping and temperature are not stated.

Why is sigmoid(score) a reward? It is a plausible one, not a calibrated one.
  - In Bradley-Terry, sigmoid(r_a - r_b) is the probability that a beats b, so sigmoid(r) is that of
    beating a response of score 0. It lies between 0 and 1: a match always earns most.
  - It rises with the score, so within a group it keeps the order that was learned.
  - The size of its differences is arbitrary. Training never fixed which response scores 0, and far
    from 0 the curve is flat: scores of 0 and 1 give 0.50 and 0.73, those of 4 and 5 give 0.98 and
    0.99. `score` in metrics.jsonl, the mean of all raw scores, says where on it a run is.
  - A wrong answer to a closed question that the reward model likes would earn almost as much as the
    right one: there --fallback_scale halves the reward (paper: 1).

Compared with the published algorithm (reasons stand at the functions):
  - Advantage: reward - group mean, not divided by the group's deviation, as in Dr. GRPO (arXiv
    2503.20783); --advantage group divides.
  - Loss: the sum over all tokens of the step divided by their number on all ranks, as in DAPO
    (2503.14476), not a mean within each response first.
  - Clipping: none. A batch of rollouts gets one update, so the probability ratio is 1, and clipping
    (PPO, DAPO's clip-higher, GSPO 2507.18071, CISPO 2506.13585) would be inert.
  - Sampling: by the code that trains, with a KV cache, not by an inference server.
  - Kept: the KL divergence to the reference policy, a frozen copy of the first policy.
"""

import importlib
import json
import math
import re
import string
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from tqdm import tqdm

data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
training = importlib.import_module("03_train")
evaluation = importlib.import_module("04_eval")
option, UserError = data.option, data.UserError


# ---- Rollout -------------------------------------------------------------------------------------


class Policy(model_stage.Writer):
    """A language model `lm` with its LM head.

    `Writer` (appendix of 02) adds logits, in float32: the LM head's, divided by the temperature.
    Special tokens except end-of-turn get -inf: a sampled <|image_pad|> would have no picture.
    `empty` leaves the weights on the meta device, for `shard`.
    """

    def __init__(self, path: str, temperature: float, empty: bool = False):
        lm = model_stage.load_backbone(path, lm_head=True, empty=empty)
        super().__init__(lm, data.load_processors(path), temperature)
        self.fingerprint = self.processors.fingerprint

    def forward(self, row):
        """Return log-probability and entropy at all response tokens of a packed row, [tokens]."""
        # A token is predicted at the token before it, a response's first at its prompt's last. In
        # the row [p1 p2 | a1 a2 | b1], a1 is predicted at p2, a2 at a1, and b1 at p2.
        places, predictors = model_stage.response_tokens(row)  # indices in the row, [tokens] each
        hidden = model_stage.run_backbone(self.lm, row)[predictors]  # [tokens, hidden]
        # logits.log_softmax(-1) at the tokens, in parts: for 8,192 tokens and Qwen's vocabulary the
        # whole would be 5 GB, several times over.
        tokens = row.input_ids[0, places]
        vocabulary = self.lm.lm_head.out_features
        return model_stage.log_p_and_entropy(self.logits, hidden, tokens, vocabulary)


def rollout(actor, prompts, G, max_new_tokens, noise=None):
    """Sample token ids [prompts, G, max_new_tokens], -1 after the end-of-turn token.

    Returns them and their log-probabilities, same shape. One forward reads all prompts; their keys
    and values, the KV cache, serve all G samples. Each further forward adds a token to every sample
    (the loop is `write`, appendix of 02). `noise`, uniform in [0, 1) and of the same shape, picks
    them: a token is the first whose cumulative probability exceeds its number, whatever else is in
    the batch. Without `noise` decoding is greedy.
    """
    device = next(actor.parameters()).device
    bare = [replace(prompt, responses=[], ranks=[]) for prompt in prompts]
    row = model_stage.pack(bare, actor.processors).to(device)
    return model_stage.write(actor, row, G, max_new_tokens, noise)


# ---- Reward, advantage, loss ---------------------------------------------------------------------


def score_groups(reward_model, prompts, texts, settings) -> Tensor:
    """Score texts [B][G] with the reward model, [B, G]; each rank takes every world-th group. A
    text that was cut at max_new_tokens is scored as if it had ended there."""
    groups = []
    own = slice(dist.get_rank(), None, dist.get_world_size())
    for prompt, group in zip(prompts[own], texts[own]):
        # Tokenized anew: a policy can spell a text in tokens that the reward model has never seen.
        responses = [data.encode_response(text, reward_model.processors) for text in group]
        groups.append(replace(prompt, responses=responses, ranks=[]))
    scores = torch.zeros(len(texts), len(texts[0]), device=next(reward_model.parameters()).device)
    if groups:
        flat = reward_model.score_encoded(groups, settings.micro_tokens)
        scores[own] = flat.view(len(groups), -1)
    dist.all_reduce(scores)
    return scores.cpu()


def reward_of(kind, match, closed, score, fallback_scale) -> Tensor:
    """Return rewards [B, G] (paper: Table 11) from matches and scores [B, G], closed [B, 1]."""
    if kind == "rule":
        return match
    if kind == "model":
        return score
    fallback = torch.sigmoid(score) * torch.where(closed, fallback_scale, 1.0)
    return torch.where(match > 0, 1.0, fallback)  # hybrid


def advantage_of(reward, scale) -> Tensor:
    """Return advantages [B, G]: how far each reward [B, G] is above its group's mean.

    GRPO as published divides by the group's deviation. Take a closed question with wrong answers
    only, and rewards of 0.24 and 0.26: divided, they become -0.7 and +0.7, as 0 and 1 would.
    "batch" divides by the deviation of all centred rewards: for raw scores, of arbitrary scale.
    """
    centred = reward - reward.mean(1, keepdim=True)
    if scale == "batch":
        return centred / (centred.std() + 1e-4)
    if scale == "group":
        return centred / (reward.std(1, keepdim=True) + 1e-4)
    return centred


def grpo_loss(log_p, reference_log_p, advantage, kl_coefficient):
    """Return the loss and the KL divergence in it, both summed over tokens.

    All tensors are [tokens]: log-probabilities by policy and reference, and the advantage of the
    token's response. Equations 3 and 4 of DeepSeekMath; the KL estimator is Schulman's k3. In
    DeepSeekMath a mean within each response comes first, so a long wrong response is punished less
    per token.
    """
    # KL = q/p - 1 - log(q/p), p by the policy and q by the reference: never negative. Over samples
    # from p, q/p - 1 has the mean 0, so the mean of all is that of -log(q/p): the divergence.
    log_ratio = reference_log_p - log_p
    kl = log_ratio.exp() - log_ratio - 1
    # p / p_old, as published. In the only update of a batch p_old is p: the value is 1, and the
    # gradient is that of log p.
    ratio = (log_p - log_p.detach()).exp()
    loss = kl_coefficient * kl - advantage * ratio
    return loss.sum(), kl.detach().sum()


# ---- Training ------------------------------------------------------------------------------------


def update(policy, reference, optimizer, prompts, samples, sampled_log_p, advantage, settings):
    """Take one optimizer step on samples [B, G, max_new_tokens] and advantages [B, G].

    Returns the gradient's norm and means over tokens. The `sampler_gap` is the mean difference of
    the policy's and the sampler's log-probabilities. If it is not near 0, the two compute different
    things.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = samples.device
    advantage = advantage.to(device)
    lengths = (samples >= 0).sum(-1)  # [B, G]
    total = lengths.sum()  # tokens of the step; every rank has all samples
    groups = []
    token_ids = samples.cpu().numpy().astype(np.int32)
    for prompt, group in zip(prompts, token_ids):
        responses = [ids[ids >= 0] for ids in group]
        groups.append(replace(prompt, responses=responses, ranks=[]))
    steps = [list(range(len(groups)))]  # one step, planned and dealt to ranks as in 03
    tokens = np.array([group.length for group in groups])
    patches = np.array([group.patches for group in groups])
    micro_batches = training.plan(steps, tokens, patches, settings.micro_tokens, rank, world)
    sums = torch.zeros(3, device=device)  # KL divergence, entropy, sampler gap
    for batch in micro_batches:
        _, row, _ = training.pack_micro_batch(batch, groups, policy.processors)
        row = row.to(device)
        log_p, entropy = policy(row)  # [tokens]
        with torch.no_grad():
            reference_log_p, _ = reference(row)  # [tokens]
        # The row has the batch's prompts in order, and the responses of each in order.
        repeats = lengths[batch.indices].flatten()  # tokens of each response
        token_advantage = advantage[batch.indices].flatten().repeat_interleave(repeats)
        loss, kl = grpo_loss(log_p, reference_log_p, token_advantage, settings.kl_coefficient)
        # FSDP averages gradients over ranks. Times world that is the sum; divided by the tokens of
        # the whole step it is the gradient that a single rank would have computed.
        (loss * world / total).backward()
        sampler_log_p = sampled_log_p[batch.indices][samples[batch.indices] >= 0]  # [tokens]
        sampler_gap = (log_p.detach() - sampler_log_p).abs().sum()
        sums += torch.stack([kl, entropy.sum(), sampler_gap])
    norm = clip_grad_norm_(policy.parameters(), settings.clip or math.inf).full_tensor().item()
    if not math.isfinite(norm):
        raise UserError(f"gradient norm {norm} at the questions {', '.join(map(str, prompts))}")
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    kl, entropy, sampler_gap = (sums / total).tolist()
    return {"kl": kl, "entropy": entropy, "sampler_gap": sampler_gap, "grad_norm": norm}


@dataclass
class Recipe:
    """The settings that decide the trained weights: an interrupted run resumes with the same."""

    backbone: str = option("tests/tiny/policy", "policy to start from (paper: Qwen2.5-VL-3B)")
    model: str = option("artifacts/reward", "reward model")
    text_model: str = option("", "text-only reward model for prompts without images; '' for none")
    data: str = option("artifacts/data/questions", "prepared questions to train on")
    reward: Literal["rule", "model", "hybrid"] = option("hybrid", "reward (paper's best: hybrid)")
    steps: int = option(60, "optimizer steps, each from fresh rollouts")
    batch_size: int = option(32, "prompts a step, over all ranks (paper: 256)")
    group_size: int = option(8, "rollouts a prompt (paper: 8)")
    max_new_tokens: int = option(96, "longest response, in tokens")
    temperature: float = option(1.0, "of sampling, and of the probabilities in the loss")
    learning_rate: float = option(4e-4, "AdamW's; 5 steps of warm-up, linear decay (3B: 1e-6)")
    advantage: Literal["centred", "batch", "group"] = option(
        "centred", "reward - group mean, divided by nothing or by the deviation in batch or group"
    )
    fallback_scale: float = option(0.5, "hybrid: factor on sigmoid for closed questions (paper: 1)")
    standardise: bool = option(
        False, "hybrid: sigmoid of (score - mean) / deviation, as 03 measured them (paper: raw)"
    )
    kl_coefficient: float = option(0.1, "weight of the KL divergence to the reference policy")
    clip: float = option(1.0, "largest gradient norm; 0: any")
    seed: int = option(0, "seed of the order of prompts and of sampling, for any number of ranks")


def train(settings):
    """Train the policy and export it; return its metrics before and after."""
    rank, world, device = data.start_distributed()
    # Three copies of one model. The policy is trained and sharded: weights, gradients and moments
    # in float32 are 16 bytes a parameter, over all ranks together. The actor samples; it is whole,
    # because a sharded model gathers its weights anew for every token. The reference never changes.
    # These two and the reward model take 2 bytes a parameter on every GPU (bfloat16).
    policy = Policy(settings.backbone, settings.temperature, empty=True)
    actor = model_stage.place(Policy(settings.backbone, settings.temperature), device)
    reference = model_stage.place(Policy(settings.backbone, settings.temperature), device)
    processors = policy.processors
    models = [policy, actor, reference]
    if settings.reward != "rule":
        reward_model = model_stage.load_reward(settings.model, settings.text_model)
        models.append(model_stage.place(reward_model, device))
    questions, held_out = open_questions(settings, models)
    training.shard(policy, policy.lm, device)
    training.load_weights(policy.lm, settings.backbone, device)
    optimizer = AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    save, start = ready_to_resume(settings, policy, optimizer)  # continues with --resume
    before = evaluate(actor, held_out, settings)  # of the first policy, also when resuming
    if start:
        copy_weights(policy, actor)

    order = training.order_of_training(len(questions), settings)  # [steps][B]
    progress = tqdm(range(start, len(order)), desc="grpo", unit=" step", disable=rank > 0)
    for step in progress:
        # 1. Rollout, each rank for its share of the prompts (`sample`, appendix). Each prompt has a
        # seed: samples do not depend on the number of ranks.
        times = [time.perf_counter()]
        prompts, noise = [], []
        for i in order[step]:
            prompts.append(questions[i])
            generator = np.random.default_rng([settings.seed, step, i])
            noise.append(generator.random((settings.group_size, settings.max_new_tokens)))
        samples, sampled_log_p, texts = sample(actor, prompts, np.stack(noise), settings)
        times.append(time.perf_counter())

        # 2. Reward: a rule checks closed questions, the reward model scores all responses.
        closed, match = matches(prompts, texts)  # [B, 1] has an answer, [B, G] equals it
        score = torch.zeros_like(match)  # [B, G]
        if settings.reward != "rule":
            score = score_groups(reward_model, prompts, texts, settings)
        scaled = standardise(score, prompts, reward_model) if settings.standardise else score
        reward = reward_of(settings.reward, match, closed, scaled, settings.fallback_scale)

        # 3. Advantage: above or below the group's mean.
        advantage = advantage_of(reward, settings.advantage)  # [B, G]
        times.append(time.perf_counter())

        # 4. Update the policy. The rate warms up in 5 steps and falls to 0.
        warmup = min(1, (step + 1) / 5)
        decay = 1 - step / settings.steps
        optimizer.param_groups[0]["lr"] = settings.learning_rate * warmup * decay
        updated = update(
            policy, reference, optimizer, prompts, samples, sampled_log_p, advantage, settings
        )

        # 5. Copy the sharded weights to the actor, so the next rollouts come from the new policy.
        copy_weights(policy, actor)
        times.append(time.perf_counter())

        # 6. Log.
        line = {"step": step + 1, **updated}
        line |= rollout_metrics(samples, processors, closed, match, score, reward, advantage)
        line |= open_grade(prompts, texts)
        line["seconds_sample"], line["seconds_reward"], line["seconds_update"] = np.diff(times)
        if rank == 0:
            data.append_line(Path(settings.out, "metrics.jsonl"), line)
        save(step + 1)
        progress.set_postfix(reward=f"{line['reward']:.3f}", match=f"{line['match']:.2f}")

    after = evaluate(actor, held_out, settings)
    dtype = model_stage.DTYPES[settings.export_dtype]
    with data.writing(settings.out):
        model_stage.export(policy.lm, processors, settings.out, dtype)
    if rank == 0:
        write_results(settings, held_out, before, after, processors.tokenizer)
    return before[0], after[0]


# --------------------------------------------------------------------------------------------------
# Appendix: settings.


@dataclass
class Settings(Recipe):
    """All settings of this stage."""

    benchmark: str = option("artifacts/data/new_questions", "held-out questions; '' for none")
    evaluate_size: int = option(400, "held-out questions to evaluate on; 0: all, as published")
    out: str = option("artifacts/policy", "folder for the trained policy, metrics and responses")
    rollout_batch: int = option(64, "prompts a rank samples from at a time; bounds the KV cache")
    micro_tokens: int = option(8192, "tokens of one forward on one rank; less needs less memory")
    checkpoint_every: int = option(50, "steps between checkpoints (two stay); 0: none")
    resume: bool = option(False, "continue from the newest checkpoint in --out, if there is one")
    resume_changed: bool = option(False, "with --resume: even if recipe or data have changed")
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "dtype of the exported policy")


# --------------------------------------------------------------------------------------------------
# Appendix: questions, evaluation, logging, rules for closed questions, benchmarks for policies


def open_questions(settings, models):
    """Open the questions to train on and the held-out ones, [] for none, for all models."""
    for model in models:
        sets = [data.Comparisons(settings.data, model.fingerprint)]
        if settings.benchmark:
            sets.append(data.Comparisons(settings.benchmark, model.fingerprint))
        read = sets if isinstance(model, Policy) else sets[:1]  # only policies answer the benchmark
        data.ready_for_images(model.processors, read)
    if not len(sets[0]):
        raise UserError(f"{settings.data}: no questions to train on")
    return sets if settings.benchmark else (sets[0], [])


@torch.no_grad()
def copy_weights(policy, actor):
    """Gather the sharded policy's weights in the actor."""
    for target, source in zip(actor.parameters(), policy.parameters()):
        target.copy_(source.full_tensor())


def sample(actor, prompts, noise, settings):
    """Sample G responses to B prompts: tokens and log-probabilities as `rollout`, texts [B][G].

    Each rank takes every world-th prompt, and all ranks get all responses. `noise` is that of
    `rollout`, for all prompts; without it there is one greedy response to each.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(actor.parameters()).device
    G = 1 if noise is None else noise.shape[1]
    length = settings.max_new_tokens
    samples = torch.full((len(prompts), G, length), -1, device=device)
    log_p = torch.zeros(samples.shape, device=device)
    stride = world * settings.rollout_batch
    for start in range(rank, len(prompts), stride):
        batch = slice(start, start + stride, world)  # start, start + world, ...
        own = None if noise is None else noise[batch].copy()  # torch wants it contiguous
        samples[batch], log_p[batch] = rollout(actor, prompts[batch], G, length, own)
    dist.all_reduce(samples, dist.ReduceOp.MAX)  # still -1 where another rank sampled
    dist.all_reduce(log_p)
    texts = [model_stage.texts_of(group, actor.processors) for group in samples]
    return samples, log_p, texts


def ready_to_resume(settings, policy, optimizer):
    """With --resume load the newest checkpoint; return what saves one, and the steps done.

    A checkpoint is one of 03: the policy and AdamW's moments. All else follows from the step.
    """
    training.allocate_moments(optimizer, policy.parameters())
    state = training.training_state(policy, optimizer)
    run = {field.name: getattr(settings, field.name) for field in fields(Recipe)}  # models by path
    run["content of the data"] = training.hash_of_data([settings.data])
    start = training.begin(settings, state, run, last_file="evaluation.json")

    def save(step):
        if step % (settings.checkpoint_every or math.inf) == 0 and step < settings.steps:
            training.save_checkpoint(Path(settings.out, "checkpoints"), step, state, run)

    return save, start


def evaluate(policy, questions, settings):
    """Answer held-out questions by greedy decoding; return metrics (fractions) and texts."""
    n = min(settings.evaluate_size or len(questions), len(questions))
    prompts = [questions[i] for i in range(n)]
    _, _, texts = sample(policy, prompts, None, settings)  # [n][1]
    closed, match = matches(prompts, texts)  # [n, 1] each
    count = int(closed.sum())
    metrics = {"closed": count, "open": n - count}
    if count:
        metrics["exact_match"] = match.sum().item() / count
        metrics |= benchmark_metrics(questions.info["metric"], prompts, match)
    metrics |= open_grade(prompts, texts)
    return metrics, texts


def standardise(score, prompts, reward_model) -> Tensor:
    """Return scores [B, G] in deviations from the mean that 03 measured on held-out responses."""
    standardised = []
    for prompt, group in zip(prompts, score):
        measured = reward_model.model_for(bool(len(prompt.grids))).trained_with["scores"]
        standardised.append((group - measured["mean"]) / measured["deviation"])
    return torch.stack(standardised)


def phantom_share(advantage, match, closed) -> float:
    """Return the "phantom" share of |advantage| [B, G]: that of closed questions nobody got right.

    If all answers to a closed question are wrong, a rule gives each 0 and teaches nothing. The
    reward model still prefers some and pushes the policy towards a wrong answer. Undivided, such
    advantages stay as small as the differences of sigmoid(score); --fallback_scale halves them.
    """
    size = advantage.abs().sum(1)  # [B]
    hopeless = closed[:, 0] & (match.sum(1) == 0)  # the reward model compares wrong answers
    total = size.sum().clamp(min=1e-9)
    return (size[hopeless].sum() / total).item()


def rollout_metrics(samples, processors, closed, match, score, reward, advantage):
    """Describe the rollouts of a step: samples [B, G, tokens], closed [B, 1], all others [B, G]."""
    chances = closed.sum() * match.shape[1]  # responses to closed questions
    equal_rewards = reward.amax(1) - reward.amin(1) < 1e-6  # [B]: groups that teach nothing
    last = samples[..., -1]  # -1 where the response has ended before
    is_cut = (last >= 0) & (last != processors.end_token)  # at --max_new_tokens
    metrics = {
        "match": match.sum() / max(1, chances),
        "phantom": phantom_share(advantage, match, closed),
        "score": score.mean(),
        "score_std": score.std(),
        "zero_variance": equal_rewards.float().mean(),
        "cut": is_cut.float().mean(),
        "length": (samples >= 0).sum(-1).float().mean(),
    }
    is_closed = closed[:, 0]
    parts = {"": reward, "_closed": reward[is_closed], "_open": reward[~is_closed]}
    for part, rewards in parts.items():
        if len(rewards):
            metrics[f"reward{part}"] = rewards.mean()
            metrics[f"reward_std{part}"] = rewards.std()
    return {name: float(value) for name, value in metrics.items()}


def open_grade(prompts, texts):
    """Return {"open_grade": mean} where the embedded world knows the truth, else {}."""
    grades = []
    for prompt, group in zip(prompts, texts):
        if "truth" in prompt.record:
            grade = data.embedded_world().grade
            grades += [grade(text, prompt.record["truth"]) for text in group]
    return {"open_grade": float(np.mean(grades))} if grades else {}


# A rule reads a value from a text. A response is right if the rule reads the same from it as from
# the answer. An unclear one is wrong, because a policy learns to write whatever a rule rewards.


def matches(prompts, texts) -> tuple[Tensor, Tensor]:
    """Return which of B questions are closed [B, 1] and which texts [B][G] are right [B, G]."""
    closed, match = [], []
    for prompt, group in zip(prompts, texts):
        answer = prompt.record.get("answer")
        rule = prompt.record.get("rule", "text")
        closed.append([answer is not None])
        match.append([is_match(text, answer, rule) for text in group])
    return torch.tensor(closed, dtype=torch.bool), torch.tensor(match, dtype=torch.float)


def is_match(text, answer, rule="text") -> bool:
    """Compare a text with the answer, None for an open question, by a rule that 01 has checked."""
    if answer is None:
        return False
    if isinstance(rule, str):
        rule = {"kind": rule}
    read = RULES[rule["kind"]]
    value = read(text, rule)
    return bool(value) and value == read(str(answer), rule)


def read_text(text, rule=None):
    """Read words and numbers, in lower case and without a leading article: exact match."""
    words = re.findall(r"[+-]?\d+(?:[.,]\d+)*|\w+", text.lower())
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def read_letter(text, rule):
    """Read the letter of the option that a text chooses, None where that is not clear.

    Not done here: MathVista takes the option nearest in spelling, VLMEvalKit any option that a
    short answer names.
    """
    options = rule.get("options", [])
    letters = string.ascii_uppercase[: len(options) or 8]
    # A before a small word is the article, except in "A because".
    letter = rf"(?!A (?!because|since)[a-z])([{letters}])(?![\w'’])"
    alone = re.findall(rf"^\W*([{letters}{letters.lower()}])\W*$", text)
    stated = re.findall(rf"(?i:answer|option|choice)(?i: is)?:?[\s\"(\[*]*{letter}", text)
    bracketed = set(re.findall(rf"\({letter}\)", text))  # "(B) rubber"
    front = re.findall(rf"^\W*{letter}(?:[.:)\]*\"]+(?![A-Z]\.)|\s*\n)", text)  # "B. rubber"
    claim = re.split(r"(?i)answer(?: is)?:?", text)[-1]
    spelled = []
    for name, option in zip(letters, options):
        if read_text(str(option)) in (read_text(text), read_text(claim)):
            spelled.append(name)
    for candidates in (alone, stated[-1:], list(bracketed), front, spelled):
        if candidates:
            return candidates[0].upper() if len(candidates) == 1 else None
    return None


def read_verdict(text, rule):
    """Read a judge's letter, alone or behind the words that end its rationale (02).

    With this rule a judge is trained by reinforcement, as R1-Reward was: 01 --judge_request turns
    pairs into questions, 06 --reward rule trains a judge of 03 on them, and 02 --kind generative
    wraps the result as a judge. Give 02 --rationale if the first judge had it, and as --request the
    text of --judge_request.
    """
    return re.findall(rf"(?:^|{model_stage.VERDICT})([AB])\W*$", text)


def read_yes_no(text, rule):
    """Read the first word, or the one after "the answer is". (MME finds a "no" in "None".)"""
    return re.findall(r"^\W*(?:the answer is|answer:)?\W*(yes|no)\b", text.lower())


NUMBER = re.compile(  # -3, 1,000, 2.5, .5, 2e-3; the hyphen of 2007-2008 is no sign
    r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,2}(?!\w))?"
)


def read_number(text, rule):
    """Read the last number, or of type "list" the numbers of the last list in brackets.

    As in MathVista's calculate_score.py an "integer" loses its decimals, others are rounded to
    `precision`. The 2 of a `unit` cm^2 is no number; another unit goes unnoticed.
    """
    if rule.get("unit"):
        text = text.replace(rule["unit"], " ")
    lists = re.findall(r"\[([^\[\]]*)\]", text)
    if rule.get("type") == "list" and lists:
        text = lists[-1].replace(",", ", ")  # [100,200] is two numbers
    digits = NUMBER.findall(text.replace("−", "-"))
    numbers = [float(number.replace(",", "")) for number in digits]
    if rule.get("type") == "list":
        return numbers
    if rule.get("type") == "integer":
        return np.trunc(numbers[-1:]).tolist()
    if rule.get("precision") is not None:
        return [round(number, rule["precision"]) for number in numbers[-1:]]
    return numbers[-1:]


RULES = {
    "text": read_text,
    "letter": read_letter,
    "verdict": read_verdict,
    "yes_no": read_yes_no,
    "number": read_number,
}
JUDGES = ("llava-in-the-wild", "wildvision")  # benchmarks that need a judge model
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def benchmark_metrics(name, prompts, match):
    """Return the metric of a benchmark from matches [n, 1]; by default accuracy by category.

    circular: MMBench's CircularEval; a question counts as right only if all rotations of its
    options are answered right. mme: accuracy + accuracy+, which wants both questions of a picture
    right, summed over categories; published, and printed, times 100: at most 2000 for perception,
    800 for cognition.
    """
    closed = [i for i, prompt in enumerate(prompts) if prompt.record.get("answer") is not None]
    items = evaluation.Items.of([prompts[i] for i in closed])
    categories, groups = np.array(items.categories), np.array(items.groups)
    right = match[closed, 0].numpy()
    single, joined = {}, {}
    for category in np.unique(categories).tolist():
        mask = categories == category
        single[category] = float(right[mask].mean())
        joined[category] = float(evaluation.acc_plus(right[mask], groups[mask])["accuracy"])
    if name == "circular":
        return {"circular": float(evaluation.acc_plus(right, groups)["accuracy"]), **joined}
    if name == "mme":
        points = {category: single[category] + joined[category] for category in single}
        total = sum(points.values())
        cognition = sum(points.get(category, 0) for category in MME_COGNITION)
        sums = {"perception": total - cognition, "cognition": cognition, "total": total}
        return points | sums
    return single


def judge_line(metric, judged, text, model, tokenizer):
    """Return a response in the form that the benchmark's judge reads."""
    if metric == "llava-in-the-wild":  # model_vqa.py writes it, eval_gpt_review_bench.py reads it
        answer_id = f"{model}-{judged['question_id']}"
        return judged | {"text": text, "answer_id": answer_id, "model_id": model, "metadata": {}}
    # gen_answers.py writes it, with the tokens of GPT-3.5, and get_judgement.py reads it
    tokens = len(data.tokenize_text(text, tokenizer))
    return judged | {"output": text, "model": model, "token_len": tokens}


def write_results(settings, questions, before, after, tokenizer):
    """Write evaluation.json, samples.jsonl and, for a benchmark with a judge, answers_*.jsonl."""
    out = Path(settings.out)
    summary = {"reward": settings.reward, "before": before[0], "after": after[0]}
    data.write_file(out / "evaluation.json", json.dumps(summary, indent=1))
    metric = questions.info["metric"] if questions else ""
    models = {"before": Path(settings.backbone).name, "after": out.name}
    files = {"samples": []}
    for i in range(len(before[1])):
        record = questions[i].record
        texts = {"before": before[1][i][0], "after": after[1][i][0]}
        files["samples"].append({"id": record.get("id", i), **texts})
        if metric in JUDGES:
            for when, text in texts.items():
                line = judge_line(metric, record["judged"], text, models[when], tokenizer)
                files.setdefault(f"answers_{when}", []).append(line)
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        data.write_file(out / f"{name}.jsonl", "".join(lines))
    if metric in JUDGES:
        count = f"{len(before[1])} of the {questions.info['read']} questions of {metric}"
        print(f"{out}/answers_before.jsonl, answers_after.jsonl: {count}, for its judge model")


def main(settings: Settings) -> None:
    for name, least in {"steps": 1, "batch_size": 1, "group_size": 2}.items():
        if getattr(settings, name) < least:
            raise UserError(f"--{name} {getattr(settings, name)}: has to be at least {least}")
    if settings.standardise:
        if settings.reward != "hybrid":
            raise UserError("--standardise: only for --reward hybrid")
        for folder in filter(None, (settings.model, settings.text_model)):
            _, _, description = model_stage.load_head(folder)
            if not description["trained_with"].get("scores", {}).get("deviation"):
                hint = "train a naive reward model with 03 and held-out data"
                raise UserError(f"--standardise: {folder} has no measured scores; {hint}")
    before, after = train(settings)
    if dist.get_rank() > 0:
        return
    print("\n| held-out questions | before |  after |\n|--------------------|--------|--------|")
    for name in before:
        if name not in ("closed", "open"):
            print(f"| {name:<18} | {100 * before[name]:6.1f} | {100 * after[name]:6.1f} |")
    print(f"\n{settings.out}: the trained policy, metrics.jsonl, evaluation.json, samples.jsonl")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
