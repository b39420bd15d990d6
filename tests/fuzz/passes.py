"""What is done with the model of a case, and compared with the rows alone."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import reftheads as rh
from fuzz import formulas
from fuzz.batches import batch_of, inputs_alone, target_batch, targets_of
from fuzz.draw import Case
from fuzz.expected import Expected, Leaves, Oracle, Reading, projection
from fuzz.places import ARCHS, base_of
from fuzz.reference import Row, hooked

TOLERANCE, OF_GRADIENTS, IN_FLOAT32 = 1e-10, 1e-8, 1e-6  # `generate` keeps logits in float32


class Fault(AssertionError):
    """A difference between the library and the reference."""


class Skipped(Exception):
    """A pass that a case has no use for, or that the library refuses with a reason that is documented."""


class Session:
    """A case with its model, whose parameters are random, and the reference."""

    def __init__(self, case: Case):
        self.case = case
        self.arch = ARCHS[case.arch]
        self.graphs = {name: rh.InterventionGraph(*(s.node() for s in specs)) for name, specs in case.adapters.items()}
        names = [*case.adapters]
        self.base = copy.deepcopy(base_of(case.arch))
        self.model = rh.InterventionModel(self.base, self.graphs[names[0]], names[0])
        for name in names[1:]:
            self.model.add_adapter(name, self.graphs[name])
        self.model.double().eval()
        self.leaves: Leaves = {}
        torch.manual_seed(case.number)
        for name in names:
            for node in self.graphs[name]:
                self._randomise(name, node)
        self.oracle = Oracle(case, self.graphs, self.leaves)
        self.use(names[0])

    def _randomise(self, adapter: str, node: Any) -> None:
        """Give a node random parameters, the same to the reference."""
        key = (adapter, node.share or node.name)
        if key in self.leaves:
            return
        module = self.model.node(node.name, adapter)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_((torch.randn(parameter.shape) * 0.5).float())
        self.leaves[key] = {
            name: tensor.detach().clone().requires_grad_(isinstance(tensor, torch.nn.Parameter))
            for name, tensor in module.stored().items()
        }

    def use(self, *adapters: str) -> None:
        """Let these adapters act, one after the other, and be trained."""
        self.active = list(adapters)
        self.model.set_adapter(self.active)

    @property
    def for_all(self) -> list[list[str]]:
        """Of every row, the adapters that act now."""
        return [self.active for _ in self.case.rows]

    @property
    def shares(self) -> list[list[str]]:
        """Of every row, the adapter that it names."""
        return [[] if name == "__base__" else [name] for name in self.case.shares]


# --- comparisons ----------------------------------------------------------------------------------------------


def same(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise `Fault` where two tensors differ by more than rounding."""
    if got.shape != expected.shape:
        raise Fault(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.numel():
        return
    scale = max(1.0, float(expected.detach().abs().max()))
    worst = float((got.detach().double() - expected.detach()).abs().max())
    if not worst <= tolerance * scale:
        raise Fault(f"{what}: {worst:.2e} away, of {scale:.1e}")


def real(case: Case, values: Tensor, role: str | None = None) -> list[Tensor]:
    """Of every row of [rows columns …], what lies at its tokens."""
    decoder = ARCHS[case.arch].seq2seq and role != "encoder"
    if decoder:
        return [one[: len(row.decoder)] for row, one in zip(case.rows, values, strict=True)]
    return [one[row.left : row.left + len(row.tokens)] for row, one in zip(case.rows, values, strict=True)]


def logits_of(case: Case, output: Any) -> list[Tensor]:
    """Of every row, the logits at its tokens; one for all of them, if the model gives one."""
    return list(output.logits) if output.logits.ndim == 2 else real(case, output.logits)


def check_logits(case: Case, output: Any, expected: Expected) -> None:
    """Raise `Fault` where logits at real tokens differ."""
    for number, (got, wanted) in enumerate(zip(logits_of(case, output), expected.logits, strict=True)):
        same(f"logits of row {number}", got, wanted)


def check_readings(case: Case, output: Any, readings: dict[str, Reading]) -> None:
    """Raise `Fault` where predictions, activations or the tokens that they belong to differ."""
    predictions, collected = (getattr(output, name, None) or {} for name in ("predictions", "collected"))
    got = _named(predictions | collected, readings)
    needed = {name for name, reading in readings.items() if any(reading.tokens)}
    if not needed <= got.keys() <= readings.keys():
        raise Fault(f"readings of {sorted(got)}, expected {sorted(needed)} of {sorted(readings)}")
    for name in got:
        check_reading(name, got[name], _named(output.selected, readings)[name], readings[name])


def _named(values: dict[str, Any], readings: dict[str, Reading]) -> dict[str, Any]:
    """The same values by the names of the readings: of two nodes of one name, one that surely reads nothing is left out."""
    full = {name.rpartition("/")[2]: name for name, reading in readings.items() if any(reading.tokens)}
    return {name if name in readings else full.get(name, name): value for name, value in values.items()}


def check_reading(name: str, got: Tensor, valid: Tensor, reading: Reading) -> None:
    """Raise `Fault` where what a node read differs from the reading, row by row."""
    what = reading.listed.node.intervention
    shown = formulas.ACTIVATIONS[getattr(what, "activation", None)]
    for number, tokens in enumerate(reading.tokens):
        if int(valid[number].sum()) != len(tokens):
            raise Fault(f"{name} selects {int(valid[number].sum())} tokens of row {number}, expected {len(tokens)}")
        values = got[number][None] if got.ndim == 2 else got[number]
        if values.shape[0] != valid.shape[1]:
            raise Fault(f"{name}: {values.shape[0]} values for {valid.shape[1]} slots")
        if tokens:
            wanted = torch.stack([shown(tokens[i]) for i in sorted(tokens)])
            same(f"{name} in row {number}", values[valid[number]], wanted)
        if bool(values[~valid[number]].any()):
            raise Fault(f"{name} is not zero where row {number} has no token")


def check_losses(output: Any, expected: Expected) -> None:
    """Raise `Fault` where the losses of heads, or what they are means of, differ."""
    got, counts = (_named(getattr(output, name, None) or {}, expected.readings) for name in ("losses", "counts"))
    needed = {name for name in expected.losses if any(expected.readings[name].tokens)}
    if not needed <= got.keys() <= expected.losses.keys():
        raise Fault(f"losses of {sorted(got)}, expected {sorted(needed)} of {sorted(expected.losses)}")
    for name in got:
        same(f"loss of {name}", got[name], expected.losses[name])
        if int(counts[name]) != expected.counts[name]:
            raise Fault(f"{name} counts {int(counts[name])} targets, expected {expected.counts[name]}")


def check_gradients(session: Session, objective: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Raise `Fault` where the gradients of two objectives differ."""
    model, leaves = session.model, session.leaves
    model.zero_grad()
    if objective is not None and objective.requires_grad:
        objective.backward()
    wanted = [(key, name, leaf) for key, p in leaves.items() for name, leaf in p.items() if leaf.requires_grad]
    if expected is None or not expected.requires_grad:
        slopes = [None] * len(wanted)
    else:
        slopes = torch.autograd.grad(expected, [leaf for *_, leaf in wanted], allow_unused=True, retain_graph=True)
    norms = [float(s.norm()) for s in slopes if s is not None]
    scale = max([1.0, *norms])
    for ((adapter, key), name, leaf), slope in zip(wanted, slopes, strict=True):
        parameter = model.base_model.layer.rh_nodes[adapter][key].stored()[name]
        got = torch.zeros_like(leaf) if parameter.grad is None else parameter.grad
        slope = torch.zeros_like(leaf) if slope is None else slope
        worst = float((got - slope).abs().max())
        if not worst <= OF_GRADIENTS * scale:
            raise Fault(f"{what}gradient of {adapter}.{key}.{name}: {worst:.2e} away, of {scale:.1e}")


# --- passes ---------------------------------------------------------------------------------------------------


def plain(session: Session) -> None:
    """One forward pass in evaluation."""
    with torch.no_grad():
        expected = session.oracle.expect(session.for_all)
        output = session.model(**batch_of(session.case))
    check_logits(session.case, output, expected)
    check_readings(session.case, output, expected.readings)


def embeds(session: Session) -> None:
    """The same by embeddings in place of tokens."""
    rules = [node.positions for node in session.graphs[session.active[0]]]
    if any(rule.token_ids is not None for rule in rules):
        raise Skipped("rules that look at token ids")
    if session.arch.name == "bloom" or session.arch.seq2seq:
        raise Skipped("takes no embeddings alone")
    batch = batch_of(session.case)
    with torch.no_grad():
        expected = session.oracle.expect(session.for_all)
        vectors = session.base.get_input_embeddings()(batch.pop("input_ids"))
        output = session.model(inputs_embeds=vectors, **batch)
    check_logits(session.case, output, expected)
    check_readings(session.case, output, expected.readings)


def _has_dropout(session: Session) -> bool:
    def drops(what: Any) -> bool:
        return bool(getattr(what, "dropout", 0)) or drops(what.inner) if hasattr(what, "inner") else bool(getattr(what, "dropout", 0))

    return any(drops(node.intervention) for graph in session.graphs.values() for node in graph)


def _trained(session: Session, adapters: list[list[str]], **call: Any) -> None:
    """A step with labels and targets: loss, losses of heads, gradients."""
    case, model = session.case, session.model
    model.train(not _has_dropout(session) and case.number % 4 != 0)
    active = sorted({name for names in adapters for name in names})
    expected = session.oracle.expect(adapters, labels=True, targets=True)
    batch = batch_of(case, labels=True) | target_batch(case, targets_of(case, active))
    output = model(**batch, **call)
    check_logits(case, output, expected)
    check_readings(case, output, expected.readings)
    check_losses(output, expected)
    loss, nothing = getattr(output, "loss", None), torch.zeros((), dtype=torch.float64)
    loss, right = (nothing if value is None else value for value in (loss, expected.loss))
    same("loss", loss, right)
    objective, wanted = (projection(logits) * 0.1 for logits in (logits_of(case, output), expected.logits))
    check_gradients(session, objective + loss, wanted + right)


def step(session: Session) -> None:
    """A training step."""
    _trained(session, session.for_all)


def checkpointed(session: Session) -> None:
    """A training step under activation checkpointing."""
    if not session.base.supports_gradient_checkpointing:
        raise Skipped("the base model has no checkpointing")
    reentrant = session.case.number % 2 == 0
    session.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    session.model.enable_input_require_grads()
    try:
        _trained(session, session.for_all)
    finally:
        session.model.gradient_checkpointing_disable()
        session.model.disable_input_require_grads()


def reused(session: Session) -> None:
    """Training steps in which what the graph cannot change is taken from a store."""
    _reused(session, session.for_all)


def reused_by_row(session: Session) -> None:
    """The same with an adapter for every row."""
    session.use(*session.case.adapters)
    _reused(session, session.shares, adapter_names=session.case.shares)


def _reused(session: Session, adapters: list[list[str]], **call: Any) -> None:
    case, model = session.case, session.model
    if session.arch.seq2seq:
        raise Skipped("two stacks")
    model.train(not _has_dropout(session))
    active = sorted({name for names in adapters for name in names})
    batch = batch_of(case, labels=True) | target_batch(case, targets_of(case, active))
    expected = session.oracle.expect(adapters, labels=True, targets=True)
    if expected.loss is None:
        raise Skipped("no loss")
    store = rh.ActivationStore()
    for time in ("recording", "replaying", "without a store"):
        with model.reusing(None if time == "without a store" else store):
            output = model(**batch, **call)
        same(f"loss, {time}", output.loss, expected.loss)
        check_losses(output, expected)
        check_gradients(session, output.loss, expected.loss, f"{time}: ")


def disabled(session: Session) -> None:
    """The base model bit for bit, while disabled and once unloaded, and the graph again between them."""
    case, model = session.case, session.model
    batch = batch_of(case)
    bare = {name: value for name, value in batch.items() if name != "prompt_mask"}
    with torch.no_grad():
        plain = base_of(case.arch)(**bare)
        before = model(**batch)
        with model.disable_adapter():
            within = model(**batch)
        after = model(**batch)
        unloaded = copy.deepcopy(model).unload()(**bare)
    for what, output, wanted in (("disabled", within, plain), ("after", after, before), ("unloaded", unloaded, plain)):
        for got, ours in zip(logits_of(case, output), logits_of(case, wanted), strict=True):
            if not torch.equal(got, ours):
                raise Fault(f"{what}: not bit for bit")


def saved(session: Session) -> None:
    """Saved and loaded into a fresh base model, bit for bit."""
    case, model = session.case, session.model
    functions = any(node.positions.rule is not None for graph in session.graphs.values() for node in graph)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            if functions and "cannot be saved" in str(error):
                raise Skipped("rules that are functions cannot be saved") from error
            raise
        if functions:
            raise Fault("a rule that is a function was saved")
        names = [*case.adapters]
        base = copy.deepcopy(base_of(case.arch))
        path = {name: folder if name == "default" else f"{folder}/{name}" for name in names}
        loaded = rh.InterventionModel.from_pretrained(base, path[names[0]], adapter_name=names[0])
        for name in names[1:]:
            loaded.load_adapter(path[name], name)
    loaded.double().eval()
    for name in names:
        model.set_adapter(name)
        loaded.set_adapter(name)
        _bit_for_bit(case, loaded, model)
    session.use(names[0])


def copied(session: Session) -> None:
    """A deep copy, which does not follow what becomes of the original."""
    case, model = session.case, session.model
    twin = copy.deepcopy(model)
    _bit_for_bit(case, twin, model)
    before = logits_of(case, model(**batch_of(case)))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin(**batch_of(case))
    for got, wanted in zip(logits_of(case, model(**batch_of(case))), before, strict=True):
        if not torch.equal(got, wanted):
            raise Fault("a change of a copy changed the original")


def _bit_for_bit(case: Case, one: Any, two: Any) -> None:
    batch = batch_of(case)
    with torch.no_grad():
        first, second = one(**batch), two(**batch)
    for got, wanted in zip(logits_of(case, first), logits_of(case, second), strict=True):
        if not torch.equal(got, wanted):
            raise Fault("not bit for bit")
    for field in ("predictions", "collected"):
        a, b = (getattr(output, field, None) or {} for output in (first, second))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            raise Fault(f"{field} are not bit for bit")


def by_row(session: Session) -> None:
    """An adapter for every row."""
    with torch.no_grad():
        expected = session.oracle.expect(session.shares)
        output = session.model(**batch_of(session.case), adapter_names=session.case.shares)
    check_logits(session.case, output, expected)
    check_readings(session.case, output, expected.readings)


def step_by_row(session: Session) -> None:
    """A training step with an adapter for every row."""
    session.use(*session.case.adapters)  # so that all have gradients
    _trained(session, session.shares, adapter_names=session.case.shares)


def together(session: Session) -> None:
    """Several adapters at once, on all rows."""
    session.use(*session.case.adapters)
    plain(session)
    step(session)


def one_less(session: Session) -> None:
    """An adapter is deleted, in a copy; the first one goes on as it was."""
    twin = copy.deepcopy(session.model)
    twin.delete_adapter([*session.case.adapters][-1])
    _bit_for_bit(session.case, twin, session.model)


def switched(session: Session) -> None:
    """Another adapter, and back."""
    names = [*session.case.adapters]
    session.use(names[-1])
    plain(session)
    session.use(names[0])
    plain(session)


def backbone(session: Session) -> None:
    """The stack alone, as those call it who want no logits."""
    arch, case = session.arch, session.case
    if arch.seq2seq:
        raise Skipped("two stacks")
    path = arch.stacks[arch.role]
    with torch.no_grad():
        rows = session.oracle.run(session.for_all, call=lambda base, inputs: base.get_submodule(path)(**inputs))
        output = session.base.get_submodule(path)(**batch_of(case))
    got = real(case, output.last_hidden_state)
    for number, (_, _, wanted) in enumerate(rows):
        same(f"hidden states of row {number}", got[number], wanted.last_hidden_state[0])


def _refused(error: ValueError) -> bool:
    """Whether a call was refused for one of the reasons that the documentation gives, which depend on the call."""
    reasons = ("has not run in this pass", "may lie behind")
    return any(reason in str(error) for reason in reasons)


def chunks(session: Session) -> None:
    """The columns in pieces, each with the cache of those before."""
    case, arch = session.case, session.arch
    batch = batch_of(case)
    width = batch["input_ids"].shape[1]
    ones = torch.ones_like(batch["input_ids"])
    mask = batch.get("attention_mask", ones)
    prompt = batch.get("prompt_mask", mask)
    cuts = sorted({0, width, 1 + case.number % width, 1 + (case.number // 7) % width})
    cache = DynamicCache(config=session.base.config)
    plain_cache = DynamicCache(config=session.base.config)
    pieces, bare, seen = [], [], []
    with torch.no_grad():
        expected = session.oracle.expect(session.for_all)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            inputs = {"input_ids": batch["input_ids"][:, start:stop], "attention_mask": mask[:, :stop]}
            if "position_ids" in batch:
                inputs["position_ids"] = batch["position_ids"][:, start:stop]
            bare.append(base_of(case.arch)(**inputs, past_key_values=plain_cache, use_cache=True).logits)
            inputs |= {"prompt_mask": prompt, "past_key_values": cache}
            output = _documented(lambda inputs=inputs: session.model(**inputs, use_cache=True))
            pieces.append(output.logits)
            seen.append((start, stop, output))
        alone = [base_of(case.arch)(**inputs_alone(case, i)).logits[0] for i in range(len(case.rows))]
    for got, wanted in zip(real(case, torch.cat(bare, 1)), alone, strict=True):
        if not float((got - wanted).abs().max()) < 1e-9:
            raise Skipped("the base model gives something else in chunks")
    for number, (got, wanted) in enumerate(zip(real(case, torch.cat(pieces, 1)), expected.logits, strict=True)):
        same(f"logits of row {number} in chunks of {cuts}", got, wanted)
    for name, reading in expected.readings.items():
        if getattr(reading.listed.node.intervention, "pool", None) is None:
            _check_pieces(case, name, reading, seen)


def _check_pieces(case: Case, name: str, reading: Reading, seen: list[tuple[int, int, Any]]) -> None:
    """Raise `Fault` where what was read in the pieces is not what is read of whole rows."""
    for start, stop, output in seen:
        got = (getattr(output, "predictions", None) or {}) | (getattr(output, "collected", None) or {})
        valid = getattr(output, "selected", None)
        part = [
            {i: z for i, z in tokens.items() if start <= row.left + i < stop}
            for row, tokens in zip(case.rows, reading.tokens, strict=True)
        ]
        piece = Reading(reading.listed, part, reading.length)
        if name in got:
            check_reading(f"{name} at {start}:{stop}", got[name], valid[name], piece)
        elif any(part):
            raise Fault(f"{name} reads nothing at {start}:{stop}")


def _generation(session: Session, adapters: list[list[str]], call: dict[str, Any], **options: Any) -> Any:
    """Generate greedily or by beams: each row alone by the reference, and all of them by the library.

    Args:
        adapters: of every row, which act.
        call: further arguments of the library's call.
        options: of both.
    """
    case, arch = session.case, session.arch
    if not arch.seq2seq and any(row.right for row in case.rows):
        raise Skipped("prompts that are padded on the right")
    batch = batch_of(case)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "prompt_mask") if name in batch}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    bare = {name: value for name, value in inputs.items() if name != "prompt_mask"}
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    start = 1 if arch.seq2seq else inputs["input_ids"].shape[1]
    with torch.no_grad():
        plain = base_of(case.arch).generate(**bare, **how).sequences[:, start:]
        alone = [_alone(session, number, [], how) for number in range(len(case.rows))]
        if not all(_starts_with(a, b) for a, b in zip(plain, (new for new, _ in alone), strict=True)):
            raise Skipped("the base model generates something else in a batch")
        session.model.eval()
        output = session.model.generate(**inputs, **how, **call)
        wanted = [_alone(session, number, names, how) for number, names in enumerate(adapters)]
    for number, (new, logits) in enumerate(wanted):
        got = output.sequences[number, start:]
        if not _starts_with(got, new):
            raise Fault(f"generated {got.tolist()} in row {number}, expected {new.tolist()}")
        for i, scores in enumerate(logits if options.get("num_beams", 1) == 1 else ()):
            same(f"logits of new token {i} in row {number}", output.logits[i][number], scores[0].double(), IN_FLOAT32)
    return output


def _starts_with(got: Tensor, wanted: Tensor) -> bool:
    return got[: len(wanted)].tolist() == wanted.tolist()


def _alone(session: Session, number: int, adapters: list[str], how: dict[str, Any]) -> tuple[Tensor, Any]:
    """Generate from one row by hooks on the base model, which computes all tokens anew for each new one."""
    case, arch = session.case, session.arch
    row = case.rows[number]
    marked = row.prompt if case.marked in ("mask", "both") else list(range(len(row.tokens)))
    prompt = {"encoder": marked, "decoder": [0]} if arch.seq2seq else {arch.role: marked}
    rows = [Row(dict(prompt)) for _ in range(how.get("num_beams", 1))]
    ids = torch.tensor([row.tokens])
    with hooked(arch, session.oracle.listed(adapters), rows) as base:
        out = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **how)
    return out.sequences[0, 1 if arch.seq2seq else len(row.tokens) :], out.logits


def _documented(run: Callable[[], Any]) -> Any:
    """What it gives; a call that is refused for one of the reasons that depend on the call is skipped."""
    try:
        return run()
    except ValueError as error:
        if _refused(error):
            raise Skipped("a source that lies in another chunk") from error
        raise


def generated(session: Session) -> None:
    """Greedy generation: with and without a cache, a static one, in chunks of the prompt, within `reusing`."""
    ways: list[dict[str, Any]] = [
        {}, {"use_cache": False}, {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
    ]  # fmt: skip
    number = session.case.number % 5
    everybody = session.for_all
    if session.arch.seq2seq:
        number %= 2
    if number < 4:
        _documented(lambda: _generation(session, everybody, ways[number]))
        return
    with session.model.reusing(rh.ActivationStore()):
        _generation(session, everybody, {})
        _generation(session, everybody, {})


def beams(session: Session) -> None:
    """Beam search."""
    _generation(session, session.for_all, {}, num_beams=2)


def generated_by_row(session: Session) -> None:
    """Greedy generation with an adapter for every row."""
    _generation(session, session.shares, {"adapter_names": session.case.shares})


def read_after(session: Session) -> None:
    """What heads say of the finished sequences."""
    nodes = session.oracle.listed(session.active)
    if not any(hasattr(n.node.intervention, "target") for n in nodes):
        raise Skipped("no head")
    output = _generation(session, session.for_all, {"return_heads": True})
    case, arch = session.case, session.arch
    width = output.sequences.shape[1] - (case.rows[0].left + len(case.rows[0].tokens))
    batch = batch_of(case)
    config = session.base.generation_config
    done = []
    for number, row in enumerate(case.rows):
        new = output.sequences[number, -width:].tolist() if width else []
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        marked = row.prompt if "prompt_mask" in batch else list(range(len(row.tokens)))
        one = Row({arch.role: marked})
        with torch.no_grad(), hooked(arch, nodes, [one]) as base:
            base(input_ids=torch.tensor([row.tokens + new[:stop]]))
        done.append((one, nodes))
    check_readings(case, output, session.oracle.readings(done))


PASSES: dict[str, Callable[[Session], None]] = {
    "plain": plain, "step": step, "embeds": embeds, "checkpointed": checkpointed, "reused": reused,
    "disabled": disabled, "saved": saved, "copied": copied, "backbone": backbone, "chunks": chunks,
    "generated": generated, "beams": beams, "read after": read_after, "by row": by_row, "step by row": step_by_row,
    "together": together, "switched": switched, "reused by row": reused_by_row, "generated by row": generated_by_row,
    "one less": one_less,
}  # fmt: skip
