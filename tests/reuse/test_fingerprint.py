"""The fingerprint of a base model: the same wherever its weights and settings are, another where one of them is."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from support.models import randomise, tiny_gpt2, tiny_llama
from support.paths import TESTS
from torch import nn

import reftheads as rh
from reftheads.reuse import fingerprint
from reftheads.reuse.fingerprint import Fingerprint, content, digest


def of(base: nn.Module) -> str:
    return str(Fingerprint(base))


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie():
    base = tiny_llama()
    assert of(base) == of(tiny_llama()) == of(copy.deepcopy(base)) == of(base.train())
    assert of(base) != of(tiny_gpt2())


@pytest.mark.slow
def test_another_process_has_the_same_fingerprint(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import transformers
from support.models import tiny_llama
from reftheads.reuse.fingerprint import Fingerprint
print(Fingerprint(tiny_llama()), Fingerprint(transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})))
"""
    # other hash seeds give sets another order
    environments = [os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    for environment in environments:
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        made, loaded = done.stdout.split()
        assert made == of(tiny_llama())
        assert loaded == made  # saving writes dtype, architectures and such into the settings


def _add(base: nn.Module) -> None:
    with torch.no_grad():
        base.get_parameter("model.layers.2.mlp.down_proj.weight")[3, 2] += 1e-3


def _copy(base: nn.Module) -> None:
    with torch.no_grad():
        base.get_parameter("model.norm.weight").copy_(torch.full((16,), 1.001))


def _replace(base: nn.Module) -> None:
    norm = base.get_submodule("model.norm")
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def _replace_module(base: nn.Module) -> None:
    base.get_submodule("model.layers.0.mlp").down_proj = nn.Linear(24, 16, bias=False)


def _buffer(base: nn.Module) -> None:
    base.get_buffer("model.rotary_emb.inv_freq").mul_(1.5)


def _load(base: nn.Module) -> None:
    base.load_state_dict({name: value * 1.5 for name, value in base.state_dict().items()})


def _dtype(base: nn.Module) -> None:
    base.double()


def _swap(base: nn.Module) -> None:
    a, b = (base.get_submodule(f"model.layers.{i}") for i in (0, 1))
    a.mlp, b.mlp = b.mlp, a.mlp


@pytest.mark.parametrize("change", [_add, _copy, _replace, _replace_module, _buffer, _load, _dtype, _swap])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_another_weight_is_another_fingerprint(change, seen):
    base = tiny_llama()
    before = of(base)
    known = Fingerprint(base)
    if seen:
        assert str(known) == before
    change(base)
    assert str(known) == of(base) != before


@pytest.mark.parametrize("setting", [{"rms_norm_eps": 1e-3}, {"num_key_value_heads": 4}, {"attention_dropout": 0.5}])
def test_another_setting_is_another_fingerprint(setting):
    assert of(tiny_llama(**setting)) != of(tiny_llama())


def test_another_attention_is_another_fingerprint_and_where_a_model_came_from_is_none():
    assert of(tiny_llama(attn_implementation="eager")) != of(tiny_llama(attn_implementation="sdpa"))
    named = tiny_llama()
    named.config._name_or_path = "somewhere"
    named.config.use_cache = not named.config.use_cache
    assert of(named) == of(tiny_llama())


def test_what_adapters_hold_does_not_count():
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over(rh.LoReFT(rank=2), range(2)))
    known = Fingerprint(model.get_base_model())
    before = str(known)
    randomise(model)
    assert str(known) == before == of(tiny_llama())
    model.add_adapter("two", rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), layer=0, component="query_output")))
    assert str(known) == before == of(model.get_base_model())
    assert before == of(model.unload())


def test_a_second_look_reads_no_weight(monkeypatch):
    calls: list[int] = []

    def counted(tensor):
        calls.append(tensor.numel())
        return content(tensor)

    monkeypatch.setattr(fingerprint, "content", counted)
    base = tiny_llama()
    known = Fingerprint(base)
    first = str(known)
    read = len(calls)
    assert sum(calls) >= sum(p.numel() for p in base.parameters())
    base(torch.tensor([[3, 4, 5]])).logits.sum().backward()  # gradients are no weights
    base.requires_grad_(False).eval()
    assert str(known) == first and len(calls) == read
    _add(base)
    assert str(known) != first and len(calls) == 2 * read


def test_a_digest_knows_where_its_parts_end():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("1", 23) != digest(12, "3") and digest(b"a") == digest("a")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_content_is_that_of_the_values_in_their_order(dtype):
    tensor = (torch.arange(6).view(2, 3) % 2 == 1).to(dtype)
    assert content(tensor) == content(tensor.clone()) == content(tensor.T.contiguous().T)
    assert content(tensor) != content(tensor.T) and len(content(tensor)) == tensor.nbytes
    assert content(tensor[:0]) == b""
