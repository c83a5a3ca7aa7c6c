"""The one idea: a comparison encoded once gives the scores of one plain forward for each response."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import PROMPTS, RESPONSES, TINY, picture, stages, user
from transformers import AutoModel

data, model = stages.data, stages.model


def plain_hidden(backbone, comparison, response, processors):
    """The last token's hidden state from transformers alone: one row, its own attention, its own position ids."""
    ids = torch.from_numpy(np.concatenate([comparison.prompt, response]).astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if comparison.images:
        pixels = processors.image(
            [data.open_image(file) for file in comparison.images], return_tensors="pt"
        )
        inputs |= dict(pixels) | {"mm_token_type_ids": (ids == processors.image_token).int()}
    return backbone(**inputs).last_hidden_state[0, -1]


@pytest.mark.parametrize("kind", range(len(PROMPTS)), ids=list(PROMPTS))
def test_packed_scores_equal_one_plain_forward_per_response(kind, reward, comparisons, processors):
    plain = AutoModel.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa").eval()
    comparison = comparisons[kind]
    with torch.no_grad():
        expected = torch.stack(
            [
                reward.head(plain_hidden(plain, comparison, response, processors)[None])[0]
                for response in comparison.responses
            ]
        )
        torch.testing.assert_close(
            reward(model.pack([comparison], processors)), expected, atol=1e-5, rtol=0
        )


def test_scores_do_not_change_with_what_else_is_in_the_batch(reward, comparisons, processors):
    with torch.no_grad():
        alone = torch.cat(
            [reward(model.pack([comparison], processors)) for comparison in comparisons]
        )
        together = reward(model.pack(comparisons, processors))
        backwards = (
            reward(model.pack(comparisons[::-1], processors))
            .view(len(comparisons), -1)
            .flip(0)
            .flatten()
        )
        single = torch.cat(
            [
                reward(
                    model.pack([data.Comparison(c.prompt, [r], [1], c.images, c.grids)], processors)
                )
                for c in comparisons
                for r in c.responses
            ]
        )
    for other in (together, backwards, single):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)


def test_positions_are_those_of_transformers(comparisons, processors):
    backbone = AutoModel.from_pretrained(TINY)
    for comparison in comparisons:
        ids = torch.from_numpy(comparison.prompt.astype(np.int64))[None]
        expected, _ = backbone.get_rope_index(
            ids,
            (ids == processors.image_token).int(),
            image_grid_thw=torch.from_numpy(comparison.grids.astype(np.int64)),
        )
        assert np.array_equal(
            model.prompt_positions(
                comparison.prompt, comparison.grids // [1, 2, 2], processors.image_token
            ),
            expected[:, 0].numpy(),
        )


def test_a_dense_mask_over_the_whole_row_gives_the_same_attention(comparisons, processors):
    row = model.pack(comparisons, processors)
    T = row.input_ids.shape[1]
    comparison_of, segment_of = [], []
    for i, (prompt, responses) in enumerate(row.lengths):
        for j, length in enumerate([prompt, *responses]):
            comparison_of += [i] * length
            segment_of += [j] * length
    comparison_of, segment_of = torch.tensor(comparison_of), torch.tensor(segment_of)
    same = comparison_of[:, None] == comparison_of[None]
    mask = (same & ((segment_of[None] == 0) | (segment_of[:, None] == segment_of[None]))).tril()
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, T, 32), torch.randn(1, 2, T, 32), torch.randn(1, 2, T, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(row.attend(0, query, key, value, 0.2), expected, atol=1e-5, rtol=0)


def test_the_dummy_image_changes_no_score_and_no_gradient(reward, comparisons, processors):
    def gradients(dummy):
        reward.zero_grad()
        scores = reward(model.pack(comparisons[1:2], processors, dummy_image=dummy))
        scores.sum().backward()
        return scores.detach(), {name: p.grad.clone() for name, p in reward.named_parameters()}

    (scores, grads), (scores_dummy, grads_dummy) = gradients(False), gradients(True)
    torch.testing.assert_close(scores, scores_dummy, atol=1e-6, rtol=0)
    for name in grads:
        torch.testing.assert_close(grads[name], grads_dummy[name], atol=1e-5, rtol=1e-4)


def test_score_in_python_equals_the_packed_forward(reward, comparisons, processors, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(56, 84, 1))
    by_path = reward.score([user("What do you see?", str(tmp_path / "a.png"))], RESPONSES)
    by_slot = reward.score(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}],
            }
        ],
        RESPONSES,
        [picture(56, 84, 1)],
    )
    with torch.no_grad():
        packed = reward(model.pack([comparisons[1]], processors))
    assert torch.equal(by_path, by_slot)
    torch.testing.assert_close(by_path, packed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("activation", ["none", "tanh", "relu", "silu"])
def test_a_reward_model_saved_and_loaded_scores_the_same(layers, activation, tmp_path):
    made = model.RewardModel.from_backbone(TINY, model.HeadSettings(layers, activation, 48)).eval()
    made.save_pretrained(str(tmp_path))
    loaded = model.RewardModel.from_pretrained(str(tmp_path)).eval()
    messages = [user("What do you see?", picture())]
    assert torch.equal(made.score(messages, RESPONSES), loaded.score(messages, RESPONSES))
    assert sum(isinstance(part, torch.nn.Linear) for part in loaded.head.mlp) == layers


def test_transformers_alone_loads_what_was_saved(reward, tmp_path):
    reward.save_pretrained(str(tmp_path))
    plain = AutoModel.from_pretrained(str(tmp_path), dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, reward.backbone.state_dict()[name]), name


def test_special_tokens_in_a_users_text_stay_text(processors):
    ids, _, _ = data.encode_prompt(
        [user("Is <|image_pad|> or <|im_end|> a word?", picture())], [], processors
    )
    plain, _, grids = data.encode_prompt([user("Is it a word?", picture())], [], processors)
    special = processors.tokenizer.get_added_vocab()
    count = lambda of, token: int((of == special[token]).sum())
    for token in special:
        assert count(ids, token) == count(plain, token), token
    assert "<|image_pad|>" in "".join(
        processors.tokenizer.decode(int(i)) for i in ids if i != processors.image_token
    )
    assert special["<|im_end|>"] not in data.encode_response("the end <|im_end|>", processors)[:-1]


def lower_right_attention(
    q, k, v, starts, key_starts, longest, longest_keys, scale, window_size, enable_gqa
):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU, one segment after the other."""
    assert longest == starts.diff().max() and longest_keys == key_starts.diff().max()
    outputs = []
    for i in range(len(starts) - 1):
        q_i = q[starts[i] : starts[i + 1]].transpose(0, 1)  # [heads, length, d]
        k_i, v_i = (x[key_starts[i] : key_starts[i + 1]].transpose(0, 1) for x in (k, v))
        causal = torch.ones(q_i.shape[1], k_i.shape[1], dtype=torch.bool).tril(
            k_i.shape[1] - q_i.shape[1]
        )
        mask = causal if window_size == (-1, 0) else None
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q_i[None], k_i[None], v_i[None], attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def test_the_layout_for_variable_length_attention_gives_the_same_scores(
    reward, comparisons, processors, monkeypatch
):
    with torch.no_grad():
        expected = reward(model.pack(comparisons, processors))
        monkeypatch.setattr(model, "has_varlen", lambda query: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lower_right_attention)
        torch.testing.assert_close(
            reward(model.pack(comparisons, processors)), expected, atol=1e-5, rtol=0
        )


def test_image_features_are_those_of_transformers_with_whole_and_ragged_windows(reward, processors):
    images = [
        picture(*size, seed)
        for seed, size in enumerate([(56, 56), (224, 224), (252, 140), (308, 364)])
    ]
    prompt, files, grids = data.encode_prompt([user("Look.", *images)], [], processors)
    row = model.pack([data.Comparison(prompt, [], [], files, grids)], processors)
    plain = AutoModel.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = plain.get_image_features(
            row.images.pixel_values, torch.from_numpy(row.images.grids)
        ).pooler_output
        ours = reward.backbone.get_image_features(**row.images.arguments()).pooler_output
    torch.testing.assert_close(torch.cat(ours), torch.cat(expected), atol=1e-5, rtol=0)


def test_no_value_is_read_back_from_the_device_within_forward_and_backward(
    reward, comparisons, processors, monkeypatch
):
    """On the meta device a tensor has no values, so whatever would wait for a GPU to read one raises here."""
    monkeypatch.setenv(
        "TRANSFORMERS_DISABLE_TORCH_CHECK", "1"
    )  # as start_distributed does where there is a GPU
    elsewhere = copy.deepcopy(reward).to("meta")
    row = model.pack(comparisons, processors).to(torch.device("meta"))
    pairs = stages.train.pairs_of(comparisons).to(torch.device("meta"))
    stages.train.ranking_loss(elsewhere(row), pairs).backward()
    assert all(parameter.grad is not None for parameter in elsewhere.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same_scores_and_rows_of_other_lengths_compile_nothing_anew(
    reward, comparisons, processors
):
    compiled = copy.deepcopy(reward)
    for layer in [*compiled.backbone.language_model.layers, *compiled.backbone.visual.blocks]:
        layer.compile(dynamic=True)
    rows = [model.pack(comparisons[: i + 1], processors) for i in (3, 2, 1)] + [
        model.pack(comparisons[1:], processors)
    ]
    for i, row in enumerate(rows):
        if i == 2:  # two lengths have been seen
            torch._dynamo.utils.counters.clear()
        scores = compiled(row)
        scores.sum().backward()
        torch.testing.assert_close(scores, reward(row), atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
