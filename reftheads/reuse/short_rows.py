"""A few short rows that the library makes by itself, ragged on both sides, for a model to be tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads.architectures.paths import arguments, token_embeddings
from reftheads.architectures.sample import special_tokens
from reftheads.graph.intervention import IGNORE
from reftheads.reuse.facts import Facts

if TYPE_CHECKING:
    from jaxtyping import Int

LONGER = (4, 4, 3)  # tokens of each prompt, beside those that rules can select
ANSWERS = (3, 2, 2)
LEFT = (0, 1, 1)  # columns before each row where it is padded on both sides
REACH = 32  # the most tokens that prompts are made longer by for the sake of rules


def batches(facts: Facts, bound: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield batches of the same rows, padded at the right, then on both sides; each with the same behind more padding.

    Args:
        bound: tokens that the rules of nodes select of a row.
    """
    prompts = [n + min(bound, REACH) for n in LONGER]
    rows = _tokens(facts, [p + n for p, n in zip(prompts, ANSWERS, strict=True)])
    positions = "position_ids" in facts.arguments and "position_ids" in arguments(facts.base)
    kinds = [((0,) * len(rows), False), (LEFT, positions)]
    kinds += [(LEFT, False)] if positions else []
    for left, with_positions in kinds:
        one, wider = (
            _with_answers(facts, rows, prompts, _batch(facts, rows, left, extra, with_positions)) for extra in (0, 1)
        )
        yield one, wider


def prompts_of(facts: Facts, bound: int) -> dict[str, Tensor]:
    """Return prompts padded at the left, as `generate` takes them; longer than a window, if it is a short one."""
    window = getattr(getattr(facts.base, "config", None), "sliding_window", None) or 0
    rows = _tokens(facts, [n + min(max(bound, window), REACH) for n in LONGER])
    width = max(map(len, rows))
    return _batch(facts, rows, [width - len(row) for row in rows], 0, False)


def _batch(
    facts: Facts, rows: Sequence[Int[Tensor, " tokens"]], left: Sequence[int], extra: int, positions: bool
) -> dict[str, Tensor]:
    """Return rows padded by so many columns at the left, and to one width; with `extra` columns of padding more."""
    width = max(map(len, rows)) + extra
    at = torch.arange(width) - torch.tensor(left)[:, None]
    real = (at >= 0) & (at < torch.tensor([len(row) for row in rows])[:, None])
    ids = torch.full((len(rows), width), _padding(facts))
    ids[real] = torch.cat(list(rows))
    batch = {"input_ids": ids, "attention_mask": real.long()}
    if positions:
        batch["position_ids"] = at.clamp(min=0)
    return {name: value.to(facts.device) for name, value in batch.items()}


def _with_answers(
    facts: Facts, rows: Sequence[Int[Tensor, " tokens"]], prompts: Sequence[int], batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a batch with what a decoder is fed or judged by: what follows the prompts, or begins the rows."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    judged = facts.layer.kind.generative and "labels" in arguments(facts.base)
    if facts.seq2seq and judged:
        answers = torch.stack([row[: ANSWERS[0]] for row in rows]).to(facts.device)
        answers[-1, -1] = IGNORE
        return batch | {"labels": answers}
    if facts.seq2seq:
        return batch | ({"decoder_input_ids": ids} if "decoder_input_ids" in arguments(facts.base) else {})
    if not facts.causal:
        return batch
    prompt = real & (real.cumsum(1) <= torch.tensor(prompts, device=facts.device)[:, None])
    labels = {"labels": ids.masked_fill(~real | prompt, IGNORE)} if judged else {}
    return batch | {"prompt_mask": prompt.long()} | labels


def _tokens(facts: Facts, lengths: Sequence[int]) -> list[Int[Tensor, " tokens"]]:
    """Return rows of ordinary tokens; where a row is classified, its last one is that which ends a text."""
    base: Any = facts.base
    config = base.config.to_dict() if hasattr(base, "config") else {}
    special = set(special_tokens(config))
    projections = (token_embeddings(base), base.get_output_embeddings())
    size = min(projection.weight.shape[0] for projection in projections if projection is not None)
    ordinary = [i for i in range(size // 4, size) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor(ordinary)[torch.randint(len(ordinary), (n,), generator=generator)] for n in lengths]
    end = config.get("eos_token_id")
    if isinstance(end, int) and not facts.layer.kind.generative:
        for row in rows:
            row[-1] = end
    return rows


def _padding(facts: Facts) -> int:
    padding = getattr(getattr(facts.base, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0
