"""Random graphs and batches, as plain data that prints well and can be made smaller."""

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from support import rules
from support.architectures import LAYERS

import reftheads as rh
from fuzz import own
from fuzz.places import ARCHS, Arch, Place, base_of

IDS = range(3, 40)
SINGLE = ["f1", "l1", "0", "1", "-1", "-2", "5", "f1 of f1+l1", "1:2"]
WORDS = ["all", "all", "prompt", "generated"]
RULES: list[Any] = [
    *SINGLE, *WORDS, "f2", "l3", "f9", "f2+l2", "f7+l7", "l2 of f2+l2", "1:3", "-3:", ":2", "1:-1", "2:", "0+2",
    "f1+generated", "prompt+generated", "f0", "-2:-1+0",
]  # fmt: skip
FUNCTIONS = {"every second": rules.every_second, "every third": rules.every_third}
ACTIVATIONS = [None, None, "relu", "tanh", "sigmoid", "silu", "gelu"]
HEADS = {  # loss: outputs, what the targets are, whether the activation takes part in it
    "cross_entropy": (3, "classes"), "bce": (1, "chances"), "multi_label": (2, "each chance"), "mse": (1, "numbers"),
    "mae": (1, "numbers"), "huber": (1, "numbers"), "mse_of_each": (2, "each number"), "gaussian_nll": (2, "numbers"),
    "quantile": (2, "numbers"), "bradley_terry": (1, "pairs"),
}  # fmt: skip
EDITS = [
    "LoReFT", "LoReFT", "NoReFT", "DiReFT", "NoDiReFT", "ConsReFT", "LobiReFT", "ScaleAndBias", "Steering", "Replace",
    "Ablate", "Shift",
]  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A node as plain data: `what` is a type and its options, an edit within another one likewise."""

    what: tuple[str, dict[str, Any]]
    where: dict[str, Any]
    role: str = ""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.where["name"]

    def node(self) -> rh.Node:
        """The node itself."""
        where = dict(self.where)
        rule = where["positions"]
        where["positions"] = FUNCTIONS.get(rule, rule) if isinstance(rule, str) else rule
        return rh.Node(intervention(*self.what), **where)


def intervention(kind: str, options: dict[str, Any]) -> Any:
    """Make an intervention of plain data."""
    made = {name: intervention(*value) if name == "inner" else value for name, value in options.items()}
    return getattr(rh if hasattr(rh, kind) else own, kind)(**made)


@dataclass(frozen=True)
class RowSpec:
    """A row: its tokens, the numbers of those that are its prompt, what stands around it, and what a decoder gets.

    Attributes:
        answer: of a language model, the number of the first token that has a label.
        heads: random numbers, from which targets are made.
    """

    tokens: list[int]
    prompt: list[int]
    left: int
    right: int
    answer: int
    decoder: list[int] = field(default_factory=list)
    decoder_right: int = 0
    decoder_answer: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A model, graphs for it, and a batch.

    Attributes:
        marked: what says where prompts end: "mask", "labels", "both", or "none".
        shifted: whether a decoder behind an encoder is fed its labels, one column late.
        wrong: why the graph must be refused; `None`: it must not.
    """

    number: int
    arch: str
    adapters: dict[str, list[Spec]]
    rows: list[RowSpec]
    marked: str
    shares: list[str]
    wrong: str | None
    passes: list[str]
    shifted: bool = False
    seed: int = 0


# --- nodes --------------------------------------------------------------------------------------------------


class Graphs:
    """Draws the nodes of one graph for one kind of model."""

    def __init__(self, random: Random, arch: Arch):
        self.random = random
        self.arch = arch
        self.count = 0
        self.places: dict[str, Place] = {}
        self.sites: list[tuple[dict[str, Any], str, Place]] = []

    def draw(self) -> list[Spec]:
        """Some nodes that a graph may have."""
        specs: list[Spec] = []
        for _ in range(self.random.choice([1, 1, 2, 2, 3, 4])):
            kind = self.random.choices(
                ["edit", "lora", "head", "collect", "gated", "shared", "apart", "cross"], [6, 3, 4, 2, 3, 2, 1, 1]
            )[0]
            specs += getattr(self, f"_{kind}")()
        self.random.shuffle(specs)
        return in_order(specs)

    def _name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def rule(self) -> Any:
        """A rule of positions."""
        drawn = self.random.random()
        if drawn < 0.08:
            return {"token_ids": self.random.sample(IDS, 8)}
        if drawn < 0.14:
            return self.random.choice([*FUNCTIONS])
        return self.random.choice(RULES)

    def where(self, linear: bool = False) -> tuple[dict[str, Any], str, Place]:
        """A site with its stack and place; often one that another node has."""
        while True:
            again = bool(self.sites) and self.random.random() < 0.3
            site = self.random.choice(self.sites) if again else self._anywhere()
            if site[2].linear or not linear:
                self.sites.append(site)
                return site

    def _anywhere(self) -> tuple[dict[str, Any], str, Place]:
        role = self.random.choice([*self.arch.roles])
        if self.random.random() < 0.15:
            path, side = self._path(role)
            where = {"component": path} | ({"side": side} if side == "input" else {})
            return where, role, self.arch.at_path(path, side)
        component = self.random.choice([*self.arch.components(role), "block_output", "block_output"])
        where: dict[str, Any] = {"component": component}
        if component not in ("embedding_output", "final_norm_output"):
            where["layer"] = self.random.randrange(-LAYERS, LAYERS)
        if component in ("query_output", "key_output", "value_output", "head_output") and self.random.random() < 0.5:
            case = self.arch.case(role)
            count = case.kv if component in ("key_output", "value_output") else case.heads
            where["head"] = self.random.randrange(-count, count)
        if self.arch.seq2seq and (role != self.arch.role or self.random.random() < 0.5):
            where["stack"] = role
        place = self.arch.place(role, where.get("layer"), component, where.get("head"))
        return where, role, place

    def _path(self, role: str) -> tuple[str, str]:
        """A module that no component names, or one that a component names too."""
        paths, layer = self.arch.paths.get(role, ()), self.random.randrange(LAYERS)
        if paths and self.random.random() < 0.6:
            path, side = self.random.choice(paths)
            return self.arch.case(role).path(path, layer), side
        component = self.random.choice(
            ["block_output", "value_output", "head_output", "attention_output", "mlp_output"]
        )
        place = self.arch.place(role, layer, component)
        return place.modules[0], place.side

    def _spec(self, what: tuple[str, dict[str, Any]], linear: bool = False, rule: Any = None) -> Spec:
        where, role, place = self.where(linear)
        what = self._fitted(what, place.width)
        name = self._name()
        self.places[name] = place
        return Spec(what, where | {"positions": rule or self.rule(), "name": name}, role)

    def _fitted(self, what: tuple[str, dict[str, Any]], width: int) -> tuple[str, dict[str, Any]]:
        kind, options = what
        number = {"Steering": "vector", "Replace": "value", "Ablate": "mean"}.get(kind)
        if number in options:
            options = options | {number: [round(self.random.gauss(0, 1), 3) for _ in range(width)]}
        if "inner" in options:
            options = options | {"inner": self._fitted(options["inner"], width)}
        return kind, options

    def edit(self) -> tuple[str, dict[str, Any]]:
        """A type of edit with options; vectors are put in where the width is known."""
        kind, maybe = self.random.choice(EDITS), self.random.random() < 0.5
        if kind in ("ScaleAndBias", "Shift"):
            return kind, {}
        if kind == "Steering":
            return kind, {"scale": self.random.choice([1.0, -0.5, 2])} | (
                {"vector": None, "trainable": self.random.random() < 0.5} if maybe else {}
            )
        if kind == "Replace":
            return kind, {"value": None}
        if kind == "Ablate":
            return kind, {"mean": None} if maybe else {}
        options: dict[str, Any] = {"rank": self.random.choice([1, 2, 4])}
        if kind not in ("ConsReFT", "LobiReFT"):
            options |= {"act_fn": self.random.choice(ACTIVATIONS), "bias": self.random.random() < 0.7}
        if self.random.random() < 0.15:
            options["dtype"] = "float64"
        if self.random.random() < 0.1:
            options["dropout"] = 0.3
        return kind, options

    def _lora_options(self) -> dict[str, Any]:
        return {"rank": self.random.choice([1, 2, 4])} | self.random.choice([{}, {"alpha": 3}, {"dropout": 0.2}])

    def _edit(self) -> list[Spec]:
        return [self._spec(self.edit())]

    def _lora(self) -> list[Spec]:
        return [self._spec(("LoRA", self._lora_options()), linear=True)]

    def head(self, rule: Any, role: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """A head at a rule of positions, whose target says by its name what it must be."""
        if not options:
            loss = self.random.choice([*HEADS])
            outputs, numbers = HEADS[loss]
            options = {"outputs": outputs, "loss": loss} if loss != "cross_entropy" else {"outputs": outputs}
            options |= {"quantiles": (0.2, 0.7)} if loss == "quantile" else {}
            if loss == "cross_entropy" and self.random.random() < 0.3:
                options["class_weights"] = (0.5, 2.0, 1.0)
            options["pool"] = self.random.choice([None, None, "mean", "attention"])
            if options["pool"] is None and self.random.random() < 0.3:
                options["shift"] = True
            if self.random.random() < 0.3 and numbers in ("numbers", "each number") and loss != "gaussian_nll":
                options["activation"] = self.random.choice(["sigmoid", "tanh"])
            if loss == "cross_entropy" and self.random.random() < 0.3:
                options["activation"] = "softmax"
            if self.random.random() < 0.8:
                one = rule in SINGLE and not options.get("shift") and self.random.random() < 0.8
                a_row = options["pool"] is not None or one
                options["target"] = f"{'row' if a_row else role} {numbers}"
            options["weight"] = self.random.choice([1.0, 0.3, 0] + ["uncertainty"] * (loss != "gaussian_nll"))
        options["detach"] = self.random.random() < 0.4
        options["bias"] = self.random.random() < 0.8
        if self.random.random() < 0.1:
            options["trainable"] = False
        if self.random.random() < 0.3:
            more = {"hidden": 3, "layers": self.random.choice([1, 2]), "act_fn": self.random.choice(["gelu", "tanh"])}
            return "MLPHead", options | more | {"output_bias": self.random.random() < 0.5}
        return "LinearHead", options

    def _head(self) -> list[Spec]:
        where, role, place = self.where()
        rule, name = self.rule(), self._name()
        self.places[name] = place
        return [Spec(self.head(rule, role), where | {"positions": rule, "name": name}, role)]

    def _collect(self) -> list[Spec]:
        if self.random.random() < 0.2:
            return [self._spec(("Norm", {}))]
        return [self._spec(("Collect", {"detach": self.random.random() < 0.5}))]

    def _gated(self) -> list[Spec]:
        """An edit with the head that gates it, which lies before it and selects one token, or the same."""
        for _ in range(50):
            rule, lora = self.rule(), self.random.random() < 0.2
            inner = ("LoRA", self._lora_options()) if lora else self.edit()
            shift = not lora and self.random.random() < 0.25
            what = ("Shift", {"c": 0.5}) if shift else ("Gated", {"inner": inner})
            gated = self._spec(what, linear=lora, rule=rule)
            same = self.random.random() < 0.5
            read = rule if same else self.random.choice(SINGLE)
            where, role, place = self.where()
            after = self.places[gated.name]
            if place.order is None or after.order is None or place.order > after.order or (same and role != gated.role):
                continue
            name = self._name()
            self.places[name] = place
            head = self.head(read, role, outputs=2 if shift else 1, pool=None)
            head = ("Norm", {}) if self.random.random() < 0.15 else head
            source = Spec(head, where | {"positions": read, "name": name}, role)
            return [
                source,
                *(replace(spec, where=spec.where | {"source": name}) for spec in (gated, *self._again(gated))),
            ]
        return []

    def _again(self, spec: Spec) -> list[Spec]:
        """The same node once more in the same place, at times."""
        if self.random.random() < 0.75:
            return []
        name = self._name()
        self.places[name] = self.places[spec.name]
        return [replace(spec, where=spec.where | {"name": name})]

    def _shared(self) -> list[Spec]:
        """Several nodes with one set of parameters, at places of one width."""
        lora = self.random.random() < 0.2
        first = self._spec(("LoRA", {"rank": 2}) if lora else self.edit(), linear=lora)
        specs, share = [first], f"share{self.count}"
        for _ in range(self.random.choice([1, 2])):
            for _ in range(40):
                where, role, place = self.where(lora)
                one = self.places[first.name]
                if place.width == one.width and (not lora or entering(self.arch, place) == entering(self.arch, one)):
                    name = self._name()
                    self.places[name] = place
                    specs.append(Spec(first.what, where | {"positions": self.rule(), "name": name}, role))
                    break
        return [replace(spec, where=spec.where | {"share": share}) for spec in specs]

    def _apart(self) -> list[Spec]:
        """The parts of a sum with parameters of their own, as `InterventionGraph.over(…, tied=False)` makes them."""
        first = self._spec(self.edit(), rule="f2 of f2+l2")
        name = self._name()
        self.places[name] = self.places[first.name]
        return [first, Spec(first.what, first.where | {"positions": "l2 of f2+l2", "name": name}, first.role)]

    def _cross(self) -> list[Spec]:
        """A node on what a cross-attention makes of the encoder's tokens."""
        if not self.arch.cross:
            return self._edit()
        path = self.arch.case("decoder").path(self.random.choice(self.arch.cross), self.random.randrange(LAYERS))
        place, name = self.arch.at_path(path, "output"), self._name()
        self.places[name] = place
        what = self._fitted(self.random.choice([self.edit(), ("LoRA", {"rank": 2}), ("Collect", {})]), place.width)
        return [Spec(what, {"component": path, "positions": "all", "name": name}, "decoder")]


def entering(arch: Arch, place: Place) -> int:
    """How many features enter the linear module at a place."""
    return arch.at_path(place.modules[0], "input").width


def in_order(specs: list[Spec]) -> list[Spec]:
    """The same nodes, each source listed before what reads it: at one site that decides."""
    listed = list(specs)
    for spec in specs:
        source = next((other for other in listed if other.name == spec.where.get("source")), None)
        if source is not None and listed.index(source) > listed.index(spec):
            listed.remove(source)
            listed.insert(listed.index(spec), source)
    return listed


# --- graphs that must be refused ----------------------------------------------------------------------------------


def spoilt(random: Random, arch: Arch, specs: list[Spec], places: dict[str, Place]) -> tuple[list[Spec], str]:
    """The same graph with one mistake, and what it is."""
    block = {"layer": 1, "positions": "l1", "name": "bad", "stack": arch.role if arch.seq2seq else None}
    steer = ("Steering", {})
    head = ("LinearHead", {"outputs": 1})
    gated = ("Gated", {"inner": ("LoReFT", {"rank": 2})})

    def add(what: tuple[str, dict[str, Any]], *first: Spec, **where: Any) -> list[Spec]:
        return [*specs, *first, Spec(what, block | where, arch.role)]

    def source(what: tuple[str, dict[str, Any]] = head, **where: Any) -> Spec:
        return Spec(what, block | {"layer": 0, "name": "src"} | where, arch.role)

    width = base_width(arch)
    mistakes: dict[str, list[Spec]] = {
        "layer beyond the last": add(steer, layer=LAYERS),
        "layer before the first": add(steer, layer=-LAYERS - 1),
        "no layer": add(steer, layer=None),
        "a layer at the embeddings": add(steer, component="embedding_output", layer=0),
        "head beyond the last": add(steer, component="head_output", head=99),
        "a head where there are none": add(steer, component="mlp_output", head=0),
        "unknown component": add(steer, component="mlp_outputs"),
        "unknown module": add(steer, component="model.layers.7.nothing", layer=None),
        "rank over the width": add(("LoReFT", {"rank": width + 1})),
        "rank of LoRA over the width": add(("LoRA", {"rank": width + 1}), component="query_output"),
        "rank 0": add(("LoReFT", {"rank": 0})),
        "LoRA at no linear module": add(("LoRA", {"rank": 2}), component="block_output"),
        "LoRA on an input": add(("LoRA", {"rank": 2}), component="head_output"),
        "a vector of another width": add(("Steering", {"vector": [1.0, 2.0]})),
        "a value of another width": add(("Replace", {"value": [1.0] * (width + 1)})),
        "an unknown activation": add(("LoReFT", {"rank": 1, "act_fn": "reluu"})),
        "an activation of a constant source": add(("ConsReFT", {"rank": 1, "act_fn": "relu"})),
        "an unknown loss": add(("LinearHead", {"outputs": 2, "loss": "cross"})),
        "outputs that the loss does not have": add(("LinearHead", {"outputs": 3, "loss": "mse"})),
        "one class": add(("LinearHead", {"outputs": 1, "target": "y"})),
        "shift of what is pooled": add(("LinearHead", {"outputs": 2, "shift": True, "pool": "mean"})),
        "quantiles out of range": add(("LinearHead", {"outputs": 1, "loss": "quantile", "quantiles": (1.5,)})),
        "a target that is an input": add(("LinearHead", {"outputs": 2, "target": "attention_mask"})),
        "a rule that is none": add(steer, positions="f"),
        "a part of no sum": add(steer, positions="f1 of f2+l2"),
        "ids that are none": add(steer, positions={"token_ids": []}),
        "a name twice": add(steer, source(), name="src"),
        "a name with a dot": add(steer, name="a.b"),
        "no source": add(gated),
        "a source that is not there": add(gated, source="nobody"),
        "a source of what reads none": add(steer, source(), source="src"),
        "a source that does not read": add(gated, source(steer), source="src"),
        "a source with two outputs": add(gated, source(("LinearHead", {"outputs": 2})), source="src"),
        "a source that pools": add(gated, source(("LinearHead", {"outputs": 1, "pool": "mean"})), source="src"),
        "a source that runs later": add(gated, source(layer=LAYERS - 1), source="src"),
        "a source of other tokens": add(gated, source(positions="f2"), source="src"),
        "a cycle": add(gated, Spec(gated, block | {"name": "src", "source": "bad"}), source="src"),
        "shared by two definitions": add(steer, source(("LoReFT", {"rank": 1}), share="s"), share="s"),
        "shared by two widths": add(steer, source(steer, share="s", component="mlp_activation"), share="s"),
        "no edit in a gate": add(("Gated", {"inner": head}), source(), source="src"),
        "two kinds of one target": add(
            ("LinearHead", {"outputs": 1, "target": "y", "loss": "mse"}),
            source(("LinearHead", {"outputs": 2, "target": "y"})),
        ),
        "a source of several tokens of another stack": add(
            gated, source(stack="encoder", positions="all"), source="src", positions="all"
        ),
        "the encoder's tokens at a rule of the decoder's": add(
            steer, component=arch.case(arch.role).path(arch.cross[0]) if arch.cross else "", layer=None, positions="l1"
        ),
        "a component that the model lacks": add(steer, component="final_norm_output", layer=None),
        "no such stack": add(steer, stack="encoder" if arch.causal else "decoder"),
    }
    left_out = {"shared by two widths"} if arch.case(arch.role).down is None else set()
    left_out |= set() if arch.cross else {"the encoder's tokens at a rule of the decoder's"}
    left_out |= {"no such stack"} if arch.seq2seq else {"a source of several tokens of another stack"}
    left_out |= {"a component that the model lacks"} if arch.role in arch.norms else set()
    chosen = random.choice(sorted(mistakes.keys() - left_out))
    return mistakes[chosen], chosen


def base_width(arch: Arch) -> int:
    """The width of the residual stream."""
    return arch.place(arch.role, 0, "block_output").width


# --- cases ----------------------------------------------------------------------------------------------------


def draw_case(seed: int, number: int) -> Case:
    """Case `number` of a seed, whatever came before it."""
    random = Random(f"{seed}:{number}")
    arch = ARCHS[random.choice(sorted(ARCHS))]
    graphs = Graphs(random, arch)
    first = graphs.draw()
    wrong = None
    if random.random() < 0.12:
        first, wrong = spoilt(random, arch, first, graphs.places)
    adapters = {"one": first}
    drawn = random.random()
    if drawn < 0.25:
        adapters["two"] = first
    elif drawn < 0.5:
        adapters["two"] = Graphs(random, arch).draw()
    if wrong is None and len(adapters) == 2 and drawn < 0.25 and random.random() < 0.3:
        adapters["three"] = first
    rows = draw_rows(random, arch)
    marked = random.choice(["mask", "labels", "both", "none"]) if arch.causal else random.choice(["mask", "none"])
    shares = _shares(random, [*adapters], len(rows))
    shifted = arch.seq2seq and random.random() < 0.5
    if shifted:
        rows = [replace(row, decoder_answer=0) for row in rows]
        start = base_of(arch.name).config.decoder_start_token_id
        rows = [replace(row, decoder=[start, *labels_of(arch, row)[:-1]]) for row in rows]
    passes = _passes(random, arch, adapters, rows)
    return Case(number, arch.name, adapters, rows, marked, shares, wrong, passes, shifted, seed)


def labels_of(arch: Arch, row: RowSpec) -> list[int]:
    """The labels of a row's tokens, or of its decoder's."""
    if arch.seq2seq:
        numbers = Random(row.seed)
        return [-100 if i < row.decoder_answer else numbers.choice(IDS) for i in range(len(row.decoder))]
    return [-100] * row.answer + row.tokens[row.answer :]


def _shares(random: Random, adapters: list[str], rows: int) -> list[str]:
    """Of every row its adapter: equal shares in order, or any."""
    if rows % len(adapters) == 0 and random.random() < 0.6:
        return [name for name in adapters for _ in range(rows // len(adapters))]
    return [random.choice([*adapters, "__base__"]) for _ in range(rows)]


def _passes(random: Random, arch: Arch, adapters: dict[str, list[Spec]], rows: list[RowSpec]) -> list[str]:
    """What is done with a model: a pass and a step, and some of what else there is."""
    continued = arch.seq2seq or (arch.causal and not any(row.right for row in rows))
    more = ["checkpointed", "disabled", "saved", "copied"]
    more += [] if arch.seq2seq else ["embeds", "reused", "trained", "backbone"]
    more += ["chunks", "chunks"] if arch.causal else []
    more += ["generated", "generated", "beams"] if continued else []
    more += ["read after"] if continued and arch.causal else []
    if len(adapters) > 1:
        more += [
            "by row",
            "step by row",
            "step by row",
            "reused by row",
            "reused together",
            "together",
            "switched",
            "one less",
        ]
        more += ["generated by row"] if continued else []
    return ["plain", "step", *sorted(set(random.sample(more, 3)))]


def draw_rows(random: Random, arch: Arch) -> list[RowSpec]:
    """Ragged rows with padding where the model takes it."""
    count, side = random.choice([1, 2, 2, 3, 4, 4]), random.choice(arch.sides)
    lengths = [random.randint(1, 8) for _ in range(count)]
    if random.random() < 0.2:
        lengths = [max(lengths)] * count
    if arch.causal:
        lengths = [max(n, 2) for n in lengths]
    lengths = [max(n, max(lengths) - arch.most + 1) for n in lengths]
    width = max(lengths) + random.choice([0, 0, 1])
    decoders = [random.randint(1, 5) for _ in range(count)]
    arbitrary = random.random() < 0.2
    rows = []
    for n, m in zip(lengths, decoders, strict=True):
        gap = width - n
        left = {"left": gap, "right": 0}.get(side, random.randint(0, gap))
        end = random.randint(1, n) if random.random() < 0.8 else n
        prompt = sorted(random.sample(range(n), random.randint(0, n))) if arbitrary else list(range(end))
        answer = min(end, n - 1) if rows == [] else end  # somebody has an answer
        rows.append(
            RowSpec(
                tokens=random.choices(IDS, k=n),
                prompt=prompt,
                left=left,
                right=gap - left,
                answer=answer,
                decoder=random.choices(IDS, k=m),
                decoder_right=max(decoders) - m,
                decoder_answer=random.randint(0, m - 1),
                seed=random.randrange(10**6),
            )  # fmt: skip
        )
    return rows


def size(case: Case) -> int:
    """How large a case is, to see whether another one is smaller."""
    return sum(map(len, case.adapters.values())) * 10 + len(case.rows) + sum(len(row.tokens) for row in case.rows)


def smaller(case: Case) -> list[Case]:
    """Cases with one thing less."""
    out = []
    for adapter, specs in case.adapters.items():
        if len(case.adapters) > 1:
            rest = {name: nodes for name, nodes in case.adapters.items() if name != adapter}
            out.append(replace(case, adapters=rest, shares=[s if s in rest else [*rest][0] for s in case.shares]))
        for spec in specs:
            less = [
                s
                for s in specs
                if s is not spec and s.name != spec.where.get("source") and s.where.get("source") != spec.name
            ]
            same = {name for name, nodes in case.adapters.items() if nodes == specs}
            if less:
                out.append(replace(case, adapters={n: less if n in same else v for n, v in case.adapters.items()}))
    for i in range(len(case.rows) if len(case.rows) > 1 else 0):
        rows = case.rows[:i] + case.rows[i + 1 :]
        if not any(row.answer < len(row.tokens) for row in rows):
            continue  # a batch without a label has no loss
        out.append(replace(case, rows=rows, shares=case.shares[:i] + case.shares[i + 1 :]))
    return out


def describe(case: Case) -> str:
    """A case as a reader may want to see it."""
    lines = [f"case {case.number} of seed {case.seed}: {case.arch}, prompts by {case.marked}, rows of {case.shares}"]
    for adapter, specs in case.adapters.items():
        lines += [f"  {adapter}: {spec.what} {spec.where}" for spec in specs]
    lines += [f"  {row}" for row in case.rows]
    return "\n".join(lines)


__all__ = ["Case", "RowSpec", "Spec", "base_of", "describe", "draw_case", "intervention", "size", "smaller"]
