"""A training that any number of processes can share, and what came out of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import reftheads as rh
from support.training import arguments, llama

ROWS, ODD = 16, 10  # rows to train on; and to evaluate, as many as fill no batch of two processes

OPTIONS: dict[str, dict[str, Any]] = {
    "one": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp": {
        "ddp_backend": "gloo",
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}


def train_and_judge(folder: Path, kind: str) -> None:
    """Train, evaluate, save and resume in this process and those beside it, and write down what came out.

    Args:
        folder: holds a tokenizer; gets the file `<kind>.pt`.
        kind: "one" process, or several by "ddp" or "fsdp".
    """
    whole = _trainer(folder, kind)
    whole.train()
    predicted = whole.predict(whole.eval_dataset["odd"])
    resumed = _trainer(folder, kind)
    resumed.train(resume_from_checkpoint=str(folder / kind / "checkpoint-2"))
    sharded = any(isinstance(p, DTensor) for p in whole.model.get_base_model().model.layers.parameters())
    states = {"trained": _state(whole), "resumed": _state(resumed)}
    logs = [*whole.state.log_history, predicted.metrics]
    # the loss of a last batch that rows of the first fill up is transformers' own, with these rows in it
    left_out = ("runtime", "second", "time", "reuse", "flos", "odd_loss", "test_loss")
    kept = [
        {name: value for name, value in entry.items() if name.endswith(("sort", "tags")) or not _any(left_out, name)}
        for entry in logs
    ]
    if whole.args.process_index == 0:
        found = {"processes": whole.args.world_size, "sharded": sharded, "logs": json.dumps(kept), **states}
        torch.save(found, folder / f"{kind}.pt")


def _any(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)


def _trainer(folder: Path, kind: str) -> rh.InterventionTrainer:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    letters = "abcdefghij"
    prompts = [" ".join(letters[: 1 + i % 7]) for i in range(ROWS)]
    answers = [" ".join(letters[i % 5 : i % 5 + 1 + i % 3]) for i in range(ROWS)]
    rows = [
        row | {"sort": i % 3, "tags": [j % 2 for j in range(len(row["input_ids"]))]}
        for i, row in enumerate(rh.encode_pairs(tokenizer, prompts, answers))
    ]
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 1, positions="l1", name="edit"),
        rh.Node(rh.LoRA(rank=2), 1, component="query_output", name="lora"),
        rh.Node(rh.LinearHead(3, target="sort", lr=5e-3), 1, positions="f1", name="sort"),
        rh.Node(rh.LinearHead(2, target="tags", weight=0.0), 0, positions="prompt", name="tags"),
    )
    torch.manual_seed(0)
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph)
    schedule = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    args = arguments(folder / kind, **sizes | schedule | OPTIONS[kind])
    if kind == "fsdp":  # accelerate shards on accelerators alone, and would take DDP on a CPU without a word
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return rh.InterventionTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset={"even": rows, "odd": rows[:ODD]},
        processing_class=tokenizer,
        compute_metrics=_metrics,
    )


def _metrics(predicted: transformers.EvalPrediction) -> dict[str, float]:
    """Count the rows and the tokens that a head at every token of the prompt reads, and how often it is right."""
    of_tags = [part["tags"] for part in predicted.predictions if isinstance(part, dict) and "tags" in part]
    [mask] = [part for part in of_tags if part.dtype == np.bool_]
    [scores] = [part for part in of_tags if part.ndim == 3]
    targets = predicted.label_ids[2]
    right = scores.argmax(-1)[mask] == targets[:, : mask.shape[1]][mask]
    return {"rows": float(len(targets)), "tokens": float(mask.sum()), "right": float(right.mean())}


def _state(trainer: rh.InterventionTrainer) -> dict[str, torch.Tensor]:
    """Return copies of the parameters of all nodes, gathered from all processes."""
    named = {name.removeprefix("module."): p.detach() for name, p in trainer.model.named_parameters()}
    nodes = {name: value for name, value in named.items() if "rh_nodes" in name}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in nodes.items()}
