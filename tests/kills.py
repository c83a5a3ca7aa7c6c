"""Kills stages with SIGKILL at random moments, one rank or all, and compares what comes out in the end with what an
uninterrupted run makes, byte for byte.

    python tests/kills.py --kills 50 --seed 0

Printed: every kill, where it hit and what was there afterwards; then the counts. Stage 3 goes on with --resume after
every kill; stages 1 and 4 are run again."""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import forks  # noqa: E402
from safetensors import safe_open  # noqa: E402

PREPARE = ["01_data.py", "--world_size", 0.05, "--shard_size", 32]
STEPS, EVERY = 12, 2
TRAIN = [
    "03_train.py",
    "--steps",
    STEPS,
    "--checkpoint_every",
    EVERY,
    "--batch_size",
    12,
    "--warmup",
    0.5,
]
TRAIN += ["--learning_rate", 1e-3, "--validate_every", 3, "--validation_size", 32, "--resume"]
NEVER = lambda out: False


FORK = False  # by --fork: no torchrun, with ranks that need not import anything; many more kills in the same time


def start(command: list, out: Path, ranks: int = 2) -> multiprocessing.Process:
    """A stage in the background, its output in a file beside `out`."""

    def launch() -> None:
        os.chdir(forks.ROOT)
        os.environ["OMP_NUM_THREADS"] = "1"
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        arguments = [*map(str, command), "--out", str(out)]
        if FORK:
            forks.fork_ranks(ranks)
            return forks.run(arguments)
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
        os.execv(sys.executable, [*run, *arguments])

    process = multiprocessing.get_context("fork").Process(target=launch)
    process.start()
    return process


def children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def kill(process: multiprocessing.Process, everything: bool, rng: random.Random) -> None:
    """SIGKILL to torchrun and all below it, or to one rank, after which torchrun ends the others itself."""
    ranks = children(process.pid)
    victims = [process.pid, *ranks, *(each for rank in ranks for each in children(rank))]
    if not everything and ranks:
        victims = [rng.choice(ranks)]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.join(120)
    assert process.exitcode is not None, "torchrun did not end"
    for pid in victims:  # their own children are left to end by themselves
        while (
            Path(f"/proc/{pid}").exists()
            and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        ):
            time.sleep(0.01)


def run_until(
    command: list, out: Path, moment: Callable[[Path], bool], wait: float, everything: bool, rng
) -> bool:
    """Runs a stage and kills it `wait` seconds after `moment(out)` is first true. False: it had ended before."""
    process = start(command, out)
    while process.is_alive() and not moment(out):
        time.sleep(0.001)
    time.sleep(wait if process.is_alive() else 0)
    if not process.is_alive():
        if process.exitcode:
            raise SystemExit(f"{out}: failed by itself\n{Path(f'{out}.log').read_text()[-3000:]}")
        return False
    kill(process, everything, rng)
    return True


def lines_of(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def folders_in(out: Path) -> set[tuple[str, int]]:
    """Names and inodes of its checkpoints and of what is being written or removed."""
    try:
        return {(entry.name, entry.inode()) for entry in os.scandir(out / "checkpoints")}
    except FileNotFoundError:
        return set()


def moments(
    stage: str, out: Path, rng: random.Random, of: list
) -> tuple[str, Callable[[Path], bool], float]:
    """What to wait for, one of those named, and how long then."""
    if stage != "03":
        return "any moment", lambda out: True, rng.uniform(0, 15)
    there, steps = lines_of(out), rng.randint(1, 5)
    before = folders_in(out)
    new = lambda start: any(name.startswith(start) for name, _ in folders_in(out) - before)
    known = {
        "start": (lambda out: True, rng.uniform(0, 12)),
        "a step": (
            lambda out: (
                lines_of(out) not in (there, 0) and lines_of(out) >= min(there + steps, STEPS)
            ),
            0.15,
        ),
        "a checkpoint": (lambda out: new(".writing_"), 0.04),
        "its renaming": (lambda out: new("step_"), 0.003),
        "the removal of an old one": (lambda out: new(".old_"), 0.001),
        "export": (lambda out: (out / ".writing").exists(), 0.06),
        "renaming in the export": (
            lambda out: (out / ".writing/reward_head.safetensors").exists(),
            0.004,
        ),
    }
    name = rng.choice(of or list(known))
    moment, longest = known[name]
    return name, moment, rng.uniform(0, longest)


def checkpoints_of(out: Path, files: int | None = 2) -> list[int]:
    """The steps of its checkpoints, each of which has to be whole; of one from `files` ranks."""
    steps = []
    for folder in sorted(out.glob("checkpoints/step_*")):
        run = json.loads((folder / "run.json").read_text())
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        assert sizes == run["files"] and len(sizes) == (files or len(sizes)), (
            f"{folder} is not whole"
        )
        steps.append(run["step"])
    return steps


def results_of(out: Path) -> dict[str, bytes]:
    """What must not differ: files, of the log what is no time, and of checkpoints the tensors, which may stand in the
    file of one rank or another."""
    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name == "run.json":  # names its folder
            continue
        name, content = str(path.relative_to(out)), path.read_bytes()
        if name.startswith("checkpoints/step_"):
            with safe_open(path, framework="np") as file:
                begins = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for key in file.keys():
                    where = f"{path.parent.name}: {key} from {begins[key]['saved_offsets']}"
                    found[where] = file.get_tensor(key).tobytes()
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            timeless = [
                {key: value for key, value in line.items() if "seconds" not in key}
                for line in lines
            ]
            content = json.dumps(timeless).encode()
        if path.name == "cost.json":
            costs = json.loads(content).items()
            content = json.dumps([[name, {**cost, "seconds": 0}] for name, cost in costs]).encode()
        found[name] = content
    return found


def compare(stage: str, out: Path, whole: dict[str, bytes]) -> None:
    found = results_of(out)
    differ = sorted(
        name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)
    )
    if differ:
        raise SystemExit(f"stage {stage} after kills: {', '.join(differ)} differ")


def torture(
    stage: str, command: list, folder: Path, kills: int, rng: random.Random, of: list
) -> Counter:
    """Kills a stage `kills` times, at most five times before it may end and is compared; returns counts."""
    whole = folder / f"whole_{stage}"
    run_until(command, whole, NEVER, 0, True, rng)
    whole, counts, out = results_of(whole), Counter(), folder / f"killed_{stage}"
    hits = 0  # since the last comparison
    while counts["kills"] < kills or hits:
        if hits == 5 or counts["kills"] == kills:
            run_until(command, out, NEVER, 0, True, rng)
            compare(stage, out, whole)
            counts["compared, identical"] += 1
            shutil.rmtree(out)
            hits = 0
            continue
        everything = rng.random() < 0.5
        name, moment, wait = moments(stage, out, rng, of)
        before = checkpoints_of(out)
        if not run_until(command, out, moment, wait, everything, rng):
            compare(stage, out, whole)
            counts["compared, identical"] += 1
            counts["ended before the kill"] += 1
            shutil.rmtree(out)
            hits = 0
            continue
        after = checkpoints_of(out)
        if before and (not after or after[-1] < before[-1]):
            raise SystemExit(
                f"checkpoints {before} became {after}\n{Path(f'{out}.log').read_text()[-3000:]}"
            )
        hits += 1
        counts["kills"] += 1
        counts[f"in {name}"] += 1
        counts["of all ranks" if everything else "of one rank"] += 1
        print(
            f"{stage}: killed {'all' if everything else 'one'} in {name}; checkpoints {after}",
            flush=True,
        )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", default=[], help="of stage 3, by name; none: all")
    parser.add_argument(
        "--fork", action="store_true", help="no torchrun: ranks are forked from this process"
    )
    asked = parser.parse_args()
    if asked.fork:
        global FORK
        FORK = True
        forks.import_stages()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run_until(PREPARE, folder / "data", NEVER, 0, True, rng)
        model = ["02_model.py", "--data", folder / "data/train"]
        run_until(model, folder / "model", NEVER, 0, True, rng)
        train = [*TRAIN, "--model", folder / "model", "--data", folder / "data/train"]
        score = [
            "04_eval.py",
            "--model",
            folder / "model",
            "--benchmark",
            folder / "data/new_scenes",
        ]
        few = asked.kills // 8
        for stage, command, kills in (
            ("03", train, asked.kills - 2 * few),
            ("01", PREPARE, few),
            ("04", score, few),
        ):
            if kills:
                began = time.time()
                counts = torture(stage, command, folder, kills, rng, asked.moments)
                print(f"stage {stage}, {time.time() - began:.0f} s: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
