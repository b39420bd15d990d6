"""Draw where to edit: the held-out loss by layer and positions, of a search for the emoji demonstration.

    python docs/images/draw_tuning.py [FILE]

Ten demonstrations of answers in emoji, as in recipes/emoji_chat.py, are learnt by the embedded model; forty others
judge.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console

import reftheads as rh

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from emoji_chat import draw, encode


def main(file: Path) -> None:
    torch.set_num_threads(1)
    base, tokenizer = rh.load_base("tiny-chat", dropout=False)
    shown, held_out = (encode(tokenizer, examples) for examples in draw(0, 40))
    found = rh.tune(base, tokenizer, shown, held_out, trials=128, steps=96)
    found.plot(file)
    Console(width=120).print(found.table())
    print(f"{found.seconds:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tuning.png"))
