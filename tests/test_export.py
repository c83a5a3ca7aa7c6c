"""An export is loaded by transformers alone, in any files and dtype, and is whole or absent."""

import copy
import os
from pathlib import Path

import pytest
import torch
from conftest import RESPONSES, TINY, picture, stages, torchrun, user
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2Config,
)

data, model = stages.data, stages.model


def weights_in(folder) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("model*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_03_exports_bfloat16_that_transformers_alone_loads(world, reward, tmp_path):
    """With a learning rate of 0, so that the export is the initial model, rounded."""
    reward.save_pretrained(str(tmp_path / "initial"))
    train = [
        "--model",
        tmp_path / "initial",
        "--data",
        world / "data/train",
        "--out",
        tmp_path / "reward",
    ]
    train += ["--steps", 1, "--batch_size", 8, "--learning_rate", 0, "--weight_decay", 0]
    torchrun("03_train.py", *train, "--export_dtype", "bf16")
    exact, rounded = (AutoModel.from_pretrained(tmp_path / name) for name in ("initial", "reward"))
    assert rounded.dtype == torch.bfloat16 and exact.dtype == torch.float32
    for name, tensor in exact.state_dict().items():
        assert torch.equal(tensor.bfloat16(), rounded.state_dict()[name]), name
    one, two = (
        model.RewardModel.from_pretrained(tmp_path / name) for name in ("initial", "reward")
    )
    model.place(one, "cpu", torch.bfloat16)
    model.place(one, "cpu", torch.float32)  # rounded, that is
    messages = [user("What do you see?", picture())]
    assert torch.equal(one.score(messages, RESPONSES), two.score(messages, RESPONSES))


@pytest.mark.parametrize("file_size", ["5GB", "300KB"])
def test_exported_loaded_by_transformers_and_exported_again_is_bit_identical(
    file_size, reward, processors, tmp_path
):
    reward.save_pretrained(str(tmp_path / "one"), file_size=file_size)
    model.export(
        AutoModel.from_pretrained(tmp_path / "one"),
        processors,
        tmp_path / "two",
        file_size=file_size,
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    del files["reward_head.safetensors"]
    assert ("model.safetensors" in files) == (file_size == "5GB")  # else several, and their index
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


EXPORT = """
import importlib, sys, torch, torch.distributed as dist
data, model, train = map(importlib.import_module, ("01_data", "02_model", "03_train"))
rank, world, device = data.start_distributed()
for folder in sys.argv[1:]:
    policy = model.Writer(model.load_backbone(folder, True, True), data.load_processors(folder))
    train.shard(policy, policy.lm, device)
    train.load_weights(policy.lm, folder, device)
    model.export(policy.lm, policy.processors, f"{folder}/again", file_size="200KB")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_sharded_policy_is_exported_as_it_was_tied_or_not(processors, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 576, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    kinds = {"pictures": AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)}
    for tied in (True, False):
        config = Qwen2Config(
            **sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied
        )
        kinds[f"text, tied {tied}"] = AutoModelForCausalLM.from_config(config)
    for name, policy in kinds.items():
        policy.save_pretrained(tmp_path / name)
        processors.save(tmp_path / name)
    (tmp_path / "export.py").write_text(EXPORT)
    torchrun(tmp_path / "export.py", *(tmp_path / name for name in kinds))
    for name, policy in kinds.items():
        again = tmp_path / name / "again"
        before, after = weights_in(tmp_path / name), weights_in(again)
        assert before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before
        ), name
        assert ("lm_head.weight" in after) == (name == "text, tied False")
        loaded, report = type(policy).from_pretrained(again, output_loading_info=True)
        assert not any(report.values()), report
        assert all(
            torch.equal(tensor, loaded.state_dict()[key])
            for key, tensor in policy.state_dict().items()
        ), name
        configs = [
            AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / name, again)
        ]
        assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}
        assert data.load_processors(again).fingerprint == processors.fingerprint
        if policy.can_generate():
            assert loaded.generation_config.eos_token_id == policy.generation_config.eos_token_id


def test_of_an_export_that_broke_off_neither_the_old_nor_the_new_model_is_there(reward, tmp_path):
    folder = tmp_path / "model"
    reward.save_pretrained(str(folder), file_size="300KB")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json/in the way").mkdir(
        parents=True
    )  # the new file cannot be put in its place
    with pytest.raises(OSError):
        reward.save_pretrained(str(folder))
    with pytest.raises(data.UserError, match="no reward model there"):
        model.RewardModel.from_pretrained(str(folder))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(folder)
    (folder / "tokenizer.json/in the way").rmdir()
    (folder / "tokenizer.json").rmdir()
    reward.save_pretrained(str(folder))
    assert sorted(path.name for path in folder.glob("*model*")) == ["model.safetensors"]
    assert not (folder / ".writing").exists() and model.RewardModel.from_pretrained(str(folder))


def save_until_killed(reward, folder: str, changes: int) -> bool:
    """Save a model in a process that ends after so many files were moved or deleted.

    Return whether it came to the end."""
    left = iter(range(changes))

    def counted(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                os._exit(9)
            function(*arguments, **options)

        return call

    pid = os.fork()
    if pid == 0:
        try:
            os.replace = counted(os.replace)
            Path.unlink = counted(Path.unlink)
            reward.save_pretrained(folder, file_size="300KB")  # several files
            os._exit(0)
        finally:
            os._exit(1)  # an error must not go on with the tests in this process
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), "the export failed by itself"
    return status == 0


def whose(weights: dict, old: dict) -> str:
    """Say whether all weights are the old ones, or the new ones, which are larger by 1."""
    added = [(weights[name] - old[name]).flatten() for name in weights]
    (difference,) = torch.cat(added).round().unique().tolist()
    return {0: "old", 1: "new"}[difference]


def test_an_export_killed_at_any_file_leaves_one_whole_model_or_none(reward, tmp_path):
    """The backbone alone, as `transformers` reads it, is never a mixture either."""
    folder = str(tmp_path)
    old = reward.state_dict()
    new = copy.deepcopy(reward)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    found = []
    whole = False
    while not whole:
        reward.save_pretrained(folder, file_size="300KB")
        whole = save_until_killed(new, folder, changes=len(found))
        try:
            backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
            whose({f"backbone.{name}": tensor for name, tensor in backbone.items()}, old)
        except OSError as error:
            assert "no file named" in str(error)
        try:
            found.append(whose(model.RewardModel.from_pretrained(folder).state_dict(), old))
        except data.UserError as error:
            assert "no reward model there" in str(error)
            found.append("none")
    assert len(found) > 10 and set(found[:-1]) == {"old", "none"} and found[-1] == "new"


def test_a_model_that_is_trained_again_names_all_its_training_data(reward, tmp_path):
    trained = copy.deepcopy(reward)
    for folder in ("one", "two", "one"):
        settings = stages.train.Settings(data=[folder], out=str(tmp_path))
        stages.train.export(trained, settings, steps=3, line={})
        trained = model.RewardModel.from_pretrained(str(tmp_path))
    assert trained.trained_with["data"] == ["one", "two"] and trained.trained_with["steps"] == 9


def test_02_says_that_it_leaves_a_trained_head_behind(reward, tmp_path):
    reward.save_pretrained(str(tmp_path / "trained"))
    told = {"--backbone": tmp_path / "trained", "--out": tmp_path / "new", "--data": ""}
    done = torchrun("02_model.py", *(word for pair in told.items() for word in pair), ranks=1)
    assert f"03_train.py --model {tmp_path}/trained continues with it" in done.stdout


def test_02_never_replaces_a_trained_model(reward, tmp_path):
    trained = copy.deepcopy(reward)
    trained.trained_with = {"data": ["somewhere"], "steps": 1}
    trained.save_pretrained(str(tmp_path))
    before = (tmp_path / "reward_head.safetensors").read_bytes()
    done = torchrun("02_model.py", "--out", tmp_path, ranks=1, check=False)
    assert done.returncode and "has a trained reward model; give another --out" in done.stderr
    assert (tmp_path / "reward_head.safetensors").read_bytes() == before
