"""A reward model in use: two in a router, a JSONL in and out, TRL's trainer, bfloat16."""

import copy
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import (
    RESPONSES,
    ROOT,
    TINY,
    assistant,
    picture,
    reward_on,
    stages,
    torchrun,
    user,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Config,
)

data = stages.data
model = stages.model
evaluation = stages.eval
ensemble = stages.ensemble
grpo = stages.grpo
ABOUT_A_PICTURE = [user("What do you see?", picture(56, 84, 1))]
TEXT = [user("What is 2 + 3?")]


@pytest.fixture(scope="module")
def text_reward(tmp_path_factory):
    """A text-only reward model with the embedded backbone's tokenizer."""
    folder = str(tmp_path_factory.mktemp("half"))
    ensemble.language_half(TINY, folder)
    return reward_on(folder, seed=2)


@pytest.fixture(scope="module")
def foreign_reward(tmp_path_factory):
    """A text-only reward model whose chat template gives the same prompt other tokens."""
    folder = str(tmp_path_factory.mktemp("foreign"))
    ensemble.language_half(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(folder)
    return model.RewardModel.from_backbone(folder, model.HeadSettings()).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, reward, text_reward, foreign_reward):
    """Where the three are saved."""
    folder = tmp_path_factory.mktemp("models")
    for name, made in {"reward": reward, "text": text_reward, "foreign": foreign_reward}.items():
        made.save_pretrained(str(folder / name))
    return folder


# ---- scores


def test_many_responses_are_scored_in_several_rows_as_in_one(reward, processors):
    texts = [f"A red circle, {'very ' * (i % 7)}large, at row {i}." for i in range(60)]
    prompts = (ABOUT_A_PICTURE, TEXT, ABOUT_A_PICTURE)
    comparisons = [reward.encode(messages, texts, ()) for messages in prompts]
    rows = list(model.split_into_rows(comparisons, 700))
    assert len(rows) > 3 and all(sum(part.length for part in row) <= 700 for row in rows)
    lengths = [len(part.responses) for row in rows for part in row]
    assert lengths and sum(lengths) == 180
    in_one_row = reward.score_encoded(comparisons, 10**6)
    torch.testing.assert_close(reward.score_encoded(comparisons, 700), in_one_row)
    assert reward.score(TEXT, []).shape == (0,) and reward.score_encoded([]).shape == (0,)


def test_a_comparison_that_fits_into_a_row_is_never_cut(reward):
    comparisons = [reward.encode(TEXT, RESPONSES[:n], ()) for n in (3, 2, 1, 3, 3)]
    longest = max(comparison.length for comparison in comparisons)
    rows = list(model.split_into_rows(comparisons, longest))
    assert [len(part.responses) for row in rows for part in row] == [3, 2, 1, 3, 3]
    with_one_response_too_long = list(model.split_into_rows(comparisons[:1], 1))
    assert [len(part.responses) for row in with_one_response_too_long for part in row] == [1, 1, 1]


def test_in_bfloat16_the_head_and_rotary_frequencies_stay_exact(reward, tmp_path):
    reward.save_pretrained(str(tmp_path))
    small = model.RewardModel.from_pretrained(str(tmp_path))
    assert model.place(small, "cpu", torch.bfloat16) is small
    for name, tensor in small.state_dict().items():
        expected = reward.state_dict()[name]
        if not name.startswith("head."):
            expected = expected.bfloat16()
        assert torch.equal(tensor, expected), name
    for (name, buffer), expected in zip(small.named_buffers(), reward.buffers(), strict=True):
        assert buffer.dtype == torch.float32 and torch.equal(buffer, expected), name
    exact = reward.score(ABOUT_A_PICTURE, RESPONSES)
    rounded = small.score(ABOUT_A_PICTURE, RESPONSES)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.1 * exact.std()
    with pytest.raises(data.UserError, match="place"):
        small.to(torch.bfloat16).score(TEXT, RESPONSES)


def test_the_readmes_lines_work_from_another_folder(reward, tmp_path):
    reward.save_pretrained(str(tmp_path / "artifacts/my_reward"))
    (tmp_path / "picture.png").write_bytes(picture())
    readme = (ROOT / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    lines = next(block for block in blocks if "reward.score(" in block)
    assert "/path/to/this" in lines
    lines = lines.replace("/path/to/this", str(ROOT))
    lines = lines.replace("reward.score(", "found = reward.score(")
    command = [sys.executable, "-c", lines + "print(found.tolist())"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    messages = [user("What is it?", picture())]
    expected = reward.score(messages, ["A red circle.", "A blue square."])
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected.tolist(), abs=1e-5)


# ---- two in a router


def test_the_router_gives_each_comparison_the_score_of_its_model(reward, text_reward):
    router = model.RewardRouter(reward, text_reward)
    expected = reward.score(ABOUT_A_PICTURE, RESPONSES)
    assert torch.equal(router.score(ABOUT_A_PICTURE, RESPONSES), expected)
    assert torch.equal(router.score(TEXT, RESPONSES), text_reward.score(TEXT, RESPONSES))
    in_column = router.score([user("What do you see?")], RESPONSES, [picture(56, 84, 1)])
    assert torch.equal(in_column, expected)
    mixed = [TEXT, ABOUT_A_PICTURE, TEXT, ABOUT_A_PICTURE]
    found = router.score_encoded([router.encode(messages, RESPONSES[:2]) for messages in mixed])
    expected = torch.cat([router.score(messages, RESPONSES[:2]) for messages in mixed])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(data.UserError, match="text-only"):
        model.RewardRouter(text_reward, reward)


def test_a_router_of_two_tokenizers_scores_from_text_and_refuses_prepared_data(
    reward, foreign_reward
):
    router = model.RewardRouter(reward, foreign_reward)
    assert torch.equal(router.score(TEXT, RESPONSES), foreign_reward.score(TEXT, RESPONSES))
    with pytest.raises(data.UserError, match="different tokenizers .* --score"):
        print(router.fingerprint)


def test_04_scores_a_benchmark_with_each_model_where_it_belongs(
    folders, text_reward, reward, world, tmp_path
):
    both = ["--model", folders / "reward", "--text_model", folders / "text", "--out", tmp_path]
    torchrun("04_eval.py", *both, "--benchmark", world / "data/train_holdout")
    found = load_file(tmp_path / "reward+text/train_holdout.safetensors")
    comparisons = data.Comparisons(world / "data/train_holdout")
    images = 0
    for i in range(len(comparisons)):
        comparison = comparisons[i]
        scores = found["scores"][found["offsets"][i] : found["offsets"][i + 1]]
        expected = (reward if comparison.images else text_reward).score_encoded([comparison])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        images += bool(comparison.images)
    assert 0 < images < len(comparisons)


def test_the_router_rewards_a_group_in_06_as_the_model_that_it_belongs_to(
    reward, text_reward, comparisons
):
    data.start_distributed()
    router = model.RewardRouter(reward, text_reward)
    settings = grpo.Settings(micro_tokens=300)
    texts = [RESPONSES] * len(comparisons)
    found = grpo.score_groups(router, comparisons, texts, settings)
    for scores, comparison in zip(found, comparisons):
        right = reward if comparison.images else text_reward
        alone = grpo.score_groups(right, [comparison], [RESPONSES], settings)[0]
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)


def test_06_trains_with_a_router(folders, world, tmp_path):
    both = ["--model", folders / "reward", "--text_model", folders / "text", "--reward", "model"]
    sizes = ["--steps", 1, "--batch_size", 4, "--group_size", 2, "--max_new_tokens", 8]
    data_sets = ["--data", world / "data/questions", "--benchmark", ""]
    export = ["--out", tmp_path, "--export_dtype", "bf16"]
    torchrun("06_grpo.py", *both, *sizes, *data_sets, *export, ranks=1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["reward"] == pytest.approx(line["score"], abs=1e-6) and line["score_std"] > 0
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


# ---- a JSONL, in and out

LINES = [
    {"id": 1, "prompt": "What is 2 + 3?", "responses": ["5", "6", "7"], "note": "kept as it is: é"},
    {
        "prompt": [user("What do you see?")],
        "images": ["a.png"],
        "chosen": [assistant("A dog")],
        "rejected": "A cat",
    },
    "not json",
    {"prompt": "What?", "responses": ["It alone."], "ranks": None, "error": "of an earlier run"},
    {
        "prompt": [user("What do you see?")],
        "images": ["missing.png"],
        "chosen": "A dog",
        "rejected": "A cat",
    },
    {"prompt": "What?", "chosen": "One."},
    "",
    {"prompt": "What?", "responses": ["Same.", "Same.", ""]},
    '{"prompt": "Half a pair: \\ud800", "responses": ["One."]}',
    {"prompt": TEXT, "responses": []},
    {"responses": ["One."]},
    {"prompt": "word " * 5000, "responses": ["One."]},
]
ERRORS = {
    2: "not a line of JSON",
    4: "unreadable image: missing.png",
    5: "missing field: responses, or chosen and rejected",
    6: "not a line of JSON",
    7: "responses[2]: empty response",
    8: "surrogate",
    10: "missing field: prompt",
    11: "tokens, more than --max_length 4096",
}


def test_a_jsonl_comes_back_line_by_line_with_scores_or_the_reason_for_none(
    reward, folders, tmp_path
):
    (tmp_path / "a.png").write_bytes(picture())
    file = write_jsonl(tmp_path / "mine.jsonl", LINES)
    run = ["04_eval.py", "--score", file, "--model", folders / "reward", "--micro_tokens", 60]
    printed = torchrun(*run, "--out", tmp_path / "scores", ranks=3).stdout
    assert f"mine.jsonl: {len(LINES)} lines, {len(ERRORS)} of them without scores" in printed
    (out,) = (tmp_path / "scores/reward").iterdir()
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.name == "mine.jsonl" and len(results) == len(LINES)
    for i, (line, result) in enumerate(zip(LINES, results)):
        assert (i in ERRORS) == ("error" in result) == ("scores" not in result), (i, result)
        assert ERRORS.get(i, "") in result.get("error", "")
        if isinstance(line, dict):
            same = {key: value for key, value in line.items() if key != "error"}
            added = {"scores", "error"} & result.keys()
            assert {key: result[key] for key in result if key not in added} == same
    assert results[2]["line"] == "not json\n"
    expected = reward.score([user("What is 2 + 3?")], ["5", "6", "7"]).tolist()
    assert results[0]["scores"] == pytest.approx(expected, abs=1e-5)
    expected = reward.score([user("What do you see?")], ["A dog", "A cat"], [picture()]).tolist()
    assert results[1]["scores"] == pytest.approx(expected, abs=1e-5)
    assert results[9]["scores"] == []


def test_a_jsonl_is_scored_by_two_models_with_their_own_tokenizers(
    reward, foreign_reward, tmp_path
):
    (tmp_path / "a.png").write_bytes(picture())
    lines = [json.dumps(line).encode() for line in LINES[:2]]
    router = model.RewardRouter(reward, foreign_reward)
    text, image = evaluation.score_lines(router, lines, tmp_path, evaluation.Settings())
    expected = foreign_reward.score([user("What is 2 + 3?")], ["5", "6", "7"]).tolist()
    assert text["scores"] == pytest.approx(expected, abs=1e-5)
    expected = reward.score([user("What do you see?")], ["A dog", "A cat"], [picture()]).tolist()
    assert image["scores"] == pytest.approx(expected, abs=1e-5)


def test_lines_are_scored_as_they_come(reward):
    """A file may be larger than memory: the first record comes long before the last line."""
    read = []

    def lines():
        for i in range(10_000):
            read.append(i)
            yield json.dumps({"prompt": "What is 2 + 3?", "responses": [str(i), "5"]}).encode()

    data.start_distributed()
    first = next(evaluation.scored_lines(reward, lines(), ROOT, evaluation.Settings()))
    assert len(first["scores"]) == 2 and len(read) < 300


# ---- TRL


def train_with_trl(policy, processing_class, dataset, reward, folder, **more):
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        str(folder),
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=12,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        **more,
    )
    seen = []

    def watched(**given):
        """Record TRL's arguments and the rewards it gets."""
        rewards = model.trl_reward(reward, **given)
        seen.append((given, rewards))
        return rewards

    funcs = [partial(model.trl_reward, reward), watched]
    trainer = GRPOTrainer(
        policy, funcs, arguments, train_dataset=dataset, processing_class=processing_class
    )
    trainer.train()
    return trainer.state.log_history, seen


@pytest.mark.parametrize("conversational", [True, False])
def test_trl_trains_on_the_scores_and_reads_each_prompt_once(
    conversational, text_reward, processors, tmp_path
):
    from datasets import Dataset

    tokenizer = processors.tokenizer
    torch.manual_seed(0)
    sizes = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(**sizes, **tokens, num_attention_heads=2, num_key_value_heads=1)
    policy = AutoModelForCausalLM.from_config(config)
    rows = []
    for i in range(4):
        question = f"What is {i} + 3?"
        prompt = [{"role": "user", "content": question}] if conversational else question
        rows.append({"prompt": prompt})
    dataset = Dataset.from_list(rows)
    tokenizer = copy.deepcopy(tokenizer)  # the trainer sets on which side it pads
    logs, seen = train_with_trl(policy, tokenizer, dataset, text_reward, tmp_path)
    steps = [line for line in logs if "reward" in line]
    assert len(steps) == 2
    for line, (given, rewards) in zip(steps, seen, strict=True):
        assert line["completions_per_prompt"] == 3
        assert line["rewards/trl_reward/mean"] == pytest.approx(sum(rewards) / 6, abs=1e-5)
        for prompt, completion, score in zip(given["prompts"], given["completions"], rewards):
            text = completion[0]["content"] if conversational else completion
            messages = prompt if conversational else [user(prompt)]
            if text.strip():
                assert score == pytest.approx(text_reward.score(messages, [text]).item(), abs=1e-4)


class Pictures(Qwen2_5_VLProcessor):
    """The part of Qwen2.5-VL's processor that needs no torchvision: without videos."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        tokens = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        self.image_token_id, self.video_token_id = tokens
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("column", ["images", "image"])
def test_trl_trains_with_pictures_in_either_of_its_columns(
    column, reward, text_reward, processors, tmp_path
):
    """The policy is the embedded backbone; equal questions ask about different pictures."""
    from datasets import Dataset

    files = [picture(seed=i) for i in range(4)]
    images = [data.open_image(file) for file in files]
    prompt = [{"role": "user", "content": "What do you see?"}]
    rows = []
    for image in images:
        rows.append({"prompt": prompt, column: [image] if column == "images" else image})
    policy = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = copy.deepcopy(processors.tokenizer)  # the trainer sets on which side it pads
    processing_class = Pictures(processors.image_processor, tokenizer, tokenizer.chat_template)
    router = model.RewardRouter(reward, text_reward)
    logs, seen = train_with_trl(policy, processing_class, Dataset.from_list(rows), router, tmp_path)
    steps = [line for line in logs if "reward" in line]
    for line, (given, rewards) in zip(steps, seen, strict=True):
        assert line["completions_per_prompt"] == 3 and line["rewards/trl_reward/std"] > 0
        for shown, completion, score in zip(given[column], given["completions"], rewards):
            image = shown[0] if column == "images" else shown
            text = completion[0]["content"]
            if text.strip():
                alone = reward.score([user("What do you see?")], [text], [image])
                assert score == pytest.approx(alone.item(), abs=1e-4)


def test_equal_words_about_equal_pictures_are_one_prompt_and_an_empty_completion_has_a_score(
    reward,
):
    logged = {}
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    prompt = [{"role": "user", "content": content}]
    one = data.open_image(picture(seed=1))
    same = data.open_image(picture(seed=1))
    other = data.open_image(picture(seed=2))
    completions = [[assistant(text)] for text in ("A dog", "", "A cat", "A dog")]
    found = model.trl_reward(
        reward,
        [prompt] * 4,
        completions,
        images=[[one], [same], [one], [other]],
        log_metric=logged.__setitem__,
        answer=[None] * 4,
    )
    assert logged == {"completions_per_prompt": 2} and len(set(found)) == 4
    alone = reward.score(prompt, ["A dog", "A cat"], [picture(seed=1)])
    assert [found[0], found[2]] == pytest.approx(alone.tolist(), abs=1e-5)
    two_turns = [assistant("A call"), {"role": "tool", "content": "5"}]
    with pytest.raises(ValueError, match="completions"):
        model.trl_reward(reward, ["What?"], [two_turns])
