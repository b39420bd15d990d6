"""`python -m tests.fuzz --graphs 2000 --seed 0`: many random graphs, and what they covered."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support` and `fuzz`, as the tests have it

import torch  # noqa: E402
from rich.progress import Progress  # noqa: E402

from fuzz.run import Covered, describe, draw_case, run_case, shrink  # noqa: E402


def main() -> int:
    """Run cases and print every fault, made small, and a summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=2000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--whole", action="store_true", help="do not make cases with faults smaller")
    args = parser.parse_args()
    torch.set_num_threads(1)
    covered, faults, begun = Covered(), 0, time.time()
    with Progress() as progress:
        task = progress.add_task("graphs", total=args.graphs)
        for number in range(args.first, args.first + args.graphs):
            case = draw_case(args.seed, number)
            outcome = run_case(case)
            covered.add(case, outcome)
            for name, fault in outcome.faults.items():
                progress.console.print(f"FAULT in {name}: {fault}", markup=False, highlight=False, soft_wrap=True)
            if outcome.faults:
                faults += 1
                small = case if args.whole else shrink(case, [*outcome.faults][0])
                progress.console.print(describe(small) + "\n", markup=False, highlight=False, soft_wrap=True)
            progress.update(task, advance=1, description=f"{faults} with faults")
    print(covered)
    print(f"{args.graphs} graphs, seed {args.seed}, {faults} with faults, {time.time() - begun:.0f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
