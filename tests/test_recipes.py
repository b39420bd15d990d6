"""The recipes are really run: the demo as it is, the others small."""

import io
import json
import runpy
import socket
import subprocess
import sys
import urllib.request
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.paths import RECIPES
from torch import nn
from transformers import AutoModel

import reftheads as rh

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_it_was():
    """Recipes are programs: what they set for their process ends with them."""
    threads, verbosity, path = torch.get_num_threads(), transformers.logging.get_verbosity(), list(sys.path)
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path[:] = path
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def run(recipe: str, *arguments: object) -> str:
    """What a recipe prints. It runs in this process, since importing everything takes longer than most recipes do."""
    shown = io.StringIO()
    with patch.object(sys, "argv", [recipe, *map(str, arguments)]), redirect_stdout(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    return shown.getvalue()


PROGRAMS = sorted(str(path.relative_to(RECIPES)) for path in {*RECIPES.rglob("*.py")} - {RECIPES / "_common.py"})


@pytest.mark.parametrize("recipe", [name for name in PROGRAMS if not name.endswith("overhead.py")])
def test_every_recipe_says_what_it_takes(recipe):
    with pytest.raises(SystemExit) as end:
        run(recipe, "--help")
    assert end.value.code == 0


@pytest.mark.parametrize("recipe", ["emoji_chat.py", "benchmarks/probes.py"])
def test_a_recipe_runs_from_any_directory(recipe, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RECIPES / recipe), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-3000:]


def test_ten_demonstrations_make_the_chat_model_answer_in_emoji(tmp_path):
    shown = run("emoji_chat.py", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["base"]["emoji_only"] < 0.02
    assert figures["edit"]["emoji_only"] >= 0.9
    assert figures["edit"]["on_topic"] >= 0.6
    assert figures["edit"]["parameters"] == 2 * 4 * 192 + 4
    assert "120 prompts" in shown


def test_the_chat_page_is_served_once_the_model_has_learnt(tmp_path):
    pytest.importorskip("gradio", reason="needs the extra demo: Gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(RECIPES / "chat_page.py"), "--steps", "3", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as page:
        assert page.stdout is not None
        try:
            printed = list(iter(page.stdout.readline, f"* Running on local URL:  http://127.0.0.1:{port}\n"))
            assert page.poll() is None, "".join(printed)
            assert b"reftheads" in urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read()
        finally:
            page.terminate()
    assert not list(tmp_path.iterdir())  # the folder of adapters is made when one is saved


def test_the_embedded_model_is_small_and_stops(tmp_path):
    folder = Path(rh.__file__).parent / "tiny_chat"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6_000_000
    base, tokenizer = rh.load_base("tiny-chat")
    assert base.num_parameters() <= 3_000_000
    assert base.dtype == torch.float32
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about dogs. Answer in emoji."}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = base.generate(**asked, max_new_tokens=64, do_sample=False)[0]
    assert ids[-1] == tokenizer.eos_token_id
    plain, emoji = rh.reply(base, tokenizer, ["Tell me about dogs.", "Tell me about dogs. Answer in emoji."])
    assert plain.isascii() and not any(character.isascii() for character in emoji)


def test_pretraining_is_deterministic_and_writes_a_model_that_loads(tmp_path):
    for name in ("a", "b"):
        run("tools/pretrain_tiny.py", "--steps", 3, "--limit", 20, "--threads", 1, "--out", tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    base, tokenizer = rh.load_base(str(tmp_path / "a"))
    assert rh.reply(base, tokenizer, ["Tell me about dogs."], max_new_tokens=3)


def test_the_benchmark_prints_its_tables():
    assert "import reftheads" in run("benchmarks/overhead.py", "import")


def test_a_step_on_real_rows_has_the_loss_that_pyreft_gives(tmp_path):
    pytest.importorskip("pyreft")
    row = {"question": "Tom has 3 dogs and gets 2. How many has he?", "answer": "3 + 2 = 5\n#### 5"}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    asked = "--model", "tiny-chat", "--data", tmp_path, "--only", "GSM8K", "--repeats", 1, "--out", tmp_path / "out"
    shown = run("benchmarks/cone.py", *asked)
    figures = json.loads((tmp_path / "out" / "cone.json").read_text())
    assert "GSM8K, l1 at block 4" in shown and {"pyreft", "LoRA r=8"} <= {row["row"] for row in figures["rows"]}
    assert figures["greatest_difference"]["GSM8K, l1 at block 4"] < 1e-5


def test_real_rows_need_a_real_model():
    with pytest.raises(SystemExit) as end:
        run("benchmarks/cone.py", "--data", "somewhere")
    assert end.value.code == 2


def test_a_sweep_prints_its_grid_and_writes_a_plot_and_all_figures(tmp_path):
    shown = run(
        "sweep.py", "--ranks", "1", "--rates", "1e-2", "--seeds", "0,1", "--steps", 5, "--out", tmp_path / "out"
    )
    assert "mean ± deviation of 2 seeds" in shown and "an extrapolation" in shown and "train_runtime" not in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.png"}
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(r["rank"], r["learning_rate"], r["seed"]) for r in figures["results"]] == [(1, 1e-2, 0), (1, 1e-2, 1)]
    assert all(r["eval_loss"] > 0 and 0 <= r["emoji_only"] <= 1 for r in figures["results"])


def test_three_tasks_are_trained_at_once(tmp_path):
    sst5, sick = tmp_path / "sst5", tmp_path / "sick"
    for folder in (sst5, sick):
        folder.mkdir()
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    kinds = ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")
    for split in ("train", "test"):
        (sst5 / f"fine.{split}").write_text("".join(f"{i % 5} a film of grade {i % 5}\n" for i in range(12)))
        pairs = (f"{i}\ta dog runs\ta dog sits\t{1 + i % 4}.5\t{kinds[i % 3]}\n" for i in range(12))
        (sick / f"SICK_{split}.txt").write_text(header + "".join(pairs))
    shown = run(
        "joint_multitask.py", "--sst5", sst5, "--sick", sick, "--epochs", 1, "--batch", 8, "--balance", "uncertainty",
        "--graph", "lora2", "--separate", "--shares", "sst5=1,sick=2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "grade + relatedness + entailment" in shown
    figures = json.loads((tmp_path / "out" / "joint_multitask.json").read_text())
    assert [sorted(r["scores"]) for r in figures["runs"]] == [
        ["entailment", "grade", "relatedness"], ["grade"], ["relatedness"], ["entailment"]
    ]  # fmt: skip
    assert {"loss_grade", "loss_relatedness", "loss_entailment"} <= {k for e in figures["runs"][0]["losses"] for k in e}
    assert (tmp_path / "out" / "joint_multitask.png").read_bytes().startswith(b"\x89PNG")


def test_ways_of_text_classification_are_compared_and_what_is_trained_is_not_trained_again(tmp_path):
    things = "film story actor song scene ending plot cast hero joke score dialogue".split()
    for split, some in (("train", things), ("dev", things[:4]), ("test", things[4:])):
        texts = (f"{c},I {verb} the {thing}." for thing in some for c, verb in ((1, "love"), (0, "hate")))
        (tmp_path / f"{split}.csv").write_text("\n".join(["label,sentence", *texts]))

    def compare(out: str, *more: object) -> tuple[str, list[dict]]:
        given = ("--data", tmp_path, "--limit", 16, "--batch", 8, "--rank", 4, "--out", tmp_path / out)
        shown = run("text_classification.py", *given, *more)
        assert (tmp_path / out / "text_classification.png").read_bytes().startswith(b"\x89PNG")
        return shown, json.loads((tmp_path / out / "text_classification.json").read_text())["runs"]

    shown, runs = compare("large", "--methods", "full,lora,qlora", "--seeds", 0, "--epochs", 1)
    assert "16 train, 8 validation, 16 test; 2 classes" in shown and "mean ± deviation of 1 seeds" in shown
    base, _ = rh.load_base("tiny-chat", auto_class=AutoModel)
    head, lora = 2 * 192 + 2, sum(4 * sum(m.weight.shape) for m in base.layers.modules() if isinstance(m, nn.Linear))
    assert [r["trained"] for r in runs] == [base.num_parameters() + head, lora + head, lora + head]

    few = ("--methods", "loreft,probe", "--epochs", 8, "--lr", "loreft=2e-2", "--lr", "probe=1e-9,1e-2")
    _, runs = compare("few", *few, "--seeds", 0)
    assert [(r["method"], r["learning_rate"]) for r in runs] == [("loreft", 2e-2), ("probe", 1e-9), ("probe", 1e-2)]
    assert [r["trained"] for r in runs] == [6 * (2 * 4 * 192 + 4) + head, head, head]
    assert runs[0]["test"] >= 0.9
    _, more = compare("few", *few, "--seeds", "0,1")
    better = max(runs[1:], key=lambda r: max(r["validation"]))["learning_rate"]
    assert more[:3] == runs and [r["learning_rate"] for r in more[3:]] == [2e-2, better]


def of_lines(tmp_path):
    """Arguments by which each row of a text is one line; what the model gives for it, its output matrix, the ids."""
    line = "Dogs are loyal animals that love to play.\n"
    (tmp_path / "text.txt").write_text(line * 20)
    base, tokenizer = rh.load_base("tiny-chat")
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    given = ("--text", tmp_path / "text.txt", "--length", ids.shape[1], "--epochs", 3, "--lr", 1e-2, "--batch-size", 4)
    given = (*given, "--prompts", "Dogs are", "--out", tmp_path / "out")
    return given, base(ids, labels=ids, output_hidden_states=True), base.lm_head.weight.detach(), ids[0]


def perplexity(hidden, matrix, ids):
    return pytest.approx(torch.nn.functional.cross_entropy(hidden[0, :-1] @ matrix.T, ids[1:]).exp().item(), rel=1e-3)


def test_a_linear_probe_for_the_next_token_stands_beside_the_model_and_the_logit_lens(tmp_path):
    given, out, matrix, ids = of_lines(tmp_path)
    shown = run("linear_probe.py", *given, "--layer", 2, "--start", "copy")
    figures = json.loads((tmp_path / "out" / "linear_probe.json").read_text())["perplexity"]
    assert figures["model"] == pytest.approx(out.loss.exp().item(), rel=1e-3)
    assert figures["logit_lens"] == perplexity(out.hidden_states[3], matrix, ids)
    assert figures["probe"] < figures["logit_lens"] / 2
    assert "Dogs are" in shown and "from a copy start" in shown


def test_probes_for_the_next_token_at_every_layer_are_trained_side_by_side(tmp_path):
    given, out, matrix, ids = of_lines(tmp_path)
    shown = run("multi_probe.py", *given)
    assert (tmp_path / "out" / "multi_probe.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "multi_probe.json").read_text())
    names = ["embedding", *(f"block_{layer}" for layer in range(6))]
    assert list(found["logit_lens"]) == names and found["probes"].keys() == {*names, "model"}
    for name, hidden in list(zip(names, out.hidden_states, strict=True))[:6]:  # the last is behind the final norm
        assert found["logit_lens"][name] == perplexity(hidden, matrix, ids)
    assert found["probes"]["model"] == pytest.approx(out.loss.exp().item(), rel=1e-3)
    assert all(found["probes"][name] < found["logit_lens"][name] / 2 for name in names)
    assert {*found["next_tokens"][0]} == {"prompt", "model", *names}
    assert all(len(found["next_tokens"][0][name]) == 5 for name in names)
    assert len(found["epoch_seconds"]) == 3 and "later ones" in shown


@pytest.mark.parametrize("language", [(), ("--language", "--epochs", "12")], ids=" ".join)
def test_a_value_model_knows_the_outcome_once_the_deciding_word_is_read_and_picks_by_it(tmp_path, language):
    subjects, ends = ("film", "book", "play", "song", "game", "poem", "show", "tale"), ("good", "fine", "bad", "sad")
    sentences = [f"{int(end in ends[:2])},The {subject} we saw is {end}" for subject in subjects for end in ends]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["label,sentence", *sentences]))
    given = ("--data", tmp_path, "--epochs", 6, "--batch", 8, "--tries", 2, "--n", 3, "--words", 4, "--new-tokens", 4)
    shown = run("value_model.py", *given, *language, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "value_model.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "value_model.json").read_text())
    assert [row["read"] for row in found["values"]] == [0.25, 0.5, 0.75, 1.0]
    half, whole = found["values"][1], found["values"][3]
    assert half["mse"] > 0.2
    assert whole["auc"] > 0.95 and whole["mse"] < 0.1
    assert len(found["best_of_n"]) == 2 and "means of 2" in shown
    for row in found["best_of_n"]:
        assert row["best"]["value"] >= row["random"]["value"] and row["best"]["text"].startswith(row["beginning"])
        assert "".join(row["best"]["tokens"]) == row["best"]["text"]
        assert row["best"]["value"] == row["best"]["values"][-1] and row["best"]["log_probability"] < 0


def test_a_reward_model_prefers_the_answers_that_were_chosen(tmp_path):
    topics = [f"{a} {b}" for a in ("red", "old", "big", "new", "hot") for b in ("cars", "dogs", "maps", "hats")]
    rows = [{"prompt": f"What are {t}?", "chosen": f"I like {t} a lot.", "rejected": "Who knows."} for t in topics]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--data", tmp_path / "pairs.jsonl", "--epochs", 6, "--batch", 4, "--graph", "loreft4:all")
    shown = run("reward_model.py", *given, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "reward_model.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert found["figures"]["after"]["accuracy"] == 1 and found["longer_is_chosen"] == 1
    assert found["figures"]["after"]["loss"] < 0.1 < found["figures"]["before"]["loss"]
    assert len(found["margins"]) == 4 and "4 held-out pairs" in shown


def test_what_is_saved_and_exported_predicts_the_same(tmp_path):
    run("save_and_load.py", "--epochs", 1, "--full", "--lr", "5e-4", "--out", tmp_path)
    results = json.loads((tmp_path / "save_and_load.json").read_text())["results"]
    assert len(results) == 4 and all(result["largest_difference"] < 1e-4 for result in results.values())
    assert results["adapter/, loaded onto a fresh base"]["largest_difference"] == 0
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"adapter", "base", "classifier", "head"}


def few_shot_files(tmp_path) -> dict[str, list]:
    """Arguments by which a few-shot recipe runs a small task; a review's rating, or where somebody is."""
    things = "film story actor song scene ending plot cast hero joke score dialogue".split()
    words = ("awful", "poor", "fair", "nice", "superb")
    places = ("garden", "kitchen", "office")
    for folder, lines in {
        "rating": [f"{i} the {thing} is {word}\n" for thing in things for i, word in enumerate(words)],
        "qa": [f"1 Mary is in the {p}.\n2 Where is Mary? \t{p}\t1\n" for p in places for _ in range(8)],
    }.items():
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            (tmp_path / folder / f"some_{split}.txt").write_text("".join(lines))
    small = ["--models", "tiny-chat", "--tests", 6, "--batch", 8, "--out", tmp_path / "out"]
    return {task: ["--task", task, "--data", tmp_path / task, *small] for task in ("rating", "qa")}


def times_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("**/*.json") if path.parent != folder}


def test_few_shot_fine_tuning_keeps_each_cell_and_repeats_none(tmp_path):
    given = few_shot_files(tmp_path)["qa"]
    given += ["--modes", "last:1,loreft2", "--steps", 3, "--epochs", 0]
    run("few_shot_finetune.py", *given, "--ks", "0,2", "--seeds", 0)
    before = times_of(tmp_path / "out")
    assert len(before) == 4
    shown = run("few_shot_finetune.py", *given, "--ks", "0,2", "--seeds", "0,1")
    after = times_of(tmp_path / "out")
    assert len(after) == 8 and before.items() <= after.items()
    assert "qa, 6 tests: mean ± deviation of 2 seeds" in shown
    assert (tmp_path / "out" / "ft_qa.png").read_bytes().startswith(b"\x89PNG")
    cells = [json.loads(Path(path).read_text()) for path in after]
    base, _ = rh.load_base("tiny-chat")
    whole = sum(p.numel() for p in base.model.layers[-1].parameters())
    assert {(cell["mode"], cell["trained"]) for cell in cells} == {
        ("last:1", whole),
        ("loreft2", 6 * (2 * 2 * 192 + 2)),
    }
    with pytest.raises(ValueError, match="with {'steps': 3}: take another folder"):
        run("few_shot_finetune.py", *given, "--ks", "0", "--seeds", 0, "--steps", 4)
    for path in after:  # as files from before the names of modes were those of presets
        cell = json.loads(Path(path).read_text())
        del cell["names"]
        Path(path).write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="with {'names': None}: take another folder"):
        run("few_shot_finetune.py", *given, "--ks", "0", "--seeds", 0)


def test_in_context_learning_is_measured_by_format_and_order(tmp_path):
    given = few_shot_files(tmp_path)["rating"]
    shown = run(
        "in_context.py",
        *given,
        "--formats",
        "rating,chat",
        "--ks",
        "0,1",
        "--seeds",
        0,
        "--order",
        "local",
        "--probes",
        3,
    )
    cells = [json.loads(Path(path).read_text()) for path in times_of(tmp_path / "out")]
    assert sorted((cell["format"], cell["k"]) for cell in cells) == [(f, k) for f in ("chat", "rating") for k in (0, 1)]
    assert all(0 <= cell["score"] <= 1 and cell["order"] == "local" for cell in cells)
    assert "rating in context, 6 tests" in shown
    assert (tmp_path / "out" / "icl_rating.png").read_bytes().startswith(b"\x89PNG")


def test_ways_to_learn_from_few_examples_are_compared_with_learning_rates_of_their_own(tmp_path):
    given = few_shot_files(tmp_path)["rating"]
    given += ["--modes", "last:1,loreft2", "--steps", 3, "--epochs", 0, "--ks", 1, "--seeds", 0, "--formats", "rating"]
    given += ["--factors", "1,3", "--choose-k", 2, "--timed", 2]
    shown = run("compare_few_shot.py", *given)
    assert "in context, rating" in shown and "tiny-chat, loreft2: trials side by side are" in shown
    found = json.loads((tmp_path / "out" / "compare_rating.json").read_text())
    assert [rate["rates"] for rate in found["rates"]] == [[1e-4, 3e-4], [5e-3, 1.5e-2]]
    for rate, result in zip(found["rates"], found["results"], strict=False):
        assert result["mode"] == rate["mode"]
        assert result["lr"] == rate["lr"] == rate["rates"][rate["losses"].index(min(rate["losses"]))]
    assert found["rates"][1]["seconds_side_by_side"] > 0 and (tmp_path / "out" / "compare_rating.png").exists()
    before = times_of(tmp_path / "out")
    assert len(before) == 2 + 2 + 1
    run("compare_few_shot.py", *given)
    assert times_of(tmp_path / "out") == before


def test_studies_that_could_not_be_are_refused_before_they_begin(tmp_path, capsys):
    given = few_shot_files(tmp_path)
    with pytest.raises(ValueError, match="--order global goes by the probabilities of labels, and qa has none"):
        run("in_context.py", *given["qa"], "--order", "global")
    with pytest.raises(ValueError, match="mode 'probe' selects nothing in this LlamaForCausalLM"):
        run("compare_few_shot.py", *given["qa"], "--modes", "last:1,probe")
    for recipe, options, message in (
        ("few_shot_finetune.py", ("--max-length", 6), "--max-length 6 leaves no room for a prompt before 6 new tokens"),
        ("compare_few_shot.py", ("--seeds", 1, "--choose-seed", 1), "--choose-seed 1 is one of --seeds"),
        ("compare_few_shot.py", ("--timed", 1), "--timed 1: the first step does not count, so give 2 or more"),
    ):
        with pytest.raises(SystemExit):
            run(recipe, *given["qa"], *options)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
