"""Thirty types of the census, as different as they are; `make census` examines all."""

import pytest

from census.building import Species
from census.examining import CRASH, REFUSED, WRONG
from census.running import examine

_NO_NORM = {"final_norm_output"}
_EXPERTS = {"mlp_activation"}
_MIXER = {
    "attention_input",
    "head_output",
    "query, key, value_output",
    "mlp_input",
    "mlp_activation",
    "LoRA",
}
_ANYTHING = None
QUICK: dict[str, set[str] | None] = {
    "causal/llama": set(),
    "causal/gpt2": set(),
    "causal/gpt_neox": set(),
    "causal/falcon": set(),
    "causal/bloom": set(),
    "causal/opt": set(),
    "causal/gptj": set(),
    "causal/gemma2": set(),
    "causal/olmo2": set(),
    "causal/phi3": set(),
    "causal/qwen3": set(),
    "causal/mixtral": _EXPERTS,
    "causal/gpt_oss": _EXPERTS,
    "causal/deepseek_v3": set(),
    "causal/qwen3_next": {"mlp_activation", "LoRA", "a path"},
    "causal/mamba": _MIXER,
    "causal/gpt_bigcode": set(),
    "causal/granitemoeshared": {"attention_output, mlp_output", "mlp_input", "mlp_activation", "LoRA"},
    "causal/bart": _NO_NORM,
    "causal/roberta": _NO_NORM,
    "causal/xlm": _ANYTHING,
    "encoder/bert": _NO_NORM,
    "encoder/modernbert": set(),
    "encoder/deberta-v2": _NO_NORM,
    "encoder/longformer": _NO_NORM | {"query, key, value_output"},
    "encoder/nomic_bert": _NO_NORM,
    "encoder-decoder/t5": set(),
    "encoder-decoder/marian": {"encoder: final_norm_output", "decoder: final_norm_output"},
    "vision/vit": set(),
    "multimodal/llava": {"reusing", "generate within reusing"},
}
"""Entry of the census -> what is refused, which is all that may be; the rest is right or has no meaning there.

`_ANYTHING`: a model whose blocks are none.
"""


@pytest.mark.parametrize("entry", QUICK)
def test_a_type_is_right_or_refuses_what_it_says(entry: str) -> None:
    row = examine(Species(*entry.split("/")))
    assert row["unbuilt"] is None, row["unbuilt"]
    checks = row["checks"]
    bad = {name: text for name, (word, text) in checks.items() if word in (WRONG, CRASH)}
    assert not bad, bad
    refused = {name: text for name, (word, text) in checks.items() if word == REFUSED}
    if (allowed := QUICK[entry]) is not None:
        assert refused.keys() <= allowed, refused
