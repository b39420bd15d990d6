"""Models for more than a row of tokens: images beside text, stages of an image model, tensors of another form."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import reftheads as rh
from reftheads.runtime.hooks import attach

TEXT = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, sliding_window=8, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
IMAGE = 40  # the token in whose place an image's embeddings come
BART = dict(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
)  # fmt: skip


def gemma3() -> Any:
    torch.manual_seed(0)
    config = tf.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=41,
        eoi_token_index=42, pad_token_id=0,
    )  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config).eval()


def edited(base: nn.Module, **where: Any) -> rh.InterventionModel:
    """Return a model that adds a fixed vector at one place."""
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.Steering(), **where, name="edit")))
    torch.manual_seed(1)
    for parameter in model.node("edit").parameters():
        nn.init.normal_(parameter)
    return model.eval()


def ragged(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return two rows of different lengths as a batch padded at one side, and each alone."""
    rows = [torch.arange(3, 12), torch.arange(20, 25)]
    batch = torch.zeros(2, 9, dtype=torch.long)
    for row, ids in zip(batch, rows, strict=True):
        row[len(row) - len(ids) :] = ids if side == "left" else row[len(row) - len(ids) :]
        row[: len(ids)] = row[: len(ids)] if side == "left" else ids
    return dict(input_ids=batch, attention_mask=(batch != 0).long()), rows


@pytest.mark.parametrize("positions", ["f1", "l1", "f2+l2", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_beside_others_is_the_row_alone_where_the_model_makes_masks_of_its_own(side: str, positions: str) -> None:
    model = edited(gemma3(), layer=0, positions=positions)
    batch, rows = ragged(side)
    with torch.no_grad():
        together = model(**batch).logits
        for row, mask, ids in zip(together, batch["attention_mask"], rows, strict=True):
            torch.testing.assert_close(row[mask.bool()], model(input_ids=ids[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_a_mask_that_shows_no_padding_is_refused_also_where_labels_show_the_prompt() -> None:
    model = edited(gemma3(), layer=0, positions="f1")
    batch, _ = ragged("left")
    labels = batch["input_ids"].masked_fill(torch.arange(9) < 7, -100)
    full = torch.ones(9, 9).tril().bool() & batch["attention_mask"][:, None, None].bool()
    mask = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match="count real tokens, which a mask of this form does not show"):
        model(
            input_ids=batch["input_ids"],
            attention_mask={"full_attention": mask, "sliding_attention": mask},
            labels=labels,
        )


def test_image_tokens_are_selected_by_their_id() -> None:
    base = gemma3()
    text = torch.arange(3, 8)
    ids = torch.cat([text, torch.full((4,), IMAGE), text])[None]
    batch = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), token_type_ids=(ids == IMAGE).long())
    entered: list[Tensor] = []
    model = edited(base, component="embedding_output", positions=lambda tokens: tokens.input_ids == IMAGE)
    seen = base.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(**batch)
        with model.disable_adapter():
            model(**batch)
    seen.remove()
    changed = (entered[0] != entered[1]).any(-1)[0]
    assert changed.tolist() == (ids[0] == IMAGE).tolist()


def test_stages_of_an_image_model_have_columns_of_their_own() -> None:
    torch.manual_seed(0)
    config = tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=2, num_labels=3
    )
    base = tf.SwinForImageClassification(config).eval()
    nodes = [rh.Node(rh.Collect(), layer=layer, positions="l1", name=f"stage{layer}") for layer in range(3)]
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).eval()
    left: list[Tensor] = []
    for stage in base.swin.encoder.layers:
        attach(stage, "output", lambda h, _: left.append(h))
    with torch.no_grad():
        out = model(pixel_values=torch.randn(2, 3, 16, 16))
    assert [h.shape[1:] for h in left] == [(16, 16), (4, 32), (4, 32)]
    for layer, h in enumerate(left):
        torch.testing.assert_close(out.collected[f"stage{layer}"], h[:, -1])


@pytest.mark.parametrize("positions", ["l1", "f2", "all"])
def test_columns_that_a_model_fills_up_are_no_tokens(positions: str) -> None:
    torch.manual_seed(0)
    config = tf.LongformerConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        attention_window=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = edited(tf.LongformerModel(config), layer=0, positions=positions)
    assert model.plan()["edit"].address.form == "filled"
    batch, rows = ragged("right")
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for row, ids in zip(together, rows, strict=True):
            alone = model(input_ids=ids[None]).last_hidden_state[0]
            torch.testing.assert_close(row[: len(ids)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_columns_may_come_before_rows(stack: str) -> None:
    torch.manual_seed(0)
    small = {**BART, "src_vocab_size": 50, "tgt_vocab_size": 50, "langs": ["a", "b"]}
    base = tf.FSMTModel(tf.FSMTConfig(**small)).eval()
    model = edited(base, layer=0, stack=stack, positions="l1")
    assert model.plan()["edit"].address.form == "columns"
    batch = dict(input_ids=torch.arange(3, 9)[None], decoder_input_ids=torch.arange(20, 25)[None])
    with torch.no_grad():
        edit = model(**batch).last_hidden_state
        with model.disable_adapter():
            plain = model(**batch).last_hidden_state
            v = next(model.node("edit").parameters())
            layer = getattr(base, stack).layers[0]
            attach(layer, "output", lambda h, _: torch.cat([h[:-1], h[-1:] + v]))
            by_hand = model(**batch).last_hidden_state
    assert not torch.equal(edit, plain)
    torch.testing.assert_close(edit, by_hand)


def test_a_path_acts_where_no_blocks_are_recognised() -> None:
    torch.manual_seed(0)
    config = tf.XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=0)
    base = tf.XLMModel(config).eval()
    model = edited(base, component="ffns.0.lin2", positions="l1")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        edit = model(input_ids=ids).last_hidden_state
        v = next(model.node("edit").parameters())
        with model.disable_adapter():
            attach(base.ffns[0].lin2, "output", lambda h, _: torch.cat([h[:, :-1], h[:, -1:] + v], 1))
            torch.testing.assert_close(edit, model(input_ids=ids).last_hidden_state)


RECURRENT = {
    "mamba": lambda: tf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1
    ),
    "rwkv": lambda: tf.RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, context_length=64),
}


@pytest.mark.parametrize("positions", ["f1", "l1", "prompt", "generated", "all"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_recurrent_state_counts_tokens_as_a_cache_does(model_type: str, positions: str) -> None:
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(RECURRENT[model_type]()).eval()
    model = edited(base, layer=0, positions=positions)
    prompt = torch.arange(5, 11)[None]
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(input_ids=prompt, return_dict_in_generate=True, output_logits=True, **options)
    with torch.no_grad():
        mask = torch.arange(out.sequences.shape[1])[None] < 6
        whole = model(input_ids=out.sequences, prompt_mask=mask).logits[0, 5:-1]
    torch.testing.assert_close(torch.cat(out.logits), whole, atol=1e-4, rtol=1e-4)


def test_a_state_that_does_not_say_where_it_stands_is_refused_for_rules_that_count() -> None:
    torch.manual_seed(0)
    model = edited(tf.AutoModelForCausalLM.from_config(RECURRENT["mamba"]()).eval(), layer=0, positions="f1")
    with torch.no_grad():
        state = model(input_ids=torch.arange(5, 9)[None], use_cache=True).cache_params
        with pytest.raises(ValueError, match="does not say how many came before"):
            model(input_ids=torch.tensor([[9]]), cache_params=state)
