"""Talk to a model in the browser: base and edited answers side by side, switches, strengths, retraining.

An edit learns to answer in emoji, as in emoji_chat.py. The page then shows what it does, and lets visitors
switch its nodes, teach it something else, and save what they have taught. It is served on 127.0.0.1 alone.

    python recipes/chat_page.py                                    # the embedded toy model
    python recipes/chat_page.py --model smollm2-135m               # a real model
"""

from pathlib import Path

from _common import begin, command_line
from emoji_chat import USUAL, draw, edits, encode, train

import reftheads as rh


def main(
    model: str = "tiny-chat", layers: tuple[int, ...] | None = None, positions: str | None = None,
    rank: int | None = None, steps: int | None = None, lr: float | None = None, seed: int = 0,
    adapters: Path = Path("adapters"), port: int | None = None,
) -> None:  # fmt: skip
    """Train an edit from demonstrations, then serve the page."""
    begin(model, seed=seed)
    usual = USUAL.get(model, USUAL["tiny-chat"])
    base, tokenizer = rh.load_base(model, dtype=usual.dtype)
    tuned = rh.InterventionModel(base, edits(base, usual, layers, positions, rank))
    shown, _ = draw(seed, 0, usual.demonstrations)
    train(tuned, tokenizer, encode(tokenizer, shown), steps or usual.steps, lr or usual.lr, seed)
    rh.page(tuned, tokenizer, demonstrations=shown, directory=adapters, learning_rate=lr or usual.lr, server_port=port)


if __name__ == "__main__":
    command_line(
        main,
        model="tiny-chat, smollm2-135m, or a Hub id or a local path of any chat model",
        layers="blocks to edit; default: as in emoji_chat.py",
        positions="tokens to edit, such as l1, prompt or all",
        rank="of LoReFT",
        steps="of training",
        lr="learning rate",
        adapters="a folder: visitors save adapters there, and load them by name",
        port="where the page is; left out, the first that is free from 7860 on",
    )
