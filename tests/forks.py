"""Run scripts as torchrun does, with ranks forked from one process that has imported the stages.

    python tests/forks.py      # run what it reads, a JSON object a line; print how each ended

A fresh torchrun and each of its ranks first import torch and transformers, some three seconds of a
core each. As with torchrun, ranks are processes of their own, meet in a store that belongs to none
of them, read their own command line, and are ended when one of them fails. Only what was imported
before, and what an import reads from the environment, differs.
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
    gc.freeze()  # a forked process that ends would else go through, and copy, all of it


def fork_ranks(ranks: int, seconds: int = 600) -> None:
    """Return in each of so many new processes.

    The present one waits for them and exits with 1 if one fails; the others then get SIGTERM and,
    after 30 seconds, SIGKILL, which all get after `seconds`.
    """
    from torch.distributed import TCPStore  # kills.py starts torchrun without it

    listener = socket.create_server(("127.0.0.1", 0))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": listener.getsockname()[1]}
    environment |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = True
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            environment |= {"RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in environment.items()}
            listener.close()
            return
    port = int(environment["MASTER_PORT"])
    how = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    store = TCPStore("127.0.0.1", port, **how)  # noqa: F841  # it serves as long as it has a name

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
    """`python SCRIPT ARGUMENTS` in this process."""
    path = Path(command[0]).absolute()
    sys.argv, sys.path[0] = command, str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def main() -> None:
    import_stages()
    for line in sys.stdin:
        told = json.loads(line)
        pid = os.fork()
        if pid == 0:
            break
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        return
    os.chdir(told["cwd"])
    for stream, path in enumerate((os.devnull, told["stdout"], told["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    fork_ranks(told["ranks"])
    run(told["command"])


if __name__ == "__main__":
    main()
