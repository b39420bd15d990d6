"""Computing only the cone of influence, in every architecture: losses and gradients are those of the plain path.

Weights are large, so that attention is not uniform, and in float64, where a wrong token shows far above rounding.
transformers rounds logits to float32 before the cross-entropy; here they stay in float64 (`exact_loss`), but in the
tests that say so.
"""

from typing import Any

import pytest
import torch
import transformers as tf
from support.architectures import CASES, GQA, SMALL, WIDE
from support.models import tiny_bart, tiny_t5
from support.oracle import causal_loss
from support.replay import (
    DECODERS,
    ENCODERS,
    TRANSFORMERS_LOSS,
    base_of,
    blocks_of,
    check_exact,
    counted,
    from_config,
    head,
    intervened,
    loreft,
    step,
    usual_batch,
)
from torch import nn

import reftheads as rh
from reftheads.reuse.cone import Cone
from reftheads.reuse.store import ActivationStore

pytestmark = pytest.mark.usefixtures("loss_in_float64")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_plain_gradients_and_leaves_the_prefixes_out(name: str) -> None:
    model, batch = intervened(base_of(name), loreft(-2), loreft(-1)), usual_batch()
    plain = check_exact(model, batch, 1e-5 if name == "codegen" else 1e-10)  # it attends in float32
    assert all(float(g.norm()) > 1e-4 for g in plain.gradients.values()) and len(plain.gradients) == 6
    with model.reusing(ActivationStore(2**30)):
        step(model, batch)
        with counted(blocks_of(model)[-1]) as seen:
            step(model, batch)
    # 4 rows of at most 4 tokens: the last of the prompt and an answer, whose own last token predicts nothing
    assert seen == [4 * 4]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_in_float32_has_the_plain_gradients_up_to_rounding(name: str) -> None:
    model = intervened(base_of(name).float(), loreft(-2), loreft(-1))
    check_exact(model, usual_batch(), rtol=1e-5)  # 1.5e-6 at most was seen


TURNS = ["linear_attention", "full_attention"] * 2
GEMMA4 = WIDE | {"num_hidden_layers": 4, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4, "global_head_dim": 32}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
GPTJ = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
RECURRENT = "blocks carry a recurrent state"
OTHERS: dict[str, tuple[type, dict[str, Any], str | None]] = {
    "bidirectional": (tf.Gemma3TextConfig, WIDE | {"use_bidirectional_attention": True}, "sees all the others"),
    "two head widths": (tf.Gemma4TextConfig, GEMMA4 | {"num_kv_shared_layers": 0}, "keys and values of one shape"),
    "shared keys": (tf.Gemma4TextConfig, GEMMA4 | {"num_kv_shared_layers": 2}, "keys and values of one shape"),
    "linear attention": (
        tf.Qwen3NextConfig,
        WIDE | {"num_hidden_layers": 4, "layer_types": TURNS, "num_experts": 4, "num_experts_per_tok": 2},
        RECURRENT,
    ),
    "mamba beside attention": (tf.FalconH1Config, WIDE | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4}, RECURRENT),
    "convolutions": (tf.Lfm2Config, GQA | {"layer_types": ["conv", "full_attention", "conv"]}, RECURRENT),
    "latent attention": (
        tf.DeepseekV3Config,
        SMALL
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 2, "num_key_value_heads": 4},
        None,
    ),
    "chunked attention": (
        tf.Llama4TextConfig,
        WIDE | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4},
        None,
    ),
    "encoder as decoder": (tf.BertConfig, SMALL | {"is_decoder": True}, None),
    "attention in float32": (tf.GPTJConfig, GPTJ | {"rotary_dim": 4}, None),
    "biases by distance": (tf.MptConfig, {"vocab_size": 40, "d_model": 32, "n_layers": 3, "n_heads": 4}, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unusual_decoder_has_the_plain_gradients_and_says_what_is_not_reused(name: str) -> None:
    kind, options, reason = OTHERS[name]
    model, batch = intervened(from_config(kind(**options)), loreft(-2), loreft(-1), head(0)), usual_batch(targets=True)
    check_exact(model, batch, rtol=1e-6 if name in ("attention in float32", "biases by distance") else 1e-10)
    with model.reusing(None) as used:
        given = used.eligibility.why_no_prefix(used.cone)
        assert (given is None) == (reason is None) == used.split.rows(used.cone, batch).divided
        assert reason is None or reason in given


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_of_transformers_itself_is_the_plain_one_up_to_its_rounding(name: str) -> None:
    with causal_loss(TRANSFORMERS_LOSS):
        check_exact(intervened(base_of(name), loreft(-2), loreft(-1)), usual_batch(), rtol=1e-6)


@pytest.mark.parametrize("number", [7, torch.tensor(7)])
def test_the_number_of_items_in_an_accumulated_batch_divides_the_loss(number: Any) -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    whole = check_exact(model, batch)
    part = check_exact(model, batch | {"num_items_in_batch": number})
    labels = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(part.loss, whole.loss * labels / 7)


@pytest.mark.parametrize("positions", ["all", "f1"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_a_classifier_skips_the_blocks_below_the_edit(name: str, positions: str) -> None:
    model = intervened(base_of(name), loreft(1, positions), head(2, "f1"), head(0, "f1", name="low"))
    batch = usual_batch(targets=True, labels=False) | {"labels": torch.tensor([1, 0, 0, 1])}
    batch.pop("prompt_mask")
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)) as used:
        assert used.eligibility.why_no_layers(used.cone) is None and used.cone.cut == 2
        step(model, batch)
        lowest = [m for m in blocks_of(model)[0].modules() if isinstance(m, nn.Linear)]
        with counted(*lowest) as seen:
            step(model, batch)
    assert lowest and not seen


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bare_encoder_is_trained_by_its_heads(name: str) -> None:
    base = from_config(CASES[name].config, tf.AutoModel)
    model = intervened(base, loreft(1, "all"), head(1, "f1"), head(0, "all", name="tokens", target="t"))
    batch = usual_batch(targets=True, labels=False)
    batch.pop("prompt_mask")
    batch["t"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, -100)
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)):
        step(model, batch)
        with counted(blocks_of(model)[-1]) as seen:
            step(model, batch)
    assert not seen  # the head reads behind block 1


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_an_encoder_decoder_model_has_the_plain_gradients(make: Any, stack: Any) -> None:
    base = make(dropout_rate=0.0) if make is tiny_t5 else make(dropout=0.0, init_std=0.3)
    model = intervened(
        base.double(),
        rh.Node(rh.LoReFT(rank=2), 1, stack=stack, positions="l1" if stack == "encoder" else "all"),
        head(0, "f1", stack="encoder"),
    )
    batch = usual_batch(targets=True, labels=False)
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100], [5, 2, -100, -100], [3, 4, 5, 2]])
    batch = batch | {"labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)) as used:
        reason = used.eligibility.why_no_layers(Cone.of(model.plan().nodes, used.facts.info))
        assert (reason == "blocks hand on more than the hidden state") == (make is tiny_t5)
        assert (used.cone.cut > 0) == (make is tiny_bart)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_causal_classifier_has_the_plain_gradients(side: str) -> None:
    config = tf.LlamaConfig(**SMALL, num_labels=3)
    model = intervened(from_config(config, tf.AutoModelForSequenceClassification), loreft(1, "all"), loreft(2, "f1"))
    batch = usual_batch(labels=False, side=side) | {"labels": torch.tensor([1, 0, 2, 1])}
    check_exact(model, batch)


@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
def test_what_a_model_adds_to_in_place_is_recorded_as_a_reader_sees_it(component: str) -> None:
    """The parallel blocks of Falcon add the attention to what the MLP gave."""
    nodes = [head(0, name="low", component=component), head(1, name="high", component=component), loreft(2)]
    model = intervened(base_of("falcon, grouped"), *nodes)
    check_exact(model, usual_batch(targets=True))
    with model.reusing(None) as used:
        assert used.cone.cut == 3 and [one.node.name for one in used.cone.constant] == ["low", "high"]


@pytest.mark.parametrize("loss, outputs", [("mse", 1), ("mse_of_each", 2)])
@pytest.mark.parametrize("rule", ["1", "f1", "l1"])
def test_a_head_of_one_token_finds_its_target_among_those_of_all_columns(rule: str, loss: str, outputs: int) -> None:
    read = rh.Node(rh.LinearHead(outputs, target="t", loss=loss), 0, positions=rule, name="head")
    batch = usual_batch()
    width = () if loss == "mse" else (outputs,)
    batch["t"] = torch.randn(*batch["input_ids"].shape, *width, dtype=torch.float64)
    check_exact(intervened(base_of("tiny llama"), read, loreft(2)), batch)
