"""Models and batches whose steps are compared with the plain path, and what of them is computed.

Weights are large, so that attention is not uniform, and in float64, where a wrong token shows far above rounding.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss import loss_utils

import reftheads as rh
from reftheads.reuse.store import ActivationStore
from support.architectures import CASES, CAUSAL
from support.models import randomise, tiny_gemma3, tiny_gpt2, tiny_llama

DECODERS = [name for name, case in CASES.items() if case.auto is CAUSAL]
ENCODERS = ["bert", "roberta", "deberta-v2", "distilbert", "modernbert"]
STRONG = {"initializer_range": 0.3}
GPT2 = STRONG | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TINY = {"tiny llama": (tiny_llama, STRONG), "tiny gpt2": (tiny_gpt2, GPT2), "tiny gemma3": (tiny_gemma3, STRONG)}
# Tokens of each row, and of its prompt. Padding is shorter than any window: the eager attention of transformers is NaN
# in float64 where a query sees padding alone.
ROWS = [(12, 9), (9, 7), (12, 8), (10, 7)]
TRANSFORMERS_LOSS = loss_utils.ForCausalLMLoss


def base_of(name: str) -> Any:
    """A model of `CASES` or a tiny one, with strong weights, in float64 and without dropout."""
    if name in TINY:
        make, options = TINY[name]
        return make(**options).double()
    return from_config(CASES[name].config, CASES[name].auto)


def from_config(config: Any, auto: Any = CAUSAL) -> Any:
    """Return a model of a configuration with strong weights, in float64 and without dropout."""
    config = copy.deepcopy(config)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = auto.from_config(config).double()
    model.set_experts_implementation("eager")  # the grouped products know no float64
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return model


def intervened(base: Any, *nodes: rh.Node, training: bool = True) -> rh.InterventionModel:
    """Add nodes to a base model and give them random weights."""
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).to(next(base.parameters()).dtype)
    randomise(model)
    return model.train(training)


def loreft(layer: int, positions: Any = "l1", rank: int = 2, **options: Any) -> rh.Node:
    """Return LoReFT after a block."""
    return rh.Node(rh.LoReFT(rank=rank, **options), layer, positions=positions)


def head(layer: int, positions: Any = "l1", name: str | None = None, target: str | None = "y", **where: Any) -> rh.Node:
    """Return a classifier that reads after a block."""
    return rh.Node(rh.LinearHead(3, target=target), layer, positions=positions, name=name, **where)


def token_rows(rows: Sequence[tuple[int, int]] = ROWS, seed: int = 0, vocab: int = 40) -> list[list[int]]:
    """Return the ids of rows, which are given as how many tokens each has and how many of them are its prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n, _ in rows]


def batch_of(
    tokens: Sequence[Sequence[int]],
    prompts: Sequence[int],
    side: str = "right",
    labels: bool = True,
    position_ids: bool = False,
) -> dict[str, Tensor]:
    """The batch of some rows, the labels on what follows each prompt."""
    width = max(map(len, tokens))
    names = ("input_ids", "attention_mask", "prompt_mask", "labels", "position_ids")
    batch = {name: torch.zeros(len(tokens), width, dtype=torch.long) for name in names}
    batch["labels"] -= 100
    for i, (row, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        start = 0 if side == "right" else width - len(row)
        end, answer = start + len(row), start + prompt
        batch["input_ids"][i, start:end] = torch.tensor(row)
        batch["attention_mask"][i, start:end] = 1
        batch["prompt_mask"][i, start:answer] = 1
        batch["labels"][i, answer:end] = torch.tensor(row[prompt:])
        batch["position_ids"][i, start:end] = torch.arange(len(row))
    left_out = [name for name, wanted in (("labels", labels), ("position_ids", position_ids)) if not wanted]
    return {name: value for name, value in batch.items() if name not in left_out}


def usual_batch(seed: int = 0, targets: bool = False, **options: Any) -> dict[str, Tensor]:
    """Return the batch of `ROWS`; with `targets`, a class `y` of each row."""
    batch = batch_of(token_rows(seed=seed), [prompt for _, prompt in ROWS], **options)
    return batch | ({"y": torch.tensor([0, 2, 1, 2])} if targets else {})


@dataclass
class Step:
    """What a step of training gave."""

    output: Any
    gradients: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The loss, without its graph."""
        return self.output.loss.detach()


def step(model: nn.Module, batch: dict[str, Any]) -> Step:
    """Forward and backward, from one state of the random numbers."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**batch)
    if output.loss is not None and output.loss.requires_grad:
        output.loss.backward()
    return Step(output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def check(got: Step, plain: Step, rtol: float = 1e-10) -> None:
    """Equal losses, and gradients equal in relation to their norm; one that is 0 may be missing."""
    if plain.output.loss is None:  # a head that reads nothing for certain has no loss then; here it may be 0
        assert got.output.loss is None or float(got.loss) == 0
        return
    torch.testing.assert_close(got.loss, plain.loss, rtol=rtol, atol=1e-13)
    whole = torch.stack([g.double().norm() for g in plain.gradients.values()] or [torch.zeros(())]).norm()
    for name in got.gradients.keys() | plain.gradients.keys():
        a, b = (s.gradients.get(name, torch.zeros(())).double() for s in (got, plain))
        difference = float((a - b).norm())
        rounding = 1e-12  # of what is 0 in truth
        allowed = rtol * float(b.norm()) + 0.01 * rtol * float(whole) + rounding
        assert difference <= allowed, f"{name}: {difference:.1e} of {float(b.norm()):.1e}"
    for field in ("losses", "predictions"):
        there, here = (getattr(s.output, field, None) or {} for s in (plain, got))
        assert there.keys() <= here.keys()
        for name in there:
            if field == "losses" or there[name].ndim == 2:  # one token a row
                torch.testing.assert_close(here[name], there[name], rtol=rtol * 10, atol=rtol * 10)


def check_exact(model: rh.InterventionModel, batch: dict[str, Any], rtol: float = 1e-10) -> Step:
    """That recording, replaying, and doing so without a store equal the plain path; gives the plain step."""
    plain = step(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        assert used(batch) is not None, used.why_plain()
        check(step(model, batch), plain, rtol)
        store.hits = store.misses = 0
        check(step(model, batch), plain, rtol)
        assert store.misses == 0
        assert store.hits > 0 or not (used.cone.cut or used.cone.constant)
    with model.reusing(None):
        check(step(model, batch), plain, rtol)
    check(step(model, batch), plain, 0)  # the model is as it was
    return plain


def check_plain(model: rh.InterventionModel, batch: dict[str, Any]) -> Any:
    """That a batch takes the plain path."""
    plain = step(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        assert used(batch) is None
        check(step(model, batch), plain, 0)
        assert not len(store)
        return used.eligibility.why_plain()


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[int]]:
    """How many tokens go into each call of some modules, and come out of a projection."""
    seen: list[int] = []

    def enters(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        seen.append(h.shape[:-1].numel())

    def leaves(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output.shape[:-1].numel())

    handles = [
        module.register_forward_hook(leaves)
        if isinstance(module, nn.Linear)
        else module.register_forward_pre_hook(enters, with_kwargs=True)
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: rh.InterventionModel) -> list[nn.Module]:
    """Return the blocks of a model with one stack."""
    (stack,) = model.plan().stacks
    return [model.get_base_model().get_submodule(path) for path in stack.blocks]


def inside(model: rh.InterventionModel) -> list[nn.Module]:
    """A module in each block, which is called when the block computes something."""
    return [block.mlp for block in blocks_of(model)]  # type: ignore[misc]


def replayed(model: rh.InterventionModel, batch: dict[str, Any], *modules: nn.Module) -> list[int]:
    """How many tokens go into each call of some modules, in the second step on a batch."""
    with model.reusing(ActivationStore(2**30)) as used:
        assert used(batch) is not None
        step(model, batch)
        with counted(*modules) as seen:
            step(model, batch)
    return seen
