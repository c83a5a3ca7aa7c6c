"""Run the default pipeline, all six stages with no option but --seed; print the README's numbers.

    python tests/measure.py                  # seeds 0, 1 and 2; leave the rest of the machine idle
    python tests/measure.py --seeds 0 --out results.json

Each run uses a copy of the project in a temporary folder.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("new_scenes", "unseen_combinations", "new_text")


def run(seed: int, ranks: int) -> dict:
    """Run the pipeline once; return the seconds of each stage and its results in percent."""
    scripts = sorted(path.name for path in ROOT.glob("0*.py"))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for script in scripts:
            shutil.copy(ROOT / script, folder)
        shutil.copytree(ROOT / "tests/tiny", Path(folder, "tests/tiny"))
        for script in scripts:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}", script]
            if script == "05_ensemble.py":  # its member differs from that of 03
                command += ["--seed", str(seed + 1)]
            elif script != "04_eval.py":  # which has no seed
                command += ["--seed", str(seed)]
            began = time.perf_counter()
            subprocess.run(
                command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            seconds[script] = time.perf_counter() - began
        artifacts = Path(folder, "artifacts")
        scores = json.loads((artifacts / "scores/reward/summary.json").read_text())
        ensemble = json.loads((artifacts / "ensemble/summary.json").read_text())["benchmarks"]
        policy = json.loads((artifacts / "policy/evaluation.json").read_text())
    seconds["all"] = sum(seconds.values())
    accuracy = {system: {} for system in ("longer wins", *ensemble["new_text"])}
    for benchmark in BENCHMARKS:
        systems = scores[benchmark] | ensemble[benchmark]
        for system in accuracy.keys() & systems.keys():
            accuracy[system][benchmark] = 100 * systems[system]["overall"]["accuracy"]
    grades = {}
    for when in ("before", "after"):
        grades[f"policy {when}"] = {
            kind: 100 * policy[when][kind] for kind in ("exact_match", "open_grade")
        }
    return {"seed": seed, "accuracy": accuracy, "policy": grades, "seconds": seconds}


def cell(values: list[float]) -> str:
    """Print the mean over the seeds, with the smallest and the largest value."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"


def table(title: str, results: list[dict]) -> str:
    """Print results with the same names as Markdown, rows down and columns across."""
    rows = list(results[0])
    columns = list(dict.fromkeys(name for row in results[0].values() for name in row))
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    for row in rows:
        line = [row]
        for column in columns:
            line.append(cell([result[row][column] for result in results if column in result[row]]))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", default="", help="also write the results to this JSON file")
    arguments = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # as a user would: torchrun sets one thread a rank
    results = [run(seed, arguments.ranks) for seed in arguments.seeds]
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))
    print(table("percent", [result["accuracy"] for result in results]))
    print(table("percent", [result["policy"] for result in results]))
    print(table("seconds", [{"a stage": result["seconds"]} for result in results]))


if __name__ == "__main__":
    main()
