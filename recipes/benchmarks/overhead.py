"""What reftheads costs: each measurement is a function that prints one table.

    python recipes/benchmarks/overhead.py              # all of them
    python recipes/benchmarks/overhead.py orthonormal  # those whose name contains the word

Whatever is compared runs in turns in the same process, and medians are printed.
"""

import copy
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import reftheads as rh
from reftheads.graph import Context
from reftheads.graph.intervention import Shape
from reftheads.runtime.node_module import NodeModule


def main(*words: str) -> None:
    """Take each measurement whose name contains one of the words; without words, all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for measure in (orthonormal_cost, cost_of_a_node, generation_speed, import_time):
        if not words or any(word in measure.__name__ for word in words):
            measure()


def turns(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 10) -> dict[str, list[float]]:
    """Return milliseconds of each of `runs`, which take turns; the second of two calls is timed, as in a loop."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + warm_up):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[warm_up:] for name, values in times.items()}


def paired(first: list[float], second: list[float], relation: Callable[[float, float], float]) -> float:
    """Return the median of a relation within each turn, which the drift of a noisy machine does not touch."""
    return statistics.median(map(relation, first, second))


def orthonormal_cost(width: int = 4096, rank: int = 8, tokens: tuple[int, int] = (8, 14), repeats: int = 200) -> None:
    """Time LoReFT, deriving R from what is stored, against the same matrix products with R at hand.

    Target: forward at most 2×, forward and backward at most 3×.
    """
    node = NodeModule(rh.LoReFT(rank), Shape(width))
    r, w, b = (nn.Parameter(t.detach().clone()) for t in (node.R, node.W, node.b))
    h, gradient = torch.randn(*tokens, width), torch.randn(*tokens, width)
    h_trained = h.clone().requires_grad_()
    leaves = [*node.parameters(), r, w, b, h_trained]

    def ours(h: Tensor) -> Tensor:
        return node(None, h, Context())

    def plain(h: Tensor) -> Tensor:
        return h + (h @ w.T + b - h @ r.T) @ r

    def forward(edit: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            edit(h)

    def forward_backward(edit: Callable[[Tensor], Tensor], h: Tensor) -> None:
        edit(h).backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    cases: dict[str, tuple[float, Callable[[Callable[[Tensor], Tensor]], None]]] = {
        "forward": (2, forward),
        "forward + backward": (3, lambda edit: forward_backward(edit, h_trained)),
        "forward + backward, first edited layer": (3, lambda edit: forward_backward(edit, h)),
    }
    table = Table("pass", "plain products, ms", "LoReFT, ms", "ratio", "target", title="Orthonormality (CPU)")
    table.caption = f"width {width}, rank {rank}, {tokens[0]}×{tokens[1]} tokens, median of {repeats}"
    for name, (target, run) in cases.items():
        ms = turns({"plain": lambda run=run: run(plain), "ours": lambda run=run: run(ours)}, repeats)
        ratio = paired(ms["ours"], ms["plain"], operator.truediv)
        both = (f"{statistics.median(ms[which]):.2f}" for which in ("plain", "ours"))
        table.add_row(name, *both, f"{ratio:.2f}×", f"≤ {target}×")
    Console().print(table)


def llama(layers: int, width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4, vocab_size=1000
    )
    return LlamaForCausalLM(config).eval()


def with_bare_hooks(base: LlamaForCausalLM, rank: int) -> LlamaForCausalLM:
    """Return the least that a LoReFT of the last token in every block can cost: closures with R at hand."""

    def hook(r: Tensor, w: Tensor, b: Tensor) -> Callable[..., Tensor]:
        def edit(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            h = output[:, -1]
            output = output.clone()
            output[:, -1] = h + (h @ w.T + b - h @ r.T) @ r
            return output

        return edit

    for block in base.model.layers:
        node = NodeModule(rh.LoReFT(rank), Shape(base.config.hidden_size))
        block.register_forward_hook(hook(node.R, node.W.detach(), node.b.detach()))
    return base


def with_pyreft(base: LlamaForCausalLM, rank: int, tokens: int) -> Callable[[Tensor], object]:
    """Return a forward pass with the same edits by pyreft."""
    import pyreft

    width, layers = base.config.hidden_size, base.config.num_hidden_layers
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=rank, dtype=torch.float32),
        }
        for layer in range(layers)
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations), set_device=False)
    where = {"sources->base": (None, [[[tokens - 1]]] * layers)}
    return lambda ids: model({"input_ids": ids}, unit_locations=where)


def cost_of_a_node(layers: int = 32, width: int = 256, rank: int = 4, tokens: int = 16, repeats: int = 60) -> None:
    """Time what a LoReFT of the last token adds to a forward pass, a node in every block.

    Target: at most 0.10 ms a node, at most a fifth of pyreft.
    """
    base = llama(layers, width)
    ours = rh.InterventionModel(
        copy.deepcopy(base), rh.InterventionGraph.over(rh.LoReFT(rank), range(layers), positions="l1")
    ).eval()
    hooked = with_bare_hooks(copy.deepcopy(base), rank)
    pyreft = with_pyreft(copy.deepcopy(base), rank, tokens)
    ids = torch.randint(0, 1000, (1, tokens))
    runs: dict[str, Callable[[], object]] = {
        "base model": lambda: base(ids),
        "bare hooks": lambda: hooked(ids),
        "reftheads": lambda: ours(ids),
        "pyreft": lambda: pyreft(ids),
    }
    with torch.no_grad():
        ms = turns(runs, repeats)
    added = {name: paired(values, ms["base model"], operator.sub) / layers for name, values in ms.items()}
    table = Table("", "forward, ms", "added a node, ms", "of pyreft's", title=f"{layers} LoReFT nodes (CPU)")
    table.caption = f"width {width}, rank {rank}, 1×{tokens} tokens, median of {repeats}; target ≤ 0.10 ms, ≤ 0.20×"
    for name, values in ms.items():
        share = "" if name == "base model" else f"{added[name] / added['pyreft']:.2f}×"
        table.add_row(name, f"{statistics.median(values):.2f}", f"{added[name]:.3f}" if share else "", share)
    Console().print(table)


def generation_speed(layers: int = 8, width: int = 256, new_tokens: int = 64, repeats: int = 20) -> None:
    """Count tokens a second of greedy decoding with edits of the prompt alone, against the base model.

    Target: at least 0.98×.
    """
    base = llama(layers, width)
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=4), range(layers), positions="f1+l1")
    ours = rh.InterventionModel(copy.deepcopy(base), graph).eval()
    ids = torch.randint(0, 1000, (4, 32))
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    ms = turns(
        {
            "base model": lambda: base.generate(ids, attention_mask=mask, **options),
            "reftheads": lambda: ours.generate(input_ids=ids, attention_mask=mask, **options),
        },
        repeats,
        warm_up=2,
    )
    table = Table("", "tokens/s", "of the base", title=f"Decoding with {layers} prompt-only edits (CPU)")
    table.caption = f"width {width}, 4 rows of 32 + {new_tokens} tokens, median of {repeats}; target ≥ 0.98×"
    for name, values in ms.items():
        ratio = paired(ms["base model"], values, operator.truediv)
        table.add_row(name, f"{4e3 * new_tokens / statistics.median(values):.0f}", f"{ratio:.3f}×")
    Console().print(table)


def import_time(repeats: int = 3) -> None:
    """Time `import reftheads` after torch, transformers and peft. Target: at most 0.3 s."""
    program = (
        "import torch, transformers, peft, time; start = time.perf_counter(); import reftheads; "
        "print(time.perf_counter() - start)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    table = Table("", "seconds", title="Import")
    table.add_row("import reftheads, after torch, transformers and peft", f"{statistics.median(times):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
