"""How the tests are run: offline, torch on one thread, slow ones first; with `--quick`, one test of each claim."""

from __future__ import annotations

import gc
import os
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# before torch is imported, here by the tests and in the processes that they start
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
pytest.register_assert_rewrite("support")  # an assertion there shows its values, too


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads take longer than one for models as small as these."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, with a chat template; see `support.models.word_tokenizer`."""
    from support.models import word_tokenizer

    return word_tokenizer()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="one test of each claim: the first parameters of each, and no slow ones"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if re.search(r"0x[0-9a-f]{6,}", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} names an address in memory, which differs by worker: give ids")
    if config.getoption("--quick"):
        chosen = {item.nodeid.split("[")[0]: item for item in reversed(items) if not item.get_closest_marker("slow")}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen.values()])
        items[:] = reversed(chosen.values())
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # no worker is left alone with one at the end


def pytest_collection_finish() -> None:
    """Leave all that was imported out of garbage collections, which every training makes, and most of it was that."""
    gc.collect()
    gc.freeze()
