"""Every family goes the same way: read as published, scored in one packed row, sharded, trained,
exported. The checkpoints are tiny and random and have the layout of the published ones.
"""

import itertools
import json
import os
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from conftest import (
    PROMPTS,
    RESPONSES,
    assistant,
    picture,
    reward_on,
    stages,
    torchrun,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

data, model, grpo = stages.data, stages.model, stages.grpo

PROCESSORS = {
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "internvl": InternVLProcessor,
}


def ask(text: str) -> dict:
    return {"role": "user", "content": text}  # a text-only template knows no list of parts


TEXTS = {
    "text": [ask("What is 2 + 3?")],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        ask("Add 2."),
        assistant("To what?"),
        ask("To 3."),
    ],
}


@pytest.fixture(scope="module", params=families.CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of all families' checkpoints, by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: str(families.write(name, root / name)) for name in families.CONFIGS}


@pytest.fixture(scope="module")
def checkpoint(checkpoints, name):
    return checkpoints[name]


@pytest.fixture(scope="module")
def reward(checkpoint):
    return reward_on(checkpoint)


@pytest.fixture(scope="module")
def plain(checkpoint):
    """What transformers itself makes of the checkpoint, with its own attention."""
    return AutoModel.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@lru_cache(1)
def own_parts(checkpoint: str) -> tuple:
    """A checkpoint's tokenizer, config and, if any, image processor, by transformers alone."""
    vision = Path(checkpoint, "preprocessor_config.json").is_file()
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil") if vision else None
    return (
        AutoTokenizer.from_pretrained(checkpoint),
        data.AutoConfig.from_pretrained(checkpoint),
        processor,
    )


def plain_inputs(name: str, checkpoint: str, messages: list, response: str) -> dict:
    """One prompt and one response by transformers alone: its template, tokenizer, image processor,
    and how its Processor replaces a placeholder. (The whole one needs torchvision.)"""
    tokenizer, config, processor = own_parts(checkpoint)
    own = Path(checkpoint, "chat_template.json")  # where the tokenizer has none
    own = json.loads(own.read_text())["chat_template"] if own.is_file() else None
    text = tokenizer.apply_chat_template(
        messages, chat_template=own, tokenize=False, add_generation_prompt=True
    )
    text += response + ("<|eot_id|>" if name == "llama" else "<|im_end|>")
    contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    images = [
        data.open_image(part["image"])
        for parts in contents
        for part in parts
        if part["type"] == "image"
    ]
    inputs = {}
    if images:
        cls = PROCESSORS[name]
        inputs = processor(images, return_tensors="pt", **getattr(cls, "images_kwargs", {}))
        token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        own = SimpleNamespace(image_processor=processor, image_token=token)
        own.start_image_token, own.end_image_token = "<img>", "</img>"
        own.image_seq_length = getattr(config, "image_seq_length", None)
        first, *rest = text.split(token)
        text = first + "".join(
            cls.replace_image_token(own, inputs, i) + piece for i, piece in enumerate(rest)
        )
        inputs.pop("num_patches", None)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return {**inputs, "input_ids": ids}


def comparison_of(messages: list, processors):
    ids, files, grids = data.encode_prompt(messages, [], processors)
    responses = [data.encode_response(text, processors) for text in RESPONSES]
    return data.Comparison(ids, responses, [1, 2, 3], files, grids)


def prompts_of(name: str) -> list:
    return list((PROMPTS if name in families.IMAGES else TEXTS).values())


# ---- one packed row


def test_packed_scores_and_gradients_are_those_of_plain_forwards(name, checkpoint, reward, plain):
    """With text, one image, several of different sizes, several turns; alone and in one row."""
    scores = []
    for messages in prompts_of(name):
        inputs = [plain_inputs(name, checkpoint, messages, response) for response in RESPONSES]
        hidden = torch.stack([plain(**each).last_hidden_state[0, -1] for each in inputs])
        scores.append(reward.head(hidden))
        with torch.no_grad():
            alone = reward(
                model.pack([comparison_of(messages, reward.processors)], reward.processors)
            )
        torch.testing.assert_close(alone, scores[-1].detach(), atol=1e-5, rtol=0)
    expected = torch.cat(scores)
    expected.square().sum().backward()
    reward.zero_grad()
    comparisons = [comparison_of(messages, reward.processors) for messages in prompts_of(name)]
    packed = reward(model.pack(comparisons, reward.processors))
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
    packed.square().sum().backward()
    expected_of = {key: parameter.grad for key, parameter in plain.named_parameters()}
    usual = torch.stack([gradient.abs().max() for gradient in expected_of.values()]).median()
    for key, parameter in reward.backbone.named_parameters():
        # The gradient of a bias of keys without rotation is noise.
        scale = max(expected_of[key].abs().max(), usual / 100)
        torch.testing.assert_close(
            parameter.grad / scale, expected_of[key] / scale, atol=1e-4, rtol=0, msg=key
        )


# ---- reading, exporting, training


def test_on_two_ranks_the_sharded_load_gives_the_weights_and_buffers_of_a_plain_load(checkpoints):
    """With and without the LM head, from published names of tensors, in one file and in several."""
    done = torchrun("tests/sharded_load.py", *checkpoints.values())
    assert done.stdout.count("same as a plain load") == 2 * 3 * len(checkpoints)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def test_an_export_loads_without_this_project_and_exports_to_the_same_bits(reward, tmp_path):
    first, second, third = (tmp_path / each for each in "123")
    reward.save_pretrained(first)
    loaded, about = AutoModel.from_pretrained(first, dtype=torch.float32, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert state.keys() == reward.backbone.state_dict().keys()
    assert all(
        torch.equal(tensor, state[key]) for key, tensor in reward.backbone.state_dict().items()
    )
    loaded.save_pretrained(second)
    again = model.RewardModel.from_pretrained(first)
    again.save_pretrained(third)
    one, two, three = map(weights_in, (first, second, third))
    assert one.keys() == three.keys() and all(torch.equal(one[key], three[key]) for key in one)
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert again.processors.fingerprint == reward.processors.fingerprint
    assert again.processors.pixels == reward.processors.pixels


OTHER_KERNELS = {"ATEN_CPU_CAPABILITY", "MKL_CBWR", "DNNL_MAX_CPU_ISA"}
STAGES = """
import importlib, sys
data, model, train = (importlib.import_module(name) for name in ("01_data", "02_model", "03_train"))
root, *checkpoints = sys.argv[1:]
_, world, _ = data.start_distributed()
for checkpoint in checkpoints:
    name = checkpoint.split("/")[-1]
    vision = data.Path(checkpoint, "preprocessor_config.json").is_file()
    prepared, initial = f"{root}/data/{name}", f"{root}/initial/{name}"
    if world == 1:  # the run on two trains the same
        source = f"{root}/{'pictures' if vision else 'texts'}.jsonl"
        how = {"backbone": checkpoint, "out": f"{root}/data", "name": name, "holdout": 0}
        data.main(data.Settings(source=[source], **how))
        model.main(model.Settings(backbone=checkpoint, out=initial, data=prepared))
    how = {"steps": 3, "batch_size": 4, "learning_rate": 1e-4, "warmup": 0.5, "micro_tokens": 512}
    how |= {"validation": "", "activation_checkpointing": world == 2}
    out = f"{root}/{world}/{name}"
    train.train(train.Settings(model=initial, data=[prepared], out=out, **how))
data.dist.barrier()
data.gc.collect()
data.dist.destroy_process_group()
"""


def test_three_steps_on_two_ranks_are_those_on_one(checkpoints, tmp_path):
    """Every family trains on text and pictures mixed. Two ranks also recompute layers."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(56 + 28 * i, 84, i))
    pairs = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": "No."}
        for i in range(12)
    ]
    write_jsonl(tmp_path / "texts.jsonl", pairs)
    seen = [pair | {"images": [f"{j}.png" for j in range(i % 4)]} for i, pair in enumerate(pairs)]
    write_jsonl(tmp_path / "pictures.jsonl", seen)
    (tmp_path / "stages.py").write_text(STAGES)
    for ranks in (1, 2):
        torchrun(tmp_path / "stages.py", tmp_path, *checkpoints.values(), ranks=ranks)
    for name in checkpoints:
        one, two, before = (weights_in(tmp_path / each / name) for each in ("1", "2", "initial"))
        for key in one:
            # AdamW magnifies rounding where a gradient is nearly zero; kernels chosen by the
            # environment showed 3.6e-6 in one weight. That of a bias of keys is all rounding.
            tolerance = 1e-5 if OTHER_KERNELS & os.environ.keys() else 1e-6
            if key.endswith("k_proj.bias"):
                tolerance = 1e-4
            torch.testing.assert_close(
                one[key],
                two[key],
                atol=tolerance,
                rtol=0,
                msg=lambda text, name=name, key=key: f"{name}: {key}: {text}",
            )
        moved = [key for key in one if not torch.equal(one[key], before[key])]
        assert len(moved) > 0.9 * len(one), name
        runs = [
            [json.loads(line) for line in open(tmp_path / ranks / name / "metrics.jsonl")]
            for ranks in "12"
        ]
        for a, b in zip(*runs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), (name, a["step"])


# ---- tokenizers, pixels, what is refused


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2", "internvl", "llama"])
def test_special_tokens_have_their_published_ids_and_the_templates_end_of_turn_ends_a_response(
    name, tmp_path
):
    families.write_processors(name, tmp_path, published=True)
    processors = data.load_processors(str(tmp_path))
    ids = dict.fromkeys(("<|im_end|>",), 151645) | {"<|im_start|>": 151644}
    if name in families.IMAGES:
        ids |= {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655}
    if name == "internvl":
        ids |= {"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}
    if name == "llama":
        ids = {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009}
    assert {token: processors.tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert (
        data.encode_response("No", processors)[-1]
        == ids["<|eot_id|>" if name == "llama" else "<|im_end|>"]
    )
    assert processors.image_token == {"internvl": 151667}.get(
        name, 151655 if name in families.IMAGES else None
    )


@pytest.mark.parametrize("name", families.IMAGES)
@pytest.mark.parametrize("max_pixels", [0, 501760])
def test_an_image_gives_as_many_patches_as_its_processor_makes_of_it(name, max_pixels, checkpoints):
    """With the checkpoint's own limits and with a tighter one, which is met."""
    processors = data.load_processors(checkpoints[name], max_pixels)
    own = AutoImageProcessor.from_pretrained(checkpoints[name], backend="pil")
    for size in [(56, 56), (40, 300), (333, 57), (640, 480), (1200, 900), (3000, 200)]:
        time, height, width = data.patch_grid(size, processors)
        image = data.open_image(picture(*size))
        pixels = processors.image_processor([image], return_tensors="pt")
        if name == "internvl":
            assert (time, height, width) == (len(pixels["pixel_values"]), 4, 4)
        else:
            assert [[time, height, width]] == pixels["image_grid_thw"].tolist()
            assert not max_pixels or height * width * processors.vision.patch**2 <= max_pixels
        if not max_pixels:
            options = getattr(PROCESSORS[name], "images_kwargs", {})
            plain = own([image], return_tensors="pt", **options)
            assert torch.equal(pixels["pixel_values"], plain["pixel_values"])


def test_tiles_keep_within_the_limit_of_pixels_and_shards_remember_it(checkpoints):
    image = families.IMAGES["internvl"]
    assert image["size"] == {"height": 56, "width": 56} and not image["crop_to_patches"]
    other = data.load_processors(checkpoints["internvl"])
    for max_pixels, tiles in [
        (0, 12),
        (56 * 56 * 4, 4),
        (56 * 56 * 2 - 1, 1),
        (10, 1),
        (10**7, 12),
    ]:
        processors = data.load_processors(checkpoints["internvl"], max_pixels)
        assert processors.pixels == {"tiles": tiles}
        count = data.patch_grid((1000, 1000), processors)[0]
        assert (
            count == {12: 10, 4: 5, 1: 1}[tiles]
        )  # 9, 4 or 1 of a square, and a thumbnail behind several
        other.pixels = json.loads(json.dumps(processors.pixels))
        assert data.patch_grid((1000, 1000), other)[0] == count


def test_an_unsupported_backbone_is_refused_by_name_with_those_that_are(tmp_path):
    def refused(says: str, **config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for load in (data.load_processors, model.load_backbone):
            with pytest.raises(data.UserError, match=says):
                load(str(tmp_path))

    supported = "supported are qwen2_5_vl, qwen2_vl, qwen3_vl, internvl, qwen2, qwen3, llama"
    refused(f"a gpt2; {supported}", model_type="gpt2")
    refused(f"a qwen3_vl_moe; {supported}", model_type="qwen3_vl_moe")
    refused(
        "internvl with a decoder of type gpt2; supported are qwen2, qwen3, llama",
        **{"model_type": "internvl", "text_config": {"model_type": "gpt2"}},
    )
    sliding = families.CONFIGS["qwen2"] | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    refused("sliding attention window", **sliding)


def test_a_tokenizer_without_a_chat_template_is_refused(checkpoints, tmp_path):
    about = json.loads(Path(checkpoints["llama"], "tokenizer_config.json").read_text())
    del about["chat_template"]
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes(Path(checkpoints["llama"], file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(data.UserError, match="no chat template"):
        data.load_processors(str(tmp_path))


# ---- what comes after: the language half, the policy


@pytest.mark.parametrize("name", families.IMAGES)
def test_the_language_half_is_the_same_model_on_text(name, checkpoints, tmp_path):
    stages.ensemble.language_half(checkpoints[name], str(tmp_path))
    whole, half = (model.load_backbone(folder) for folder in (checkpoints[name], str(tmp_path)))
    processors = data.load_processors(str(tmp_path))
    assert processors.image_processor is None
    row = model.pack([comparison_of(TEXTS["several turns"], processors)], processors)
    with torch.no_grad():
        expected = model.run_backbone(whole, row)
        torch.testing.assert_close(model.run_backbone(half, row), expected, atol=1e-5, rtol=0)


def test_a_policys_log_probabilities_and_rollouts_are_those_of_plain_forwards(name, checkpoint):
    policy = grpo.Policy(checkpoint, 1.0).eval()
    auto = AutoModelForImageTextToText if name in families.IMAGES else AutoModelForCausalLM
    plain = auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    messages = prompts_of(name)[-1]
    comparison = comparison_of(messages, policy.processors)
    expected = []
    with torch.no_grad():
        for response, ids in zip(RESPONSES, comparison.responses):
            logits = plain(**plain_inputs(name, checkpoint, messages, response)).logits[
                0, -len(ids) - 1 : -1
            ]
            log_p = logits.index_fill(-1, policy.forbidden, -torch.inf).log_softmax(-1)
            expected.append(log_p.gather(-1, torch.from_numpy(ids.astype(np.int64))[:, None])[:, 0])
        log_p, _ = policy(model.pack([comparison], policy.processors))
        torch.testing.assert_close(log_p, torch.cat(expected), atol=1e-4, rtol=0)
        tokens, _ = grpo.rollout(policy, [comparison], 1, 4, None)
        sampled = tokens[0, 0].tolist()
        answer = [token for token in sampled if token >= 0]
        again = data.Comparison(
            comparison.prompt,
            [np.array(answer, np.int32)],
            [1],
            comparison.images,
            comparison.grids,
        )
        row = model.pack([again], policy.processors)
        hidden = model.run_backbone(policy.lm, row)[model.response_tokens(row)[1]]
    assert policy.logits(hidden).argmax(-1).tolist() == answer


@torch.no_grad()
def test_a_critic_and_a_judge_score_as_plain_forwards_write_greedily_and_are_exported_whole(
    name, checkpoint, tmp_path
):
    auto = AutoModelForImageTextToText if name in families.IMAGES else AutoModelForCausalLM
    plain = auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    critic, judge = (
        model.RewardModel.from_backbone(
            checkpoint, model.HeadSettings(kind=kind, critique_tokens=5)
        ).eval()
        for kind in ("critic", "generative")
    )
    messages = prompts_of(name)[-1]
    comparison = comparison_of(messages, critic.processors)
    comparison.record["critiques"] = ["Right: it is.", "Wrong.", "Right, as I see it."]

    expected, odds = [], {}
    for response, critique in zip(RESPONSES, comparison.record["critiques"]):
        turns = [
            *messages,
            assistant(response),
            ask(critic.asks["request"]),
        ]  # as the family's own template has them
        hidden = plain.model(**plain_inputs(name, checkpoint, turns, critique)).last_hidden_state[
            0, -1:
        ]
        expected.append(critic.head(hidden)[0])
    torch.testing.assert_close(
        critic(model.pack([critic.rewrite(comparison)], critic.processors)),
        torch.stack(expected),
        atol=1e-5,
        rtol=0,
    )
    critiques = critic.write_critiques([comparison])
    asked = [model.with_critiques(comparison, critiques, critic.request)]
    row = model.pack_written(asked, critic.processors)
    hidden = critic.hidden_states(row)[row.predictors]
    likeliest = model.Writer(critic.backbone, critic.processors).logits(hidden).argmax(-1)
    for critique, tokens in zip(critiques, likeliest.split(list(map(len, critiques)))):
        assert tokens[:5].tolist() == critique[:5].tolist()  # after 5 tokens it is ended

    inputs = plain_inputs(name, checkpoint, messages, RESPONSES[0])
    for pair, shown in zip(
        itertools.permutations(range(3), 2), judge.rewrite(comparison).responses
    ):
        ids = torch.from_numpy(np.concatenate([comparison.prompt, shown[:-1]]).astype(np.int64))[
            None
        ]
        inputs |= {"input_ids": ids}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (ids == judge.processors.image_token).int()
        letters = judge.processors.tokenizer.convert_tokens_to_ids(["A", "B"])
        a, b = plain(**inputs).logits[0, -1, letters]
        odds[pair] = a - b
    expected = [sum(odds[i, j] - odds[j, i] for j in range(3) if j != i) / 2 for i in range(3)]
    torch.testing.assert_close(
        judge.score_encoded([comparison]), torch.stack(expected), atol=2e-5, rtol=0
    )

    judge.save_pretrained(str(tmp_path))
    loaded, about = auto.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(about[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        torch.equal(loaded.state_dict()[key], tensor) for key, tensor in plain.state_dict().items()
    )
    again = model.RewardModel.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(again.score_encoded([comparison]), judge.score_encoded([comparison]))
