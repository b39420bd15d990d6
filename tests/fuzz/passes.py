"""What is done with the model of a case, and compared with the rows alone."""

import copy
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import reftheads as rh
from fuzz.batches import batch_of, inputs_alone, target_batch, targets_of
from fuzz.checks import (
    IN_FLOAT32,
    OF_GRADIENTS,
    Fault,
    check_gradients,
    check_logits,
    check_losses,
    check_reading,
    check_readings,
    logits_of,
    real,
    same,
)
from fuzz.draw import Case
from fuzz.expected import Reading, projection
from fuzz.places import base_of
from fuzz.reference import Row, hooked
from fuzz.session import Session


class Skipped(Exception):
    """A pass that a case has no use for, or that the library refuses with a reason that is documented."""


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


def _trained(session: Session, adapters: list[list[str]], training: bool = True, **call: Any) -> None:
    """A step with labels and targets: loss, losses of heads, gradients."""
    case, model = session.case, session.model
    model.train(training and not session.has_dropout)
    active = sorted({name for names in adapters for name in names})
    expected = session.oracle.expect(adapters, labels=True, targets=True)
    batch = batch_of(case, labels=True) | target_batch(case, targets_of(case, active))
    output = model(**batch, **call)
    check_logits(case, output, expected)
    check_readings(case, output, expected.readings)
    check_losses(output, expected)
    loss, right = (_or_zero(value) for value in (getattr(output, "loss", None), expected.loss))
    same("loss", loss, right)
    objective, wanted = (projection(logits) * 0.1 for logits in (logits_of(case, output), expected.logits))
    check_gradients(session, objective + loss, wanted + right)


def _or_zero(loss: Tensor | None) -> Tensor:
    """A loss; 0 where there is none, since nodes that surely read nothing have none."""
    return torch.zeros((), dtype=torch.float64) if loss is None else loss


def step(session: Session) -> None:
    """A training step; the gradients of one in evaluation mode, at times."""
    _trained(session, session.for_all, training=session.case.number % 4 != 0)


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


def reused_together(session: Session) -> None:
    """The same with several adapters on all rows."""
    session.use(*session.case.adapters)
    _reused(session, session.for_all)


def trained(session: Session) -> None:
    """Three steps of gradient descent on what is taken from a store, and the weights after them."""
    case, model = session.case, session.model
    if session.arch.seq2seq or session.arch.eager:
        raise Skipped("no reuse to compare")
    model.train(not session.has_dropout)
    batch = batch_of(case, labels=True) | target_batch(case, targets_of(case, session.active))
    leaves = [leaf for (adapter, _), p in session.leaves.items() for leaf in p.values() if adapter in session.active]
    with model.reusing(rh.ActivationStore()):
        for _ in range(3):
            wanted = session.oracle.expect(session.for_all, labels=True, targets=True).loss
            if wanted is None or not wanted.requires_grad:
                raise Skipped("no loss")
            slopes = torch.autograd.grad(wanted, [x for x in leaves if x.requires_grad], allow_unused=True)
            descend(zip([x for x in leaves if x.requires_grad], slopes, strict=True))
            model.zero_grad()
            loss = _or_zero(model(**batch).loss)
            if loss.requires_grad:
                loss.backward()
            descend((p, p.grad) for p in model.parameters() if p.requires_grad)
    for (adapter, key), p in session.leaves.items():
        for name, tensor in model.base_model.layer.rh_nodes[adapter][key].stored().items():
            same(f"{adapter}.{key}.{name} after three steps", tensor, p[name], OF_GRADIENTS)
    model.eval()
    plain(session)


@torch.no_grad()
def descend(slopes: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Take a step down the slopes, the length of which is bounded."""
    steps = [(tensor, slope) for tensor, slope in slopes if slope is not None]
    length = torch.stack([slope.norm() for _, slope in steps] or [torch.zeros(())]).norm()
    for tensor, slope in steps:
        tensor -= 0.1 / max(1.0, float(length)) * slope


def _reused(session: Session, adapters: list[list[str]], **call: Any) -> None:
    case, model = session.case, session.model
    if session.arch.seq2seq:
        raise Skipped("two stacks")
    if session.arch.eager:
        raise Skipped("eager attention with a window is NaN in float64 where it sees padding alone")
    model.train(not session.has_dropout)
    active = sorted({name for names in adapters for name in names})
    batch = batch_of(case, labels=True) | target_batch(case, targets_of(case, active))
    expected = session.oracle.expect(adapters, labels=True, targets=True)
    if expected.loss is None:
        raise Skipped("no loss")
    store = rh.ActivationStore()
    for time in ("recording", "replaying", "without a store"):
        with model.reusing(None if time == "without a store" else store):
            output = model(**batch, **call)
        loss = _or_zero(getattr(output, "loss", None))
        same(f"loss, {time}", loss, expected.loss)
        check_losses(output, expected)
        check_gradients(session, loss, expected.loss, f"{time}: ")


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
    case = session.case
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
        ways = {name: value for name, value in call.items() if name not in ("adapter_names", "return_heads")}
        try:
            plain = base_of(case.arch).generate(**bare, **how, **ways).sequences[:, start:]
        except RuntimeError as error:  # such as Falcon with alibi and a static cache
            raise Skipped("the base model cannot generate so") from error
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
    """Beam search; at times with an adapter for every row."""
    if session.case.number % 2 and len(session.case.adapters) > 1:
        _generation(session, session.shares, {"adapter_names": session.case.shares}, num_beams=2)
    else:
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
        while stop and new[stop - 1] == config.pad_token_id and config.pad_token_id not in ends:
            stop -= 1  # padding at the end ends a row too, whoever wrote it
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
    "one less": one_less, "reused together": reused_together, "trained": trained,
}  # fmt: skip
