"""The one idea: a comparison encoded once gives the scores of one plain forward per response."""

import copy
import inspect
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROMPTS, RESPONSES, TINY, picture, stages, user
from transformers import AutoConfig, AutoModel

data, model = stages.data, stages.model


def close(ours, expected, atol=1e-5):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


def plain_backbone():
    return AutoModel.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa").eval()


def plain_hidden(backbone, comparison, response, processors):
    """The last token's hidden state from transformers alone: its own attention and positions."""
    ids = torch.from_numpy(np.concatenate([comparison.prompt, response]).astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if comparison.images:
        images = [data.open_image(file) for file in comparison.images]
        inputs |= dict(processors.image_processor(images, return_tensors="pt"))
        inputs["mm_token_type_ids"] = (ids == processors.image_token).int()
    return backbone(**inputs).last_hidden_state[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("kind", range(len(PROMPTS)), ids=list(PROMPTS))
def test_packed_scores_equal_one_plain_forward_per_response(kind, reward, comparisons, processors):
    plain, comparison = plain_backbone(), comparisons[kind]
    expected = []
    for response in comparison.responses:
        hidden = plain_hidden(plain, comparison, response, processors)
        expected.append(reward.head(hidden[None])[0])
    close(reward(model.pack([comparison], processors)), torch.stack(expected))


@torch.no_grad()
def test_scores_do_not_change_with_what_else_is_in_the_batch(reward, comparisons, processors):
    alone = torch.cat([reward(model.pack([c], processors)) for c in comparisons])
    together = reward(model.pack(comparisons, processors))
    backwards = reward(model.pack(comparisons[::-1], processors))
    backwards = backwards.view(len(comparisons), -1).flip(0).flatten()
    single = []
    for c in comparisons:
        for response in c.responses:
            part = data.Comparison(c.prompt, [response], [1], c.images, c.grids)
            single.append(reward(model.pack([part], processors)))
    for other in (together, backwards, torch.cat(single)):
        close(other, alone)


def test_positions_are_those_of_transformers(comparisons, processors):
    backbone = AutoModel.from_pretrained(TINY)
    for comparison in comparisons:
        ids = torch.from_numpy(comparison.prompt.astype(np.int64))[None]
        grids = torch.from_numpy(comparison.grids.astype(np.int64))
        types = (ids == processors.image_token).int()
        expected, _ = backbone.get_rope_index(ids, types, image_grid_thw=grids)
        grids = comparison.grids // [1, 2, 2]
        ours = model.prompt_positions(comparison.prompt, grids, processors.image_token)
        assert np.array_equal(ours, expected[:, 0].numpy())


def test_the_mask_is_the_one_printed_beside_it():
    printed = model.dense_mask.__doc__.split("tensor(")[1]
    rows = [line.split("]")[0].strip(" [") for line in printed.splitlines() if "," in line]
    expected = torch.tensor([[int(cell) for cell in row.split(",")] for row in rows])
    assert torch.equal(model.dense_mask([(2, [2, 1]), (1, [1])]).int(), expected.int())


def test_the_attention_of_a_row_is_that_of_the_dense_mask(comparisons, processors):
    row = model.pack(comparisons, processors)
    T = row.input_ids.shape[1]
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, T, 32), torch.randn(1, 2, T, 32), torch.randn(1, 2, T, 32)
    mask = model.dense_mask(row.lengths)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    close(row.attend(0, query, key, value, 0.2), expected)


def test_the_dummy_image_changes_no_score_and_no_gradient(reward, comparisons, processors):
    def gradients(dummy):
        reward.zero_grad()
        scores = reward(model.pack(comparisons[1:2], processors, dummy_image=dummy))
        scores.sum().backward()
        return scores.detach(), {name: p.grad.clone() for name, p in reward.named_parameters()}

    scores, expected = gradients(False)
    scores_dummy, grads = gradients(True)
    close(scores, scores_dummy, 1e-5)  # another length of row, other kernels
    for name in expected:
        torch.testing.assert_close(expected[name], grads[name], atol=1e-5, rtol=1e-4)


def test_score_in_python_equals_the_packed_forward(reward, comparisons, processors, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(56, 84, 1))
    by_path = reward.score([user("What do you see?", str(tmp_path / "a.png"))], RESPONSES)
    parts = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
    turn = {"role": "user", "content": parts}
    by_slot = reward.score([turn], RESPONSES, [picture(56, 84, 1)])
    with torch.no_grad():
        packed = reward(model.pack([comparisons[1]], processors))
    assert torch.equal(by_path, by_slot)
    close(by_path, packed, 1e-6)


HEADS = [(1, "none"), (2, "tanh"), (3, "relu"), (4, "silu"), (5, "silu")]


@pytest.mark.parametrize("layers, activation", HEADS)
def test_a_reward_model_saved_and_loaded_scores_the_same(layers, activation, tmp_path):
    """To the bit: what is loaded is copied, so it is aligned like what was saved."""
    settings = model.HeadSettings(layers, activation, 48)
    before = model.RewardModel.from_backbone(TINY, settings).eval()
    before.save_pretrained(str(tmp_path))
    loaded = model.RewardModel.from_pretrained(str(tmp_path)).eval()
    messages = [user("What do you see?", picture())]
    assert torch.equal(before.score(messages, RESPONSES), loaded.score(messages, RESPONSES))
    assert sum(isinstance(part, torch.nn.Linear) for part in loaded.head.mlp) == layers
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.head.parameters())


def test_transformers_alone_loads_what_was_saved(reward, tmp_path):
    reward.save_pretrained(str(tmp_path))
    plain = AutoModel.from_pretrained(str(tmp_path), dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, reward.backbone.state_dict()[name]), name


def test_special_tokens_in_a_users_text_stay_text(processors):
    text = "Is <|image_pad|> or <|im_end|> a word?"
    ids, _, _ = data.encode_prompt([user(text, picture())], [], processors)
    plain, _, _ = data.encode_prompt([user("Is it a word?", picture())], [], processors)
    special = processors.tokenizer.get_added_vocab()
    for token, number in special.items():
        assert (ids == number).sum() == (plain == number).sum(), token
    words = [processors.tokenizer.decode(int(i)) for i in ids if i != processors.image_token]
    assert "<|image_pad|>" in "".join(words)
    assert special["<|im_end|>"] not in data.encode_response("the end <|im_end|>", processors)[:-1]


# ---- the attention that a GPU takes, and an attention that was lost


def varlen(
    q,
    k,
    v,
    starts,
    key_starts,
    longest,
    longest_keys,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    num_splits=None,
):
    """Compute what varlen_attn computes on a GPU, one segment after the other."""
    assert longest == starts.diff().max() and longest_keys == key_starts.diff().max()
    assert num_splits == 1
    outputs = []
    for i in range(len(starts) - 1):
        q_i = q[starts[i] : starts[i + 1]].transpose(0, 1)[None]  # [1, heads, length, d]
        k_i = k[key_starts[i] : key_starts[i + 1]].transpose(0, 1)[None]
        v_i = v[key_starts[i] : key_starts[i + 1]].transpose(0, 1)[None]
        Q, K = q_i.shape[2], k_i.shape[2]
        mask = torch.ones(Q, K, dtype=torch.bool).tril(K - Q) if window_size == (-1, 0) else None
        output = F.scaled_dot_product_attention(
            q_i, k_i, v_i, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@torch.no_grad()
def test_the_layout_for_variable_length_attention_gives_the_same_scores(
    reward, comparisons, processors, monkeypatch
):
    expected = reward(model.pack(comparisons, processors))
    monkeypatch.setattr(model, "has_varlen", lambda query: True)
    monkeypatch.setattr(model, "varlen_attn", varlen)
    close(reward(model.pack(comparisons, processors)), expected)


def test_pytorchs_own_function_takes_the_options_that_we_pass():
    known = inspect.signature(model.varlen_attn).parameters
    assert {"scale", "window_size", "enable_gqa", "num_splits"} <= known.keys()
    order = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(known)[:7] == order


def test_a_backbone_whose_attention_was_replaced_is_refused(comparisons, processors):
    row = model.pack(comparisons[:1], processors)
    backbone = model.load_backbone(TINY)
    backbone.set_attn_implementation("sdpa")
    with pytest.raises(data.UserError, match="'sdpa'.* cannot read a packed row"):
        model.run_backbone(backbone, row)
    config = AutoConfig.from_pretrained(TINY)
    names = model.attention_of(config)
    backbone = AutoModel.from_config(config, attn_implementation=names)
    model.prepare_vision(backbone)
    model.run_backbone(backbone, row)
    AutoModel.from_config(config, attn_implementation="eager")  # changes the shared config
    with pytest.raises(data.UserError, match="'eager'.* cannot read a packed row"):
        model.run_backbone(backbone, row)


def test_more_than_one_row_is_refused(reward, comparisons, processors):
    row = model.pack(comparisons[:1], processors)
    row.input_ids = row.input_ids.repeat(2, 1)
    row.position_ids = row.position_ids.repeat(1, 2, 1)
    with pytest.raises(ValueError, match="input_ids has 2 rows"):
        reward(row)


def test_under_autocast_all_of_the_attention_is_in_bfloat16(
    reward, comparisons, processors, monkeypatch
):
    dtypes, attend = set(), model.Segments.attend

    def watched(self, query, key, value, scale):
        dtypes.update([query.dtype, key.dtype, value.dtype])
        return attend(self, query, key, value, scale)

    monkeypatch.setattr(model.Segments, "attend", watched)
    row = model.pack(comparisons, processors)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = reward.hidden_states(row)
    assert dtypes == {torch.bfloat16}
    with torch.no_grad():
        exact = reward.hidden_states(row)
    assert (hidden - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_image_features_are_those_of_transformers_with_whole_and_ragged_windows(reward, processors):
    sizes = [(56, 56), (224, 224), (252, 140), (308, 364)]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    prompt, files, grids = data.encode_prompt([user("Look.", *images)], [], processors)
    packed = model.pack([data.Comparison(prompt, [], [], files, grids)], processors).images
    grids = torch.from_numpy(packed.grids)
    with torch.no_grad():
        expected = plain_backbone().get_image_features(packed.pixel_values, grids).pooler_output
        ours = reward.backbone.get_image_features(**packed.arguments()).pooler_output
    close(torch.cat(ours), torch.cat(expected))


# ---- speed: no waiting for a GPU, no recompilation


def test_no_value_is_read_back_from_the_device_within_forward_and_backward(
    reward, comparisons, processors, monkeypatch
):
    """On the meta device tensors have no values: code that would read one from a GPU raises."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # as start_distributed on a GPU
    elsewhere = copy.deepcopy(reward).to("meta")
    row = model.pack(comparisons, processors).to(torch.device("meta"))
    pairs = stages.train.pairs_of(comparisons).to(torch.device("meta"))
    stages.train.ranking_loss(elsewhere(row), pairs).backward()
    assert all(parameter.grad is not None for parameter in elsewhere.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="with other kernels torch 2.13 compiles x + 1 to nan, or not at all",
)
def test_compiled_layers_give_the_same_scores_and_rows_of_other_lengths_compile_nothing_anew(
    reward, comparisons, processors
):
    compiled = copy.deepcopy(reward)
    for layer in [*compiled.backbone.language_model.layers, *compiled.backbone.visual.blocks]:
        layer.compile(dynamic=True)
    parts = [comparisons[:4], comparisons[:3], comparisons[:2], comparisons[1:]]
    for i, part in enumerate(parts):
        if i == 2:  # two lengths have been seen
            torch._dynamo.utils.counters.clear()
        row = model.pack(part, processors)
        scores = compiled(row)
        scores.sum().backward()
        close(scores, reward(row))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
