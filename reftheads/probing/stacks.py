"""Probes of one kind as one stack: their inputs, targets, weights and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from reftheads.graph.intervention import Params, Shape
from reftheads.interventions.heads import LinearHead, MappingHead
from reftheads.probing.recording import Seen
from reftheads.probing.targets import Column
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

_CACHED = 2**18  # numbers: a step on a CPU is slower where the stacked activations of a batch are many more
_AT_ONCE = 2**22  # numbers, of activations, where nothing is trained

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Stack:
    """Hold probes of one kind on the same items: P sites, M members per site, N items.

    The members of a site are one for each target, seed, and task (the target itself or its control): M = T × S × C,
    in this order.
    """

    head: MappingHead
    planned: list[list[PlannedNode]]  # of each site, by target
    x: Float[Tensor, "P N width"]  # minus mean, by scale
    y: Shaped[Tensor, "P M N *target_width"]
    rows: Int[Tensor, " N"]
    mean: Float[Tensor, "P width"]
    scale: Float[Tensor, "P width"]
    seeds: int
    kinds: int  # C: 2 with a control task

    @classmethod
    def of(
        cls,
        sites: list[list[Seen]],
        columns: Mapping[str, Column],
        types: Mapping[str, Int[Tensor, " items"]],
        seeds: Sequence[int],
    ) -> Stack:
        first = sites[0][0]
        x = torch.stack([site[0].x for site in sites])
        moments = [torch.std_mean(of_site.double(), 0, correction=0) for of_site in x]
        deviation, mean = (torch.stack(of_sites) for of_sites in zip(*moments, strict=True))
        if not first.head.bias:
            deviation, mean = (deviation.square() + mean.square()).sqrt(), torch.zeros_like(mean)
        scale = torch.where(deviation > 1e-6 * deviation.amax(1, keepdim=True), deviation, 1).to(x.dtype)
        mean = mean.to(x.dtype)
        targets = torch.stack([torch.cat([_tasks(one, columns, types, seeds) for one in site]) for site in sites])
        return cls(
            first.head,
            [[one.planned for one in site] for site in sites],
            x.sub_(mean[:, None]).div_(scale[:, None]),
            targets,
            columns[str(first.head.target)].row.to(x.device)[first.items],
            mean,
            scale,
            len(seeds),
            1 + bool(types),
        )

    def of_members(self, part: Shaped[Tensor, "seeds N"]) -> Shaped[Tensor, "M N"]:
        """Repeat what holds for a seed for all of its members."""
        return part.repeat_interleave(self.kinds, 0).repeat(self.y.shape[1] // (self.seeds * self.kinds), 1)

    def member(self, task: int, seed: int = 0, kind: int = 0) -> int:
        """Return the number of the member of a target, a seed, and the target (0) or its control task (1)."""
        return (task * self.seeds + seed) * self.kinds + kind

    def begin(self, seeds: Sequence[int]) -> dict[str, nn.Parameter]:
        """Make new weights, [P M …] each; they are the same for all sites, targets and kinds of a seed."""
        made = []
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made.append(self.head.parameters(Shape(self.x.shape[2])))
        members = self.y.shape[1] // (len(seeds) * self.kinds)
        weights = {}
        for name in made[0]:
            of_seeds = torch.stack([of_seed[name].detach() for of_seed in made]).to(self.x.device)
            whole = of_seeds.repeat_interleave(self.kinds, 0).repeat(members, *[1] * (of_seeds.ndim - 1))
            weights[name] = nn.Parameter(whole.expand(len(self.x), *whole.shape).clone())
        return weights

    def predict(self, p: Params, h: Float[Tensor, "P items width"]) -> Float[Tensor, "P M items outputs"]:
        if isinstance(self.head, LinearHead):  # all members of a site in one product
            W, b = p["W"].flatten(1, 2), p.get("b")
            if len(h) == 1:
                z = F.linear(h, W[0], None if b is None else b.flatten())
            else:
                z = h @ W.mT if b is None else torch.baddbmm(b.flatten(1)[:, None], h, W.mT)
            return z.unflatten(2, p["W"].shape[1:3]).transpose(1, 2)
        return vmap(vmap(self.head.map, (0, None)))(dict(p), h)

    def losses(self, p: Params, items: Int[Tensor, " items"], counts: Float[Tensor, "M N"]) -> tuple[Tensor, Tensor]:
        """Return the losses of some items, [P M n], and their weights in the mean: `counts`, times class weights."""
        loss = self.head.criterion
        z = self.predict(p, self.x.index_select(1, items))
        y, w = self.y.index_select(2, items), counts.index_select(1, items)
        z = self.head.shown(z) if loss.activated else z
        if loss.each:
            present = self.head.given(y)
            z, y, w = z.unsqueeze(-1), y.masked_fill(~present, 0), w[..., None] * present
        elif self.head.class_weights is not None:
            w = w * z.new_tensor(self.head.class_weights)[y.long()]
        return loss(z.flatten(0, -2), y.flatten()).view(*y.shape[:2], -1), w.expand(y.shape).flatten(2)

    def mean_loss(self, p: Params, items: Int[Tensor, " items"], counts: Float[Tensor, "M N"]) -> Float[Tensor, "P M"]:
        """Return the mean loss over many items, without gradient."""
        total = weight = self.x.new_zeros(self.y.shape[:2])
        with torch.no_grad():
            for batch in items.split(self.at_once):
                loss, w = self.losses(p, batch, counts)
                total, weight = total + (loss * w).sum(-1), weight + w.sum(-1)
        return total / weight.clamp(min=1e-12)

    @property
    def at_once(self) -> int:
        """Return how many items fit well into one pass in which nothing is trained."""
        return max(_AT_ONCE // (len(self.x) * max(self.x.shape[2], self.y.shape[1] * self.head.outputs)), 1)

    def first(self, weights: Params) -> dict[str, Weights]:
        """Return, by node, the weights of the first seed for inputs as the model has them, neither moved nor scaled."""
        by_node = {}
        for i, site in enumerate(self.planned):
            for task, planned in enumerate(site):
                of_node = {name: w[i, self.member(task)].clone() for name, w in weights.items()}
                W, b = ("W", "b") if "W" in of_node else ("W0", "b0")
                of_node[W] /= self.scale[i]
                if b in of_node:
                    of_node[b] -= of_node[W] @ self.mean[i]
                by_node[str(planned.node.name)] = of_node
        return by_node


def stacks_of(
    seen: list[Seen],
    columns: Mapping[str, Column],
    rows: Sequence[Mapping[str, Any]],
    control: str | None,
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[Stack]:
    """Yield stacks of the heads with the same options on the same items, of as many sites as make a step fast."""
    alike: list[tuple[Any, Tensor, dict[int, list[Seen]]]] = []
    for one in seen:
        kind = (replace(one.head, target=None), one.x.shape[1], one.x.dtype)
        sites = next((s for k, items, s in alike if k == kind and torch.equal(items, one.items)), None)
        if sites is None:
            sites = {}
            alike.append((kind, one.items, sites))
        sites.setdefault(one.site, []).append(one)
    types: dict[tuple[str, bool], Tensor] = {}
    for (head, width, _), items, sites in alike:
        fast = max(_CACHED // (batch_size * width), 1) if items.device.type == "cpu" else len(sites)
        for count in dict.fromkeys(map(len, sites.values())):
            of_count = [site for site in sites.values() if len(site) == count]
            for start in range(0, len(of_count), fast):
                together = of_count[start : start + fast]
                of_targets = {}
                names = {str(one.head.target) for site in together for one in site}
                for name in names if control is not None else ():
                    if (name, head.shift) not in types:
                        types[name, head.shift] = columns[name].types(control, rows, head.shift)  # type: ignore[arg-type]
                    of_targets[name] = types[name, head.shift]
                yield Stack.of(together, columns, of_targets, seeds)


def _tasks(
    one: Seen, columns: Mapping[str, Column], types: Mapping[str, Tensor], seeds: Sequence[int]
) -> Shaped[Tensor, "members items *target_width"]:
    """Return the targets of a head for every seed: the column's, and random ones by type if there is a control."""
    name = str(one.head.target)
    targets = columns[name].values.to(one.items.device)[one.items]
    if not types:
        return targets.expand(len(seeds), *targets.shape)
    tasks = []
    of_items = types[name].to(one.items.device)[one.items]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(targets), (int(types[name].max()) + 1,), generator=generator).to(targets.device)
        tasks += [targets, targets[drawn][of_items]]
    return torch.stack(tasks)
