"""That the memory 01_data.py needs does not grow with the number of lines it prepares (Linux).

    python tests/bench/prepare_memory.py [--lines 10000 1000000]

One rank prepares a JSONL file of short text-only pairs, every tenth of them unusable. The peak is
that of the process's anonymous memory, looked at every 20 ms.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common


def write_lines(path: Path, count: int) -> Path:
    with open(path, "w") as file:
        for i in range(count):
            rejected = f"{i + 1}" if i % 10 else f"{i}"  # equal responses are unusable
            pair = {"prompt": f"Which number is {i}?", "chosen": f"{i}", "rejected": rejected}
            file.write(json.dumps(pair) + "\n")
    return path


def peak_memory(command: list[str]) -> tuple[float, float, str]:
    """Run a command; return its peak of anonymous memory in MiB, its seconds and its output."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while process.poll() is None:
        now = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(now[1]) if now else 0)  # there is none between its end and poll()
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return peak / 1024, time.perf_counter() - began, process.stdout.read()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 1_000_000])
    table = [["lines", "kept", "seconds", "lines a second", "peak of anonymous memory, MiB"]]
    for lines in parser.parse_args().lines:
        with tempfile.TemporaryDirectory() as folder:
            source = write_lines(Path(folder, "lines.jsonl"), lines)
            stage = [sys.executable, str(common.ROOT / "01_data.py")]
            peak, seconds, printed = peak_memory([*stage, "--source", str(source), "--out", folder])
        kept = re.search(r"kept (\d+)", printed)[1]
        table.append([lines, kept, f"{seconds:.0f}", f"{lines / seconds:.0f}", f"{peak:.0f}"])
    print(f"{common.machine()}\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
