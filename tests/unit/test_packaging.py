"""What an archive of the project says of itself, and what it must hold. tests/docs builds the archives themselves."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

import megatron_fipo

ROOT = Path(__file__).parents[2]
ADDRESS = "https://code.example/team/megatron_fipo"


def metadata(monkeypatch: pytest.MonkeyPatch, address: str) -> dict[str, Any]:
    """What setup.py hands to setuptools, for a repository at an address."""
    handed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: handed.update(arguments))
    monkeypatch.setenv("MEGATRON_FIPO_REPOSITORY_URL", address)
    runpy.run_path(str(ROOT / "setup.py"))
    return handed


def relative_links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("address", ["", ADDRESS, f"{ADDRESS}/"])
def test_no_relative_link_reaches_a_package_index(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(relative_links(readme)) > 10
    handed = metadata(monkeypatch, address)
    description = handed["long_description"]
    assert relative_links(description) == []
    assert "![" not in description
    assert "docs/fipo.md" in description, "a link's words stay"
    links = re.findall(rf"\]\({ADDRESS}/blob/v{megatron_fipo.__version__}/([^)#]+)", description)
    assert len(links) == (len(relative_links(readme)) if address else 0)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert handed["project_urls"].get("Source") == (ADDRESS if address else None)


def test_one_version_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    version = megatron_fipo.__version__
    assert metadata(monkeypatch, "")["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$|^This will be {re.escape(version)},", changes, re.M
    )


def test_types_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ROOT / "megatron_fipo/py.typed").is_file()
    assert "py.typed" in metadata(monkeypatch, "")["package_data"]["megatron_fipo"]


def test_every_file_of_the_package_that_is_no_module_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = metadata(monkeypatch, "")["package_data"]
    shipped = {
        path
        for package, patterns in packages.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = [path for path in (ROOT / "megatron_fipo").rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix not in (".py", ".pyc") and path not in shipped] == []
