"""Formats of other libraries: LoRA of PEFT, classifiers of transformers, heads of transformer-heads, plain torch."""

from reftheads.interop.peft_lora import from_peft_lora, merge_lora, merged, to_peft_lora
from reftheads.interop.sequence_classification import to_sequence_classification
from reftheads.interop.torch_module import export_head
from reftheads.interop.transformer_heads import HeadConfig, graph_of

__all__ = [
    "HeadConfig", "export_head", "from_peft_lora", "graph_of", "merge_lora", "merged", "to_peft_lora",
    "to_sequence_classification",
]  # fmt: skip
