"""The models that are fuzzed, and by hand: which modules take or give the tensor that a component names."""

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers as tf
from support.architectures import CASES, CAUSAL, CLASSIFIER, LAYERS, SEQ2SEQ, B, Case
from support.replay import from_config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ORDER = (
    "block_input", "attention_input", "query_output", "key_output", "value_output", "head_output", "attention_output",
    "mlp_input", "mlp_activation", "mlp_output", "block_output",
)  # fmt: skip
MASKED = tf.AutoModelForMaskedLM


@dataclass(frozen=True)
class Place:
    """Where a tensor is met.

    Attributes:
        modules: paths of what gives it, or of all that take it.
        side: whether it enters or leaves them.
        width: its features.
        columns: those of the module's features that are meant, in their order; `None`: all.
        linear: whether it is what a linear module gives.
        order: among all places of a model, when it is met; `None` where that is not said.
    """

    modules: tuple[str, ...]
    side: str
    width: int
    columns: tuple[int, ...] | None = None
    linear: bool = False
    order: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Arch:
    """A kind of model.

    Attributes:
        roles: of each stack its role and its name in `CASES`; the one that nodes mean by default comes last.
        stacks: paths of the modules that are given the tokens.
        norms: paths of the final norms, where there are any.
        paths: of modules in a block, by role, that a dotted path may name, with the side.
        cross: in a block of the decoder, what works on the encoder's tokens.
        sides: of the padding that the base model itself takes in float64.
        most: padding that it takes in a row: eager attention is NaN in float64 where a window holds nothing else.
        auto: another class than the case has.
    """

    name: str
    roles: dict[str, str]
    stacks: dict[str, str]
    norms: dict[str, str] = field(default_factory=dict)
    paths: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    cross: tuple[str, ...] = ()
    sides: tuple[str, ...] = ("left", "right", "both")
    most: int = 9
    auto: Any = None

    @property
    def head_class(self) -> Any:
        """The class of the model that is made."""
        return self.auto or self.case(self.role).auto

    @property
    def role(self) -> str:
        """The stack that a node means if it names none."""
        return [*self.roles][-1]

    @property
    def causal(self) -> bool:
        """Whether it is a decoder alone, which continues what it is given."""
        return self.head_class is CAUSAL

    @property
    def eager(self) -> bool:
        """Whether its eager attention has a window."""
        return self.most < 9

    @property
    def encoder(self) -> bool:
        """Whether it is an encoder alone."""
        return not self.causal and not self.seq2seq

    @property
    def seq2seq(self) -> bool:
        """Whether an encoder is fed the input."""
        return self.head_class is SEQ2SEQ

    def case(self, role: str) -> Case:
        """What is known of the modules of a stack."""
        return CASES[self.roles[role]]

    @property
    def takes_positions(self) -> bool:
        """Whether it takes the positions of tokens beside them."""
        return "position_ids" in inspect.signature(base_of(self.name).forward).parameters

    def components(self, role: str) -> list[str]:
        """The components that a stack has."""
        case = self.case(role)
        missing = {"mlp_activation"} if case.down is None else set()
        missing |= set() if role in self.norms else {"final_norm_output"}
        return [c for c in (*ORDER, "embedding_output", "final_norm_output") if c not in missing]

    def place(self, role: str, layer: int | None, component: str, head: int | None = None) -> Place:
        """Where a component of a stack is met."""
        case, stack = self.case(role), [*self.roles].index(role)
        if component == "embedding_output":
            return self._at((case.path("", 0),), "input", (stack, -1, 0))
        if component == "final_norm_output":
            return self._at((self.norms[role],), "output", (stack, LAYERS, 0))
        assert layer is not None
        layer %= LAYERS
        order = (stack, layer, ORDER.index(component))
        modules, side = _modules(case, component)
        columns = _columns(self.name, role, layer, component, head)
        return self._at(tuple(case.path(m, layer) for m in modules), side, order, columns)

    def at_path(self, path: str, side: str) -> Place:
        """Where one side of a module is met."""
        return self._at((path,), side, None)

    def _at(
        self,
        modules: tuple[str, ...],
        side: str,
        order: tuple[int, int, int] | None,
        columns: tuple[int, ...] | None = None,
    ) -> Place:
        width = _widths(self.name)[modules[0], side] if columns is None else len(columns)
        linear = side == "output" and isinstance(base_of(self.name).get_submodule(modules[0]), nn.Linear | Conv1D)
        return Place(modules, side, width, columns, linear, order)


def _modules(case: Case, component: str) -> tuple[tuple[str, ...], str]:
    """The modules of a block that give or take a component, and on which side."""
    attention = case.attention_adds or case.o
    mlp = case.mlp_adds or case.down
    assert mlp is not None
    which = ("query_output", "key_output", "value_output")
    if component in which:
        return (case.qkv if len(case.qkv) == 1 else (case.qkv[which.index(component)],)), "output"
    return {
        "block_input": (("",), "input"),
        "block_output": (("",), "output"),
        "attention_input": (case.qkv, "input"),
        "head_output": ((case.o,), "input"),
        "attention_output": ((attention,), "output"),
        "mlp_input": (case.up if case.down is not None else (mlp,), "input"),
        "mlp_activation": ((case.down or "",), "input"),
        "mlp_output": ((mlp,), "output"),
    }[component]


@cache
def _columns(name: str, role: str, layer: int, component: str, head: int | None) -> tuple[int, ...] | None:
    """The features of a projection that belong to queries, keys or values, or to one head of them."""
    arch = ARCHS[name]
    case = arch.case(role)
    which = ("query_output", "key_output", "value_output")
    if component == "head_output":
        return None if head is None else tuple(range(case.heads * case.d))[_slice(head, case.heads, case.d)]
    if component not in which:
        return None
    number = which.index(component)
    count = case.heads if number == 0 else case.kv
    if len(case.qkv) == 3:
        return None if head is None else tuple(range(count * case.d))[_slice(head, count, case.d)]
    total = _widths(name)[case.path(case.qkv[0], layer), "output"]
    numbers = torch.arange(total).expand(B, 1, total)
    part = case.split(numbers, case)[number][0, 0]  # [heads width]
    return tuple((part if head is None else part[head]).flatten().tolist())


def _slice(head: int, count: int, width: int) -> slice:
    head %= count
    return slice(head * width, (head + 1) * width)


@cache
def base_of(name: str) -> Any:
    """The base model, which is never intervened in."""
    arch = ARCHS[name]
    base = from_config(arch.case(arch.role).config, arch.head_class).eval()
    if arch.seq2seq:
        base.generation_config.forced_eos_token_id = None
    return base.requires_grad_(False)


@cache
def _widths(name: str) -> dict[tuple[str, str], int]:
    """How many features enter and leave every module, as one pass shows it."""
    base, widths = base_of(name), {}

    def look(path: str) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            out = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
            for side, tensor in (("input", first), ("output", out)):
                if isinstance(tensor, Tensor) and tensor.ndim > 1:
                    widths[path, side] = tensor.shape[-1]

        return see

    handles = [m.register_forward_hook(look(path), with_kwargs=True) for path, m in base.named_modules()]
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        base(input_ids=ids, **({"decoder_input_ids": ids} if ARCHS[name].seq2seq else {}))
    for handle in handles:
        handle.remove()
    return widths


def _decoder(case: str, stack: str, norm: str | None, *paths: tuple[str, str], name: str = "", **more: Any) -> Arch:
    norms = {} if norm is None else {"decoder": norm}
    return Arch(name or case, {"decoder": case}, {"decoder": stack}, norms, {"decoder": paths}, **more)


def _encoder(case: str, stack: str, norm: str | None, *paths: tuple[str, str], name: str = "", **more: Any) -> Arch:
    norms = {} if norm is None else {"encoder": norm}
    return Arch(name or case, {"encoder": case}, {"encoder": stack}, norms, {"encoder": paths}, **more)


_LLAMA = (("input_layernorm", "output"), ("mlp.gate_proj", "output"), ("post_attention_layernorm", "input"))
_ARCHS = [
    _decoder("llama", "model", "model.norm", *_LLAMA),
    _decoder("mistral", "model", "model.norm", *_LLAMA),
    _decoder("qwen3", "model", "model.norm", *_LLAMA),
    _decoder("qwen2", "model", "model.norm", *_LLAMA),
    _decoder("qwen3 moe", "model", "model.norm", ("input_layernorm", "output")),
    _decoder("gpt-oss", "model", "model.norm", ("self_attn.o_proj", "output"), sides=("right",), most=3),
    _decoder("gemma2", "model", "model.norm", ("mlp.up_proj", "output"), sides=("right",), most=3),
    _decoder("gemma3", "model", "model.norm", ("mlp.up_proj", "output"), ("self_attn.o_proj", "output")),
    _decoder("phi3", "model", "model.norm", ("mlp.gate_up_proj", "output"), ("self_attn.qkv_proj", "output")),
    _decoder("olmo2", "model", "model.norm", ("mlp.gate_proj", "output"), ("self_attn.o_proj", "output")),
    _decoder("mixtral", "model", "model.norm", ("input_layernorm", "output")),
    _decoder("gpt2", "transformer", "transformer.ln_f", ("ln_1", "output"), ("attn.c_attn", "output")),
    _decoder("neox", "gpt_neox", "gpt_neox.final_layer_norm", ("mlp.dense_h_to_4h", "output")),
    _decoder("neox, sequential", "gpt_neox", "gpt_neox.final_layer_norm", ("attention.query_key_value", "output")),
    _decoder("opt, post-norm", "model.decoder", None, ("self_attn_layer_norm", "output")),
    _decoder("opt", "model.decoder", "model.decoder.final_layer_norm", ("fc1", "output")),
    _decoder("bloom", "transformer", "transformer.ln_f", ("input_layernorm", "output"), sides=("right",)),
    _decoder("falcon, grouped", "transformer", "transformer.ln_f", ("ln_attn", "output")),
    _decoder("falcon, multi-query", "transformer", "transformer.ln_f", ("self_attention.query_key_value", "output")),
    _decoder("falcon, multi-head", "transformer", "transformer.ln_f", sides=("right",)),
    _encoder("deberta-v2", "deberta", None, ("intermediate.dense", "output"), auto=MASKED, sides=("right",)),
    _encoder(
        "bert", "bert", None, ("attention.output.LayerNorm", "output"), ("intermediate.dense", "output"), auto=MASKED
    ),
    _encoder("bert", "bert", None, name="bert classifier", sides=("right",), auto=CLASSIFIER),
    _encoder("distilbert", "distilbert", None, ("ffn.lin1", "output"), auto=MASKED, sides=("right",)),
    _encoder("modernbert", "model", "model.final_norm", ("mlp.Wi", "output"), auto=MASKED),
    Arch(
        "t5",
        {"encoder": "t5 encoder", "decoder": "t5 decoder"},
        {"encoder": "encoder", "decoder": "decoder"},
        {"encoder": "encoder.final_layer_norm", "decoder": "decoder.final_layer_norm"},
        {"encoder": (("layer.0.layer_norm", "output"),), "decoder": (("layer.1.EncDecAttention.q", "output"),)},
        cross=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
    ),
    Arch(
        "bart",
        {"encoder": "bart encoder", "decoder": "bart decoder"},
        {"encoder": "model.encoder", "decoder": "model.decoder"},
        {},
        {"encoder": (("fc1", "output"),), "decoder": (("encoder_attn.out_proj", "output"),)},
        cross=("encoder_attn.k_proj", "encoder_attn.v_proj"),
        sides=("right",),
    ),
]
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ARCHS}
