"""Few-shot learning: fine-tuning modes, in-context learning, tasks and their scores.

Everything of the study "fine-tuning and in-context learning with small pretrained models" (problem set 4 of Stanford's
CS330) as pieces for a script of one's own; recipes/few_shot_finetune.py and its neighbours put them together.
"""

from reftheads.fewshot.decoding import greedy_sample, score_labels
from reftheads.fewshot.finetuning import MODES, fine_tuning_model, parameters_to_fine_tune
from reftheads.fewshot.metrics import (
    accuracy,
    exact_match,
    masked_accuracy,
    ngram_overlap,
    rouge,
    shifted_cross_entropy,
)
from reftheads.fewshot.prompts import Format, encode_prompt, formats, icl_prompts, k_shot, order_by_entropy
from reftheads.fewshot.study import Study, over_seeds, plot, table_of
from reftheads.fewshot.tasks import RATINGS, Example, Task, load_task
from reftheads.fewshot.training import StopWhen, lora_ratio, lora_table

__all__ = [
    "Example", "Format", "MODES", "RATINGS", "StopWhen", "Study", "Task", "accuracy", "encode_prompt", "exact_match",
    "fine_tuning_model", "formats", "greedy_sample", "icl_prompts", "k_shot", "load_task", "lora_ratio", "lora_table",
    "masked_accuracy", "ngram_overlap", "order_by_entropy", "over_seeds", "parameters_to_fine_tune", "plot", "rouge",
    "score_labels", "shifted_cross_entropy", "table_of",
]  # fmt: skip
