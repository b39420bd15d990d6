"""What pyreft and pyvene get wrong or cannot do on today's stack, each done right here.

The order is that of everyday work: train, save, load, generate, and then what goes wrong in silence.
"""

import pytest
import torch
import transformers as tf
from models import LAYERS, VOCAB, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama, weighted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM

import reftheads as rh

EXACT = {"atol": 1e-10, "rtol": 0}
PROMPT, ANSWER = 5, 3


def edited(base, positions="l1", layers=(1,), kind=None, **options) -> rh.InterventionModel:
    graph = rh.InterventionGraph.over(layers, kind or rh.LoReFT(rank=2), positions, name="n", **options)
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
    model = rh.InterventionModel(base, rh.InterventionGraph.over(range(LAYERS), rh.LoReFT(rank=4), "f1+l1"))
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
    model = rh.InterventionModel(base, rh.InterventionGraph.over(range(LAYERS), rh.LoReFT(rank=4), "f1+l1"))
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
    model = rh.InterventionModel(base, rh.InterventionGraph.over([1], rh.LoReFT(rank=4), "l1", name="n"))
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
        return rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over([0, 2], kind, "f1+l1", name="n"))

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
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over([1], rh.LoReFT(rank=8), "l1", name="n"))
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
