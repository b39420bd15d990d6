"""Where to edit: a search by Optuna over graphs, which are trained side by side and left out rung by rung."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from reftheads._utils.random_numbers import same_random_numbers
from reftheads.adapter.model import InterventionModel
from reftheads.data.rows import count_rows
from reftheads.reuse.fingerprint import Fingerprint
from reftheads.reuse.store import ActivationStore
from reftheads.tuning.halving import WIDTH, Pace, affordable, rungs, seconds_of
from reftheads.tuning.journal import Journal, Pass, digest_of_rows
from reftheads.tuning.passes import Metric, Passes, adapter_name, steps_of
from reftheads.tuning.result import Tuning, ranked
from reftheads.tuning.space import Candidate, Space

MEASURED = 3  # steps of the pass that shows how long one takes

# of the arguments those that decide what a training comes to
_DECISIVE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps", "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip


def tune(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    eval_rows: Any,
    *,
    space: Space | None = None,
    budget: str | float | None = None,
    trials: int | None = None,
    steps: int | None = None,
    args: TrainingArguments | None = None,
    metric: Metric | None = None,
    direction: Literal["minimize", "maximize"] | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    together: int = 8,
    store: ActivationStore | None = None,
) -> Tuning:
    """Search where to edit: layers, positions, rank, kind and learning rate, by a score on rows held out.

    Candidates are trained side by side: what the base model computes of a batch below and before all of them is
    recorded once, and the rows of all of them go through the rest of it as one batch. Each ends with the weights that
    an `InterventionTrainer` with its learning rate would give it alone, from the same seed.

    A round is one successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): 32 candidates are
    trained for a sixteenth of the steps, the best 8 of them anew for a quarter, and the best 2 of those for all. Anew,
    so that each is judged at the end of its own schedule of learning rates. What a round shows, Optuna's TPE
    (Bergstra et al. 2011) goes by in the next one. It needs the extra `reftheads[tune]`.

    With `trials`, a seed gives the same search on the same machine. A budget of time ends it between rungs, so that
    how far it comes depends on the machine. One candidate at least is trained to the end.

    Args:
        base: the base model; at the end it has the best graph.
        tokenizer: as the trainer's `processing_class`.
        rows: what is learnt, as from `encode_pairs` or `encode_chat`.
        eval_rows: rows held out, by which candidates are compared.
        space: what may be chosen; left out, LoReFT of rank 1 to 16 at any layer, on the usual positions.
        budget: of time, such as "10min", "90s", or seconds; "10min" if neither it nor `trials` is given.
        trials: how many candidates at most.
        steps: of a whole training, in place of `args.max_steps`; 120 without `args`.
        args: as for `InterventionTrainer`; the learning rate is the candidate's.
        metric: `metric(model, tokenizer, eval_rows)` judges in place of the held-out loss.
        direction: of the metric, "minimize" or "maximize".
        directory: where the search is kept: called again, it goes on where it was killed, as if it had not been.
        seed: of the search, and of every candidate's parameters.
        together: how many candidates share a pass at most; memory grows with it.
        store: of the base model's activations, which several searches may share.

    Raises:
        ValueError: no rows; a budget or trials of nothing; a space that does not fit the model; a metric without
            direction; a directory of another search.
        ImportError: Optuna is not installed.
        FloatingPointError: every candidate's loss became NaN or infinite.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat", dropout=False)
        >>> rows = rh.encode_pairs(tokenizer, ["Tell me about owls.", "Hi!"], ["Owls hoot.", "Hello!"])
        >>> space = rh.Space(layers=[1, 3], positions=["l1", "f1+l1"], rank=(1, 4))
        >>> found = rh.tune(base, tokenizer, rows, eval_rows=rows, space=space, trials=5, steps=9)
        >>> found.best.steps, found.model.plan().graph == found.best.graph
        (9, True)
        >>> sorted(candidate.steps for candidate in found)  # two went on, one of them to the end
        [1, 1, 1, 2, 9]
        ```
    """
    seconds = _check(budget, trials, steps, together, metric, direction, rows=rows, eval_rows=eval_rows)
    ask = _asking(seed, direction or "minimize")
    space = (space or Space()).within(base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(directory or Path(temporary, "search"))
        if args is None:
            args = TrainingArguments(temporary, max_steps=120, report_to=[], disable_tqdm=True)
        steps = steps or steps_of(args, rows)
        settings = {
            "space": space.to_dict(), "rows": digest_of_rows(rows), "eval_rows": digest_of_rows(eval_rows),
            "base": str(Fingerprint(base)), "steps": steps, "seed": seed, "together": together,
            "budget": seconds, "trials": trials,
            "args": {name: str(getattr(args, name)) for name in _DECISIVE},
            "metric": None if metric is None else _name(metric), "direction": direction,
        }  # fmt: skip
        passes = Passes(base, tokenizer, rows, eval_rows, args, metric, seed, store or ActivationStore())
        search = _Search(passes, Journal(folder, settings), space, ask, steps, together, direction == "maximize")
        try:
            with same_random_numbers(), _garbage_left_alone():
                search.run(trials, seconds)
        finally:
            passes.end()
        best = search.best()
        model = InterventionModel.from_pretrained(
            base, search.journal.place(adapter_name(best, steps)), is_trainable=True
        )
    judged_by = "held-out loss" if metric is None else _name(metric)
    return Tuning(model, best, tuple(search.candidates.values()), judged_by, search.maximize, search.spent)


@dataclass
class _Search:
    """One search, from the first round to the last.

    Attributes:
        passes: trains.
        journal: knows what was trained before.
        candidates: those of whom something is known, by number.
        pending: those that were drawn and are not yet tried.
        spent: seconds, of the passes so far, those before a search was resumed included: all that is decided by time
            is decided by these, so that a search that goes on decides as it did.
    """

    passes: Passes
    journal: Journal
    space: Space
    ask: Callable[[], Any]
    steps: int
    together: int
    maximize: bool
    candidates: dict[int, Candidate] = field(default_factory=dict)
    pending: list[tuple[Any, Candidate]] = field(default_factory=list)
    spent: float = 0.0
    _done: list[Pass] = field(default_factory=list)
    _last: float = 0.0

    def run(self, trials: int | None, seconds: float | None) -> None:
        """Go on round after round until so many candidates were tried, or the time is over."""
        self._last = time.perf_counter()
        with _progress() as bar:
            line = bar.add_task("tuning", total=trials or seconds)

            def tell() -> None:
                done = len(self.candidates) if trials else self.spent
                best = [c.score for c in ranked(self._finished(), self.maximize)[:1]]
                text = f"{len(self.candidates)} candidates" + (f", best {best[0]:.4g}" if best else "")
                bar.update(line, completed=done, description=text)

            self._show = tell
            while True:
                left = WIDTH if trials is None else trials - len(self.candidates)
                size = self._size(min(left, WIDTH), seconds)
                if size < 1:
                    return
                self._round(size, seconds)

    def best(self) -> Candidate:
        """Return the best candidate of those that were trained to the end.

        Raises:
            FloatingPointError: there is none.
        """
        finished = self._finished()
        if not finished:
            raise FloatingPointError(
                f"the loss of each of the {len(self.candidates)} candidates that were tried became NaN or infinite: "
                "lower the learning rates of the space, or look at the rows and at the base model's type of numbers"
            )
        return ranked(finished, self.maximize)[0]

    def _finished(self) -> list[Candidate]:
        return [c for c in self.candidates.values() if c.steps == self.steps and c.score is not None]

    # --- rounds -----------------------------------------------------------------------------------------------

    def _size(self, most: int, seconds: float | None) -> int:
        """Return with how many candidates the next round begins."""
        if seconds is None or most < 1:
            return most
        if not self._done:
            group = _groups([c for _, c in self._drawn(most)], self.together)[0]
            self._pass(group, min(MEASURED, self.steps), measuring=True)
        pace = Pace.of([(p.seconds, p.steps, p.step_seconds) for p in self._done[1:] or self._done])
        size = min(most, affordable(seconds - self.spent, self.steps, self.together, pace))
        return size if size or self.candidates else 1

    def _drawn(self, size: int) -> list[tuple[Any, Candidate]]:
        while len(self.pending) < size:
            trial = self.ask()
            self.pending.append((trial, self.space.draw(trial.number, trial)))
        return self.pending[:size]

    def _round(self, size: int, seconds: float | None) -> None:
        asked = self._drawn(size)
        self.pending = self.pending[size:]
        there = [candidate for _, candidate in asked]
        trials = {candidate.number: trial for trial, candidate in asked}
        for wanted, steps in rungs(size, self.steps):
            there = there[:wanted]
            if seconds is not None and self.spent > seconds:  # what is needed still: one that is trained to the end
                there = [] if self._finished() else there[:1]
                if steps < self.steps:
                    continue
            if not there:
                break
            for group in _groups(there, self.together):
                self._pass(group, steps)
            there = [self.candidates[c.number] for c in there]
            for c in there:
                if c.score is not None:
                    trials[c.number].report(c.score, steps)
            there = [c for c in ranked(there, self.maximize) if c.score is not None]
        for number in trials.keys() & self.candidates.keys():
            _tell(trials[number], self.candidates[number], self.steps)

    def _pass(self, group: Sequence[Candidate], steps: int, measuring: bool = False) -> None:
        """Train candidates side by side, or take from the journal what came of it."""
        at, numbers = len(self._done), [c.number for c in group]
        if at == len(self.journal.passes):
            scores, step_seconds = self.passes.train(group, steps)
            if not measuring:
                self._keep(group, scores, steps)
            self.journal.add(Pass(steps, scores, time.perf_counter() - self._last, step_seconds))
        done = self.journal.passes[at]
        if list(done.scores) != numbers or done.steps != steps:
            raise ValueError(
                f"{self.journal.directory} was written by another version of this library or of Optuna, which chooses "
                "other candidates: give another directory to begin a new search"
            )
        self._last = time.perf_counter()
        self._done.append(done)
        self.spent += done.seconds
        if not measuring:
            for c in group:
                self.candidates[c.number] = replace(c, steps=steps, score=done.scores[c.number])
            if self._finished():
                self.journal.keep_only(adapter_name(self.best(), self.steps))
        self._show()

    def _keep(self, group: Sequence[Candidate], scores: dict[int, float | None], steps: int) -> None:
        """Save the weights of a candidate that is the best so far of those that were trained to the end."""
        if steps < self.steps:
            return
        new = [replace(c, steps=steps, score=scores[c.number]) for c in group if scores[c.number] is not None]
        first = ranked([*self._finished(), *new], self.maximize)[:1]
        if first and first[0] in new:
            name = adapter_name(first[0], steps)
            self.passes.save(name, self.journal.place(name))


def _groups(candidates: Sequence[Candidate], most: int) -> list[list[Candidate]]:
    """Return candidates in groups that go through the base model together.

    What all of a group leave alone is recorded: so those that edit the first token are apart from the others, and where
    a group is divided, those that edit high layers are together.
    """
    groups = []
    for first in (False, True):
        every = [c for c in candidates if any(node.positions.begins_with_first for node in c.graph) == first]
        every.sort(key=lambda c: (min(c.layers), c.number))
        parts = -(-len(every) // most)
        groups += [every[len(every) * i // parts : len(every) * (i + 1) // parts] for i in range(parts)]
    return groups


def _asking(seed: int, direction: Literal["minimize", "maximize"]) -> Callable[[], Any]:
    """Return what gives one trial of Optuna after the other.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("rh.tune searches by Optuna: pip install 'reftheads[tune]'") from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=WIDTH, constant_liar=True)
        return optuna.create_study(sampler=sampler, direction=direction).ask
    finally:
        optuna.logging.set_verbosity(before)


def _tell(trial: Any, candidate: Candidate, steps: int) -> None:
    """Tell Optuna what became of a candidate; one without any score counts as worse than all others."""
    from optuna.trial import TrialState

    if candidate.steps == steps and candidate.score is not None:
        trial.study.tell(trial, candidate.score)
    else:
        trial.study.tell(trial, state=TrialState.PRUNED)


def _check(
    budget: Any, trials: Any, steps: Any, together: Any, metric: Any, direction: Any, **datasets: Any
) -> float | None:
    """Return the budget in seconds, `None` without one. Raise `ValueError` for what is no search."""
    for name, rows in datasets.items():
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ValueError(
                f"{name} must be rows in a list or Dataset, as from encode_pairs, got a {type(rows).__name__}"
            )
        if not count_rows(rows):
            raise ValueError(f"{name} is empty: give at least one row, as from encode_pairs")
    for name, count in (("trials", trials), ("steps", steps), ("together", together)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} must be a whole number from 1 up, got {count!r}")
    if direction not in (None, "minimize", "maximize"):
        raise ValueError(f"direction must be 'minimize' or 'maximize', got {direction!r}")
    if metric is not None and direction is None:
        raise ValueError("a metric needs a direction: 'minimize' or 'maximize'")
    if metric is None and direction == "maximize":
        raise ValueError("without a metric the held-out loss is minimised: leave direction out, or give a metric")
    if budget is None:
        return None if trials is not None else 600.0
    return seconds_of(budget)


def _name(metric: Any) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Let collections of garbage, of which every training makes one, not look through all that was there before."""
    if gc.get_freeze_count():  # somebody does so already
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a progress bar where somebody looks on."""
    console = Console(stderr=True)
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
