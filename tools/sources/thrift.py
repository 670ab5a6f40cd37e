"""The small numbers of Parquet's pages: Thrift's compact protocol, and the hybrid of runs and packed bits.

The decision that shaped it: a page header is read into a dictionary of fields by number, without a table of what they
mean; the few that matter have their numbers where they are used. Raises IndexError and the like for damaged bytes.
"""

from typing import Any


def read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields by number, and where the struct ends. Bytes that are none raise IndexError, ValueError or the like."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            raw, at = read_varint(data, at)
            number = _unzigzag(raw)
        fields[number], at = _read_field(data, at, head & 15)
    return fields, at + 1


def _read_field(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        raw, at = read_varint(data, at)
        return _unzigzag(raw), at
    if kind == 7:
        return data[at : at + 8], at + 8
    if kind == 8:
        size, at = read_varint(data, at)
        return data[at : at + size], at + size
    if kind == 12:
        return read_struct(data, at)
    raise ValueError(f"a field of kind {kind}")


def read_hybrid(data: bytes, width: int, num_values: int) -> list[int]:
    """Numbers of `width` bits: runs of one number, or groups of eight packed from the lowest bit on."""
    numbers: list[int] = []
    at, mask = 0, (1 << width) - 1
    while len(numbers) < num_values:
        head, at = read_varint(data, at)
        if head & 1:
            num_bytes = (head >> 1) * width
            packed = int.from_bytes(data[at : at + num_bytes], "little")
            numbers += [
                packed >> (place * width) & mask for place in range(min((head >> 1) * 8, num_values - len(numbers)))
            ]
        else:
            num_bytes = (width + 7) // 8
            numbers += [int.from_bytes(data[at : at + num_bytes], "little")] * min(head >> 1, num_values - len(numbers))
        at += num_bytes
    return numbers


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _unzigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def write_varint(value: int) -> bytes:
    """What `read_varint` reads."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
