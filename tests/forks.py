"""Run scripts as torchrun does, with ranks forked from one process that has imported the stages.

    python tests/forks.py   # reads runs, one JSON object a line, and prints the exit code of each

This saves time: with a fresh torchrun, torchrun itself and each rank first import torch and
transformers, about three seconds of a core each.

As with torchrun, ranks are processes of their own, read their own command line and end as an
interpreter ends. They meet in a store that belongs to none of them, and when one fails the others
are ended. The only difference: imports, and the environment that they read, come before the run.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("01_data", "02_model", "03_train", "04_eval", "05_ensemble", "06_grpo")


def import_stages() -> None:
    sys.path.insert(0, str(ROOT))
    for name in STAGES:
        importlib.import_module(name)
    gc.freeze()  # else the garbage collector of a fork would copy all imported objects when it ends


def fork_ranks(ranks: int, seconds: int = 600) -> None:
    """Fork so many ranks; return in each of them, and never in the present process.

    The present process waits for the ranks. If one fails, the others get SIGTERM and after 30
    seconds SIGKILL, and the exit code is 1. After `seconds` all ranks get SIGKILL.
    """
    from torch.distributed import TCPStore  # here, because kills.py starts torchrun without it

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            os.environ["MASTER_PORT"] = str(port)
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            os.environ["RANK"] = str(rank)
            os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = str(ranks)
            os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
            listener.close()
            return
    store = TCPStore(  # noqa: F841  # the store lives as long as this name
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )

    def kill(*_) -> None:
        print("killed: it would not end", file=sys.stderr, flush=True)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    failed = False
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(seconds)
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not failed:
            failed = True
            signal.alarm(30)
            for other in pids:
                os.kill(other, signal.SIGTERM)
    os._exit(failed)


def run(command: list[str]) -> None:
    """Run `python SCRIPT ARGUMENTS` in this process."""
    path = Path(command[0]).absolute()
    sys.argv = command
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def main() -> None:
    import_stages()
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            break
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    else:
        return
    os.chdir(task["cwd"])
    for stream, path in enumerate((os.devnull, task["stdout"], task["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    fork_ranks(task["ranks"])
    run(task["command"])


if __name__ == "__main__":
    main()
