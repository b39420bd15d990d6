"""Tasks of a few-shot study: examples from files or the Hub, how they are asked, and how answers are scored."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from reftheads.fewshot.metrics import accuracy, exact_match, rouge

_INPUTS = ("input", "text", "sentence", "passage", "document")
_ANSWERS = ("answer", "label", "summary")
RATINGS = ("terrible", "bad", "okay", "good", "great")


class Example(NamedTuple):
    """An input and its right answers, of which the first is shown in prompts and learnt."""

    input: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The first of its answers."""
        return self.answers[0]


@dataclass(frozen=True)
class Task:
    """Examples to draw supports from and to test on.

    Attributes:
        format: of its prompts, see `icl_prompts`.
        labels: all answers that there are; `None`: answers are free text.
        max_tokens: an answer has at most so many.
        score: of answers, with the answers of each example.
    """

    name: str
    train: list[Example]
    test: list[Example]
    format: str
    labels: tuple[str, ...] | None
    max_tokens: int
    score: Callable[[Sequence[str], Sequence[tuple[str, ...]]], float]


def load_task(name: Literal["rating", "qa", "summary"], where: str) -> Task:
    """A task from a folder, whose file names have the words "train" and "test", from one file, or from the Hub.

    * `rating`: a review's rating in five words, `RATINGS`, by accuracy. A label from 0 to 4 and a text a line, as SST-5
      has them.
    * `qa`: a question about a short story, by exact match. bAbI's own form.
    * `summary`: one sentence, by ROUGE-1. A text, two bars and the sentence a line, as E2E has them.

    Or JSON lines or CSV with the columns `input` and `answer`, which may be a list of right answers. Of a single file
    the last tenth is for testing.

    Raises:
        ValueError: another name, a label outside of the set, no examples, a folder with several such files.
        FileNotFoundError: a folder without such files.
    """
    if name not in ("rating", "qa", "summary"):
        raise ValueError(f"unknown task {name!r}: use rating, qa or summary")
    splits = _splits(name, where)
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"no examples for {split} in {where!r}")
    if name == "rating":
        return Task(name, **splits, format="rating", labels=RATINGS, max_tokens=4, score=_first_answer_accuracy)
    if name == "qa":
        return Task(name, **splits, format="qa", labels=None, max_tokens=6, score=exact_match)
    return Task(name, **splits, format="tldr", labels=None, max_tokens=48, score=_rouge1)


def _first_answer_accuracy(predictions: Sequence[str], answers: Sequence[tuple[str, ...]]) -> float:
    return accuracy(list(predictions), [some[0] for some in answers])


def _rouge1(predictions: Sequence[str], answers: Sequence[tuple[str, ...]]) -> float:
    return rouge(predictions, [some[0] for some in answers])["rouge1"]


def _splits(name: str, where: str) -> dict[str, list[Example]]:
    path = Path(where)
    if path.is_dir():
        return {split: _read(name, _file(path, split)) for split in ("train", "test")}
    if path.is_file():
        examples = _read(name, path)
        cut = len(examples) - len(examples) // 10
        return {"train": examples[:cut], "test": examples[cut:]}
    from datasets import load_dataset

    found = load_dataset(where)
    if not {"train", "test"} <= set(found):
        raise ValueError(f"{where!r} has the splits {', '.join(map(str, found))}, and train and test are needed")
    return {split: [_example(name, dict(row)) for row in found[split]] for split in ("train", "test")}  # type: ignore[arg-type]


def _file(folder: Path, split: str) -> Path:
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")
    files = sorted(path for path in folder.iterdir() if word.search(path.name) and path.is_file())
    if not files:
        raise FileNotFoundError(
            f"{folder} has no file with {split!r} in its name: give a folder with train and test files"
        )
    if len(files) > 1:
        raise ValueError(f"{folder} has several files for {split}, {', '.join(f.name for f in files)}: leave one there")
    return files[0]


def _read(name: str, path: Path) -> list[Example]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return [_example(name, row) for row in csv.DictReader(io.StringIO(text))]
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from error
        return [_example(name, row) for row in rows]
    if name == "qa":
        return list(_babi(lines))
    pairs = [_parts(line, "||") if name == "summary" else _parts(line, " ")[::-1] for line in lines]
    return [_example(name, {"input": given, "answer": answer}) for given, answer in pairs]


def _babi(lines: Sequence[str]) -> Iterator[Example]:
    """Each question with the story up to it; a line is a number, a text and, of a question, a tab and the answer."""
    story: list[str] = []
    for line in lines:
        number, text = _parts(line, " ")
        if number == "1":
            story = []
        question, *rest = text.split("\t")
        if rest:
            answer = ", ".join(rest[0].strip().split(","))  # a list is one answer
            yield Example(" ".join([*story, question.strip()]), (answer,))
        else:
            story.append(text.strip())


def _parts(line: str, mark: str) -> tuple[str, str]:
    first, found, second = line.partition(mark)
    if not found:
        raise ValueError(f"the line {line!r} has no {mark!r} between two parts: see load_task for the forms it reads")
    return first, second


def _example(name: str, row: Mapping[str, Any]) -> Example:
    """From a row of any of the forms, or of the usual data sets of the Hub."""
    given = next((row[column] for column in _INPUTS if column in row), None)
    if given is not None and "question" in row:  # about a passage
        given = f"{given} {row['question']}"
    answer = next((row[column] for column in _ANSWERS if column in row), None)
    if given is None or answer is None or answer == []:
        raise ValueError(f"a row has no input or no answer under these names, but {dict(row)}")
    if name == "rating" and str(answer) not in RATINGS:
        if not str(answer).isdigit() or int(answer) >= len(RATINGS):
            raise ValueError(
                f"the rating {answer!r} is neither 0 to {len(RATINGS) - 1} nor one of {', '.join(RATINGS)}"
            )
        answer = RATINGS[int(answer)]
    answers = answer if isinstance(answer, list) else [answer]
    return Example(str(given).strip(), tuple(str(one).strip() for one in answers))
