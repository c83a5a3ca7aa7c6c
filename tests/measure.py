"""Runs the default pipeline, all six stages with no argument but --seed, and prints what the README claims.

    python tests/measure.py                       # seeds 0, 1 and 2; keep everything else on the machine still
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
BENCHMARKS = ("new_scenes", "unseen_combinations", "new_text")


def run(seed: int, ranks: int) -> dict:
    """One default run; the seconds of each stage and its results in percent."""
    with tempfile.TemporaryDirectory() as folder:
        for script in sorted(ROOT.glob("0*.py")):
            shutil.copy(script, folder)
        shutil.copytree(ROOT / "tests/tiny", Path(folder, "tests/tiny"))
        result = {"seed": seed}
        for script in sorted(path.name for path in ROOT.glob("0*.py")):
            began = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={ranks}",
                script,
            ]
            command += (
                [] if script == "04_eval.py" else ["--seed", str(seed + 1 if script == "05_ensemble.py" else seed)]
            )
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            result[f"seconds {script[:2]}"] = time.perf_counter() - began
        result["seconds all"] = sum(value for key, value in result.items() if key.startswith("seconds"))
        artifacts = Path(folder, "artifacts")
        scores = json.loads((artifacts / "scores/reward/summary.json").read_text())
        ensemble = json.loads((artifacts / "ensemble/summary.json").read_text())["benchmarks"]
        evaluation = json.loads((artifacts / "policy/evaluation.json").read_text())
    for benchmark in BENCHMARKS:
        for system in ("reward", "longer wins"):
            result[f"{benchmark}: {system}"] = 100 * scores[benchmark][system]["overall"]["accuracy"]
        for system, metrics in ensemble[benchmark].items():
            if system != "reward":
                result[f"{benchmark}: {system}"] = 100 * metrics["overall"]["accuracy"]
    for when in ("before", "after"):
        for metric in ("exact_match", "open_grade"):
            result[f"policy {metric} {when}"] = 100 * evaluation[when][metric]
    return result


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
    print("| " + " | ".join(["", *(f"seed {seed}" for seed in arguments.seeds), "mean"]) + " |")
    print("|" + "---|" * (len(results) + 2))
    for key in results[0]:
        if key != "seed":
            values = [result[key] for result in results]
            print(f"| {key} | " + " | ".join(f"{value:.1f}" for value in [*values, statistics.mean(values)]) + " |")


if __name__ == "__main__":
    main()
