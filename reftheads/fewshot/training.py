"""When to stop, and what LoRA costs."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from transformers import TrainerCallback

from reftheads.adapter.model import InterventionModel
from reftheads.interventions.lora import LoRA


class StopWhen(TrainerCallback):
    """Stop training once a logged training metric is below or above a bound.

    The Trainer logs every `logging_steps`; heads' losses are `loss_<name>`. For metrics of an evaluation there is
    transformers' `EarlyStoppingCallback`.

    Args:
        metric: such as "loss".
        below, above: the bound; give one of the two.
        patience: how many logs in a row must be beyond the bound.

    Raises:
        ValueError: no bound or two, or patience below 1; at the first log, a metric that is not logged.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> from transformers import TrainerControl
        >>> stop, control = fs.StopWhen("loss", below=0.1), TrainerControl()  # Trainer(…, callbacks=[stop]) does this
        >>> [stop.on_log(None, None, control, {"loss": loss}).should_training_stop for loss in (0.5, 0.2, 0.05)]
        [False, False, True]
        ```
    """

    def __init__(self, metric: str, *, below: float | None = None, above: float | None = None, patience: int = 1):
        if (below is None) == (above is None) or patience < 1:
            raise ValueError(f"give below or above, and patience of 1 or more, got {below}, {above} and {patience}")
        self.metric, self.below, self.above, self.patience = metric, below, above, patience
        self._beyond = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._beyond = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> Any:
        if not logs or "loss" not in logs:  # of an evaluation, or of the whole training
            return control
        if self.metric not in logs:
            raise ValueError(f"the metric {self.metric!r} is not logged: there are {', '.join(logs)}")
        value = logs[self.metric]
        beyond = value < self.below if self.below is not None else value > self.above  # type: ignore[operator]
        self._beyond = self._beyond + 1 if beyond else 0
        control.should_training_stop = control.should_training_stop or self._beyond >= self.patience
        return control


def lora_ratio(rank: int, inputs: int, outputs: int) -> float:
    """Return the number of parameters of LoRA of rank r over that of its weight, r (d₁ + d₂) / (d₁ d₂).

    Args:
        inputs, outputs: d₁ and d₂, the widths of the weight.

    Raises:
        ValueError: a number below 1.

    Example:
        ```python
        >>> import reftheads.fewshot as fs
        >>> f"{fs.lora_ratio(4, 1024, 1024):.2%}"
        '0.78%'
        ```
    """
    if min(rank, inputs, outputs) < 1:
        raise ValueError(f"rank and widths must be 1 or more, got {rank}, {inputs} and {outputs}")
    return rank * (inputs + outputs) / (inputs * outputs)


def lora_table(model: InterventionModel) -> Table:
    """Make a table of what LoRA costs: a row for every node, with a total.

    The columns are the widths, the rank, the number of parameters, their ratio to those of the weight beside them, and
    the KiB that they take.

    Example:
        ```python
        >>> import reftheads as rh
        >>> import reftheads.fewshot as fs
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> table = fs.lora_table(fs.fine_tuning_model(base, "lora4:cs330"))
        >>> [(column.header, list(column.cells)[-1]) for column in table.columns[4:]]
        [('parameters', '69,120'), ('of the weight', '3.47%'), ('KiB', '270.0')]
        ```
    """
    table = Table("module", "inputs", "outputs", "rank", "parameters", "of the weight", "KiB")
    parameters = whole = stored = 0
    for planned in model.plan().nodes:
        lora, shape = planned.node.intervention, planned.shape
        if not isinstance(lora, LoRA):
            continue
        assert shape.input_width is not None
        tensors = list(model.node(str(planned.node.name)).parameters())
        count, size = sum(p.numel() for p in tensors), sum(p.nbytes for p in tensors)
        ratio = lora_ratio(lora.rank, shape.input_width, shape.width)
        widths = map(str, (shape.input_width, shape.width, lora.rank))
        table.add_row(planned.address.module, *widths, f"{count:,}", f"{ratio:.2%}", f"{size / 1024:,.1f}")
        parameters, whole, stored = parameters + count, whole + shape.input_width * shape.width, stored + size
    share = f"{parameters / whole:.2%}" if whole else ""
    table.add_row("total", "", "", "", f"{parameters:,}", share, f"{stored / 1024:,.1f}")
    return table
