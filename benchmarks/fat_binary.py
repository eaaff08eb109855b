"""Empties the kernels of other GPUs in a compiled library, so that it can be compressed to a fraction of its size.

A library of CUDA kernels holds them once for each kind of GPU. By the headers, the driver takes what its GPU needs. The
headers stay, as does everything else in the file; the kernels for other GPUs become zeros. What is left is, bit for
bit, what this GPU would have run.

The layout: the section .nv_fatbin is a row of containers. Each has a header of 16 bytes (magic number, version and size
of the header in 16 bits each, size of the rest in 64 bits) and entries, each with a header (kind, version and size of
the header in 16, 16 and 32 bits, size of the kernels in 64 bits, and at byte 28 the compute capability in 32 bits) and
its kernels. Source: fatbinary_section.h and fatbinary.h of the CUDA toolkit, and the fat binaries themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = 0xBA55ED50
_ALIGNMENT = 8
_COMPILED = 2
"""Kind of an entry with machine code; 1 is PTX, which a driver compiles where machine code is missing."""


@dataclass(frozen=True)
class Entry:
    """Kernels for one kind of GPU.

    Attributes:
        capability: 90 for compute capability 9.0.
        begin, end: where its kernels lie in the file.
    """

    is_compiled: bool
    capability: int
    begin: int
    end: int


def empty_other_kernels(library: bytearray, capability: int) -> int:
    """Overwrite, with zeros, the kernels of all other GPUs wherever a container has machine code for this one.

    Args:
        library: an ELF file's content, changed in place.
        capability: 90 for compute capability 9.0.

    Returns:
        The number of bytes that became zeros.

    Raises:
        ValueError: if the file is no 64-bit ELF file, has no section .nv_fatbin, or the section has another layout.
    """
    begin, end = _section(library, ".nv_fatbin")
    num_emptied = 0
    for entries in _containers(library, begin, end):
        kept = [entry for entry in entries if entry.is_compiled and entry.capability == capability]
        for entry in entries if kept else []:
            if entry not in kept:
                library[entry.begin : entry.end] = bytes(entry.end - entry.begin)
                num_emptied += entry.end - entry.begin
    return num_emptied


def _section(library: bytearray, name: str) -> tuple[int, int]:
    """Where a section begins and ends in the file."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("the file is no 64-bit ELF file.")
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, of_names = struct.unpack_from("<HHH", library, 58)
    (names,) = struct.unpack_from("<Q", library, table + of_names * size + 24)
    for index in range(count):
        header = table + index * size
        (offset_of_name,) = struct.unpack_from("<I", library, header)
        begin, num_bytes = struct.unpack_from("<QQ", library, header + 24)
        found = library[names + offset_of_name : library.index(0, names + offset_of_name)]
        if found.decode() == name:
            return begin, begin + num_bytes
    raise ValueError(f"the file has no section {name}: it holds no kernels for GPUs.")


def _containers(library: bytearray, position: int, end: int) -> Iterator[list[Entry]]:
    while position < end:
        magic, _, header_size, size = struct.unpack_from("<IHHQ", library, position)
        if magic == 0:  # between containers
            position += _ALIGNMENT
            continue
        if magic != _MAGIC or position + header_size + size > end:
            raise ValueError(f".nv_fatbin has another layout than this script knows, at byte {position} of the file.")
        yield list(_entries(library, position + header_size, position + header_size + size))
        position += header_size + size


def _entries(library: bytearray, position: int, end: int) -> Iterator[Entry]:
    while position < end:
        kind, _, header_size, size = struct.unpack_from("<HHIQ", library, position)
        (capability,) = struct.unpack_from("<I", library, position + 28)
        begin = position + header_size
        if not position < begin <= begin + size <= end:
            raise ValueError(f".nv_fatbin has another layout than this script knows, at byte {position} of the file.")
        yield Entry(kind == _COMPILED, capability, begin, begin + size)
        position = begin + size
