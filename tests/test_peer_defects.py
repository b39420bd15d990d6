"""What pyreft, pyvene and transformer-heads get wrong or cannot do on today's stack, each done right here.

The order is that of everyday work: train, save, load, generate, and then what goes wrong in silence; heads come last.
"""

import pytest
import torch
import transformers as tf
from support.models import LAYERS, VOCAB, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama, weighted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM

import reftheads as rh

EXACT = {"atol": 1e-10, "rtol": 0}
PROMPT, ANSWER = 5, 3


def edited(base, positions="l1", layers=(1,), kind=None, **options) -> rh.InterventionModel:
    graph = rh.InterventionGraph.over(kind or rh.LoReFT(rank=2), layers, positions, name="n", **options)
    model = rh.InterventionModel(base, graph).eval()
    randomise(model)
    return model


def pairs(count: int = 8) -> list[dict[str, list[int]]]:
    """Prompts of 5 tokens with answers of 3, as a causal model is trained on them."""
    ids = random_ids(count, PROMPT + ANSWER)
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row), "labels": [-100] * PROMPT + row[PROMPT:].tolist()}
        for row in ids
    ]


def trainer(model, rows, folder, **options) -> tf.Trainer:
    settings = dict(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=0,
        per_device_train_batch_size=4, num_train_epochs=4, lr_scheduler_type="constant", save_strategy="no",
        logging_strategy="no", label_names=["labels"],
    )  # fmt: skip
    args = tf.TrainingArguments(**settings | options)
    return tf.Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=tf.default_data_collator
    )


def written_out(base, layer: int, p: dict[str, Tensor], columns: list[int]) -> None:
    """Edits the given columns by LoReFT with a hook of the test's own, whenever more than one token passes."""
    q, r = torch.linalg.qr(p["M"].double().T)
    R = (q * torch.sign(torch.diagonal(r))).T.to(p["M"])

    def hook(module, args, h):
        if h.shape[1] == 1:
            return h
        new, at = h.clone(), h[:, columns]
        new[:, columns] = at + (at @ p["W"].T + p["b"] - at @ R.T) @ R
        return new

    base.model.layers[layer].register_forward_hook(hook)


# --- broken there: training ---


def test_a_plain_trainer_trains_a_causal_model(tmp_path):
    rows = pairs()
    base = tiny_llama(initializer_range=0.3)
    model = rh.InterventionModel(base, rh.InterventionGraph.over(rh.LoReFT(rank=4), range(LAYERS), "f1+l1"))
    run = trainer(model, rows, tmp_path, num_train_epochs=20)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.5


def test_gradient_accumulation_reports_the_same_loss_as_one_big_batch(tmp_path):
    losses = []
    for accumulation, size in ((1, 8), (4, 2)):
        model = edited(tiny_llama(), "l1")
        run = trainer(
            model, pairs(), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
        )  # fmt: skip
        losses.append(run.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_classification_model_is_trained_and_evaluated(tmp_path):
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(tf.LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": 2}))
    rows = [{"input_ids": row.tolist(), "labels": i % 2} for i, row in enumerate(random_ids(8, 6))]
    model = rh.InterventionModel(base, rh.InterventionGraph.over(rh.LoReFT(rank=4), range(LAYERS), "f1+l1"))
    run = trainer(model, rows, tmp_path, num_train_epochs=30)
    run.compute_metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0


def test_a_head_on_a_causal_model_classifies(tmp_path):
    rows = [{"input_ids": row.tolist(), "mood": i % 2} for i, row in enumerate(random_ids(8, 6))]
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=4), 0, positions="all"),
        rh.Node(rh.LinearHead(outputs=2, target="mood"), -1, positions="l1", name="mood"),
    )
    model = rh.InterventionModel(tiny_llama(), graph)
    trainer(model, rows, tmp_path, num_train_epochs=30, remove_unused_columns=False, label_names=["mood"]).train()
    model.eval()
    predictions = model(torch.tensor([row["input_ids"] for row in rows])).predictions["mood"].argmax(-1)
    assert predictions.tolist() == [row["mood"] for row in rows]


def test_the_best_of_several_checkpoints_is_back_in_place_at_the_end(tmp_path):
    base = tiny_llama(initializer_range=0.3)
    model = rh.InterventionModel(base, rh.InterventionGraph.over(rh.LoReFT(rank=4), [1], "l1", name="n"))
    train, other = ([row | {"labels": [-100] * PROMPT + [token] * ANSWER} for row in pairs()] for token in (5, 6))
    run = trainer(
        model, train, tmp_path, learning_rate=0.1, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    run.eval_dataset = other  # gets worse as training goes on
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] > min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(tmp_path):
    def fresh():
        torch.manual_seed(3)
        kind = rh.LoReFT(rank=4, dropout=0.1)
        return rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over(kind, [0, 2], "f1+l1", name="n"))

    options = dict(save_strategy="steps", save_steps=4, lr_scheduler_type="linear")
    whole, resumed = fresh(), fresh()
    trainer(whole, pairs(), tmp_path, **options).train()
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    trainer(resumed, pairs(), tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, parameter in whole.node("n_0").named_parameters():
        assert torch.equal(dict(resumed.node("n_0").named_parameters())[name], parameter)


@pytest.mark.parametrize("component", ["block_output", "mlp_activation"])
def test_gradients_under_activation_checkpointing_are_the_same(component):
    ids = random_ids()
    gradients = []
    for checkpointing in (False, True):
        model = edited(tiny_llama().double(), "f2+l2", (0, 2), component=component).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = weighted(model(ids, prompt_mask=torch.ones_like(ids), use_cache=False).logits)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain, **EXACT)


def test_a_trainer_with_gradient_checkpointing_trains_the_same(tmp_path):
    models = []
    for checkpointing in (False, True):
        model = edited(tiny_llama(), "l1", (0, 2))
        trainer(model, pairs(), tmp_path, gradient_checkpointing=checkpointing).train()
        models.append(model)
    for name, parameter in models[0].node("n_0").named_parameters():
        again = dict(models[1].node("n_0").named_parameters())[name]
        torch.testing.assert_close(again, parameter, atol=1e-5, rtol=0)


def test_a_checkpoint_is_loaded_from_the_directory_alone(tmp_path):
    ids = random_ids()
    model = edited(tiny_llama(), "f2+l2", range(LAYERS))
    model.save_pretrained(tmp_path)
    loaded = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# --- broken there: dtypes, architectures, generation ---


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_dtype_of_the_base_goes_with_any_dtype_of_the_node(base_dtype, dtype):
    model = edited(tiny_llama().to(base_dtype), kind=rh.LoReFT(rank=2, dtype=dtype))
    ids = random_ids()
    out = model(ids, labels=ids, prompt_mask=torch.ones_like(ids))
    out.loss.backward()
    assert out.logits.dtype == base_dtype and out.logits.isfinite().all()
    with model.disable_adapter():
        assert not torch.equal(model(ids).logits, out.logits)


def gemma3():
    config = tf.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, sliding_window=4,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def phi3():
    config = tf.Phi3Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.Phi3ForCausalLM(config)


@pytest.mark.parametrize("make", [gemma3, phi3])
def test_block_output_is_edited_in_gemma_3_and_phi_3(make):
    torch.manual_seed(0)
    base = make().double().eval()
    model = edited(base, "2:4").double()
    ids = random_ids()
    ours = model(ids).logits
    written_out(base, 1, model.node("n_1").stored(), [2, 3])
    with model.disable_adapter():
        torch.testing.assert_close(ours, base(ids).logits, **EXACT)


@pytest.mark.parametrize("num_beams, num_return_sequences", [(1, 1), (3, 1), (3, 3)])
def test_beams_and_several_return_sequences_are_scored_under_the_edit_of_the_prompt(num_beams, num_return_sequences):
    prompts = random_ids(2, PROMPT)
    model = edited(tiny_llama(eos_token_id=None).double(), "f1+l2").double()
    out = model.generate(
        input_ids=prompts, max_new_tokens=4, num_beams=num_beams, num_return_sequences=num_return_sequences,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = model.compute_transition_scores(
        out.sequences, out.scores, out.beam_indices if num_beams > 1 else None, normalize_logits=num_beams == 1
    )
    base = tiny_llama(eos_token_id=None).double()
    written_out(base, 1, model.node("n_1").stored(), [0, 3, 4])
    expected = base(out.sequences).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    expected = expected.gather(-1, out.sequences[:, PROMPT:, None])[..., 0]
    assert out.sequences.shape == (2 * num_return_sequences, PROMPT + 4)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_sampled_return_sequences_are_scored_under_the_edit_of_the_prompt():
    prompts = random_ids(2, PROMPT)
    model = edited(tiny_llama(eos_token_id=None).double(), "f1+l2").double()
    torch.manual_seed(0)
    out = model.generate(
        input_ids=prompts, max_new_tokens=4, do_sample=True, num_return_sequences=3, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    base = tiny_llama(eos_token_id=None).double()
    written_out(base, 1, model.node("n_1").stored(), [0, 3, 4])
    expected = base(out.sequences).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1).double(), expected, atol=1e-5, rtol=0)


def greedy(model, ids: Tensor, **options) -> Tensor:
    """Logits of every new token."""
    out = model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "prompt", "generated", "all"])
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 2}, {"use_cache": False}], ids=str)
def test_chunked_prefill_and_no_cache_give_the_same_tokens_as_a_cache(options, positions):
    ids = random_ids(2, PROMPT)
    model = edited(tiny_llama(eos_token_id=None).double(), positions, (0, 2)).double()
    torch.testing.assert_close(greedy(model, ids, **options), greedy(model, ids), atol=1e-5, rtol=0)


def test_a_pipeline_generates_what_generate_does():
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    model = edited(tiny_llama(), "l1")
    text = "w5 w6 w7"
    piped = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
        text, max_new_tokens=5, do_sample=False, return_full_text=False
    )
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert piped[0]["generated_text"].split() == tokenizer.decode(ids[0, 3:], skip_special_tokens=True).split()
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), ids)


# --- silently wrong there ---


def test_rows_of_r_stay_orthonormal_when_training_goes_on_after_loading(tmp_path):
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over(rh.LoReFT(rank=8), [1], "l1", name="n"))
    trainer(model, pairs(), tmp_path / "a", weight_decay=0.1).train()
    model.save_pretrained(tmp_path / "b")
    loaded = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path / "b", is_trainable=True)
    trainer(loaded, pairs(), tmp_path / "c", weight_decay=0.1, num_train_epochs=20).train()
    R = loaded.node("n_1").R
    assert (R - model.node("n_1").R).abs().max() > 1e-3
    assert (R @ R.T - torch.eye(8)).abs().max() < 1e-5


def test_eval_switches_dropout_off():
    model = edited(tiny_llama(), "all", kind=rh.LoReFT(rank=2, dropout=0.5))
    ids = random_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_every_row_uses_its_own_positions_at_every_node():
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18]]
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 0, positions="1"),
        rh.Node(rh.LoReFT(rank=2), 1, positions="l2"),
        rh.Node(rh.LoReFT(rank=2), 2, positions="f2+l2"),
    )
    model = rh.InterventionModel(tiny_llama(), graph).double().eval()
    randomise(model)
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (7 - len(row)) for row in rows])
    together = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(together[i, : len(row)], alone, atol=1e-8, rtol=0)


def test_the_users_own_hooks_survive():
    base = tiny_llama()
    calls = []
    base.model.layers[1].register_forward_hook(lambda m, args, out: calls.append("before"))
    model = edited(base)
    base.model.layers[1].register_forward_hook(lambda m, args, out: calls.append("after"))
    model(random_ids())
    model.generate(input_ids=random_ids(), max_new_tokens=2)
    with model.disable_adapter():
        model(random_ids())
    assert calls == ["before", "after"] * 4


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_left_padded_rows_are_trained_as_each_of_them_alone(make):
    rows = [([5, 6, 7, 8, 9], [10, 11]), ([12, 13], [14, 15, 16]), ([17, 18, 19], [20])]
    model = edited(make().double(), "f2+l2", (0, 2)).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def step(batch: list) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        width = max(len(p) + len(a) for p, a in batch)
        pad = [width - len(p) - len(a) for p, a in batch]
        ids = torch.tensor([[0] * n + p + a for n, (p, a) in zip(pad, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad])
        labels = torch.tensor([[-100] * (n + len(p)) + a for n, (p, a) in zip(pad, batch, strict=True)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        count = (labels != -100).sum()
        loss = model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss * count
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return loss.item(), grads

    loss, gradients = step(rows)
    alone = [step([row]) for row in rows]
    assert loss == pytest.approx(sum(one for one, _ in alone), abs=1e-5)  # transformers takes it in float32
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, sum(g[name] for _, g in alone), atol=1e-6, rtol=0)


def test_saving_keeps_options_and_shared_modules(tmp_path):
    kind = rh.LoReFT(rank=2, act_fn="relu", dropout=0.25, bias=False)
    model = edited(tiny_llama(), "f2+l2", range(LAYERS), kind=kind, share="one")
    model.save_pretrained(tmp_path)
    loaded = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert loaded.plan().graph == model.plan().graph
    assert loaded.node("n_0").intervention == kind
    assert loaded.node("n_0") is loaded.node("n_2")
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# --- heads: broken or silently wrong in transformer-heads ---


def with_head(base, head: rh.LinearHead, *nodes: rh.Node, **where) -> rh.InterventionModel:
    where = where or {"component": "final_norm_output", "positions": "l1"}
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes, rh.Node(head, name="head", **where))).eval()
    randomise(model)
    return model


def moods(count: int = 8) -> list[dict]:
    return [{"input_ids": row.tolist(), "mood": i % 2} for i, row in enumerate(random_ids(count, 6))]


def test_a_probe_alone_on_a_model_with_tied_embeddings_trains_generates_saves_and_loads(tmp_path):
    base, ids = tiny_gpt2(), random_ids()
    assert base.lm_head.weight is base.transformer.wte.weight
    plain, written = base(ids).logits, base.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    model = with_head(base, rh.LinearHead(2, "mood", detach=True), layer=1, positions="l1")
    before = model(ids).predictions["head"]
    options = {"remove_unused_columns": False, "label_names": ["mood"]}
    trainer(model, moods(), tmp_path / "run", save_strategy="epoch", **options).train()
    model.eval()
    expected = model(ids).predictions["head"]
    assert not torch.equal(expected, before)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), written)
    model.save_pretrained(tmp_path / "saved")
    for folder in ("saved", "run/checkpoint-8"):
        loaded = rh.InterventionModel.from_pretrained(tiny_gpt2(), tmp_path / folder).eval()
        assert torch.equal(loaded(ids).predictions["head"], expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_new_language_model_head_that_was_trained_with_lora_is_the_trained_one_after_loading(make, tmp_path):
    base = make()
    head = rh.LinearHead(VOCAB, "next", bias=False, shift=True)
    nodes = [rh.Node(rh.LoRA(rank=2), layer, "query_output", name=f"lora_{layer}") for layer in range(LAYERS)]
    node = rh.Node(head, component="final_norm_output", name="lm")
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes, node))
    old = base.get_output_embeddings().weight.clone()
    model.node("lm").assign(W=old)
    rows = [{"input_ids": row.tolist(), "next": row.tolist()} for row in random_ids(8, 6)]
    trainer(model, rows, tmp_path / "run", remove_unused_columns=False, label_names=["next"]).train()
    model.eval().save_pretrained(tmp_path / "saved")
    out = model(random_ids())
    assert (out.predictions["lm"] - out.logits).abs().max() > 0.1  # trained away from the old one, which stays
    assert torch.equal(base.get_output_embeddings().weight, old)
    again = rh.InterventionModel.from_pretrained(make(), tmp_path / "saved").eval()(random_ids())
    assert torch.equal(again.predictions["lm"], out.predictions["lm"]) and torch.equal(again.logits, out.logits)


def test_evaluation_has_no_dropout_of_the_base_or_of_nodes(tmp_path):
    lora = rh.Node(rh.LoRA(rank=2, dropout=0.5), 0, "query_output", name="lora")
    model = with_head(tiny_gpt2(), rh.LinearHead(2, "mood"), lora)  # GPT-2's own dropout is 0.1
    rows, ids = moods(), random_ids()
    run = trainer(model, rows, tmp_path, remove_unused_columns=False, label_names=["mood"])
    model.train()
    assert not torch.equal(model(ids, mood=torch.ones(2)).loss, model(ids, mood=torch.ones(2)).loss)
    losses = []
    for _ in range(2):
        model.train()
        losses.append(run.evaluate()["eval_loss"])
    model.eval()
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    assert losses[0] == losses[1] == pytest.approx(model(**batch).loss.item(), abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_where_pad_is_eos_a_sequence_head_reads_a_row_as_if_it_were_alone_wherever_eos_stands(make, side):
    eos = 2
    base = make(pad_token_id=eos)
    model = with_head(base.double(), rh.LinearHead(3, "y")).double()
    rows = [[5, 6, eos, 7, 8, 9], [eos, 10, 11], [12, 13, 14, eos], [eos], [eos, eos, 15]]
    pads = [[eos] * (6 - len(row)) for row in rows]
    ids = torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)])
    ones = [[1] * len(row) for row in rows]
    none = [[0] * len(pad) for pad in pads]
    mask = torch.tensor([a + b if side == "right" else b + a for a, b in zip(ones, none, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # GPT-2 learns them, and counts columns if it is not told
    together = model(ids, attention_mask=mask, position_ids=positions).predictions["head"]
    alone = torch.cat([model(torch.tensor([row])).predictions["head"] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-8, rtol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_what_leaves_the_last_block_and_what_leaves_the_final_norm_are_two_things(make):
    base, ids, raw = make(), random_ids(), []
    body = base.base_model
    blocks, norm, eps = (body.layers, body.norm, 1e-6) if make is tiny_llama else (body.h, body.ln_f, 1e-5)
    torch.nn.init.normal_(norm.weight)
    blocks[-1].register_forward_hook(lambda module, args, out: raw.append(out))
    graph = rh.InterventionGraph(
        rh.Node(rh.Collect(), -1, name="block"), rh.Node(rh.Collect(), component="final_norm_output", name="norm")
    )
    collected = rh.InterventionModel(base, graph).eval()(ids).collected
    h = raw[-1]  # the ones before are of the passes that look at the model
    centred = h if make is tiny_llama else h - h.mean(-1, keepdim=True)
    expected = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.weight
    assert torch.equal(collected["block"], h)
    torch.testing.assert_close(collected["norm"], expected, atol=1e-5, rtol=0)
    assert (collected["norm"] - h).abs().max() > 0.1


def test_nothing_below_the_lowest_trained_node_takes_part_in_backward():
    lora = rh.Node(rh.LoRA(rank=2), 1, "mlp_output", name="lora")
    probe = {"layer": 2, "positions": "l1"}
    for nodes, head, expected in [
        ([lora], rh.LinearHead(2, "mood"), [False, True, True]),
        ([], rh.LinearHead(2, "mood"), [False, False, False]),
        ([], rh.LinearHead(2, "mood", detach=True), [False, False, False]),
    ]:
        base, seen = tiny_llama(), []
        model = with_head(base, head, *nodes, **probe).train()
        for block in base.model.layers:
            block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))  # noqa: B023
        out = model(random_ids(), mood=torch.tensor([0, 1]))
        assert seen == expected and out.logits.requires_grad == any(expected)
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
