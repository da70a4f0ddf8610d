"""A process that a zygote has forked, in the engine's hands."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

ONE_DESCRIPTOR = socket.CMSG_SPACE(array.array("i").itemsize)  # bytes that one takes beside a message


@dataclass
class Child:
    """A process forked ahead, and the step that it was given; `hung_up` once nothing more will come from it."""

    pid: int
    socket: socket.socket
    step_id: str = ""
    hung_up: bool = False


def received_socket(attached: Sequence[tuple[int, int, bytes]]) -> socket.socket:
    """The socket that came with a message, in what `recvmsg` gives beside the bytes."""
    received = socket.socket(fileno=array.array("i", attached[0][2])[0])
    received.setblocking(False)
    return received


def signal_group(pid: int, number: int) -> None:
    """Signal a step's process group, if there is still one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
