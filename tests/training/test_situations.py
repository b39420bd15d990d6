"""Trainings as people run them: other collators, metrics, searches, text columns, inference mode, plain Trainers."""

import numpy as np
import pytest
import torch
from support.models import WIDTH, tiny_llama
from support.training import arguments, llama, weights
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer

import reftheads as rh

EDIT = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1", name="edit"))
GRADE = rh.Node(rh.LinearHead(outputs=3, target="grade"), layer=1, positions="l1", name="grade")
TAGS = rh.Node(rh.LinearHead(outputs=2, target="tags"), layer=1, positions="prompt", name="tags")


@pytest.fixture
def rows(tokenizer):
    return rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h i j"] * 2, ["b", "d e", "f", "x y z"] * 2)


def model_of(tokenizer, *nodes):
    return rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), rh.InterventionGraph(*nodes or EDIT))


def trainer_of(tokenizer, folder, rows, *nodes, trainer=rh.InterventionTrainer, options=None, **kwargs):
    kwargs = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer} | kwargs
    return trainer(model_of(tokenizer, *nodes), arguments(folder, **(options or {})), **kwargs)


# --- labels from the first token on -----------------------------------------------------------------------


@pytest.mark.parametrize("reuse", ["memory", "off"])
@pytest.mark.parametrize("trainer", [rh.InterventionTrainer, Trainer])
def test_a_collator_whose_labels_are_all_tokens_is_refused_with_what_to_pass(tokenizer, rows, tmp_path, trainer, reuse):
    options = {"reuse": reuse} if trainer is rh.InterventionTrainer else {}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ids = [{"input_ids": row["input_ids"]} for row in rows]
    made = trainer_of(tokenizer, tmp_path, ids, trainer=trainer, data_collator=collator, **options)
    with pytest.raises(ValueError, match="begin at its first token.*encode_chat.*assistant_only_loss=True"):
        made.train()


def test_marks_of_what_is_learnt_train_as_labels_do(tokenizer, rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    marked = [{"input_ids": row["input_ids"], "completion_mask": [1 - p for p in row["prompt_mask"]]} for row in rows]
    trained = []
    for i, data in enumerate((rows, marked, datasets.Dataset.from_list(marked))):
        made = trainer_of(tokenizer, tmp_path / str(i), data)
        made.train()
        trained.append(weights(made.model) | {"loss": torch.tensor(made.evaluate()["eval_loss"])})
    for other in trained[1:]:
        assert all(torch.equal(value, other[name]) for name, value in trained[0].items())


# --- metrics ----------------------------------------------------------------------------------------------


def test_metrics_and_predictions_get_masks_that_are_false_on_padding(tokenizer, rows, tmp_path):
    rows = [row | {"tags": [i % 2 for i, _ in enumerate(row["input_ids"])]} for row in rows]
    seen = []

    def compute_metrics(predicted):
        masks = [part["tags"] for part in predicted.predictions if isinstance(part, dict) and "tags" in part]
        [selected] = [mask for mask in masks if mask.dtype == bool]
        [scores] = [part for part in masks if part.ndim == 3]
        seen.append(selected)
        targets = predicted.label_ids[1]
        right = scores.argmax(-1)[selected] == targets[selected]
        return {"accuracy": float(right.mean()), "tokens": float(selected.sum())}

    made = trainer_of(tokenizer, tmp_path, rows, TAGS, compute_metrics=compute_metrics)
    found = made.evaluate()
    prompts = [sum(row["prompt_mask"]) for row in rows]
    assert found["eval_tokens"] == sum(prompts)
    assert [int(mask.sum()) for mask in seen[0]] == prompts and isinstance(seen[0], np.ndarray)
    model, right = made.model.eval(), []
    for row in rows:
        out = model(**rh.Collator(tokenizer)([row]))
        right += (out.predictions["tags"].argmax(-1)[0] == torch.tensor(row["tags"]))[out.selected["tags"][0]].tolist()
    assert found["eval_accuracy"] == pytest.approx(np.mean(right))
    [mask] = [
        part["tags"]
        for part in made.predict(rows).predictions
        if isinstance(part, dict) and "tags" in part and part["tags"].dtype == np.bool_
    ]
    assert mask.sum() == sum(prompts)


def test_what_is_made_of_predictions_before_they_are_padded_gets_masks_too(tokenizer, rows, tmp_path):
    rows = [row | {"tags": [1] * len(row["input_ids"])} for row in rows]

    def preprocess(predictions, labels):
        [mask] = [part["tags"] for part in predictions if isinstance(part, dict) and part["tags"].dtype == torch.bool]
        return mask

    def compute_metrics(predicted):
        return {"tokens": float(predicted.predictions.sum()), "mask": float(predicted.predictions.dtype == bool)}

    options = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": preprocess}
    found = trainer_of(tokenizer, tmp_path, rows, TAGS, **options).evaluate()
    assert found["eval_tokens"] == sum(sum(row["prompt_mask"]) for row in rows) and found["eval_mask"] == 1


# --- models made anew, searches ---------------------------------------------------------------------------


def test_a_model_that_is_made_by_a_function_trains_as_one_that_is_given(tokenizer, rows, tmp_path):
    def make():
        return model_of(tokenizer)

    torch.manual_seed(42)  # the Trainer's seed, from which it makes the model
    options = {"train_dataset": rows, "processing_class": tokenizer}
    given = rh.InterventionTrainer(make(), arguments(tmp_path / "a"), **options)
    made = rh.InterventionTrainer(None, arguments(tmp_path / "b"), model_init=make, **options)
    given.train()
    made.train()
    assert all(torch.equal(value, weights(given.model)[name]) for name, value in weights(made.model).items())
    with pytest.raises(RuntimeError, match="either a `model` or `model_init`"):
        rh.InterventionTrainer(None, arguments(tmp_path), **options)


def test_models_made_by_a_function_may_have_other_heads_each_time(tokenizer, rows, tmp_path):
    rows = [{**row, "grade": i % 3, "sort": i % 2} for i, row in enumerate(rows)]
    heads = [GRADE, GRADE, rh.Node(rh.LinearHead(outputs=2, target="sort"), layer=0, positions="l1", name="sort")]
    options = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    made = rh.InterventionTrainer(
        None, arguments(tmp_path), model_init=lambda: model_of(tokenizer, heads.pop(0)), **options
    )
    for name in ("grade", "sort"):
        made.train()
        assert made.model.plan().graph.names == (name,) and f"eval_loss_{name}" in made.evaluate()


def test_a_search_by_optuna_finds_the_learning_rate_that_learns(tokenizer, rows, tmp_path):
    pytest.importorskip("optuna")
    options = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    made = rh.InterventionTrainer(None, arguments(tmp_path), model_init=lambda: model_of(tokenizer), **options)
    rates = iter([1e-9, 3e-2, 1e-9])
    best = made.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *[next(rates)] * 2)},
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert best.run_id == "1" and best.hyperparameters == {"learning_rate": 3e-2}


# --- columns, modes, outputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_text_beside_the_tokens_is_left_out(tokenizer, rows, tmp_path, keep):
    beside = [{**row, "text": "a b", "messages": [{"role": "user", "content": "a"}]} for row in rows]
    trained = []
    for name, data in (("plain", rows), ("beside", beside)):
        made = trainer_of(tokenizer, tmp_path / name, data, options={"remove_unused_columns": not keep})
        made.train()
        made.evaluate()
        trained.append(weights(made.model))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("reuse", ["memory", "disk", "off"])
@pytest.mark.parametrize("what", ["evaluate", "generate", "predict", "make", "load"])
def test_what_runs_in_inference_mode_does_not_disturb_a_later_training(tokenizer, rows, tmp_path, what, reuse):
    rows = [{**row, "grade": i % 3} for i, row in enumerate(rows)]
    nodes = (*EDIT, GRADE, rh.Node(rh.LoRA(2), layer=1, component="query_output", positions="l2", name="lora"))
    trained = []
    for mode in (False, True):
        torch.manual_seed(0)
        model = model_of(tokenizer, *nodes)
        model.save_pretrained(tmp_path / "saved")
        with torch.inference_mode(mode):
            if what == "make":
                torch.manual_seed(0)
                model = rh.InterventionModel(model.unload(), rh.InterventionGraph(*nodes))
            elif what == "load":
                model = rh.InterventionModel.from_pretrained(model.unload(), tmp_path / "saved", is_trainable=True)
        store = reuse if reuse != "memory" else rh.ActivationStore()
        made = rh.InterventionTrainer(
            model, arguments(tmp_path / f"{mode}"), train_dataset=rows, processing_class=tokenizer, reuse=store
        )
        with torch.inference_mode(mode):
            if what == "evaluate":
                made.evaluate(rows)
            elif what == "generate":
                prompts = tokenizer(["a b", "c"], return_tensors="pt", padding=True, padding_side="left")
                model.generate(**prompts, max_new_tokens=2)
            elif what == "predict":
                rh.predict(model, tokenizer, rows)
        made.train()
        trained.append(weights(model))
    assert all(torch.allclose(value, trained[1][name], atol=1e-6) for name, value in trained[0].items())


def test_probes_are_trained_in_inference_mode_as_well(tokenizer, rows):
    rows = [{**row, "grade": i % 3} for i, row in enumerate(rows)]
    scores, model = [], model_of(tokenizer, GRADE)
    for mode in (False, True):
        with torch.inference_mode(mode):
            probes = rh.fit_probes(model, tokenizer, rows, eval_rows=rows, seeds=(0,), epochs=2)
        scores.append(probes["grade"].score.mean)
    assert scores[0] == scores[1]


def test_a_plain_trainer_evaluates_heads_whose_targets_are_its_label_names(tokenizer, rows, tmp_path):
    rows = [{"input_ids": row["input_ids"], "grade": i % 3} for i, row in enumerate(rows)]
    collator = rh.Collator(tokenizer)
    losses = {}
    for names in (None, ["grade"]):
        options = {"remove_unused_columns": False, "label_names": names, "per_device_eval_batch_size": 8}
        made = trainer_of(
            tokenizer, tmp_path, rows, GRADE, trainer=Trainer, options=options, data_collator=collator,
            compute_metrics=lambda predicted: {"rows": len(predicted.label_ids)},
        )  # fmt: skip
        losses[str(names)] = made.evaluate()
        with torch.no_grad():
            want = made.model.eval()(**collator(rows)).losses["grade"].item()
    assert "eval_loss" not in losses["None"]
    assert losses["['grade']"]["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert losses["['grade']"]["eval_rows"] == len(rows)


class Own(nn.Module):
    """A classifier of somebody's own, which gives a tuple or a dict."""

    def __init__(self, form):
        super().__init__()
        self.model = tiny_llama(num_hidden_layers=2).model
        self.config = self.model.config
        self.score = nn.Linear(WIDTH, 3)
        self.form = form

    def forward(self, input_ids, attention_mask=None, labels=None):
        scores = self.score(self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])
        return self.form(nn.functional.cross_entropy(scores, labels), scores)


def test_a_classifier_of_ones_own_trains_whatever_it_gives(tokenizer, rows, tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": i % 3, "grade": i % 3} for i, row in enumerate(rows)]
    forms = {"tuple": lambda *parts: parts, "dict": lambda loss, scores: {"loss": loss, "scores": scores}}
    steer = rh.Node(rh.Steering(), layer=1, name="steer")
    trained = {}
    for name, form in forms.items():
        torch.manual_seed(0)
        model = rh.InterventionModel(Own(form), rh.InterventionGraph(steer))
        made = rh.InterventionTrainer(
            model, arguments(tmp_path / name), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
            reuse="off",
        )  # fmt: skip
        made.train()
        trained[name] = weights(model) | {"loss": torch.tensor(made.evaluate()["eval_loss"])}
    assert all(torch.equal(value, trained["dict"][name]) for name, value in trained["tuple"].items())
    torch.manual_seed(0)
    model = rh.InterventionModel(Own(forms["tuple"]), rh.InterventionGraph(GRADE))
    options = {"train_dataset": rows, "processing_class": tokenizer, "reuse": "off"}
    made = rh.InterventionTrainer(model, arguments(tmp_path), **options)
    with pytest.raises(ValueError, match="this model gives a tuple: let it give a dict"):
        made.train()
