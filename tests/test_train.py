"""Stage 3: the same gradient on any number of ranks, the same run after an interruption."""

import ast
import math
import os
import re
import shutil

import kills
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    prepare_here,
    run_training,
    stages,
    torchrun,
    training_options,
    write_jsonl,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

data, model, train = stages.data, stages.model, stages.train


def assert_close(one: dict, two: dict, tolerance: float, title: str = "") -> None:
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).abs().max().item()
        assert difference <= tolerance, (title, name, difference)


def assert_same_run(one, two, tolerance: float) -> None:
    """Compare metrics and weights. Where a gradient is nearly zero, AdamW makes steps of its
    rounding: one weight in 10,000 may differ by ten times the tolerance, the others by a tenth."""
    assert one[0].keys() == two[0].keys()
    differences = [(one[0][name] - two[0][name]).abs().flatten() for name in one[0]]
    differences = torch.cat(differences)
    assert (differences > tolerance / 10).double().mean() <= 1e-4 * (tolerance > 0)
    assert differences.max() <= 10 * tolerance
    for a, b in zip(one[1], two[1], strict=True):
        for key in ("loss", "margin", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=tolerance), (a["step"], key)


# ---- gradients

GRADIENT = """
import gc, importlib, sys, torch.distributed as dist
from safetensors.torch import save_file
names = ("01_data", "02_model", "03_train")
data, model_stage, train = (importlib.import_module(name) for name in names)
folder, initial, out, *cases = sys.argv[1:]
rank, world, device = data.start_distributed()
comparisons = data.Comparisons(folder)
tokens, patches = comparisons.sizes()
batch = list(range(0, len(comparisons), len(comparisons) // 13))[:13]
assert 0 < (patches[batch] > 0).sum() < 13, "text and images have to be mixed"
for case in cases:
    micro_tokens, recompute = case.split(",")
    model = model_stage.RewardModel.from_pretrained(initial)
    train.shard(model, model.backbone, device, recompute == "recompute", in_float32=(model.head,))
    model.train()
    plan = train.plan([batch], tokens, patches, int(micro_tokens), rank, world)
    for micro, row, pairs in train.load(comparisons, plan, model, device, 0):
        (train.ranking_loss(model(row), pairs) * world / micro.step_weight).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        save_file(gradients, f"{out}/{world} {case}")
dist.barrier()
del model, gradients
gc.collect()
dist.destroy_process_group()
"""


def test_the_gradient_of_a_step_is_plain_autograds_on_1_2_and_3_ranks(world, initial, tmp_path):
    """With text and images mixed, any micro-batches, recomputed layers: 1e-5 from one forward for
    each response, -log sigmoid of the difference, the mean over the batch; no code of stage 3."""
    (tmp_path / "gradient.py").write_text(GRADIENT)
    cases = {1: ["100000,", "150,"], 2: ["100000,", "150,", "100000,recompute"], 3: ["300,"]}
    gradients = {}
    for ranks, of_ranks in cases.items():
        arguments = [world / "data/train", initial, tmp_path, *of_ranks]
        done = torchrun(tmp_path / "gradient.py", *arguments, ranks=ranks)
        assert "Warning" not in done.stderr, done.stderr  # a user could do nothing about it
        for case in of_ranks:
            gradients[f"{ranks} {case}"] = load_file(tmp_path / f"{ranks} {case}")

    reward = model.RewardModel.from_pretrained(initial)
    comparisons = data.Comparisons(str(world / "data/train"))
    losses = []
    for i in list(range(0, len(comparisons), len(comparisons) // 13))[:13]:
        c = comparisons[i]
        scores = []
        for response in c.responses:
            alone = data.Comparison(c.prompt, [response], [1], c.images, c.grids)
            scores.append(reward(model.pack([alone], reward.processors))[0])
        pairs = [(a, b) for a in range(len(scores)) for b in range(len(scores))]
        pairs = [(a, b) for a, b in pairs if c.ranks[a] < c.ranks[b]]
        losses.append(sum(-F.logsigmoid(scores[a] - scores[b]) for a, b in pairs) / len(pairs))
    (sum(losses) / len(losses)).backward()
    plain = {name: parameter.grad for name, parameter in reward.named_parameters()}
    for case, sharded in gradients.items():
        assert_close(sharded, plain, 1e-5, case)
    assert max(gradient.abs().max() for gradient in plain.values()) > 1e-2


# ---- runs


@pytest.fixture(scope="module")
def finished(world, initial, tmp_path_factory):
    """Four steps on two ranks, a checkpoint after each, right after a validation."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run_training(world, initial, out, ranks=2, checkpoint_every=1, validate_every=1)


def test_a_run_is_the_same_on_1_and_2_ranks_and_on_2_replicas_of_2_and_goes_on_on_3(
    finished, world, initial, tmp_path
):
    one = run_training(world, initial, tmp_path / "one", ranks=1, checkpoint_every=3)
    assert_same_run(one, finished[1], 1e-5)
    validations = [lines[-1]["validation_accuracy"] for _, lines in (one, finished[1])]
    assert validations[0] == pytest.approx(validations[1], abs=1e-6)
    trained = model.RewardModel.from_pretrained(str(finished[0]))
    held_out = data.Comparisons(str(world / "data/train_holdout"))
    scores = trained.score_encoded([held_out[i] for i in range(len(held_out))])
    measured = {"mean": scores.mean().item(), "deviation": scores.std(correction=0).item()}
    assert trained.trained_with["scores"] == pytest.approx(measured, abs=1e-4)
    hybrid = {"shard_size": 2, "checkpoint_every": 3}
    assert_same_run(one, run_training(world, initial, tmp_path / "four", ranks=4, **hybrid), 1e-5)

    def size(folder):
        files = (tmp_path / folder).glob("checkpoints/*/*.safetensors")
        return sum(path.stat().st_size for path in files)

    assert size("four") == pytest.approx(size("one"), rel=0.1), "replicas share what is written"
    resumed = run_training(
        world, initial, tmp_path / "four", "--resume", ranks=3, checkpoint_every=3
    )
    assert_same_run(one, resumed, 1e-5)


def test_a_run_resumed_on_as_many_ranks_is_the_same_bit_by_bit(finished, world, initial, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step_000003")
    (out / "checkpoints/.writing_000003").mkdir()  # a killed run was at that
    more = {"checkpoint_every": 1, "validate_every": 1}
    assert_same_run(finished[1], run_training(world, initial, out, "--resume", ranks=2, **more), 0)
    assert kills.results_of(out) == kills.results_of(finished[0])


def test_two_checkpoints_stay_of_nothing_but_safetensors_and_json(finished):
    folder = finished[0] / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step_000002", "step_000003"}
    assert {path.suffix for path in folder.glob("*/*")} == {".safetensors", ".json"}


def test_a_second_training_continues_with_the_trained_head(finished, world, tmp_path):
    more = {"steps": 1, "learning_rate": 0, "weight_decay": 0, "batch_size": 64}
    arguments = training_options(world, finished[0], tmp_path / "second", **more)
    done = torchrun("03_train.py", *arguments, ranks=1)
    assert "Next: torchrun --standalone --nproc_per_node=2 04_eval.py" in done.stdout
    assert "run with its head, trained on" in done.stdout
    assert "64/64 [" in done.stderr and "comparisons/s" in done.stderr
    second = load_file(tmp_path / "second/reward_head.safetensors")
    assert all(torch.equal(tensor, finished[1][0][name]) for name, tensor in second.items())


def test_a_frozen_vision_tower_does_not_move_and_the_rest_does(world, initial, tmp_path):
    weights, _ = run_training(world, initial, tmp_path, "--freeze_vision", ranks=2, steps=2)
    start = load_file(f"{initial}/model.safetensors")
    for name in start:
        moved = not torch.equal(weights[name], start[name])
        if "visual" in name:
            assert not moved, name
        elif "proj.weight" in name:
            assert moved, name


# ---- interruptions


def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened(world, initial):
    """SIGKILL to one rank or all, in a step or when a checkpoint is renamed: weights, optimizer
    state and log are those of an uninterrupted run, bit by bit. tests/kills.py does more."""
    kill = ["tests/kills.py", "--fork", "--kills", 2, "--seed", 5]
    kill += ["--moments", "a step", "its renaming"]
    kill += ["--data", world / "data", "--model", initial]
    counts = ast.literal_eval(torchrun(*kill, ranks=1).stdout.splitlines()[-1].split(" s: ")[1])
    assert counts["kills"] == 2 and counts["compared, identical"] >= 1


TERMINATED = """
import os, runpy, signal, sys, threading, time
sys.path.insert(0, "tests")
import kills

def terminate():
    while kills.lines_of(kills.Path(sys.argv[sys.argv.index("--out") + 1])) < 1:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)

if os.environ["RANK"] == "1":
    threading.Thread(target=terminate, daemon=True).start()
runpy.run_path("03_train.py", run_name="__main__")
"""


def test_sigterm_to_one_rank_ends_the_run_with_a_checkpoint_and_it_goes_on(
    finished, world, initial, tmp_path
):
    more = {"checkpoint_every": 1000, "validate_every": 0}
    out = tmp_path / "ended"
    (tmp_path / "03_train.py").write_text(TERMINATED)
    arguments = [*training_options(world, initial, out, **more), "--resume"]
    done = torchrun(tmp_path / "03_train.py", *arguments, check=False)
    message = r"03_train.py: stopped by SIGTERM after step (\d+); continue with --resume"
    (step,) = re.findall(message, done.stderr)  # once, not from each rank
    assert done.returncode and kills.checkpoints_of(out) == [int(step)]
    assert int(step) == kills.lines_of(out) < 4
    resumed = run_training(world, initial, out, "--resume", ranks=1, **more)
    assert [line["step"] for line in resumed[1]] == list(range(1, 5))
    assert_same_run(finished[1], resumed, 1e-5)


NORM = "model.backbone.language_model.norm.weight"


def last_file(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))[-1]


def overwrite(checkpoint):
    """Text of the same length."""
    size = last_file(checkpoint).stat().st_size
    last_file(checkpoint).write_bytes((b"text " * size)[:size])


def remove_tensor(checkpoint):
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        tensors.pop(NORM, None)
        save_file(tensors, path, metadata)


DAMAGES = {
    "a file is cut off": lambda checkpoint: os.truncate(last_file(checkpoint), 100_000),
    "a file of text": overwrite,
    "no run.json": lambda checkpoint: (checkpoint / "run.json").unlink(),
    "half a run.json": lambda checkpoint: os.truncate(checkpoint / "run.json", 40),
    "a tensor is missing": remove_tensor,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_line(name, finished, initial, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    checkpoint = out / "checkpoints/step_000003"
    DAMAGES[name](checkpoint)
    data.start_distributed()
    reward = model.RewardModel.from_pretrained(initial)
    state = train.training_state(reward, train.make_optimizer(reward, train.Settings()))
    settings = train.Settings(out=str(out), resume=True, resume_changed=True)
    with pytest.raises(data.UserError) as error:
        train.begin(settings, state, {})
    message = str(error.value)
    assert str(checkpoint) in message and "remove it" in message and "\n" not in message


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(
    finished, world, initial, tmp_path
):
    """Files of more than 2 MB cannot be written: neither the next checkpoint nor the export."""
    limit = "import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n"
    script = f"runpy.run_path({str(ROOT / '03_train.py')!r}, run_name='__main__')"
    (tmp_path / "03_train.py").write_text(limit + script)
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step_000003")

    def content():
        before = kills.results_of(out / "checkpoints/step_000002")
        return before | {"model": (out / "model.safetensors").read_bytes()}

    before = content()
    for every, place in ((1, "step_000003"), (0, str(out))):
        arguments = [*training_options(world, initial, out, checkpoint_every=every), "--resume"]
        done = torchrun(tmp_path / "03_train.py", *arguments, check=False)
        assert done.returncode and '03_train.py", line' not in done.stderr
        assert done.stderr.count(f"{place}: could not be written") == 1, done.stderr
        assert "File too large" in done.stderr
        assert before == content()
        assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_000002"]


def test_a_new_run_does_not_remove_the_checkpoints_of_one_that_has_not_ended(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "reward_head.safetensors").unlink()  # not exported
    with pytest.raises(data.UserError, match="step_000003: of a run that has not ended; --resume"):
        train.begin(train.Settings(out=str(out)), {}, {})
    data.start_distributed()
    (out / "reward_head.safetensors").touch()
    assert train.begin(train.Settings(out=str(out)), {}, {}) == 0
    assert not list((out / "checkpoints").iterdir()), "an exported one gives way to a new run"


def test_resuming_with_another_recipe_or_data_is_refused_by_name_unless_asked_for(
    finished, world, initial, tmp_path
):
    out = shutil.copytree(finished[0], tmp_path / "run")
    changed = {"learning_rate": 2e-3, "data": world / "data/train_text", "checkpoint_every": 1}
    arguments = [*training_options(world, initial, out, **changed), "--resume"]
    done = torchrun("03_train.py", *arguments, ranks=1, check=False)
    assert done.returncode and '03_train.py", line' not in done.stderr
    for change in ("learning_rate was 0.0003, is 0.002", "data was", "content of the data was"):
        assert change in done.stderr, change
    torchrun("03_train.py", *arguments, "--resume_changed", ranks=1)
    assert kills.lines_of(out) == 4


# ---- what is not finite


def test_a_gradient_that_is_not_finite_stops_all_ranks_and_names_the_steps_comparisons(
    initial, tmp_path
):
    """A character has an embedding so large that the gradient of its pair overflows."""
    pairs = [{"prompt": f"Is it {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    for i, pair in enumerate(pairs):
        pair["id"] = f"pair {i}"
    pairs[2]["prompt"] += "~"
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    prepare_here(source=[str(tmp_path / "pairs.jsonl")], out=str(tmp_path))
    reward = model.RewardModel.from_pretrained(initial)
    (token,) = reward.processors.tokenizer.encode("~", add_special_tokens=False)
    with torch.no_grad():
        reward.backbone.get_input_embeddings().weight[token] = 3e38
    reward.save_pretrained(str(tmp_path / "model"))
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "pairs", "--steps", 1]
    arguments += ["--out", tmp_path / "out", "--batch_size", 8, "--micro_tokens", 10]
    done = torchrun("03_train.py", *arguments, check=False)
    (line,) = re.findall(r"03_train.py: (step 1: loss .*)", done.stderr)  # once
    assert done.returncode and "from 8 comparison(s)" in line and "pairs[2] (id pair 2)" in line
    assert not (tmp_path / "out/reward_head.safetensors").exists()


# ---- losses, plan, schedule


def pairs_of(ranks: list[list[int]]):
    comparisons = []
    for places in ranks:
        responses = [np.zeros(3 + i, np.int32) for i in range(len(places))]
        comparisons.append(data.Comparison(np.zeros(1, np.int32), responses, places))
    return train.pairs_of(comparisons)


def logsigmoid(x: float) -> float:
    return math.log(1 / (1 + math.exp(-x)))


def test_the_losses_are_algorithm_1_of_the_paper():
    scores = torch.tensor([1.0, -0.5, 2.0, 3.0])
    pairs = pairs_of([[1, 2], [2, 1]])
    plain = -logsigmoid(1.5) - logsigmoid(1.0)
    assert train.ranking_loss(scores, pairs).item() == pytest.approx(plain)
    penalised = train.ranking_loss(scores, pairs, zero_coefficient=0.1).item()
    assert penalised == pytest.approx(plain + 0.1 * (0.5**2 + 5**2))
    a, b, c, d = scores.numpy() / np.log(np.array([3, 4, 3, 4]) + 1)
    normalised = train.ranking_loss(scores, pairs, length_normalisation=True).item()
    assert normalised == pytest.approx(-logsigmoid(a - b) - logsigmoid(d - c))


def test_a_ranking_counts_once_and_ties_make_no_pair():
    pairs = pairs_of([[1, 2, 2, 3]])
    expected = {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert set(zip(pairs.better.tolist(), pairs.worse.tolist())) == expected
    assert pairs.weight.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_the_plan_gives_every_comparison_to_one_rank_within_the_budget(world_size):
    rng = np.random.default_rng(0)
    tokens, patches = rng.integers(50, 900, 300), rng.integers(0, 2, 300) * 400
    steps = [list(range(s, s + 60)) for s in range(0, 300, 60)] + [[3, 4]]
    ranks = range(world_size)
    plans = [train.plan(steps, tokens, patches, 2000, rank, world_size) for rank in ranks]
    cost = tokens + patches // 4
    for s, step in enumerate(steps):
        batches = [batch for plan in plans for batch in plan if batch.step == s]
        assert sorted(i for batch in batches for i in batch.indices) == sorted(step)
        assert {batch.step_weight for batch in batches} == {len(step)}
    for together in zip(*plans, strict=True):
        has_image = [patches[batch.indices].any() for batch in together]
        dummies = [any(has_image) and not image for image in has_image]
        assert [batch.dummy_image for batch in together] == dummies
        assert len({(batch.step, batch.last) for batch in together}) == 1
        work = [cost[batch.indices].sum() for batch in together]
        assert max(work) <= 2000 and work[0] == max(work), "--plan looks at rank 0 only"
        assert all(batch.costs == work for batch in together)


def test_planning_20000_comparisons_deals_them_fewer_than_100_times(monkeypatch):
    """As 04 scores it. Two of these comparisons rarely fit one forward."""
    tokens = np.random.default_rng(0).integers(3000, 6000, 20_000)
    deal, calls = train.deal, []
    monkeypatch.setattr(train, "deal", lambda *arguments: calls.append(1) or deal(*arguments))
    plan = train.plan([list(range(len(tokens)))], tokens, 0 * tokens, 8192, rank=0, world=1)
    assert sorted(i for batch in plan for i in batch.indices) == list(range(len(tokens)))
    assert max(batch.costs[0] for batch in plan) <= 8192
    assert len(calls) < 100  # each goes through all comparisons


def test_ranks_get_equal_work_and_what_they_do_not_is_reported(world):
    tokens, patches = data.Comparisons(str(world / "data/train")).sizes()
    cost = tokens + patches // 4
    steps = [list(range(start, start + 64)) for start in range(0, 384, 64)]
    plans = [train.plan(steps, tokens, patches, 2048, rank, 2) for rank in range(2)]
    work = np.array([[cost[batch.indices].sum() for batch in each] for each in plans])
    assert train.imbalance(plans[0]) == train.imbalance(plans[1])
    assert train.imbalance(plans[0]) == pytest.approx(work.max(0).sum() / work.mean(0).sum() - 1)
    assert train.imbalance(plans[0]) < 0.03


def test_every_comparison_is_seen_once_an_epoch():
    settings = train.Settings(batch_size=16, epochs=2)
    order = np.concatenate(train.order_of_training(100, settings))
    assert sorted(order[:100]) == sorted(order[100:200]) == list(range(100))
    assert len(order) % 16 == 0
    other = train.order_of_training(100, train.Settings(batch_size=16, epochs=2, seed=1))
    assert order.tolist() != np.concatenate(other).tolist()


def test_the_learning_rate_warms_up_and_falls_to_zero_along_a_cosine():
    settings = train.Settings(learning_rate=2.0, warmup=0.1)
    rates = [train.learning_rate_at(step, 100, settings) for step in range(100)]
    assert [rates[0], rates[9], rates[55]] == pytest.approx([0.2, 2.0, 1.0])
    assert rates[-1] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ---- what a user can get wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/such/model"], "run 02_model.py"),
        (["--data", "no/such/data"], "03_train.py: no/such/data"),
        (["--data", "{world}/data/questions"], "prompts without responses"),
        (["--validation", "{world}/data/questions"], "prompts without responses"),
        (["--shard_size", "2"], "has to divide the number of ranks, 3"),
        (["--out", "{world}/data/train/dataset.json/out"], "could not be written: Not a directory"),
    ],
)
def test_a_mistake_ends_in_one_line_once(arguments, message, world, initial):
    arguments = [argument.format(world=world) for argument in arguments]
    defaults = training_options(world, initial, world / "out", steps=1)
    done = torchrun("03_train.py", *defaults, *arguments, ranks=3, check=False)
    assert done.returncode and '03_train.py", line' not in done.stderr, done.stderr
    assert done.stderr.count(message) == 1, done.stderr
