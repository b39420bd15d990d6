"""Programs that run in several processes, which train together."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from support.paths import TESTS

NETWORK = "lo0" if sys.platform == "darwin" else "lo"
"""The interface by which processes of one machine meet."""


def run_together(program: str, *arguments: str | Path, processes: int = 2) -> None:
    """Run a Python program in processes of one group, on the CPU.

    Args:
        program: its text, which may import `support`, and ends in `support.processes.leave()`.
        arguments: what it finds in `sys.argv`, after its name.

    Raises:
        AssertionError: with the end of what was written to stderr, where a process failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": NETWORK}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program)
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(file), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> None:
    """End this process when all others of its group have come as far.

    Taking the process group down can wait for ever where another process has gone.
    """
    torch.distributed.barrier()
    os._exit(0)
