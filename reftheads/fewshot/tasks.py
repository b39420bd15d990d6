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
"""Name the grades of a rating from 0 to 4, as the labels of SST-5 and of a five-star review are read.

Example:
    ```python
    >>> import reftheads.fewshot as fs
    >>> fs.RATINGS[4]
    'great'
    ```
"""


class Example(NamedTuple):
    """Hold an input and its right answers, of which the first is shown in prompts and learnt.

    Attributes:
        input: a text.
        answers: all that are right.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> example = fs.Example("What is red?", ("a tomato", "tomatoes"))
        >>> example.answer
        'a tomato'
        ```
    """

    input: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """Return the first of the answers."""
        return self.answers[0]


@dataclass(frozen=True)
class Task:
    """Hold examples to learn from and to test on, and what else a task is.

    Attributes:
        name: such as "qa".
        train, test: examples to draw supports from, and to test on.
        format: of its prompts, see `icl_prompts`.
        labels: all answers that there are; `None`: answers are free text.
        max_tokens: an answer has at most so many.
        score: takes the predictions and the right answers of each example, and returns a number.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> examples = [fs.Example("1 + 1 is", ("two",)), fs.Example("1 + 2 is", ("three",))]
        >>> task = fs.Task("sums", examples[:1], examples[1:], "none", None, max_tokens=2, score=fs.exact_match)
        >>> task.score(["Three."], [example.answers for example in task.test])
        1.0
        ```
    """

    name: str
    train: list[Example]
    test: list[Example]
    format: str
    labels: tuple[str, ...] | None
    max_tokens: int
    score: Callable[[Sequence[str], Sequence[tuple[str, ...]]], float]


def load_task(name: Literal["rating", "qa", "summary"], where: str) -> Task:
    """Load a task from a folder, from one file, or from the Hub.

    Of a folder, the files with the words "train" and "test" in their names are read. Of a single file the last tenth
    is for testing. The tasks are:

    * `rating`: a review's rating in five words, `RATINGS`, by accuracy. A label from 0 to 4 and a text a line, as SST-5
      has them.
    * `qa`: a question about a short story, by exact match. bAbI's own form.
    * `summary`: one sentence, by ROUGE-1. A text, two bars and the sentence a line, as E2E has them.

    Instead of these forms, a file may have JSON lines or CSV with the columns `input` and `answer`, which may be a list
    of right answers.

    Args:
        name: of the task.
        where: a path, or the id of a data set on the Hub.

    Raises:
        ValueError: another name, a label outside of the set, no examples, a folder with several such files.
        FileNotFoundError: a folder without such files.

    Example:
        ```python
        >>> import os, tempfile
        >>> import reftheads.fewshot as fs
        >>> path = os.path.join(tempfile.mkdtemp(), "reviews.txt")
        >>> with open(path, "w") as file:
        ...     print(*(f"{label} a film" for label in [0, 1, 2, 3, 4] * 2), sep="\\n", file=file)
        >>> task = fs.load_task("rating", path)
        >>> len(task.train), task.train[3], task.labels
        (9, Example(input='a film', answers=('good',)), ('terrible', 'bad', 'okay', 'good', 'great'))
        ```
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
    return accuracy(list(predictions), [of_example[0] for of_example in answers])


def _rouge1(predictions: Sequence[str], answers: Sequence[tuple[str, ...]]) -> float:
    return rouge(predictions, [of_example[0] for of_example in answers])["rouge1"]


def _splits(name: str, where: str) -> dict[str, list[Example]]:
    path = Path(where)
    if path.is_dir():
        return {split: _read(name, _file(path, split)) for split in ("train", "test")}
    if path.is_file():
        examples = _read(name, path)
        cut = len(examples) - len(examples) // 10
        return {"train": examples[:cut], "test": examples[cut:]}
    from datasets import load_dataset

    dataset = load_dataset(where)
    if not {"train", "test"} <= set(dataset):
        raise ValueError(f"{where!r} has the splits {', '.join(map(str, dataset))}, and train and test are needed")
    return {split: [_example(name, dict(row)) for row in dataset[split]] for split in ("train", "test")}  # type: ignore[arg-type]


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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from error
        return [_example(name, row) for row in rows]
    if name == "qa":
        return list(_babi(lines))
    pairs = [_parts(line, "||") if name == "summary" else _parts(line, " ")[::-1] for line in lines]
    return [_example(name, {"input": text, "answer": answer}) for text, answer in pairs]


def _babi(lines: Sequence[str]) -> Iterator[Example]:
    """Yield each question with the story up to it.

    A line is a number and a text; of a question, a tab and the answer follow.
    """
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
    first, middle, second = line.partition(mark)
    if not middle:
        raise ValueError(f"the line {line!r} has no {mark!r} between two parts: see load_task for the forms it reads")
    return first, second


def _example(name: str, row: Mapping[str, Any]) -> Example:
    """Make an example of a row of any of the forms, or of the usual data sets of the Hub."""
    text = next((row[column] for column in _INPUTS if column in row), None)
    if text is not None and "question" in row:  # about a passage
        text = f"{text} {row['question']}"
    answer = next((row[column] for column in _ANSWERS if column in row), None)
    if text is None or answer is None or answer == []:
        raise ValueError(f"a row has no input or no answer under these names, but {dict(row)}")
    if name == "rating" and str(answer) not in RATINGS:
        if not str(answer).isdigit() or int(answer) >= len(RATINGS):
            raise ValueError(
                f"the rating {answer!r} is neither 0 to {len(RATINGS) - 1} nor one of {', '.join(RATINGS)}"
            )
        answer = RATINGS[int(answer)]
    answers = answer if isinstance(answer, list) else [answer]
    return Example(str(text).strip(), tuple(str(one).strip() for one in answers))
