"""Reuse is compared with the plain path before it is taken, and what differs is left out, of any architecture."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.models import tiny_llama
from support.replay import base_of, check, from_config, head, intervened, loreft, step, usual_batch
from torch import Tensor, nn

import reftheads as rh
from reftheads.reuse import comparison
from reftheads.reuse.store import ActivationStore

CAUSAL, MASKED = tf.AutoModelForCausalLM, tf.AutoModelForMaskedLM
COMMON = {"vocab_size": 60, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
SIZES = COMMON | {"hidden_size": 32, "intermediate_size": 48}
DECODER = SIZES | {"is_decoder": True}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HALF = {"vocab_size": 60, "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEXED = LATENT | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 4, "first_k_dense_replace": 3}

# what is not reused, and why: a part of the summary -> what it says
OWN_LOSS = {"prefix": "own loss looks at every token", "layers": "2 of 3 blocks"}
NO_RANKS = {"prefix": "would be", "layers": "2 of 3 blocks"}
NO_LAYERS = {"layers": "would be"}

TYPES: dict[str, tuple[Callable[[], Any], Any, dict[str, str]]] = {
    "bart": (lambda: tf.BartConfig(**HALF, max_position_embeddings=64), CAUSAL, OWN_LOSS),
    "marian": (lambda: tf.MarianConfig(**HALF, **TOKENS, max_position_embeddings=64), CAUSAL, OWN_LOSS),
    "pegasus": (lambda: tf.PegasusConfig(**HALF, max_position_embeddings=64), CAUSAL, OWN_LOSS),
    "whisper": (lambda: tf.WhisperConfig(**HALF, **TOKENS, max_target_positions=64), CAUSAL, OWN_LOSS),
    "roberta": (lambda: tf.RobertaConfig(**DECODER), CAUSAL, NO_RANKS),
    "xlm-roberta-xl": (lambda: tf.XLMRobertaXLConfig(**DECODER), CAUSAL, NO_RANKS),
    "roformer": (
        lambda: tf.RoFormerConfig(**DECODER, embedding_size=32),
        CAUSAL,
        NO_RANKS | {"prompts": "logits would be"},
    ),
    "deepseek": (
        lambda: tf.DeepseekV32Config(**SIZES, **INDEXED, num_key_value_heads=4),
        CAUSAL,
        {"prefix": "not reused", "layers": "choose the tokens", "prompts": "not reused"},
    ),
    "longcat": (
        lambda: tf.LongcatFlashConfig(
            **SIZES
            | LATENT
            | {"num_hidden_layers": 6, "num_layers": 3, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
            num_key_value_heads=4,
            head_dim=8,
            n_routed_experts=4,
            zero_expert_num=0,
            moe_topk=2,
        ),
        CAUSAL,
        {"prefix": "not reused", "prompts": "not reused"},
    ),
    "recurrent gemma": (
        lambda: tf.RecurrentGemmaConfig(**SIZES, head_dim=8, block_types=["recurrent", "attention", "recurrent"]),
        CAUSAL,
        {"prefix": "not reused", "prompts": "not reused"},
    ),
    "mllama": (
        lambda: tf.MllamaConfig(
            text_config={**SIZES, **TOKENS, "num_key_value_heads": 4, "cross_attention_layers": [2]}
        ),
        CAUSAL,
        {"prefix": "not reused", "prompts": "not reused"},
    ),
    "data2vec": (lambda: tf.Data2VecTextConfig(**DECODER), CAUSAL, NO_RANKS),
    "convbert": (lambda: tf.ConvBertConfig(**SIZES, embedding_size=32), MASKED, NO_LAYERS),
    "nystromformer": (
        lambda: tf.NystromformerConfig(**SIZES, num_landmarks=8, segment_means_seq_len=8),
        MASKED,
        NO_LAYERS,
    ),
    "yoso": (lambda: tf.YosoConfig(**SIZES, use_expectation=True), MASKED, {}),
}


def made(name: str) -> rh.InterventionModel:
    """Return a model of a type with a constant reader, an edit and a reader above, in float32, which all types know."""
    config, auto, _ = TYPES[name]
    rule = "l1" if auto is CAUSAL else "f2"
    return intervened(from_config(config(), auto).float(), head(0, rule), loreft(1, rule), head(2, rule)).float()


def batches(name: str) -> dict[str, dict[str, Tensor]]:
    """Return batches as a type is trained on them, padded at the right or at the left."""
    causal = TYPES[name][1] is CAUSAL
    both = {side: usual_batch(side=side, targets=causal) for side in ("right", "left")}
    if not causal:
        for batch in both.values():
            batch.pop("prompt_mask")
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return both


def wider(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same rows behind two more columns of padding."""
    return {
        name: nn.functional.pad(value, (0, 2), value=-100 if name == "labels" else 0) if value.ndim == 2 else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("name", TYPES)
def test_reuse_gives_the_plain_loss_and_gradients_or_is_not_taken(name: str) -> None:
    model, store = made(name), ActivationStore(2**28)
    for batch in batches(name).values():
        plain = step(model, batch)
        with model.reusing(store):
            step(model, wider(batch))  # what it records is found in another batch
            for _ in range(2):
                check(step(model, batch), plain, 2e-4)


@pytest.mark.parametrize("name", TYPES)
def test_the_summary_says_what_is_not_reused_and_why(name: str) -> None:
    lines = dict(line.split(maxsplit=1) for line in made(name).reuse_summary().splitlines())
    for part, reason in TYPES[name][2].items():
        assert re.search(f"^{reason}|not reused: .*{reason}" if part == "layers" else reason, lines[part]), lines
    assert lines.get("prefix", "").startswith("not reused") or "reuse" in lines


@pytest.mark.parametrize("name", [name for name, (_, auto, _) in TYPES.items() if auto is CAUSAL])
def test_generate_gives_the_plain_logits(name: str) -> None:
    model = made(name).eval()
    batch = usual_batch(side="left")
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**prompts, **options)
    with model.reusing(ActivationStore(2**28)):
        for _ in range(2):
            reused = model.generate(**prompts, **options)
            assert torch.equal(reused.sequences, plain.sequences)
            for a, b in zip(plain.logits, reused.logits, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_a_window_that_only_the_cache_has_takes_the_plain_path() -> None:
    """As in Moshi: its mask shows tokens that its cache has dropped."""
    config = tf.MoshiConfig(
        **SIZES, num_key_value_heads=4, head_dim=8, sliding_window=6, audio_vocab_size=60, num_codebooks=2
    )
    model = intervened(from_config(config).float(), loreft(1), training=False).float()
    assert re.search(r"prompts +not reused by generate: the logits would be off by", model.reuse_summary())


def test_the_text_of_a_model_that_also_sees_pictures_is_reused() -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = tf.LlamaConfig(**SIZES, num_key_value_heads=2).to_dict()
    pictures = tf.CLIPVisionConfig(**vision, image_size=16, patch_size=4).to_dict()
    config = tf.LlavaConfig(text_config=text, vision_config=pictures, image_token_id=59)
    model = intervened(from_config(config, tf.AutoModelForImageTextToText).float(), head(0), loreft(1), head(2)).float()
    batch, store = usual_batch(targets=True), ActivationStore(2**28)
    plain = step(model, batch)
    with model.reusing(store) as used:
        assert used.why_plain() is None and used.eligibility.why_no_prefix(used.cone) is None and used.cone.cut == 2
        for _ in range(2):
            check(step(model, batch), plain, 2e-4)
    assert store.hits


# --- when it is made --------------------------------------------------------------------------------------


def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every comparison."""
    made: list[str] = []
    for name in ("cone", "generation"):
        method = getattr(comparison.Comparison, name).method

        def counting(self: Any, method: Any = method, name: str = name) -> Any:
            made.append(name)
            return method(self)

        monkeypatch.setattr(getattr(comparison.Comparison, name), "method", counting)
    return made


def test_it_is_made_once_for_a_graph_and_what_is_never_asked_for_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    count = comparisons(monkeypatch)
    model, batch = intervened(tiny_llama(), loreft(1)), usual_batch()
    for store in (ActivationStore(2**28), ActivationStore(2**28), None):
        for _ in range(2):
            with model.reusing(store):
                model(**batch)
    assert count == ["cone"]
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for _ in range(2):
        with model.reusing():
            model.eval().generate(**prompts, max_new_tokens=2, do_sample=False)
    assert count == ["cone", "generation"]
    for _ in range(2):
        model.reuse_summary()
    assert count == ["cone", "generation"]


def test_it_is_made_again_for_another_graph_another_type_and_another_way_of_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = comparisons(monkeypatch)
    model, batch = intervened(tiny_llama(), loreft(1)), usual_batch()
    with model.reusing() as replay:
        model(**batch)
    for name, layer in (("alike", 1), ("other", 2)):
        model.add_adapter(name, rh.InterventionGraph(loreft(layer)))
        model.set_adapter(name)
        with model.reusing(replay):
            model(**batch)
            model(**batch)
    assert len(count) == 3  # an adapter of the same graph may be anywhere, with any weights
    model.bfloat16()
    with model.reusing(replay):
        model(**batch)
    model.get_base_model().set_attn_implementation("eager")
    with model.reusing(replay):
        model(**batch)
    assert len(count) == 5


def test_it_changes_no_random_numbers_no_gradients_and_no_mode() -> None:
    model, batch = intervened(tiny_llama(), loreft(1, dropout=0.5)), usual_batch()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with model.reusing() as used:
        assert used.why_plain() is None
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad(), model.reusing():
        assert not model(**batch).loss.requires_grad


def test_without_gradients_it_still_looks_at_them() -> None:
    """What a model gives forward may be right where what it gives backward is not."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.columns = h.shape[1]
            return h.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * ctx.columns

    model = intervened(tiny_llama(), loreft(1))
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, output: Twice.apply(output))
    with torch.no_grad(), model.reusing() as used:
        model(**usual_batch())
        assert re.search("gradient of .*would be off by", used.cone.differences.prefix or "")


def test_a_row_of_one_adapter_each_is_compared_as_well() -> None:
    model = intervened(base_of("llama"), loreft(1), training=False)
    model.add_adapter("other", rh.InterventionGraph(loreft(0)))
    batch = usual_batch() | {"adapter_names": ["default", "other", "__base__", "default"]}  # type: ignore[operator]
    model.double()
    plain = model(**batch).loss
    with model.reusing():
        torch.testing.assert_close(model(**batch).loss, plain)


# --- one order ----------------------------------------------------------------------------------------------

EMBEDDED = rh.Node(rh.Collect(), component="embedding_output", name="embedded")
ENTERING = rh.Node(rh.LoReFT(rank=2), layer=0, component="block_input", name="entering")
JUDGED = rh.Node(rh.LinearHead(3, target="y"), component="embedding_output", positions="l1", name="judged")


@pytest.mark.parametrize("nodes", list(itertools.permutations([EMBEDDED, ENTERING, JUDGED])))
def test_readers_of_embeddings_come_before_edits_of_what_enters_the_first_block(nodes: Any) -> None:
    base = base_of("llama")
    batch = usual_batch(targets=True)
    expected = base.model.embed_tokens(batch["input_ids"])
    model = intervened(base, *nodes)
    plain = step(model, batch)
    with model.reusing(ActivationStore(2**28)):
        for _ in range(2):
            reused = step(model, batch)
            check(reused, plain, 1e-6)
    for seen in (plain, reused):
        real = seen.output.selected["embedded"]
        torch.testing.assert_close(seen.output.collected["embedded"][real], expected[real])


def test_a_reader_of_a_whole_projection_acts_in_one_order_with_an_edit_of_a_part() -> None:
    model = intervened(
        base_of("gpt2"),
        rh.Node(rh.LoReFT(rank=2), 1, "key_output", name="part"),
        rh.Node(rh.Collect(), component="transformer.h.1.attn.c_attn", name="whole", positions="l1"),
    )
    batch = usual_batch()
    plain = model(**batch).collected["whole"]
    with model.reusing(ActivationStore(2**28)):
        for _ in range(2):
            torch.testing.assert_close(model(**batch).collected["whole"], plain)


# --- nothing to learn from, nothing to read ------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["default"] * 2 + ["other"] * 2, ["default", "other", "other", "default"]])
@pytest.mark.parametrize("nodes", [(loreft(1),), (head(0), loreft(1)), (loreft(1), head(2))], ids=len)
@pytest.mark.parametrize("labelled", [0, 2])
def test_rows_without_a_label_that_counts_give_the_same_on_both_paths(names: Any, nodes: Any, labelled: int) -> None:
    model = intervened(base_of("llama"), *nodes)
    model.add_adapter("other", rh.InterventionGraph(*nodes))
    model.double()
    batch: dict[str, Any] = usual_batch(targets=len(nodes) > 1)
    batch["labels"][labelled:] = -100
    batch |= {} if names is None else {"adapter_names": names}
    plain = step(model, batch)
    assert plain.loss.isfinite() and (labelled or len(nodes) > 1 or plain.loss == 0)
    with model.reusing(ActivationStore(2**28)):
        for _ in range(2):
            check(step(model, batch), plain, 1e-6)


NOWHERE = ["20", "20:24", "generated", rh.Positions.where(token_ids=[1])]


@pytest.mark.parametrize("rule", NOWHERE, ids=str)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("labels", [True, False])
def test_readers_that_select_nothing_are_the_same_on_both_paths(rule: Any, layer: int, labels: bool) -> None:
    if labels and rule == "generated":
        pytest.skip("the answer's tokens")
    nodes = [rh.Node(rh.Collect(), layer, positions=rule, name="reader"), head(layer, rule, target=None), loreft(1)]
    batch = usual_batch(labels=labels, targets=rule == "20")
    if rule == "20":
        nodes.append(head(layer, rule, name="judged"))
    if not labels:
        batch.pop("prompt_mask")
    model = intervened(base_of("llama"), *nodes, training=labels)
    plain = model(**batch)
    with model.reusing(ActivationStore(2**28)):
        for _ in range(2):
            reused = model(**batch)
            for field in ("predictions", "collected", "losses", "counts", "selected"):
                a, b = (output.get(field) or {} for output in (plain, reused))
                assert a.keys() == b.keys()
                assert not any(bool(value.any()) for value in (*a.values(), *b.values()))
            loss = plain.get("loss")
            assert (reused.get("loss") is None) == (loss is None)
            if loss is not None:
                torch.testing.assert_close(reused.loss, loss, rtol=1e-6, atol=1e-6)


def test_a_target_that_does_not_fit_is_an_error_on_both_paths() -> None:
    model = intervened(base_of("llama"), head(2, NOWHERE[-1], name="head"), loreft(1), training=False)
    batch = usual_batch(labels=False, targets=True)  # a target for each row, of a head that reads any number of tokens
    with pytest.raises(ValueError, match="has shape .4,."):
        model(**batch)
    with pytest.raises(ValueError, match="has shape .4,."), model.reusing():
        model(**batch)
