"""Stage 4 · scoring a reward model on benchmarks

    torchrun --standalone --nproc_per_node=2 04_eval.py                          # artifacts/reward on the held-out sets
    torchrun --standalone --nproc_per_node=2 04_eval.py --model A --model B --benchmark artifacts/data/mine
    torchrun --standalone --nproc_per_node=2 04_eval.py --benchmark artifacts/data/mine --scores_from theirs.jsonl
    torchrun --standalone --nproc_per_node=2 04_eval.py --score mine.jsonl      # the same lines with scores, no tables

In    Reward models (03) and prepared benchmarks (01), or another system's scores instead of a model.
Out   artifacts/scores/<model>/: <benchmark>.safetensors, the raw float32 scores (rounded ones make false ties),
      summary.json, cost.json, and report.html to look at: learning curves, bars, margins, what is most confidently
      wrong. Printed: a table for each benchmark, and how much of it the training data holds. Of several models also one
      table of all: so one sees what each source of training data is worth, by training a model on each and scoring all
      on everything (the paper's Table 4).
      With --score, artifacts/scores/<model>/<FILE> and nothing else.

What is counted. A pair is two responses to one prompt of which one is ranked better; it is right if the better one
scores strictly higher, so a tie is wrong. `overall` is right pairs / pairs; `macro` the plain mean over categories;
`Acc+` the share of groups with every pair right, a group being what shares the field "group" (one picture of the
embedded world, one id of MM-RLHF-RewardBench), otherwise one comparison. Beside the model stand `longer wins`, which a
benchmark should not reward, and `random`, the mean of 200 draws.

A published benchmark (a source of 01 that has a metric) is scored by its own metric instead: METRICS, below. A table's
title says where the benchmark was prepared without images or with lines rejected, so that its numbers are others.

Printed and in cost.json is also what a comparison costs the model, so that the kinds of reward model (02, --kind) can
be compared: tokens that it reads and writes, floating-point operations, seconds. That is why the paper chooses naive.

The 95% intervals are Wilson's, with as many independent items as the pairs are worth given that those of one group go
right and wrong together; the macro's are put together from the categories' (Zou & Donner, Statistics in Medicine 2008).
The paper gives no intervals.
"""

import base64
import importlib
import io
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from html import escape
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
training = importlib.import_module("03_train")
option, Comparison, Comparisons, UserError = (
    data.option,
    data.Comparison,
    data.Comparisons,
    data.UserError,
)
Reward = model_stage.Reward

DEFAULT_BENCHMARKS = [
    "artifacts/data/new_scenes",
    "artifacts/data/unseen_combinations",
    "artifacts/data/new_text",
]


@dataclass
class Settings:
    model: list[str] = option(
        [], "reward model to score with, repeatable, then side by side; none: artifacts/reward"
    )
    benchmark: list[str] = option(
        [], "prepared comparisons to score, repeatable; none: the embedded held-out sets"
    )
    scores_from: str = option(
        "",
        "another system's scores instead of a model: one JSON list of N numbers a line, in the benchmark's order",
    )
    text_model: str = option(
        "", "text-only reward model for what has no image (the paper's advice); '' for none"
    )
    score: str = option(
        "",
        "instead of benchmarks a JSONL file, lines with prompt, images if any, and responses or chosen and rejected; "
        "out come the same lines with their scores, or the error that kept one from being scored",
    )
    out: str = option(
        "artifacts/scores", "folder that receives one folder for each model, or system"
    )
    micro_tokens: int = option(
        8192, "budget of one forward on one rank, in tokens of the packed row"
    )
    max_length: int = option(
        4096, "--score: longest prompt + response, in tokens; longer ones get an error"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scores: a list of one float array [N] for each comparison, in the benchmark's order.


def short_names(models: list[str]) -> list[str]:
    """What models are called in tables and files: by their folder, or by their whole path where two have the same."""
    names = [Path(model).name for model in models]
    if len(set(models)) < len(models):
        raise UserError(f"the same model is given twice: {', '.join(models)}")
    return [
        model.strip("/").replace("/", "-") if names.count(name) > 1 else name
        for name, model in zip(names, models)
    ]


def models_of(settings: Settings) -> dict[str, str]:
    """{name in tables and files: folder} of every --model."""
    models, text = settings.model or ["artifacts/reward"], settings.text_model
    return {
        f"{name}+{Path(text).name}" if text else name: model
        for name, model in zip(short_names(models), models)
    }


@torch.inference_mode()
def score_comparisons(
    model: Reward, comparisons: Comparisons, device: torch.device, micro_tokens: int = 8192
) -> list[np.ndarray]:
    """Scores every comparison; all ranks share the work, every rank returns all scores."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model_stage.place(model, device)
    data.use_pixel_limits(model.processors, [comparisons])
    tokens, patches = comparisons.sizes()
    if model.processors.image is None and patches.any():
        raise UserError(
            f"{comparisons.folder}: {(patches > 0).sum()} comparisons have images, the model is text-only"
        )
    batches = training.plan(
        [list(range(len(comparisons)))], tokens, patches, micro_tokens, rank, world
    )
    starts = np.cumsum([0, *comparisons.response_counts()])
    flat = torch.zeros(int(starts[-1]), dtype=torch.float64, device=device)
    work, name = (
        sum(sum(batch.loads) for batch in batches),
        comparisons.info["name"],
    )  # work of all ranks
    progress = tqdm(
        total=work, desc=name, unit=" tokens", unit_scale=True, disable=rank > 0, mininterval=1
    )
    for batch in batches:
        if batch.indices:
            where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch.indices])
            scores = model.score_encoded([comparisons[i] for i in batch.indices], micro_tokens)
            flat[torch.from_numpy(where).to(device)] = scores.double()
        progress.update(sum(batch.loads))
    progress.close()
    dist.all_reduce(flat)  # every score was written by one rank and is zero on the others
    return np.split(flat.cpu().numpy(), starts[1:-1])


def cost_of(
    model: Reward, comparisons: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """What so many comparisons have cost the model on all ranks, divided by their number; the next call counts anew.

    Tokens read (a critic's twice, to write a critique and to score it) and written, image patches, operations and
    seconds of one rank. A token or patch is 2 FLOP for each weight of the matrices that it goes through in decoder or
    vision tower; attention's own operations are not counted, nor are heads.
    """
    size = lambda module: (
        sum(p.numel() for p in module.parameters() if p.ndim > 1) if module is not None else 0
    )
    spent = torch.tensor([0, 0, 0, 0, seconds], dtype=torch.float64)
    for part in model.modules():
        if isinstance(part, model_stage.RewardModel):  # a router has two
            read, written, patches = (
                part.cost.pop(what, 0) for what in ("read", "written", "patches")
            )
            parts = model_stage.parts_of(part.backbone)
            decoder = size(parts.language) - size(parts.language.get_input_embeddings())
            flop = 2 * (decoder * (read + written) + size(parts.vision) * patches)
            spent += torch.tensor([read, written, patches, flop / 1e9, 0])
    spent = spent.to(device)
    dist.all_reduce(spent)
    return dict(
        zip(("read", "written", "patches", "GFLOP", "seconds"), (spent / comparisons).tolist())
    )


def read_scores(path: str, comparisons: Comparisons) -> list[np.ndarray]:
    """Another system's scores: one JSON list of N numbers a line. Raises UserError with the line that does not fit."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--scores_from {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    counts, scores = comparisons.response_counts(), []
    if len(lines) != len(counts):
        raise UserError(
            f"--scores_from {path}: {len(lines)} lines, but {comparisons.folder} has {len(counts)} comparisons "
            f"(and {comparisons.info['rejected']} rejected lines, which need none)"
        )
    largest = np.finfo(np.float32).max  # they are saved as float32
    for number, (line, count) in enumerate(zip(lines, counts), 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        are_numbers = isinstance(values, list) and all(
            type(v) in (int, float) and abs(v) <= largest for v in values
        )
        if not are_numbers or len(values) != count:
            what = f"not a JSON list of {count} finite numbers: {line[:60]!r}"
            raise UserError(f"--scores_from {path}, line {number}: {what}")
        scores.append(np.array(values, float))
    return scores


def save_scores(path: Path, scores: list[np.ndarray], comparisons: Comparisons, model: str) -> None:
    flat, offsets = data.flatten(scores, np.float32)
    made_of = {
        "model": model,
        "benchmark": str(comparisons.folder),
        "made": comparisons.info["tokenizer"],
    }
    # One key of metadata: the order of several is not fixed.
    data.write_tensors(path, {"scores": flat, "offsets": offsets}, {"made_of": json.dumps(made_of)})


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: numpy in, numbers out, and nothing needed but what stands from here to METRICS. A metric is a function of
# scores, one array [N] for each comparison, and Items; it returns {row of the table: {"accuracy", "items", and where it
# has an interval "low", "high"}}. The first row, "overall", is the number that is quoted.


@dataclass
class Items:
    """What the metrics need to know of a benchmark: one entry a comparison."""

    ranks: list[list[int]]  # of its responses; 1 is best, equal ranks tie
    categories: list[str]
    groups: list[str]  # what goes right and wrong together, like questions about one picture
    characters: list[list[int]] = field(
        default_factory=list
    )  # length of each response; only `baselines` asks
    subsets: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # they need not be unique

    @classmethod
    def of(cls, comparisons: Iterable) -> "Items":
        read = [
            (comparison.ranks, comparison.record) for comparison in comparisons
        ]  # not the images
        records = [record for _, record in read]
        return cls(
            ranks=[ranks for ranks, _ in read],
            categories=[record.get("category", "all") for record in records],
            groups=[
                f"group {r['group']}" if "group" in r else f"comparison {i}"
                for i, r in enumerate(records)
            ],
            characters=[record["characters"] for record in records],
            subsets=[record.get("subset", "") for record in records],
            ids=[str(record.get("id", "")) for record in records],
        )


def right_pairs(
    scores: list[np.ndarray], items: Items
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of responses of which one is ranked better, [pairs] each: whether that one scores higher, the pair's
    category, and a number for its group. A tie is wrong, and so is a score of nan."""
    right, of = [], []
    for i, (score, ranks) in enumerate(zip(scores, items.ranks, strict=True)):
        if len(score) != len(ranks):
            raise ValueError(f"item {i}: {len(score)} scores of {len(ranks)} responses")
        better, worse = np.nonzero(np.less.outer(ranks, ranks))
        right += (score[better] > score[worse]).tolist()
        of += [i] * len(better)
    _, groups = np.unique(items.groups, return_inverse=True)
    return np.array(right, bool), np.array(items.categories)[of], groups[of]


def wilson(share: float, n: float) -> tuple[float, float]:
    """95% interval of a share p of n independent items (Wilson 1927), z = 1.96:

    (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    if n == 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    centre, half = share + z2 / (2 * n), np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return float(max(0, (centre - half) / (1 + z2 / n))), float(
        min(1, (centre + half) / (1 + z2 / n))
    )


def with_interval(share: float, items: int, independent: float) -> dict:
    """A share of so many items, with the interval of so many independent ones."""
    low, high = wilson(share, independent)
    return {"accuracy": share, "low": low, "high": high, "items": items}


def accuracy(right: np.ndarray, groups: np.ndarray) -> dict:
    """The share of right pairs, both [pairs], and its interval.

    The pairs of a group are not independent. Wilson's n is their number divided by the design effect (Kish, Survey
    Sampling, 1965), how much more the share p varies over the G groups than over as many independent pairs:

    n = p (1 - p) / v, within [G, pairs];  v = G / (G - 1) sum over groups (right in it - p pairs in it)^2 / pairs^2
    """
    if not len(right):
        return with_interval(float("nan"), 0, 0)
    _, group = np.unique(groups, return_inverse=True)
    right_in, pairs_in = np.bincount(group, right), np.bincount(group)  # [groups]
    pairs, G, share = len(right), len(pairs_in), float(right.mean())
    v = ((right_in - share * pairs_in) ** 2).sum() / pairs**2 * G / max(1, G - 1)
    return with_interval(share, pairs, np.clip(share * (1 - share) / v, G, pairs) if v > 0 else G)


def acc_plus(right: np.ndarray, groups: np.ndarray) -> dict:
    """The share of groups with every pair right, and its interval; both [pairs]."""
    _, group = np.unique(groups, return_inverse=True)
    all_right = np.bincount(group, np.logical_not(right)) == 0  # [groups]
    return with_interval(
        float(all_right.mean()) if len(all_right) else float("nan"), len(all_right), len(all_right)
    )


def mean_of(rows: list[dict], weights: list[float] | None = None) -> dict:
    """The weighted mean m of accuracies a of different items; `items` is how many.

    Its interval, if all have one, is put together from theirs (Zou & Donner, Statistics in Medicine 2008), with weights
    w that sum to 1: low = m - sqrt(sum of (w (a - low of a))^2), and high likewise.
    """
    accuracies = np.array([row["accuracy"] for row in rows])
    weights = np.ones(len(rows)) if weights is None else np.array(weights, float)
    mean = {"accuracy": float((weights * accuracies).sum() / weights.sum()), "items": len(rows)}
    if all("low" in row for row in rows):
        for end, sign in (("low", -1), ("high", 1)):
            away = weights * (np.array([row[end] for row in rows]) - accuracies)
            mean[end] = mean["accuracy"] + sign * float(np.sqrt((away**2).sum()) / weights.sum())
    return mean


def by_category(
    right: np.ndarray, categories: np.ndarray, groups: np.ndarray, measure: Callable = accuracy
) -> dict:
    """{category: accuracy (or acc_plus) of its pairs}, in the order of the names; all [pairs]."""
    parts = {name: categories == name for name in np.unique(categories).tolist()}
    return {name: measure(right[part], groups[part]) for name, part in parts.items()}


def metrics(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """What has no official metric: accuracy over all pairs, its mean over the categories, Acc+, and each category."""
    right, categories, groups = right_pairs(scores, items)
    each = by_category(right, categories, groups)
    return {
        "overall": accuracy(right, groups),
        "macro": mean_of([*each.values()]),
        "Acc+": acc_plus(right, groups),
        **each,
    }


# The official metrics of published benchmarks. A section or domain without items is left out of the means.


def overall_and_categories(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """Multimodal RewardBench (github.com/facebookresearch/multimodal_rewardbench, 2_get_accuracy.py) and LLMBar
    (arXiv 2310.07641): accuracy over all pairs and of each category."""
    right, categories, groups = right_pairs(scores, items)
    return {"overall": accuracy(right, groups), **by_category(right, categories, groups)}


def vl_rewardbench(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """VL-RewardBench (github.com/vl-rewardbench/VL_RewardBench, cal.py): right pairs / pairs, and the plain mean of the
    three groups.

    BaseReward's tables, like R1-Reward's, group otherwise: the authors' script (github.com/yfzhang114/r1_reward,
    VL-Reward-Bench/get_acc.py) looks for "rlhf" and "rlaif", but the ids are written RLHF and RLAIF, so 301 items on
    hallucination count as general. Overall is the same, the mean is not; compare with those papers by these rows.
    """

    def group_in_the_paper(id: str) -> str:
        if "mmmu" in id or "mathverse" in id:
            return "reasoning"
        return (
            "hallucination" if "hallucination" in id or "rlhf" in id or "rlaif" in id else "general"
        )

    official = metrics(scores, items)
    paper = metrics(scores, replace(items, categories=[group_in_the_paper(id) for id in items.ids]))
    del official["Acc+"], paper["Acc+"], paper["overall"]
    return official | {f"{name}, as BaseReward groups": row for name, row in paper.items()}


def mm_rlhf_rewardbench(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """MM-RLHF-RewardBench (github.com/yfzhang114/r1_reward, MM-RLHF-Reward/get_acc.py): Acc, the share of right pairs,
    and Acc+, the share of ids with every pair right, of all and of each category."""
    right, categories, groups = right_pairs(scores, items)
    rows, plus = {}, by_category(right, categories, groups, acc_plus)
    for name, of_category in by_category(right, categories, groups).items():
        rows |= {name: of_category, f"{name}, Acc+": plus[name]}
    return {"overall": accuracy(right, groups), "Acc+": acc_plus(right, groups), **rows}


# fmt: off
REWARDBENCH = {  # sections, their subsets and what those weigh: their pairs, but for math-prm, which has 447
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100,
               "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984,  # as much as the code subsets together
                  "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164},
    "Prior Sets": {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},  # alike, and all of it half
}
# fmt: on
SAFETY_IN_THE_CODE = REWARDBENCH["Safety"] | {
    "xstest-should-refuse": 250,
    "xstest-should-respond": 154,
}


def rewardbench(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """RewardBench (arXiv 2403.13787; github.com/allenai/reward-bench, analysis/get_benchmark_results.py): the mean of
    four sections and, at half their weight, the plain mean of the prior sets, where those are there.

    The paper weighs a section's subsets by their pairs. The code (rewardbench/constants.py) has the numbers of two
    subsets of Safety interchanged; what comes of that has its own rows, for comparing with numbers made by the code.
    """
    subsets = by_category(*right_pairs(scores, items))

    def sections(weights: dict[str, dict[str, int]]) -> dict[str, dict]:
        rows = {}
        for section, parts in weights.items():
            if there := [name for name in parts if name in subsets]:
                rows[section] = mean_of(
                    [subsets[name] for name in there], [parts[name] for name in there]
                )
        overall = mean_of([*rows.values()], [0.5 if name == "Prior Sets" else 1.0 for name in rows])
        return {"overall": overall, **rows}

    code = sections(REWARDBENCH | {"Safety": SAFETY_IN_THE_CODE})
    as_code = {
        f"{name}, as the code weighs": code[name] for name in ("overall", "Safety") if name in code
    }
    return sections(REWARDBENCH) | as_code | subsets


def best_of(score: np.ndarray, ranks: list[int]) -> float:
    """1 if a right response scores highest, shared with as many as score the same; else 0. Both [responses]."""
    highest = score == score.max()
    return float(
        highest[np.array(ranks) == 1].any() / max(1, highest.sum())
    )  # none is highest where one is nan


def ties_score(scores: list[np.ndarray], ranks: list[list[int]], ids: list[str]) -> float:
    """The subset Ties of RewardBench 2: the right responses should lie above the wrong ones, and close together.

    Each question is there twice, as "tied:7", where many responses are right, and as "ref:7", where one is. Of the
    former, the gap from the worst right to the best wrong one is to be wider than the right ones' spread.
    """
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    found = defaultdict(
        dict
    )  # {"tied" or "ref": {number: (worst right - best wrong, best right - worst right)}}
    for score, rank, id in zip(scores, ranks, ids):
        kind, _, number = id.partition(":")
        right, wrong = score[np.array(rank) == 1], score[np.array(rank) != 1]
        found[kind][number] = right.min() - wrong.max(), right.max() - right.min()
    tied, ref = found["tied"], found["ref"]
    both = [number for number in tied if number in ref]
    gap, width = (np.array([tied[number][i] for number in both]) for i in (0, 1))
    smaller = np.minimum(gap, [ref[number][0] for number in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(smaller / width - 1), nan=0.0)
    above = [mean([gap > 0 for gap, _ in questions.values()]) for questions in (tied, ref)]
    close = [mean(gap > width), mean(smaller > width)]
    return (
        0.30 * above[0] + 0.30 * above[1] + 0.20 * close[0] + 0.20 * close[1] + 0.01 * mean(margin)
    )


def rewardbench_2(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """RewardBench 2 (arXiv 2506.01937; github.com/allenai/reward-bench, rewardbench/utils.py): the plain mean of six
    subsets, best of four in five of them, and a formula of its own, which has no interval here, in Ties."""
    rows = {}
    for name in sorted(set(items.categories)):
        places = [i for i, category in enumerate(items.categories) if category == name]
        chosen, ranks = [scores[i] for i in places], [items.ranks[i] for i in places]
        if name == "Ties":
            rows[name] = {
                "accuracy": ties_score(chosen, ranks, [items.ids[i] for i in places]),
                "items": len(places),
            }
        else:
            share = float(np.mean([best_of(*each) for each in zip(chosen, ranks)]))
            rows[name] = with_interval(share, len(places), len(places))
    return {"overall": mean_of([*rows.values()]), **rows}


def rm_bench(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """RM-Bench (arXiv 2410.16184; github.com/THU-KEG/RM-Bench, its README): chosen i against rejected j, both concise,
    detailed plain, detailed markdown. Easy is where the chosen one is the fancier (i > j), normal where both are
    alike, hard where the rejected one is the fancier. A domain's accuracy is the mean of the three, and all others are
    means over the domains.
    """
    right = np.array(
        [s[np.array(r) == 1][:, None] > s[np.array(r) == 2] for s, r in zip(scores, items.ranks)]
    )
    all_cells, domains = (
        np.ones((3, 3), bool),
        np.array(items.categories),
    )  # right: [prompts, chosen, rejected]
    levels = {
        "easy": np.tril(all_cells, -1),
        "normal": np.eye(3, dtype=bool),
        "hard": np.triu(all_cells, 1),
    }

    def of_domain(name: str, cells: np.ndarray) -> dict:
        pairs = right[domains == name][:, cells]  # [prompts, cells]
        return accuracy(pairs.flatten(), np.arange(len(pairs)).repeat(cells.sum()))

    rows = {name: of_domain(name, all_cells) for name in sorted(set(items.categories))}
    over_domains = {
        level: mean_of([of_domain(name, cells) for name in rows]) for level, cells in levels.items()
    }
    return {"overall": mean_of([*rows.values()]), **over_domains, **rows}


def judgebench(scores: list[np.ndarray], items: Items) -> dict[str, dict]:
    """JudgeBench (github.com/ScalerLab/JudgeBench, run_judge.py): accuracy over all pairs and of each kind of source.

    The paper's tables are of GPT-4o's 350 pairs; where the others are there too, each model's have a row. Two equal
    scores, which that code counts as "B>A", are wrong here, so that no position decides.
    """
    models = by_category(*right_pairs(scores, replace(items, categories=items.subsets)))
    return overall_and_categories(scores, items) | (models if len(models) > 1 else {})


METRICS: dict[str, Callable[[list[np.ndarray], Items], dict[str, dict]]] = {
    "": metrics,  # of whatever has no official one
    "vl-rewardbench": vl_rewardbench,
    "mm-rlhf-rewardbench": mm_rlhf_rewardbench,
    "multimodal-rewardbench": overall_and_categories,
    "rewardbench": rewardbench,
    "rewardbench-2": rewardbench_2,
    "rm-bench": rm_bench,
    "judgebench": judgebench,
    "llmbar": overall_and_categories,
}


def baselines(items: Items, measure: Callable = metrics, draws: int = 200) -> dict[str, dict]:
    """What stands beside every model: 'longer wins' and 'random'."""
    rng, longer = (
        np.random.default_rng(0),
        [np.array(lengths, float) for lengths in items.characters],
    )
    drawn = [
        measure([rng.random(len(ranks)) for ranks in items.ranks], items) for _ in range(draws)
    ]
    mean = {name: float(np.mean([each[name]["accuracy"] for each in drawn])) for name in drawn[0]}
    random = {
        name: {"accuracy": mean[name], "items": row["items"]} for name, row in drawn[0].items()
    }
    return {"longer wins": measure(longer, items), "random": random}


def benchmark_title(comparisons: Comparisons) -> str:
    """A benchmark's name in tables and summaries, with what makes its numbers other than the published benchmark's."""
    info, but = comparisons.info, []
    if info["without_images"]:
        but.append("without images")
    if info["metric"] and info["rejected"]:
        but.append(f"without {info['rejected']} of {info['read']} lines")
    return ", ".join([info["name"], *but])


def table(title: str, systems: dict[str, dict[str, dict]], counts: bool = True) -> str:
    """Metrics down, systems across, as Markdown; the interval where there is one, a dash where there is nothing. With
    `counts`, a column n has the number of items of each metric."""

    def cell(value: dict | None) -> str:
        if value is None:
            return "-"
        interval = (
            f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]" if "low" in value else ""
        )
        return f"{100 * value['accuracy']:.1f}{interval}"

    first = next(iter(systems.values()))
    rows = [[title, *(["n"] if counts else []), *systems]]
    for name in dict.fromkeys(name for system in systems.values() for name in system):
        count = [str(first[name]["items"])] if counts else []
        rows.append([name, *count, *(cell(system.get(name)) for system in systems.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def overall_table(benchmarks: dict[str, dict[str, dict]]) -> str:
    """The overall accuracy of every system on every benchmark, and its mean where a system was on all of them."""
    overall = {
        title: {name: each["overall"] for name, each in found.items()}
        for title, found in benchmarks.items()
    }
    names = [
        name
        for name in next(iter(overall.values()))
        if all(name in each for each in overall.values())
    ]
    mean = {
        name: float(np.mean([each[name]["accuracy"] for each in overall.values()]))
        for name in names
    }
    overall["mean"] = {name: {"accuracy": value} for name, value in mean.items()}
    return table("overall accuracy", overall, counts=False)


# ---------------------------------------------------------------------------------------------------------------------
# What training data and a benchmark share.


def overlap(comparisons: Comparisons, training: list[str], distance: int = 2) -> dict[str, int]:
    """How many of a benchmark's comparisons share with prepared training sets: the exact text of a prompt without
    pictures, the exact bytes of a picture, the look of a picture (a perceptual hash that differs in at most `distance`
    of 64 bits: scaled or recompressed copies, and drawings that are alike)."""
    seen = [data.Comparisons(folder) for folder in training]
    prompts, images, looks = (
        np.unique(np.concatenate([each.hashes(name) for each in seen])) for name in data.HASHES
    )
    found = {"prompt": 0, "picture": 0, "picture that looks alike": 0}
    for comparison in comparisons:
        found["prompt"] += (
            not comparison.images and data.prompt_hash(comparison.prompt, None) in prompts
        )
        found["picture"] += any(data.hash_of(image) in images for image in comparison.images)
        alike = (
            np.bitwise_count(looks ^ np.uint64(data.look_of(image))) <= distance
            for image in comparison.images
        )
        found["picture that looks alike"] += any(near.any() for near in alike)
    return {what: int(count) for what, count in found.items()}


def warn_of_overlap(name: str, model: Reward, comparisons: Comparisons) -> None:
    """Prints what a benchmark shares with the data its model was trained on, where that is still there."""
    there = [
        folder
        for folder in model.trained_with.get("data", [])
        if Path(folder, "dataset.json").is_file()
    ]
    try:
        shared = overlap(comparisons, there) if there else {}
    except UserError as error:  # scores are not lost over this
        print(
            f"{name}: whether {comparisons.folder} and the training data overlap is not known: {error}"
        )
        return
    for what, count in shared.items():
        if count:
            of = f"{count} of {len(comparisons)} in {comparisons.folder}"
            print(f"{name}: {of} share a {what} with {', '.join(there)}")


# ---------------------------------------------------------------------------------------------------------------------
# The report: one page to look at, without scripts, fonts or pictures from elsewhere. What came from data is escaped.

STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #47a; --other: #bbbb; --up: 46, 139, 87; --down: 205, 60, 60 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
.bar { display: grid; grid-template-columns: 11rem 1fr 4rem; gap: .5rem; align-items: center }
.bar > div { position: relative; height: .8rem; background: #8882 }
.bar i { position: absolute; height: 100%; left: 0 }
.bar b { position: absolute; top: 35%; height: 30%; border: solid currentColor; border-width: 0 1px; opacity: .7;
         background: linear-gradient(currentColor, currentColor) center / 100% 1px no-repeat }
.bar span { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
h3 { margin: 1rem 0 .2rem } svg { width: 100%; max-width: 40rem; font-size: 15px } svg text { fill: currentColor }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 1rem 0 }
article img { max-width: min(100%, 16rem); max-height: 16rem; margin: 0 .5rem .5rem 0 }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem }
.text { white-space: pre-wrap; max-height: 24rem; overflow: auto } small { opacity: .75 }
"""


def bars(systems: dict[str, dict[str, dict]]) -> str:
    """A bar for each metric and system, with its interval where it has one."""
    made = []
    for name in next(iter(systems.values())):
        made.append(f"<h3>{escape(name)}</h3>")
        for i, (system, values) in enumerate(systems.items()):
            if name not in values:
                continue
            value, colour = values[name], "var(--other)" if i else "var(--bar)"
            bar = f'<i style="width:{100 * value["accuracy"]:.2f}%;background:{colour}"></i>'
            if "low" in value:
                low, high = (100 * value[end] for end in ("low", "high"))
                bar += f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b>'
            label = f"<span>{escape(system)}</span>"
            made.append(
                f"<div class=bar>{label}<div>{bar}</div><span>{100 * value['accuracy']:.1f}</span></div>"
            )
    return "\n".join(made)


def round_numbers(low: float, high: float) -> np.ndarray:
    """About five of them from low to high, to stand at an axis."""
    if low == high:
        return np.array([low])
    power = 10 ** np.floor(np.log10((high - low) / 5))
    step = power * min((1, 2, 5, 10), key=lambda size: abs(size * power - (high - low) / 5))
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0  # no -0


def plot(marks: list[tuple[list[tuple], str, str]], x_label: str, y_label: str) -> str:
    """An SVG with axes. A mark is a line through points (x, y), how it looks, and what it says to who points at it."""
    xs, ys = zip(*chain.from_iterable(points for points, _, _ in marks))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across = lambda x: 60 + 530 * (x - left) / (right - left or 1)
    up = lambda y: 175 - 150 * (y - low) / (high - low or 1)
    made = [
        f'<text x="60" y="14">{y_label}</text><text x="590" y="214" text-anchor="end">{x_label}</text>'
    ]
    for x in round_numbers(left, right):
        made.append(
            f'<text class=x x="{across(x):.2f}" y="194" text-anchor="middle">{x:,.10g}</text>'
        )
    for y in round_numbers(low, high):
        made.append(f'<path d="M60 {up(y):.2f}H590" stroke="var(--line)"/>')
        made.append(
            f'<text class=y x="54" y="{up(y):.2f}" dy=".35em" text-anchor="end">{y:,.10g}</text>'
        )
    for points, look, title in marks:
        places = " ".join(f"{across(x):.2f},{up(y):.2f}" for x, y in points)
        made.append(f'<polyline points="{places}" {look}><title>{escape(title)}</title></polyline>')
    return f'<svg viewBox="0 0 600 220" role="img">{"".join(made)}</svg>'


def histogram(margins: np.ndarray, bins: int = 40) -> str:
    """How far apart the scores of pairs are: better minus worse, so what is left of zero is wrong."""
    reach = float(np.abs(margins).max(initial=0)) or 1.0
    counts, edges = np.histogram(margins, bins, (-reach, reach))
    marks = []
    for count, left, right in zip(counts, edges, edges[1:]):
        look = f'fill="rgb(var(--{"up" if left + right > 0 else "down"}))"'
        bar = [(left, 0), (left, count), (right, count), (right, 0)]
        marks.append((bar, look, f"{count} pairs from {left:.2f} to {right:.2f}"))
    return plot(marks, "score of the better response - that of the worse", "pairs")


def learning_curves(model: str) -> str:
    """Loss and accuracy over the steps of a model's training, from the metrics.jsonl beside it; "" if there is none."""
    log, lines, made = Path(model, "metrics.jsonl"), [], []
    for line in log.read_bytes().splitlines() if log.is_file() else []:
        with suppress(data.Unusable):  # the last one of a killed run may be half written
            lines.append(data.read_json(line))
    for what in ("loss", "accuracy"):
        names = sorted(
            {name for line in lines for name in line if re.match(rf"(validation_)?{what}", name)}
        )
        marks, legend = [], ""
        for name, colour in zip(names, ('"#888"', '"var(--bar)"')):
            there = [
                line
                for line in lines
                if all(type(line.get(key)) in (int, float) for key in ("step", name))
            ]
            points = [
                (line["step"], line[name]) for line in there
            ]  # none at a step that was skipped
            marks += [(points, f'stroke={colour} fill="none"', name)] if points else []
            dot = f'stroke={colour} stroke-width="7" stroke-linecap="round"'
            marks += [
                ([each, each], dot, "step {}: {:.4f}".format(*each))
                for each in points
                if len(points) < 100
            ]
            legend += f'<tspan fill={colour} dx="8">{escape(name)}</tspan>'
        if marks:
            made.append(plot(marks, "step", legend))
    return (
        f"<h1>Training of {escape(model)}</h1><div class=side>{''.join(made)}</div>" if made else ""
    )


def shaded(tokens: np.ndarray, scores: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """A response's words, coloured by how the score moves when they are read: [R] token ids, [1 + R] scores."""
    moves = np.diff(scores)[:-1]  # without the end-of-turn token
    strongest = np.abs(moves).max(initial=0) or 1.0
    made, read = [], ""
    for i, move in enumerate(moves):
        text = tokenizer.decode(tokens[: i + 1].tolist())
        if text.endswith("\ufffd"):  # the first bytes of a character
            continue
        colour = f"rgba(var(--{'up' if move > 0 else 'down'}), {abs(move) / strongest:.2f})"
        made.append(f'<span style="background:{colour}">{escape(text[len(read) :])}</span>')
        read = text
    return "".join(made)


@torch.inference_mode()
def scores_while_reading(model: Reward, comparison: Comparison) -> list[np.ndarray]:
    """The head applied at the prompt's last token and at every token of each response, N x [1 + R], in one forward.

    It was trained at a response's last token only; elsewhere it is an aid to look with, no measurement."""
    model = model.model_for(bool(comparison.images))
    row = model_stage.pack([comparison], model.processors).to(model.device)
    read = model.head(model.hidden_states(row))[len(comparison.prompt) - 1 :].float().cpu().numpy()
    responses = np.split(
        read[1:], np.cumsum([len(response) for response in comparison.responses])[:-1]
    )
    return [np.concatenate([read[:1], response]) for response in responses]


def article(
    comparison: Comparison,
    scores: np.ndarray,
    margin: float,
    model: Reward,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """One comparison: pictures, prompt, and its responses from the best ranked to the worst, with their scores."""
    prompt = tokenizer.decode(comparison.prompt.tolist()).replace("\ufffd", "")
    prompt = re.sub(r"(<\|image_pad\|>|<IMG_CONTEXT>)+", "[picture]", prompt)
    for token in tokenizer.added_tokens_decoder.values():
        prompt = prompt.replace(token.content, "") if token.special else prompt
    made = [
        f"<article><p><b>{margin:.2f}</b> <small>{escape(str(comparison.record.get('id', '')))}</small></p>"
    ]
    for image in comparison.images:
        data.open_image(image)  # raises where it is none
        kind = data.Image.open(io.BytesIO(image)).get_format_mimetype() or "image/png"
        made.append(f'<img alt="" src="data:{kind};base64,{base64.b64encode(image).decode()}">')
    made.append(f"<div class=text>{escape(prompt.strip())}</div><div class=side>")
    naive = (
        model and model.model_for(bool(comparison.images)).kind == "naive"
    )  # others' heads have not read responses
    reading = scores_while_reading(model, comparison) if naive else [None] * len(scores)
    for i in sorted(range(len(scores)), key=lambda i: comparison.ranks[i]):
        tokens = comparison.responses[i]
        if reading[i] is None:
            text = escape(tokenizer.decode(tokens[:-1].tolist()))
        else:
            text = shaded(tokens, reading[i], tokenizer)
        made.append(
            f"<div><p>rank {comparison.ranks[i]}, score {scores[i]:.3f}</p><div class=text>{text}</div></div>"
        )
    return "".join([*made, "</div></article>"])


def section(
    title: str,
    systems: dict,
    scores: list[np.ndarray],
    comparisons: Comparisons,
    model: Reward,
    tokenizer: PreTrainedTokenizerBase,
    worst: int = 12,
) -> str:
    """What the page shows of one benchmark. `model` is None where only scores are known."""
    margins, wrong = [], []
    for i, (score, comparison) in enumerate(zip(scores, comparisons)):
        found = [score[a] - score[b] for a, b in comparison.pairs]
        margins += found
        if min(found) < 0:
            wrong.append((min(found), i))
    margins = np.array(margins)
    finite = margins[np.isfinite(margins)]
    lost = len(margins) - len(finite)
    of = f"{len(margins):,} pairs" + (f", {lost:,} not finite" if lost else "")
    gallery = [
        article(comparisons[i], scores[i], margin, model, tokenizer)
        for margin, i in sorted(wrong)[:worst]
    ]
    aid = "Words are shaded by how the score moves while they are read (green up, red down): an aid to look with."
    return f"""<h1>{escape(title)}</h1>
{bars(systems)}
<h2>Margins</h2>
<p>Score of the better response minus that of the worse, of {of}; left of 0 is wrong.</p>
{histogram(finite)}
<h2>Most confidently wrong</h2><p>{aid if any("<span style" in each for each in gallery) else ""}</p>
{"".join(gallery) or "<p>None is wrong.</p>"}"""


def page(title: str, sections: list[str]) -> str:
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<meta charset=utf-8>{viewport}<title>{escape(title)}</title><style>{STYLE}</style>"
    return (
        f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(sections)}</body></html>"
    )


def check_names(folders: list[str]) -> None:
    """Raises UserError where results of two benchmarks would stand under one name."""
    names = [data.Comparisons(folder).info["name"] for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"--benchmark: two are named {', '.join(twice)}; prepare one of them with another --name"
        )


def evaluate(
    name: str, path: str, folders: list[str], settings: Settings, device: torch.device
) -> dict[str, dict]:
    """Scores every benchmark with one model, or reads the scores that take its place (`path` empty), and writes what
    belongs to it. Returns, on rank 0, {title of the benchmark: {name and baselines: metrics}}."""
    model = (
        model_stage.place(model_stage.load_reward(path, settings.text_model), device)
        if path
        else None
    )
    out, found, costs = Path(settings.out, name), {}, {}
    sections = [learning_curves(each) for each in (path, settings.text_model) if each]
    for folder in folders:
        comparisons = data.Comparisons(folder, model.fingerprint if model else None)
        if not len(comparisons) or not all(comparisons.response_counts()):
            raise UserError(
                f"{folder}: has prompts without responses; a benchmark is made of pairs or rankings"
            )
        title = benchmark_title(comparisons)
        if model:
            dist.barrier()  # rank 0 comes from the metrics of the benchmark before
            began = time.perf_counter()
            scores = score_comparisons(model, comparisons, device, settings.micro_tokens)
            costs[title] = cost_of(model, len(comparisons), time.perf_counter() - began, device)
        else:
            scores = read_scores(settings.scores_from, comparisons)
        if dist.get_rank() > 0:
            continue
        save_scores(
            out / f"{comparisons.info['name']}.safetensors",
            scores,
            comparisons,
            path or settings.scores_from,
        )
        items, measure = Items.of(comparisons), METRICS[comparisons.info["metric"]]
        found[title] = {name: measure(scores, items), **baselines(items, measure)}
        if model:
            cost = ", ".join(f"{value:.4g} {what}" for what, value in costs[title].items())
            print(f"{name} on {title}: a comparison costs {cost}", flush=True)
            warn_of_overlap(name, model, comparisons)
        processors = (
            model.processors if model else data.load_processors(comparisons.info["backbone"])
        )
        sections.append(
            section(title, found[title], scores, comparisons, model, processors.tokenizer)
        )
    if dist.get_rank() == 0:
        data.write_file(out / "summary.json", json.dumps(found, indent=1))
        if model:
            data.write_file(out / "cost.json", json.dumps(costs, indent=1))
        data.write_file(out / "report.html", page(f"{name}: {', '.join(found)}", sections))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# --score: a file of one's own instead of benchmarks, line by line.


def to_score(record: dict) -> tuple[list, list[str], list]:
    """Prompt, responses and images of a record in the JSON form of 01, which here needs no ranks. Raises Unusable."""
    named = {key: record[key] for key in ("chosen", "rejected") if key in record}
    if isinstance(record.get("responses"), list):
        named = {f"responses[{i}]": response for i, response in enumerate(record["responses"])}
    elif len(named) < 2:
        raise data.Unusable("missing field: responses, or chosen and rejected")
    if "prompt" not in record:
        raise data.Unusable("missing field: prompt")
    images = data.images_in(record)
    return (
        record["prompt"],
        [data.text_of(response, name) for name, response in named.items()],
        images,
    )


def scored_lines(
    model: Reward, lines: Iterable[bytes], folder: Path, micro_tokens: int, max_length: int = 4096
) -> Iterator[dict]:
    """The records of JSONL lines, in order, each with `scores`, one for each of `responses` or for chosen and rejected,
    or with `error`, why it has none. Image paths are relative to `folder`. As many lines are held as make some rows."""
    waiting, tokens = [], 0  # [(record, comparison, or None where there is an error)]

    def scored() -> Iterator[dict]:
        comparisons = [comparison for _, comparison in waiting if comparison is not None]
        scores = iter(model.score_encoded(comparisons, micro_tokens).tolist())
        for record, comparison in waiting:
            yield (
                record
                if comparison is None
                else record | {"scores": list(islice(scores, len(comparison.responses)))}
            )

    for line in lines:
        record, comparison = {"line": line.decode(errors="replace")}, None
        try:
            record = data.read_json(line)
            record = {key: value for key, value in record.items() if key not in ("scores", "error")}
            encoded = model.encode(*to_score(record), folder)
            data.check_length(encoded.prompt, encoded.responses, max_length)
            comparison = encoded  # only now: it will be scored
            tokens += comparison.length
        except data.Unusable as error:
            record["error"] = str(error)
        waiting.append((record, comparison))
        if tokens >= 4 * micro_tokens or len(waiting) == 1000:
            yield from scored()
            waiting, tokens = [], 0
    yield from scored()


def score_file(settings: Settings) -> None:
    """Scores a JSONL file; every rank takes every world-th line, and rank 0 puts the lines together in their order."""
    rank, world, device = data.start_distributed()
    source = Path(settings.score)
    if settings.benchmark or settings.scores_from:
        raise UserError("--score: instead of --benchmark and --scores_from, not beside them")
    if not source.is_file():
        raise UserError(f"--score {source}: no such file")
    (name, folder), *others = models_of(settings).items()
    if others:
        raise UserError("--score takes one --model")
    model = model_stage.place(model_stage.load_reward(folder, settings.text_model), device)
    out = Path(settings.out, name, source.name)
    parts = [out.with_name(f".{out.name}.{each}.tmp") for each in range(world)]
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = torch.zeros(2, dtype=torch.long)  # lines, and those without scores
    with open(source, "rb") as lines, open(parts[rank], "w") as part:
        total = sum(1 for _ in lines)
        lines.seek(0)
        progress = tqdm(lines, source.name, total, unit=" lines", disable=rank > 0, mininterval=1)
        mine = islice(progress, rank, None, world)
        for record in scored_lines(
            model, mine, source.parent, settings.micro_tokens, settings.max_length
        ):
            part.write(json.dumps(record) + "\n")
            counts += torch.tensor([1, "error" in record])
    dist.all_reduce(counts)  # so all have written
    if rank == 0:
        with (
            data.in_place_of(out) as temporary,
            open(temporary, "w") as whole,
            ExitStack() as stack,
        ):
            dealt = [stack.enter_context(open(part)) for part in parts]
            for together in zip_longest(*dealt, fillvalue=""):  # the i-th line of every rank
                whole.writelines(together)
        for part in parts:
            part.unlink()
        print(
            f"{out}: {counts[0]} lines, {counts[1]} of them without scores but with the reason as `error`"
        )


# ---------------------------------------------------------------------------------------------------------------------
# All that this stage does.


def main(settings: Settings) -> None:
    if settings.score:
        return score_file(settings)
    rank, _, device = data.start_distributed()
    if settings.scores_from:
        if len(settings.benchmark) != 1 or settings.model:
            raise UserError(
                "--scores_from: in place of --model, and with one --benchmark, whose scores these are"
            )
        systems = {Path(settings.scores_from).stem: ""}
    else:
        systems = models_of(settings)
    folders = settings.benchmark or DEFAULT_BENCHMARKS
    check_names(folders)
    found = {
        name: evaluate(name, path, folders, settings, device) for name, path in systems.items()
    }
    if rank > 0:
        return
    first = next(iter(found.values()))  # for the baselines, which are everyone's
    together = {
        title: {name: each[title][name] for name, each in found.items()} | first[title]
        for title in first
    }
    for title, columns in together.items():
        print(f"\n{table(title, columns)}")
    if len(systems) > 1:
        print(f"\n{overall_table(together)}")
    print()
    for name, path in systems.items():
        cost = "cost.json, " if path else ""
        files = f"scores of {len(folders)} benchmark(s), summary.json, {cost}and report.html to open in a browser"
        print(f"{Path(settings.out, name)}: {files}")
    if not settings.model:
        data.say_next("05_ensemble.py")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
