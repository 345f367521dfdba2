"""Processes forked from one that has imported everything, which takes longer than most of their work."""

import os
import socket
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object], **environment: str) -> int:
    """Starts the work in a process of its own, with these variables. Returns the process's id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ.update(environment)
            work()
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait_for(child: int) -> None:
    """Waits for the end of a process, which must be a good one."""
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_together(work: Callable[[], object], count: int) -> None:
    """Runs the work in so many processes, which find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    for child in [fork(work, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)]:
        wait_for(child)
