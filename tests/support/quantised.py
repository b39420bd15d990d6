"""QLoRA of a tiny base model of 4 or 8 bits, and its training."""

import torch
from transformers import TrainingArguments

import reftheads as rh
from support.models import random_ids


def base_of(saved: str, bits: int = 4):
    """Load a base model from a folder, quantised, with everything else in float32."""
    return rh.load_base(saved, bits=bits, dtype="float32", device_map="cpu")[0]


def qlora(base, *nodes: rh.Node) -> rh.InterventionModel:
    """LoRA on every linear module, a classifier of the last token, and what is given."""
    head = rh.Node(rh.LinearHead(3, "mood"), layer=-1, positions="l1", name="mood")
    return rh.InterventionModel(base, rh.preset("lora8:all-linear", base) + rh.InterventionGraph(head, *nodes))


def arguments(folder, **options) -> TrainingArguments:
    """Return arguments for twelve steps of eight rows, each logged, nothing saved."""
    defaults = dict(
        max_steps=12, learning_rate=5e-3, per_device_train_batch_size=8, save_strategy="no", logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(str(folder), **defaults | options)


def rows(count: int = 8) -> list[dict]:
    """Return rows of seven tokens with a class each."""
    return [{"input_ids": ids, "mood": i % 3} for i, ids in enumerate(random_ids(count, 7).tolist())]


def trained(saved: str, tokenizer, folder, make=qlora, data=None, reuse="auto", **options) -> rh.InterventionTrainer:
    """Train what `make` makes of the quantised base, and return the trainer."""
    torch.manual_seed(0)
    model = make(base_of(saved, options.pop("bits", 4)))
    trainer = rh.InterventionTrainer(
        model, arguments(folder, **options), train_dataset=data or rows(), processing_class=tokenizer, reuse=reuse
    )
    trainer.train()
    return trainer


def weights(model: rh.InterventionModel) -> dict[str, torch.Tensor]:
    """Return the parameters of all nodes by name."""
    return {name: p.detach() for name, p in model.named_parameters() if "rh_nodes" in name}
