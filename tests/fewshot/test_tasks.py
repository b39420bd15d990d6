"""Tasks from files and from the Hub."""

import json

import datasets
import pytest
from support.paths import DATA

import reftheads.fewshot as fs


def test_tasks_are_read_from_their_own_forms_and_from_tables(tmp_path):
    (tmp_path / "fine.train").write_text("3 good film .\n0 bad film .\n")
    (tmp_path / "fine.test").write_text("4 wonderful .\n")
    task = fs.load_task("rating", str(tmp_path))
    assert task.train == [("good film .", ("good",)), ("bad film .", ("terrible",))] and task.labels == fs.RATINGS

    qa = tmp_path / "qa"
    qa.mkdir()
    story = "1 Mary went home.\n2 Where is Mary? \tmilk,football\t1\n3 Mary left.\n4 Who left? \tMary\t3\n"
    story += "1 New.\n2 What? \tnew\t1\n"
    for split in ("train", "test"):
        (qa / f"qa1_{split}.txt").write_text(story)
    (qa / "latest.txt").write_text("neither of the two")
    examples = fs.load_task("qa", str(qa)).train
    assert examples[0] == ("Mary went home. Where is Mary?", ("milk, football",))  # a list is one answer
    assert [e.input for e in examples[1:]] == ["Mary went home. Mary left. Who left?", "New. What?"]

    pairs = tmp_path / "e2e.txt"
    pairs.write_text("".join(f"name : {i} || {i} is a place .\n" for i in range(20)))
    task = fs.load_task("summary", str(pairs))
    assert (len(task.train), len(task.test)) == (18, 2) and task.test[-1] == ("name : 19", ("19 is a place .",))

    rows = [{"input": "a", "answer": ["b", "c"]}, {"input": "d", "answer": "e"}] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert fs.load_task("qa", str(tmp_path / "rows.jsonl")).train[0] == ("a", ("b", "c"))
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "fine,2\n" * 10)
    assert fs.load_task("rating", str(tmp_path / "rows.csv")).test == [("fine", ("okay",))]
    (tmp_path / "lines.csv").write_text("passage,question,answer\n" + '"Mary\nleft.",Who left?,Mary\n' * 10)
    assert fs.load_task("qa", str(tmp_path / "lines.csv")).train[0] == ("Mary\nleft. Who left?", ("Mary",))
    (tmp_path / "odd.jsonl").write_text('{"input": "a\u2028b", "answer": "c"}\n' * 10)
    assert fs.load_task("qa", str(tmp_path / "odd.jsonl")).test == [("a\u2028b", ("c",))]


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data at {DATA}")
def test_real_data_are_read_whole():
    rating = fs.load_task("rating", str(DATA / "sst5"))
    assert (len(rating.train), len(rating.test)) == (8544, 2210)
    assert {example.answer for example in rating.train} == set(fs.RATINGS)
    assert len(fs.k_shot([example.answer for example in rating.train], 128)) == 5 * 128
    qa = fs.load_task("qa", str(DATA / "babi_qa1"))
    assert (len(qa.train), len(qa.test)) == (10000, 1000)
    places = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert {example.answer for example in qa.test} == places and all("?" in example.input for example in qa.test)
    pairs = fs.load_task("summary", str(DATA / "e2e" / "valid.txt"))
    assert len(pairs.train) + len(pairs.test) == 4672 and pairs.train[0].input.startswith("name : ")
    assert pairs.score([example.answer for example in pairs.test], [e.answers for e in pairs.test]) == 1


def test_tasks_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'math': use rating, qa or summary"):
        fs.load_task("math", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file with 'train' in its name"):
        fs.load_task("qa", str(tmp_path))
    (tmp_path / "x.csv").write_text("text,label\n" + "fine,7\n" * 10)
    with pytest.raises(ValueError, match="the rating '7' is neither 0 to 4 nor one of terrible, bad"):
        fs.load_task("rating", str(tmp_path / "x.csv"))
    (tmp_path / "y.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="a row has no input or no answer under these names, but {'a': '1'"):
        fs.load_task("qa", str(tmp_path / "y.csv"))
    (tmp_path / "z.jsonl").write_text("")
    (tmp_path / "stsa.train").write_text("3 fine\nfine\n")
    with pytest.raises(ValueError, match="the line 'fine' has no ' ' between two parts"):
        fs.load_task("rating", str(tmp_path / "stsa.train"))
    (tmp_path / "broken.jsonl").write_text('{"input": ')
    with pytest.raises(ValueError, match="broken.jsonl is not JSON lines: Expecting value"):
        fs.load_task("qa", str(tmp_path / "broken.jsonl"))
    for answer in (None, []):
        (tmp_path / "none.jsonl").write_text(json.dumps({"input": "a", "answer": answer}))
        with pytest.raises(ValueError, match="a row has no input or no answer under these names, but {'input': 'a'"):
            fs.load_task("qa", str(tmp_path / "none.jsonl"))
    two = tmp_path / "two"
    two.mkdir()
    for file in ("a.train", "b.train", "a.test"):
        (two / file).write_text("3 fine\n")
    with pytest.raises(ValueError, match="has several files for train, a.train, b.train: leave one there"):
        fs.load_task("rating", str(two))
    with pytest.raises(ValueError, match="no examples for train"):
        fs.load_task("qa", str(tmp_path / "z.jsonl"))


def test_tasks_come_from_the_hub_too(monkeypatch):
    rows = {
        "qa": [{"passage": "Mary left.", "question": "Who left?", "answer": "Mary"}],
        "rating": [{"text": "fine", "label": 3, "label_text": "positive"}],
        "summary": [{"document": "A long text.", "summary": "A text.", "id": "1"}],
    }
    expected = {"qa": "Mary left. Who left?", "rating": "fine", "summary": "A long text."}
    for name, some in rows.items():
        made = datasets.DatasetDict({split: datasets.Dataset.from_list(some) for split in ("train", "test")})
        monkeypatch.setattr(datasets, "load_dataset", lambda where, made=made: made)
        task = fs.load_task(name, "owner/name")
        assert task.train == task.test and task.train[0].input == expected[name]
        assert task.train[0].answer == {"qa": "Mary", "rating": "good", "summary": "A text."}[name]
    del made["test"]
    with pytest.raises(ValueError, match="'owner/name' has the splits train, and train and test are needed"):
        fs.load_task("summary", "owner/name")
