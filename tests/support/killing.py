"""Trainings that are killed at random moments and resumed, each in a process forked from one that has all imported."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def survive(train: Callable[[Callable[[], None]], None], kills: int, seed: int, longest: float) -> list[str]:
    """Return what went wrong in trainings of which each was killed, and the next one went on.

    Args:
        train: trains, resuming where there is something to resume, and calls what it is given once it has begun.
        kills: how many trainings are killed.
        seed: of the moments.
        longest: seconds until a training is killed, at most.
    """
    moments = random.Random(seed)
    faults = []
    for number in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _run(train, writer)
        os.close(writer)
        first = os.read(reader, 1)  # it has begun, or failed
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with open(reader, "rb") as said:
            _, failed, error = (first + said.read()).partition(b"!")
        if failed or not os.WIFSIGNALED(status):
            faults.append(f"training {number}: {error.decode() or 'ended by itself'}")
    return faults


def _run(train: Callable[[Callable[[], None]], None], writer: int) -> None:
    try:
        train(lambda: os.write(writer, b"."))
    except BaseException:
        os.write(writer, b"!" + traceback.format_exc().encode())
        time.sleep(60)  # until it is killed
    os._exit(0)


def leftovers(folder: Path) -> list[str]:
    """Return the names in a trainer's folder that are no checkpoints."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-"))
