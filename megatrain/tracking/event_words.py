"""The events of a run in words, for the console, the report and `megatrain inspect`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatrain.config.plain import plain
from megatrain.resilience.signals import signal_name

SOURCE_LOSS = "heldout_loss/"
"""How the key of one source's held-out loss begins."""

DIGITS = 4
"""Significant digits of a figure in a sentence."""


def describe(event: dict[str, Any]) -> str:
    """Return an event as a line of the console."""
    step, what = event.get("step"), details(event)
    lines = {
        "change": f"changed: {what}",
        "signal": f"{what} at step {step}: the run saves and ends",
        "preflight": f"preflight: {what}",
        "save": f"saved {what}",
        "evaluate": f"step {step}: {what}",
        "tasks": f"step {step}: {what}",
        "heldout_replies": f"step {step}: {what}",
        "packing": f"packed {what}",
        "mixture": f"read of each source: {what}",
        "init_from": f"the weights are those of {what}",
        "teacher": f"the teacher is {what}",
    }
    kind = event["kind"]
    return lines.get(kind) or f"{_words(kind)} at step {step}" + (f": {what}" if what else "")


def details(event: dict[str, Any]) -> str:
    """Return what an event says besides its kind and step: a sentence for the usual kinds, else its fields."""
    tell = _DETAILS.get(event["kind"], _fields)
    try:
        return tell(event)
    except (KeyError, TypeError, ValueError, AttributeError):  # a field is missing, or another program wrote the event
        return _fields(event)


def describe_sources(sources: dict[str, Any]) -> str:
    """Return what a run has read of each source of its mixture: `web 70.0% (0.11 epochs), code 30.0% (2.40 epochs)`."""
    return ", ".join(f"{name} {seen['share']:.1%} ({seen['epochs']:.2f} epochs)" for name, seen in sources.items())


def change(before: Any, now: Any) -> str:
    """Return two values that differ, with as many digits as show it."""
    first, second = plain(before, DIGITS), plain(now, DIGITS)
    if first == second:
        first, second = plain(before), plain(now)
    return f"{first} → {second}"


def part_read(event: dict[str, Any]) -> str:
    """Return how much of the held-out data an evaluation read: `first 8 of 108 batches`; empty for all of it."""
    read, whole = event.get("num_batches"), event.get("all_batches")
    return f"first {read:,} of {whole:,} batches" if read and whole and read < whole else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _fields(event: dict[str, Any]) -> str:
    detail = {name: value for name, value in event.items() if name not in ("time", "kind", "step")}
    return ", ".join(f"{_words(name)} {plain(value, DIGITS)}" for name, value in detail.items() if value is not None)


def _evaluate(event: dict[str, Any]) -> str:
    bits, read = event.get("bits_per_byte"), part_read(event)
    by_source = {name: loss for name, loss in event.items() if name.startswith(SOURCE_LOSS)}
    listed = ", ".join(f"{name.removeprefix(SOURCE_LOSS)} {loss:.4f}" for name, loss in by_source.items())
    loss = f"held-out loss {event['heldout_loss']:.4f}" if event.get("tokens") != 0 else "no held-out token counts"
    accuracy, error = event.get("heldout_accuracy"), event.get("heldout_accuracy_se", 0.0)
    return (
        loss
        + (f", accuracy {accuracy:.3f} ± {error:.3f}" if accuracy is not None else "")
        + (f", {bits:.3f} bits per byte" if bits is not None else "")
        + (f" ({listed})" if listed else "")
        + (f" ({read})" if read else "")
    )


def _init_from(event: dict[str, Any]) -> str:
    parts = [("changed", "changed"), ("drawn", "drawn anew"), ("left", "left out")]
    told = [f"; {words}: {plain(event[name])[1:-1]}" for name, words in parts if event.get(name)]
    return "".join([event["checkpoint"], *told])


def _start(event: dict[str, Any]) -> str:
    further = _fields(
        {name: event[name] for name in ("restarts", "copy", "cut_metrics", "lost_metrics") if name in event}
    )
    place = f"{event['layout']}, {event['world_size']} x {event['device']} on {event['host']}"
    return f"{place}, {further}" if further else place


def _stop(event: dict[str, Any]) -> str:
    further = _fields({name: value for name, value in event.items() if name != "status"})
    return f"{event['status']}, {further}" if further else str(event["status"])


def _packing(event: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {figures['samples']:,} samples, {figures['padding_share']:.2%} padding, "
        f"{figures['cut_share']:.2%} of the documents cut"
        for name, figures in event["packings"].items()
    )


def _reference(event: dict[str, Any]) -> str:
    how = "computed with the base's weights" if event["computed"] else "kept from an earlier start"
    return f"log-probabilities of {event['pairs']:,} pairs, {how}"


def _change(event: dict[str, Any]) -> str:
    how = " (checkpoint.override)" if event.get("override") else ""
    return f"{event['key']} {change(event['before'], event['now'])}{how}"


def _tasks(event: dict[str, Any]) -> str:
    scores = {name: value for name, value in event.items() if name not in ("time", "kind", "step")}
    return ", ".join(f"{name} {plain(value, DIGITS)}" for name, value in scores.items())


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "change": _change,
    "evaluate": _evaluate,
    "init_from": _init_from,
    "packing": _packing,
    "mixture": lambda event: describe_sources(event["sources"]),
    "reference": _reference,
    "teacher": lambda event: f"{event['model']}, {event['parameters']:,} parameters",
    "tasks": _tasks,
    "heldout_replies": _tasks,
    "start": _start,
    "resume": _start,
    "stop": _stop,
    "preflight": lambda event: f"all checks passed in {event['seconds']:.2f} s",
    "save": lambda event: f"{event['checkpoint']} in {event['seconds']:.2f} s",
    "signal": lambda event: signal_name(event["signal"]),
    "skip": lambda event: str(event["reason"]),
    "spike_kept": lambda event: str(event["reason"]),
    "spike": lambda event: f"loss {event['loss']:.4f}, {event['zscore']:.1f} deviations above {event['median']:.4f}",
}
