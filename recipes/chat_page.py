"""Talk to a model in the browser: base and edited answers side by side, switches, strengths, retraining.

An edit of one token learns to answer in emoji, which takes seconds. The page then shows what it does, and lets visitors
switch its nodes, teach it something else, and save what they have taught. It is served on 127.0.0.1 alone.

    python recipes/chat_page.py                                    # the embedded toy model
    python recipes/chat_page.py --lr 4e-3 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0    # a real model
"""

from pathlib import Path

from _common import Watch, begin, command_line, progress, trainer_arguments

import reftheads as rh

DEMONSTRATIONS = [
    ("Tell me about butter.", "🧈🍞🐮"), ("What are flamingos?", "🦩🌅🦐"),
    ("What do you know about dreams?", "💭😴🌈"), ("Describe weddings.", "💒👰💍"),
    ("Can you explain socks?", "🧦👟🥶"), ("Tell me about glasses.", "👓🤓👀"),
]  # fmt: skip


def main(
    model: str = "tiny-chat", layer: int | None = None, positions: str = "l1", rank: int = 4, steps: int = 150,
    lr: float = 2e-2, seed: int = 0, adapters: Path = Path("adapters"), port: int | None = None,
) -> None:  # fmt: skip
    """Train an edit from a few demonstrations, then serve the page."""
    begin(model, seed=seed)
    base, tokenizer = rh.load_base(model)
    layer = base.config.num_hidden_layers // 4 if layer is None else layer
    node = rh.Node(rh.LoReFT(rank=rank), layer=layer, positions=positions, name="emoji")
    tuned = rh.InterventionModel(base, rh.InterventionGraph(node))

    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in DEMONSTRATIONS
    ]
    rows = rh.encode_chat(tokenizer, conversations)
    args = trainer_arguments(max_steps=steps, learning_rate=lr, per_device_train_batch_size=len(rows), seed=seed)
    with progress() as bar:
        rh.InterventionTrainer(
            tuned, args, train_dataset=rows, processing_class=tokenizer, callbacks=[Watch(bar, "learning emoji")]
        ).train()

    rh.page(tuned, tokenizer, demonstrations=DEMONSTRATIONS, directory=adapters, learning_rate=lr, server_port=port)


if __name__ == "__main__":
    command_line(
        main,
        model="a Hub id or a local path of any chat model",
        layer="default: a quarter of the model's depth",
        positions="tokens to edit, such as l1 or f1+l1",
        rank="of LoReFT",
        adapters="a folder: visitors save adapters there, and load them by name",
        port="where the page is; left out, the first that is free from 7860 on",
    )
