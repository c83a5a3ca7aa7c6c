"""Stage 5 · several reward models together: averaging, weighting, routing

    torchrun --standalone --nproc_per_node=2 05_ensemble.py                    # trains two more members, then compares
    torchrun --standalone --nproc_per_node=2 05_ensemble.py --member artifacts/reward --member artifacts/other
    --text_member ""

In    Reward models (03). With no --member: artifacts/reward and one that this stage trains, by calling 03's own code,
      on other data with another seed; and a text-only one, trained on text alone from the language half of the
      backbone.
Out   artifacts/ensemble/: the members trained here, summary.json; printed: members and combinations side by side.

The paper compares the plain mean of raw scores, weights by accuracy and weights by confidence (the mean
margin), both fitted on 1,000 held-out training pairs, and finds the plain mean best; and sending text-only inputs to a
reward model trained from a text-only LLM better still for text. All four are here. It does not give the
weights' formulas: we take each member's accuracy, or its mean margin, over their sum.

Raw scores of different models live on different scales, and in a plain mean the widest scale has the loudest voice. So
the spread of every member's scores on the held-out pairs is printed beside its weights.

Routing here is of scores that are there already, the mean of several members among them; one multimodal and one
text-only model that are to be used together from then on are a RewardRouter (02), in 04 and 06 --text_model.
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
option, Comparisons, UserError = data.option, data.Comparisons, data.UserError


@dataclass
class Settings:
    member: list[str] = option(
        [], "reward models to combine, repeatable; none: artifacts/reward and one trained here"
    )
    text_member: str = option(
        "auto",
        "text-only reward model for comparisons without images; auto: one trained here if no --member; '': none",
    )
    heldout: str = option(
        "artifacts/data/train_holdout",
        "held-out training pairs to fit the weights on; no benchmark",
    )
    benchmark: list[str] = option(
        [], "prepared comparisons to score, repeatable; none: the embedded held-out sets"
    )
    out: str = option("artifacts/ensemble", "folder for the members trained here and summary.json")
    backbone: str = option("tests/tiny", "backbone of the members trained here")
    steps: int = option(
        0, "training steps of each member trained here; 0: two passes over its data, 03's default"
    )
    learning_rate: float = option(2e-4, "of the members trained here")
    seed: int = option(1, "of the members trained here")


# ---------------------------------------------------------------------------------------------------------------------
# Combinations. Scores are [members, responses]; whatever is returned is [responses].


def mean_of_scores(scores: np.ndarray) -> np.ndarray:
    """The plain mean of raw scores (the paper's choice)."""
    return scores.mean(0)


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`weights` [members], any positive numbers."""
    return np.average(scores, axis=0, weights=weights)


def route(multimodal: np.ndarray, text: np.ndarray, has_image: np.ndarray) -> np.ndarray:
    """The text-only model's score where the comparison has no image. All [responses]."""
    return np.where(has_image, multimodal, text)


def fit_weights(scores: np.ndarray, ranks: list[list[int]]) -> dict[str, np.ndarray]:
    """Accuracy and confidence weights [members] from held-out training pairs, each summing to 1.

    Args: scores [members, responses], and for each comparison the ranks of its responses.
    """
    starts = np.cumsum([0, *map(len, ranks)])
    pairs = [
        (start + i, start + j) for start, r in zip(starts, ranks) for i, j in data.ordered_pairs(r)
    ]
    better, worse = np.array(pairs).T
    margins = scores[:, better] - scores[:, worse]  # [members, pairs]
    accuracy, confidence = (margins > 0).mean(1), np.abs(margins).mean(1)
    return {"accuracy": accuracy / accuracy.sum(), "confidence": confidence / confidence.sum()}


# ---------------------------------------------------------------------------------------------------------------------
# The members that a run without --member trains.


def language_half(backbone: str, out: str) -> None:
    """Writes the language model of a vision-language model as a plain checkpoint, that of a Qwen2.5-VL as a Qwen2: on
    text alone, M-RoPE is RoPE and the weights the same."""
    model = model_stage.load_backbone(backbone)
    language = model_stage.parts_of(model).language
    config = language.config.to_dict() | {"rope_parameters": dict(language.config.rope_parameters)}
    for multimodal in ("mrope_section", "mrope_interleaved"):
        config["rope_parameters"].pop(multimodal, None)
    own = config.pop("model_type")
    half = AutoModel.from_config(
        AutoConfig.for_model(data.FAMILIES[model.config.model_type].half or own, **config)
    )
    half.load_state_dict(language.state_dict())
    model_stage.export(half, replace(data.load_processors(backbone), image=None), out)


def train_member(name: str, backbone: str, train_data: str, settings: Settings) -> str:
    """02 and 03 in one: a new head on the backbone, trained. Returns the folder of the reward model."""
    out = f"{settings.out}/{name}"
    if dist.get_rank() == 0:
        print(f"\n{name}: {backbone} on {train_data}", flush=True)
        torch.manual_seed(settings.seed)
        model_stage.RewardModel.from_backbone(backbone, model_stage.HeadSettings()).save_pretrained(
            f"{out}/initial"
        )
    dist.barrier()
    how = {"steps": settings.steps, "learning_rate": settings.learning_rate, "seed": settings.seed}
    how |= {"validate_every": 0, "checkpoint_every": 0}
    training.train(training.Settings(model=f"{out}/initial", data=[train_data], out=out, **how))
    return out


def train_members(settings: Settings) -> tuple[list[str], str]:
    """The default ensemble: the reward model of stage 3 and one of other data; and a text-only one."""
    second = train_member("second", settings.backbone, "artifacts/data/train_other", settings)
    half = f"{settings.out}/language_half"
    if dist.get_rank() == 0:
        language_half(settings.backbone, half)
    dist.barrier()
    return ["artifacts/reward", second], train_member(
        "text", half, "artifacts/data/train_text", settings
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scores of all members on all sets; a model is loaded once and scores one set after the other.


def score_sets(
    members: list[str], folders: list[str], device: torch.device
) -> dict[str, np.ndarray]:
    """{folder: scores [members, responses]}."""
    scores = {folder: [] for folder in folders}
    for member in members:
        model = model_stage.RewardModel.from_pretrained(member)
        for folder, rows in scores.items():
            comparisons = data.Comparisons(folder, model.processors.fingerprint)
            rows.append(np.concatenate(evaluation.score_comparisons(model, comparisons, device)))
    return {folder: np.array(rows) for folder, rows in scores.items()}


def score_text(text_member: str, folders: list[str], device: torch.device) -> dict[str, np.ndarray]:
    """{folder: the text-only model's scores [responses], not a number where the comparison has an image}."""
    model, scores = model_stage.RewardModel.from_pretrained(text_member), {}
    for folder in folders:
        with_text = has_no_image(data.Comparisons(folder))
        scores[folder] = np.full(len(with_text), np.nan)
        if with_text.any():
            subset = data.Comparisons(folder, model.processors.fingerprint, text_only=True)
            scores[folder][with_text] = np.concatenate(
                evaluation.score_comparisons(model, subset, device)
            )
    return scores


def has_no_image(comparisons: Comparisons) -> np.ndarray:
    """For each response [responses], whether its comparison is text-only."""
    return np.repeat(comparisons.sizes()[1] == 0, comparisons.response_counts())


def main(settings: Settings) -> None:
    rank, _, device = data.start_distributed()
    folders = settings.benchmark or evaluation.DEFAULT_BENCHMARKS
    evaluation.check_names(folders)  # before anything is trained
    data.Comparisons(settings.heldout)
    members, text_member = (
        settings.member,
        "" if settings.text_member == "auto" else settings.text_member,
    )
    if not members:
        members, trained = train_members(settings)
        text_member = trained if settings.text_member == "auto" else text_member
    names = evaluation.short_names(members)
    scores = score_sets(members, [settings.heldout, *folders], device)
    text_scores = score_text(text_member, folders, device) if text_member else {}
    if rank > 0:
        return

    heldout = data.Comparisons(settings.heldout)
    weights = fit_weights(scores[settings.heldout], [heldout[i].ranks for i in range(len(heldout))])
    print(f"\nfitted on {settings.heldout}, {len(heldout)} comparisons")
    for i, name in enumerate(names):
        by = ", ".join(f"by {key} {values[i]:.3f}" for key, values in weights.items())
        print(
            f"  {name:<12} spread of its scores {scores[settings.heldout][i].std():.2f}; weight {by}"
        )

    benchmarks = {}  # {benchmark: {system: metrics}}
    for folder in folders:
        comparisons = data.Comparisons(folder)
        systems = dict(zip(names, scores[folder]))
        systems["mean"] = mean_of_scores(scores[folder])
        for key, values in weights.items():
            systems[f"by {key}"] = weighted_mean(scores[folder], values)
        if text_member:
            text_only = has_no_image(comparisons)
            systems["mean, text routed"] = route(systems["mean"], text_scores[folder], ~text_only)
            if text_only.all():
                systems["text-only"] = text_scores[folder]
        items, ends = (
            evaluation.Items.of(comparisons),
            np.cumsum(comparisons.response_counts())[:-1],
        )
        measure = evaluation.METRICS[comparisons.info["metric"]]
        results = {name: measure(np.split(flat, ends), items) for name, flat in systems.items()}
        benchmarks[evaluation.benchmark_title(comparisons)] = results

    print("\n" + evaluation.overall_table(benchmarks))
    fitted = {key: values.tolist() for key, values in weights.items()}
    summary = {
        "members": members,
        "text_member": text_member,
        "weights": fitted,
        "benchmarks": benchmarks,
    }
    data.write_file(Path(settings.out, "summary.json"), json.dumps(summary, indent=1))
    print(f"\n{settings.out}/summary.json has all metrics")
    data.say_next("06_grpo.py")


if __name__ == "__main__":
    data.run_stage(main, Settings, __doc__)
