"""The markers of a JPEG file: what it declares, whether every scan is there, and a mended copy.

A repair changes headers only and is then proved by a strict decode. Source: ITU-T T.81, annexes B and G; what is
tolerated is libjpeg's list of warnings.
"""

from typing import NamedTuple

SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_APP0, _APP14 = 0xE0, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # but for DHT, JPG, DAC
_SEQUENTIAL, _PROGRESSIVE = {0xC0, 0xC1, 0xC9}, {0xC2, 0xCA}
_RESTARTS = range(0xD0, 0xD8)
_STANDALONE = {0x01, *_RESTARTS}  # no length follows: TEM, RSTn
_NUM_COEFFICIENTS = 64
_UNSENT = 0xFF


class Survey(NamedTuple):
    """What the markers up to the end of the first picture say.

    `adobe` is the colour transform of an Adobe marker. `is_begun`: each coefficient of each component is in some scan;
    `is_complete`: down to its last bit. `mended` ends with an end marker; `repairs` says what else was changed.
    """

    width: int
    height: int
    precision: int
    num_components: int
    adobe: int | None
    has_end: bool
    is_begun: bool
    is_complete: bool
    mended: bytes
    repairs: tuple[str, ...]


def is_plain(data: bytes) -> bool:
    """True for the usual file, told from its headers in microseconds: sequential, 8 bits, one scan, no garbage."""
    position, num_components = len(SOI), 0
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _SEQUENTIAL and data[position + 4] == 8:
            num_components = data[position + 9]
        elif marker == SOS[1]:
            return data[position + 4] == num_components
        elif marker in _FRAMES or marker == EOI[1] or marker in _STANDALONE:
            return False
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return False


def survey(data: bytes) -> Survey | None:
    """Read the markers of a file that begins with SOI; None if it ends before its first scan."""
    parts: list[bytes] = [SOI]
    repairs: list[str] = []
    frame: tuple[int, int, int, int, bytes] | None = None  # marker, precision, height, width, component ids
    adobe_part = None
    sent: dict[int, bytearray] = {}  # by component: the lowest bit sent of each coefficient
    has_end, num_scans, num_dropped, position = False, 0, 0, len(SOI)
    while found := _find_marker(data, position):
        start, marker = found
        body = data.index(marker, start) + 1
        num_dropped += start - position
        position = body
        if marker == EOI[1]:
            has_end = True
            break
        if marker in _STANDALONE:
            continue
        length = int.from_bytes(data[body : body + 2])
        if length < 2 or body + length > len(data):
            break
        segment, position = bytearray(data[body : body + length]), body + length
        if marker in _FRAMES and frame is None and length >= 8:
            height, width = int.from_bytes(segment[3:5]), int.from_bytes(segment[5:7])
            frame = marker, segment[2], height, width, bytes(segment[8 : 8 + 3 * segment[7] : 3])
            sent = {component: bytearray([_UNSENT]) * _NUM_COEFFICIENTS for component in frame[-1]}
        elif marker == _APP0 and segment[2:7] == b"JFIF\0" and length >= 9 and segment[7] != 1:
            repairs.append(f"JFIF revision {segment[7]} read as 1")
            segment[7] = 1
        elif marker == _APP14 and segment[2:7] == b"Adobe" and length >= 14:
            adobe_part = len(parts)
        elif marker == SOS[1] and frame is not None:
            num_scans += 1
            if (repair := _read_scan(frame[0], segment, sent)) is not None:
                repairs.append(repair)
            end = _find_marker(data, position, in_scan=True)
            stop = end[0] if end else len(data)
            segment += data[position:stop]
            position = stop
        parts.append(bytes([0xFF, marker]) + bytes(segment))
    if frame is None or not num_scans:
        return None
    if num_dropped:
        repairs.append(f"{num_dropped} bytes between segments dropped")
    if not has_end:
        repairs.append("end marker supplied")
    _, precision, height, width, components = frame
    adobe = None
    if adobe_part is not None:
        adobe, repair = _mend_adobe(parts, adobe_part, len(components))
        repairs += [repair] if repair else []
    bits = b"".join(sent.values())
    is_begun, is_complete = _UNSENT not in bits, not any(bits)
    mended = b"".join([*parts, EOI])
    return Survey(
        width, height, precision, len(components), adobe, has_end, is_begun, is_complete, mended, tuple(repairs)
    )


def _find_marker(data: bytes, position: int, *, in_scan: bool = False) -> tuple[int, int] | None:
    """Where the next marker's 0xFF is, fill bytes before it included, and its code; in a scan RSTn is data."""
    while (start := data.find(b"\xff", position)) >= 0:
        position = start + 1
        while position < len(data) and data[position] == 0xFF:
            position += 1
        if position == len(data):
            return None
        code = data[position]
        if code and not (in_scan and code in _RESTARTS):
            return start, code
        position += 1
    return None


def _read_scan(frame_marker: int, header: bytearray, sent: dict[int, bytearray]) -> str | None:
    """Note what a scan sends; put a sequential scan's parameters right, which decoders ignore."""
    num_components = header[2] if len(header) > 2 else 0
    at = 3 + 2 * num_components
    if len(header) < at + 3:
        return None
    repair, first, last, low_bit = None, 0, _NUM_COEFFICIENTS - 1, 0
    if frame_marker in _PROGRESSIVE:
        first, last, low_bit = header[at], min(header[at + 1], _NUM_COEFFICIENTS - 1), header[at + 2] & 15
    elif frame_marker in _SEQUENTIAL and header[at : at + 3] != bytes([0, _NUM_COEFFICIENTS - 1, 0]):
        repair = "scan parameters of a sequential picture ignored"
        header[at : at + 3] = bytes([0, _NUM_COEFFICIENTS - 1, 0])
    for component in header[3:at:2]:
        if component in sent and first <= last:
            sent[component][first : last + 1] = bytes([low_bit]) * (last + 1 - first)
    return repair


def _mend_adobe(parts: list[bytes], position: int, num_components: int) -> tuple[int, str | None]:
    """The colour transform of an Adobe segment; one that does not exist is read as every decoder reads it."""
    part = bytearray(parts[position])
    at = 15  # marker, length, "Adobe", version and two flags of two bytes each, transform
    known, usual = ((0, 2), 2) if num_components == 4 else ((0, 1), 1)
    if part[at] in known:
        return part[at], None
    repair = f"Adobe colour transform {part[at]} read as {usual}"
    part[at] = usual
    parts[position] = bytes(part)
    return usual, repair
