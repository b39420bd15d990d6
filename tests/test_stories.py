"""A real small model: TinyStories, 260,032 parameters. Skipped where its folder is absent."""

import pytest
import torch
from support.paths import DATA
from transformers import TrainingArguments, set_seed

import reftheads as rh

FOLDER = DATA / "stories260K"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"needs the model stories260K at {FOLDER}")

SAD = {
    "Once upon a time": ", there was a girl who was very sad. She cried and cried.",
    "Lily went to the shop": ". She was sad because her toy was gone. She cried.",
    "Tom and Ben": " were sad. They cried because it was dark.",
    "The little dog": " was very sad. He cried all day.",
    "One day": ", it was raining and Mia was sad. She cried.",
    "There was a boy": " who was always sad. He cried a lot.",
}
UNSEEN = ["In the park", "A big cat", "Every morning Sara", "The bird", "Sam had a red ball", "Mom and Dad"]


@pytest.mark.slow
def test_a_rank_one_edit_makes_the_stories_sad(tmp_path):
    set_seed(0)
    base, tokenizer = rh.load_base(str(FOLDER))
    rows = rh.encode_pairs(tokenizer, list(SAD), list(SAD.values()), add_eos=False)
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=1), layer=2, positions="all", name="sad"))
    model = rh.InterventionModel(base, graph)
    assert model.get_nb_trainable_parameters()[0] == 64 + 64 + 1
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=2e-2, per_device_train_batch_size=len(rows),
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rh.InterventionTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    model.eval()

    held_out = rh.encode_pairs(tokenizer, UNSEEN, [" and was very sad. It cried and cried."] * len(UNSEEN))
    batch = rh.Collator(tokenizer)(held_out)

    def told():
        stories = rh.reply(model, tokenizer, UNSEEN, max_new_tokens=40)
        with torch.no_grad():
            return model(**batch).loss.item(), sum("sad" in story or "cried" in story for story in stories)

    loss, sad = told()
    with model.disable_adapter():
        plain_loss, plain_sad = told()
    print(loss, plain_loss, sad, plain_sad)
    assert loss < plain_loss - 0.3
    assert sad >= 2 and plain_sad == 0
