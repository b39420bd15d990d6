"""A base model of 4 or 8 bits: frozen as it is, with LoRA, edits and heads in full precision, on the CPU."""

import pytest
import torch
from support.models import LAYERS, VOCAB, random_ids, randomise, tiny_llama
from support.processes import run_together
from support.quantised import base_of, qlora, rows, trained, weights
from torch import nn

import reftheads as rh

bnb = pytest.importorskip("bitsandbytes")

WIDTH = 64  # bitsandbytes packs blocks of 64
IDS = random_ids(4, 7)
BATCH = {"input_ids": IDS, "labels": IDS, "prompt_mask": torch.ones_like(IDS)}


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A Llama of width 64 on disk, with a tokenizer of one word a token."""
    tiny_llama(hidden_size=WIDTH, intermediate_size=2 * WIDTH, eos_token_id=1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def state(base: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the base computes with. Not its state dict: bitsandbytes changes 4-bit weights asked for it."""
    tensors = dict(base.named_parameters()) | dict(base.named_buffers())
    found = {name: tensor.detach().clone() for name, tensor in tensors.items() if "rh_nodes" not in name}
    for path, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            scales = module.weight.quant_state
            found |= {f"{path}.absmax": scales.absmax.clone(), f"{path}.state2": scales.state2.absmax.clone()}
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logged(trainer: rh.InterventionTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def stir(model: rh.InterventionModel) -> None:
    """Small random values for all that is trained, so that nothing is hidden by a zero."""
    randomise(model)
    with torch.no_grad():
        for parameter in weights(model).values():
            parameter *= 0.1


def test_four_bits_are_nf4_with_double_quantisation_and_what_is_trained_is_in_full_precision(saved):
    base = base_of(saved)
    model = qlora(base)
    packed = [module for module in base.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(packed) == 7 * LAYERS and all(isinstance(module, bnb.nn.Linear4bit) for module in packed)
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in packed)
    assert {planned.address.module for planned in model.plan().nodes} >= {
        path for path, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == weights(model).keys() and len(trainable) == 2 * len(packed) + 2
    assert {p.dtype for p in trainable.values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_lowers_the_loss_and_moves_nothing_but_lora_and_heads(saved, bits):
    base = base_of(saved, bits)
    model = qlora(base).train()
    before = state(base)
    batch = BATCH | {"mood": torch.tensor([0, 1, 2, 1])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(**batch)
    first.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == weights(model).keys()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith((".B", ".W", ".b")))
    optimizer.step()
    after = model(**batch)
    assert after.loss < first.loss and after.losses["mood"] < first.losses["mood"]
    assert after.loss - after.head_loss < first.loss - first.head_loss
    assert same(state(base), before)


def test_predictions_and_gradients_are_those_of_a_plain_base_with_the_dequantised_weights(saved):
    base, plain = base_of(saved), tiny_llama(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    for path, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(weight, plain.get_submodule(path).weight)
            plain.get_submodule(path).weight.data = weight
    models = qlora(base).train(), qlora(plain).train()
    outputs = []
    for model in models:
        stir(model)
        outputs.append(model(**BATCH, mood=torch.tensor([0, 1, 2, 1])))
        outputs[-1].loss.backward()
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **close)
    torch.testing.assert_close(outputs[0].predictions["mood"], outputs[1].predictions["mood"], **close)
    for (name, p), (_, expected) in zip(*(model.named_parameters() for model in models), strict=True):
        if "rh_nodes" in name:
            torch.testing.assert_close(p.grad, expected.grad, **close, msg=name)


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_and_lora_reload_onto_a_freshly_quantised_base(saved, tokenizer, bits, tmp_path):
    # in train mode, before their first use: a CPU may take another path through 4-bit weights for inference
    model = trained(saved, tokenizer, tmp_path, bits=bits).model.train()
    model.save_pretrained(tmp_path / "adapter")
    again = rh.InterventionModel.from_pretrained(base_of(saved, bits), str(tmp_path / "adapter")).train()
    assert same(weights(again), weights(model))
    out, expected = again(**BATCH), model(**BATCH)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.predictions["mood"], expected.predictions["mood"], atol=1e-5, rtol=1e-5)
    untrained = qlora(base_of(saved, bits)).train()(**BATCH)
    assert not torch.allclose(out.logits, untrained.logits, atol=1e-3)


def test_gradient_checkpointing_trains_the_same_weights(saved, tokenizer, tmp_path):
    plain, checkpointed = (
        trained(saved, tokenizer, tmp_path, gradient_checkpointing=on, optim="sgd").model for on in (False, True)
    )
    assert checkpointed.get_base_model().model.layers[0].gradient_checkpointing
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_optimisers_of_bitsandbytes_train(saved, tokenizer, optim, tmp_path):
    def make(base):  # an output layer of 4,096 numbers: smaller tensors keep their state in 32 bits
        return qlora(base, rh.Node(rh.LinearHead(WIDTH, "next", bias=False, shift=True), layer=-1, name="wide"))

    data = [row | {"next": row["input_ids"]} for row in rows()]
    trainer = trained(saved, tokenizer, tmp_path, make, data, optim=optim)
    assert all(logged(trainer, name)[-1] < logged(trainer, name)[0] for name in ("loss_mood", "loss_wide"))
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit) and optimizer.is_paged == ("paged" in optim)
    kept = optimizer.state[trainer.model.node("wide").W]["state1"].dtype
    assert kept is (torch.uint8 if "8bit" in optim else torch.float32)
    assert same(state(trainer.model.get_base_model()), state(base_of(saved)))


# --- edits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_an_edit_of_a_quantised_base_is_the_written_out_formula(saved, bits):
    base = base_of(saved, bits)
    edit = rh.Node(rh.LoReFT(rank=2), layer=1, positions="f1+l2", name="edit")
    model = rh.InterventionModel(base, rh.InterventionGraph(edit)).train()
    randomise(model)
    edited = model(**BATCH)
    edited.loss.backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in model.node("edit").parameters())
    node = model.node("edit")
    R, W, b = node.R.detach(), node.W.detach(), node.b.detach()

    def hook(module, args, h):
        h = h.clone()
        for column in (0, 5, 6):
            h[:, column] += (h[:, column] @ W.T + b - h[:, column] @ R.T) @ R
        return h

    plain = base_of(saved, bits).train()  # grad mode and train mode, as above: 4 bits have other paths for inference
    plain.model.layers[1].register_forward_hook(hook)
    logits = plain(IDS).logits
    torch.testing.assert_close(edited.logits, logits, atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, logits, atol=0.1)


def test_the_store_of_a_quantised_base_serves_what_the_plain_path_computes(saved, tokenizer, tmp_path):
    def make(base):
        return rh.InterventionModel(
            base,
            rh.InterventionGraph(
                rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1", name="edit"),
                rh.Node(rh.LinearHead(3, "mood"), layer=-1, positions="l1", name="mood"),
            ),
        )

    plain, reused = (
        trained(saved, tokenizer, tmp_path, make, reuse=reuse, optim="sgd", learning_rate=0.1)
        for reuse in ("off", "memory")
    )
    assert logged(reused, "reuse_hits")[-1] > 0
    torch.testing.assert_close(logged(reused), logged(plain), atol=1e-4, rtol=1e-4)
    expected = weights(plain.model)
    for name, weight in weights(reused.model).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3)


# --- several losses at once -------------------------------------------------------------------------------

TASKS = ("score", "mood", "tag", "next")  # regression, classification, one class a token, the next token


def tasks(count: int = 16) -> list[dict]:
    """Rows of 4 to 8 tokens, each with one or two of the four targets, that its tokens tell."""
    made = []
    for i in range(count):
        ids = random_ids(1, 4 + i % 5, seed=i)[0].tolist()
        targets = {
            "score": ids[-1] / VOCAB,
            "mood": ids[-1] % 3,
            "tag": [token % 2 for token in ids],
            "next": ids,
        }
        chosen = {TASKS[i % 4], TASKS[(i + i // 4) % 4]}
        made.append({"input_ids": ids, **{name: targets[name] for name in TASKS if name in chosen}})
    return made


def heads(lm: str = "next") -> rh.InterventionGraph:
    return rh.InterventionGraph(
        rh.Node(rh.LinearHead(1, "score", "mse", weight=2.0), layer=1, positions="l1", name="score"),
        rh.Node(rh.LinearHead(3, "mood"), layer=-1, positions="l1", name="mood"),
        rh.Node(rh.MLPHead(2, "tag", hidden=16), layer=-1, name="tag"),
        *([rh.Node(rh.LinearHead(VOCAB, "next", shift=True, bias=False), component="final_norm_output", name="next")]
          if lm == "next" else []),
    )  # fmt: skip


@pytest.mark.parametrize("lm", ["next", "labels"])  # a head, and the model's own loss
def test_rows_without_a_target_change_neither_its_loss_nor_any_gradient(saved, tokenizer, lm):
    base = base_of(saved)
    model = rh.InterventionModel(base, rh.preset("lora8:all-linear", base) + heads(lm)).train()
    stir(model)
    data = [{lm if name == "next" else name: value for name, value in row.items()} for row in tasks()]
    # with labels a row would end, for a head at its last token, where they begin
    data = [row | {"prompt_mask": [1] * len(row["input_ids"])} for row in data]
    collate = rh.Collator(tokenizer)

    def run(some):
        model.zero_grad()
        out = model(**collate(some))
        out.loss.backward()
        losses = {**(out.losses or {}), "labels": out.loss - (out.head_loss or 0)}
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, gradients = run(data)
    total: dict[str, torch.Tensor] = {}
    for target in ("score", "mood", "tag", lm):
        some = [{name: row[name] for name in ("input_ids", "prompt_mask", target)} for row in data if target in row]
        assert 0 < len(some) < len(data)
        alone, part = run(some)
        torch.testing.assert_close(alone[target], together[target], atol=1e-4, rtol=1e-4)
        total = {name: total.get(name, 0) + part.get(name, 0) for name in gradients}
    for name, gradient in gradients.items():
        torch.testing.assert_close(total[name], gradient, atol=1e-3, rtol=1e-3, msg=name)


def test_four_kinds_of_loss_fall_together_and_are_logged_by_name(saved, tokenizer, tmp_path):
    def make(base):
        model = rh.InterventionModel(base, rh.preset("lora8:all-linear", base) + heads())
        model.node("next").assign(W=base.lm_head.weight)
        return model

    options = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    trainer = trained(saved, tokenizer, tmp_path, make, tasks(), **options)
    for name in TASKS:
        losses = logged(trainer, f"loss_{name}")
        assert len(losses) == 40 and losses[-1] < 0.7 * losses[0], name
    parts = zip(*(logged(trainer, f"loss_{name}") for name in TASKS), strict=True)
    expected = [2 * score + mood + tag + following for score, mood, tag, following in parts]
    assert logged(trainer) == pytest.approx(expected, abs=1e-3)
    assert same(state(trainer.model.get_base_model()), state(base_of(saved)))


# --- several processes ------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
import reftheads as rh
from support.processes import leave
from support.quantised import base_of
from support.quantised import trained, weights
torch.set_num_threads(1)
saved, folder = sys.argv[1:]
tokenizer = rh.load_base(saved)[1]
trainer = trained(saved, tokenizer, folder, optim="sgd", per_device_train_batch_size=4, ddp_backend="gloo")
assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
if torch.distributed.get_rank() == 0:
    torch.save(weights(trainer.model), f"{folder}/weights")
leave()
"""


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(saved, tokenizer, tmp_path):
    run_together(PROGRAM, saved, tmp_path)
    alone = weights(trained(saved, tokenizer, tmp_path, optim="sgd").model)
    apart = torch.load(tmp_path / "weights", weights_only=True)
    torch.manual_seed(0)
    assert not same(alone, weights(qlora(base_of(saved))))
    assert apart.keys() == alone.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(apart[name], weight, atol=1e-5, rtol=1e-4)
