"""What host and emulated drive say to each other: small frames, one for each message; arrays travel in shared memory.

A frame is a struct (magic with version, the command's number, bytes of body) and a body of JSON. Nothing in it names
code: a command is one of `COMMANDS`, and whatever is not of its form is a WireError, as DriveError that ends the run.
"""

import json
import struct
from operator import attrgetter

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer.drive import Work

MESSAGE = 1 << 16  # bytes of the largest frame
FRAME = struct.Struct("<4sQI")
MAGIC = b"HIL1"
COMMANDS = {  # op -> types of its arguments, and its arrays less the room for the answer
    "write": ((int, int), 2),
    "rescale": ((int,), 1),
    "hold": ((int, bool), 1),
    "evaluate": ((int, int), 1),
    "fetch": ((int,), 1),
    "attend": ((int, str), 2),
    "truncate": ((int, int), 0),
    "report": ((), 0),
}
DTYPES = ("|u1", "|i1", "<f4", "<i8")
_fields = attrgetter(*Work.__dataclass_fields__)


class WireError(DriveError):
    """What came is no message of this protocol."""


def pack(number: int, body) -> bytes:
    """A frame of command `number`."""
    text = json.dumps(body).encode()
    if FRAME.size + len(text) > MESSAGE:
        raise WireError(f"a message of {len(text):,} bytes is longer than {MESSAGE:,}")
    return FRAME.pack(MAGIC, number, len(text)) + text


def unpack(frame: bytes) -> tuple[int, object]:
    """The command's number and the body."""
    try:
        magic, number, length = FRAME.unpack_from(frame)
        if magic != MAGIC or length != len(frame) - FRAME.size:
            raise ValueError("its head is not")
        return number, json.loads(frame[FRAME.size :].decode())
    except (struct.error, ValueError, RecursionError) as error:
        raise WireError(f"{len(frame)} bytes are no message of host and drive ({error})") from None


def command(frame: bytes, shared: int) -> tuple[int, str, list, list[tuple]]:
    """Number, op, arguments, and arrays as (offset, shape, dtype) that lie within `shared` bytes."""
    number, body = unpack(frame)
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], str) and body[0] in COMMANDS):
        raise WireError(f"command {number} is none of {', '.join(COMMANDS)}")
    op, args, arrays = body
    types, count = COMMANDS[op]
    if not (isinstance(args, list) and [type(arg) for arg in args] == list(types)):
        raise WireError(f"{op} takes arguments of types {[t.__name__ for t in types]}")
    if not (isinstance(arrays, list) and len(arrays) == count + 1):
        raise WireError(f"{op} takes {count} arrays and room for an answer")
    return number, op, args, [_array(array, shared) for array in arrays]


def _array(array, shared: int) -> tuple[int, tuple[int, ...], str]:
    if not (isinstance(array, list) and len(array) == 3 and isinstance(array[1], list) and array[2] in DTYPES):
        raise WireError("an array is an offset, a shape and a dtype")
    numbers = [array[0], *array[1]]
    if not all(type(number) is int and 0 <= number <= shared for number in numbers):
        raise WireError(f"an array's numbers must be from 0 to {shared:,}")
    nbytes = np.dtype(array[2]).itemsize
    for number in array[1]:
        nbytes *= number
    if len(array[1]) > 8 or array[0] + nbytes > shared:
        raise WireError(f"an array of {nbytes:,} bytes at {array[0]:,} is outside of the shared memory")
    return array[0], tuple(array[1]), array[2]


def answer(number: int, kind: str, payload=None) -> bytes:
    """A frame with a part of the answer: `block`, or the last word, `done` or `error`."""
    return pack(number, [kind, _plain(payload)])


def answered(frame: bytes) -> tuple[int, str, object]:
    """Number, kind and payload of an answer."""
    number, body = unpack(frame)
    if not (isinstance(body, list) and len(body) == 2 and body[0] in ("block", "done", "error")):
        raise WireError(f"answer {number} is neither block nor done nor error")
    kind, payload = body
    if kind == "error" and isinstance(payload, str):
        return number, kind, payload
    if kind == "block" and isinstance(payload, list) and all(type(i) is int and i >= 0 for i in payload):
        return number, kind, payload
    if kind == "done":
        return number, kind, _work(payload)
    raise WireError(f"answer {number} has a {kind} of another form")


def _plain(value):
    if isinstance(value, Work):
        return _fields(value)
    return {name: _fields(work) for name, work in value.items()} if isinstance(value, dict) else value


def _work(value):
    """Nothing, a flag, the work done, or work by kind."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return {name: _work(work) for name, work in value.items() if _is_work(work)}
    return Work(*value) if _is_work(value) else _refuse(value)


def _is_work(value) -> bool:
    whole = isinstance(value, list) and len(value) == len(Work.__dataclass_fields__)
    return (whole and all(type(number) in (int, float) for number in value)) or _refuse(value)


def _refuse(value):
    raise WireError(f"{type(value).__name__} is no work done")
