"""Loading a base model and its tokenizer."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import BitsAndBytesConfig

import reftheads as rh


def test_bits_and_a_quantization_config_together_are_an_error():
    with pytest.raises(ValueError, match="bits=4 makes a quantization_config of its own: give one of the two"):
        rh.load_base("tiny-chat", bits=4, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("bits", [0, 2, 16, "4", True])
def test_bits_are_four_or_eight(bits):
    with pytest.raises(ValueError, match="bits must be 4, 8 or None"):
        rh.load_base("tiny-chat", bits=bits)


TEXT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
    vocab_size=300, head_dim=8,
)  # fmt: skip
BERT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=300)
IMAGE = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=14
)
T5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=300)
WHISPER = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=300, num_mel_bins=8, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
SOUND = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
    conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
SAVED = {
    "text": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "text and images": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=TEXT, vision_config=IMAGE, mm_tokens_per_image=4)
    ),
    "text and images in parts": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config={"model_type": "llama", **TEXT}, vision_config={"model_type": "clip_vision_model", **IMAGE}
        )
    ),
    "sound to text": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
    "text to text": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "half of a model": lambda: tf.T5EncoderModel(tf.T5Config(**T5)),
}
BODIES = {
    "masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), tf.BertModel),
    "classifier": (lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT)), tf.LlamaModel),
    "images": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), tf.ViTModel),
    "sound": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SOUND)), tf.Wav2Vec2Model),
}


@pytest.mark.parametrize("kind", SAVED)
def test_the_class_that_a_checkpoint_was_saved_from_is_loaded_if_it_generates(kind, tokenizer, tmp_path):
    saved = SAVED[kind]().eval()
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = rh.load_base(str(tmp_path), dtype="float32")
    assert type(loaded) is type(saved)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("kind", BODIES)
def test_of_other_checkpoints_the_bare_body_is_loaded_and_those_without_text_have_no_tokenizer(
    kind, tokenizer, tmp_path
):
    make, body = BODIES[kind]
    saved = make()
    saved.save_pretrained(tmp_path)
    if saved.main_input_name == "input_ids":
        tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = rh.load_base(str(tmp_path))
    assert type(loaded) is body
    assert (its_tokenizer is None) == (saved.main_input_name != "input_ids")


def test_a_model_of_text_without_its_tokenizer_is_an_error(tmp_path):
    SAVED["text"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        rh.load_base(str(tmp_path))


def test_no_dropout_reaches_the_parts_of_a_composite_configuration(tokenizer, tmp_path):
    text = {**TEXT, "attention_dropout": 0.5}
    config = tf.Gemma3Config(text_config=text, vision_config={**IMAGE, "attention_dropout": 0.5}, mm_tokens_per_image=4)
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base, _ = rh.load_base(str(tmp_path), dropout=False)
    assert base.config.text_config.attention_dropout == base.config.vision_config.attention_dropout == 0
    assert rh.load_base(str(tmp_path))[0].config.text_config.attention_dropout == 0.5


RAN = """
from pathlib import Path
Path({mark!r}).write_text("")
"""
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = {model_type!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["own", "llama"])
def with_code(request, tokenizer, tmp_path):
    """A folder whose configuration, model and tokenizer name code that lies beside them, and what that code leaves."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "ran"
    SAVED["text"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "own_code.py").write_text(RAN.format(mark=str(mark)) + CODE.format(model_type=request.param))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": request.param}
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder), mark, request.param


def test_code_of_a_checkpoint_never_runs_unasked(with_code, monkeypatch):
    folder, mark, kind = with_code
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        rh.load_base(folder)
    assert not mark.exists()


def test_a_model_that_transformers_knows_loads_without_the_code_beside_it(with_code, tokenizer):
    folder, mark, kind = with_code
    if kind == "own":
        pytest.skip("transformers does not know it")
    tokenizer.save_pretrained(folder)
    assert type(rh.load_base(folder)[0]) is tf.LlamaForCausalLM
    assert not mark.exists()


def test_code_of_a_checkpoint_runs_for_all_parts_if_it_is_trusted(with_code, monkeypatch, tmp_path):
    folder, mark, _ = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, tokenizer = rh.load_base(folder, trust_remote_code=True)
    assert mark.exists()
    assert [type(x).__name__ for x in (base, base.config, tokenizer)] == ["OwnModel", "OwnConfig", "OwnTokenizer"]


def test_auto_is_the_type_that_this_machine_computes_fast(tokenizer, tmp_path):
    SAVED["text"]().half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # instructions for bfloat16, as the operating system names them
        flags = Path("/proc/cpuinfo")
        if not flags.exists():
            pytest.skip("no list of what the processor can")
        fast = {"avx512_bf16", "amx_tile"} & set(flags.read_text().split())
    assert rh.load_base(str(tmp_path), dtype="auto")[0].dtype == (torch.bfloat16 if fast else torch.float32)
    assert rh.load_base(str(tmp_path))[0].dtype == torch.float16  # left out, the checkpoint's own
    assert rh.load_base("tiny-chat", dtype="auto")[0].dtype == (torch.bfloat16 if fast else torch.float32)
