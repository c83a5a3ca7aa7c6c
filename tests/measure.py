"""Run the default pipeline, all six stages with --seed, and print the figures of the README.

    python tests/measure.py                       # seeds 0, 1 and 2, on an otherwise idle machine
    python tests/measure.py --seeds 0 --out results.json

Each run happens in a copy of the project in a temporary folder, so nothing here is touched.
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
BENCHMARKS = ("new_scenes", "unseen_combinations", "new_text", "policy_answers")


def run(seed: int, ranks: int) -> dict:
    """One default run; the seconds of each stage and its results in percent."""
    with tempfile.TemporaryDirectory() as folder:
        for script in sorted(ROOT.glob("0*.py")):
            shutil.copy(script, folder)
        shutil.copytree(ROOT / "tests/tiny", Path(folder, "tests/tiny"))
        seconds = {}
        for script in sorted(path.name for path in ROOT.glob("0*.py")):
            began = time.perf_counter()
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}", script]
            if script != "04_eval.py":  # which has no seed
                command += ["--seed", str(seed + (script == "05_ensemble.py"))]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            subprocess.run(command, cwd=folder, check=True, **quiet)
            seconds[script] = time.perf_counter() - began
        artifacts = Path(folder, "artifacts")
        scores = json.loads((artifacts / "scores/reward/summary.json").read_text())
        ensemble = json.loads((artifacts / "ensemble/summary.json").read_text())["benchmarks"]
        policy = json.loads((artifacts / "policy/evaluation.json").read_text())
    accuracy = {}
    for system in ("longer wins", *ensemble["new_text"]):
        accuracy[system] = {}
        for name in BENCHMARKS:
            systems = scores[name] | ensemble[name]
            if system in systems:
                accuracy[system][name] = 100 * systems[system]["overall"]["accuracy"]
    grades = {}
    for when in ("before", "after"):
        kinds = ("exact_match", "open_grade")
        grades[f"policy {when}"] = {kind: 100 * policy[when][kind] for kind in kinds}
    return {
        "seed": seed,
        "accuracy": accuracy,
        "policy": grades,
        "seconds": seconds | {"all": sum(seconds.values())},
    }


def cell(values: list[float]) -> str:
    """The mean over the seeds, with the smallest and the largest."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"


def table(title: str, results: list[dict]) -> str:
    """Format {row: {column: value}} of several runs as one Markdown table."""
    columns = list(dict.fromkeys(name for row in results[0].values() for name in row))
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    for row in results[0]:
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
