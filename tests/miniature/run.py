"""The paper's studies in miniature: every run of every study, over five seeds, in the embedded world.

    python tests/miniature/run.py                            # all that is not in results.jsonl yet
    python tests/miniature/run.py --study head --seeds 0 1
    python tests/miniature/tables.py                         # the README's tables, from results.jsonl

In    Nothing: the data of each seed is made first.
Out   artifacts/miniature/<seed>/<run>/, what the stages write, and log.txt, what they print; results.jsonl beside this
      file, a line for each run and seed with the command lines that made it. A run whose line is there, with the same
      command lines, is not repeated.

A run is a list of command lines of the six scripts. Worker processes of one rank and one thread each perform them in
turn, in the order of RUNS, so that what a run uses of another is there.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).with_name("results.jsonl")
BENCHMARKS = ("new_scenes", "unseen_combinations", "new_text")


@dataclass
class Run:
    """`commands`, in which {work} is the seed's folder, {run} the run's own and {seed} the seed; `measure` reads
    {what: share} from the run's folder; `needs` names the runs whose artifacts it uses."""

    commands: list[str]
    measure: Callable[[Path], dict[str, float]]
    needs: tuple[str, ...] = ("data",)


class Row(NamedTuple):
    """A row of a study's table."""

    label: str
    run: str
    part: str = ""  # what stands before a column's name in what the run measured
    paper: str = ""  # the paper's figures


@dataclass
class Study:
    """One of the paper's questions."""

    columns: list[str]  # of what was measured
    rows: list[Row]
    paper: str = ""  # what the paper's figures are


# ---------------------------------------------------------------------------------------------------------------------
# What runs are made of.

SOURCES = (
    "scenes",
    "captions",
    "noisy",
    "wordy",
    "text",
)  # of the world; each alone is 3,200 comparisons
SELECTED = {"scenes": 2400, "captions": 160, "text": 640}  # without the two flawed ones
STEPS = "--steps 80"  # of 64 comparisons: half of the default data once, a quarter of the default training
LANGUAGE_HALF = "artifacts/miniature/language_half"
SIZES = {
    f"{depth} layers of {width}": f"--width {width} --depth {depth}"
    for width, depth in ((64, 2), (128, 4), (192, 6))
}
FAMILIES = {
    "Qwen2-VL": "--family qwen2_vl",
    "Qwen3-VL": "--family qwen3_vl",
    "InternVL": "--family internvl",
}
# Each is pretrained for a quarter of the steps of the embedded one.
BACKBONES = SIZES | FAMILIES | {"LLM": "--family qwen2"}
VLM = "4 layers of 128"  # of the embedded backbone's size


def name_of_folder(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def folder_of_backbone(name: str) -> str:
    return f"artifacts/miniature/{name_of_folder(name)}"


def scored_on(benchmarks: tuple[str, ...], folder: str = "{work}/data") -> str:
    return " ".join(f"--benchmark {folder}/{name}" for name in benchmarks)


def by_benchmark(found: dict, system: str) -> dict[str, float]:
    """A system's overall accuracy on each benchmark of a summary, and their mean."""
    shares = {name.replace("_", " "): found[name][system]["overall"]["accuracy"] for name in found}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def prepare() -> Run:
    """The default data sets, each of the world's sources alone, and two mixtures of the same size."""
    sets = {part: f"--source world:{part}@3200" for part in SOURCES}
    sets["selected"] = " ".join(
        f"--source world:{part}@{count}" for part, count in SELECTED.items()
    )
    sets["everything"] = " ".join(
        f"--source world:{part}@{3200 // len(SOURCES)}" for part in SOURCES
    )
    lines = ["", *(f"{given} --name {name} --holdout 0" for name, given in sets.items())]
    return Run(
        [f"01_data.py {line} --seed {{seed}} --out {{work}}/data" for line in lines],
        lambda folder: {},
        (),
    )


def train(
    data: str = "train",
    backbone: str = "tests/tiny",
    model: str = "",
    training: str = "",
    text_only: bool = False,
    prepared_by: str = "data",
) -> Run:
    """A reward model and its scores; `model` and `training` are more arguments of 02 and 03. The data are those of the
    run `prepared_by`; with '', for a backbone with a tokenizer of its own, this one prepares them."""
    benchmarks, folder, lines, needs = (
        ("new_text",) if text_only else BENCHMARKS,
        "{work}/data",
        [],
        (prepared_by,),
    )
    if not prepared_by:
        folder, needs = "{run}/data", ()
        lines = [f"01_data.py --backbone {backbone} --seed {{seed}} --out {folder}"]
    elif prepared_by != "data":
        folder = f"{{work}}/{name_of_folder(prepared_by)}/data"
    lines += [
        f"02_model.py --backbone {backbone} --data {folder}/{data} --out {{run}}/model --seed {{seed}} {model}",
        f"03_train.py --model {{run}}/model --data {folder}/{data} --out {{run}}/reward --seed {{seed}} "
        f"--validation= --validate_every 0 --checkpoint_every 0 --workers 0 {STEPS} {training}",
        f"04_eval.py --model {{run}}/reward --out {{run}}/scores {scored_on(benchmarks, folder)}",
    ]
    return Run(lines, accuracies, needs)


def accuracies(folder: Path) -> dict[str, float]:
    """Overall accuracies; with pictures also the cost, and the mean of Acc+ on the two benchmarks that have groups."""
    found = json.loads((folder / "scores/reward/summary.json").read_text())
    measured = by_benchmark(found, "reward")
    if "new_scenes" in found:
        cost = json.loads((folder / "scores/reward/cost.json").read_text())["new_scenes"]
        measured |= {f"{what} a comparison": cost[what] for what in ("GFLOP", "read", "written")}
        measured["Acc+"] = (
            sum(found[name]["reward"]["Acc+"]["accuracy"] for name in BENCHMARKS[:2]) / 2
        )
    return measured


def combine() -> Run:
    """Two members of different data and a text-only one, trained as 05 does without --member, and all combinations."""
    members = "--member {work}/base/reward --member {work}/other/reward --text_member {work}/language_model/reward"
    line = f"05_ensemble.py {members} --heldout {{work}}/data/train_holdout --out {{run}} {scored_on(BENCHMARKS)}"

    def measure(folder: Path) -> dict[str, float]:
        found = json.loads((folder / "summary.json").read_text())["benchmarks"]
        first, second = list(found[BENCHMARKS[0]])[:2]  # the members, as --member names them
        systems = {"first": first, "second": second}
        systems |= {
            name: name for name in ("mean", "by accuracy", "by confidence", "mean, text routed")
        }
        measured = {}
        for system, key in systems.items():
            measured |= {
                f"{system}: {name}": share for name, share in by_benchmark(found, key).items()
            }
        return measured

    return Run([line], measure, ("base", "other", "language model"))


def improve(reward: str, model: str = "base", advantage: str = "centred") -> Run:
    """A policy trained by GRPO with the reward model of another run."""
    line = f"06_grpo.py --reward {reward} --model {{work}}/{model}/reward --out {{run}}/policy "
    line += f"--advantage {advantage} "
    line += "--data {work}/data/questions --benchmark {work}/data/new_questions --seed {seed}"

    def measure(folder: Path) -> dict[str, float]:
        found = json.loads((folder / "policy/evaluation.json").read_text())
        measured = {}
        for when, prefix in (("before", "start: "), ("after", "")):
            closed, open = found[when]["exact_match"], found[when]["open_grade"]
            measured |= {
                f"{prefix}closed": closed,
                f"{prefix}open": open,
                f"{prefix}average": (closed + open) / 2,
            }
        steps = list(map(json.loads, (folder / "policy/metrics.jsonl").read_text().splitlines()))
        measured["phantom advantage"] = sum(step["phantom"] for step in steps) / len(steps)
        return measured

    return Run([line], measure, (model,))


# ---------------------------------------------------------------------------------------------------------------------
# All runs by name, in their order, and the studies that are tables of them.

# The paper's head study: VL-RewardBench overall / MM-RLHF-RewardBench accuracy
HEADS = {"1 none": "71.2 / 87.1"} | {
    f"{n} {a}": "" for n in (2, 3, 4, 5) for a in ("none", "tanh", "silu")
}
HEADS |= {
    "2 none": "71.7 / 90.0",
    "2 tanh": "74.8 / 90.1",
    "2 silu": "76.5 / 92.9",
    "3 silu": "71.4 / 90.6",
}
HEADS |= {"4 silu": "69.1 / 88.2", "5 silu": "73.5 / 88.8"}


def head(name: str) -> str:
    return "--head_layers {} --head_activation {}".format(*name.split())


RUNS = {"data": prepare(), "base": train()}
RUNS |= {name: train(model=head(name)) for name in HEADS if name != "2 silu"}
RUNS |= {f"zero {c}": train(training=f"--zero_coefficient {c}") for c in (0.001, 0.01, 0.1)}
RUNS |= {"length normalisation": train(training="--length_normalisation")}
RUNS |= {f"only {part}": train(part) for part in (*SOURCES, "everything", "selected")}
RUNS |= {
    name: train(backbone=folder_of_backbone(name), prepared_by="") for name in (*SIZES, *FAMILIES)
}
for name in (VLM, "LLM"):  # which have the same tokenizer
    RUNS[f"{name}, text"] = train(
        "train_text", folder_of_backbone(name), text_only=True, prepared_by=VLM
    )
RUNS |= {
    "other": train("train_other"),
    "language model": train("train_text", LANGUAGE_HALF, text_only=True),
}
RUNS |= {"critic": train(model="--kind critic"), "generative": train(model="--kind generative")}
RUNS |= {"ensemble": combine()}
RUNS |= {reward: improve(reward) for reward in ("rule", "hybrid")}
# Raw scores have any scale, and the KL coefficient means the same beside them only once they are divided by something.
RUNS |= {
    "model": improve("model", advantage="batch"),
    "judge": improve("model", "generative", "batch"),
}
RUNS |= {f"hybrid {scale}": improve("hybrid", advantage=scale) for scale in ("group", "batch")}

LOOK = ["new scenes", "unseen combinations", "new text", "mean", "Acc+"]
STUDIES = {
    "kind": Study(
        [*LOOK, "GFLOP a comparison", "read a comparison", "written a comparison"],
        [Row("naive", "base"), Row("critic", "critic"), Row("generative", "generative")],
    ),
    "head": Study(
        LOOK,
        [
            Row(name.replace(" ", ", "), "base" if name == "2 silu" else name, paper=HEADS[name])
            for name in HEADS
        ],
        "VL-RewardBench / MM-RLHF",
    ),
    "regularisers": Study(
        LOOK,
        [
            Row("none", "base"),
            *(Row(f"zero-coefficient {c}", f"zero {c}") for c in (0.001, 0.01, 0.1)),
        ]
        + [Row("length normalisation", "length normalisation")],
    ),
    "data": Study(
        LOOK,
        [Row(f"only {part}", f"only {part}") for part in SOURCES]
        + [Row("all five", "only everything"), Row("without the flawed two", "only selected")],
    ),
    "text": Study(
        ["new text"],
        [
            Row("multimodal backbone, pictures and text", VLM),
            Row("multimodal backbone, text alone", f"{VLM}, text"),
            Row("language backbone, text alone", "LLM, text"),
        ],
        "text average",
    ),
    "size": Study(LOOK, [Row(size, size) for size in SIZES]),
    "family": Study(
        LOOK,
        [
            Row("Qwen2.5-VL", VLM, paper="81.0 / 74.8"),
            Row("InternVL3", "InternVL", paper="78.1 / 81.1"),
        ]
        + [Row(name, name) for name in ("Qwen2-VL", "Qwen3-VL")],
        "multimodal / text average",
    ),
    "ensemble": Study(
        ["new scenes", "unseen combinations", "new text", "mean"],
        [
            Row("first member", "ensemble", "first: ", "81.0 / 74.8"),
            Row("second member, other data", "ensemble", "second: ", "78.1 / 81.1"),
            Row("weighted by accuracy", "ensemble", "by accuracy: ", "81.2 / 77.6"),
            Row("weighted by confidence", "ensemble", "by confidence: ", "80.4 / 77.7"),
            Row("plain mean", "ensemble", "mean: ", "82.6 / 80.7"),
            Row(
                "plain mean, text to the text-only model",
                "ensemble",
                "mean, text routed: ",
                "82.6 / 82.7",
            ),
        ],
        "multimodal / text",
    ),
    "grpo": Study(
        ["closed", "open", "average"],
        [
            Row("start policy", "hybrid", "start: "),
            Row("rule", "rule"),
            Row("generative judge", "judge"),
        ]
        + [Row("reward model", "model"), Row("hybrid", "hybrid")],
    ),
    "advantage": Study(
        ["closed", "open", "average", "phantom advantage"],
        [
            Row("less the group's mean", "hybrid"),
            Row("divided by the batch's deviation", "hybrid batch"),
        ]
        + [Row("divided by the group's deviation", "hybrid group")],
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Performing them.


def folder_of(run: str, seed: int) -> Path:
    return Path("artifacts/miniature", str(seed), name_of_folder(run))


def filled(run: str, seed: int) -> list[str]:
    folder = folder_of(run, seed)
    lines = [line.format(work=folder.parent, run=folder, seed=seed) for line in RUNS[run].commands]
    return [" ".join(line.split()) for line in lines]


def make_backbone(name: str) -> None:
    folder = Path(folder_of_backbone(name))
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = [*BACKBONES[name].split(), "--steps", "300", "100"]
    command = [sys.executable, "tests/tiny/make_tiny.py", "--out", str(folder), *options]
    with open(folder / "log.txt", "w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            sys.exit(f"{folder}/log.txt: the backbone could not be made")
    (folder / "done").touch()


def make_backbones(runs: set[str], workers: int) -> None:
    """The backbones that these runs use beside the embedded one."""
    if not Path(LANGUAGE_HALF).exists():
        importlib.import_module("05_ensemble").language_half("tests/tiny", LANGUAGE_HALF)
    with ThreadPool(workers) as pool:
        pool.map(make_backbone, BACKBONES.keys() & runs, chunksize=1)


def depth(run: str) -> int:
    return max((1 + depth(needed) for needed in RUNS[run].needs), default=0)


def perform(task: tuple[str, int]) -> dict:
    """One run of one seed, in this process; the line for results.jsonl, or the run's name and what went wrong."""
    name, seed = task
    sys.path.insert(0, str(ROOT))
    folder = folder_of(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines, began = filled(name, seed), time.process_time()
    with (
        open(folder / "log.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            for line in lines:
                print(f"\n{line}\n", flush=True)
                script, *arguments = line.split()
                stage = importlib.import_module(script.removesuffix(".py"))
                importlib.import_module("01_data").start_distributed()
                stage.main(
                    HfArgumentParser(stage.Settings).parse_args_into_dataclasses(arguments)[0]
                )
                gc.collect()
            measured = RUNS[name].measure(folder)
        except (Exception, SystemExit):
            traceback.print_exc()
            return {"run": name, "seed": seed, "failed": str(folder / "log.txt")}
    seconds = round(time.process_time() - began, 1)  # of one core
    return {"run": name, "seed": seed, "seconds": seconds, "measured": measured, "commands": lines}


def read_results() -> dict[tuple[str, int], dict]:
    """The lines of results.jsonl whose command lines are still those of their run, {(run, seed): line}."""
    lines = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.is_file() else ()
    found = {(line["run"], line["seed"]): line for line in lines}
    return {
        at: line for at, line in found.items() if at[0] in RUNS and line["commands"] == filled(*at)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    done, failed = read_results(), 0
    rows = [run for study in arguments.study for _, run, *_ in STUDIES[study].rows]
    wanted = set()

    def want(run: str, seed: int) -> None:
        wanted.add((run, seed))
        for needed in RUNS[run].needs:
            if (needed, seed) not in done or not folder_of(needed, seed).exists():
                want(needed, seed)

    for run, seed in itertools.product(rows, arguments.seeds):
        if (run, seed) not in done:
            want(run, seed)
    make_backbones({run.split(",")[0] for run, _ in wanted}, arguments.workers)
    tasks = [(run, seed) for run in RUNS for seed in arguments.seeds if (run, seed) in wanted]
    print(f"{len(tasks)} runs to do, {arguments.workers} at a time")
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for level in sorted(
            {depth(run) for run, _ in tasks}
        ):  # what a run needs is done before it begins
            for line in pool.imap_unordered(
                perform, [task for task in tasks if depth(task[0]) == level]
            ):
                failed += "failed" in line
                print({key: value for key, value in line.items() if key != "commands"}, flush=True)
                if "failed" not in line:
                    with open(RESULTS, "a") as file:
                        file.write(json.dumps(line) + "\n")
    sys.exit(f"{failed} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
