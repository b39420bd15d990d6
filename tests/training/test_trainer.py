"""Training: resuming, evaluation, generation, accumulation, mixed precision, checkpointing, bad input."""

import math

import peft
import pytest
import torch
from support.processes import run_together
from support.training import arguments, llama, train_two_losses, weights
from torch.utils.data import IterableDataset
from transformers import LlamaForCausalLM, Trainer

import reftheads as rh

EDIT = rh.InterventionGraph.over(rh.LoReFT(rank=2, dropout=0.1), range(2), positions="f1+l1")
EDIT_WITHOUT_DROPOUT = rh.InterventionGraph.over(rh.LoReFT(rank=2), range(2), positions="f1+l1")


@pytest.fixture
def rows(tokenizer):
    return rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h i j"] * 2, ["b", "d e", "f", "x y z"] * 2)


def fit(tokenizer, rows, args, graph=EDIT, trainer=rh.InterventionTrainer, resume=None, **options):
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph)
    if trainer is Trainer:
        options["data_collator"] = rh.Collator(tokenizer)
    made = trainer(model, args, train_dataset=rows, processing_class=tokenizer, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def test_training_lowers_the_loss_and_leaves_the_base_alone(tokenizer, rows, tmp_path):
    before = llama(len(tokenizer), num_hidden_layers=2).state_dict()
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=8), [1], positions="all")
    trainer = fit(tokenizer, rows, arguments(tmp_path, max_steps=40, learning_rate=5e-2), graph)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    after = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tokenizer, rows, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    whole = weights(fit(tokenizer, rows, args).model)
    resumed = weights(fit(tokenizer, rows, args, resume=str(tmp_path / "checkpoint-3")).model)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_best_model_is_loaded_at_the_end(tokenizer, rows, tmp_path):
    schedule = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    # the highest loss counts as best here, so that the best checkpoint is not the last
    best_first = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = fit(tokenizer, rows, arguments(tmp_path, **schedule, **best_first), eval_dataset=rows)
    history = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(history, key=history.get)
    assert best != max(history)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[best], rel=1e-5)


def test_plain_trainer_gives_the_same_weights(tokenizer, rows, tmp_path):
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=2), range(2), positions="l1")
    ours = weights(fit(tokenizer, rows, arguments(tmp_path / "a"), graph, reuse="off").model)
    plain = weights(fit(tokenizer, rows, arguments(tmp_path / "b"), graph, trainer=Trainer).model)
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_accumulated_batches_train_as_one_large_batch_does(tokenizer, rows, tmp_path):
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), layer=0, positions="l1", name="edit"),
        rh.Node(rh.LinearHead(outputs=2, target="label", weight=0.5), layer=1, positions="l1", name="head"),
    )
    rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    large = arguments(tmp_path / "a", per_device_train_batch_size=8, max_steps=2)
    small = arguments(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    one, four = (fit(tokenizer, rows, args, graph) for args in (large, small))
    for name, value in weights(one.model).items():
        assert torch.allclose(value, weights(four.model)[name], atol=1e-5), name
    logged = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, four)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_evaluation_loss_is_that_of_the_model_in_evaluation_mode(tokenizer, rows, tmp_path):
    trainer = fit(tokenizer, rows, arguments(tmp_path, per_device_eval_batch_size=8), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    with torch.no_grad():
        loss = model(**rh.Collator(tokenizer)(rows)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_prediction_generates_from_the_prompts_alone(tokenizer, rows, tmp_path):
    trainer = fit(
        tokenizer,
        rows,
        arguments(tmp_path),
        predict_with_generate=True,
        generation_kwargs={"max_new_tokens": 3, "eos_token_id": -1},
    )
    predicted = trainer.predict(rows[:4])
    prompts = tokenizer(["a b c", "d", "e f", "g h i j"], return_tensors="pt", padding=True, padding_side="left")
    width = prompts["input_ids"].shape[1]
    ids = trainer.model.generate(**prompts, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    want = ids[:, width:].tolist()
    for row in want:  # what comes behind the first end is no answer any more
        end = row.index(1) + 1 if 1 in row else len(row)
        row[:] = [-100 if token == 0 or i >= end else token for i, token in enumerate(row)]
    assert predicted.predictions.tolist() == want
    assert predicted.metrics["test_loss"] > 0


def test_prompt_masks_and_target_columns_reach_the_model(tokenizer, rows, tmp_path):
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=3, target="grade", detach=True), layer=1, positions="l1", name="head")
    )
    rows = [{k: v for k, v in row.items() if k != "labels"} | {"grade": i % 3} for i, row in enumerate(rows)]
    trainer = fit(tokenizer, rows, arguments(tmp_path, max_steps=30), graph, eval_dataset=rows)
    start = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), graph).eval()
    with torch.no_grad():
        first = start(**rh.Collator(tokenizer)(rows)).loss.item()
    assert trainer.evaluate()["eval_loss"] < first


def test_bf16_training_keeps_parameters_in_float32(tokenizer, rows, tmp_path):
    trainer = fit(tokenizer, rows, arguments(tmp_path, bf16=True, max_steps=20))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    rotation = trainer.model.node(trainer.model.plan().graph.names[0]).R
    assert torch.allclose(rotation @ rotation.T, torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("component", ["block_output", "query_output", "mlp_activation"])
def test_activation_checkpointing_trains_the_same_weights(tokenizer, rows, tmp_path, component):
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=2), range(2), positions="f1+l1", component=component)
    plain = weights(fit(tokenizer, rows, arguments(tmp_path / "a"), graph).model)
    args = arguments(tmp_path / "b", gradient_checkpointing=True)
    checkpointed = weights(fit(tokenizer, rows, args, graph).model)
    for name, value in plain.items():
        assert torch.allclose(value, checkpointed[name], atol=1e-6), name


def test_what_peft_wraps_trains_as_well(tokenizer, rows, tmp_path):
    ours = weights(fit(tokenizer, rows, arguments(tmp_path / "a")).model)
    model = peft.get_peft_model(llama(len(tokenizer), num_hidden_layers=2), rh.InterventionConfig(graph=EDIT))
    trainer = rh.InterventionTrainer(model, arguments(tmp_path / "b"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    for name, value in weights(model).items():  # by the plain path, ours within `reusing`
        torch.testing.assert_close(value, ours[name], rtol=1e-5, atol=1e-6)


def test_heads_of_one_name_in_two_adapters_keep_their_own_weights(tokenizer, rows, tmp_path):
    def head(weight):
        node = rh.Node(rh.LinearHead(outputs=2, target="label", weight=weight), layer=1, positions="l1", name="head")
        return rh.InterventionGraph(node)

    rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    trained = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), head(1.0))
        model.add_adapter("two", head(5.0))
        model.set_adapter(["default", "two"])
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        args = arguments(tmp_path / str(batch), **options)
        rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
        trained.append(weights(model))
    assert all(torch.allclose(value, trained[1][name], atol=1e-5) for name, value in trained[0].items())


def test_an_empty_dataset_is_an_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        fit(tokenizer, [], arguments(tmp_path))


def grading(target: str | None) -> rh.InterventionGraph:
    head = rh.Node(rh.LinearHead(outputs=3, target=target), layer=1, positions="l1", name="head")
    return rh.InterventionGraph(*EDIT, head)


@pytest.mark.parametrize("hub", [False, True])
def test_a_target_that_is_no_column_is_an_error(tokenizer, rows, tmp_path, hub):
    dataset = [{**row, "grade": i % 3} for i, row in enumerate(rows)]
    if hub:
        dataset = pytest.importorskip("datasets").Dataset.from_list(dataset)
    message = "target 'grades' of a head is no column of train_dataset, which has input_ids, .*, grade: add it to the"
    with pytest.raises(ValueError, match=message):
        fit(tokenizer, dataset, arguments(tmp_path), grading("grades"))
    for target in ("grade", None):
        fit(tokenizer, dataset, arguments(tmp_path, max_steps=1), grading(target))


def test_a_head_of_an_adapter_that_does_not_act_needs_no_column(tokenizer, rows, tmp_path):
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), EDIT)
    model.add_adapter("graded", grading("grade"))
    options = {"args": arguments(tmp_path), "train_dataset": rows, "processing_class": tokenizer}
    rh.InterventionTrainer(model, **options)
    model.set_adapter("graded")
    with pytest.raises(ValueError, match="target 'grade' of a head is no column"):
        rh.InterventionTrainer(model, **options)


def test_columns_that_only_show_on_the_way_are_not_looked_for(tokenizer, rows, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return ({**row, "grade": 1} for row in rows)

    def collate(batch):
        return rh.Collator(tokenizer)(batch) | {"grade": torch.ones(len(batch), dtype=torch.long)}

    fit(tokenizer, Stream(), arguments(tmp_path, max_steps=1), grading("grade"))
    fit(tokenizer, rows, arguments(tmp_path, max_steps=1), grading("grade"), data_collator=collate)


def test_the_columns_of_a_dataset_are_those_that_its_transform_gives(tokenizer, rows, tmp_path):
    dataset = pytest.importorskip("datasets").Dataset.from_dict({"index": range(len(rows))})
    graded = [{**row, "grade": 1} for row in rows]
    dataset.set_transform(lambda batch: {name: [graded[i][name] for i in batch["index"]] for name in graded[0]})
    fit(tokenizer, dataset, arguments(tmp_path, max_steps=1, remove_unused_columns=False), grading("grade"))


@pytest.mark.parametrize("keep", [True, False])
def test_a_plain_trainer_drops_targets_and_prompt_masks_unless_told_to_keep_them(tokenizer, rows, tmp_path, keep):
    seen: set[str] = set()
    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), grading("grade"))
    model.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=not keep)
    rows = [{**row, "grade": i % 3} for i, row in enumerate(rows)]
    Trainer(model, args, train_dataset=rows, data_collator=rh.Collator(tokenizer)).train()
    assert {"grade", "prompt_mask"} & seen == ({"grade", "prompt_mask"} if keep else set())


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(
    "grades, message",
    [
        ([0, 1, 2, 5], "target 'grade' in row 3 of train_dataset is 5, .* a whole number from 0 to 2"),
        ([0, 1.5, 2.0, 1.0], "row 1 of train_dataset is 1.5"),
        (["0", "1", "2", "3"], "row 0 of train_dataset is '0': give a number"),
        ([[0, 1], [2, 3], [0], [1]], "row 1 of train_dataset is 3"),
        ([-100] * 4, "no row of train_dataset has a target 'grade': fill the column"),
        ([float("nan")] * 4, "no row of train_dataset has a target 'grade'"),
    ],
)
def test_a_target_that_cannot_be_is_named_before_training(tokenizer, rows, tmp_path, grades, message, hub):
    dataset = [{**row, "grade": grade} for row, grade in zip(rows, grades, strict=False)]
    if hub:
        dataset = pytest.importorskip("datasets").Dataset.from_list(dataset)
    with pytest.raises(ValueError, match=message):
        fit(tokenizer, dataset, arguments(tmp_path), grading("grade"))


def test_some_rows_may_lack_a_target(tokenizer, rows, tmp_path):
    dataset = [{**row, "grade": (1, -100)[i % 2]} for i, row in enumerate(rows)]
    assert fit(tokenizer, dataset, arguments(tmp_path), grading("grade")).state.global_step == 6


def test_labels_of_each_row_are_trained_on_whatever_number_of_tokens_it_has(tokenizer, rows, tmp_path):
    head = rh.Node(rh.LinearHead(outputs=3, target="tags", loss="multi_label"), layer=1, positions="l1", name="head")
    dataset = [{**row, "tags": [i % 2, 1, -100]} for i, row in enumerate(rows)]
    trainer = fit(tokenizer, dataset, arguments(tmp_path), rh.InterventionGraph(head))
    assert trainer.state.log_history
    with pytest.raises(ValueError, match=r"'tags' in row 2 of train_dataset is \[1\]: give 3 numbers"):
        fit(tokenizer, [*dataset[:2], {**dataset[2], "tags": [1]}], arguments(tmp_path), rh.InterventionGraph(head))


def test_a_head_with_its_own_learning_rate_moves_at_it_and_is_scaled_by_the_scheduler(tokenizer, rows, tmp_path):
    def trained(rate: float, lr: float | None):
        head = rh.Node(rh.LinearHead(outputs=3, target="grade", lr=lr), layer=1, positions="l1", name="head")
        dataset = [{**row, "grade": i % 3} for i, row in enumerate(rows)]
        args = arguments(tmp_path, learning_rate=rate, lr_scheduler_type="linear", weight_decay=0.1)
        torch.manual_seed(0)
        return weights(fit(tokenizer, dataset, args, rh.InterventionGraph(head)).model)

    own, same, other = trained(1e-2, 1e-3), trained(1e-3, None), trained(1e-2, None)
    assert all(torch.equal(value, same[name]) for name, value in own.items())
    assert any(not torch.equal(value, other[name]) for name, value in own.items())


def test_a_tokenizer_without_pad_token_is_an_error(tokenizer, rows, tmp_path):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        fit(tokenizer, rows, arguments(tmp_path))


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_the_weights(tokenizer, rows, tmp_path):
    class Poison(rh.InterventionTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    model = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), EDIT)
    trainer = Poison(model, arguments(tmp_path), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        trainer.train()
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("reuse", ["off", "memory"])
def test_every_heads_loss_is_logged_by_its_name(tokenizer, rows, tmp_path, reuse):
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(1, target="length", loss="mse", weight=0.5), layer=0, positions="l1", name="long"),
        rh.Node(rh.LinearHead(2, target="kind"), layer=1, positions="l1", name="sort"),
    )
    judged = [{**row, "length": float(i), "kind": i % 2} for i, row in enumerate(rows)]
    judged = [{name: value for name, value in row.items() if name != "labels"} for row in judged]
    args = arguments(tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    logs = [e for e in fit(tokenizer, judged, args, graph, reuse=reuse).state.log_history if "loss" in e]
    assert len(logs) == 2
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.5 * entry["loss_long"] + entry["loss_sort"], rel=1e-3)


@pytest.mark.parametrize("reuse", ["memory", "off"])
def test_every_heads_loss_is_a_mean_over_its_targets_in_logs_and_evaluation(tokenizer, rows, tmp_path, reuse):
    rows = [
        {"input_ids": row["input_ids"]} | ({"sort": i % 3} if i % 3 else {"long": float(i)})
        for i, row in enumerate(rows)
    ]
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(1, target="long", loss="mse"), 0, positions="l1", name="long"),
        rh.Node(rh.LinearHead(3, target="sort"), 1, positions="l1", name="sort"),
    )
    args = arguments(tmp_path, max_steps=4, learning_rate=0.0, logging_steps=4)
    trainer = fit(tokenizer, rows, args, graph, eval_dataset=rows, reuse=reuse)
    evaluated, [logged, *_] = trainer.evaluate(), trainer.state.log_history
    model = trainer.model.eval()
    for name in ("long", "sort"):
        own = [row for row in rows if name in row]
        want = float(model(**rh.Collator(tokenizer)(own)).losses[name].detach())
        assert evaluated[f"eval_loss_{name}"] == pytest.approx(want, rel=1e-4)
        assert logged[f"loss_{name}"] == pytest.approx(want, rel=1e-4)
    assert trainer.evaluate().keys() == evaluated.keys()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("reuse", ["memory", "off"])
def test_batches_without_any_label_train_the_heads_alone(tokenizer, rows, tmp_path, reuse, accumulated):
    whole = [{"input_ids": row["input_ids"], "sort": i % 3} for i, row in enumerate(rows)]
    some = [row | (rows[i] if i < 2 else {}) for i, row in enumerate(whole)]
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 0, positions="all", name="edit"),
        rh.Node(rh.LinearHead(3, target="sort"), 1, positions="f1", name="sort"),
    )
    args = arguments(tmp_path, max_steps=8, gradient_accumulation_steps=accumulated, seed=1)
    trainer = fit(tokenizer, some, args, graph, reuse=reuse)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    model = trainer.model.eval()
    batch = rh.Collator(tokenizer)(some[2:4] + some[:1])
    without = {name: value[:2] for name, value in batch.items()}
    out = model(**without)
    torch.testing.assert_close(out.loss, out.losses["sort"])
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_base_that_is_trained_is_in_checkpoints_and_resumes(tokenizer, rows, tmp_path):
    def model():
        made = rh.InterventionModel(llama(len(tokenizer), num_hidden_layers=2), EDIT_WITHOUT_DROPOUT)
        made.get_base_model().requires_grad_(True)
        return made

    def trained(folder: str, steps: int, resume: str | None = None):
        args = arguments(
            tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=3, lr_scheduler_type="constant"
        )
        trainer = rh.InterventionTrainer(model(), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    whole = trained("whole", 6)
    trained("half", 3)
    resumed = trained("half", 6, resume=str(tmp_path / "half" / "checkpoint-3"))
    start = weights(model())
    assert resumed.keys() == whole.keys() and any("embed_tokens" in name for name in whole)
    for name, expected in whole.items():
        torch.testing.assert_close(resumed[name], expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(start[name], expected), name
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "half" / "checkpoint-6" / "base")
    assert torch.equal(reloaded.lm_head.weight, resumed["base_model.model.lm_head.weight"])


PROGRAM = """
import sys, torch, transformers
from pathlib import Path
from support.processes import leave
from support.training import arguments, train_two_losses, weights
torch.set_num_threads(1)
folder = Path(sys.argv[1])
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
options = {"max_steps": 2, "optim": "sgd", "learning_rate": 1.0}
args = arguments(folder / "out", per_device_train_batch_size=4, ddp_backend="gloo", **options)
made = train_two_losses(tokenizer, args)
assert made.args.world_size == 2
if made.args.process_index == 0:
    torch.save(weights(made.model), folder / "weights")
leave()
"""


@pytest.mark.slow
def test_heads_count_as_much_beside_labels_on_two_processes_as_on_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    run_together(PROGRAM, tmp_path)
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 1.0}
    alone = train_two_losses(tokenizer, arguments(tmp_path / "out", per_device_train_batch_size=8, **options))
    assert alone.args.world_size == 1
    one, two = weights(alone.model), torch.load(tmp_path / "weights", weights_only=True)
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=1e-4)
