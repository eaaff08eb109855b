"""Libraries of CUDA kernels, of which those for other GPUs are emptied before they are carried."""

from __future__ import annotations

import base64
import hashlib
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks.fat_binary import empty_other_kernels
from benchmarks.pack_for_gpu import keep_kernels_of

COMPILED, PTX = 2, 1


def kernels(kind: int, capability: int) -> bytes:
    """Bytes that name the GPU, as many as a small kernel's."""
    return (f"kernels of kind {kind} for {capability};" * 80).encode()[:1200]


def entry(kind: int, capability: int) -> bytes:
    content = kernels(kind, capability)
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(content)).ljust(28, b"\1") + struct.pack("<I", capability)
    return header.ljust(64, b"\2") + content


def container(*gpus: tuple[int, int]) -> bytes:
    content = b"".join(entry(kind, capability) for kind, capability in gpus)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


EVERYWHERE = ((COMPILED, 80), (COMPILED, 90), (COMPILED, 100), (PTX, 90))
NOT_ON_HOPPER = ((COMPILED, 80), (PTX, 80))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A shared library, made by the compiler, with two containers and room between them."""
    (tmp_path / "kernels").write_bytes(container(*EVERYWHERE) + bytes(24) + container(*NOT_ON_HOPPER))
    source = tmp_path / "source.s"
    source.write_text(f'.section .nv_fatbin,"a"\n.balign 8\n.incbin "{tmp_path / "kernels"}"\n')
    library = tmp_path / "library.so"
    subprocess.run(["cc", "-shared", "-nostdlib", "-o", library, source], check=True)
    return library


def test_only_the_kernels_of_other_gpus_become_zeros(library: Path) -> None:
    content = library.read_bytes()
    changed = bytearray(content)
    expected = content
    for kind, capability in ((COMPILED, 80), (COMPILED, 100), (PTX, 90)):
        expected = expected.replace(kernels(kind, capability), bytes(1200), 1)
    assert empty_other_kernels(changed, 90) == 3 * 1200
    assert changed == expected
    assert changed.count(kernels(COMPILED, 90)) == 1
    assert changed.count(kernels(COMPILED, 80)) == 1, (
        "where Hopper has no machine code, it needs the PTX beside others'"
    )
    assert empty_other_kernels(bytearray(content), 75) == 0, "no container has machine code for it"


def test_another_layout_is_refused(library: Path) -> None:
    content = library.read_bytes()
    with pytest.raises(ValueError, match="no 64-bit ELF file"):
        empty_other_kernels(bytearray(b"text" * 100), 90)
    with pytest.raises(ValueError, match=r"no section \.nv_fatbin"):
        empty_other_kernels(bytearray(content.replace(b".nv_fatbin", b".my_fatbin")), 90)
    begin = content.index(struct.pack("<I", 0xBA55ED50))
    for position, wrong in ((begin, b"\7"), (begin + 8, b"\xff\xff\xff"), (begin + 16 + 4, bytes(4))):
        broken = bytearray(content)
        broken[position : position + len(wrong)] = wrong
        with pytest.raises(ValueError, match="another layout"):
            empty_other_kernels(broken, 90)


def test_a_wheels_list_of_files_is_right_again(library: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "kernels-1.0-py3-none-any.whl"
    record = "kernels-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, "lib/library.so")
        archive.writestr("lib/__init__.py", "text")
        archive.writestr(
            record, f"lib/library.so,sha256=old,{library.stat().st_size}\nlib/__init__.py,sha256=x,4\n{record},,\n"
        )
    with pytest.raises(ValueError, match=r"no kernels for compute capability 7\.5"):
        keep_kernels_of(wheel, 75)
    keep_kernels_of(wheel, 90)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("lib/library.so")
        lines = archive.read(record).decode().splitlines()
        assert archive.read("lib/__init__.py") == b"text"
    assert content.count(kernels(COMPILED, 100)) == 0
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    assert lines == [f"lib/library.so,sha256={digest},{len(content)}", "lib/__init__.py,sha256=x,4", f"{record},,"]
