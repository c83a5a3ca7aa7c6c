"""Pieces can be copied as the README says: what its table names, after the imports of libraries that a script begins
with and without the prefixes `data.` and `model_stage.`, is all that a piece needs, and computes what plain code
does."""

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
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config
from transformers.modeling_utils import AttentionInterface

OPTIONAL: dict[str, set] = {}


def defined(node: ast.stmt) -> set[str]:
    """The name that a statement defines; several at once are names of another script's."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    return {target.id for target in targets if isinstance(target, ast.Name)}


SCRIPTS = {path.name: ast.parse(path.read_text()).body for path in sorted(ROOT.glob("0*.py"))}
SECTION = (ROOT / "README.md").read_text().split("## Copying a piece")[1]


def pieces() -> dict[str, dict[str, set[str]]]:
    """{piece: {script: names}} of the README's table. A name is of its row's script, or else of an earlier one."""
    found, above = {}, set()
    for piece, script, take, besides in re.findall(
        r"^\| (.*?) \| `(0\d_\w+\.py)` \| (.*?) \| (.*?) ?\|$", SECTION, re.M
    ):
        names = {*re.findall(r"`(\w+)`", take + besides), *(above if "those above" in take else ())}
        found[piece], above = {}, names
        for each in (script, *SCRIPTS):
            here = names & set().union(*map(defined, SCRIPTS[each]))
            found[piece][each] = here | found[piece].get(each, set())
            names = names - here
        assert not names, f"{piece}: {names} are nowhere"
    return found


PIECES = pieces()


def source_of(piece: str) -> str:
    """What one would copy: the scripts' imports of libraries, and what is named."""
    imports, copied = ["from __future__ import annotations"], []
    for script, names in sorted(PIECES[piece].items()):
        if names:
            body = SCRIPTS[script]
            imports += [
                ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))
            ]
            copied += [ast.unparse(node) for node in body if defined(node) & names]
    return "\n".join(imports) + re.sub(
        r"(?<![.\w])(data|model_stage|training)\.", "", "\n" + "\n".join(copied)
    )


def undefined(table: symtable.SymbolTable, known: set[str]) -> set[str]:
    """Names that are used somewhere in a module and defined nowhere."""
    names = {
        each.get_name() for each in table.get_symbols() if each.is_referenced() and each.is_global()
    }
    return (names - known).union(*(undefined(child, known) for child in table.get_children()))


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_needs_nothing_else(piece):
    table = symtable.symtable(source_of(piece), piece, "exec")
    known = {
        each.get_name() for each in table.get_symbols() if each.is_assigned() or each.is_imported()
    }
    assert undefined(table, known | {*dir(builtins), "__name__"}) == OPTIONAL.get(piece, set())


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


def test_shared_prefix_attention_in_a_model_of_transformers(lift, tmp_path):
    """The README's example, against one plain forward for each response."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    plain = AutoModel.from_config(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()
    plain.save_pretrained(tmp_path)
    prompt, first, second = (
        np.random.default_rng(length).integers(0, 64, length) for length in (7, 3, 5)
    )
    texts = [torch.from_numpy(np.concatenate([prompt, each]))[None] for each in (first, second)]
    expected = torch.stack([plain(text).last_hidden_state[0, -1].sum() for text in texts])
    given = {
        "path": tmp_path,
        "prompt": prompt,
        "first": first,
        "second": second,
        "head": lambda h: h.sum(-1),
    }
    exec(
        re.search(r"```python\n(.*?)```", SECTION, re.S)[1],
        done := given | vars(lift("shared-prefix attention")),
    )
    torch.testing.assert_close(done["scores"], expected, atol=1e-5, rtol=0)


def test_shared_prefix_attention_in_several_comparisons_of_a_row(lift):
    """Hidden states of prompts and responses; some have one response or none."""
    copied = lift("shared-prefix attention")
    AttentionInterface.register("copied", copied.shared_prefix_attention)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    configs = [Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2) for _ in range(2)]
    torch.manual_seed(0)
    plain = AutoModel.from_config(configs[0], attn_implementation="sdpa").eval()
    packed = AutoModel.from_config(configs[1], attn_implementation="copied").eval()
    packed.load_state_dict(plain.state_dict())
    draw = lambda length: np.random.default_rng(length).integers(0, 64, length)
    prompts, responses = (
        list(map(draw, (7, 4, 6))),
        [list(map(draw, Rs)) for Rs in ([3, 1, 5], [2], [])],
    )
    row, expected = copied.pack_tokens(prompts, responses), []
    with torch.no_grad():
        for prompt, those in zip(prompts, responses):
            texts = [np.concatenate([prompt, each]) for each in (prompt[:0], *those)]
            hidden = [plain(torch.from_numpy(text)[None]).last_hidden_state[0] for text in texts]
            expected += [hidden[0], *(each[len(prompt) :] for each in hidden[1:])]
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids[0]}
        hidden = packed(**inputs, row=row, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(hidden, torch.cat(expected), atol=1e-5, rtol=0)
        assert row.last.tolist() == [9, 10, 15, 21]
        with pytest.raises(TypeError, match="row"):
            packed(**inputs)
    packed.layers[0].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="no sliding window"):
        packed(**inputs, row=row, use_cache=False)


def test_packed_position_ids_of_a_prompt_with_two_images(lift):
    backbone = AutoModel.from_pretrained(TINY)
    token, grids = backbone.config.image_token_id, np.array([[1, 4, 6], [1, 8, 2]])
    pieces = [[5, 6], [token] * 6, [7], [token] * 4, [8, 9, 10]]  # 2 x 2 patches are one token
    ids = np.concatenate(pieces)
    found = lift("packed position ids, M-RoPE").prompt_positions(
        ids, grids // [1, 2, 2], token
    )  # [3, P]
    tensors = torch.from_numpy(ids)[None], (torch.from_numpy(ids) == token).int()[None]
    expected, _ = backbone.get_rope_index(*tensors, image_grid_thw=torch.from_numpy(grids))
    assert np.array_equal(found, expected[:, 0].numpy()) and found.max() < len(ids) - 1
    with pytest.raises(ValueError, match="in tokens, not in patches"):
        lift("packed position ids, M-RoPE").prompt_positions(ids, grids, token)


def test_reward_head(lift):
    copied = lift("reward head")
    torch.manual_seed(0)
    head, hidden = copied.RewardHead(12, layers=3, activation="silu", width=20), torch.randn(5, 12)
    one, two, three = (module for module in head.mlp if isinstance(module, torch.nn.Linear))
    inner = F.silu(F.silu(hidden @ one.weight.T + one.bias) @ two.weight.T + two.bias)  # [5, 20]
    torch.testing.assert_close(
        head(hidden.bfloat16().float()), head(hidden.bfloat16())
    )  # computes in float32
    torch.testing.assert_close(head(hidden), inner @ three.weight[0])
    with pytest.raises(copied.UserError, match="must be 1 to 5"):
        copied.RewardHead(12, layers=6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(copied.UserError, match="autocast"):
        head(hidden)


# ---- 03


def test_batch_planner(lift):
    """Every rank's micro-batches together are the steps, of at most the budget, and about equally dear."""
    copied, rng = lift("batch planner"), np.random.default_rng(0)
    tokens, patches = rng.integers(20, 200, 90), rng.integers(0, 2, 90) * 64
    steps = rng.permutation(90).reshape(3, 30).tolist()
    plans = [copied.plan(steps, tokens, patches, 1000, rank, 3) for rank in range(3)]
    assert len({len(plan) for plan in plans}) == 1
    for number, step in enumerate(steps):
        dealt = [
            i for plan in plans for batch in plan if batch.step == number for i in batch.indices
        ]
        assert sorted(dealt) == sorted(step)
    cost = np.array(
        [
            [sum(tokens[i] + patches[i] // 4 for i in batch.indices) for batch in plan]
            for plan in plans
        ]
    )
    assert cost.max() <= 1000 and cost.tolist() == [
        list(costs) for costs in zip(*(b.loads for b in plans[0]))
    ]
    assert copied.imbalance(plans[0]) == pytest.approx(cost.max(0).sum() / cost.mean(0).sum() - 1)
    assert copied.imbalance(plans[0]) < 0.05


def test_ranking_loss(lift):
    """The negative log-likelihood of Bradley and Terry, which a pair and a ranking each count once in."""
    copied = lift("ranking loss")
    ranks, scores = (
        [[1, 2], [2, 1, 3, 2]],
        torch.tensor([0.3, -1.0, 0.5, 2.0, -0.1, 1.0], requires_grad=True),
    )
    pairs = stages.data.ordered_pairs
    comparisons = [
        SimpleNamespace(ranks=r, responses=[[0]] * len(r), pairs=pairs(r)) for r in ranks
    ]
    loss = copied.ranking_loss(scores, copied.pairs_of(comparisons))
    won = lambda better, worse: scores[better].exp() / (scores[better].exp() + scores[worse].exp())
    in_ranking = [won(3, 2), won(3, 4), won(3, 5), won(2, 4), won(5, 4)]
    expected = -won(0, 1).log() - sum(each.log() for each in in_ranking) / 5
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(each, scores, retain_graph=True) for each in (loss, expected))
    )


def run_on_ranks(piece: str, code: str, folder: Path, *arguments, ranks: int) -> None:
    """Runs `code` behind a copied piece."""
    (folder / "copied.py").write_text(f"{source_of(piece)}\n{code}")
    torchrun(folder / "copied.py", *arguments, ranks=ranks)


LOAD = """
import sys
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
folder, out = sys.argv[1:]
dist.init_process_group("gloo")
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
load_weights(model, folder, torch.device("cpu"))
loaded = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
loaded["logits"] = model(torch.arange(20)[None]).logits.detach()
if dist.get_rank() == 0:
    save_file(loaded, out)
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_loading(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )
    plain.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    run_on_ranks(
        "sharded loading",
        LOAD,
        tmp_path,
        tmp_path / "model",
        tmp_path / "loaded.safetensors",
        ranks=2,
    )
    loaded = load_file(tmp_path / "loaded.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.pop("logits"), plain.eval()(torch.arange(20)[None]).logits
        )
    expected = dict(plain.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


TRAIN = """
import sys
from safetensors.torch import save_file
out, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
allocate_state(optimizer)
state, start = training_state(model, optimizer), 0
if found := newest_whole(out, state):
    load_checkpoint(found, state)
    start = step_of(found)
for step in range(start, steps):
    torch.manual_seed(step)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2:
        save_checkpoint(out, step + 1, state, {"made by": "somebody's trainer"})
weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
if dist.get_rank() == 0:
    save_file(weights, out / "weights.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_resumable_checkpoint(tmp_path):
    """Five steps on two ranks are three, and two more from a checkpoint of the second on one rank or on two."""
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


def test_benchmark_metrics(lift):
    """Accuracy over pairs, its mean over categories and the share of groups that are all right, by counting."""
    copied, rng = lift("benchmark metrics"), np.random.default_rng(0)
    ranks = [rng.permutation(rng.integers(2, 5)).tolist() for _ in range(60)]
    scores = [rng.integers(0, 3, len(each)) - 1.5 * np.array(each) for each in ranks]  # some tie
    categories, groups = [f"c{i % 3}" for i in range(60)], [f"g{i // 3}" for i in range(60)]
    right = {"all": []}
    for i, (rank, score) in enumerate(zip(ranks, scores)):
        pairs = [(a, b) for a in range(len(rank)) for b in range(len(rank)) if rank[a] < rank[b]]
        for name in ("all", categories[i], groups[i]):
            right.setdefault(name, []).extend(score[a] > score[b] for a, b in pairs)
    found = copied.metrics(
        scores, copied.Items(ranks, categories, groups, [[1] * len(each) for each in ranks])
    )
    share = {name: np.mean(outcomes) for name, outcomes in right.items()}
    expected = {"overall": share["all"]} | {name: share[name] for name in ("c0", "c1", "c2")}
    expected["macro"] = np.mean([share[name] for name in ("c0", "c1", "c2")])
    expected["Acc+"] = np.mean([all(right[f"g{i}"]) for i in range(20)])
    assert {name: row["accuracy"] for name, row in found.items()} == pytest.approx(expected)
    assert (
        all(row["low"] <= row["accuracy"] <= row["high"] for row in found.values())
        and 0 < expected["Acc+"] < 1
    )
    assert (
        copied.acc_plus(np.array([1, 0, 1]), np.array(["x", "x", "y"]))["accuracy"] == 0.5
    )  # right or not, as 1 or 0
    with pytest.raises(ValueError, match="item 0: 3 scores of 2"):
        copied.metrics([np.zeros(3)], copied.Items([[1, 2]], ["all"], ["one"]))


def test_official_metrics(lift):
    """To the digit those of the script; with items that each of them can count."""
    copied, rng, n = lift("official metrics"), np.random.default_rng(0), 40
    names = [["math-prm", "hep-cpp", "Ties", "chat"][i % 4] for i in range(n)]
    ids = [f"{'tied' if i // 4 % 2 else 'ref'}:{i // 8}" for i in range(n)]
    items = [[1, 1, 1, 2, 2, 2]] * n, names, ids, [[1] * 6] * n, ["a"] * n, ids
    scores = [rng.normal(size=6) for _ in range(n)]
    assert copied.METRICS.keys() == stages.eval.METRICS.keys()
    for name, measure in stages.eval.METRICS.items():
        assert copied.METRICS[name](scores, copied.Items(*items)) == measure(
            scores, stages.eval.Items(*items)
        )


def test_advantages_of_the_hybrid_reward(lift):
    copied = lift("rewards, advantages, GRPO loss")
    match, closed = (
        torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        torch.tensor([[True], [True], [False]]),
    )
    score = torch.tensor([[3.0, 1, 0], [0, 1, 2], [-1, 0, 4]])
    reward = copied.reward_of("hybrid", match, closed, score, 0.5)
    s = lambda x: 1 / (1 + np.exp(-x))
    expected = np.array(
        [[1, s(1) / 2, s(0) / 2], [s(0) / 2, s(1) / 2, s(2) / 2], [s(-1), s(0), s(4)]]
    )
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    centred = expected - expected.mean(1, keepdims=True)
    by_scale = {
        "centred": 1,
        "batch": centred.std(ddof=1),
        "group": expected.std(1, ddof=1, keepdims=True),
    }
    for scale, deviation in by_scale.items():
        np.testing.assert_allclose(
            copied.advantage_of(reward, scale), centred / deviation, rtol=3e-3
        )
    share = copied.phantom_share(copied.advantage_of(reward, "centred"), match, closed)
    assert share == pytest.approx(np.abs(centred[1]).sum() / np.abs(centred).sum(), abs=1e-5)


def test_grpo_loss(lift):
    """Its gradient is that of REINFORCE with these advantages, and of the KL divergence to the start."""
    loss_of = lift("rewards, advantages, GRPO loss").grpo_loss
    p, q = torch.tensor([0.2, 0.5, 0.9], requires_grad=True), torch.tensor([0.3, 0.5, 0.6])
    advantage = torch.tensor([1.0, -0.5, 0.25])
    loss, kl = loss_of(p.log(), q.log(), advantage, 0.1)
    expected = q / p - (q / p).log() - 1
    torch.testing.assert_close(kl, expected.sum().detach())
    torch.testing.assert_close(loss, 0.1 * expected.sum() - advantage.sum())
    reinforce = 0.1 * expected.sum() - (advantage * p.log()).sum()
    torch.testing.assert_close(
        *(torch.autograd.grad(each, p, retain_graph=True) for each in (loss, reinforce))
    )


def test_rules(lift):
    """Answers as policies word them, under each rule that a closed question can carry."""
    is_match = lift("rules for closed questions").is_match
    choice, area = (
        {"kind": "letter", "options": ["rubber", "cotton"]},
        {"kind": "number", "precision": 1},
    )
    worded = [
        ("A red circle.", "a red circle", "text"),
        ("(B) cotton", "B", choice),
        ("No.", "No", "yes_no"),
    ]
    for text, answer, rule in [
        *worded,
        ("1.16 cm^2", "1.2", {**area, "type": "float", "unit": "cm^2"}),
    ]:
        assert is_match(text, answer, rule) and not is_match("It is not clear.", answer, rule)
