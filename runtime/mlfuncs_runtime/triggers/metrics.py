"""Prometheus samples of the triggers, from what the trigger process tells in its status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Add = Callable[[str, Mapping[str, str], float], None]

# key of a trigger's status -> metric; what a kind of trigger has no such key for is left out
_METRICS = {
    "served": "mlfuncs_trigger_delivered_total",
    "failed": "mlfuncs_trigger_failed_calls_total",
    "retried": "mlfuncs_trigger_retries_total",
    "held": "mlfuncs_trigger_held_total",
    "buried": "mlfuncs_trigger_dead_lettered_total",
    "given_up": "mlfuncs_trigger_given_up_total",
    "dropped": "mlfuncs_trigger_dropped_total",
    "in_flight": "mlfuncs_trigger_in_flight_messages",
    "waiting": "mlfuncs_trigger_waiting_messages",
    "last_at": "mlfuncs_trigger_last_delivery_timestamp_seconds",
}
HELP = {
    "mlfuncs_trigger_delivered_total": ("counter", "Messages and ticks that the endpoint served."),
    "mlfuncs_trigger_failed_calls_total": ("counter", "Calls of the endpoint that failed, for whatever reason."),
    "mlfuncs_trigger_retries_total": ("counter", "Calls made anew after one that failed."),
    "mlfuncs_trigger_held_total": ("counter", "Calls put off because nobody could serve then; they cost no try."),
    "mlfuncs_trigger_dead_lettered_total": ("counter", "Messages put aside."),
    "mlfuncs_trigger_given_up_total": ("counter", "Ticks whose last try failed."),
    "mlfuncs_trigger_dropped_total": ("counter", "Ticks that were skipped: missed, or while an earlier one ran."),
    "mlfuncs_trigger_in_flight_messages": ("gauge", "Messages taken from the source and not settled."),
    "mlfuncs_trigger_waiting_messages": ("gauge", "Messages of the source that nobody was handed yet (lag)."),
    "mlfuncs_trigger_last_delivery_timestamp_seconds": ("gauge", "When a message or tick was last served."),
    "mlfuncs_trigger_up": ("gauge", "1 while the trigger runs or waits for its time, else 0."),
}


def add_triggers(add: Add, status: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the samples of every trigger. `status` maps "project/endpoint/id" to what its runner tells."""
    for key, values in sorted(status.items()):
        _, endpoint, identity = key.split("/")
        label = str(values.get("label", ""))
        labels = {"endpoint": endpoint, "kind": str(values.get("kind", "")), "trigger": label, "id": identity}
        add("mlfuncs_trigger_up", labels, int(values.get("state") in ("running", "waiting")))
        for name, metric in _METRICS.items():
            value = values.get(name)
            if value is not None and (value or name != "last_at"):  # no delivery yet is no time
                add(metric, labels, value)
