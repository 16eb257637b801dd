"""Text of a plan, as `sbs plan` prints it."""

from collections.abc import Callable, Sequence
from typing import Any

from sbs_jax import chips
from sbs_jax.plan import worker
from sbs_jax.plan.command import mesh_title, micro_title

_NOTICE = 30  # seconds between the signal and the end of a preempted machine on Google Cloud


def text(plan: dict[str, Any]) -> str:
    """Formats a plan as `sbs plan` prints it."""
    config, tried = plan["configuration"], plan["candidates"]
    lines = [
        f"{config['task']}, {config['parameters'] / 1e6:,.1f} M parameters, {config['dtype']}; an update is "
        f"{config['batch_size']} rows of {config['inputs']} + {config['targets']} tokens.",
        *_tuning(config),
        f"Estimates throughout, by libtpu {plan['libtpu']} (the TPU compiler) and link speeds; nothing ran.",
    ]
    if len(tried) > 1:
        lines += ["", *_grid(_overview(tried), left=(1, 3))]
        lines += [f"  {number}: {one['refused']}" for number, one in enumerate(tried, 1) if one["refused"]]
    shown = {place for place in plan["suggestion"].values() if place is not None} if len(tried) > 4 else None
    for number, one in enumerate(tried, 1):
        if shown is None or number - 1 in shown:
            lines += ["", *_details(one, number if len(tried) > 1 else None)]
    if plan["measured"] is not None:
        lines += ["", *_measured(plan["measured"], tried)]
    lines += ["", *_money(plan), "", *_suggestion(plan)]
    return "\n".join(lines)


def _tuning(config: dict[str, Any]) -> list[str]:
    if config["tuning"] is None:
        return []
    share = config["trained"] / config["parameters"]
    return [f"Trained: {config['tuning']}; {config['trained']:,} parameters, {share:.2%} as many as the model has."]


def _name(one: dict[str, Any]) -> str:
    return one["topology"] if one["slices"] == 1 else f"{one['slices']} x {one['topology']}"


def _overview(tried: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "topology", "chips", "mesh", "micro-batches", "memory GiB", "step ms", "MFU", "tokens/s/chip", "$/h"]]
    for number, one in enumerate(tried, 1):
        step = one["steps"].get(worker.TRAIN, {})
        rows.append(
            [
                str(number),
                _name(one),
                str(one["chips"]),
                mesh_title(one["mesh"]),
                str(one["micro_batches"]),
                _memory(step) if step else "refused",
                *(
                    [
                        f"{one['step_seconds'] * 1e3:,.2f}",
                        f"{one['utilisation']:.1%}",
                        f"{one['tokens_per_second_per_chip']:,.0f}",
                    ]
                    if "step_seconds" in one
                    else ["", "", ""]
                ),
                f"{one['usd_per_chip_hour'] * one['chips']:,.2f}",
            ]
        )
    return rows


def _memory(step: dict[str, Any]) -> str:
    """Returns "12.40 of 15.75", and the excess if it does not fit."""
    if "needs" not in step:
        return "unknown"
    needs, available = step["needs"] / chips.GIB, step["available"] / chips.GIB
    short = "" if step["fits"] else f", {needs - available:,.2f} too many"
    return f"{needs:,.2f} of {available:,.2f}{short}"


def _details(one: dict[str, Any], number: int | None) -> list[str]:
    hosts = "" if one["hosts"] is None else f" of {one['hosts']} host{'s' * (one['hosts'] > 1)}"
    title = "" if number is None else f"{number}: "
    lines = [
        f"{title}{_name(one)}, {one['chips']} chip{'s' * (one['chips'] > 1)}{hosts}, mesh {mesh_title(one['mesh'])}, "
        f"{micro_title(one['micro_batches'])}"
    ]
    if not one["steps"]:
        return [*lines, f"  refused: {one['refused']}"]
    steps = one["steps"]

    def row(name: str, show: Callable[[dict[str, Any]], str | None]) -> list[str]:
        return [f"  {name}", *(show(step) or "" for step in steps.values())]

    def held(*parts: str) -> Callable[[dict[str, Any]], str | None]:
        def show(step: dict[str, Any]) -> str | None:
            found = [step["memory"][part] for part in parts if part in step.get("memory", {})]
            return _size(sum(found)) if found else None

        return show

    def milliseconds(part: str) -> Callable[[dict[str, Any]], str | None]:
        return lambda step: f"{step[part] * 1e3:,.3f} ms" if step.get(part) is not None else None

    rows = [
        ["", *steps],
        row("memory per device, GiB", _memory),
        row("  parameters", held("parameters")),
        row("  optimizer state", held("optimizer")),
        row("  teacher", held("teacher")),
        row("  batch", held("batch")),
        row("  activations, temporaries", held("temporaries")),
        row("  results, program", held("outputs", "program")),
        row("cycles", lambda step: f"{step['cycles'] / 1e6:,.3f} M" if "cycles" in step else None),
        row("computing", milliseconds("compute_seconds")),
        row("exchanging, at least", milliseconds("communication_seconds")),
        row("  not beside computing", milliseconds("exposed_seconds")),
        row("per token", milliseconds("seconds_per_token")),
        row("time of all", milliseconds("seconds")),
        row("compiled in", lambda step: f"{step['compile_seconds']:.1f} s" if "compile_seconds" in step else None),
    ]
    lines += _grid([line for line in rows if any(line[1:])])
    if "step_seconds" in one:
        lines.append(
            f"  Training: {one['tokens_per_second_per_chip']:,.0f} tokens/s per chip (padding counts), model FLOP "
            f"utilisation {one['utilisation']:.1%} ({one['utilisation_computing']:.1%} of the computing alone)."
        )
    size, count = one["checkpoint_bytes"], one["hosts"]
    if size is not None and count is not None:
        lines.append(f"  {_checkpoint(size, hosts=count)}")
    for name, step in steps.items():
        lines += [f"  {name}: {note}" for note in _notes(step)]
    return lines


def _measured(found: dict[str, Any], tried: Sequence[dict[str, Any]]) -> list[str]:
    """Puts the step of a run beside the estimates."""
    step = found["seconds_per_step"]
    more = [
        f"MFU {found['utilisation']:.1%}" if "utilisation" in found else "",
        f"{found['device_memory_gib']:.1f} GiB a device at most" if "device_memory_gib" in found else "",
        f"goodput {found['goodput']:.1%}" if found["goodput"] is not None else "",
    ]
    about = "".join(f", {each}" for each in more if each)
    lines = [f"Measured in {found['run']}, {len(found['devices'])} devices: {step * 1e3:,.2f} ms per update{about}."]
    for one in tried:
        if "step_seconds" in one:
            ratio = step / one["step_seconds"]
            lines.append(f"  {ratio:.2f} times the {one['step_seconds'] * 1e3:,.2f} ms estimated for {_name(one)}.")
    return lines


def _checkpoint(size: int, *, hosts: int) -> str:
    """Says what each host writes in a save, and how fast it must to end within a spot machine's notice."""
    share = size / hosts
    return (
        f"Checkpoint: {size / 1e9:,.1f} GB, {share / 1e9:,.1f} GB a host. To be saved within a notice of {_NOTICE} s, "
        f"each host must write {share / _NOTICE / 1e6:,.0f} MB/s."
    )


def _notes(step: dict[str, Any]) -> list[str]:
    """Lists the costs that a step's figures do not include."""
    if step.get("refused"):
        return [f"refused: {step['refused']}"]
    notes = []
    if step.get("collectives"):
        kinds = (f"{v['count']:.0f} {kind} of {_size(v['bytes'])}" for kind, v in step["collectives"].items())
        notes.append("exchanges " + ", ".join(kinds) + ".")
    if step.get("without_estimate"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in step["without_estimate"].items())
        total = sum(step["without_estimate"].values())
        notes.append(f"{total} operations without an estimate, not in the cycles: {kinds}.")
    if step.get("loops_counted_once"):
        notes.append(f"{step['loops_counted_once']} loops of unknown length, counted once.")
    if step.get("rematerializations"):
        notes.append(f"the compiler copies {step['rematerializations']} arrays to every device (a wrong sharding).")
    return notes


def _size(number: int | float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:.0f} B"


def _money(plan: dict[str, Any]) -> list[str]:
    """Tabulates chip-hours and cost of an epoch and of the run, per candidate."""
    rows = [["", "topology", "mesh", "USD per chip-hour", "epoch", "chip-hours", "USD", "run", "chip-hours", "USD"]]
    for number, one in enumerate(plan["candidates"], 1):
        if one["fits"] and "run" in one:
            row = [str(number), _name(one), mesh_title(one["mesh"]), f"{one['usd_per_chip_hour']:.2f}"]
            for part in ("epoch", "run"):
                cost = one.get(part)
                if cost is None:
                    row += ["unknown", "", ""]
                else:
                    row += [_duration(cost["hours"]), f"{cost['chip_hours']:,.2f}", _usd(cost["usd"])]
            rows.append(row)
    if len(rows) == 1:
        return ["No cost: nothing fits."]
    epoch, steps = plan["epoch"], plan["configuration"]["train_steps"]
    updates = "" if epoch["updates"] is None else f"{epoch['updates']:,} updates, {epoch['examples']:,} examples, "
    price = plan["chips"]["price"]
    named = {"on_demand": "on demand", "three_years": "with a three-year commitment"}
    prices = (
        f"list prices {named[price]}, written from memory on {plan['chips']['date']}" if price in named else "--price"
    )
    return [
        f"Cost of training alone, at {prices}.",
        f"Epoch: {updates}{epoch['source']}. Run: {steps:,} updates.",
        *_grid(rows, left=(1, 2)),
    ]


def _usd(amount: int | float) -> str:
    return f"{amount:,.2f}" if amount >= 0.005 else "below 0.01"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _suggestion(plan: dict[str, Any]) -> list[str]:
    tried, places = plan["candidates"], plan["suggestion"]
    if places["smallest"] is None:
        return ["Suggestion: none of these fits. Try more chips, fsdp, more micro-batches or a smaller batch."]

    def says(place: int) -> str:
        one = tried[place]
        return (
            f"{_name(one)}, mesh {mesh_title(one['mesh'])}, {micro_title(one['micro_batches'])}: "
            f"{one['step_seconds'] * 1e3:,.2f} ms per update, "
            f"USD {_usd(one['run']['usd'])} for the run"
        )

    roles: dict[int, list[str]] = {}
    for role, place in places.items():
        roles.setdefault(place, []).append(role)
    tries = f"of the {len(tried)} tried" if len(tried) > 1 else "the only one tried"
    return [f"Suggestion, {tries}:", *(f"  {', '.join(names)}: {says(place)}" for place, names in roles.items())]


def _grid(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Aligns columns to their widest cell; columns in `left` are left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
