"""Stage 3 shards an empty model, then fills it: each rank reads the rows of its own shards."""

import pytest
import torch
from conftest import TINY, stages, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config

model = stages.model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, processors):
    """Save Hugging Face checkpoints with an LM head, and a reward model of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    several_files = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float16)
    several_files.save_pretrained(folder / "several_files", max_shard_size="1MB")
    assert len([*(folder / "several_files").glob("model-*.safetensors")]) > 1
    for tied in (True, False):  # a bias of 4 rows: of 3 ranks the last has none
        config = Qwen2Config(
            vocab_size=576,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        text = AutoModelForCausalLM.from_config(config)
        text.save_pretrained(folder / f"text_tied_{tied}")
    policies = [*folder.iterdir()]
    for policy in policies:
        processors.save(policy)
    policies.append(TINY)
    rewards = []
    for i, policy in enumerate(policies):
        rewards.append(folder / f"reward_{i}")
        reward = model.RewardModel.from_backbone(str(policy), model.HeadSettings())
        reward.save_pretrained(rewards[-1])
    return [*policies, *rewards]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_loading_gives_every_parameter_and_buffer_of_a_plain_load(ranks, checkpoints):
    done = torchrun("tests/sharded_load.py", *checkpoints, ranks=ranks)
    rewards = sum("reward_" in str(folder) for folder in checkpoints)
    loads = rewards + 3 * (len(checkpoints) - rewards)
    assert done.stdout.count("same as a plain load") == ranks * loads


def remove(weights):
    del weights["language_model.layers.2.mlp.up_proj.weight"]


def transpose(weights):
    name = "visual.blocks.0.mlp.down_proj.weight"
    weights[name] = weights[name].T.contiguous()


def add(weights):
    weights["language_model.layers.4.mlp.up_proj.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "damage, says",
    [
        (remove, "language_model.layers.2.mlp.up_proj.weight is missing (1 of"),
        (transpose, "visual.blocks.0.mlp.down_proj.weight has the wrong shape: [256, 128] in"),
        (add, "language_model.layers.4.mlp.up_proj.weight is not a weight of a Qwen2_5_VLModel"),
        (None, "no whole checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_ends_in_one_line_that_names_the_tensor(
    damage, says, world, tmp_path
):
    model.RewardModel.from_backbone(TINY, model.HeadSettings()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if damage:
        weights = load_file(path)
        damage(weights)
        save_file(weights, path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-1])
    folders = ["--model", tmp_path, "--data", world / "data/train", "--out", tmp_path / "out"]
    done = torchrun("03_train.py", *folders, "--steps", 1, ranks=1, check=False)
    own = [line for line in done.stderr.splitlines() if line.startswith("03_train.py: ")]
    assert done.returncode and len(own) == 1 and says in own[0]
    assert "Traceback" not in done.stderr.split(own[0])[0]
