"""Pieces can be copied as the README says.

The names in its table, after the scripts' imports of libraries and without the prefixes `data.` and
`model_stage.`, are all that a piece needs; and a piece computes what plain code does.
"""

import ast
import builtins
import json
import re
import symtable
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, stages, torchrun
from safetensors.torch import load_file
from transformers import AutoModel, Qwen2Config
from transformers.modeling_utils import AttentionInterface

SCRIPTS = {path.name: ast.parse(path.read_text()).body for path in sorted(ROOT.glob("0*.py"))}
SECTION = (ROOT / "README.md").read_text().split("## Copy a piece")[1].split("\n## ")[0]


def defined(node: ast.stmt) -> set[str]:
    """The name that a statement defines, unless it stands for a name of another script."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if not isinstance(node, ast.Assign) or isinstance(node.value, ast.Attribute):
        return set()
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def pieces() -> dict[str, list[ast.stmt]]:
    """{piece: its statements}; a name is of the row's script, else of another."""
    table = {}
    row = re.compile(r"^\| (.*?) \| `(0\d_\w+\.py)` \| (.*?) \|$", re.M)
    for piece, script, take in row.findall(SECTION):
        table[piece] = []
        for name in re.findall(r"`(\w+)`", take):
            bodies = [SCRIPTS[script], *SCRIPTS.values()]
            found = (node for body in bodies for node in body if name in defined(node))
            table[piece].append(next(found))
    return table


PIECES = pieces()


def source_of(piece: str) -> str:
    """Return a copy: the scripts' imports of libraries, and the named statements."""
    imports = [node for body in SCRIPTS.values() for node in body]
    imports = [node for node in imports if isinstance(node, (ast.Import, ast.ImportFrom))]
    order = [node for body in SCRIPTS.values() for node in body]
    statements = sorted(PIECES[piece], key=order.index)
    lines = [ast.unparse(node) for node in imports if getattr(node, "module", "") != "__future__"]
    lines += [ast.unparse(node) for node in statements]
    source = re.sub(r"(?<![.\w])(data|model_stage|training)\.", "", "\n".join(lines))
    return "from __future__ import annotations\n" + source


def undefined(table: symtable.SymbolTable, known: set[str]) -> set[str]:
    """Names that are used somewhere in a module and defined nowhere."""
    symbols = table.get_symbols()
    names = {each.get_name() for each in symbols if each.is_referenced() and each.is_global()}
    return (names - known).union(*(undefined(child, known) for child in table.get_children()))


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_needs_nothing_else(piece):
    table = symtable.symtable(source_of(piece), piece, "exec")
    symbols = table.get_symbols()
    known = {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}
    assert undefined(table, known | {*dir(builtins), "__name__"}) == set()


@pytest.fixture
def lift(monkeypatch):
    """A piece as a module of its own."""

    def lift(piece: str) -> ModuleType:
        module = ModuleType("copied")
        monkeypatch.setitem(sys.modules, "copied", module)  # where dataclasses look
        exec(compile(source_of(piece), piece, "exec"), vars(module))
        return module

    return lift


# ---- 02


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def small_config() -> Qwen2Config:
    return Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)


def random_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 64, length)


def test_the_readmes_example_of_the_attention_runs_as_printed(lift):
    """It compares the second response with a plain forward itself, and goes on to the gradient."""
    torch.manual_seed(0)
    names = vars(lift("reward head")) | vars(lift("shared-prefix attention"))
    example = re.search(r"```python\n(.*?)```", SECTION, re.S)[1]
    exec(example, names)
    assert all(parameter.grad.any() for parameter in names["head"].parameters())


def test_copied_attention_gives_the_hidden_states_of_plain_forwards(lift):
    """Hidden states of prompts and responses; some prompts have one response or none."""
    copied = lift("shared-prefix attention")
    AttentionInterface.register("copied", copied.shared_prefix_attention)
    torch.manual_seed(0)
    plain = AutoModel.from_config(small_config(), attn_implementation="sdpa").eval()
    packed = AutoModel.from_config(small_config(), attn_implementation="copied").eval()
    packed.load_state_dict(plain.state_dict())
    prompts = [random_tokens(length) for length in (7, 4, 6)]
    responses = [[random_tokens(length) for length in lengths] for lengths in ([3, 1, 5], [2], [])]
    row = copied.pack_tokens(prompts, responses)
    assert row.last.tolist() == [9, 10, 15, 21]

    def plain_hidden(tokens: np.ndarray) -> torch.Tensor:
        return plain(torch.from_numpy(tokens)[None]).last_hidden_state[0]

    expected = []
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids[0]}
    with torch.no_grad():
        for prompt, answers in zip(prompts, responses):
            expected.append(plain_hidden(prompt))
            for answer in answers:
                expected.append(plain_hidden(np.concatenate([prompt, answer]))[len(prompt) :])
        hidden = packed(**inputs, row=row, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden, torch.cat(expected), atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="row"):
        packed(**inputs)
    packed.layers[0].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="no sliding window"):
        packed(**inputs, row=row, use_cache=False)


def test_copied_positions_are_transformers_own(lift):
    backbone = AutoModel.from_pretrained(TINY)
    token, grids = backbone.config.image_token_id, np.array([[1, 4, 6], [1, 8, 2]])
    pieces = [[5, 6], [token] * 6, [7], [token] * 4, [8, 9, 10]]  # 2 x 2 patches are one token
    ids = np.concatenate(pieces)
    copied = lift("packed position ids, M-RoPE")
    found = copied.prompt_positions(ids, grids // [1, 2, 2], token)  # [3, P]
    tensors = torch.from_numpy(ids)[None], (torch.from_numpy(ids) == token).int()[None]
    expected, _ = backbone.get_rope_index(*tensors, image_grid_thw=torch.from_numpy(grids))
    assert np.array_equal(found, expected[:, 0].numpy()) and found.max() < len(ids) - 1
    with pytest.raises(ValueError, match="in tokens, not in patches"):
        copied.prompt_positions(ids, grids, token)


def test_a_copied_head_is_linear_layers_with_silu_between_in_float32(lift):
    copied = lift("reward head")
    torch.manual_seed(0)
    head, hidden = copied.RewardHead(12, layers=3, activation="silu", width=20), torch.randn(5, 12)
    one, two, three = (module for module in head.mlp if isinstance(module, torch.nn.Linear))
    inner = F.silu(F.silu(hidden @ one.weight.T + one.bias) @ two.weight.T + two.bias)  # [5, 20]
    # It computes in float32, whatever it is given.
    torch.testing.assert_close(head(hidden.bfloat16().float()), head(hidden.bfloat16()))
    torch.testing.assert_close(head(hidden), inner @ three.weight[0])
    with pytest.raises(copied.UserError, match="must be 1 to 5"):
        copied.RewardHead(12, layers=6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(copied.UserError, match="autocast"):
        head(hidden)


# ---- 03


def test_a_copied_planner_deals_every_comparison_once_within_the_budget(lift):
    """All ranks' micro-batches together are the steps, keep the budget and weigh about the same."""
    copied, rng = lift("batch planner"), np.random.default_rng(0)
    tokens, patches = rng.integers(20, 200, 90), rng.integers(0, 2, 90) * 64
    steps = rng.permutation(90).reshape(3, 30).tolist()
    plans = [copied.plan(steps, tokens, patches, 1000, rank, 3) for rank in range(3)]
    assert len({len(plan) for plan in plans}) == 1
    dealt = {0: [], 1: [], 2: []}
    cost = np.zeros((3, len(plans[0])), int)
    for rank, plan in enumerate(plans):
        for k, batch in enumerate(plan):
            dealt[batch.step] += batch.indices
            cost[rank, k] = (tokens + patches // 4)[batch.indices].sum()
            assert batch.costs[rank] == cost[rank, k]
    assert [sorted(dealt[i]) for i in dealt] == [sorted(step) for step in steps]
    assert cost.max() <= 1000
    assert copied.imbalance(plans[0]) == pytest.approx(cost.max(0).sum() / cost.mean(0).sum() - 1)
    assert copied.imbalance(plans[0]) < 0.05


def test_a_copied_loss_is_bradley_terrys_likelihood(lift):
    """The negative log-likelihood of Bradley and Terry; a pair and a ranking each count once."""
    copied = lift("ranking loss")
    scores = torch.tensor([0.3, -1.0, 0.5, 2.0, -0.1, 1.0], requires_grad=True)
    comparisons = []
    for ranks in ([1, 2], [2, 1, 3, 2]):
        pairs = stages.data.ordered_pairs(ranks)
        comparisons.append(SimpleNamespace(responses=[[0]] * len(ranks), pairs=pairs, weight=1))
    loss = copied.ranking_loss(scores, copied.pairs_of(comparisons))

    def win(better: int, worse: int) -> torch.Tensor:
        return scores[better].exp() / (scores[better].exp() + scores[worse].exp())

    in_ranking = [win(3, 2), win(3, 4), win(3, 5), win(2, 4), win(5, 4)]
    expected = -win(0, 1).log() - sum(each.log() for each in in_ranking) / 5
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, scores))


def run_on_ranks(piece: str, code: str, folder: Path, *arguments, ranks: int) -> None:
    """Run `code` behind a copied piece."""
    (folder / "copied.py").write_text(f"{source_of(piece)}\n{code}")
    torchrun(folder / "copied.py", *arguments, ranks=ranks)


TRAIN = """
import sys
from safetensors.torch import save_file
out, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
for p in model.parameters():
    moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizer.state[p] = {"step": torch.zeros(()), **moments}
state, start, run = training_state(model, optimizer), 0, {"made by": "somebody's trainer"}
checkpoints = sorted(out.glob("step_*"))
if checkpoints:
    load_checkpoint(checkpoints[-1], state)
    start = int(checkpoints[-1].name.removeprefix("step_"))
for step in range(start, steps):
    torch.manual_seed(step)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2:
        save_checkpoint(out, step + 1, state, run)
weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
if dist.get_rank() == 0:
    save_file(weights, out / "weights.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_copied_checkpoint_continues_on_other_ranks_to_the_same_weights(tmp_path):
    """Five steps equal three, and from the checkpoint of the second three more on other ranks."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_on_ranks("resumable checkpoint", TRAIN, tmp_path, whole, 5, ranks=2)
    run_on_ranks("resumable checkpoint", TRAIN, tmp_path, parted, 3, ranks=2)
    expected = load_file(whole / "weights.safetensors")
    for ranks in (1, 2):
        assert json.loads((parted / "step_000002/run.json").read_text())["step"] == 2
        run_on_ranks("resumable checkpoint", TRAIN, tmp_path, parted, 5, ranks=ranks)
        found = load_file(parted / "weights.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


# ---- 04, 06


def test_copied_metrics_are_those_by_counting(lift):
    """Accuracy over pairs, its mean over categories, and Acc+, by counting."""
    copied, rng = lift("benchmark metrics"), np.random.default_rng(0)
    ranks = [rng.permutation(rng.integers(2, 5)).tolist() for _ in range(60)]
    scores = [rng.integers(0, 3, len(each)) - 1.5 * np.array(each) for each in ranks]  # some tie
    categories, groups = [f"c{i % 3}" for i in range(60)], [f"g{i // 3}" for i in range(60)]
    right = {"all": []}
    for i, (rank, score) in enumerate(zip(ranks, scores)):
        pairs = [(a, b) for a in range(len(rank)) for b in range(len(rank)) if rank[a] < rank[b]]
        for name in ("all", categories[i], groups[i]):
            right.setdefault(name, []).extend(score[a] > score[b] for a, b in pairs)
    lengths = [[1] * len(each) for each in ranks]
    found = copied.metrics(scores, copied.Items(ranks, categories, groups, lengths))
    share = {name: np.mean(outcomes) for name, outcomes in right.items()}
    expected = {"overall": share["all"]} | {name: share[name] for name in ("c0", "c1", "c2")}
    expected["macro"] = np.mean([share[name] for name in ("c0", "c1", "c2")])
    expected["Acc+"] = np.mean([all(right[f"g{i}"]) for i in range(20)])
    assert {name: row["accuracy"] for name, row in found.items()} == pytest.approx(expected)
    assert 0 < expected["Acc+"] < 1
    items = copied.Items(ranks, categories, groups)
    for row in copied.with_intervals(copied.metrics, scores, items).values():
        assert row["low"] <= row["accuracy"] <= row["high"]
    zeros_and_ones = copied.acc_plus(np.array([1, 0, 1]), np.array(["x", "x", "y"]))
    assert zeros_and_ones["accuracy"] == 0.5
    with pytest.raises(ValueError, match="item 0: 3 scores of 2"):
        copied.metrics([np.zeros(3)], copied.Items([[1, 2]], ["all"], ["one"]))


def test_copied_rewards_and_advantages_are_those_by_hand(lift):
    copied = lift("rewards, advantages, GRPO loss")
    match = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    closed = torch.tensor([[True], [True], [False]])
    score = torch.tensor([[3.0, 1, 0], [0, 1, 2], [-1, 0, 4]])
    reward = copied.reward_of("hybrid", match, closed, score, 0.5)
    expected = 1 / (1 + np.exp(-score.numpy().astype(float)))
    expected[:2] /= 2
    expected[0, 0] = 1
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    centred = expected - expected.mean(1, keepdims=True)
    deviations = {"centred": 1, "batch": centred.std(ddof=1)}
    deviations["group"] = expected.std(1, ddof=1, keepdims=True)
    for scale, deviation in deviations.items():
        advantage = copied.advantage_of(reward, scale)
        np.testing.assert_allclose(advantage, centred / deviation, rtol=3e-3)
    share = copied.phantom_share(copied.advantage_of(reward, "centred"), match, closed)
    assert share == pytest.approx(np.abs(centred[1]).sum() / np.abs(centred).sum(), abs=1e-5)


def test_the_gradient_of_a_copied_grpo_loss_is_reinforces_and_the_kls(lift):
    """Its gradient is that of REINFORCE with these advantages, and of the KL divergence."""
    loss_of = lift("rewards, advantages, GRPO loss").grpo_loss
    p, q = torch.tensor([0.2, 0.5, 0.9], requires_grad=True), torch.tensor([0.3, 0.5, 0.6])
    advantage = torch.tensor([1.0, -0.5, 0.25])
    loss, kl = loss_of(p.log(), q.log(), advantage, 0.1)
    expected = q / p - (q / p).log() - 1
    torch.testing.assert_close(kl, expected.sum().detach())
    torch.testing.assert_close(loss, 0.1 * expected.sum() - advantage.sum())
    reinforce = 0.1 * expected.sum() - (advantage * p.log()).sum()
    (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(reinforce, p))


def test_copied_rules_read_answers_as_policies_word_them(lift):
    """Answers as policies word them, under each rule that a closed question can carry."""
    is_match = lift("rules for closed questions").is_match
    letter = {"kind": "letter", "options": ["rubber", "cotton"]}
    area = {"kind": "number", "type": "float", "precision": 1, "unit": "cm^2"}
    for text, answer, rule in [
        ("A red circle.", "a red circle", "text"),
        ("(B) cotton", "B", letter),
        ("No.", "No", "yes_no"),
        ("1.16 cm^2", "1.2", area),
    ]:
        assert is_match(text, answer, rule)
        assert not is_match("It is not clear.", answer, rule)
