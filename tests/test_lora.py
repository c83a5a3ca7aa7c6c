"""Stage 3 with --lora_rank: adapters train like any parameter and leave as part of the weights."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run_training, stages
from safetensors import safe_open
from safetensors.torch import load_file

data, model, train = stages.data, stages.model, stages.train


def run(world, initial, out, *more, ranks: int):
    settings = {"lora_rank": 4, "learning_rate": 3e-3, "checkpoint_every": 3}
    return run_training(world, initial, out, *more, ranks=ranks, **settings)


def largest_difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def trained(world, initial, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, *run(world, initial, out, ranks=2)


def test_merged_weights_score_as_the_adapters_do(initial, world, tmp_path):
    _, _, device = data.start_distributed()
    comparisons = data.Comparisons(str(world / "data/train"))
    row = model.pack([comparisons[i] for i in range(12)], data.load_processors(TINY))
    plain = model.RewardModel.from_pretrained(initial)
    reward = model.RewardModel.from_pretrained(initial, empty=True)
    train.freeze(reward.backbone, SimpleNamespace(freeze_vision=False, lora_rank=4), device)
    train.shard(reward, reward.backbone, device, in_float32=[reward.head])
    train.load_weights(reward.backbone, initial, device)
    adapters = [m for m in reward.modules() if isinstance(m, train.LoRALinear)]
    layers = reward.backbone.config.text_config.num_hidden_layers
    assert len(adapters) == 7 * layers  # q, k, v, o, gate, up, down
    with torch.no_grad():
        expected = plain(row)
        torch.testing.assert_close(reward(row), expected, atol=1e-6, rtol=0)
        for adapter in adapters:
            torch.nn.init.normal_(adapter.up.weight.to_local(), std=0.1)
        adapted = reward(row)
        assert (adapted - expected).abs().max() > 0.1
    train.merge_adapters(reward.backbone)
    reward.save_pretrained(str(tmp_path))
    names = plain.backbone.state_dict().keys()
    assert load_file(tmp_path / "model.safetensors").keys() == names
    with torch.no_grad():
        exported = model.RewardModel.from_pretrained(str(tmp_path))(row)
    torch.testing.assert_close(exported, adapted, atol=1e-5, rtol=0)


def test_on_a_gpu_the_base_is_bfloat16_and_neither_frequencies_nor_the_export_are(initial):
    _, _, device = data.start_distributed()
    plain = model.RewardModel.from_pretrained(initial)
    reward = model.RewardModel.from_pretrained(initial, empty=True)
    settings, gpu = SimpleNamespace(freeze_vision=False, lora_rank=4), SimpleNamespace(type="cuda")
    train.freeze(reward.backbone, settings, gpu)
    train.shard(reward, reward.backbone, device, in_float32=[reward.head])
    train.load_weights(reward.backbone, initial, device)
    for (name, buffer), (_, expected) in zip(
        reward.backbone.named_buffers(), plain.backbone.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name
    adapters = {name: m for name, m in reward.named_modules() if isinstance(m, train.LoRALinear)}
    expected = {}
    for name, adapter in adapters.items():
        torch.nn.init.normal_(adapter.up.weight.to_local(), std=1e-3)
        weight = adapter.weight.full_tensor()
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, plain.get_submodule(name).weight.bfloat16())
        product = adapter.up.weight.full_tensor() @ adapter.down.weight.full_tensor()
        expected[name] = (weight.float() + product).detach()
    train.merge_adapters(reward.backbone)
    for name, weight in expected.items():
        merged = reward.get_submodule(name).weight.full_tensor()
        torch.testing.assert_close(merged, weight, atol=1e-6, rtol=0)


def test_two_ranks_train_the_adapters_that_one_rank_trains(trained, world, initial, tmp_path):
    weights, lines = run(world, initial, tmp_path / "one", "--activation_checkpointing", ranks=1)
    assert largest_difference(weights, trained[1]) < 1e-5
    for one, two in zip(lines, trained[2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    before = load_file(f"{initial}/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed and all("language_model.layers" in name for name in changed)


def test_a_checkpoint_holds_what_is_trained_and_resumes_to_the_bit(trained, world, initial):
    out, weights, lines = trained
    names = set()
    for file in (out / "checkpoints/step_000003").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    parameters = [name for name in names if name.startswith("model.")]
    assert parameters and all(
        ".up." in name or ".down." in name or name.startswith("model.head") for name in parameters
    )
    resumed, resumed_lines = run(world, initial, out, "--resume", ranks=2)
    assert largest_difference(weights, resumed) == 0
    assert resumed_lines[-1]["loss"] == lines[-1]["loss"]
