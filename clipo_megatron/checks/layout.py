"""Checks of the layout: with the ranks that were started, and whether it can divide the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import LayoutConfig


def layout_problems(layout: LayoutConfig, ranks: int | None) -> Iterator[ConfigProblem]:
    """Problems of a layout by itself, and with the number of `ranks` that were started; None: there are none yet."""
    if layout.sequence_parallel and layout.tp == 1:
        reason = "it shards the sequence over the tensor-parallel ranks, and layout.tp is 1"
        yield ConfigProblem("layout.sequence_parallel", reason, "Set it to false, or layout.tp to 2 or more", True)
    model = layout.replica_ranks
    if ranks is None or model < 1:
        return
    if layout.dp is None and ranks % model:
        yield ConfigProblem(
            "",
            f"{ranks} ranks were started, which {_product(layout)} = {model} does not divide",
            f"Start {_multiples(ranks, model)} ranks, or change layout.tp, layout.cp or layout.pp",
            show_value=False,
        )
    elif layout.dp is not None and ranks != (needed := model * layout.dp):
        reason = f"{_product(layout, 'dp')} = {needed}, but {ranks} ranks were started"
        remedy = f"Start {needed} ranks, or set layout.dp to null to use those there are"
        yield ConfigProblem("layout.dp", reason, remedy, layout.dp)


def _product(layout: LayoutConfig, *others: str) -> str:
    """How ranks are counted: "tp * pp = 2 * 4"."""
    names = ["tp", *(["cp"] if layout.cp > 1 else []), "pp", *others]
    return f"{' * '.join(names)} = {' * '.join(str(getattr(layout, name)) for name in names)}"


def _multiples(near: int, unit: int) -> str:
    below, above = near // unit * unit, (near // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)


def division_problems(layout: LayoutConfig, facts: dict[str, Any], replicas: int) -> Iterator[ConfigProblem]:
    """Problems of dividing the model whose config.json has these `facts`, with `replicas` data-parallel replicas."""
    yield from _tensors(layout, facts)
    yield from _stages(layout, int(facts.get("num_hidden_layers", 0)))
    yield from _experts(layout, facts, replicas)


def _tensors(layout: LayoutConfig, facts: dict[str, Any]) -> Iterator[ConfigProblem]:
    heads, wide = (int(facts.get(name, 0)) for name in ("num_attention_heads", "intermediate_size"))
    groups = int(facts.get("num_key_value_heads") or heads)

    def fits(size: int) -> bool:
        # With fewer key-value heads than ranks, each head is replicated on tp / groups of them.
        return heads % size == 0 and wide % size == 0 and (groups % size == 0 or size % groups == 0)

    if layout.tp > 1 and not fits(layout.tp):
        if heads % layout.tp:
            reason = f"it does not divide the model's {heads} attention heads"
        elif wide % layout.tp:
            reason = f"it does not divide the model's intermediate size, {wide}"
        else:
            reason = f"it neither divides the model's {groups} key-value heads nor is a multiple of them"
        valid = [size for size in range(1, heads + 1) if fits(size)]
        yield ConfigProblem("layout.tp", reason, f"Valid for this model: {_listed(valid)}", layout.tp)


def _stages(layout: LayoutConfig, layers: int) -> Iterator[ConfigProblem]:
    ends = {
        f"layout.{name}": value
        for name in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(layout, name)) is not None
    }
    if layout.pp <= 1:
        for key, value in ends.items():
            yield ConfigProblem(key, "there is one pipeline stage, and it has all layers", "Set it to null", value)
        return
    if not ends and layers % layout.pp:
        valid = [size for size in range(1, layers + 1) if layers % size == 0]
        reason = f"it does not divide the model's {layers} layers into equal stages"
        remedy = f"Valid for this model: {_listed(valid)}; or set layout.first_stage_layers or last_stage_layers"
        yield ConfigProblem("layout.pp", reason, remedy, layout.pp)
    if ends:
        others, left = layout.pp - len(ends), layers - sum(ends.values())
        if (others and (left < others or left % others)) or (not others and left):
            between = f"{others} equal stages" if others else "nothing"
            reason = f"it leaves {left} of the model's {layers} layers for {between}"
            yield ConfigProblem(
                next(iter(ends)), reason, "Change it, layout.last_stage_layers or layout.pp", next(iter(ends.values()))
            )


def _experts(layout: LayoutConfig, facts: dict[str, Any], replicas: int) -> Iterator[ConfigProblem]:
    count = facts.get("num_experts") or facts.get("num_local_experts")
    etp = layout.tp if layout.etp is None else layout.etp
    if not count:
        for name, value, default in (("ep", layout.ep, 1), ("etp", layout.etp, None)):
            if value != default:
                yield ConfigProblem(
                    f"layout.{name}", "the model has no experts", f"Set it to {default or 'null'}", value
                )
        return
    if layout.ep < 1 or etp < 1 or layout.tp < 1:
        return  # their ranges say so
    if count % layout.ep:
        valid = [size for size in range(1, count + 1) if count % size == 0]
        reason = f"it does not divide the model's {count} experts"
        yield ConfigProblem("layout.ep", reason, f"Valid for this model: {_listed(valid)}", layout.ep)
    wide = int(facts.get("moe_intermediate_size", 0))
    if wide % etp:
        reason = f"it does not divide the inner size of an expert, {wide}"
        yield ConfigProblem("layout.etp", reason, "Set it to 1", etp)
    if (layout.tp * layout.cp * replicas) % (layout.ep * etp):
        reason = (
            f"ep * etp = {layout.ep} * {etp} does not divide the ranks of a pipeline stage, "
            f"tp * {'cp * ' if layout.cp > 1 else ''}dp = {layout.tp * layout.cp} * {replicas}"
        )
        remedy = f"Set layout.dp so that it does, or layout.etp{'=1' if etp > 1 else ' or layout.tp'}"
        yield ConfigProblem("layout.ep", reason, remedy, layout.ep)
    if layout.tp > 1 and not layout.sequence_parallel:
        reason = "a model with experts trains on several tensor-parallel ranks only if they share the sequence"
        yield ConfigProblem("layout.sequence_parallel", reason, "Set it to true", layout.sequence_parallel)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
