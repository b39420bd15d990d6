"""LoRA nodes against PEFT's own LoRA: both ways, and merged."""

import json
import warnings
from random import Random

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support.files import damaged_copy
from support.models import VOCAB, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama
from torch import Tensor

import reftheads as rh
from reftheads.interop.peft_lora import from_peft_lora, merge_lora, to_peft_lora

EXACT = {"atol": 1e-10, "rtol": 0}


def tiny_phi3() -> tf.Phi3ForCausalLM:
    torch.manual_seed(0)
    config = tf.Phi3Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.Phi3ForCausalLM(config).eval()


GRAPHS = {
    "llama, one rank": (
        tiny_llama,
        rh.InterventionGraph.over(rh.LoRA(rank=2, alpha=4), range(3), component="query_output")
        + rh.InterventionGraph.over(rh.LoRA(rank=2, alpha=4), range(3), component="value_output"),
    ),
    "llama, mixed ranks, a path and one head": (
        tiny_llama,
        rh.InterventionGraph(
            rh.Node(rh.LoRA(rank=1), 0, "query_output"),
            rh.Node(rh.LoRA(rank=2, alpha=3), 1, "query_output"),
            rh.Node(rh.LoRA(rank=3, alpha=16), 1, "query_output"),
            rh.Node(rh.LoRA(rank=2, alpha=0.5), 2, "key_output", head=1),
            rh.Node(rh.LoRA(rank=4), component="model.layers.2.mlp.down_proj"),
        ),
    ),
    "llama, shared": (
        tiny_llama,
        rh.InterventionGraph.over(rh.LoRA(rank=2, alpha=4), range(3), component="query_output", share="one"),
    ),
    "gpt2, fused columns": (
        tiny_gpt2,
        rh.InterventionGraph(
            rh.Node(rh.LoRA(rank=2, alpha=3), 0, "query_output"),
            rh.Node(rh.LoRA(rank=3), 0, "value_output"),
            rh.Node(rh.LoRA(rank=2), 1, "key_output", head=2),
            rh.Node(rh.LoRA(rank=2), 2, "attention_output"),
            rh.Node(rh.LoRA(rank=2), component="transformer.h.2.mlp.c_fc"),
        ),
    ),
    "phi3, fused columns": (
        tiny_phi3,
        rh.InterventionGraph(
            rh.Node(rh.LoRA(rank=2), 0, "query_output"), rh.Node(rh.LoRA(rank=2, alpha=9), 0, "key_output")
        ),
    ),
}


def trained(name: str, double: bool = True) -> rh.InterventionModel:
    make, graph = GRAPHS[name]
    model = rh.InterventionModel(make().double() if double else make(), graph).eval()
    randomise(model)
    return model.double() if double else model


def read_by_peft(make, directory) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as keys that are missing or unexpected
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(make().double(), directory)


@pytest.mark.parametrize("name", GRAPHS)
def test_peft_computes_the_same_from_what_was_written(name, tmp_path):
    ids = random_ids()
    model = trained(name)
    with model.disable_adapter():
        base = model(ids).logits
    logits = model(ids).logits
    assert (logits - base).abs().max() > 1e-3
    to_peft_lora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(read_by_peft(GRAPHS[name][0], tmp_path)(ids).logits, logits, **EXACT)


def test_real_tokens_of_padded_rows_get_the_same_from_peft(tmp_path):
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = trained("llama, mixed ranks, a path and one head")
    to_peft_lora(model, tmp_path)
    theirs = read_by_peft(tiny_llama, tmp_path)(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], theirs[mask == 1], **EXACT)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_checkpoint_that_was_written_is_read_back_as_the_same_function(name, tmp_path):
    ids = random_ids()
    model = trained(name)
    to_peft_lora(model, tmp_path)
    again = from_peft_lora(GRAPHS[name][0]().double(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("double, tolerance", [(True, 1e-10), (False, 1e-6)])
def test_merged_weights_do_what_the_nodes_did(name, double, tolerance):
    ids = random_ids()
    model = trained(name, double)
    expected = model(ids).logits
    merged = merge_lora(model)
    assert type(merged) is type(GRAPHS[name][0]())
    assert not any("lora" in key or "interventions" in key for key, _ in merged.named_modules())
    assert merged.state_dict().keys() == GRAPHS[name][0]().state_dict().keys()
    scale = expected.abs().max().item()
    torch.testing.assert_close(merged(ids).logits, expected, atol=tolerance * max(scale, 1), rtol=0)


def test_any_adapter_can_be_written_or_merged_by_its_name(tmp_path):
    ids = random_ids()
    model = trained("llama, one rank")
    second = rh.InterventionGraph.over(rh.LoRA(rank=3), range(3), component="mlp_output")
    model.add_adapter("second", second)
    model.set_adapter("second")
    model.double().eval()
    randomise(model, seed=5)
    expected = model(ids).logits
    model.set_adapter("default")
    to_peft_lora(model, tmp_path, adapter_name="second")
    torch.testing.assert_close(read_by_peft(tiny_llama, tmp_path)(ids).logits, expected, **EXACT)
    torch.testing.assert_close(merge_lora(model, adapter_name="second")(ids).logits, expected, **EXACT)
    with pytest.raises(KeyError, match="nobody"):
        to_peft_lora(trained("llama, one rank"), tmp_path, adapter_name="nobody")


# --- what PEFT trained ---

CONFIGS = {
    "plain": (tiny_llama, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "rank-stabilised": (tiny_llama, dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])),
    "patterns": (
        tiny_llama,
        dict(
            r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2, "layers.1.self_attn.k_proj": 3},
            alpha_pattern={"k_proj": 32, "model.layers.2.mlp.up_proj": 1},
        ),
    ),
    "some layers": (tiny_llama, dict(r=2, target_modules=["down_proj"], layers_to_transform=[0, 2])),
    "gpt2": (tiny_gpt2, dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "dropout": (tiny_llama, dict(r=4, lora_dropout=0.25, target_modules=["q_proj"])),
}  # fmt: skip


def saved_by_peft(make, options: dict, directory) -> Tensor:
    model = peft.get_peft_model(make().double(), peft.LoraConfig(**options)).double().eval()
    randomise(model)
    model.save_pretrained(directory)
    return model(random_ids()).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_that_peft_trained_is_read_as_the_same_function_and_written_back(name, tmp_path):
    make, options = CONFIGS[name]
    expected = saved_by_peft(make, options, tmp_path / "theirs")
    model = from_peft_lora(make().double(), tmp_path / "theirs").eval()
    torch.testing.assert_close(model(random_ids()).logits, expected, **EXACT)
    to_peft_lora(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    torch.testing.assert_close(read_by_peft(make, tmp_path / "ours")(random_ids()).logits, expected, **EXACT)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == options.get("lora_dropout", 0)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_was_read_can_be_trained_on_if_wanted(is_trainable, tmp_path):
    make, options = CONFIGS["plain"]
    saved_by_peft(make, options, tmp_path)
    model = from_peft_lora(make(), tmp_path, is_trainable=is_trainable)
    parameters = [p for name, p in model.named_parameters() if "rh_nodes" in name]
    assert parameters and all(p.requires_grad == is_trainable for p in parameters)


def tiny_t5() -> tf.T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config).eval()


def test_an_encoder_decoder_is_read_with_its_cross_attention(tmp_path):
    options = dict(r=2, target_modules=["q", "v"])
    theirs = peft.get_peft_model(tiny_t5().double(), peft.LoraConfig(**options)).double().eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = from_peft_lora(tiny_t5().double(), tmp_path).eval()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    given = dict(input_ids=random_ids(), attention_mask=mask)
    inputs = given | dict(decoder_input_ids=random_ids(2, 4, seed=5))
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, **EXACT)
    for beams in (1, 2):
        generated = [model.generate(**given, max_new_tokens=6, num_beams=beams) for model in (ours, theirs)]
        assert torch.equal(*generated)


# --- what cannot be expressed ---


@pytest.mark.parametrize(
    "node, message",
    [
        (rh.Node(rh.LoReFT(rank=2), 1, name="edit"), "'edit' is a LoReFT"),
        (rh.Node(rh.LinearHead(outputs=2), 1, name="probe"), "'probe' is a LinearHead"),
        (rh.Node(rh.LoRA(rank=2), 1, "key_output", positions="l1", name="last"), "'last' acts on positions 'l1'"),
    ],
)
@pytest.mark.parametrize("use", [lambda model, path: to_peft_lora(model, path), lambda model, path: merge_lora(model)])
def test_a_node_that_peft_cannot_express_is_named_and_nothing_is_touched(node, message, use, tmp_path):
    ids = random_ids()
    graph = rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 0, "query_output"), node)
    model = rh.InterventionModel(tiny_llama(), graph).eval()
    randomise(model)
    before = model(ids).logits
    with pytest.raises(ValueError, match=message):
        use(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert torch.equal(model(ids).logits, before)


def test_nodes_of_different_dropout_can_be_merged_but_not_exported(tmp_path):
    ids = random_ids()
    graph = rh.InterventionGraph(
        rh.Node(rh.LoRA(rank=2, dropout=0.5), 0, "query_output"), rh.Node(rh.LoRA(rank=2), 0, "query_output")
    )
    model = rh.InterventionModel(tiny_llama(), graph).eval()
    randomise(model)
    expected = model(ids).logits
    with pytest.raises(ValueError, match="differ in dropout"):
        to_peft_lora(model, tmp_path)
    torch.testing.assert_close(merge_lora(model)(ids).logits, expected, atol=1e-5, rtol=0)


def test_weights_that_are_not_finite_are_not_merged():
    graph = rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 0, "query_output", name="n"))
    model = rh.InterventionModel(tiny_llama(), graph).eval()
    model.node("n").assign(A=torch.full((2, WIDTH), torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(model)
    assert model.node("n").A.isinf().all()


def test_pefts_own_merge_says_where_the_right_one_is():
    model = trained("llama, one rank")
    with pytest.raises(ValueError, match="reftheads.interop.peft_lora.merge_lora"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias='all'"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ],
)
def test_options_of_peft_that_change_the_formula_are_refused(options, message, tmp_path):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["up_proj"], **options))
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        from_peft_lora(base, tmp_path)
    assert not hasattr(base, "interventions")


def test_a_lora_outside_of_the_blocks_is_refused_rather_than_dropped(tmp_path):
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    base = tf.BertForMaskedLM(config)
    options = dict(r=2, target_modules=["query", "transform.dense"])
    peft.get_peft_model(tf.BertForMaskedLM(config), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls.predictions.transform.dense.*is called outside of 'bert'"):
        from_peft_lora(base, tmp_path)
    assert not hasattr(base, "interventions")
    options = dict(r=2, target_modules=["q_proj", "lm_head"])
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="'lm_head', where nodes do not act"):
        from_peft_lora(tiny_llama(), tmp_path)


def test_checkpoints_that_are_no_lora_damaged_pickled_or_of_another_model_are_refused(tmp_path):
    make, options = CONFIGS["plain"]
    weights = tmp_path / "adapter_model.safetensors"

    def refused(message, base):
        with pytest.raises(ValueError, match=message):
            from_peft_lora(base, tmp_path)
        assert not hasattr(base, "interventions")

    saved_by_peft(make, options, tmp_path)
    refused("no module", tiny_gpt2())
    refused("must have shape", tiny_llama(hidden_size=32))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("truncated or damaged", tiny_llama())
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, weights)
    refused("only one of the two", tiny_llama())
    torch.save({}, tmp_path / "adapter_model.bin")
    weights.unlink()
    refused("never from a pickle", tiny_llama())
    peft.get_peft_model(
        tiny_llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path)
    refused("not a LoRA", tiny_llama())


def test_random_damage_of_a_lora_is_an_error_or_another_lora(tmp_path):
    make, options = CONFIGS["plain"]
    good, bad, random, base, loaded = tmp_path / "good", tmp_path / "bad", Random(0), make(), 0
    saved_by_peft(make, options, good)
    bad.mkdir()
    plain = base(random_ids()).logits
    for _ in range(150):
        damaged_copy(good, bad, random)
        try:
            from_peft_lora(base, bad).unload().requires_grad_(True)
            loaded += 1
        except ValueError as error:
            assert type(error) is ValueError and 10 < len(str(error)) < 3000
        assert not hasattr(base, "interventions") and all(p.requires_grad for p in base.parameters())
    assert torch.equal(base(random_ids()).logits, plain) and 0 < loaded < 150
