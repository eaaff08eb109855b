"""Packs what a bare GPU machine lacks into a folder that can be carried there in trips of limited size.

    python benchmarks/pack_for_gpu.py --out packed                            # tests/gpu and the benchmarks: 3 MiB
    python benchmarks/pack_for_gpu.py --out packed --transformer-engine       # and Transformer Engine: 285 MiB

The machine has no network. It has Python 3.12, torch for CUDA 13, triton, transformers and pytest; for Transformer
Engine a C++ compiler and ninja as well. In the folder lie wheels/ with the files, or their pieces where one exceeds a
trip, their SHA-256 sums, and install.sh, which checks, joins and installs them. benchmarks/README.md has the order.

Versions are those of constraints.txt and constraints-gpu.txt. Whatever the machine has already, it keeps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "engines"))

from resolve import canonical, read_pins  # noqa: E402 - one of the tools, which are no package

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


def pack(folder: Path, needed: list[str], transformer_engine: bool, trip_mib: int) -> list[list[Path]]:
    """Fill the folder.

    Args:
        needed: packages to carry, by name.
        transformer_engine: whether Transformer Engine comes, too.
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
    whole = sorted(wheels.iterdir())
    (folder / FILES).write_text("".join(f"{sha256(file)}  wheels/{file.name}\n" for file in whole))
    pieces = [piece for file in whole for piece in split(file, trip_mib * MIB)]
    (folder / PIECES).write_text("".join(f"{sha256(piece)}  wheels/{piece.name}\n" for piece in pieces))
    script = INSTALL.format(pieces=PIECES, files=FILES, names=" ".join(needed))
    (folder / "install.sh").write_text(script + (INSTALL_TRANSFORMER_ENGINE if transformer_engine else ""))
    return trips(pieces, trip_mib * MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("packed"), help="folder to make")
    parser.add_argument("--transformer-engine", action="store_true", help="and what Transformer Engine needs")
    parser.add_argument("--also", nargs="+", default=[], metavar="PACKAGE", help="packages to carry as well")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="packages that the machine has")
    parser.add_argument("--trip-mib", type=int, default=60, help="the most that one trip carries")
    arguments = parser.parse_args()
    needed = [*BENCHMARKS, *arguments.also, *(TRANSFORMER_ENGINE_NEEDS if arguments.transformer_engine else ())]
    there = {canonical(name) for name in arguments.without}
    needed = [name for name in dict.fromkeys(map(canonical, needed)) if name not in there]
    packed = pack(arguments.out, needed, arguments.transformer_engine, arguments.trip_mib)
    for number, files in enumerate(packed, start=1):
        total = sum(file.stat().st_size for file in files)
        print(f"trip {number}: {total / MIB:.1f} MiB")
        for file in files:
            print(f"  {file.stat().st_size / MIB:6.2f} MiB  wheels/{file.name}")


if __name__ == "__main__":
    main()
