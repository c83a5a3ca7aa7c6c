"""Stage 5: combine reward models by averaging, weighting and routing

    torchrun --standalone --nproc_per_node=2 05_ensemble.py
    torchrun --standalone --nproc_per_node=2 05_ensemble.py --member A --member B --text_member C

In    Reward models (03). Without --member: artifacts/reward, a second one on another backbone and
      a text-only one on the language half of the first backbone, both trained here.
Out   A table of members and combinations; artifacts/ensemble/summary.json and the new members.

Models on different backbones should err on different items, so their mean errs less. The paper
finds the plain mean of raw scores better than means weighted by each member's accuracy or
confidence (here mean |margin|) on 1,000 training pairs. On text it adds a text-only LLM to the mean
("voted"); for reinforcement learning it has that LLM alone score inputs without images ("routed").
Scores have no common scale: the member that spreads them widest decides most of a plain mean. The
script prints the spreads.
"""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModel

data = importlib.import_module("01_data")
model_stage = importlib.import_module("02_model")
training = importlib.import_module("03_train")
evaluation = importlib.import_module("04_eval")
option = data.option
Array = np.ndarray


@dataclass
class Settings:
    member: list[str] = option([], "reward model, repeatable; none: artifacts/reward and a new one")
    text_member: str = option("auto", "text-only reward model; auto: a new one if no --member")
    heldout: str = option("artifacts/data/train_holdout", "training pairs to fit weights on")
    benchmark: list[str] = option([], "prepared comparisons, repeatable; none: the held-out sets")
    out: str = option("artifacts/ensemble", "folder for summary.json and the new members")
    backbone: str = option("tests/tiny/qwen2_vl", "backbone of the new second member")
    text_backbone: str = option("tests/tiny/qwen2_5_vl", "its language half is the text-only one's")
    steps: int = option(0, "training steps of a new member; 0: one pass over its data")
    learning_rate: float = option(4e-4, "learning rate of the new members")
    seed: int = option(1, "seed of the new members")


def combine(scores: Array, weights: dict, text: list[Array], has_image: Array) -> dict[str, Array]:
    """Combine scores [members, responses] of multimodal models: {combination: [responses]}. `text`
    has a text-only model's scores of the responses without images, or nothing."""
    systems = {"mean": scores.mean(0)}  # the paper's choice
    for name, values in weights.items():
        systems[f"by {name}"] = np.average(scores, axis=0, weights=values)
    if text:  # voted: it joins the mean of responses without images; routed: it replaces it
        voters = {"text voted": [*scores[:, ~has_image], *text], "text routed": text}
        for name, members in voters.items():
            systems[f"mean, {name}"] = systems["mean"].copy()
            systems[f"mean, {name}"][~has_image] = np.mean(members, axis=0)
        if not has_image.any():
            systems["text-only"] = text[0]
    return systems


def fit_weights(scores: Array, heldout) -> dict[str, Array]:
    """Weigh members by how they do on held-out scores [members, responses]: {name: [members]}."""
    pairs = training.pairs_of(heldout)  # indices into the responses of all comparisons
    margins = scores[:, pairs.better.numpy()] - scores[:, pairs.worse.numpy()]  # [members, pairs]
    return {"accuracy": (margins > 0).mean(1), "confidence": np.abs(margins).mean(1)}


def score_sets(members: list[str], folders: list[str], device, text_only=False) -> dict:
    """Score sets with every member, one after the other: {folder: members x [responses]}."""
    results = {folder: [] for folder in folders}
    for member in members:
        model = model_stage.place(model_stage.RewardModel.from_pretrained(member), device)
        for folder in folders:
            comparisons = data.Comparisons(folder, model.fingerprint, text_only)
            scores = evaluation.score_comparisons(model, comparisons, device)
            results[folder].append(np.concatenate(scores))
    return results


def main(settings: Settings) -> None:
    rank, _, device = data.start_distributed()
    folders = settings.benchmark or evaluation.DEFAULT_BENCHMARKS
    evaluation.check_names(folders)  # before anything is trained
    heldout = data.Comparisons(settings.heldout)
    members, text_member = settings.member, ""
    if not members:
        members, text_member = train_members(settings)  # in the appendix
    if settings.text_member != "auto":
        text_member = settings.text_member
    scores = score_sets(members, [settings.heldout, *folders], device)
    text_scores = score_sets([text_member] if text_member else [], folders, device, text_only=True)
    if rank > 0:
        return

    # Weights come from held-out training pairs, never from a benchmark.
    names = evaluation.short_names(members)
    heldout_scores = np.array(scores[settings.heldout])  # [members, responses]
    weights = fit_weights(heldout_scores, heldout)
    for i, name in enumerate(names):
        fitted = ", ".join(f"{key} {values[i]:.3f}" for key, values in weights.items())
        print(f"{name}: spread of held-out scores {heldout_scores[i].std():.2f}, {fitted}")

    tables = {}  # {benchmark: {system: rows}}
    for folder in folders:
        comparisons = data.Comparisons(folder)
        counts = comparisons.response_counts()
        has_image = np.repeat(comparisons.sizes()[1] > 0, counts)  # [responses]
        systems = dict(zip(names, scores[folder]))
        systems |= combine(np.array(scores[folder]), weights, text_scores[folder], has_image)
        items = evaluation.Items.of(comparisons)
        measure = evaluation.METRICS[comparisons.info["metric"]]
        columns = tables[evaluation.benchmark_title(comparisons)] = {}
        for name, flat in systems.items():
            per_comparison = np.split(flat, np.cumsum(counts)[:-1])
            columns[name] = evaluation.with_intervals(measure, per_comparison, items)
    print(f"\n{evaluation.overall_table(tables)}")

    summary = {"members": members, "text_member": text_member, "weights": weights}
    text = json.dumps(summary | {"benchmarks": tables}, indent=1, default=Array.tolist)
    data.write_file(Path(settings.out, "summary.json"), text)
    print("Next: torchrun --standalone --nproc_per_node=2 06_grpo.py")


# Appendix: the members of the default ensemble.


def language_half(backbone: str, out: str) -> None:
    """Write a vision-language model's language model as a checkpoint: a Qwen2.5-VL has a Qwen2."""
    model = model_stage.load_backbone(backbone)
    language = model_stage.parts_of(model).language
    config = language.config.to_dict()
    for multimodal in ("mrope_section", "mrope_interleaved"):  # on text M-RoPE is RoPE
        config["rope_parameters"].pop(multimodal, None)
    config["model_type"] = data.FAMILIES[model.config.model_type].half or config["model_type"]
    half = AutoModel.from_config(AutoConfig.for_model(**config))
    half.load_state_dict(language.state_dict())
    model_stage.export(half, replace(data.load_processors(backbone), image_processor=None), out)


def train_members(settings: Settings) -> tuple[list[str], str]:
    """Train the default ensemble; returns the folders of its members and of the text-only one."""
    half = f"{settings.out}/language_half"
    recipe = {name: getattr(settings, name) for name in ("steps", "learning_rate", "seed")}
    if dist.get_rank() == 0:
        language_half(settings.text_backbone, half)
    new = {"second": (settings.backbone, "train"), "text": (half, "train_text")}
    for name, (backbone, train_data) in new.items():
        out = f"{settings.out}/{name}"
        if dist.get_rank() == 0:
            torch.manual_seed(settings.seed)
            model = model_stage.RewardModel.from_backbone(backbone, model_stage.HeadSettings())
            model.save_pretrained(f"{out}/initial")
            print(f"\n{name}: {backbone} on {train_data}", flush=True)
        dist.barrier()
        recipe |= {"model": f"{out}/initial", "data": [f"artifacts/data/{train_data}"], "out": out}
        training.train(training.Settings(**recipe, validate_every=0, checkpoint_every=0))
    return ["artifacts/reward", f"{settings.out}/second"], f"{settings.out}/text"


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
