"""A classifying head as a sequence-classification model of transformers.

Such a model is a body, the blocks with their norms and embeddings, and linear maps behind its last block: `score`
of a decoder, pooler and classifier of an encoder. Here the body gets the base model's weights and the maps get the
head's, in order. What lies between the maps, and at which token they read, is each architecture's own affair; so the
result is compared with the head on a batch before it is given out.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from reftheads._utils.eval_mode import evaluating
from reftheads.adapter.model import InterventionModel
from reftheads.architectures.paths import CHILD, within
from reftheads.architectures.structure import stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Edit
from reftheads.interop.peft_lora import merge_lora
from reftheads.interop.torch_module import head_maps
from reftheads.interventions.heads import MappingHead
from reftheads.interventions.lora import LoRA
from reftheads.interventions.losses import Loss, losses

# by which transformers takes the same loss, should it train the model further
_PROBLEM = {
    "cross_entropy": "single_label_classification",
    "bce": "multi_label_classification",
    "multi_label": "multi_label_classification",
    "mse": "regression",
    "mse_of_each": "regression",
}


def to_sequence_classification(model: InterventionModel, name: str) -> PreTrainedModel:
    """Make a model of the class that `AutoModelForSequenceClassification` has for the base, with a head's logits.

    Its `save_pretrained(folder)` writes a standard checkpoint. LoRA nodes are merged into its weights, other heads
    are left out, and `model` stays as it is. Which head an architecture takes:

    * decoders (Llama, GPT-2, Qwen, Mistral …): `LinearHead(n, bias=False)` at `component="final_norm_output"`,
      `positions="l1"`;
    * BERT, RoBERTa, MPNet, DistilBERT, ELECTRA, DeBERTa …: `MLPHead(n, hidden=width, act_fn=φ)` at `layer=-1`,
      `positions="f1"`, where φ is "relu" in DistilBERT, "gelu" in ELECTRA and DeBERTa, else "tanh".

    A decoder of transformers looks for the last token by `config.pad_token_id`, and never at the attention mask. So
    the logits are equal as long as no row *ends* with a real token that has that id: where pad is eos, a row that
    ends with eos is read one token too early there.

    Args:
        name: of the head, in the active adapter.

    Raises:
        KeyError: no node of that name.
        ValueError: a base model that has no such class, is an encoder-decoder, is quantised or has no
            `pad_token_id`; a head or an edit that the class cannot express. The message says which head it takes.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.interop import to_sequence_classification
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> head = rh.LinearHead(2, bias=False)
        >>> node = rh.Node(head, component="final_norm_output", positions="l1", name="mood")
        >>> classifier = to_sequence_classification(rh.InterventionModel(base, rh.InterventionGraph(node)), "mood")
        >>> type(classifier).__name__, classifier.config.num_labels
        ('LlamaForSequenceClassification', 2)
        ```
    """
    planned, maps = head_maps(model, name)
    head = planned.node.intervention
    base: Any = model.get_base_model()
    assert isinstance(head, MappingHead)
    _check(model, name, head, base)
    classifier = _new(base, head)
    slots = _maps_behind_blocks(classifier)
    takes = _takes(base, classifier, slots)
    if [_widths(slot) for slot in slots] != [_widths(linear) for linear in maps]:
        raise ValueError(f"head {name!r} maps {_chain(maps)}: {takes}")
    if any(slot.bias is None and _adds(linear) for slot, linear in zip(slots, maps, strict=True)):
        raise ValueError(f"head {name!r} has a bias where there is no place for one: {takes}")
    _fill_body(classifier, base, slots)
    _fill_maps(slots, maps)
    _merge_lora(classifier, model, base)
    expected, logits = _compared(classifier, model, name, head, base)
    what = f"head {name!r}, {head} at {planned.node.site} on {planned.node.positions},"
    if expected.shape != logits.shape:
        raise ValueError(f"{what} predicts at several tokens of a row: {takes}")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= max(torch.finfo(dtype).eps for dtype in (base.dtype, expected.dtype)) ** 0.5:
        raise ValueError(f"{what} gives other logits, by {difference:.2g} of the largest: {takes}")
    return classifier.requires_grad_(True)


def _check(model: InterventionModel, name: str, head: MappingHead, base: Any) -> None:
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"the base model must be one of transformers, got {type(base).__name__}: use export_head")
    if len(model.tuner.active_adapters) > 1:
        raise ValueError(
            f"several adapters act, {', '.join(model.tuner.active_adapters)}: leave one by model.set_adapter(name)"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder, whose classifier runs both halves: give a model of one stack"
        )
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "the base model is quantised: load it in full precision, and onto it what model.save_pretrained(folder) "
            "saved, by InterventionModel.from_pretrained(base, folder)"
        )
    if base.config.get_text_config().pad_token_id is None:
        raise ValueError(
            "the model has no pad_token_id, by which its classifier finds the last token: set "
            "model.config.pad_token_id = tokenizer.pad_token_id"
        )
    if head.activation is not None and Loss.of(losses[head.loss]).activated:
        raise ValueError(
            f"head {name!r} was trained on what activation={head.activation!r} gives, and a standard checkpoint holds "
            "nothing behind the last map: train it with activation=None"
        )
    for node in model.plan().graph:
        if isinstance(node.intervention, Edit) and not isinstance(node.intervention, LoRA):
            raise ValueError(
                f"node {node.name!r} is a {type(node.intervention).__name__}, and only LoRA can be merged into the "
                "weights: save the adapter by model.save_pretrained(folder) instead"
            )


def _new(base: Any, head: MappingHead) -> Any:
    config: Any = copy.deepcopy(base.config)
    config.num_labels = head.outputs
    config.problem_type = _PROBLEM.get(head.loss)
    try:
        with torch.random.fork_rng():  # all that is drawn is replaced
            made = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence-classification model for {type(base).__name__} ({config.model_type}): save "
            "the adapter by model.save_pretrained(folder), or the head by export_head"
        ) from error
    return made.to(base.device).eval()


def _maps_behind_blocks(classifier: nn.Module) -> list[nn.Linear]:
    last = stacks(classifier)[0].blocks[-1]
    modules = list(classifier.named_modules())
    end = max(i for i, (path, _) in enumerate(modules) if within(path, last))
    return [module for _, module in modules[end + 1 :] if isinstance(module, nn.Linear)]


def _widths(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _adds(linear: nn.Linear) -> bool:
    return linear.bias is not None and bool(linear.bias.any())


def _chain(maps: list[nn.Linear]) -> str:
    return " → ".join(str(width) for width in (maps[0].in_features, *(linear.out_features for linear in maps)))


def _takes(base: nn.Module, classifier: nn.Module, slots: list[nn.Linear]) -> str:
    """Say which head the architecture takes, as far as its structure tells."""
    stack, kind = stacks(base)[0], type(classifier).__name__
    if not slots:
        return f"{kind} has no linear maps behind its last block"
    where = "component='final_norm_output'" if stack.final_norm else "layer=-1"
    bias = "" if slots[-1].bias is not None else ", bias=False"
    head = f"LinearHead({slots[-1].out_features}{bias})"
    if len(slots) > 1:
        layers = f", layers={len(slots) - 1}" if len(slots) > 2 else ""
        bias = ", bias=False" if slots[0].bias is None else bias.replace("bias", "output_bias")
        act_fn = "the activation that its code has between them"
        head = f"MLPHead({slots[-1].out_features}, hidden={slots[0].out_features}{layers}{bias}, act_fn={act_fn})"
    return (
        f"{kind} maps {_chain(slots)}, and takes {head} at {where}, positions={'l1' if stack.causal else 'f1'!r}, if "
        "there is nothing else behind its blocks"
    )


def _fill_body(classifier: Any, base: Any, slots: list[nn.Linear]) -> None:
    body = base.base_model.state_dict()
    weights = {key: tensor for key, tensor in body.items() if not key.startswith(f"{CHILD}.")}
    missing = classifier.base_model.load_state_dict(weights, strict=False).missing_keys
    filled = {id(parameter) for slot in slots for parameter in slot.parameters()}
    places = classifier.base_model.state_dict(keep_vars=True)
    lost = [key for key in missing if id(places[key]) not in filled]
    if lost:
        raise ValueError(f"{type(classifier).__name__} needs weights that {type(base).__name__} lacks: {lost[0]!r} …")


def _fill_maps(slots: list[nn.Linear], maps: list[nn.Linear]) -> None:
    with torch.no_grad():
        for slot, linear in zip(slots, maps, strict=True):
            slot.weight.copy_(linear.weight)
            if slot.bias is not None:
                slot.bias.zero_() if linear.bias is None else slot.bias.copy_(linear.bias)


def _merge_lora(classifier: Any, model: InterventionModel, base: Any) -> None:
    nodes = [node for node in model.plan().graph if isinstance(node.intervention, LoRA)]
    if not nodes:
        return
    # paths in a graph begin where the base model does
    place = classifier.base_model if base.base_model is base else classifier
    lora = InterventionModel(place, InterventionGraph(*nodes))
    for node in nodes:
        lora.node(str(node.name)).load_state_dict(model.node(str(node.name)).state_dict())
    merge_lora(lora)


def _compared(
    classifier: Any, model: InterventionModel, name: str, head: MappingHead, base: Any
) -> tuple[Tensor, Tensor]:
    """Return the predictions of head and classifier on a padded batch."""
    ids, mask = _batch(base)
    with torch.no_grad(), evaluating(model):
        expected = model(input_ids=ids, attention_mask=mask).predictions[name]
        return expected, head.shown(classifier(input_ids=ids, attention_mask=mask).logits.to(expected))


def _batch(base: Any) -> tuple[Tensor, Tensor]:
    """Draw three rows of 8, 5 and 1 tokens, padded at the right: ids and mask, [3 8] each."""
    pad = base.config.get_text_config().pad_token_id
    words = torch.arange(base.get_input_embeddings().num_embeddings)
    words = words[words != pad]
    ids = words[torch.randint(len(words), (3, 8), generator=torch.Generator().manual_seed(0))]
    mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    return ids.where(mask, pad).to(base.device), mask.long().to(base.device)
