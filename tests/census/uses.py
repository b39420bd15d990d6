"""Checks of what people do with a model: batches with padding, labels, generation, reuse, LoRA, files, paths."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import reftheads as rh
from census.building import PROMPTS, first_tensor, words
from census.examining import Exam, Nothing, Stack, Wrong, distance
from census.tracing import Place, flat
from reftheads.architectures import locate

RULES = ("f1", "l1", "f2+l2", "all")
NEW = 4
"""Tokens that are generated."""


def columns(rule: str, tokens: list[int]) -> list[int]:
    """Return the columns that a rule means, of those that hold the tokens of a prompt, in order."""
    if rule == "all":
        return tokens
    chosen: set[int] = set()
    terms = rule.split("+")
    for term in terms:
        count = min(int(term[1:]), len(tokens) // 2 if len(terms) > 1 else len(tokens))
        chosen |= set(tokens[:count] if term[0] == "f" else tokens[len(tokens) - count :])
    return sorted(chosen)


class Uses:
    """Examine what is done with one stack of a model."""

    def __init__(self, exam: Exam, stack: Stack):
        self.exam = exam
        self.stack = stack
        self.subject = exam.subject
        self._causal: bool | None = None

    @property
    def causal(self) -> bool:
        """Return whether a token of this stack sees none that comes later, by trying."""
        if self._causal is None and self.subject.species.group in ("encoder", "classifier"):
            self._causal = False
        if self._causal is None:
            name = "decoder_input_ids" if self.stack.role == "decoder" else self.subject.ids
            if name is None or name not in self.exam.alone:
                self._causal = False
                return False
            batch = self.exam.alone
            other = {key: value.clone() for key, value in batch.items()}
            other[name][0, -1] = 10 + (other[name][0, -1] - 9) % 50
            place = self.stack.chain.out[-1]
            seen = [_see(self.exam, place, inputs) for inputs in (batch, other)]
            tokens = batch[name].shape[1]
            before = [flat(h)[: tokens - 1] for h in seen]
            self._causal = bool(torch.allclose(*before, rtol=1e-6, atol=1e-8)) and not torch.allclose(*seen)
        return self._causal

    def edit(self, rule: Any, layer: int | None = None, kind: Any = None, **options: Any) -> rh.Node:
        """Return an edit after a block in the middle."""
        where = self.stack.chain.numbers[self.stack.middle if layer is None else layer]
        return rh.Node(kind or rh.LoReFT(rank=2), where, positions=rule, stack=self.stack.role, name="edit", **options)

    def model(self, *nodes: rh.Node, base: Any = None) -> rh.InterventionModel:
        """Return a copy of the model with a graph whose weights are random."""
        made = rh.InterventionModel(
            copy.deepcopy(self.exam.base if base is None else base), rh.InterventionGraph(*nodes)
        )
        made = made.to(self.subject.dtype).eval()
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape))
        return made

    def by_hand(self, model: Any, wanted: list[list[int]]) -> list[tuple[Place, Callable[[Tensor], Tensor]]]:
        """Return the LoReFT of a model as a change made by hand at some columns of each row."""
        node = model.node("edit")
        r, w, b = (getattr(node, letter).detach() for letter in ("R", "W", "b"))

        def change(h: Tensor) -> Tensor:
            if h.shape[-1] != r.shape[-1]:
                raise Wrong(f"the library says that blocks are {r.shape[-1]} wide, and they are {h.shape[-1]}")
            columns_first = h.ndim == 3 and h.shape[0] != len(wanted) == h.shape[1]
            rows = h.transpose(0, 1) if columns_first else h
            new = rows.clone(memory_format=torch.contiguous_format).reshape(len(wanted), -1, h.shape[-1])
            for i, row in enumerate(wanted):
                x = new[i, row]
                new[i, row] = x + (x @ w.to(x).T + b.to(x) - x @ r.to(x).T) @ r.to(x)
            return new.reshape(rows.shape).transpose(0, 1) if columns_first else new.reshape(h.shape)

        return [(self.stack.chain.out[self.stack.middle], change)]

    # --- batches ----------------------------------------------------------------------------------------------

    def _batches(self) -> list[tuple[str, dict[str, Tensor], list[list[int]]]]:
        """Return ragged batches of both paddings with the columns of each row's tokens."""
        rows = words()
        if self.subject.ids is None or self.stack.role == "encoder" and self.subject.ids != "input_ids":
            tokens = flat(_see(self.exam, self.stack.chain.out[self.stack.middle], self.exam.alone)).shape[0]
            batch = self.subject.batch(rows)
            return [("as it is", batch, [list(range(tokens))] * len(rows))]
        made = []
        for side in ("right", "left"):
            batch = self.subject.batch(rows, side)
            if self.stack.role == "decoder" and "decoder_input_ids" in self.subject.extra:
                width = batch["decoder_input_ids"].shape[1]
                made.append((side, batch, [list(range(width))] * len(rows)))
                continue
            mask = batch.get("attention_mask", batch.get("decoder_attention_mask"))
            assert mask is not None
            made.append((side, batch, [row.nonzero().flatten().tolist() for row in mask]))
        return made

    def rows(self) -> None:
        """Check that a rule means the same tokens in a ragged batch, padded on either side."""
        for side, batch, tokens in self._batches():
            self._runs(batch)
            for rule in RULES:
                model = self.model(self.edit(rule))
                changes = self.by_hand(model, [columns(rule, row) for row in tokens])
                expected, got = self.exam.hand(changes, batch), self.exam.output(model, batch)
                if distance(expected, self.exam.output(self.exam.base, batch)) < 1e-5:
                    raise Nothing("the edit cannot be seen in the output")
                if got.shape != expected.shape:
                    raise Wrong(f"{rule}, padding {side}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
                if self.subject.ids is not None and expected.ndim == 3 and len(tokens[0]) == expected.shape[1]:
                    for i, row in enumerate(tokens):
                        self.exam.equal(got[i, row], expected[i, row], f"{rule}, padding {side}, row {i}")
                else:
                    self.exam.equal(got, expected, f"{rule}, padding {side}")

    def alone(self) -> None:
        """Check that a row in a ragged batch gives what it gives alone, where the model itself does so."""
        if self.subject.ids is None:
            raise Nothing("no rows of tokens")
        rows, seen = words(), 0
        for side, batch, tokens in self._batches():
            for inputs in (batch, self.subject.batch([rows[-1]])):
                self._runs(inputs)
            plain = self.exam.output(self.exam.base, batch)
            singles = [self.exam.output(self.exam.base, self.subject.batch([row])) for row in rows]
            if not self._same_rows(plain, singles, tokens):
                continue
            seen += 1
            for rule in RULES:
                model = self.model(self.edit(rule))
                got = self.exam.output(model, batch)
                ones = [self.exam.output(model, self.subject.batch([row])) for row in rows]
                if not self._same_rows(got, ones, tokens):
                    raise Wrong(f"{rule}, padding {side}: a row in the batch is not what it is alone")
        if not seen:
            raise Nothing("the model itself gives padded rows something else")

    def _same_rows(self, batch: Tensor, singles: list[Tensor], tokens: list[list[int]]) -> bool:
        """Return whether rows of a batch are what they are alone."""
        whole = batch.ndim == 2 or batch.shape[1] != len(tokens[0])
        return all(
            distance(batch[i] if whole else batch[i, row], one[0]) < self.subject.exact * 10
            for i, (row, one) in enumerate(zip(tokens, singles, strict=True))
        )

    def labels(self) -> None:
        """Check that in training a rule counts the tokens of the prompt, not of the answer."""
        if self.exam.pairs or not self.causal or self.subject.ids != "input_ids":
            raise Nothing("no prompt and answer in one row")
        for side, batch, tokens in self._batches():
            batch |= {"labels": self._labels(batch, tokens)}
            self._runs(batch)
            for rule in ("l1", "f2+l2"):
                model = self.model(self.edit(rule))
                wanted = [columns(rule, row[: self._prompt(n)]) for row, n in zip(tokens, PROMPTS, strict=True)]
                expected, got = self.exam.hand(self.by_hand(model, wanted), batch), self.exam.output(model, batch)
                if expected.ndim == 2:
                    raise Nothing("its labels are of whole rows")
                for i, row in enumerate(tokens):
                    self.exam.equal(got[i, row], expected[i, row], f"{rule} with labels, padding {side}, row {i}")

    def _runs(self, batch: dict[str, Tensor]) -> None:
        """Raise `Nothing` where the model by itself does not take a batch."""
        try:
            self.exam.output(self.exam.base, batch)
        except Exception as error:
            raise Nothing(f"the model itself does not take it: {type(error).__name__}: {error}"[:200]) from None

    def _trains(self, batch: dict[str, Tensor]) -> None:
        """Raise `Nothing` where the model by itself has no gradient."""
        inputs = {name: value for name, value in batch.items() if name != "y"}
        model = copy.deepcopy(self.exam.base).train()  # which counts the means of batches anew
        try:
            first_tensor(model(**inputs)).sum().backward()
        except Exception as error:
            raise Nothing(f"the model itself has no gradient: {type(error).__name__}: {error}"[:200]) from None

    def _labels(self, batch: dict[str, Tensor], tokens: list[list[int]]) -> Tensor:
        """Return labels on what follows each prompt."""
        labels = torch.full_like(batch["input_ids"], -100)
        for i, (row, prompt) in enumerate(zip(tokens, PROMPTS, strict=True)):
            answer = row[self._prompt(prompt) :]
            labels[i, answer] = batch["input_ids"][i, answer]
        return labels

    def _prompt(self, words: int) -> int:
        """Return how many tokens a prompt of so many words has."""
        return len(self.subject.kind.prefix) + words

    # --- generation -----------------------------------------------------------------------------------------------

    def _generate(self, model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        """Return sequences and the logits of each new token: [rows new vocabulary]."""
        torch.manual_seed(0)
        out = model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return out.sequences, torch.stack(out.logits, 1)

    def _prompts(self) -> dict[str, Tensor]:
        """Return a batch to generate from, padded on the left."""
        made = self.subject.batch(words(), "left")
        made.pop("position_ids", None)
        if self.exam.pairs:
            made.pop("decoder_input_ids", None)
        return made

    def _forced(self, sequences: Tensor, batch: dict[str, Tensor], changes: list) -> Tensor:
        """Return the logits of the new tokens when the base model is given what was generated."""
        if self.exam.pairs:
            inputs = batch | {"decoder_input_ids": sequences}
            return self.exam.hand(changes, inputs)[:, -NEW - 1 : -1]
        mask = nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
        inputs = batch | self.subject.beside(sequences) | {"input_ids": sequences, "attention_mask": mask}
        if self.subject.positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return self.exam.hand(changes, inputs)[:, -NEW - 1 : -1]

    def generation(self) -> None:
        """Check that generating with a cache is generating without, and what the model gives for the whole text."""
        base = self.exam.base
        if not getattr(base, "can_generate", lambda: False)() or self.subject.ids != "input_ids":
            raise Nothing("it does not generate text")
        if not self.exam.pairs and not self.causal:
            raise Nothing("it does not generate text")
        batch = self._prompts()
        try:
            logits = self._generate(copy.deepcopy(base), batch)[1]
            alone, uncached = self._generate(copy.deepcopy(base), batch, use_cache=False)
        except Exception as error:
            raise Nothing(f"the model itself does not generate: {type(error).__name__}: {error}"[:200]) from None
        cached_agrees = distance(logits, uncached) < self.subject.exact * 100
        forced_agrees = self._forced_agrees(batch, alone, uncached)
        for rule in ("f1", "l1"):
            if self.stack.role == "decoder":
                rule = "all"
            model = self.model(self.edit(rule))
            sequences, got = self._generate(model, batch)
            alone, without = self._generate(model, batch, use_cache=False)
            if cached_agrees:
                self.exam.equal(got, without, f"{rule}: with a cache, against without,", 1000)
            if not forced_agrees:
                if not cached_agrees:
                    raise Nothing("the model itself gives something else with a cache")
                continue
            if not cached_agrees:
                sequences, got = alone, without
            wanted = self._wanted(rule, batch, sequences)
            expected = self._forced(sequences, batch, self.by_hand(model, wanted))
            self.exam.equal(got, expected, f"{rule}: generated, against by hand,", 1000)

    def _forced_agrees(self, batch: dict[str, Tensor], sequences: Tensor, logits: Tensor) -> bool:
        """Return whether the model itself gives for the whole text what it gave when it generated it."""
        if not self.exam.pairs and sequences.shape[1] != batch["input_ids"].shape[1] + NEW:
            return False  # BLIP cuts prompts by itself
        try:
            forced = self._forced(sequences, batch, [])
        except Exception:  # it does not take what it generated, as sound instead of codes
            return False
        return forced.shape == logits.shape and distance(logits, forced) < self.subject.exact * 100

    def _wanted(self, rule: str, batch: dict[str, Tensor], sequences: Tensor) -> list[list[int]]:
        """Return the columns of a rule when rows were generated."""
        if self.stack.role == "decoder":
            return [list(range(sequences.shape[1]))] * len(sequences)
        return [columns(rule, row.nonzero().flatten().tolist()) for row in batch["attention_mask"]]

    # --- reuse ----------------------------------------------------------------------------------------------------

    def _graph(self) -> list[rh.Node]:
        """Return an edit at the prompt's last token and a head above it."""
        last = self.stack.chain.numbers[-1]
        head = rh.Node(rh.LinearHead(3, target="y"), last, positions="l1", stack=self.stack.role, name="head")
        return [self.edit("l1"), head]

    def reuse(self) -> None:
        """Check that losses and gradients are the same within `reusing`, the first time and when found again."""
        if self.subject.ids is None:
            raise Nothing("no tokens")
        model = self.model(*self._graph()).train()
        for side, batch, tokens in self._batches():
            batch |= {"y": torch.tensor([0, 2])}
            if self.exam.pairs and "decoder_input_ids" in batch:
                batch |= {"labels": batch["decoder_input_ids"].clone()}
            elif self.causal:
                batch |= {"labels": self._labels(batch, tokens)}
            self._runs({name: value for name, value in batch.items() if name != "y"})
            self._trains(batch)
            plain = _step(model, batch)
            store = rh.ActivationStore()
            for turn in ("recorded", "found again"):
                with model.reusing(store):
                    got = _step(model, batch)
                self._same_step(got, plain, f"padding {side}, {turn}")
            with model.reusing(None):
                self._same_step(_step(model, batch), plain, f"padding {side}, without a store")

    def _same_step(self, got: dict[str, Tensor], plain: dict[str, Tensor], what: str) -> None:
        """Compare losses and gradients; a gradient that is 0 may be missing."""
        for name in sorted(plain.keys() | got.keys(), key=lambda n: (n != "loss", n)):
            zero = torch.zeros_like(plain[name] if name in plain else got[name])
            one, other = got.get(name, zero), plain.get(name, zero)
            if float(other.abs().max()) < 1e-9 and float(one.abs().max()) < 1e-7:
                continue
            self.exam.equal(one, other, f"{name}, {what},", 10)

    def reuse_generation(self) -> None:
        """Check that `generate` within `reusing` gives the same logits, the first time and when found again."""
        if not getattr(self.exam.base, "can_generate", lambda: False)() or self.subject.ids != "input_ids":
            raise Nothing("it does not generate text")
        if self.stack.role == "encoder" or not self.causal:
            raise Nothing("it does not generate text")
        batch = self._prompts()
        try:
            self._generate(copy.deepcopy(self.exam.base), batch)
        except Exception as error:
            raise Nothing(f"the model itself does not generate: {type(error).__name__}: {error}"[:200]) from None
        model = self.model(self.edit("l1"))
        _, plain = self._generate(model, batch)
        store = rh.ActivationStore()
        for turn in ("recorded", "found again"):
            with model.reusing(store):
                _, got = self._generate(model, batch)
            self.exam.equal(got, plain, f"logits within reusing, {turn},", 100)

    # --- weights and files ----------------------------------------------------------------------------------------

    def lora(self) -> None:
        """Check that LoRA at a projection is the base model with the product added to its weights."""
        done = 0
        refusal: Exception | None = None
        for component in ("query_output", "mlp_output", "attention_output"):
            layer = self.stack.chain.numbers[self.stack.middle]
            node = rh.Node(rh.LoRA(rank=2), layer, component, stack=self.stack.role, name="lora")
            try:
                model = self.model(node)
            except ValueError as error:
                refusal = error
                continue
            address = _address(model)
            weights = dict(model.node("lora").named_parameters())
            a, b = weights_of(weights)
            merged = copy.deepcopy(self.exam.base)
            linear = merged.get_submodule(address.module)
            product = (b @ a).detach()
            weight = linear.weight if isinstance(getattr(linear, "weight", None), nn.Parameter) else None
            if weight is None or weight.ndim != 2:
                raise Nothing(f"{component} is no linear map")
            if sum(module._parameters.get("weight") is weight for module in merged.modules()) > 1:
                raise Nothing("other blocks share the weight")
            target = weight.data.T if type(linear).__name__ == "Conv1D" else weight.data
            target[address.index] += product * (2 / 2)
            self.exam.equal(self.exam.output(model), self.exam.output(merged), f"LoRA at {component}", 10)
            done += 1
        if not done and refusal is not None:
            raise refusal

    def files(self) -> None:
        """Check that a saved adapter on a new base model gives the same."""
        model = self.model(self.edit("l1"))
        expected = self.exam.output(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = rh.InterventionModel.from_pretrained(copy.deepcopy(self.exam.base), folder)
            got = self.exam.output(loaded.to(self.subject.dtype).eval())
        self.exam.equal(got, expected, "what was saved and loaded", 10)

    def path(self) -> None:
        """Check that an edit at a dotted path is the same change made by hand."""
        place = self.paths()
        seen = next(s.value for s in self.exam.record.seen if s.place == place)
        vector = self.exam.vector(seen.shape[-1], max(1.0, float(seen.double().std())))
        node = rh.Node(rh.Steering(vector.float()), component=place.path, name="edit")
        model = self.exam.model(node)
        expected = self.exam.hand([(place, lambda h: h + vector.to(h))])
        if distance(expected, self.exam.output(self.exam.base)) < 1e-5:
            raise Nothing("the edit cannot be seen in the output")
        self.exam.equal(self.exam.output(model), expected, f"an edit at {place.path}")

    def paths(self) -> Place:
        """Return the output of a projection in a block in the middle, or of any module that gives what tokens have."""
        block = self.stack.chain.blocks[self.stack.middle]
        seen = [s for s in self.exam.record.seen if s.place.side == "output" and s.place.path.startswith(f"{block}.")]
        linear = [s for s in seen if isinstance(self.exam.base.get_submodule(s.place.path), nn.Linear)]
        shape = next(s.value.shape for s in self.exam.record.seen if s.place == self.stack.chain.out[0])
        fit = [s for s in linear if s.value.shape[:-1] == shape[:-1]]
        return (fit or linear or seen)[-1].place if seen else self.stack.chain.out[self.stack.middle]


def weights_of(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A [rank in] and B [out rank] of a LoRA."""
    pair = [w for w in weights.values() if w.ndim == 2]
    a = next(w for w in pair if w.shape[0] == 2)
    b = next(w for w in pair if w is not a)
    return a, b


def _address(model: rh.InterventionModel) -> Any:
    """Return where the only node of a model acts."""
    (node,) = model.peft_config["default"].graph
    return locate(model.get_base_model(), node.site)


def _see(exam: Exam, place: Place, inputs: dict[str, Tensor]) -> Tensor:
    """Return the tensor at a place in one pass of the base model."""
    seen: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        seen.append(h.detach().clone())
        return h

    exam.hand([(place, keep)], inputs)
    return seen[0]


def _step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss and all gradients of a step of training."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**batch)
    if output.loss is None:
        return {}
    if output.loss.requires_grad:
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()[None], **gradients}


USE_CHECKS = {
    "rules in a ragged batch": Uses.rows,
    "a row in the batch, alone": Uses.alone,
    "rules with labels": Uses.labels,
    "generate": Uses.generation,
    "reusing": Uses.reuse,
    "generate within reusing": Uses.reuse_generation,
    "LoRA": Uses.lora,
    "saved and loaded": Uses.files,
    "a path": Uses.path,
}
