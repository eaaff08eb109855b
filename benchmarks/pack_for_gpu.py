"""Packs what a bare GPU machine lacks into a folder that can be carried there in trips of limited size.

    python benchmarks/pack_for_gpu.py --out packed                            # tests/gpu and the benchmarks: 3 MiB
    python benchmarks/pack_for_gpu.py --out packed --transformer-engine       # and Transformer Engine: 285 MiB
    python benchmarks/pack_for_gpu.py --out packed --transformer-engine --only-gpu 9.0    # for Hopper alone: 52 MiB

The machine has no network. It has Python 3.12, torch for CUDA 13, triton, transformers and pytest; for Transformer
Engine a C++ compiler and ninja as well. In the folder lie wheels/ with the files, or their pieces where one exceeds a
trip, their SHA-256 sums, and install.sh, which checks, joins and installs them. benchmarks/README.md has the order.

Versions are those of constraints.txt and constraints-gpu.txt. Whatever the machine has already, it keeps.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "engines")]

from resolve import canonical, read_pins  # noqa: E402 - one of the tools, which are no package

from benchmarks.fat_binary import empty_other_kernels  # noqa: E402

PINS = (ROOT / "constraints.txt", ROOT / "constraints-gpu.txt")
BENCHMARKS = ("megatron-core", "omegaconf")
TRANSFORMER_ENGINE_NEEDS = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("einops", "onnxscript", "onnx", "onnx-ir", "ml-dtypes", "protobuf"),
    *("nvdlfw-inspect", "pyyaml", "packaging", "nvidia-cuda-crt", "nvidia-cuda-cccl"),
)
"""Packages that Transformer Engine imports and is compiled with. cuDNN's frontend, which it requires too, serves
Blackwell GPUs alone, and brings half a gigabyte."""
TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-cu13")
TRANSFORMER_ENGINE_SOURCE = "transformer-engine-torch"
PLATFORMS = ("manylinux2014_x86_64", "manylinux1_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 35)))
MIB = 2**20
PIECES = "pieces.sha256"
FILES = "files.sha256"
INSTALL = """\
#!/usr/bin/env bash
# Checks, joins and installs what lies here. PYTHON=… names the environment's Python; the default is python3.
set -euo pipefail
cd "$(dirname "$0")"
sha256sum --check --quiet {pieces} # names what is missing or damaged; carry it again
for first in wheels/*.piece-00; do
    [ -e "$first" ] || continue
    cat "${{first%00}}"?? >"${{first%.piece-00}}"
done
sha256sum --check --quiet {files}
python=${{PYTHON:-python3}}
"$python" -m pip install --no-index --find-links wheels {names}
"""
INSTALL_TRANSFORMER_ENGINE = """\
"$python" "${PROJECT:-..}/tools/engines/trainer_gpu.py" --offline wheels
"""


def pinned_versions() -> dict[str, str]:
    """Versions on Python 3.12 by canonical name."""
    return {name: version for file in PINS for name, version in read_pins(file).items()}


def download_wheels(names: Iterable[str], folder: Path) -> None:
    """Download the pinned wheels for CPython 3.12 on Linux x86-64, without their dependencies.

    Raises:
        ValueError: for a package that is pinned nowhere.
    """
    versions = pinned_versions()
    names = [canonical(name) for name in names]
    if unknown := [name for name in names if name not in versions]:
        raise ValueError(f"{', '.join(unknown)}: pinned neither in {PINS[0].name} nor in {PINS[1].name}. Pin it there.")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={versions[name]}" for name in names)], check=True)


def download_source(name: str, folder: Path) -> None:
    """Download the pinned source of a package. pip would run its setup for its requirements, which needs CUDA's torch.

    Raises:
        ValueError: if the index has no such file, or the download does not match the index's checksum.
    """
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(
        f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json", "User-Agent": "megatron-fipo"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        files = json.load(response)["files"]
    wanted = f"{name.replace('-', '_')}-{pinned_versions()[name]}.tar.gz"
    found = next((file for file in files if file["filename"] == wanted), None)
    if found is None:
        raise ValueError(f"{index} has no {wanted}.")
    with urllib.request.urlopen(found["url"], timeout=60) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != found["hashes"]["sha256"]:
        raise ValueError(f"{wanted} is not what {index} says: its SHA-256 is another. Try again.")
    (folder / wanted).write_bytes(content)


def keep_kernels_of(wheel: Path, capability: int) -> None:
    """Rewrite a wheel: its largest library keeps the kernels of one kind of GPU, and its list of files is right again.

    Args:
        capability: 90 for compute capability 9.0.

    Raises:
        ValueError: if the library has no machine code for it, or cannot be read.
    """
    smaller = wheel.with_suffix(".smaller")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        library = max(source.infolist(), key=lambda member: member.file_size)
        content = bytearray(source.read(library))
        if not empty_other_kernels(content, capability):
            raise ValueError(f"{library.filename} has no kernels for compute capability {capability / 10}.")
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        for member in source.infolist():
            written = source.read(member)
            if member is library:
                written = bytes(content)
            elif member.filename.endswith(".dist-info/RECORD"):
                rows = [
                    [name, f"sha256={digest}", size] if name == library.filename else [name, recorded, size]
                    for name, recorded, size in csv.reader(io.StringIO(written.decode()))
                ]
                lines = io.StringIO()
                csv.writer(lines, lineterminator="\n").writerows(rows)
                written = lines.getvalue().encode()
            member.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(member, written)
    smaller.replace(wheel)


def split(file: Path, piece_bytes: int) -> list[Path]:
    """Replace a file that exceeds a piece's size by its pieces."""
    if file.stat().st_size <= piece_bytes:
        return [file]
    pieces = []
    with file.open("rb") as source:
        while content := source.read(piece_bytes):
            pieces.append(file.with_name(f"{file.name}.piece-{len(pieces):02d}"))
            pieces[-1].write_bytes(content)
    file.unlink()
    return pieces


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def trips(files: Iterable[Path], limit_bytes: int) -> list[list[Path]]:
    """Files in trips, none above the limit, each file in the first trip that has room for it."""
    packed: list[list[Path]] = []
    for file in files:
        room = (trip for trip in packed if sum(other.stat().st_size for other in [*trip, file]) <= limit_bytes)
        trip = next(room, None)
        if trip is None:
            packed.append([file])
        else:
            trip.append(file)
    return packed


def pack(
    folder: Path, needed: list[str], transformer_engine: bool, trip_mib: int, capability: int | None = None
) -> list[list[Path]]:
    """Fill the folder.

    Args:
        needed: packages to carry, by name.
        transformer_engine: whether Transformer Engine comes, too.
        capability: of the GPUs whose kernels Transformer Engine keeps, 90 for 9.0; None keeps all.
        trip_mib: size of a trip, and of a piece.

    Returns:
        The files of wheels/ in trips.

    Raises:
        FileExistsError: where the folder exists: an older one's files would be installed too.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Remove it, or name another folder with --out.")
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    download_wheels([*needed, *(TRANSFORMER_ENGINE if transformer_engine else ())], wheels)
    if transformer_engine:
        download_source(TRANSFORMER_ENGINE_SOURCE, wheels)
        if capability is not None:
            (kernels,) = wheels.glob("transformer_engine_cu*.whl")
            keep_kernels_of(kernels, capability)
    whole = sorted(wheels.iterdir())
    (folder / FILES).write_text("".join(f"{sha256(file)}  wheels/{file.name}\n" for file in whole))
    pieces = [piece for file in whole for piece in split(file, trip_mib * MIB)]
    (folder / PIECES).write_text("".join(f"{sha256(piece)}  wheels/{piece.name}\n" for piece in pieces))
    script = INSTALL.format(pieces=PIECES, files=FILES, names=" ".join(needed))
    (folder / "install.sh").write_text(script + (INSTALL_TRANSFORMER_ENGINE if transformer_engine else ""))
    return trips(pieces, trip_mib * MIB)


def capability_of(text: str) -> int:
    """90 for "9.0"."""
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and len(minor) == 1 and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is no compute capability such as 9.0.")
    return 10 * int(major) + int(minor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("packed"), help="folder to make")
    parser.add_argument("--transformer-engine", action="store_true", help="and what Transformer Engine needs")
    parser.add_argument("--also", nargs="+", default=[], metavar="PACKAGE", help="packages to carry as well")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="packages that the machine has")
    parser.add_argument(
        "--only-gpu",
        metavar="N.N",
        type=capability_of,
        help="carry Transformer Engine's kernels for this compute capability",
    )
    parser.add_argument("--trip-mib", type=int, default=60, help="the most that one trip carries")
    arguments = parser.parse_args()
    if arguments.only_gpu is not None and not arguments.transformer_engine:
        parser.error("--only-gpu chooses among Transformer Engine's kernels: add --transformer-engine")
    needed = [*BENCHMARKS, *arguments.also, *(TRANSFORMER_ENGINE_NEEDS if arguments.transformer_engine else ())]
    there = {canonical(name) for name in arguments.without}
    needed = [name for name in dict.fromkeys(map(canonical, needed)) if name not in there]
    packed = pack(arguments.out, needed, arguments.transformer_engine, arguments.trip_mib, arguments.only_gpu)
    for number, files in enumerate(packed, start=1):
        total = sum(file.stat().st_size for file in files)
        print(f"trip {number}: {total / MIB:.1f} MiB")
        for file in files:
            print(f"  {file.stat().st_size / MIB:6.2f} MiB  wheels/{file.name}")


if __name__ == "__main__":
    main()
