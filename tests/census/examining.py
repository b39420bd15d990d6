"""One model under examination: its blocks as a trace shows them, nodes on a copy of it, what came of a check."""

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import reftheads as rh
from census.building import Subject, first_tensor, words
from census.tracing import Chain, Change, Place, Trace, by_hand, chains, run, trace

RIGHT, REFUSED, WRONG, CRASH, NOTHING = "right", "refused", "WRONG", "CRASH", "n/a"


class Wrong(AssertionError):
    """Say that the library gives something else than the oracle, and by how much."""


class Nothing(Exception):
    """Say that a check has no meaning for a model."""


@dataclass(frozen=True)
class Verdict:
    """Say what came of one check: a word, and a reason or a figure."""

    word: str
    text: str = ""


def judge(check: Callable[[], Any]) -> Verdict:
    """Return what came of a check."""
    try:
        check()
    except Wrong as error:
        return Verdict(WRONG, str(error))
    except Nothing as error:
        return Verdict(NOTHING, str(error))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and "/reftheads/" in frames[-1].filename:
            return Verdict(REFUSED, " ".join(str(error).split())[:300])
        last = frames[-1]
        own = next((f for f in reversed(frames) if "/reftheads/" in f.filename), last)
        return Verdict(CRASH, f"{text} [{_short(own)}; {_short(last)}]")
    return Verdict(RIGHT)


def _short(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"


@dataclass
class Stack:
    """Name blocks that the trace has shown, and by which role the library is asked for them."""

    role: Any
    chain: Chain

    @property
    def middle(self) -> int:
        """Return the number of a block that has some before and some after it."""
        return (len(self.chain.blocks) - 1) // 2


@dataclass
class Exam:
    """Hold a model, what one pass showed of it, and what edits of it are compared with."""

    subject: Subject
    row: list[int] = field(default_factory=lambda: words((12,), seed=7)[0])
    record: Trace = field(init=False)
    stacks: list[Stack] = field(init=False)

    def __post_init__(self) -> None:
        self.record = trace(self.base, self.alone)
        self.stacks = self._stacks()

    @property
    def base(self) -> Any:
        """Return the model without the library."""
        return self.subject.model

    @property
    def alone(self) -> dict[str, Tensor]:
        """Return one row without padding."""
        return self.subject.batch([self.row])

    @property
    def width(self) -> int:
        """Return how many tokens that row has."""
        return len(self.subject.kind.prefix) + len(self.row)

    @property
    def pairs(self) -> bool:
        """Return whether the model has an encoder and a decoder."""
        return bool(self.base.config.is_encoder_decoder)

    def _stacks(self) -> list[Stack]:
        """Return the blocks of the encoder and the decoder, or those that run over the row's tokens."""
        lists = chains(self.base, self.record)
        if self.pairs and len(lists) > 1:
            return [Stack("encoder", lists[-2]), Stack("decoder", lists[-1])]  # convolutions may run before them
        if self.subject.ids is not None:
            lists = [
                c for c in lists if self.width in self.record.values(c.blocks[0], c.into[0].side)[0].shape[:-1]
            ] or lists
        best = [c for c in lists if c.exact] or lists
        return [Stack(None, best[-1])] if best else []

    def model(self, *nodes: rh.Node) -> rh.InterventionModel:
        """Return a copy of the model with a graph on it."""
        made = rh.InterventionModel(copy.deepcopy(self.base), rh.InterventionGraph(*nodes))
        return made.to(self.subject.dtype).eval()

    def vector(self, width: int, size: float = 1.0) -> Tensor:
        """Return a vector that is added somewhere."""
        generator = torch.Generator().manual_seed(11)
        return (torch.randn(width, generator=generator, dtype=torch.float32) * size).double()

    def output(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Return the logits of a model, or the first tensor that it gives."""
        return first_tensor(run(model, self.alone if inputs is None else inputs))

    def hand(self, changes: Sequence[tuple[Place, Change]], inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Return the same of the base model where changes are made by hand."""
        with by_hand(self.base, changes):
            return self.output(self.base, inputs)

    def equal(self, got: Tensor, expected: Tensor, what: str = "", factor: float = 1.0) -> None:
        """Raise `Wrong` where two tensors are not the same but for rounding."""
        if got.shape != expected.shape:
            raise Wrong(f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
        apart = distance(got, expected)
        if not apart <= self.subject.exact * factor:
            raise Wrong(f"{what} is {apart:.1e} away")


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in relation to the largest value."""
    got, expected = got.double(), expected.double()
    both = torch.isfinite(expected)
    if not torch.equal(both, torch.isfinite(got)):
        return float("inf")
    scale = expected[both].abs().max().clamp(min=1e-9) if both.any() else torch.ones(())
    return float(((got - expected)[both].abs().max() if both.any() else torch.zeros(())) / scale)
