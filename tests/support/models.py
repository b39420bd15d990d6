"""Tiny random models for tests; each call gives a new one with the same weights."""

import tokenizers
import torch
import transformers as tf

VOCAB, WIDTH, LAYERS, HEADS = 50, 16, 3, 4

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(**options) -> tf.LlamaForCausalLM:
    """A Llama of width 16 with grouped queries (4 query heads, 2 of keys and values), in eval mode."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config | options)).eval()


def tiny_gpt2(**options) -> tf.GPT2LMHeadModel:
    """A GPT-2 of width 16, in eval mode."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(tf.GPT2Config(**config | options)).eval()


def random_ids(batch: int = 2, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids without padding and special tokens: [batch tokens]."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module, seed: int = 2) -> None:
    """Gives every trainable parameter random values, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)


def weighted(logits: torch.Tensor) -> torch.Tensor:
    """A loss that gives every logit a weight of its own."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits).sin()).sum()


def tiny_gemma3(**options) -> tf.Gemma3ForCausalLM:
    """A Gemma 3 of width 16, in eval mode; its layers but the second see the last four tokens only."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, head_dim=4,
        num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**config | options)).eval()


def tiny_t5(**options) -> tf.T5ForConditionalGeneration:
    """A T5 of width 16, in eval mode."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(tf.T5Config(**config | options)).eval()


def tiny_bart(**options) -> tf.BartForConditionalGeneration:
    """A BART of width 16, in eval mode."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        decoder_start_token_id=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    return tf.BartForConditionalGeneration(tf.BartConfig(**config | options)).eval()


def recurrent_lfm2(**options) -> tf.Lfm2ForCausalLM:
    """A model of width 16 whose first layer carries a recurrent state, and whose second attends."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 50} | options
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**shape, layer_types=["conv", "full_attention"]))


def tiny_bert(cls=tf.BertForSequenceClassification, **options):
    """A BERT of width 16; a classifier unless another class is given."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return cls(tf.BertConfig(**shape, vocab_size=40, **options))


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A word a token: a to z, `</s>`, `<pad>` and the marks of a simple chat template."""
    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "<user>", "<assistant>"]
    levels = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(levels)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
