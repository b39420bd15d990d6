"""Checks of components: each is read, compared with its definition, and an edit with the same change made by hand."""

import torch
from torch import Tensor, nn

import reftheads as rh
from census.examining import Exam, Nothing, Stack, Wrong, distance
from census.tracing import Place, Trace, covers, flat, same

MIDDLE = 2
"""The token that is edited where one is."""
MIXED = ("nystromformer",)
"""Types whose attention mixes the queries of several tokens."""


class Components:
    """Examine the components of one stack, in blocks of every kind that it has."""

    def __init__(self, exam: Exam, stack: Stack):
        self.exam = exam
        self.stack = stack
        self.layers = self._layers()
        self._read: dict[tuple[str, int | None], Tensor | Exception] = {}

    def _layers(self) -> list[int]:
        """Return the last block of each kind."""
        kinds: dict[tuple, int] = {}
        for i, path in enumerate(self.stack.chain.blocks):
            inside = self.exam.base.get_submodule(path).named_modules()
            kinds[tuple((name, type(module).__name__) for name, module in inside)] = i
        return sorted(kinds.values())[-4:]

    def node(self, what: rh.Node | object, component: str, layer: int | None, **options) -> rh.Node:
        """Return a node at a component of this stack."""
        layer = None if layer is None else self.stack.chain.numbers[layer]
        return rh.Node(what, layer, component, stack=self.stack.role, **options)  # type: ignore[arg-type]

    def read(self, component: str, layer: int | None) -> Tensor:
        """Return what the library reads at a component: [tokens width]."""
        key = (component, layer)
        if key not in self._read:
            try:
                model = self.exam.model(self.node(rh.Collect(), component, layer, name="seen"))
                torch.manual_seed(0)
                with torch.no_grad():
                    self._read[key] = model(**self.exam.alone).collected["seen"][0]
            except Exception as error:
                self._read[key] = error
        value = self._read[key]
        if isinstance(value, Exception):
            raise value
        return value

    def known(self, component: str, layer: int | None) -> Tensor | None:
        """Return the same, or None where the library refuses."""
        try:
            return self.read(component, layer)
        except Exception:
            return None

    def edited(self, component: str, layer: int | None, vector: Tensor, **options) -> Tensor:
        """Return the logits with a vector added at a component by the library."""
        try:
            model = self.exam.model(self.node(rh.Steering(vector.float()), component, layer, name="add", **options))
        except ValueError as error:
            if "must have shape" not in str(error):
                raise
            raise Wrong(f"{component}[{layer}] is {len(vector)} wide, and the library says: {error}") from None
        return self.exam.output(model)

    def adds(self, component: str, layer: int | None, places: list[Place]) -> None:
        """Check that adding a vector at a component is adding it by hand at all of some places."""
        if not places:
            raise Wrong(f"no module takes or gives what is read at {component}[{layer}]")
        read = self.read(component, layer)
        vector = self.exam.vector(read.shape[-1], size_of(read))
        by = [(place, lambda h: h + vector.to(h)) for place in places]
        expected = self.exam.hand(by)
        if distance(expected, self.exam.output(self.exam.base)) < 1e-4 and component != "key_output":
            raise Nothing("the edit cannot be seen in the output")
        self.exam.equal(self.edited(component, layer, vector), expected, f"an edit at {component}[{layer}]")

    def entering(self, layer: int) -> Tensor:
        """Return what enters a block, by the trace."""
        return self._own(_value(self.exam.record, self.stack.chain.into[layer]))

    def _own(self, h: Tensor) -> Tensor:
        """Return a tensor without the padding that a model adds after the row by itself."""
        tokens = self.exam.width
        of_tokens = self.exam.subject.ids == "input_ids" or self.exam.subject.ids and self.stack.role != "encoder"
        longer = of_tokens and h.ndim == 3 and h.shape[0] == 1
        return h[:, :tokens] if longer and tokens < h.shape[1] < 2 * tokens else h

    def leaving(self, layer: int) -> Tensor:
        """Return what leaves a block, by the trace."""
        return self._own(_value(self.exam.record, self.stack.chain.out[layer]))

    # --- the residual stream ---------------------------------------------------------------------------

    def blocks(self) -> None:
        """Check `block_output` and `block_input`: what leaves a block is what enters the next."""
        chain = self.stack.chain
        for layer in range(len(chain.blocks)):
            read = self.read("block_output", layer)
            if not covers(self.leaving(layer), read):
                raise Wrong(f"block_output[{layer}] is not what leaves {chain.blocks[layer]}")
            self.adds("block_output", layer, [chain.out[layer]])
        for layer in self.layers:
            if not covers(self.entering(layer), self.read("block_input", layer)):
                raise Wrong(f"block_input[{layer}] is not what enters {chain.blocks[layer]}")
            self.adds("block_input", layer, [chain.into[layer]])
        beyond = len(self.exam.base.get_submodule(chain.path))
        try:
            self.exam.model(rh.Node(rh.Collect(), beyond, stack=self.stack.role))
        except ValueError:
            return
        raise Wrong(f"there is a block {beyond}")

    def embeddings(self) -> None:
        """Check `embedding_output`: what enters the first block."""
        if not covers(self.entering(0), self.read("embedding_output", None)):
            raise Wrong("embedding_output is not what enters the first block")
        self.adds("embedding_output", None, [self.stack.chain.into[0]])

    def final_norm(self) -> None:
        """Check `final_norm_output`: what leaves the stack, or enters the vocabulary projection."""
        read = self.read("final_norm_output", None)
        last = self.stack.chain.blocks[-1]
        begin = max(i for i, s in enumerate(self.exam.record.seen) if s.place.path == last)
        after = self.exam.record.seen[begin + 1 :]
        places = [s.place for s in after if same(s.value, read)]
        norms = [place for place in places if place.side == "output"]
        if not norms:
            raise Wrong("final_norm_output does not come after the last block")
        leaves = [s for s in self.exam.record.seen if s.place.side == "output" and s.place.path in _above(last)]
        head = self.exam.base.get_output_embeddings() if hasattr(self.exam.base, "get_output_embeddings") else None
        enters = [s.value for s in after if head is not None and self.exam.base.get_submodule(s.place.path) is head]
        if not any(same(s.value, read) for s in leaves) and not any(same(value, read) for value in enters):
            raise Wrong("final_norm_output is not what leaves the stack")
        self.adds("final_norm_output", None, norms[:1])

    # --- what is added to it -----------------------------------------------------------------------------

    def sublayers(self) -> None:
        """Check `attention_output` and `mlp_output`: with what enters a block they make up what leaves it."""
        seen = 0
        for layer in self.layers:
            attention, mlp = self.known("attention_output", layer), self.known("mlp_output", layer)
            if attention is None and mlp is None:
                self.read("attention_output", layer)
            if attention is None or mlp is None:
                self._one_sublayer(layer, attention if mlp is None else mlp)
                seen += 1
                continue
            seen += 1
            parts = [flat(self.entering(layer)), flat(attention), flat(mlp)]
            if parts[0].shape[0] > parts[1].shape[0] == parts[2].shape[0]:
                raise Nothing("the residual stream has several parts")
            if len({part.shape for part in parts}) > 1:
                raise Wrong(f"what is read in block {layer} has shapes {[tuple(part.shape) for part in parts]}")
            if not self._adds_up(layer, parts):
                raise Wrong(f"block_input, attention_output and mlp_output do not make up block_output[{layer}]")
            for component, value in (("attention_output", attention), ("mlp_output", mlp)):
                self.adds(component, layer, self._outputs(layer, value))

    def _one_sublayer(self, layer: int, value: Tensor | None) -> None:
        """Check a block of which one sublayer alone is known; the other stands in the trace, if there is one."""
        assert value is not None
        name = "attention_output" if self.known("attention_output", layer) is not None else "mlp_output"
        entering, leaving = flat(self.entering(layer)), flat(self.leaving(layer))
        others = self._candidates(layer, leaving)
        fits = combines(leaving, [entering, flat(value)])
        fits = fits or any(combines(leaving, [entering, flat(value), other]) for other in others)
        if not fits:
            fits = any(combines(i, [entering, flat(value)]) for i, _ in self._through(layer)) or any(
                combines(leaving, [o, flat(value)]) for _, o in self._through(layer)
            )
        if not fits:  # more than two sublayers, as of a Conformer: what enters one is what entered another, and this
            entered = [i for i, _ in self._through(layer)]
            fits = any(_close(a + flat(value), b) for a in entered for b in entered)
        if not fits:
            raise Wrong(f"{name}[{layer}] is not added to the residual stream")
        self.adds(name, layer, self._outputs(layer, value))

    def _outputs(self, layer: int, value: Tensor) -> list[Place]:
        """Return the last module in a block that gives a value."""
        places = self.exam.record.places(value, self.stack.chain.blocks[layer])
        outs = [p for p in places if p.side == "output" and p.path != self.stack.chain.blocks[layer]]
        return outs[:1]

    def _adds_up(self, layer: int, parts: list[Tensor]) -> bool:
        """Return whether a block's output is made of its input and what its sublayers add, with norms after or not."""
        entering = parts[0]
        starts = [out for into, out in self._through(layer) if _close(into, entering)]  # the stream is normed at once
        return any(self._made_of(layer, [start, *parts[1:]]) for start in [entering, *starts])

    def _made_of(self, layer: int, parts: list[Tensor]) -> bool:
        """Return the same where the residual stream begins with the first of the parts."""
        entering, attention, mlp = parts
        leaving = flat(self.leaving(layer))
        if combines(leaving, parts):
            return True
        steps = self._through(layer)
        others = self._candidates(layer, leaving)
        if any(combines(leaving, [*parts, other]) for other in others):
            return True
        middles = [out for into, out in steps if combines(into, [entering, attention])]  # the first norm after
        middles += [
            out
            for into, out in steps
            for other in others
            for middle in list(middles)
            if combines(into, [middle, other])
        ]
        for middle in [*middles, entering + attention]:
            if combines(leaving, [middle, mlp]):
                return True
            if any(combines(into, [middle, mlp]) and _close(out, leaving) for into, out in steps):
                return True
        summed = [out for into, out in steps if combines(into, parts)]  # parallel, the norm after both
        return any(_close(out, leaving) for out in summed)

    def _through(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return what entered and left every module in a block that keeps the width."""
        record, block = self.exam.record, self.stack.chain.blocks[layer]
        shape = flat(self.entering(layer)).shape
        pairs = []
        for path in dict.fromkeys(s.place.path for s in record.seen if s.place.path.startswith(f"{block}.")):
            into, out = record.values(path, "input"), record.values(path, "output")
            if into and out:
                pair = flat(self._own(into[0])), flat(self._own(out[0]))
                pairs += [pair] if pair[0].shape == shape == pair[1].shape else []
        return pairs

    def _candidates(self, layer: int, like: Tensor) -> list[Tensor]:
        """Return what modules in a block give that could be added too, as a cross-attention's output is.

        What reads the MLP's input belongs to the MLP.
        """
        record, block = self.exam.record, self.stack.chain.blocks[layer]
        read = self.known("mlp_input", layer)
        mlp = [] if read is None else [p.path for p in record.places(read, block) if p.side == "input"]
        mlp = [path for path in mlp if path != block]
        outs = (s for s in record.seen if s.place.side == "output" and s.place.path.startswith(f"{block}."))
        outs = (s for s in outs if not any(_inside(s.place.path, path) for path in mlp))
        found: list[Tensor] = []
        for s in outs:
            value = flat(self._own(s.value))
            if value.shape == like.shape and not any(torch.equal(value, other) for other in found):
                found.append(value)
        return found

    # --- attention ----------------------------------------------------------------------------------------

    def attention_input(self) -> None:
        """Check `attention_input`: what the projections of queries, keys and values read, and nothing else."""
        for layer in self._where("attention_input"):
            read = self.read("attention_input", layer)
            block = self.stack.chain.blocks[layer]
            inside = self._attention(layer)
            places = self.exam.record.places(read, inside or block)
            leaves = [p for p in places if p.side == "input" and self._projects(p.path)]
            if inside in ("", block):
                leaves = [p for p in leaves if "att" in p.path.removeprefix(block)]
            if not leaves:
                leaves = [p for p in places if p.side == "input"][-1:]
            try:
                self.adds("attention_input", layer, leaves)
            except Wrong:  # something in it reads its input without a module
                whole = [p for p in places if p.side == "input" and p.path == inside]
                if not whole:
                    raise
                self.adds("attention_input", layer, whole)

    def _leaf(self, path: str) -> bool:
        """Return whether a module has none inside."""
        return not list(self.exam.base.get_submodule(path).children())

    def _projects(self, path: str) -> bool:
        """Return whether a module has weights of its own and no parts."""
        return self._leaf(path) and next(self.exam.base.get_submodule(path).parameters(), None) is not None

    def _attention(self, layer: int) -> str:
        """Return the smallest module in a block in which queries, keys and values, or heads, arise."""
        block = self.stack.chain.blocks[layer]
        paths: list[str] = []
        for component in ("query_output", "key_output", "value_output"):
            if (value := self.known(component, layer)) is not None:
                paths += [p.path for p in self._columns(value, block)][:1]
        if not paths and (value := self.known("attention_input", layer)) is not None:
            reads = [p.path for p in self.exam.record.places(value, block) if p.side == "input"]
            paths = [path for path in reads if self._projects(path) and "att" in path.removeprefix(block)]
        if not paths and (value := self.known("attention_output", layer)) is not None:
            paths = [p.path for p in self._outputs(layer, value)]
        if not paths:
            return ""
        around = [path.rpartition(".")[0] for path in paths]
        common = around[0]
        while not all(f"{a}.".startswith(f"{common}.") for a in around):
            common = common.rpartition(".")[0]
        return common

    def _columns(self, value: Tensor, block: str) -> list[Place]:
        """Return the modules in a block whose output has a value among its columns, in any order."""
        found = []
        target = flat(value)
        for s in self.exam.record.seen:
            if s.place.side != "output" or not s.place.path.startswith(f"{block}."):
                continue
            h = flat(s.value)
            h = h[: target.shape[0]]
            if h.shape[0] == target.shape[0] and h.shape[1] >= target.shape[1]:
                if all(bool((h == target[:, [c]]).all(0).any()) for c in range(target.shape[1])):
                    found.append(s.place)
        return found

    def heads(self) -> None:
        """Check `head_output`: what the attention's output projection reads, a head beside the other."""
        for layer in self._where("head_output"):
            read = self.read("head_output", layer)
            places = self.exam.record.places(read, self.stack.chain.blocks[layer])
            leaves = [p for p in places if p.side == "input"]
            self.adds("head_output", layer, leaves[-1:])
            one = self.known_head(layer, 1)
            if one is None:
                continue
            width = one.shape[-1]
            zero = self.exam.model(self.node(rh.Ablate(), "head_output", layer, head=1))
            expected = self.exam.hand([(leaves[-1], lambda h, w=width: _without(h, w))])
            self.exam.equal(self.exam.output(zero), expected, f"head 1 of head_output[{layer}] ablated")

    def known_head(self, layer: int, head: int) -> Tensor | None:
        """Return what the library reads at a head, or None where it refuses."""
        try:
            model = self.exam.model(self.node(rh.Collect(), "head_output", layer, head=head, name="seen"))
        except ValueError:
            return None
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**self.exam.alone).collected["seen"][0]

    def heads_after(
        self, layer: int, component: str | None = None, size: float = 0.0, head: int | None = None
    ) -> Tensor:
        """Return `head_output` where a vector is added to one token at a component before it."""
        nodes = [self.node(rh.Collect(), "head_output", layer, name="seen")]
        if component is not None:
            width = self.read(component, layer).shape[-1]
            if head is not None:
                model = self.exam.model(self.node(rh.Collect(), component, layer, head=head, name="seen"))
                with torch.no_grad():
                    width = model(**self.exam.alone).collected["seen"].shape[-1]
            add = rh.Steering(self.exam.vector(width, size).float())
            nodes = [self.node(add, component, layer, head=head, positions=MIDDLE), *nodes]
        model = self.exam.model(*nodes)
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**self.exam.alone).collected["seen"][0].double()

    def queries(self) -> None:
        """Check queries, keys and values by what a change at one token does to the heads' outputs."""
        for layer in self._where("query_output"):
            before = self.heads_after(layer)
            for component in ("query_output", "key_output", "value_output"):
                if self.known(component, layer) is None:
                    continue
                size = size_of(self.read(component, layer))
                if before.shape[0] <= MIDDLE:
                    raise Wrong(f"the library reads {before.shape[0]} tokens where there are more")
                once, twice = (self.heads_after(layer, component, factor * size) for factor in (1, 2))
                moved = (once - before).abs().amax(-1) > 1e-9 * before.abs().max()
                alone = torch.zeros_like(moved)
                alone[MIDDLE] = True
                if not moved.any():
                    raise Nothing(f"{component}[{layer}] has no effect on the heads")
                near = alone.clone()
                near[MIDDLE : MIDDLE + 4] = True  # a convolution over a few tokens may follow the projection
                if component == "query_output" and self.exam.subject.species.model_type in MIXED:
                    raise Nothing("landmarks are means of queries")
                if component == "query_output" and bool((moved & ~near).any() or not moved[MIDDLE]):
                    raise Wrong(f"query_output[{layer}] of one token moves the heads of others")
                if component != "query_output" and not (moved & ~alone).any():
                    raise Wrong(f"{component}[{layer}] of one token moves no head of another")
                straight = distance(twice - before, 2 * (once - before)) < self.exam.subject.exact * 10
                if component == "value_output" and not straight and not self._named_value(layer):
                    raise Wrong(f"heads are not linear in value_output[{layer}]")
                if component != "value_output" and straight:
                    raise Wrong(f"heads are linear in {component}[{layer}]")
                self._one_head(layer, component, before)

    def _named_value(self, layer: int) -> bool:
        """Return whether values come from a projection of that name: a norm of the heads then may follow."""
        places = self._columns(self.read("value_output", layer), self.stack.chain.blocks[layer])
        return any(p.path.rpartition(".")[2].startswith("v") for p in places)

    def _one_head(self, layer: int, component: str, before: Tensor) -> None:
        """Check that a head's queries, keys or values move the columns of that head, or of its group, alone."""
        try:
            size = size_of(self.read(component, layer))
            first, second = (self.heads_after(layer, component, size, head) for head in (0, 1))
        except ValueError:  # it has one head, or none that could be told apart
            return
        moved = [((h - before).abs().amax(0) > 1e-9 * before.abs().max()) for h in (first, second)]
        if moved[0].all() and moved[1].all():  # a norm over all heads, or a mask that is made from all values
            return
        if not moved[0].any() or not moved[1].any():  # where attention looks at one token alone
            return
        if bool((moved[0] & moved[1]).any()):
            raise Wrong(f"a head of {component}[{layer}] moves columns of another")
        columns = moved[0].nonzero().flatten()
        if columns[0] != 0 or columns[-1] + 1 != len(columns):
            raise Wrong(f"head 0 of {component}[{layer}] does not move the first columns of head_output")

    def _where(self, component: str) -> list[int]:
        """Return the layers that have a component; the library's refusal where none has."""
        layers = [layer for layer in self.layers if self.known(component, layer) is not None]
        if not layers:
            self.read(component, self.layers[-1])
        return layers

    # --- the MLP -----------------------------------------------------------------------------------------------

    def mlp_input(self) -> None:
        """Check `mlp_input`: what the feed-forward half reads, and nothing else."""
        for layer in self._where("mlp_input"):
            block = self.stack.chain.blocks[layer]
            read = self.read("mlp_input", layer)
            attention = self._attention(layer)
            places = [p for p in self.exam.record.places(read, block) if p.side == "input" and p.path != block]
            outside = [p for p in places if not attention or attention == block or not _inside(p.path, attention)]
            leaves = [p for p in outside if self._projects(p.path) and not self._norm(p.path)]
            try:
                self.adds("mlp_input", layer, leaves)
            except Wrong:
                added = self.known("mlp_output", layer)
                whole = [p for p in outside if added is None or self._leads_to(p, added)]
                whole = [p for p in whole if not self._norm(p.path)]
                if not whole:  # something in it reads its input without a module
                    raise
                self.adds("mlp_input", layer, whole[:1])

    def _norm(self, path: str) -> bool:
        return "norm" in type(self.exam.base.get_submodule(path)).__name__.lower()

    def mlp_activation(self) -> None:
        """Check `mlp_activation`: what enters the last projection, whose output is what is added."""
        for layer in self._where("mlp_activation"):
            block = self.stack.chain.blocks[layer]
            read, added = self.read("mlp_activation", layer), self.known("mlp_output", layer)
            places = [p for p in self.exam.record.places(read, block) if p.side == "input"]
            leaves = [p for p in places if self._leaf(p.path)]
            if not leaves:
                raise Wrong(f"no projection reads mlp_activation[{layer}]")
            if added is not None and not self._leads_to(leaves[-1], added):
                raise Wrong(f"the projection of mlp_activation[{layer}] does not give mlp_output")
            self.adds("mlp_activation", layer, leaves[-1:])

    def _leads_to(self, place: Place, value: Tensor) -> bool:
        """Return whether a projection gives a value, or a norm or scale of its output does."""
        outs = self.exam.record.values(place.path, "output")
        if not outs:
            return False
        out = outs[0]
        if covers(out, value):
            return True
        places = self.exam.record.places(out)
        after = [self.exam.record.values(p.path, "output") for p in places if p.side == "input"]
        return any(covers(h, value) for outs in after for h in outs)

    # --- reading by hand -----------------------------------------------------------------------------------------

    def head_reads(self) -> None:
        """Check that a linear head reads what a hook sees: its prediction is its map of the trace's value."""
        layer = self.stack.middle
        model = self.exam.model(self.node(rh.LinearHead(3), "block_output", layer, positions="all", name="head"))
        torch.manual_seed(3)
        for parameter in model.node("head").parameters():
            parameter.data.normal_()
        torch.manual_seed(0)
        with torch.no_grad():
            got = model(**self.exam.alone).predictions["head"][0]
        weights = dict(model.node("head").named_parameters())
        weight = next(w for w in weights.values() if w.ndim == 2)
        bias = next((w for w in weights.values() if w.ndim == 1), torch.zeros(3))
        expected = nn.functional.linear(flat(self.leaving(layer)).to(weight), weight, bias.to(weight))
        self.exam.equal(got, expected.detach(), "what a head reads", 100)


def size_of(h: Tensor) -> float:
    """Return how large the features of a tensor are, or 1 if that is more."""
    return max(1.0, float(h.double().std()))


def _value(record: Trace, place: Place) -> Tensor:
    return next(s.value for s in record.seen if s.place == place)


def _inside(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def _above(path: str) -> list[str]:
    """Return the modules around a path."""
    around = []
    while path:
        path = path.rpartition(".")[0]
        around.append(path)
    return around


def _without(h: Tensor, width: int) -> Tensor:
    """Return heads without the second."""
    new = h.clone()
    new[..., width : 2 * width] = 0
    return new


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and distance(a, b) < 1e-6


def combines(target: Tensor, parts: list[Tensor]) -> bool:
    """Return whether each feature of a tensor is a sum of those of others, each by a factor that is not zero."""
    if any(part.shape != target.shape for part in parts):
        return False
    y = target.double()
    plain = sum(part.double() for part in parts)
    scale = y.abs().max().clamp(min=1e-9)
    if float((y - plain).abs().max() / scale) < 1e-6:
        return True
    x = torch.stack([part.double() for part in parts], -1).transpose(0, 1)  # [width tokens parts]
    if x.shape[1] <= x.shape[2] + 2:
        return False
    factors = torch.linalg.lstsq(x, y.T[..., None]).solution  # [width parts 1]
    left = (x @ factors)[..., 0].T - y
    return float(left.abs().max() / scale) < 1e-6 and float(factors.abs().amin()) > 1e-6


COMPONENT_CHECKS = {
    "blocks": Components.blocks,
    "embedding_output": Components.embeddings,
    "final_norm_output": Components.final_norm,
    "attention_output, mlp_output": Components.sublayers,
    "attention_input": Components.attention_input,
    "head_output": Components.heads,
    "query, key, value_output": Components.queries,
    "mlp_input": Components.mlp_input,
    "mlp_activation": Components.mlp_activation,
    "a head reads": Components.head_reads,
}
