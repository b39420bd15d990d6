"""Draw chat_page.png: the chat page of the embedded model in headless Chromium, after two questions.

PYTHONPATH=tests python docs/images/draw_chat_page.py [FILE]
"""

import sys
import tempfile
from pathlib import Path

import torch
from support.browsing import Visitor, browser

import reftheads as rh

DEMONSTRATIONS = [
    ("Tell me about butter.", "🧈🍞🐮"), ("What are flamingos?", "🦩🌅🦐"),
    ("What do you know about dreams?", "💭😴🌈"), ("Describe weddings.", "💒👰💍"),
    ("Can you explain socks?", "🧦👟🥶"), ("Tell me about glasses.", "👓🤓👀"),
]  # fmt: skip


def main(file: str) -> None:
    """Teach the model on the page itself, ask it, and keep what is seen."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokenizer = rh.load_base("tiny-chat")
    node = rh.Node(rh.LoReFT(rank=4), layer=1, positions="l1", name="emoji")
    model = rh.InterventionModel(base, rh.InterventionGraph(node))
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder, "profile")) as driver:
        page = rh.page(
            model, tokenizer, demonstrations=DEMONSTRATIONS, directory=Path(folder, "adapters"), steps=80,
            prevent_thread_lock=True, quiet=True,
        )  # fmt: skip
        visitor = Visitor(driver, page.local_url)
        visitor.click("#retrain")
        visitor.until(lambda: "trained on" in visitor.text("#training"))
        for question in ("Tell me about owls.", "What comes to mind when you hear trains?"):
            visitor.ask(question)
        visitor.click("#nodes > button")
        visitor.until(lambda: "LoReFT" in visitor.text("#table textarea"))
        driver.save_screenshot(file)
        page.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or [str(Path(__file__).with_name("chat_page.png"))])
