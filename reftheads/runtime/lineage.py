"""Which prompt a pass within `generate` continues: its own text decides, and the cache that it goes on with.

`generate` makes most passes for its own next tokens, and marks them. But logits processors, stopping criteria and
candidate generators call the same model, too: for guidance with another prompt, for a judgement of what is written, or
for a look ahead. Such a pass is told by what it is about:

* it goes on with a cache: then it continues the prompt for which that was filled;
* its text begins with the generation's prompt and goes on with tokens that were generated, or it does so with the text
  of an earlier pass: then it continues that one;
* its text begins with neither: then it is a prompt of its own.

What is left, such as a text that begins with the prompt and goes on otherwise, cannot be told apart: rules that depend
on where a prompt ends are an error there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads.graph.intervention import Params
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.passes import Prompt
from reftheads.runtime.traces import cache_in, length_of, trace_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

PREPARED = "interventions_prepared"  # the argument that marks a pass for which `generate` itself prepared the inputs

Flags = tuple[bool, ...]
"""Of each real token of a row, whether it belongs to the prompt."""


@dataclass(frozen=True)
class Known:
    """Texts that later passes may continue.

    Attributes:
        rows: the real tokens of each.
        flags: which of them are the prompt.
        since: how many tokens had been generated when they were met.
    """

    rows: Sequence[list[int]]
    flags: Sequence[Flags]
    since: int = 0

    def begun_by(self, texts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Yield of each text which rows it begins with: those in its own place, if all texts begin with these."""
        times, rest = divmod(len(texts), len(self.rows))
        own = [[i // times] if times and not rest else [] for i in range(len(texts))]
        if all(own) and all(_begins(text, self.rows[i]) for text, [i] in zip(texts, own, strict=True)):
            yield from own
            return
        for text in texts:
            yield [i for i, row in enumerate(self.rows) if _begins(text, row)]


@dataclass(eq=False)
class Generation:
    """What one `generate` started from, and what is known of its text so far.

    Attributes:
        main: its prompt.
        ids: the tokens of its input, where that is all of it.
        encoder_ids: the input of an encoder before it.
        begun: whether it has prepared a pass.
        written: the newest text that it has prepared a pass for.
        chosen: of every step, the tokens that were generated in any row.
        known: texts of earlier passes that continued nothing.
        assists: the generation whose text it drafts, as the assistant of that one.
        derived: parameters with what follows from them, since weights stay as they are meanwhile.
    """

    main: Prompt
    ids: Int[Tensor, "rows columns"] | None = None
    encoder_ids: Tensor | None = None
    begun: bool = False
    written: Int[Tensor, "rows written"] | None = None
    chosen: list[set[int]] = field(default_factory=list)
    known: list[Known] = field(default_factory=list)
    assists: Generation | None = None
    derived: dict[NodeModule, Params | None] = field(default_factory=dict)

    def note(self, text: Int[Tensor, "rows written"]) -> None:
        """Remember the text that `generate` prepares a pass for: all of it, or a chunk of its prompt."""
        columns = self.main.real.shape[1]
        if not self.begun and self.ids is None and text.ndim == 2 and text.shape[1] == columns:
            self.ids = text[:: max(len(text) // len(self.main.real), 1)]
        if self.ids is not None and text.shape[1] >= columns:
            self.written = text
        self.begun = True

    def continued_by(
        self, prepared: bool, seq2seq: bool, inputs: Mapping[str, Any], prompt_mask: Tensor | None
    ) -> Prompt:
        """Return what a call of the base model continues.

        Args:
            prepared: whether `generate` itself prepared the inputs.
        """
        if prepared:
            return self.main
        return self.of_decoder(inputs) if seq2seq else self.prompt_of(inputs, prompt_mask)

    def of_stack(self, causal: bool, inputs: Mapping[str, Any], prompt_mask: Tensor | None) -> Prompt | None:
        """Return what a pass through a stack alone continues: `generate` itself makes one, through an encoder."""
        if causal:
            return self.prompt_of(inputs, prompt_mask)
        return None if self.begun else self.main

    def of_decoder(self, inputs: Mapping[str, Any]) -> Prompt:
        """Return what a pass through an encoder and a decoder continues; a prompt mask is the encoder's."""
        names = {name.removeprefix("decoder_"): name for name in inputs if name.startswith("decoder_")}
        fed = {name: inputs[long] for name, long in names.items()}
        prompt = self.prompt_of({**fed, "past_key_values": cache_in(inputs)})
        ids = inputs.get("input_ids")
        if ids is not None and self.encoder_ids is not None and torch.equal(ids, self.encoder_ids):
            prompt.encoder_prompt = self.main.encoder_prompt
        return prompt

    def prompt_of(self, inputs: Mapping[str, Any], prompt_mask: Bool[Tensor, "rows columns"] | None = None) -> Prompt:
        """Return what a pass continues for which `generate` did not prepare the inputs.

        Args:
            inputs: of the stack that generates, by the names of a decoder-only model.
            prompt_mask: that the pass itself was given.
        """
        cache, mask = cache_in(inputs), inputs.get("attention_mask")
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = ids if ids is not None else embeddings
        past = length_of(cache)
        if tokens is None or past is None or self.main.prompt is None:
            return Prompt(self.main.real, None)
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        real = self._real(ids, flat, (tokens.shape[0], past + tokens.shape[1]), tokens.device)
        if prompt_mask is not None:
            return Prompt(real, prompt_mask.bool())
        if past:
            trace = trace_of(cache)
            return self._going_on(real, None if trace is None else trace.continues, flat)
        if mask is not None and flat is None:
            return Prompt(real, None)
        if ids is None or self.ids is None:
            longest = int(self.main.real.sum(1).min())
            return Prompt(real, real if tokens.shape[1] < longest else None)
        return Prompt(real, self.prompt_in(ids, real))

    def _real(
        self, ids: Tensor | None, mask: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Bool[Tensor, "rows columns"]:
        """Return which columns hold tokens; without a mask, what was padding in the generation's input does not."""
        if mask is not None:
            return mask.bool()
        real = torch.ones(shape, dtype=torch.bool, device=device)
        if ids is None or self.ids is None or ids.shape[1] < self.ids.shape[1] or len(ids) % len(self.ids):
            return real
        times = len(ids) // len(self.ids)
        begun = self.ids.repeat_interleave(times, 0).to(device)
        if torch.equal(ids[:, : begun.shape[1]], begun):
            real[:, : begun.shape[1]] = self.main.real.repeat_interleave(times, 0)
        return real

    def _going_on(self, real: Tensor, continued: Prompt | None, mask: Tensor | None) -> Prompt:
        """Return the prompt for which a cache was filled; all is prompt in a cache that knows of none."""
        if continued is None:
            return Prompt(real, real)
        rows, columns = continued.real.shape
        times, rest = divmod(len(real), rows)
        if rest or not times:
            return Prompt(real, None)
        before = continued.real.repeat_interleave(times, 0).to(real.device)
        same = mask is None or torch.equal(real[:, :columns], before[:, : real.shape[1]])
        return continued if same else Prompt(real, None)

    def prompt_in(
        self, ids: Int[Tensor, "rows columns"], real: Bool[Tensor, "rows columns"], goes_on: bool = False
    ) -> Bool[Tensor, "rows columns"] | None:
        """Return which columns of a text are the prompt that it continues, or its own; `None`: it cannot be told.

        Args:
            goes_on: whether a text that begins with a known one is certain to go on with it.
        """
        if self.ids is None or self.main.prompt is None:
            return None
        texts = [row[there].tolist() for row, there in zip(ids.cpu(), real.cpu(), strict=True)]
        self._note_choices()
        flags: list[Flags] = []
        options: list[dict[Flags, bool]] = [{} for _ in texts]
        for known in [self._main_known(), *self.known]:
            for text, option, rows in zip(texts, options, known.begun_by(texts), strict=True):
                for i in rows:
                    rest = text[len(known.rows[i]) :]
                    sure = goes_on or self._chose(rest, known.since)
                    is_prompt = (*known.flags[i], *[False] * len(rest))
                    option[is_prompt] = sure or option.get(is_prompt, False)
        for text, option in zip(texts, options, strict=True):
            sure_ones = [is_prompt for is_prompt, sure in option.items() if sure]
            likely = set(sure_ones or [*option, (True,) * len(text)])
            if len(likely) > 1:
                return None
            flags.append(likely.pop())
        if not all(options):
            self.known.append(Known(texts, flags, len(self.chosen)))
        prompt = torch.zeros_like(real, device="cpu")
        for row, there, is_prompt in zip(prompt, real.cpu(), flags, strict=True):
            row[there] = torch.tensor(is_prompt, dtype=torch.bool)
        return prompt.to(real.device)

    def _note_choices(self) -> None:
        if self.written is None or self.ids is None:
            return
        columns = self.written[:, self.ids.shape[1] :].T.tolist()
        self.chosen += [set() for _ in columns[len(self.chosen) :]]
        for chosen, column in zip(self.chosen, columns, strict=False):
            chosen.update(column)

    def _chose(self, tokens: list[int], since: int) -> bool:
        """Return whether these tokens were generated from a step on, though not all in one row.

        Beams change places, and transformers does not reorder what it keeps of a second prompt.
        """
        steps = self.chosen[since : since + len(tokens)]
        return len(steps) == len(tokens) and all(token in chosen for token, chosen in zip(tokens, steps, strict=True))

    def _main_known(self) -> Known:
        assert self.ids is not None and self.main.prompt is not None
        ids, real, prompt = (t.cpu() for t in (self.ids, self.main.real, self.main.prompt))
        rows = [row[there].tolist() for row, there in zip(ids, real, strict=True)]
        return Known(rows, [tuple(row[there].tolist()) for row, there in zip(prompt, real, strict=True)])


def _begins(text: list[int], row: list[int]) -> bool:
    return text[: len(row)] == row
