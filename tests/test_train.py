"""Stage 3: the same gradient on any number of ranks, the same run after an interruption, the losses of the paper."""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import kills
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, prepare_here, stages, torchrun, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file

data, model, train = stages.data, stages.model, stages.train


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("initial"))
    torch.manual_seed(0)
    model.RewardModel.from_backbone(TINY, model.HeadSettings()).save_pretrained(folder)
    return folder


def run(world, initial, out, *more, ranks: int, **settings):
    arguments = {
        "model": initial,
        "data": world / "data/train",
        "out": out,
        "steps": 3,
        "batch_size": 12,
        "learning_rate": 1e-3,
        "checkpoint_every": 0,
        "warmup": 0.5,
    } | settings
    torchrun(
        "03_train.py",
        *(x for key, value in arguments.items() for x in (f"--{key}", value)),
        *more,
        ranks=ranks,
    )
    weights = load_file(out / "model.safetensors") | load_file(out / "reward_head.safetensors")
    return weights, [json.loads(line) for line in open(out / "metrics.jsonl")]


def assert_same_run(one, two, tolerance: float):
    for name in one[0]:
        torch.testing.assert_close(
            one[0][name], two[0][name], atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}"
        )
    for a, b in zip(one[1], two[1], strict=True):
        for key in ("loss", "margin", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=tolerance), (a["step"], key)


# ---- gradients

GRADIENT = """
import gc, importlib, json, sys, torch, torch.distributed as dist
from safetensors.torch import save_file
data, model_stage, train = (importlib.import_module(name) for name in ("01_data", "02_model", "03_train"))
folder, initial, out, micro_tokens, checkpointing = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5] == "yes"
rank, world, device = data.start_distributed()
model = model_stage.RewardModel.from_pretrained(initial)
comparisons = data.Comparisons(folder)
tokens, patches = comparisons.sizes()
batch = list(range(0, len(comparisons), len(comparisons) // 13))[:13]
assert 0 < (patches[batch] > 0).sum() < 13, "text and images have to be mixed"
train.shard(model, model.backbone, device, checkpointing, in_float32=(model.head,))
model.train()
for micro, row, pairs in train.load(comparisons, train.plan([batch], tokens, patches, micro_tokens, rank, world),
model, device, 0):
    (train.ranking_loss(model(row), pairs) * world / micro.step_size).backward()
gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    save_file(gradients, out)
dist.barrier()
del model
gc.collect()
dist.destroy_process_group()
"""


def test_the_gradient_of_a_step_is_the_same_on_1_2_and_3_ranks_with_text_and_images_mixed(
    world, initial, tmp_path
):
    (tmp_path / "gradient.py").write_text(GRADIENT)
    cases = {
        "1 rank": (1, 100000, "no"),
        "1 rank, small micro-batches": (1, 150, "no"),
        "2 ranks": (2, 100000, "no"),
        "2 ranks, small micro-batches": (2, 150, "no"),
        "3 ranks": (3, 300, "no"),
        "2 ranks, activation checkpointing": (2, 100000, "yes"),
    }
    gradients = {}
    for i, (name, (ranks, micro_tokens, checkpointing)) in enumerate(cases.items()):
        done = torchrun(
            tmp_path / "gradient.py",
            world / "data/train",
            initial,
            tmp_path / f"{i}.safetensors",
            micro_tokens,
            checkpointing,
            ranks=ranks,
        )
        assert "Warning" not in done.stderr, (
            done.stderr
        )  # of a library's, about which a user could do nothing
        gradients[name] = load_file(tmp_path / f"{i}.safetensors")
    for name, other in gradients.items():
        for parameter, expected in gradients["1 rank"].items():
            torch.testing.assert_close(
                other[parameter],
                expected,
                atol=1e-5,
                rtol=0,
                msg=lambda text: f"{name}, {parameter}: {text}",
            )
    assert max(g.abs().max() for g in gradients["1 rank"].values()) > 1e-2


def test_the_sharded_gradient_equals_plain_autograd_on_the_papers_loss(world, initial, tmp_path):
    """One padded-free forward for each response, -log sigmoid of the difference, mean over the batch; no code of stage
    3."""
    (tmp_path / "gradient.py").write_text(GRADIENT)
    torchrun(
        tmp_path / "gradient.py",
        world / "data/train",
        initial,
        tmp_path / "gradient.safetensors",
        400,
        "no",
        ranks=2,
    )
    sharded = load_file(tmp_path / "gradient.safetensors")
    reward, comparisons, losses = (
        model.RewardModel.from_pretrained(initial),
        data.Comparisons(str(world / "data/train")),
        [],
    )
    for i in list(range(0, len(comparisons), len(comparisons) // 13))[:13]:
        c = comparisons[i]
        scores = [
            reward(
                model.pack(
                    [data.Comparison(c.prompt, [response], [1], c.images, c.grids)],
                    reward.processors,
                )
            )[0]
            for response in c.responses
        ]
        pairs = [
            (a, b)
            for a in range(len(scores))
            for b in range(len(scores))
            if c.ranks[a] < c.ranks[b]
        ]
        losses.append(sum(-F.logsigmoid(scores[a] - scores[b]) for a, b in pairs) / len(pairs))
    (sum(losses) / len(losses)).backward()
    for name, parameter in reward.named_parameters():
        torch.testing.assert_close(
            sharded[name], parameter.grad, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}"
        )


def test_three_steps_on_two_ranks_equal_three_on_one(world, initial, tmp_path):
    one, two = (run(world, initial, tmp_path / str(ranks), ranks=ranks) for ranks in (1, 2))
    assert_same_run(
        one, two, 1e-4
    )  # AdamW turns a gradient near zero into a whole step, so weights differ more than gradients do
    assert [line["tokens"] for line in one[1]] and one[1][-1][
        "validation_accuracy"
    ] == pytest.approx(two[1][-1]["validation_accuracy"], abs=1e-6)


def test_two_replicas_of_two_shards_equal_one_rank_and_resume_on_another_number_of_ranks(
    world, initial, tmp_path
):
    settings = {"learning_rate": 3e-4, "checkpoint_every": 2}
    one = run(world, initial, tmp_path / "one", ranks=1, **settings)
    four = run(world, initial, tmp_path / "four", ranks=4, shard_size=2, **settings)
    assert_same_run(one, four, 1e-5)
    size = lambda folder: sum(
        path.stat().st_size for path in (tmp_path / folder).glob("checkpoints/*/*.safetensors")
    )
    assert size("four") == pytest.approx(size("one"), rel=0.1), (
        "what replicas share is to be written once"
    )
    assert_same_run(
        one, run(world, initial, tmp_path / "four", "--resume", ranks=2, **settings), 1e-5
    )


# ---- interruptions


def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened():
    """SIGKILL to one rank or all, in a step or when a checkpoint is renamed: weights, optimizer state and log are those
    of an uninterrupted run, bit by bit. `python tests/kills.py` does this many times more, at other moments too."""
    kill = [
        "tests/kills.py",
        "--fork",
        "--kills",
        2,
        "--seed",
        5,
        "--moments",
        "a step",
        "its renaming",
    ]
    counts = ast.literal_eval(torchrun(*kill, ranks=1).stdout.splitlines()[-1].split(" s: ")[1])
    assert counts["kills"] == 2 and counts["compared, identical"] >= 1


def start(world, initial, out, *more, ranks: int, **settings) -> subprocess.Popen:
    """A run in the background."""
    arguments = {"model": initial, "data": world / "data/train", "out": out} | settings
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "03_train.py",
    ]
    command += [str(x) for key, value in arguments.items() for x in (f"--{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], cwd=ROOT, stdout=-1, stderr=-1, text=True, env=environment
    )


def test_sigterm_ends_a_run_with_a_checkpoint_and_it_goes_on_on_2_then_1_then_3_ranks(
    world, initial, tmp_path
):
    settings = {
        "steps": 30,
        "batch_size": 12,
        "learning_rate": 1e-4,
        "checkpoint_every": 1000,
        "validate_every": 0,
    }
    whole = run(world, initial, tmp_path / "whole", ranks=2, **settings)
    out = tmp_path / "ended"
    for ranks, steps in ((2, 4), (1, 12)):
        process = start(world, initial, out, "--resume", "--warmup", "0.5", ranks=ranks, **settings)
        while kills.lines_of(out) < steps and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asked = time.time()
        said = process.communicate(timeout=60)[1]
        assert process.returncode and time.time() - asked < 25, said
        (line,) = re.findall(
            r"03_train.py: stopped by SIGTERM after step (\d+), .* continue with --resume", said
        )
        assert kills.checkpoints_of(out, None)[-1] == int(line) == kills.lines_of(out)
    resumed = run(world, initial, out, "--resume", ranks=3, **settings)
    assert [line["step"] for line in resumed[1]] == list(range(1, 31))
    assert_same_run(whole, resumed, 1e-5)


@pytest.fixture(scope="module")
def finished(world, initial, tmp_path_factory):
    """A run of 3 steps on 2 ranks, with the checkpoints of its first and second, each right after a validation."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(world, initial, out, ranks=2, checkpoint_every=1, validate_every=1)


def shard_of(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))[-1]


def rewrite(change, consistent: bool = True):
    """Changes (tensors, offsets) of a checkpoint's last file; with run.json as a forger would adapt it."""

    def damage(checkpoint):
        path = shard_of(checkpoint)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        offsets, tensors = json.loads(metadata["DCP_SHARDING_INFO"]), load_file(path)
        change(tensors, offsets)
        save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(offsets)})
        told = json.loads((checkpoint / "run.json").read_text())
        told["files"][path.name] = path.stat().st_size
        (checkpoint / "run.json").write_text(json.dumps(told))

    return damage


NORM = "model.backbone.language_model.norm.weight"


def tell(**changes):
    def damage(checkpoint):
        told = json.loads((checkpoint / "run.json").read_text())
        (checkpoint / "run.json").write_text(json.dumps(told | changes))

    return damage


def overwrite(checkpoint):
    """Its last file becomes text of the same length."""
    size = shard_of(checkpoint).stat().st_size
    shard_of(checkpoint).write_bytes((b"text " * size)[:size])


DAMAGES = {
    "a file is missing": (
        lambda checkpoint: shard_of(checkpoint).unlink(),
        "not those that run.json lists",
    ),
    "a file is cut off": (
        lambda checkpoint: os.truncate(shard_of(checkpoint), 1000),
        "not those that run.json lists",
    ),
    "a file too many": (
        lambda c: (c / "x.safetensors").write_bytes(b"x"),
        "not those that run.json lists",
    ),
    "a file of text": (overwrite, "header"),
    "no run.json": (lambda checkpoint: (checkpoint / "run.json").unlink(), "run.json"),
    "half a run.json": (lambda checkpoint: os.truncate(checkpoint / "run.json", 40), "damaged"),
    "another step": (tell(step=7), "not those that run.json lists"),
    "a tensor is missing": (
        rewrite(lambda tensors, offsets: tensors.pop(NORM)),
        f"{NORM} is not all there",
    ),
    "rows are missing": (
        rewrite(lambda t, o: t.__setitem__(NORM, t[NORM][:-1])),
        f"{NORM} is not all there",
    ),
    "rows twice": (
        rewrite(lambda t, o: o[NORM].__setitem__("saved_offsets", [0])),
        "row .* is missing",
    ),
    "rows far away": (
        rewrite(lambda t, o: o[NORM].__setitem__("saved_offsets", [2**60])),
        "row .* is missing",
    ),
    "offsets are missing": (
        rewrite(lambda tensors, offsets: offsets.pop(NORM.replace("model.", "step.", 1))),
        "missing: 'step.backbone.language_model.norm.weight'",
    ),
    "half precision": (
        rewrite(lambda t, o: t.__setitem__(NORM, t[NORM].half())),
        "none of this run's tensors",
    ),
    "a tensor of another model": (
        rewrite(lambda t, o: (t.__setitem__("x", t[NORM].clone()), o.__setitem__("x", o[NORM]))),
        "none of this run's tensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_none(name, finished, initial, tmp_path):
    damage, reason = DAMAGES[name]
    checkpoint = shutil.copytree(finished[0] / "checkpoints/step_000002", tmp_path / "step_000002")
    reward = model.RewardModel.from_pretrained(initial)
    state = train.training_state(reward, train.make_optimizer(reward, train.Settings()))
    assert train.check_checkpoint(checkpoint, state)["step"] == 2
    damage(checkpoint)
    with pytest.raises(data.UserError, match=reason) as error:
        train.check_checkpoint(checkpoint, state)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


def test_the_newest_whole_checkpoint_is_found_past_a_damaged_one(
    finished, world, initial, tmp_path
):
    out, whole = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    os.truncate(shard_of(out / "checkpoints/step_000002"), 5000)
    assert_same_run(whole, run(world, initial, out, "--resume", ranks=2, validate_every=1), 0)


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(
    finished, world, initial, tmp_path
):
    """Files of more than 2 MB cannot be written: neither the next checkpoint nor, later, the export."""
    limit = "import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n"
    (tmp_path / "03_train.py").write_text(
        f"{limit}runpy.run_path({str(ROOT / '03_train.py')!r}, run_name='__main__')"
    )
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step_000002")
    before = kills.results_of(out / "checkpoints/step_000001") | {
        "model": (out / "model.safetensors").read_bytes()
    }
    for every, what in ((1, "step_000002: could not be written"), (0, "run: could not be written")):
        arguments = [
            "--model",
            initial,
            "--data",
            world / "data/train",
            "--out",
            out,
            "--steps",
            3,
            "--batch_size",
            12,
        ]
        arguments += [
            "--learning_rate",
            1e-3,
            "--warmup",
            0.5,
            "--resume",
            "--checkpoint_every",
            every,
        ]
        done = torchrun(tmp_path / "03_train.py", *arguments, check=False)
        assert (
            done.returncode and done.stderr.count(what) == 1 and "File too large" in done.stderr
        ), done.stderr
        assert '03_train.py", line' not in done.stderr
        after = kills.results_of(out / "checkpoints/step_000001") | {
            "model": (out / "model.safetensors").read_bytes()
        }
        assert before == after
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000001"]


def test_a_new_run_does_not_remove_the_checkpoints_of_one_that_has_not_ended(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    train.refuse_unfinished(train.Settings(out=str(out)), out / "checkpoints")  # it was exported
    (out / "reward_head.safetensors").unlink()
    train.refuse_unfinished(train.Settings(out=str(out), resume=True), out / "checkpoints")
    with pytest.raises(
        data.UserError, match="step_000002 is of a run that has not ended; --resume"
    ):
        train.refuse_unfinished(train.Settings(out=str(out)), out / "checkpoints")


# ---- what is not finite


@pytest.fixture(scope="module")
def explosive(world, initial, tmp_path_factory):
    """Eight pairs, the third of which has a character whose embedding is so large that its gradient overflows; the
    initial model, and the data."""
    root = tmp_path_factory.mktemp("explosive")
    pairs = [
        {"prompt": f"Is it {i}?", "chosen": "yes", "rejected": "no", "id": f"pair {i}"}
        for i in range(8)
    ]
    pairs[2]["prompt"] += "~"
    write_jsonl(root / "pairs.jsonl", pairs)
    prepare_here(source=[str(root / "pairs.jsonl")], out=str(root))
    reward = model.RewardModel.from_pretrained(initial)
    (token,) = reward.processors.tokenizer.encode("~", add_special_tokens=False)
    with torch.no_grad():
        reward.backbone.get_input_embeddings().weight[token] = 3e38
    reward.save_pretrained(str(root / "model"))
    return root


def train_explosive(root, out, *more, ranks: int, steps: int = 1):
    arguments = [
        "--model",
        root / "model",
        "--data",
        root / "pairs",
        "--out",
        out,
        "--steps",
        steps,
        "--batch_size",
        8,
    ]
    arguments += ["--micro_tokens", 10, "--checkpoint_every", 0, "--learning_rate", 1e-5]
    return torchrun("03_train.py", *arguments, *more, ranks=ranks, check=False)


def test_a_gradient_that_is_not_finite_stops_all_ranks_and_names_its_comparisons(
    explosive, tmp_path
):
    done = train_explosive(explosive, tmp_path / "out", ranks=2)
    (line,) = re.findall(r"03_train.py: (step 1: loss .*)", done.stderr)  # once, not from each rank
    assert (
        done.returncode and "pairs[2] (id pair 2)" in line and "from 2 comparison(s)" in line
    )  # that of each rank
    assert "--non_finite skip" in line and not (tmp_path / "out/reward_head.safetensors").exists()


def test_a_step_that_is_not_finite_is_skipped_when_told_and_never_silently(explosive, tmp_path):
    done = train_explosive(explosive, tmp_path / "out", "--non_finite", "skip", ranks=1)
    assert not done.returncode, done.stderr[-2000:]
    (line,) = [json.loads(line) for line in open(tmp_path / "out/metrics.jsonl")]
    (named,) = line["skipped"]
    assert (
        named.endswith("pairs[2] (id pair 2)")
        and line["loss"] is None
        and f"{named}; its update is skipped" in done.stdout
    )
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (explosive / "model", tmp_path / "out")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_with_other_settings_or_data_is_refused_by_name_unless_asked_for(
    finished, world, initial, tmp_path
):
    out, changed = (
        shutil.copytree(finished[0], tmp_path / "run"),
        shutil.copytree(world / "data/train", tmp_path / "data"),
    )
    info = json.loads((changed / "dataset.json").read_text())
    (changed / "dataset.json").write_text(json.dumps(info | {"max_length": 4095}))
    arguments = [
        "--model",
        initial,
        "--data",
        changed,
        "--out",
        out,
        "--steps",
        3,
        "--batch_size",
        12,
        "--resume",
    ]
    arguments += ["--learning_rate", 2e-3, "--checkpoint_every", 1, "--warmup", 0.5]
    done = torchrun("03_train.py", *arguments, ranks=1, check=False)
    assert done.returncode and '03_train.py", line' not in done.stderr
    assert (
        "--learning_rate 0.001 (now 0.002)" in done.stderr and "other data in --data" in done.stderr
    )
    torchrun("03_train.py", *arguments, "--resume_changed", ranks=1)
    assert kills.lines_of(out) == 3


def test_old_checkpoints_go_only_when_there_are_newer_ones(world, initial, tmp_path):
    run(world, initial, tmp_path, ranks=1, steps=5, checkpoint_every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
    ]
    assert all(
        path.suffix in (".safetensors", ".json") for path in (tmp_path / "checkpoints").glob("*/*")
    )


def test_a_second_training_continues_with_the_trained_head(world, initial, tmp_path):
    first, _ = run(world, initial, tmp_path / "first", ranks=1)
    again = torchrun(
        "03_train.py",
        "--model",
        tmp_path / "first",
        "--data",
        world / "data/train",
        "--out",
        tmp_path / "second",
        "--steps",
        1,
        "--learning_rate",
        0,
        "--weight_decay",
        0,
        ranks=1,
    )
    assert (
        f"Next: torchrun --standalone --nproc_per_node=1 04_eval.py --model {tmp_path}/second\n"
        in again.stdout
    )
    refused = torchrun("02_model.py", "--out", tmp_path / "second", ranks=1, check=False)
    assert (
        refused.returncode
        and "second: has a trained reward model; give another --out" in refused.stderr
    )
    assert "64/64 [" in again.stderr and "comparisons/s, loss=" in again.stderr
    second = load_file(tmp_path / "second/reward_head.safetensors")
    assert (
        all(torch.equal(tensor, first[name]) for name, tensor in second.items())
        and "first with its head, trained on" in again.stdout
    )


def test_a_frozen_vision_tower_does_not_move_and_the_rest_does(world, initial, tmp_path):
    weights, _ = run(world, initial, tmp_path, "--freeze_vision", ranks=2)
    start = load_file(f"{initial}/model.safetensors")
    moved = {name: not torch.equal(weights[name], start[name]) for name in start}
    assert not any(moved[name] for name in moved if "visual" in name) and all(
        moved[name] for name in moved if "proj.weight" in name and "visual" not in name
    )


# ---- losses, plan, schedule


def pairs_of(ranks: list[list[int]]):
    return train.pairs_of(
        [
            data.Comparison(
                np.zeros(1, np.int32), [np.zeros(3 + i, np.int32) for i in range(len(r))], r
            )
            for r in ranks
        ]
    )


def test_the_losses_are_algorithm_1_of_the_paper():
    scores = torch.tensor([1.0, -0.5, 2.0, 3.0])
    pairs = pairs_of([[1, 2], [2, 1]])
    logsigmoid = lambda x: math.log(1 / (1 + math.exp(-x)))
    plain = -logsigmoid(1.5) - logsigmoid(1.0)
    assert train.ranking_loss(scores, pairs).item() == pytest.approx(plain)
    assert train.ranking_loss(scores, pairs, zero_coefficient=0.1).item() == pytest.approx(
        plain + 0.1 * (0.5**2 + 5**2)
    )
    a, b, c, d = (s / math.log(n + 1) for s, n in zip(scores.tolist(), (3, 4, 3, 4)))
    assert train.ranking_loss(scores, pairs, length_normalisation=True).item() == pytest.approx(
        -logsigmoid(a - b) - logsigmoid(d - c)
    )


def test_a_ranking_counts_once_and_ties_make_no_pair():
    pairs = pairs_of([[1, 2, 2, 3]])
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist())) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 3),
    ]
    assert pairs.weight.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_the_plan_gives_every_comparison_to_one_rank_within_the_budget(world_size):
    rng = np.random.default_rng(0)
    tokens, patches = rng.integers(50, 900, 300), rng.integers(0, 2, 300) * 400
    steps = [list(range(s, s + 60)) for s in range(0, 300, 60)] + [[3, 4]]
    plans = [
        train.plan(steps, tokens, patches, 2000, rank, world_size) for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    cost = tokens + patches // 4
    for s, step in enumerate(steps):
        assert sorted(
            i for plan in plans for batch in plan if batch.step == s for i in batch.indices
        ) == sorted(step)
    for together in zip(*plans):
        has_image = [patches[batch.indices].any() if batch.indices else False for batch in together]
        assert [batch.dummy_image for batch in together] == [
            any(has_image) and not image for image in has_image
        ]
        assert len({(batch.step, batch.last) for batch in together}) == 1
        assert all(cost[batch.indices].sum() <= 2000 for batch in together if batch.indices)


def test_ranks_get_equal_work_and_what_they_do_not_is_reported(world):
    tokens, patches = data.Comparisons(str(world / "data/train")).sizes()
    steps = [list(range(start, start + 64)) for start in range(0, 448, 64)]
    plans = [train.plan(steps, tokens, patches, 2048, rank, 2) for rank in range(2)]
    work = np.array(
        [[(tokens + patches // 4)[batch.indices].sum() for batch in each] for each in plans]
    )
    assert train.imbalance(plans[0]) == train.imbalance(plans[1])
    assert train.imbalance(plans[0]) == pytest.approx(work.max(0).sum() / work.mean(0).sum() - 1)
    assert train.imbalance(plans[0]) < 0.03


def test_every_comparison_is_seen_once_an_epoch():
    settings = train.Settings(batch_size=16, epochs=2)
    order = np.concatenate(train.order_of_training(100, settings))
    assert (
        sorted(order[:100]) == sorted(order[100:200]) == list(range(100)) and len(order) % 16 == 0
    )
    assert train.order_of_training(100, settings) != train.order_of_training(
        100, train.Settings(batch_size=16, epochs=2, seed=1)
    )


def test_the_learning_rate_warms_up_and_falls_to_zero_along_a_cosine():
    rates = [
        train.learning_rate_at(step, 100, train.Settings(learning_rate=2.0, warmup=0.1))
        for step in range(100)
    ]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == pytest.approx(2.0)
        and rates[55] == pytest.approx(1.0)
        and rates[-1] < 0.001
    )
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ---- what a user can get wrong


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "no/such/model"], "run 02_model.py"),
        (["--data", "no/such/data"], "run 01_data.py"),
        (["--data", "{world}/data/questions"], "prompts without responses"),
        (["--shard_size", "2"], "has to divide the number of ranks, 1"),
        (["--out", "{world}/data/train/dataset.json/out"], "could not be written: Not a directory"),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_what_to_do(arguments, says, world, initial):
    defaults = [
        "--model",
        initial,
        "--data",
        world / "data/train",
        "--steps",
        1,
        "--out",
        world / "out",
    ]
    done = torchrun(
        "03_train.py", *defaults, *(a.format(world=world) for a in arguments), ranks=1, check=False
    )
    assert (
        done.returncode and done.stderr.count(says) == 1 and '03_train.py", line' not in done.stderr
    )


def test_a_mistake_that_all_ranks_see_is_said_once(initial):
    done = torchrun(
        "03_train.py", "--model", initial, "--data", "no/such/data", ranks=3, check=False
    )
    assert done.returncode and done.stderr.count("03_train.py: no/such/data") == 1
    assert '03_train.py", line' not in done.stderr
