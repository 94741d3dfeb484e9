"""Forty pictures that take much memory or time to decode, of every format that decoders know; each is a small file.

Streams of equal bytes are put together from repeated blocks, so the files take no time to make either. Those of which
only the header matters say so: a decoder that trusts it asks for the memory before it sees that there is no more.
"""

import functools
import io
import struct
import zlib
from typing import Any

from PIL import Image

_BLOCK_BYTES = 1 << 20
_SIDE_PX = 13_000


def make_bombs() -> dict[str, bytes]:
    """The files, by a name that says what they are."""
    bombs: dict[str, bytes] = {}
    for kind, depths in {0: (1, 8, 16), 2: (8, 16), 3: (8,), 4: (8, 16), 6: (8, 16)}.items():
        for depth in depths:
            bombs[f"png colour type {kind}, {depth} bits"] = _png(_SIDE_PX, kind, depth)
    bombs |= {
        f"png of {side} px, interlaced" if lace else f"png of {side} px": _png(side, 6, 16, interlaced=lace)
        for side, lace in ((9_000, 0), (9_000, 1), (60_000, 0))
    }
    bombs |= {f"hdr of {side} px": _hdr(side) for side in (10_000, 30_000)}
    for mode, side in (
        ("L", 12_000),
        ("RGB", 12_000),
        ("RGBA", 9_000),
        ("I;16", 10_000),
        ("F", 9_000),
        ("CMYK", 9_000),
    ):
        bombs[f"tiff {mode}"] = _tiff(mode, side)
    bombs["tiff of one huge tile"] = _tile_tiff()
    bombs |= {f"bmp of {bits} bits, header": _bmp(bits) for bits in (8, 16, 24, 32)}
    bombs |= {f"ppm {kind}, header": f"{kind} 13000 13000 65535\n".encode() + bytes(100) for kind in ("P5", "P6")}
    bombs |= {f"gif of {side} px, header": _gif(side) for side in (13_000, 65_535)}
    bombs["jpeg, header"] = _jpeg_header(65_000, 0xC0)
    bombs["jpeg, progressive, header"] = _jpeg_header(20_000, 0xC2)
    bombs |= {f"webp lossless of {side} px, header": _webp(side) for side in (9_000, 16_383)}
    bombs["jpeg 2000, header"] = _jpeg_2000_header(13_000)
    bombs["webp"] = _flat("WEBP", 4_500, lossless=True, method=0)
    bombs["jpeg, progressive"] = _flat("JPEG", 6_000, progressive=True, quality=10)
    bombs["jpeg 2000"] = _flat("JPEG2000", 3_800)
    bombs["gif"] = _flat("GIF", 7_500)
    bombs["avif"] = _flat("AVIF", 4_000, speed=10)
    return bombs


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def _deflated_zeros(num_blocks: int) -> bytes:
    """Zeros, compressed: the same block again and again."""
    start, block = zlib.compressobj(9), zlib.compressobj(9, zlib.DEFLATED, -15)
    head = start.compress(b"") + start.flush(zlib.Z_FULL_FLUSH)
    return head + (block.compress(bytes(_BLOCK_BYTES)) + block.flush(zlib.Z_FULL_FLUSH)) * num_blocks


def _png(side_px: int, colour_type: int, depth: int, *, interlaced: int = 0) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    num_bytes = side_px * (side_px * channels * depth // 8 + 1)
    header = struct.pack(">IIBBBBB", side_px, side_px, depth, colour_type, 0, 0, interlaced)
    palette = _chunk(b"PLTE", bytes(768)) if colour_type == 3 else b""
    pixels = _deflated_zeros(min(num_bytes // _BLOCK_BYTES, 1500))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + palette + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _hdr(side_px: int) -> bytes:
    row = struct.pack(">BBH", 2, 2, min(side_px, 32_767)) + (b"\xff\x80" * (side_px // 127 + 1)) * 4
    head = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {side_px} +X {side_px}\n"
    return head.encode() + row * min(side_px, 6_000_000 // len(row))


def _tags(entries: list[tuple[int, int, int, int]], pixels: bytes) -> bytes:
    """A TIFF with one directory of (tag, type, count, value)."""
    offset = 8
    directory = 8 + len(pixels)
    values = [(tag, kind, count, offset if tag in {273, 324} else value) for tag, kind, count, value in sorted(entries)]
    body = struct.pack("<H", len(values)) + b"".join(
        struct.pack("<HHI", tag, kind, count) + struct.pack("<I", value) for tag, kind, count, value in values
    )
    return b"II*\0" + struct.pack("<I", directory) + pixels + body + bytes(4)


def _tiff(mode: str, side_px: int) -> bytes:
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    bits = {"I;16": 16, "F": 32}.get(mode, 8)
    photometric = {"RGB": 2, "RGBA": 2, "CMYK": 5}.get(mode, 1)
    pixels = _deflated_zeros(side_px * side_px * channels * bits // 8 // _BLOCK_BYTES)
    entries = [(256, 4, 1, side_px), (257, 4, 1, side_px), (259, 3, 1, 8), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, 0), (277, 3, 1, channels), (278, 4, 1, side_px), (279, 4, 1, len(pixels))]
    entries += [(258, 3, 1, bits)] if channels == 1 else []
    entries += [(339, 3, 1, 3)] if mode == "F" else []
    if channels > 1:  # bits of each channel do not fit into an entry: they stand before the directory
        place = 8 + len(pixels)
        pixels += struct.pack(f"<{channels}H", *[8] * channels)
        entries.append((258, 3, channels, place))
        entries += [(338, 3, 1, 2)] if mode == "RGBA" else []
    return _tags(entries, pixels)


def _tile_tiff() -> bytes:
    pixels = _deflated_zeros(64)
    entries = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 0), (325, 4, 1, len(pixels))]
    return _tags(entries, pixels)


def _bmp(bits: int) -> bytes:
    palette = bytes(1024) if bits == 8 else b""
    info = struct.pack("<IiiHHIIiiII", 40, _SIDE_PX, _SIDE_PX, 1, bits, 0, 0, 2835, 2835, 0, 0)
    head = struct.pack("<2sIHHI", b"BM", 1 << 20, 0, 0, 14 + len(info) + len(palette))
    return head + info + palette + bytes(1000)


def _gif(side_px: int) -> bytes:
    screen = struct.pack("<6sHHBBB", b"GIF89a", side_px, side_px, 0x80, 0, 0) + bytes(6)
    return screen + struct.pack("<BHHHHB", 0x2C, 0, 0, side_px, side_px, 0) + b"\x02\x02\x4c\x01\x00;"


def _jpeg_header(side_px: int, frame: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", progressive=frame == 0xC2)
    data = bytearray(buffer.getvalue())
    place = data.index(bytes([0xFF, frame])) + 5
    data[place : place + 4] = struct.pack(">HH", side_px, side_px)
    return bytes(data)


def _webp(side_px: int) -> bytes:
    bits = (side_px - 1) | (side_px - 1) << 14
    chunk = b"\x2f" + struct.pack("<I", bits) + bytes(64)
    return b"RIFF" + struct.pack("<I", len(chunk) + 12) + b"WEBPVP8L" + struct.pack("<I", len(chunk)) + chunk


def _jpeg_2000_header(side_px: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG2000", no_jp2=True)
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\x51") + 6
    data[place : place + 8] = struct.pack(">II", side_px, side_px)
    data[place + 16 : place + 24] = struct.pack(">II", side_px, side_px)
    return bytes(data)


def _flat(kind: str, side_px: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("L" if kind in {"GIF", "JPEG2000"} else "RGB", (side_px, side_px)).save(buffer, kind, **options)
    return buffer.getvalue()
