"""Package metadata. Ranges here say what may work; constraints.txt pins what the tests run with."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
QUICKSTART = Path("examples/quickstart")
QUICKSTART_FILES = ("fipo.yaml", "base/*")
"""What `megatron-fipo init` writes of it; copied into a wheel, and not read where the project is installed editable."""
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_fipo/__init__.py").read_text(encoding="utf-8"))[1]
# Where the repository can be read, for an archive that is to be published: package indexes follow no relative links.
REPOSITORY = os.environ.get("MEGATRON_FIPO_REPOSITORY_URL", "").rstrip("/")
PROJECT_URLS = {"Paper": "https://arxiv.org/abs/2603.19835"}
if REPOSITORY:
    PROJECT_URLS |= {
        "Source": REPOSITORY,
        "Documentation": f"{REPOSITORY}/blob/v{VERSION}/docs/README.md",
        "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }


def long_description() -> str:
    """The README for a package index: relative links lead into the repository, or are words where none is named.

    Figures become links, or go: an index shows no SVG of another host.
    """

    def absolute(match: re.Match[str]) -> str:
        is_figure, words, target = match.groups()
        if not REPOSITORY:
            return "" if is_figure else words
        return f"[{words}]({REPOSITORY}/blob/v{VERSION}/{target})"

    readme = ROOT / "README.md"
    if not readme.exists():  # in a layer of an image that installs before it copies
        return ""
    text = readme.read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


class BuildWithExamples(build_py):
    """Puts the quick-start into the package, which in a clone lies beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        source, target = ROOT / QUICKSTART, Path(self.build_lib) / "megatron_fipo/starters/quickstart"
        for file in (path for pattern in QUICKSTART_FILES for path in sorted(source.glob(pattern))):
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(file), str(target / file.relative_to(source)))


setup(
    name="megatron-fipo",
    version=VERSION,
    description="Reinforcement learning with Future-KL influenced policy optimization (FIPO) on Megatron-Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="megatron_fipo maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls=PROJECT_URLS,
    keywords="reinforcement learning, large language models, Megatron, FIPO, DAPO, GRPO, RLHF, RLVR",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_fipo", "megatron_fipo.*"]),
    package_data={
        "megatron_fipo": ["py.typed"],
        "megatron_fipo.starters": ["own_data/*", "gsm8k/*"],
        "megatron_fipo.conformance": ["recorded/*"],
        "megatron_fipo.report": ["page/*"],
        "megatron_fipo.analysis": ["patterns.yaml"],
    },
    cmdclass={"build_py": BuildWithExamples},
    install_requires=[
        "torch>=2.8",
        # 0.16.1 is the newest release that declares Python 3.11; from 0.17 on 3.12 is the oldest.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "huggingface-hub>=1.0",
        "jinja2>=3.1",  # chat templates
        "safetensors>=0.5",
        "omegaconf>=2.3,<3",
        "pyyaml>=6.0",
        "rich>=13.7",
        "tensorboard>=2.18",
        "plotly>=6",  # its JavaScript goes into reports; nothing of it is imported
        "math-verify>=0.8",
        "reasoning-gym>=0.1.20",
        "pyarrow>=17",
        "aiohttp>=3.10",  # requests to rollout servers
        "psutil>=5.9",  # Megatron's checkpoint writers die without it
        "numpy>=1.26",
    ],
    extras_require={
        # These three say what works; tools/engines/trainer_gpu.py and tools/engines/install.py install it. Transformer
        # Engine must be compiled against the torch that is there (pip's --no-build-isolation, which no extra can ask
        # for), and the servers' torch is another one than the trainer's, so each has an environment of its own.
        "gpu": ["transformer-engine[pytorch,core_cu13]>=2.20,<3"],
        "sglang": ["sglang>=0.5.21"],
        "vllm": ["vllm>=0.32"],
        "slurm": ["nemo-run==0.11.1", "leptonai<0.28"],
        "wandb": ["wandb>=0.19"],
        "smollm2": ["gguf>=0.17", "accelerate>=1.10"],
        "dev": [
            *(
                "pytest>=8",
                "pytest-xdist>=3.6",
                "hypothesis>=6.100",
                "ruff>=0.12",
                "mypy>=1.15",
                "types-PyYAML",
                "matplotlib>=3.9",
            ),
            *("dockerfile-parse>=2", "uv>=0.9"),  # tests of the container recipe and of the GPU environments' pins
            *("wandb>=0.19", "playwright>=1.50"),  # samples on Weights & Biases, offline; the report in Chromium
        ],
    },
    entry_points={"console_scripts": ["megatron-fipo = megatron_fipo.cli:main"]},
)
