"""The names that models of the field give to the parts of their blocks."""

from torch import nn

from reftheads.architectures.paths import leaf

QUERY = ("q_proj", "query", "q_lin", "query_proj", "q")
KEY = ("k_proj", "key", "k_lin", "key_proj", "k")
VALUE = ("v_proj", "value", "v_lin", "value_proj", "v")
CONTIGUOUS = ("c_attn", "qkv_proj", "Wqkv", "qkv")  # all queries, then all keys, then all values
INTERLEAVED = ("query_key_value",)  # a group at a time: its queries, its key, its value
ATTENDS = (*CONTIGUOUS, *INTERLEAVED, *QUERY, "q_a_proj")  # any of these makes a module an attention
ATTENTION_OUT = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "Wo", "o", "wo")
UP = ("gate_up_proj", "gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1", "lin1", "wi", "wi_0", "Wi", "fc_in")
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "lin2", "wo", "Wo", "fc_out")
_CROSS = ("cross", "encoder_attn", "encdec")


def reads_other_stack(path: str) -> bool:
    """Return whether a module is the key or value projection of a cross-attention: it sees the encoder's tokens."""
    return is_cross(path) and leaf(path) in (*KEY, *VALUE)


def is_cross(path: str) -> bool:
    """Return whether a path names a cross-attention or what belongs to one."""
    return any(word in path.lower() for word in _CROSS)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()
