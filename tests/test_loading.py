"""Stage 3's way into memory: sharded while empty, then filled from the copy that rank 0 reads."""

import pytest
import torch
from conftest import TINY, stages, torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config

model = stages.model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, processors):
    """Folders of Hugging Face checkpoints with an LM head, and of reward models made of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    several_files = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float16)
    several_files.save_pretrained(folder / "several_files", max_shard_size="1MB")
    assert len([*(folder / "several_files").glob("model-*.safetensors")]) > 1
    sizes = {"vocab_size": 576, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for tied in (True, False):  # a bias of 4 rows: of 3 ranks the last has none
        text = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, tie_word_embeddings=tied))
        text.save_pretrained(folder / f"text_tied_{tied}")
    policies = [*folder.iterdir()]
    for policy in policies:
        processors.save(policy)
    policies.append(TINY)
    rewards = [folder / f"reward_{i}" for i in range(len(policies))]
    for policy, reward in zip(policies, rewards, strict=True):
        fresh = model.RewardModel.from_backbone(str(policy), model.HeadSettings())
        fresh.save_pretrained(reward)
    return policies, rewards


def test_sharded_loading_gives_every_parameter_and_buffer_of_a_plain_load(checkpoints):
    policies, rewards = checkpoints
    ranks = 3  # shares of unequal sizes
    done = torchrun("tests/sharded_load.py", *policies, *rewards, ranks=ranks)
    loads = 3 * len(policies) + len(rewards)
    assert done.stdout.count("same as a plain load") == ranks * loads


UP = "language_model.layers.2.mlp.up_proj.weight"


def test_a_checkpoint_without_a_tensor_ends_in_one_line_that_names_both(world, tmp_path):
    """On two ranks; test_bad_input.py damages checkpoints in more ways."""
    model.RewardModel.from_backbone(TINY, model.HeadSettings()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights[UP]
    save_file(weights, path, metadata={"format": "pt"})
    arguments = ["--model", tmp_path, "--data", world / "data/train", "--out", tmp_path / "out"]
    done = torchrun("03_train.py", *arguments, "--steps", 1, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("03_train.py: ")]
    assert done.returncode and str(tmp_path) in line
    assert f"{UP} is missing" in line
    assert "Traceback" not in done.stderr
