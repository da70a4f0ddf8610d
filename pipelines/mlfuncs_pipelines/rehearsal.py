"""A step that does nothing, run by warm processes and by their children before a real one comes."""

from __future__ import annotations

import functools
import os

from mlfuncs.interface.signature import Signature
from mlfuncs.settings import read_settings
from mlfuncs.spec import FunctionSpec
from mlfuncs_pipelines.ports import build_borders, input_ports, output_ports
from mlfuncs_pipelines.step import Call, Loaded, Track, execute


def rehearse() -> None:
    """Run it: code that ran before is quicker, and a child has copied the memory pages before its step comes."""
    execute(*_rehearsal())


@functools.cache
def _rehearsal() -> tuple[Loaded, Call]:
    def nothing(n: int) -> int:
        return n

    signature = Signature.of(nothing)
    inputs, outputs = input_ports(signature), output_ports(signature)
    build_borders([*inputs.values(), *outputs.values()])
    loaded = Loaded("", nothing, FunctionSpec(name="nothing"), read_settings(), inputs, outputs, signature)
    given = {"inputs": {"parameterValues": {"n": 1}}, "outputs": {"parameters": {"Output": {}}}}
    return loaded, Call(given, track=Track("0", os.devnull))
