"""A tiny model of every supported architecture, with the modules at which its activations are consumed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as tf
from torch import Tensor

B, T, LAYERS = 2, 6, 3
CAUSAL, CLASSIFIER, SEQ2SEQ = (tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification, tf.AutoModelForSeq2SeqLM)


def split_qkv(q: Tensor, k: Tensor, v: Tensor, c: "Case") -> list[Tensor]:
    """Return three projections as [batch tokens heads width]."""
    return [x.view(B, -1, n, c.d) for x, n in ((q, c.heads), (k, c.kv), (v, c.kv))]


def contiguous(qkv: Tensor, c: "Case") -> list[Tensor]:
    """Take apart a projection of all queries, then all keys, then all values."""
    return split_qkv(*qkv.split([c.heads * c.d, c.kv * c.d, c.kv * c.d], dim=-1), c)


def interleaved(qkv: Tensor, c: "Case") -> list[Tensor]:
    """Take apart a projection of query, key and value of one head after the other."""
    return list(qkv.view(B, -1, c.heads, 3, c.d).unbind(dim=-2))


def grouped(qkv: Tensor, c: "Case") -> list[Tensor]:
    """Take apart a projection of groups, each of its queries and the key and value that they share."""
    groups = qkv.view(B, -1, c.kv, c.heads // c.kv + 2, c.d)
    return [groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]]


def codegen(qkv: Tensor, c: "Case") -> list[Tensor]:
    """Take apart a projection of four parts, each of queries, values and keys of its heads, in this order."""
    parts = qkv.unflatten(-1, (4, 3, -1))
    return split_qkv(*(parts[..., i, :].flatten(-2) for i in (0, 2, 1)), c)


def gated(q: Tensor, k: Tensor, v: Tensor, c: "Case") -> list[Tensor]:
    """Take apart three projections, the first of a query and a gate of one head after the other."""
    return split_qkv(q.view(B, -1, c.heads, 2, c.d)[..., 0, :].flatten(-2), k, v, c)


def multi_query(qkv: Tensor, c: "Case") -> list[Tensor]:
    """Take apart a projection of all queries and the one key and value that they share."""
    heads = qkv.view(B, -1, c.heads + 2, c.d)
    return [heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]]


@dataclass(frozen=True)
class Case:
    """A tiny model and the modules, relative to a block, at which its activations are consumed."""

    config: tf.PretrainedConfig
    auto: Any
    block: str  # path of a block, "{}" for its index
    qkv: tuple[str, ...]  # the projections, or the fused one
    o: str  # the attention's output projection
    first: str  # receives what enters the block
    middle: str | None  # receives what enters plus what the attention adds; None: parallel to the MLP
    up: tuple[str, ...]  # read the MLP's input
    down: str | None  # the MLP's last projection; None: a mixture of experts
    stack: str | None = None
    attention_adds: str | None = None  # its output is what the attention adds; None: `o`
    mlp_adds: str | None = None  # its output is what the MLP adds; None: `down`
    last: str | None = None  # post-norm: receives the sum of the second residual and what the MLP adds
    cross: str | None = None  # output projection of the cross-attention
    middle_output: str | None = None  # post-norm: its output is the second residual; None: `middle`
    final_norm: bool = True
    heads: int = 4
    kv: int = 4
    d: int = 8
    split: Callable[..., list[Tensor]] = split_qkv
    window: int = T
    score_bias: bool = False  # attention weights depend on more than query times key
    heads_mix: bool = False  # a norm over all heads at once makes heads depend on each other
    hidden_states: str = "hidden_states"
    last_state: str | None = "final_norm_output"  # what the last reported hidden state is

    def __repr__(self) -> str:
        return type(self.config).__name__

    def path(self, name: str, layer: int = 1) -> str:
        """Return the path of a module of a block; with an empty name, the block's."""
        return f"{self.block.format(layer)}.{name}".rstrip(".")


SMALL = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(SMALL, num_key_value_heads=2)
WIDE = dict(GQA, head_dim=16)
T5 = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0)
BART = dict(
    vocab_size=40,
    d_model=32,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
)

SLIDING = ["full_attention", "sliding_attention", "full_attention"]
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def llama(config: tf.PretrainedConfig, **names: Any) -> Case:
    """Return a decoder whose modules are named as Llama's are, but for those in `names`."""
    defaults: dict[str, Any] = dict(
        auto=CAUSAL,
        block="model.layers.{}",
        qkv=PROJECTIONS,
        o="self_attn.o_proj",
        first="input_layernorm",
        middle="post_attention_layernorm",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        kv=2,
    )
    return Case(config, **{**defaults, **names})


GEMMA: dict[str, Any] = dict(
    middle="pre_feedforward_layernorm",
    attention_adds="post_attention_layernorm",
    mlp_adds="post_feedforward_layernorm",
    d=16,
    window=4,
)
EXPERTS: dict[str, Any] = dict(down=None, mlp_adds="mlp")


def bloom(config: tf.PretrainedConfig, **names: Any) -> Case:
    """Return a decoder whose modules are named as BLOOM's are, but for those in `names`."""
    defaults: dict[str, Any] = dict(
        auto=CAUSAL,
        block="transformer.h.{}",
        qkv=("self_attention.query_key_value",),
        o="self_attention.dense",
        first="input_layernorm",
        middle="post_attention_layernorm",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        split=interleaved,
        score_bias=True,
    )
    return Case(config, **{**defaults, **names})


def bert(config: tf.PretrainedConfig, block: str, **names: Any) -> Case:
    """Return an encoder whose modules are named as BERT's are, but for those in `names`."""
    defaults: dict[str, Any] = dict(
        auto=CLASSIFIER,
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        o="attention.output.dense",
        first="attention.self.query",
        middle="attention.output.LayerNorm",
        up=("intermediate.dense",),
        down="output.dense",
        last="output.LayerNorm",
        final_norm=False,
        last_state="block_output",
    )
    return Case(config, block=block, **{**defaults, **names})


def t5(stack: str, mlp: int, config: tf.PretrainedConfig, **names: Any) -> Case:
    """Return one stack of a T5; `mlp` is the place of the MLP in its blocks."""
    return Case(
        config,
        auto=SEQ2SEQ,
        block=f"{stack}.block.{{}}",
        stack=stack,
        qkv=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
        o="layer.0.SelfAttention.o",
        first="layer.0.layer_norm",
        middle="layer.1.layer_norm",
        down=f"layer.{mlp}.DenseReluDense.wo",
        score_bias=True,
        hidden_states=f"{stack}_hidden_states",
        **names,
    )


def bart(stack: str, **names: Any) -> Case:
    """Return one stack of a BART."""
    return Case(
        tf.BartConfig(**BART),
        auto=SEQ2SEQ,
        block=f"model.{stack}.layers.{{}}",
        stack=stack,
        qkv=PROJECTIONS,
        o="self_attn.out_proj",
        first="self_attn.q_proj",
        middle="self_attn_layer_norm",
        up=("fc1",),
        down="fc2",
        last="final_layer_norm",
        final_norm=False,
        last_state="block_output",
        hidden_states=f"{stack}_hidden_states",
        **names,
    )


def gpt2(config: tf.PretrainedConfig, **names: Any) -> Case:
    """Return a decoder whose modules are named as GPT-2's are, but for those in `names`."""
    defaults: dict[str, Any] = dict(
        auto=CAUSAL,
        block="transformer.h.{}",
        qkv=("attn.c_attn",),
        split=contiguous,
        o="attn.c_proj",
        first="ln_1",
        middle="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
    )
    return Case(config, **{**defaults, **names})


def opt(**config: Any) -> tf.OPTConfig:
    """Return the configuration of a small OPT."""
    small = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return tf.OPTConfig(**small, ffn_dim=48, **config)


OPT: dict[str, Any] = dict(
    auto=CAUSAL, block="model.decoder.layers.{}", qkv=PROJECTIONS, o="self_attn.out_proj", up=("fc1",), down="fc2"
)

GPT2 = dict(vocab_size=40, n_embd=32, n_layer=LAYERS, n_head=4)

CASES = {
    "llama": llama(tf.LlamaConfig(**GQA)),
    "mistral": llama(tf.MistralConfig(**GQA, sliding_window=4), window=4),
    "qwen2": llama(tf.Qwen2Config(**GQA)),
    "qwen3": llama(tf.Qwen3Config(**WIDE), d=16),
    "gemma2": llama(tf.Gemma2Config(**WIDE, sliding_window=4, layer_types=SLIDING), **GEMMA),
    "gemma3": llama(tf.Gemma3TextConfig(**WIDE, sliding_window=4, layer_types=SLIDING), **GEMMA),
    "phi3": llama(tf.Phi3Config(**GQA), qkv=("self_attn.qkv_proj",), split=contiguous, up=("mlp.gate_up_proj",)),
    "olmo2": llama(
        tf.Olmo2Config(**GQA),
        first="self_attn.q_proj",
        middle="mlp",
        attention_adds="post_attention_layernorm",
        mlp_adds="post_feedforward_layernorm",
        heads_mix=True,
    ),
    "mixtral": llama(tf.MixtralConfig(**GQA, num_local_experts=4), up=("mlp.gate",), **EXPERTS),
    "qwen3 moe": llama(
        tf.Qwen3MoeConfig(**WIDE, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2),
        up=("mlp.gate",),
        d=16,
        **EXPERTS,
    ),
    "gpt-oss": llama(
        tf.GptOssConfig(**WIDE, num_local_experts=4, sliding_window=4),
        up=("mlp.router",),
        d=16,
        score_bias=True,
        **EXPERTS,
    ),
    "gpt2": gpt2(tf.GPT2Config(**GPT2, n_positions=64)),
    "codegen": gpt2(
        tf.CodeGenConfig(**GPT2, rotary_dim=4, n_positions=64),
        qkv=("attn.qkv_proj",),
        split=codegen,
        o="attn.out_proj",
        middle=None,
        up=("mlp.fc_in",),
        down="mlp.fc_out",
    ),
    "gpt-bigcode, multi-query": gpt2(tf.GPTBigCodeConfig(**GPT2, multi_query=True), kv=1, split=multi_query),
    "gpt-bigcode, multi-head": gpt2(tf.GPTBigCodeConfig(**GPT2, multi_query=False), split=interleaved),
    "qwen3-next": llama(
        tf.Qwen3NextConfig(
            **WIDE,
            layer_types=["full_attention"] * LAYERS,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=1,
        ),  # fmt: skip
        d=16,
        split=gated,
        score_bias=True,  # the gate scales what a head gives
        up=("mlp.gate",),
        **EXPERTS,
    ),
    "neox": bloom(
        tf.GPTNeoXConfig(**SMALL),
        block="gpt_neox.layers.{}",
        qkv=("attention.query_key_value",),
        o="attention.dense",
        middle=None,
        score_bias=False,
    ),
    "neox, sequential": bloom(
        tf.GPTNeoXConfig(**SMALL, use_parallel_residual=False),
        block="gpt_neox.layers.{}",
        qkv=("attention.query_key_value",),
        o="attention.dense",
        score_bias=False,
    ),
    "opt": Case(opt(), first="self_attn_layer_norm", middle="final_layer_norm", **OPT),
    "opt, post-norm": Case(
        opt(do_layer_norm_before=False, word_embed_proj_dim=16),
        first="self_attn.q_proj",
        middle="self_attn_layer_norm",
        last="final_layer_norm",
        final_norm=False,
        last_state=None,  # projected to the embeddings' width
        **OPT,
    ),
    "bloom": bloom(tf.BloomConfig(vocab_size=40, hidden_size=32, n_layer=LAYERS, n_head=4)),
    "falcon, grouped": bloom(
        tf.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),
        first="ln_attn",
        middle=None,
        kv=2,
        split=grouped,
        score_bias=False,
    ),
    "falcon, multi-query": bloom(
        tf.FalconConfig(**SMALL, multi_query=True), middle=None, kv=1, split=multi_query, score_bias=False
    ),
    "falcon, multi-head": bloom(tf.FalconConfig(**SMALL, multi_query=False, alibi=True, parallel_attn=False)),
    "bert": bert(tf.BertConfig(**SMALL), "bert.encoder.layer.{}"),
    "roberta": bert(tf.RobertaConfig(**SMALL), "roberta.encoder.layer.{}"),
    "deberta-v2": bert(
        tf.DebertaV2Config(
            **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, type_vocab_size=0
        ),
        "deberta.encoder.layer.{}",
        qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        first="attention.self.query_proj",
        score_bias=True,
    ),
    "distilbert": bert(
        tf.DistilBertConfig(
            vocab_size=40, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48, max_position_embeddings=64
        ),
        "distilbert.transformer.layer.{}",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        o="attention.out_lin",
        first="attention.q_lin",
        middle="sa_layer_norm",
        up=("ffn.lin1",),
        down="ffn.lin2",
        last="output_layer_norm",
    ),
    "modernbert": bert(
        tf.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2),
        "model.layers.{}",
        qkv=("attn.Wqkv",),
        split=contiguous,
        o="attn.Wo",
        first="attn_norm",
        middle="mlp_norm",
        up=("mlp.Wi",),
        down="mlp.Wo",
        last=None,
        final_norm=True,
        last_state="final_norm_output",
    ),
    "t5 encoder": t5("encoder", 1, tf.T5Config(**T5), up=("layer.1.DenseReluDense.wi",)),
    "t5 decoder": t5(
        "decoder", 2, tf.T5Config(**T5), up=("layer.2.DenseReluDense.wi",), cross="layer.1.EncDecAttention.o"
    ),
    "t5 gated encoder": t5(
        "encoder",
        1,
        tf.T5Config(**T5, feed_forward_proj="gated-gelu"),
        up=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
    ),
    "bart encoder": bart("encoder"),
    "bart decoder": bart("decoder", middle_output="encoder_attn_layer_norm", cross="encoder_attn.out_proj"),
    "vit": Case(
        tf.ViTConfig(**SMALL, image_size=8, patch_size=4),
        auto=tf.AutoModelForImageClassification,
        block="vit.layers.{}",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        o="attention.o_proj",
        first="layernorm_before",
        middle="layernorm_after",
        up=("mlp.fc1",),
        down="mlp.fc2",
        last_state="block_output",
    ),
}
