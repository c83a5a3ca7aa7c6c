"""Run the paper's studies in miniature: every run over five seeds, in the embedded world.

    python tests/miniature/run.py                  # every run that results.jsonl does not have yet
    python tests/miniature/run.py --study head --seeds 0 1
    python tests/miniature/tables.py               # the README's tables, from results.jsonl

In    Nothing: each seed starts by making its data.
Out   artifacts/miniature/<hash of the world>/<seed>/<run>/: what the stages write, and log.txt.
      results.jsonl beside this file: a line for each run and seed, with its command lines. A run
      whose line is there, with the same command lines, is not repeated.

A run is a list of command lines, of the six scripts and best_of.py. It starts when all runs that
need fewer others have ended, so it finds the artifacts it needs. Worker processes have one rank and
one thread.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.jsonl")
BENCHMARKS = ("new_scenes", "unseen_combinations", "new_text", "policy_answers")
CATEGORIES = ["perception", "hallucination", "mathematics", "safety"]  # of new_scenes


@dataclass
class Run:
    """One run of a study.

    In `commands`, {root} is the folder of all runs in this world, {work} the seed's, {run} the
    run's own, and {seed} the seed. `measure` reads {name: share} from the run's folder. `needs`
    names the runs whose artifacts it uses.
    """

    commands: list[str]
    measure: Callable[[Path], dict[str, float]]
    needs: tuple[str, ...] = ("data",)


class Row(NamedTuple):
    """A row of a study's table."""

    label: str
    run: str
    part: str = ""  # prefix of a column's name among what the run measured
    paper: str = ""  # the paper's figures


class Claim(NamedTuple):
    """A finding of the paper: one row is better than another in a column."""

    text: str
    better: str  # label of a row
    worse: str | float  # label of a row, or what guessing would give
    column: str = "mean"


@dataclass
class Study:
    """One of the paper's questions. Differences are to the first row."""

    columns: list[str]  # names of measures
    rows: list[Row]
    claims: list[Claim]
    paper: str = ""  # names the paper's figures
    compared: str = "mean"  # the column of the differences


# --------------------------------------------------------------------------------------------------
# The pieces of runs.

# The world's sources; each alone is 3,200 comparisons.
SOURCES = ("scenes", "captions", "noisy", "wordy", "text")
SELECTED = {"scenes": 2400, "captions": 160, "text": 640}  # without the two flawed ones
# 80 steps of 64 comparisons: 58% of the default training, which reads its 8,876 once.
STEPS = "--steps 80"
FIRST = "tests/tiny/qwen2_5_vl"
SECOND = "tests/tiny/qwen2_vl"
LANGUAGE_HALF = "{root}/language_half"
SIZES = {
    "2 layers of 64": "--width 64 --depth 2",
    "4 layers of 128": "--width 128 --depth 4",
    "4 layers of 192": "--width 192 --depth 4",
}
FAMILIES = {
    "Qwen2-VL": "--family qwen2_vl",
    "Qwen3-VL": "--family qwen3_vl",
    "InternVL": "--family internvl",
}
# Each is pretrained for 1,350 steps, the embedded ones for 6,300.
BACKBONES = SIZES | FAMILIES | {"LLM": "--family qwen2"}
BACKBONE_STEPS = ("900", "0", "0", "0", "450", "0")
VLM = "4 layers of 128"  # the embedded backbone's size


def name_of_folder(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def folder_of_backbone(name: str) -> str:
    return f"{{root}}/{name_of_folder(name)}"


def scored_on(benchmarks: tuple[str, ...], folder: str = "{work}/data") -> str:
    return " ".join(f"--benchmark {folder}/{name}" for name in benchmarks)


def by_benchmark(summary: dict, system: str) -> dict[str, float]:
    """Return a system's overall accuracy on each benchmark of a summary, and their mean."""
    shares = {}
    for name, systems in summary.items():
        shares[name.replace("_", " ")] = systems[system]["overall"]["accuracy"]
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def prepare() -> Run:
    """Prepare the default data, each source alone, and two mixtures of the same size."""
    sources = {part: {part: 3200} for part in SOURCES}
    sources["selected"] = SELECTED
    sources["everything"] = {part: 3200 // len(SOURCES) for part in SOURCES}
    lines = [""]
    for name, counts in sources.items():
        options = [f"--source world:{part}@{count}" for part, count in counts.items()]
        lines.append(f"{' '.join(options)} --name {name} --holdout 0")
    commands = [f"01_data.py {line} --seed {{seed}} --out {{work}}/data" for line in lines]
    return Run(commands, measure=lambda folder: {}, needs=())


def train(
    data: str = "train",
    backbone: str = FIRST,
    model: str = "",
    training: str = STEPS,
    text_only: bool = False,
    prepared_by: str = "data",
) -> Run:
    """Train a reward model and score benchmarks; `model` and `training` are options of 02 and 03.

    The data are those of the run `prepared_by`. With '' this run prepares its own, for a backbone
    with a tokenizer of its own.
    """
    benchmarks = ("new_text",) if text_only else BENCHMARKS
    commands = []
    needs = (prepared_by,)
    if not prepared_by:
        folder = "{run}/data"
        needs = ()
        commands.append(f"01_data.py --backbone {backbone} --seed {{seed}} --out {folder}")
    elif prepared_by == "data":
        folder = "{work}/data"
    else:
        folder = f"{{work}}/{name_of_folder(prepared_by)}/data"
    commands += [
        f"02_model.py --backbone {backbone} --data {folder}/{data} --out {{run}}/model "
        f"--seed {{seed}} {model}",
        f"03_train.py --model {{run}}/model --data {folder}/{data} --out {{run}}/reward "
        f"--seed {{seed}} --validation= --validate_every 0 --checkpoint_every 0 --workers 0 "
        f"{training}",
        score(benchmarks, folder),
    ]
    return Run(commands, accuracies, needs)


def score(benchmarks: tuple[str, ...], folder: str = "{work}/data") -> str:
    return f"04_eval.py --model {{run}}/reward --out {{run}}/scores {scored_on(benchmarks, folder)}"


def accuracies(folder: Path) -> dict[str, float]:
    """Read overall accuracies; with pictures also the cost, and accuracies by category."""
    summary = json.loads((folder / "scores/reward/summary.json").read_text())
    measured = by_benchmark(summary, "reward")
    if "new_scenes" in summary:
        cost = json.loads((folder / "scores/reward/cost.json").read_text())["new_scenes"]
        for name in ("GFLOP", "read", "written"):
            measured[f"{name} a comparison"] = cost[name]
        for name in CATEGORIES:
            measured[name] = summary["new_scenes"]["reward"][name]["accuracy"]
    return measured


def reinforce() -> Run:
    """Train the judge that writes a rationale by GRPO, as R1-Reward was; 02 reads it as a judge.

    At temperature 1 this judge, after 80 steps, hardly ever gets to a verdict.
    """
    parts = " ".join(f"--source world:{part}@{n}" for part, n in JUDGE_QUESTIONS.items())
    commands = [
        f"01_data.py {parts} --name questions --judge_request '{JUDGE_REQUEST}' --holdout 0 "
        "--seed {seed} --out {run}/data",
        "06_grpo.py --reward rule --backbone {work}/rationale/reward --data {run}/data/questions "
        "--benchmark= --max_new_tokens 160 --temperature 0.3 --steps 40 --checkpoint_every 0 "
        "--seed {seed} --out {run}/policy",
        "02_model.py --kind generative --rationale --backbone {run}/policy --data= "
        "--out {run}/reward --seed {seed}",
        score(BENCHMARKS),
    ]
    return Run(commands, accuracies, ("data", "rationale"))


def combine() -> Run:
    """Combine two backbones on the same data and a text-only model in all ways of 05."""
    command = (
        "05_ensemble.py --member {work}/full/reward --member {work}/second/reward "
        "--text_member {work}/language_model/reward --heldout {work}/data/train_holdout "
        f"--out {{run}} {scored_on(BENCHMARKS)}"
    )

    def measure(folder: Path) -> dict[str, float]:
        summary = json.loads((folder / "summary.json").read_text())["benchmarks"]
        first, second = list(summary[BENCHMARKS[0]])[:2]  # the members, as --member names them
        systems = {"first": first, "second": second}
        names = ["mean", "mean, text voted", "mean, text routed", "by accuracy", "by confidence"]
        systems |= dict(zip(names, names))
        measured = {}
        for prefix, system in systems.items():
            for name, share in by_benchmark(summary, system).items():
                measured[f"{prefix}: {name}"] = share
        better = max(("first", "second"), key=lambda member: measured[f"{member}: mean"])
        for name in [key for key in measured if key.startswith(better)]:
            measured[name.replace(better, "better")] = measured[name]
        return measured

    return Run([command], measure, ("full", "second", "language model"))


def improve(reward: str, model: str = "full", more: str = "") -> Run:
    """Train a policy by GRPO with the reward model of another run."""
    command = (
        f"06_grpo.py --reward {reward} --model {{work}}/{name_of_folder(model)}/reward "
        f"--out {{run}}/policy {more} --checkpoint_every 0 --data {{work}}/data/questions "
        "--benchmark {work}/data/new_questions --seed {seed}"
    )

    def measure(folder: Path) -> dict[str, float]:
        evaluation = json.loads((folder / "policy/evaluation.json").read_text())
        measured = {}
        for when, prefix in (("before", "start: "), ("after", "")):
            closed = evaluation[when]["exact_match"]
            open = evaluation[when]["open_grade"]
            measured[f"{prefix}closed"] = closed
            measured[f"{prefix}open"] = open
            measured[f"{prefix}average"] = (closed + open) / 2
        lines = (folder / "policy/metrics.jsonl").read_text().splitlines()
        shares = [json.loads(line)["phantom"] for line in lines]
        measured["phantom advantage"] = sum(shares) / len(shares)
        return measured

    return Run([command], measure, (model,))


def measure_scores() -> Run:
    """Measure held-out scores as 03 does at its end, here of a step that changes nothing."""
    command = (
        "03_train.py --model {work}/full/reward --data {work}/data/train --out {run}/reward "
        "--steps 1 --learning_rate 0 --checkpoint_every 0 --workers 0 --seed {seed}"
    )
    return Run([command], lambda folder: {}, ("full",))


def choose() -> Run:
    """Let the reward model choose among eight answers of the start policy."""
    command = (
        "tests/miniature/best_of.py --model {work}/full/reward --data {work}/data/new_questions "
        "--seed {seed} --out {run}"
    )

    def measure(folder: Path) -> dict[str, float]:
        return json.loads((folder / "best_of.json").read_text())

    return Run([command], measure, ("full",))


# --------------------------------------------------------------------------------------------------
# All runs by name, and the studies that are tables of them.

# The paper's head study: VL-RewardBench overall / MM-RLHF-RewardBench accuracy
HEADS = {
    "2 silu": "76.5 / 92.9",
    "1 none": "71.2 / 87.1",
    "2 none": "71.7 / 90.0",
    "2 tanh": "74.8 / 90.1",
    "3 silu": "71.4 / 90.6",
    "4 silu": "69.1 / 88.2",
    "5 silu": "73.5 / 88.8",
}
ZERO_COEFFICIENTS = (0.001, 0.01, 0.1)
JUDGE_REQUEST = "Which is better, A or B?"
JUDGE_QUESTIONS = {"scenes": 800, "text": 200, "sampled": 280}  # pairs, mixed like the default data

RUNS = {"data": prepare(), "base": train()}
for name in HEADS:
    layers, activation = name.split()
    if name != "2 silu":  # the default, which "base" has
        RUNS[name] = train(model=f"--head_layers {layers} --head_activation {activation}")
for coefficient in ZERO_COEFFICIENTS:
    RUNS[f"zero {coefficient}"] = train(training=f"{STEPS} --zero_coefficient {coefficient}")
RUNS["length normalisation"] = train(training=f"{STEPS} --length_normalisation")
for part in (*SOURCES, "everything", "selected"):
    RUNS[f"only {part}"] = train(part)
for name in (*SIZES, *FAMILIES):
    RUNS[name] = train(backbone=folder_of_backbone(name), prepared_by="")
for name in (VLM, "LLM"):  # both have the same tokenizer
    RUNS[f"{name}, text"] = train(
        "train_text", folder_of_backbone(name), text_only=True, prepared_by=VLM
    )
RUNS["critic"] = train(model="--kind critic")
RUNS["generative"] = train(model="--kind generative")
RUNS["rationale"] = train(model="--kind generative --rationale")
RUNS["reinforced"] = reinforce()
# Trained as in the default run, for ensembles and as rewards.
RUNS["full"] = train(training="")
RUNS["second"] = train(backbone=SECOND, training="")
RUNS["language model"] = train("train_text", LANGUAGE_HALF, text_only=True, training="")
RUNS["full judge"] = train(model="--kind generative", training="")
RUNS["ensemble"] = combine()
RUNS["best of 8"] = choose()
RUNS["rule"] = improve("rule")
RUNS["hybrid"] = improve("hybrid")
# Raw scores have any scale: only the division gives the KL coefficient its usual meaning.
RUNS["model"] = improve("model", more="--advantage batch")
RUNS["judge"] = improve("model", "full judge", "--advantage batch")
RUNS["scores"] = measure_scores()
RUNS["hybrid standardised"] = improve("hybrid", "scores", "--standardise")
RUNS["hybrid group"] = improve("hybrid", more="--advantage group")
RUNS["hybrid batch"] = improve("hybrid", more="--advantage batch")

LOOK = ["new scenes", "unseen combinations", "new text", "policy answers", "mean"]
STUDIES = {
    "kind": Study(
        [*LOOK, "safety", "GFLOP a comparison", "read a comparison", "written a comparison"],
        [
            Row("naive", "base", paper="75.6 / 70.0"),
            Row("critic", "critic", paper="62.8 / 60.4"),
            Row("judge: a letter", "generative", paper="73.1 / 71.2"),
            Row("judge: a rationale and a letter", "rationale", paper="64.1 / 68.3"),
            Row("R1-Reward: that judge, reinforced", "reinforced", paper="71.4 / 76.8"),
        ],
        [
            Claim("naive as good as a judge or better", "naive", "judge: a letter"),
            Claim("naive better than a critic", "naive", "critic"),
            Claim("a judge is better at safety", "judge: a letter", "naive", "safety"),
        ],
        "VL-RewardBench / Multimodal RewardBench",
    ),
    "head": Study(
        LOOK,
        [
            Row(name.replace(" ", ", "), "base" if name == "2 silu" else name, paper=paper)
            for name, paper in HEADS.items()
        ],
        [
            Claim("2 layers with SiLU better than 2 without", "2, silu", "2, none"),
            Claim("2 layers with SiLU better than 1", "2, silu", "1, none"),
            Claim("2 layers with SiLU better than 4", "2, silu", "4, silu"),
        ],
        "VL-RewardBench / MM-RLHF",
    ),
    "regularisers": Study(
        LOOK,
        [
            Row("none", "base"),
            *(Row(f"zero-coefficient {c}", f"zero {c}") for c in ZERO_COEFFICIENTS),
            Row("length normalisation", "length normalisation"),
        ],
        [
            Claim("none better than the strongest", "none", "zero-coefficient 0.1"),
            Claim("none better than length normalisation", "none", "length normalisation"),
        ],
    ),
    "data": Study(
        LOOK,
        [
            Row("all five", "only everything"),
            Row("without the flawed two", "only selected"),
            *(Row(f"only {part}", f"only {part}") for part in SOURCES),
        ],
        [Claim("weak sets are better left out", "without the flawed two", "all five")],
    ),
    "text": Study(
        CATEGORIES,
        [
            Row("all five", "only everything"),
            Row("text alone", "only text"),
            Row("captions alone", "only captions"),
        ],
        [
            Claim("text alone teaches safety with pictures", "text alone", 0.5, "safety"),
            Claim("and mathematics", "text alone", 0.5, "mathematics"),
        ],
        compared="mathematics",
    ),
    "language": Study(
        ["new text"],
        [
            Row("multimodal backbone, text alone", f"{VLM}, text", paper="74.4"),
            Row("multimodal backbone, pictures and text", VLM, paper="74.5"),
            Row("language backbone, text alone", "LLM, text", paper="78.3"),
        ],
        [
            Claim(
                "a language backbone is better",
                "language backbone, text alone",
                "multimodal backbone, text alone",
                "new text",
            ),
            Claim(
                "text alone is as good as with pictures or better",
                "multimodal backbone, text alone",
                "multimodal backbone, pictures and text",
                "new text",
            ),
        ],
        "text average",
        compared="new text",
    ),
    "size": Study(
        LOOK,
        [
            Row("2 layers of 64", "2 layers of 64", paper="77.9 / 60.8"),
            Row("4 layers of 128", "4 layers of 128", paper="80.2 / 63.0"),
            Row("4 layers of 192", "4 layers of 192", paper="81.1 / 69.1"),
        ],
        [
            Claim("larger is better", "4 layers of 192", "2 layers of 64"),
            Claim("a little even above the middle", "4 layers of 192", "4 layers of 128"),
        ],
        "Qwen2.5-VL 3B, 7B, 32B, multimodal / text average",
    ),
    "family": Study(
        LOOK,
        [
            Row("Qwen2.5-VL", VLM, paper="80.2 / 63.0"),
            Row("InternVL3", "InternVL", paper="72.1 / 76.8"),
            Row("Qwen2-VL", "Qwen2-VL", paper="78.7 / 61.4"),
            Row("Qwen3-VL", "Qwen3-VL"),
        ],
        [
            Claim("Qwen2.5-VL better on pictures", "Qwen2.5-VL", "InternVL3", "new scenes"),
            Claim("InternVL3 better on text", "InternVL3", "Qwen2.5-VL", "new text"),
        ],
        "multimodal / text average",
    ),
    "ensemble": Study(
        LOOK,
        [
            Row("better member", "ensemble", "better: "),
            Row("first member, Qwen2.5-VL", "ensemble", "first: ", "81.0 / 74.8"),
            Row("second member, Qwen2-VL", "ensemble", "second: ", "78.1 / 81.1"),
            Row("weighted by accuracy", "ensemble", "by accuracy: ", "81.2 / 77.6"),
            Row("weighted by confidence", "ensemble", "by confidence: ", "80.4 / 77.7"),
            Row("plain mean", "ensemble", "mean: ", "82.6 / 80.7"),
            Row("plain mean, text voted", "ensemble", "mean, text voted: ", "82.6 / 82.7"),
            Row("plain mean, text routed", "ensemble", "mean, text routed: "),
        ],
        [
            Claim("the mean better than its better member", "plain mean", "better member"),
            Claim("and than weights by accuracy", "plain mean", "weighted by accuracy"),
            Claim("and than weights by confidence", "plain mean", "weighted by confidence"),
            Claim("a text-only member more", "plain mean, text voted", "plain mean", "new text"),
        ],
        "multimodal / text",
    ),
    "grpo": Study(
        ["closed", "open", "average"],
        [
            Row("rule", "rule", paper="58.5"),
            Row("start policy", "hybrid", "start: ", paper="58.3"),
            Row("start policy, best of 8 by the reward model", "best of 8", "chosen: "),
            Row("judge", "judge", paper="59.2"),
            Row("reward model", "model", paper="60.0"),
            Row("hybrid", "hybrid", paper="61.0"),
            Row("hybrid, divided by the batch's deviation", "hybrid batch"),
            Row("hybrid of standardised scores", "hybrid standardised"),
        ],
        [
            Claim("hybrid better than the rule", "hybrid", "rule", "average"),
            Claim(
                "hybrid better than the reward model",
                "hybrid, divided by the batch's deviation",
                "reward model",
                "average",
            ),
            Claim("the reward model better than the rule", "reward model", "rule", "average"),
            Claim("the reward model better than a judge", "reward model", "judge", "average"),
            Claim(
                "(not in the paper) standardised scores better than raw",
                "hybrid of standardised scores",
                "hybrid",
                "average",
            ),
        ],
        "mean of its nine columns",
        compared="average",
    ),
    "advantage": Study(
        ["closed", "open", "average", "phantom advantage"],
        [
            Row("less the group's mean", "hybrid"),
            Row("divided by the batch's deviation", "hybrid batch"),
            Row("divided by the group's deviation", "hybrid group"),
        ],
        [],
        compared="average",
    ),
}


# --------------------------------------------------------------------------------------------------
# Performing the runs.


def root() -> str:
    return f"artifacts/miniature/{hash_of_world()}"


def folder_of(run: str, seed: int) -> Path:
    return Path(root(), str(seed), name_of_folder(run))


def filled(run: str, seed: int) -> list[str]:
    folder = folder_of(run, seed)
    lines = []
    for line in RUNS[run].commands:
        line = line.format(root=root(), work=folder.parent, run=folder, seed=seed)
        lines.append(" ".join(line.split()))
    return lines


@cache
def hash_of_world() -> str:
    """Hash the texts of the world and the embedded weights: what all results depend on."""
    sys.path.insert(0, str(ROOT))
    world = importlib.import_module("01_data").embedded_world()
    texts = []
    for source, split, i in itertools.product(world.SOURCES, ("train", "new"), range(20)):
        if source != "sampled":
            texts.append(world.record(source, split, 0, i) | {"images": []})
    made_of = hashlib.sha256(repr(texts).encode())
    folder = ROOT / "tests/tiny"
    for path in [world.SAMPLED, *sorted(folder.glob("*/model.safetensors"))]:
        made_of.update(path.read_bytes())
    return made_of.hexdigest()[:16]


def make_backbone(name: str) -> None:
    folder = Path(folder_of_backbone(name).format(root=root()))
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = [*BACKBONES[name].split(), "--steps", *BACKBONE_STEPS]
    command = [sys.executable, "tests/tiny/make_tiny.py", "--out", str(folder), *options]
    with open(folder / "log.txt", "w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise RuntimeError(f"{folder}/log.txt: the backbone could not be made")
    (folder / "done").touch()


def make_backbones(runs: set[str], workers: int) -> None:
    """Make the backbones that these runs use beside the embedded one."""
    half = LANGUAGE_HALF.format(root=root())
    if not Path(half).exists():
        importlib.import_module("05_ensemble").language_half(FIRST, half)
    with ThreadPool(workers) as pool:
        pool.map(make_backbone, BACKBONES.keys() & runs, chunksize=1)


def depth(run: str) -> int:
    return max((1 + depth(needed) for needed in RUNS[run].needs), default=0)


def perform(task: tuple[str, int]) -> dict:
    """Perform one run of one seed; return its line for results.jsonl, or where its failure is."""
    name, seed = task
    sys.path.insert(0, str(ROOT))
    folder = folder_of(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = filled(name, seed)
    began = time.process_time()
    with (
        open(folder / "log.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            for line in lines:
                print(f"\n{line}\n", flush=True)
                script, *arguments = shlex.split(line)
                stage = importlib.import_module(Path(script).stem)
                importlib.import_module("01_data").start_distributed()
                parser = HfArgumentParser(stage.Settings)
                (settings,) = parser.parse_args_into_dataclasses(arguments)
                stage.main(settings)
                gc.collect()
            measured = RUNS[name].measure(folder)
        except (Exception, SystemExit):
            traceback.print_exc()
            return {"run": name, "seed": seed, "failed": str(folder / "log.txt")}
    seconds = round(time.process_time() - began, 1)  # of one core
    return {"run": name, "seed": seed, "seconds": seconds, "measured": measured, "commands": lines}


def read_results() -> dict[tuple[str, int], dict]:
    """Read {(run, seed): line of results.jsonl} where a run still has the same command lines, which
    name its world."""
    if not RESULTS.is_file():
        return {}
    results = {}
    for text in RESULTS.read_text().splitlines():
        line = json.loads(text)
        results[line["run"], line["seed"]] = line
    current = {}
    for (run, seed), line in results.items():
        if run in RUNS and line["commands"] == filled(run, seed):
            current[run, seed] = line
    return current


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    option("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    option("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    done = read_results()
    rows = [row for study in arguments.study for row in STUDIES[study].rows]
    wanted = set()

    def want(run: str, seed: int) -> None:
        wanted.add((run, seed))
        for needed in RUNS[run].needs:
            if (needed, seed) not in done or not folder_of(needed, seed).exists():
                want(needed, seed)

    for row, seed in itertools.product(rows, arguments.seeds):
        if (row.run, seed) not in done:
            want(row.run, seed)
    make_backbones({run.split(",")[0] for run, _ in wanted}, arguments.workers)
    tasks = [(run, seed) for run in RUNS for seed in arguments.seeds if (run, seed) in wanted]
    print(f"{len(tasks)} runs to do, {arguments.workers} at a time")
    failed = 0
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        # All runs of a depth end before those that need them begin.
        for level in sorted({depth(run) for run, _ in tasks}):
            ready = [(run, seed) for run, seed in tasks if depth(run) == level]
            for line in pool.imap_unordered(perform, ready):
                shown = {key: value for key, value in line.items() if key != "commands"}
                print(shown, flush=True)
                if "failed" in line:
                    failed += 1
                    continue
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(line) + "\n")
    sys.exit(f"{failed} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
