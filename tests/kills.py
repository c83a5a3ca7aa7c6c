"""Kill stages with SIGKILL at random moments, one rank or all, and compare the results with those
of an uninterrupted run, byte for byte.

    python tests/kills.py --kills 50 --seed 0

Prints every kill, where it hit and which checkpoints were there afterwards; then the counts. Stage
3 goes on with --resume after every kill; stages 1 and 4 are run again."""

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
STEPS = 8
TRAIN = ["03_train.py", "--steps", STEPS, "--checkpoint_every", 2, "--batch_size", 12, "--resume"]
TRAIN += ["--warmup", 0.5, "--learning_rate", 1e-3, "--validate_every", 3, "--validation_size", 32]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
FORK = False  # by --fork: no torchrun, with ranks that need not import anything; much faster


def start(command: list, out: Path, ranks: int = 2) -> multiprocessing.Process:
    """Start a stage in the background, its output in a file beside `out`."""

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
        torchrun = [sys.executable, *TORCHRUN, f"--nproc_per_node={ranks}"]
        os.execv(sys.executable, [*torchrun, *arguments])

    process = multiprocessing.get_context("fork").Process(target=launch)
    process.start()
    return process


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kill(process: multiprocessing.Process, everything: bool, rng: random.Random) -> None:
    """SIGKILL torchrun and all below it, or one rank, after which torchrun ends the others."""
    ranks = children(process.pid)
    victims = [process.pid, *ranks]
    for rank in ranks:
        victims += children(rank)
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
        while is_running(pid):
            time.sleep(0.01)


def run_until(command: list, out: Path, moment: Callable, wait: float, everything: bool, rng):
    """Run a stage and kill it `wait` seconds after `moment(out)` is first true.

    Return False where it had ended before."""
    process = start(command, out)
    while process.is_alive() and not moment(out):
        time.sleep(0.001)
    time.sleep(wait if process.is_alive() else 0)
    if process.is_alive():
        kill(process, everything, rng)
        return True
    if process.exitcode:
        raise SystemExit(f"{out}: failed by itself\n{Path(f'{out}.log').read_text()[-3000:]}")
    return False


def run_to_the_end(command: list, out: Path) -> None:
    run_until(command, out, lambda out: False, 0, True, None)


def lines_of(out: Path) -> int:
    """Lines of metrics.jsonl."""
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def folders_in(out: Path) -> set[tuple[str, int]]:
    """Names and inodes of the checkpoints and of what is being written or removed."""
    try:
        return {(entry.name, entry.inode()) for entry in os.scandir(out / "checkpoints")}
    except FileNotFoundError:
        return set()


def choose_moment(stage: str, out: Path, rng: random.Random, names: list) -> tuple:
    """Choose when to kill: a name, a function that waits for it, and seconds after that."""
    if stage != "03":
        return "any moment", lambda out: True, rng.uniform(0, 15)
    logged = lines_of(out)
    target = min(logged + rng.randint(1, 5), STEPS)
    before = folders_in(out)

    def new_folder(prefix: str) -> Callable:
        return lambda out: any(name.startswith(prefix) for name, _ in folders_in(out) - before)

    moments = {  # name: function of `out`, longest wait
        "start": (lambda out: True, 12),
        "a step": (lambda out: lines_of(out) not in (logged, 0) and lines_of(out) >= target, 0.15),
        "a checkpoint": (new_folder(".writing_"), 0.04),
        "its renaming": (new_folder("step_"), 0.003),
        "the removal of an old one": (new_folder(".old_"), 0.001),
        "export": (lambda out: (out / ".writing").exists(), 0.06),
        "its renamings": (lambda out: (out / ".writing/reward_head.safetensors").exists(), 0.004),
    }
    name = rng.choice(names or list(moments))
    moment, longest = moments[name]
    return name, moment, rng.uniform(0, longest)


def checkpoints_of(out: Path, ranks: int = 2) -> list[int]:
    """Steps of the checkpoints. Each has to be whole: run.json, and a file of each rank."""
    steps = []
    for folder in sorted(out.glob("checkpoints/step_*")):
        step = json.loads((folder / "run.json").read_text())["step"]
        assert folder.name == f"step_{step:06d}"
        files = list(folder.glob("*.safetensors"))
        assert len(files) == ranks, f"{folder} is not whole"
        for file in files:
            safe_open(file, framework="np")  # compares its size with what its header declares
        steps.append(step)
    return steps


def results_of(out: Path) -> dict[str, bytes]:
    """Read what must not differ: files, the log without times, and the tensors of checkpoints,
    which may stand in the file of one rank or another."""
    results = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name == "run.json":  # names its folder
            continue
        name = str(path.relative_to(out))
        content = path.read_bytes()
        if "DCP_SHARDING_INFO" in str(content[: 2**20]) and path.parent.name.startswith("step_"):
            with safe_open(path, framework="np") as file:
                begins = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for key in file.keys():
                    place = f"{path.parent.name}: {key} from {begins[key]['saved_offsets']}"
                    results[place] = file.get_tensor(key).tobytes()
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            for line in lines:
                line.pop("seconds"), line.pop("data_seconds", None)
            content = json.dumps(lines).encode()
        if path.name == "cost.json":
            costs = json.loads(content)
            for cost in costs.values():
                cost.pop("seconds")
            content = json.dumps(costs).encode()
        results[name] = content
    return results


def compare(stage: str, out: Path, expected: dict[str, bytes]) -> None:
    results = results_of(out)
    names = sorted(expected.keys() | results.keys())
    differ = [name for name in names if expected.get(name) != results.get(name)]
    if differ:
        raise SystemExit(f"stage {stage} after kills: {', '.join(differ)} differ")
    shutil.rmtree(out)


def torture(stage: str, command: list, folder: Path, kills: int, rng, names: list) -> Counter:
    """Kill a stage `kills` times, at most five times before it may end and is compared."""
    whole = folder / f"whole_{stage}"
    run_to_the_end(command, whole)
    expected = results_of(whole)
    counts = Counter()
    out = folder / f"killed_{stage}"
    hits = 0  # since the last comparison
    while counts["kills"] < kills or hits:
        if hits == 5 or counts["kills"] == kills:
            run_to_the_end(command, out)
            compare(stage, out, expected)
            counts["compared, identical"] += 1
            hits = 0
            continue
        everything = rng.random() < 0.5
        name, moment, wait = choose_moment(stage, out, rng, names)
        before = checkpoints_of(out)
        if not run_until(command, out, moment, wait, everything, rng):
            compare(stage, out, expected)
            counts["compared, identical"] += 1
            counts["ended before the kill"] += 1
            hits = 0
            continue
        after = checkpoints_of(out)
        if before and (not after or after[-1] < before[-1]):
            log = Path(f"{out}.log").read_text()[-3000:]
            raise SystemExit(f"checkpoints {before} became {after}\n{log}")
        hits += 1
        victims = "all ranks" if everything else "one rank"
        counts.update(["kills", f"in {name}", f"of {victims}"])
        print(f"{stage}: killed {victims} in {name}; checkpoints {after}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", default=[], help="of stage 3, by name; none: all")
    parser.add_argument("--fork", action="store_true", help="fork ranks from here, no torchrun")
    parser.add_argument("--data", type=Path, help="prepared by 01; none: prepare it")
    parser.add_argument("--model", help="made by 02; none: make it")
    arguments = parser.parse_args()
    if arguments.fork:
        global FORK
        FORK = True
        forks.import_stages()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, model = arguments.data, arguments.model
        if not data:
            run_to_the_end(PREPARE, data := folder / "data")
        if not model:
            run_to_the_end(["02_model.py", "--data", data / "train"], model := folder / "model")
        train = [*TRAIN, "--model", model, "--data", data / "train"]
        score = ["04_eval.py", "--model", model, "--benchmark", data / "new_scenes"]
        few = arguments.kills // 8
        stages = [("03", train, arguments.kills - 2 * few), ("01", PREPARE, few)]
        for stage, command, kills in [*stages, ("04", score, few)]:
            if kills:
                began = time.time()
                counts = torture(stage, command, folder, kills, rng, arguments.moments)
                print(f"stage {stage}, {time.time() - began:.0f} s: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
