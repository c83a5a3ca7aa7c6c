"""Stage 6: rollouts from a shared prompt cache are those of plain decoding; rewards and updates are what they say."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, stages, torchrun
from transformers import AutoModelForImageTextToText

data, model, grpo = stages.data, stages.model, stages.grpo


@pytest.fixture(scope="module")
def policy():
    made = grpo.Policy(TINY, temperature=1.0).eval()
    with (
        torch.no_grad()
    ):  # so that answers differ in length and content: random directions on the embedded backbone
        torch.manual_seed(0)
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return made


@pytest.fixture(scope="module")
def plain(policy):
    made = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    made.load_state_dict(policy.lm.state_dict())
    return made


def plain_inputs(ids, comparison, processors) -> dict:
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processors.image_token).int()}
    if comparison.images:
        inputs |= dict(
            processors.image(
                [data.open_image(file) for file in comparison.images], return_tensors="pt"
            )
        )
    return inputs


def test_greedy_rollouts_equal_transformers_without_a_cache(policy, plain, comparisons, processors):
    tokens = grpo.rollout(policy, comparisons, 2, 12, None)
    eos = processors.tokenizer.eos_token_id
    for comparison, samples in zip(comparisons, tokens):
        ids, expected = torch.from_numpy(comparison.prompt.astype(np.int64))[None], []
        while len(expected) < 12 and eos not in expected:
            with torch.no_grad():
                logits = plain(**plain_inputs(ids, comparison, processors)).logits[0, -1]
            logits[policy.forbidden] = -torch.inf
            expected.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
        for sample in samples:
            assert [t for t in sample.tolist() if t >= 0] == expected


def test_sampling_follows_the_policys_distribution(policy, comparisons, plain, processors):
    comparison, draws = comparisons[1], 4000
    noise = np.random.default_rng(0).random((1, draws, 1))
    sampled = grpo.rollout(policy, [comparison], draws, 1, noise).flatten()
    with torch.no_grad():
        logits = plain(
            **plain_inputs(
                torch.from_numpy(comparison.prompt.astype(np.int64))[None], comparison, processors
            )
        ).logits[0, -1]
    logits[policy.forbidden] = -torch.inf
    expected, counted = logits.softmax(-1), torch.bincount(sampled, minlength=len(logits)) / draws
    assert (counted - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_sample_does_not_depend_on_what_else_is_sampled(policy, comparisons):
    noise = np.random.default_rng(0).random((len(comparisons), 3, 10))
    together = grpo.rollout(policy, comparisons, 3, 10, noise)
    for i, comparison in enumerate(comparisons):
        assert torch.equal(
            grpo.rollout(policy, [comparison], 3, 10, noise[i : i + 1])[0], together[i]
        )


def test_special_tokens_are_never_sampled(comparisons, processors):
    policy = grpo.Policy(TINY, temperature=100.0).eval()  # nearly uniform over the vocabulary
    noise = np.random.default_rng(0).random((len(comparisons), 64, 30))
    tokens = grpo.rollout(policy, comparisons, 64, 30, noise)
    special = set(processors.tokenizer.get_added_vocab().values()) - {
        processors.tokenizer.eos_token_id
    }
    assert not special & set(tokens.unique().tolist()) and tokens.max() < len(processors.tokenizer)
    assert len(tokens.unique()) > 300


def test_log_probabilities_of_a_group_equal_one_plain_forward_per_answer(
    policy, plain, comparisons, processors
):
    with torch.no_grad():
        log_p, entropy = policy(model.pack(comparisons, processors))
        expected, expected_entropy = [], []
        for comparison in comparisons:
            for response in comparison.responses:
                ids = torch.from_numpy(
                    np.concatenate([comparison.prompt, response]).astype(np.int64)
                )[None]
                logits = plain(**plain_inputs(ids, comparison, processors)).logits[
                    0, len(comparison.prompt) - 1 : -1
                ]
                logits[:, policy.forbidden] = -torch.inf
                distribution = torch.distributions.Categorical(logits=logits.clamp(min=-1e30))
                expected.append(distribution.log_prob(torch.from_numpy(response.astype(np.int64))))
                expected_entropy.append(distribution.entropy())
    torch.testing.assert_close(log_p, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-4, rtol=1e-4)


def test_rewards_are_those_of_the_paper():
    match, closed = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[True], [False]])
    score = torch.tensor([[-3.0, 2.0], [0.0, 1.0]])
    sigmoid = torch.sigmoid(score)
    assert torch.equal(grpo.reward_of("rule", match, closed, None, 1.0), match)
    assert torch.equal(grpo.reward_of("model", match, closed, score, 1.0), score)
    assert torch.equal(
        grpo.reward_of("hybrid", match, closed, score, 1.0),
        torch.tensor([[1.0, sigmoid[0, 1]], sigmoid[1].tolist()]),
    )
    half = grpo.reward_of("hybrid", match, closed, score, 0.5)
    assert half[0].tolist() == [1.0, sigmoid[0, 1].item() / 2] and torch.equal(half[1], sigmoid[1])


def test_advantages_are_in_the_units_that_they_say():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.48, 0.52, 0.5, 0.5]])
    centred = grpo.advantage_of(reward, "centred")
    torch.testing.assert_close(centred, reward - torch.tensor([[0.25], [0.5], [0.5]]))
    torch.testing.assert_close(
        grpo.advantage_of(reward, "batch"), centred / centred.std(), atol=2e-3, rtol=0
    )
    by_group = grpo.advantage_of(reward, "group")  # as in DeepSeekMath: (r - mean) / std
    torch.testing.assert_close(by_group[0], centred[0] / 0.5, atol=1e-3, rtol=0)
    assert not by_group[1].any(), "a group without variance teaches nothing"
    scaled = lambda scale, by: grpo.advantage_of(reward * scale, by)
    torch.testing.assert_close(scaled(50, "batch"), scaled(1, "batch"), atol=2e-3, rtol=0)


def test_the_loss_is_that_of_grpo_by_hand():
    p, q, advantage = (
        torch.tensor([0.5, 0.25, 0.1]),
        torch.tensor([0.25, 0.25, 0.2]),
        torch.tensor([1.0, -2.0, 0.5]),
    )
    log_p = p.log().requires_grad_()
    loss, kl = grpo.grpo_loss(log_p, q.log(), advantage, 0.1)
    ratio = [0.5, 1.0, 2.0]  # q / p
    assert (
        kl.item() == pytest.approx(sum(r - math.log(r) - 1 for r in ratio)) and not kl.requires_grad
    )
    assert loss.item() == pytest.approx(0.1 * kl.item() - (1.0 - 2.0 + 0.5))
    loss.backward()  # what it is for: A times the gradient of log p, and beta (1 - q / p) towards the start
    torch.testing.assert_close(log_p.grad, 0.1 * (1 - torch.tensor(ratio)) - advantage)


def hybrid_advantages(scale: str, closed_right: int):
    """Of 16 groups of closed questions, the first few have one right answer; the reward model knows nothing."""
    match = torch.zeros(16, 8)
    match[:closed_right, 0] = 1
    score = (
        torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    )  # sigmoid: 0.45-0.55
    closed = torch.ones(16, 1, dtype=torch.bool)
    advantage = grpo.advantage_of(grpo.reward_of("hybrid", match, closed, score, 1.0), scale)
    return advantage, grpo.phantom_share(advantage, match, closed)


def test_dividing_by_a_groups_deviation_makes_phantom_advantages_in_a_mixed_batch():
    shares = {}
    for scale in ("group", "batch", "centred"):
        advantage, shares[scale] = hybrid_advantages(scale, closed_right=8)
        right, wrong = advantage[:8, 0].mean(), advantage[8:].abs().amax(1).mean()
        assert (wrong > 0.5 * right) == (scale == "group"), (
            scale
        )  # a lucky wrong answer against a right one
    assert shares["group"] > 0.4 and max(shares["batch"], shares["centred"]) < 0.2, shares


@pytest.mark.parametrize("scale, wanders", [("group", True), ("batch", True), ("centred", False)])
def test_phantom_advantages_carry_a_policy_away_where_no_answer_is_right(scale, wanders):
    """A policy of one choice of 20 a question; of two questions one has a right answer, the other none, and there the
    reward model has slight preferences that mean nothing. How far does the policy move on the second? By the batch's
    deviation it does, too, as soon as the first question is solved and nothing but noise is left in the batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, 20, requires_grad=True)
    right, opinion = torch.tensor([3, -1]), torch.randn(2, 20, generator=generator) * 0.02
    for _ in range(150):
        samples = torch.multinomial(
            logits.detach().softmax(-1), 8, replacement=True, generator=generator
        )  # [2, G]
        match, score = (samples == right[:, None]).float(), opinion.gather(1, samples)
        reward = grpo.reward_of("hybrid", match, torch.ones(2, 1, dtype=torch.bool), score, 1.0)
        log_p = logits.log_softmax(-1).gather(1, samples)
        (-(grpo.advantage_of(reward, scale) * log_p).mean()).backward()
        with torch.no_grad():
            logits -= 1.0 * logits.grad
            logits.grad.zero_()
    p = logits.detach().softmax(-1)
    moved = (p[1] * (p[1] * 20).log()).sum()  # KL to the start, nats
    assert p[0, 3] > 0.9, "what is right has to be learned either way"
    assert (moved > 0.5) == wanders, moved


@pytest.mark.parametrize(
    "text, answer, same",
    [
        ("A red circle.", "a red circle", True),
        ("red circle", "a red circle", True),
        ("2", 2, True),
        (" Yes!", "Yes", True),
        ("a.", "A", True),
        ("B", "A", False),
        ("", "A", False),
        ("12", "1 2", False),
        ("-3", "3", False),
        ("2.5", "25", False),
        ("red", "red circle", False),
    ],
)
def test_an_exact_match_ignores_case_punctuation_and_a_leading_article(text, answer, same):
    assert grpo.is_match(text, answer) == same


@pytest.mark.parametrize("reward", ["rule", "hybrid"])
def test_two_ranks_train_the_policy_that_one_rank_trains(reward, world, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "head").mkdir()
    torch.manual_seed(0)
    model.RewardModel.from_backbone(TINY, model.HeadSettings()).save_pretrained(
        str(tmp_path / "head")
    )
    for ranks in (1, 2):
        torchrun(
            "06_grpo.py",
            "--data",
            world / "data/questions",
            "--benchmark",
            world / "data/new_questions",
            "--model",
            tmp_path / "head",
            "--out",
            tmp_path / str(ranks),
            "--reward",
            reward,
            "--steps",
            2,
            "--batch_size",
            6,
            "--group_size",
            4,
            "--max_new_tokens",
            24,
            "--evaluate_size",
            12,
            "--micro_tokens",
            600,
            ranks=ranks,
        )
    one, two = (load_file(tmp_path / ranks / "model.safetensors") for ranks in "12")
    start = load_file(f"{TINY}/model.safetensors")
    assert any((one[name] - start[name].float()).abs().max() > 1e-5 for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=0, msg=name)
    lines = [
        [json.loads(line) for line in open(tmp_path / ranks / "metrics.jsonl")] for ranks in "12"
    ]
    for a, b in zip(*lines):
        for key in ("reward", "match", "length", "entropy", "zero_variance", "kl"):
            assert a[key] == pytest.approx(b[key], abs=1e-3), key
