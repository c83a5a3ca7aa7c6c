"""Stage 6: rollouts are those of plain decoding; rewards, advantages and loss are those by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, stages, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

data, model, grpo = stages.data, stages.model, stages.grpo


@pytest.fixture(scope="module")
def policy():
    """The embedded policy, moved at random so that responses differ in length and content."""
    policy = grpo.Policy(TINY, temperature=1.0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return policy


@pytest.fixture(scope="module")
def plain(policy):
    """The same weights as transformers runs them."""
    plain = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    plain.load_state_dict(policy.lm.state_dict())
    return plain


@torch.no_grad()
def plain_logits(plain, policy, comparison, response=()) -> torch.Tensor:
    """Logits [R + 1, vocabulary] for each next token of [prompt | response], by one forward."""
    processors = policy.processors
    ids = np.concatenate([comparison.prompt, np.array(response, np.int32)])
    ids = torch.from_numpy(ids.astype(np.int64))[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processors.image_token).int()}
    if comparison.images:
        images = [data.open_image(file) for file in comparison.images]
        inputs |= processors.image_processor(images, return_tensors="pt")
    logits = plain(**inputs).logits[0, len(comparison.prompt) - 1 :]
    return logits.index_fill(-1, policy.forbidden, -torch.inf)


def test_greedy_rollouts_equal_transformers_without_a_cache(policy, plain, comparisons):
    tokens, log_p = grpo.rollout(policy, comparisons, 2, 12)
    end = policy.processors.end_token
    for comparison, samples, logs in zip(comparisons, tokens, log_p):
        expected = []
        while len(expected) < 12 and end not in expected:
            logits = plain_logits(plain, policy, comparison, expected)
            expected.append(int(logits[-1].argmax()))
        likely = plain_logits(plain, policy, comparison, expected)[:-1].log_softmax(-1).amax(-1)
        for sample, log in zip(samples, logs):
            assert sample[sample >= 0].tolist() == expected
            torch.testing.assert_close(log[sample >= 0], likely, atol=1e-4, rtol=1e-4)
            assert not log[sample < 0].any()


def test_sampling_follows_the_policys_distribution(policy, plain, comparisons):
    draws = 4000
    noise = np.random.default_rng(0).random((1, draws, 1))
    samples, _ = grpo.rollout(policy, [comparisons[1]], draws, 1, noise)
    expected = plain_logits(plain, policy, comparisons[1])[0].softmax(-1)
    counted = torch.bincount(samples.flatten(), minlength=len(expected)) / draws
    assert (counted - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_sample_does_not_depend_on_other_prompts(policy, comparisons):
    noise = np.random.default_rng(0).random((len(comparisons), 3, 10))
    together, _ = grpo.rollout(policy, comparisons, 3, 10, noise)
    for i, comparison in enumerate(comparisons):
        alone, _ = grpo.rollout(policy, [comparison], 3, 10, noise[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_special_tokens_are_never_sampled(comparisons, processors):
    policy = grpo.Policy(TINY, temperature=100.0).eval()  # nearly uniform over the vocabulary
    noise = np.random.default_rng(0).random((len(comparisons), 64, 30))
    samples, _ = grpo.rollout(policy, comparisons, 64, 30, noise)
    sampled = set(samples.unique().tolist())
    special = set(processors.tokenizer.get_added_vocab().values()) - {processors.end_token}
    assert not special & sampled and max(sampled) < len(processors.tokenizer)
    assert len(sampled) > 300


@torch.no_grad()
def test_log_probabilities_equal_one_plain_forward_per_response(policy, plain, comparisons):
    log_p, entropy = policy(model.pack(comparisons, policy.processors))
    expected, expected_entropy = [], []
    for comparison in comparisons:
        for response in comparison.responses:
            logits = plain_logits(plain, policy, comparison, response)[:-1]
            distribution = torch.distributions.Categorical(logits=logits.clamp(min=-1e30))
            expected.append(distribution.log_prob(torch.from_numpy(response)))
            expected_entropy.append(distribution.entropy())
    torch.testing.assert_close(log_p, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-4, rtol=1e-4)


def test_log_probabilities_in_parts_have_the_same_values_and_gradients(
    policy, comparisons, monkeypatch
):
    row = model.pack(comparisons, policy.processors)
    weights = torch.randn(1000, generator=torch.manual_seed(0))
    results, gradients = [], []
    for at_once in (2**27, 3 * policy.lm.lm_head.out_features):  # all, or three tokens
        monkeypatch.setattr(model, "LOGITS_AT_ONCE", at_once)
        log_p, entropy = policy(row)
        policy.zero_grad()
        (log_p * weights[: len(log_p)]).mean().backward()
        results.append((log_p.detach(), entropy))
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_rewards_are_those_of_the_paper():
    match = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    closed = torch.tensor([[True], [False]])
    score = torch.tensor([[-3.0, 2.0], [0.0, 1.0]])
    sigmoid = torch.sigmoid(score)
    assert torch.equal(grpo.reward_of("rule", match, closed, None, 1.0), match)
    assert torch.equal(grpo.reward_of("model", match, closed, score, 1.0), score)
    for scale in (1.0, 0.5):
        reward = grpo.reward_of("hybrid", match, closed, score, scale)
        assert reward[0].tolist() == [1.0, sigmoid[0, 1].item() * scale]
        assert torch.equal(reward[1], sigmoid[1])


def test_advantages_are_in_the_units_that_they_say():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.48, 0.52, 0.5, 0.5]])
    centred = grpo.advantage_of(reward, "centred")
    torch.testing.assert_close(centred, reward - torch.tensor([[0.25], [0.5], [0.5]]))
    by_batch = grpo.advantage_of(reward, "batch")
    torch.testing.assert_close(by_batch, centred / centred.std(), atol=2e-3, rtol=0)
    scaled = grpo.advantage_of(reward * 50, "batch")
    torch.testing.assert_close(scaled, by_batch, atol=2e-3, rtol=0)
    by_group = grpo.advantage_of(reward, "group")  # as in DeepSeekMath: (r - mean) / std
    torch.testing.assert_close(by_group[0], centred[0] / 0.5, atol=1e-3, rtol=0)
    assert not by_group[1].any(), "a group without variance teaches nothing"


def test_the_loss_is_that_of_grpo_by_hand():
    p = torch.tensor([0.5, 0.25, 0.1])
    q = torch.tensor([0.25, 0.25, 0.2])
    advantage = torch.tensor([1.0, -2.0, 0.5])
    log_p = p.log().requires_grad_()
    loss, kl = grpo.grpo_loss(log_p, q.log(), advantage, 0.1)
    ratios = [0.5, 1.0, 2.0]  # q / p
    assert kl.item() == pytest.approx(sum(ratio - math.log(ratio) - 1 for ratio in ratios))
    assert not kl.requires_grad
    assert loss.item() == pytest.approx(0.1 * kl.item() - (1.0 - 2.0 + 0.5))
    loss.backward()  # A times the gradient of log p, and beta (1 - q / p) towards the reference
    torch.testing.assert_close(log_p.grad, 0.1 * (1 - torch.tensor(ratios)) - advantage)


def test_dividing_by_a_groups_deviation_makes_phantom_advantages():
    """Half of 16 closed groups have one right answer, and the reward model knows nothing."""
    match = torch.zeros(16, 8)
    match[:8, 0] = 1
    closed = torch.ones(16, 1, dtype=torch.bool)
    score = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    reward = grpo.reward_of("hybrid", match, closed, score, 1.0)  # 1, or 0.45 to 0.55
    shares = {}
    for scale in ("group", "batch", "centred"):
        advantage = grpo.advantage_of(reward, scale)
        shares[scale] = grpo.phantom_share(advantage, match, closed)
        right = advantage[:8, 0].mean()
        lucky = advantage[8:].abs().amax(1).mean()  # wrong answers that the reward model likes
        assert (lucky > 0.5 * right) == (scale == "group"), scale
    assert shares["group"] > 0.4 and max(shares["batch"], shares["centred"]) < 0.2, shares


@pytest.mark.parametrize("scale, wanders", [("group", True), ("batch", True), ("centred", False)])
def test_phantom_advantages_carry_a_policy_away_where_no_answer_is_right(scale, wanders):
    """Two questions with 20 choices: one has a right answer, the other none.

    On the second the reward model has slight preferences that mean nothing. How far does the policy
    move there? With the batch's deviation it moves too, once the first question is solved and only
    noise is left in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, 20, requires_grad=True)
    right = torch.tensor([[3], [-1]])
    opinion = torch.randn(2, 20, generator=generator) * 0.02
    closed = torch.ones(2, 1, dtype=torch.bool)
    for _ in range(150):
        p = logits.detach().softmax(-1)
        samples = torch.multinomial(p, 8, replacement=True, generator=generator)  # [2, G]
        match = (samples == right).float()
        reward = grpo.reward_of("hybrid", match, closed, opinion.gather(1, samples), 1.0)
        log_p = logits.log_softmax(-1).gather(1, samples)
        (-(grpo.advantage_of(reward, scale) * log_p).mean()).backward()
        with torch.no_grad():
            logits -= logits.grad
            logits.grad.zero_()
    p = logits.detach().softmax(-1)
    moved = (p[1] * (p[1] * 20).log()).sum()  # KL divergence from the start, in nats
    assert p[0, 3] > 0.9, "the right answer is learned either way"
    assert (moved > 0.5) == wanders, moved


def test_standardised_scores_do_not_depend_on_the_scale_of_the_head(reward, comparisons, tmp_path):
    score = reward.score_encoded(comparisons)[None]
    standardised = []
    for scale in (1.0, 10.0):
        measured = {"mean": scale * score.mean().item(), "deviation": scale * score.std().item()}
        reward.trained_with = {"scores": measured}
        prompts = comparisons[:1]
        standardised.append(grpo.standardise(scale * score, prompts, reward))
    reward.trained_with = {}
    torch.testing.assert_close(*standardised)
    assert standardised[0].mean().abs() < 1e-5 and abs(standardised[0].std() - 1) < 1e-5
    reward.save_pretrained(str(tmp_path))
    with pytest.raises(data.UserError, match="no measured scores"):
        grpo.main(grpo.Settings(model=str(tmp_path), standardise=True))


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(reward, world, tmp_path):
    reward.save_pretrained(str(tmp_path / "reward"))
    options = "--steps 4 --batch_size 4 --group_size 4 --max_new_tokens 16 --evaluate_size 8"
    options += f" --checkpoint_every 2 --model {tmp_path}/reward --data {world}/data/questions"
    options = [*options.split(), "--benchmark", world / "data/new_questions"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    torchrun("06_grpo.py", *options, "--out", whole)
    shutil.copytree(whole, killed)
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step_000002"]
    for path in killed.glob("*"):  # what a run that died in its third step leaves behind
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    with pytest.raises(pytest.fail.Exception, match="step_000002: of a run that has not ended"):
        torchrun("06_grpo.py", *options, "--out", killed)
    torchrun("06_grpo.py", *options, "--out", killed, "--resume")
    expected = load_file(whole / "model.safetensors")
    resumed = load_file(killed / "model.safetensors")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    for one, two in zip(*(open(out / "metrics.jsonl") for out in (whole, killed)), strict=True):
        timed = "seconds_sample", "seconds_reward", "seconds_update"
        lines = [json.loads(line) for line in (one, two)]
        assert len({str([v for k, v in line.items() if k not in timed]) for line in lines}) == 1
    for name in ("evaluation.json", "samples.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def test_two_ranks_train_the_policy_that_one_rank_trains(reward, world, tmp_path):
    reward.save_pretrained(str(tmp_path / "reward"))
    options = "--steps 2 --batch_size 6 --group_size 4 --max_new_tokens 24 --clip 0"
    options += f" --evaluate_size 12 --micro_tokens 600 --rollout_batch 2 --model {tmp_path}/reward"
    options += f" --data {world}/data/questions --benchmark {world}/data/new_questions"
    policies, logs = [], []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        torchrun("06_grpo.py", *options.split(), "--out", out, ranks=ranks)
        policies.append(load_file(out / "model.safetensors"))
        logs.append([json.loads(line) for line in open(out / "metrics.jsonl")])
    start = load_file(ROOT / "tests/tiny/policy/model.safetensors")
    assert any((policies[0][name] - start[name]).abs().max() > 1e-5 for name in start)
    for name in start:
        torch.testing.assert_close(policies[0][name], policies[1][name], atol=2e-4, rtol=0)
    for one, two in zip(*logs, strict=True):
        for key in ("reward", "match", "length", "entropy", "zero_variance", "kl"):
            assert one[key] == pytest.approx(two[key], abs=1e-3), key
        assert one["sampler_gap"] < 1e-4 and two["sampler_gap"] < 1e-4, "the sampler is the trainer"
