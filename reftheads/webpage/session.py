"""What one visitor of a page sees and changes, without any page: it is tested and used by itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from reftheads._utils.showing import shown
from reftheads.adapter.model import InterventionModel
from reftheads.data.encoding import Message
from reftheads.inference.conversation import encode_questions
from reftheads.reuse.store import ActivationStore
from reftheads.webpage.copies import own_copy
from reftheads.webpage.folder import Folder
from reftheads.webpage.retraining import Demonstration, encode_demonstrations, train
from reftheads.webpage.streaming import Way, stream
from reftheads.webpage.typed import check_text

STRONGEST = 2.0
MOST = 200  # demonstrations of a visitor
_KEPT = 2**28  # bytes of activations


@dataclass(frozen=True)
class Dial:
    """How a node acts: switched on or off, and how strongly."""

    on: bool = True
    strength: float = 1.0


class Session:
    """Hold what one visitor does with a model: switches, a conversation, demonstrations, adapters.

    The visitor works on a copy of the model which shares the base weights with all others, and has adapters of its own:
    nobody else sees what is switched or trained there.

    Args:
        model: whose adapters the visitor begins with; it stays as it is.
        tokenizer: of the model.
        directory: where adapters are saved and loaded, by name.
        demonstrations: pairs of a question and its answer, which the visitor's are added to.
        steps, learning_rate: of a training.
        max_new_tokens: of an answer.

    Raises:
        ValueError: a model that is no `InterventionModel`.

    Example:
        ```python
        >>> from reftheads.webpage import Session
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), 1, positions="l1")))
        >>> session = Session(model, tokenizer)
        >>> session.turn("default", "loreft_1", strength=0)
        >>> *_, (of_base, edited) = session.answer("Tell me about owls.")
        >>> of_base == edited
        True
        ```
    """

    def __init__(
        self,
        model: InterventionModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Any = "adapters",
        demonstrations: Sequence[tuple[str, str]] = (),
        *,
        steps: int = 60,
        learning_rate: float = 2e-2,
        max_new_tokens: int = 128,
    ):
        if not isinstance(model, InterventionModel):
            raise ValueError(
                f"a chat page needs an InterventionModel, got {type(model).__name__}: wrap the base model by "
                "InterventionModel(base, graph)"
            )
        self.model, self.tokenizer = own_copy(model).eval(), tokenizer
        self.folder = directory if isinstance(directory, Folder) else Folder(directory)
        self.demonstrations = [Demonstration(*pair) for pair in demonstrations]
        self.steps, self.learning_rate, self.max_new_tokens = steps, learning_rate, max_new_tokens
        self.model.set_adapter(self.model.active_adapters)  # and with gradients, if it was loaded for inference
        self.conversations: tuple[list[Message], list[Message]] = ([], [])  # with the base model, with the edited one
        self._dials: dict[tuple[str, str], Dial] = {}
        self._store = ActivationStore(_KEPT)
        self._busy = threading.Lock()

    # --- nodes ------------------------------------------------------------------------------------------------

    @property
    def dials(self) -> dict[tuple[str, str], Dial]:
        """Return how each node that edits acts, by adapter and node."""
        plans = {name: self.model.plan(name) for name in self.chosen}
        keys = [
            (name, str(planned.node.name)) for name, plan in plans.items() for planned in plan.nodes if planned.edits
        ]
        return {key: self._dials.get(key, Dial()) for key in keys}

    def turn(self, adapter_name: str, node: str, *, on: Any = None, strength: Any = None) -> None:
        """Switch a node, or say how strongly it acts; what is left out stays.

        Raises:
            ValueError: a node that does not act, a switch that is neither on nor off, or a strength that is no number
                from 0 to 2. All stays as it was.
        """
        dial = self.dials.get((adapter_name, node))
        if dial is None:
            raise ValueError(
                f"no node {shown(node)} of an adapter {shown(adapter_name)} acts: choose its adapter first"
            )
        if on is not None:
            if not isinstance(on, bool):
                raise ValueError(f"a switch is on or off, got {shown(on)}")
            dial = replace(dial, on=on)
        if strength is not None:
            number = isinstance(strength, int | float) and not isinstance(strength, bool) and math.isfinite(strength)
            if not number or not 0 <= strength <= STRONGEST:
                raise ValueError(f"a strength is a number from 0 to {STRONGEST:g}, got {shown(strength)}")
            dial = replace(dial, strength=float(strength))
        self._dials[adapter_name, node] = dial

    def table(self) -> str:
        """Return the graphs of the chosen adapters as tables, one line a node."""
        return "\n\n".join(f"{name}\n{self.model.plan(name).graph}" for name in self.chosen)

    # --- adapters ---------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters that can be chosen: the visitor's, and those in the folder."""
        return list(dict.fromkeys([*self.model.peft_config, *self.folder.names()]))

    @property
    def chosen(self) -> list[str]:
        """Return the names of the adapters that act, in their order."""
        return list(self.model.active_adapters)

    def choose(self, names: Any) -> None:
        """Let adapters act together, in the order given; one that lies in the folder is loaded first.

        Raises:
            ValueError: none, an unknown one, or one that does not fit the model. All stays as it was.
        """
        if not isinstance(names, Sequence) or isinstance(names, str) or not names:
            raise ValueError("choose at least one adapter; the base model answers beside it in any case")
        with self._alone():
            for name in names:
                if name not in list(self.model.peft_config):
                    self.folder.load(self.model, name)
            self.model.set_adapter(list(dict.fromkeys(names)))

    def save(self, name: Any) -> None:
        """Save the adapter that is chosen under a name.

        Raises:
            ValueError: several adapters are chosen; a name that is taken or cannot be used.
        """
        with self._alone():
            if len(self.chosen) > 1:
                raise ValueError(f"{' and '.join(self.chosen)} are chosen: choose one of them to save it")
            if name in list(self.model.peft_config):  # whatever came over the wire is compared, not hashed
                raise ValueError(f"there is an adapter {name!r} already: take another name")
            self.folder.save(self.model, self.chosen[0], name)

    # --- questions --------------------------------------------------------------------------------------------

    def answer(self, question: Any) -> Iterator[tuple[str, str]]:
        """Yield the answers of base and edited model as they grow.

        Both know what was said before, each what it said itself.

        Raises:
            ValueError: a question that is empty or too long, or holds control characters; the conversation is then as
                it was.
        """
        said: Message = {"role": "user", "content": check_text(question, "the question")}
        with self._alone():
            dials = {f"{adapter}/{node}": dial for (adapter, node), dial in self.dials.items()}
            strengths = {key: dial.strength if dial.on else 0.0 for key, dial in dials.items()}
            blocks = (self.model.disable_adapter, partial(self.model.at_strength, strengths))
            ways = [self._way(block, [*before, said]) for block, before in zip(blocks, self.conversations, strict=True)]
            answers = ["", ""]
            for answers in stream(self.model, self.tokenizer, ways):
                yield answers[0], answers[1]
            for conversation, answer in zip(self.conversations, answers, strict=True):
                conversation += [said, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Begin a new conversation."""
        with self._alone():
            self.conversations = ([], [])

    def _way(self, entering: Any, messages: list[Message]) -> Way:
        prompt = encode_questions(self.tokenizer, [messages])
        tokens, most = prompt["input_ids"].shape[1], self._context
        if tokens >= most:
            before = " and what was said before" if len(messages) > 1 else ""
            raise ValueError(
                f"the question{before} has {tokens:,} tokens, and the model reads {most:,}: ask something shorter"
                + (", or begin a new conversation" if before else "")
            )
        return Way(entering, prompt, min(self.max_new_tokens, most - tokens))

    @property
    def _context(self) -> int:
        """Return how many tokens the model reads."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length

    # --- training ---------------------------------------------------------------------------------------------

    def demonstrate(self, question: Any, answer: Any) -> None:
        """Add a demonstration, which the next training learns from.

        Raises:
            ValueError: a text that is empty or too long, or holds control characters; more demonstrations than a
                visitor may have.
        """
        pair = Demonstration(check_text(question, "the question"), check_text(answer, "the answer"))
        if len(self.demonstrations) >= MOST:
            raise ValueError(f"there are {MOST} demonstrations already: train on them")
        [row] = encode_demonstrations(self.tokenizer, [pair])
        tokens = len(row["input_ids"])
        if tokens > self._context:
            raise ValueError(f"the demonstration has {tokens:,} tokens, and the model reads {self._context:,}")
        self.demonstrations.append(pair)

    def retrain(self) -> Iterator[int]:
        """Train the chosen adapters on all demonstrations, and yield how many steps are done.

        Raises:
            ValueError: no demonstration, or nothing to train.
        """
        if not self.demonstrations:
            raise ValueError("there is no demonstration: add a question and its answer")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("the chosen adapters have nothing to train")
        with self._alone():
            rows = encode_demonstrations(self.tokenizer, self.demonstrations)
            options: dict[str, Any] = {"steps": self.steps, "learning_rate": self.learning_rate}
            yield from train(self.model, self.tokenizer, rows, self._store, **options)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ValueError("an answer or a training is still running: wait until it is done")
        try:
            yield
        finally:
            self._busy.release()
