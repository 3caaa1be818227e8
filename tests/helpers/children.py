"""Work in a forked child that can be killed."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

import pytest


def in_a_child(
    work: Callable[[], object], *, kill_after: float | None = None, begun: Callable[[], bool] = lambda: True
) -> int:
    """Run `work` in a fork; returns its exit status: 0, 1 after an error, negative for a signal.

    Args:
        kill_after: send SIGKILL so many seconds after `begun` says true.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    import torch

    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not in a fork
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        while not begun():
            ended, how = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(how)
            time.sleep(0.001)
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
