"""Loading a base model and its tokenizer."""

import pytest
from transformers import BitsAndBytesConfig

import reftheads as rh


def test_bits_and_a_quantization_config_together_are_an_error():
    with pytest.raises(ValueError, match="bits=4 makes a quantization_config of its own: give one of the two"):
        rh.load_base("tiny-chat", bits=4, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("bits", [0, 2, 16, "4", True])
def test_bits_are_four_or_eight(bits):
    with pytest.raises(ValueError, match="bits must be 4, 8 or None"):
        rh.load_base("tiny-chat", bits=bits)
