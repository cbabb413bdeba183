"""Packaging. `launch.sh` installs this in a virtual environment with the tested versions of `constraints.txt`."""

import ast
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Read, not imported: the build environment has none of the packages.
SOURCE = (HERE / "codeparrot_ds" / "version.py").read_text(encoding="utf-8")
VERSION_LINE = next(line for line in SOURCE.splitlines() if line.startswith("__version__"))
VERSION = ast.literal_eval(VERSION_LINE.partition("=")[2].strip())


class BuildWithConfigs(build_py):
    """Puts the DeepSpeed configs, which lie at the top of the repository, inside the built package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "codeparrot_ds" / "ds_configs"
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((HERE / "ds_configs").iterdir()):
                shutil.copy(path, target)


setup(
    name="codeparrot-ds",
    version=VERSION,
    description="Trains code models from scratch with DeepSpeed: the CodeParrot recipe",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # This project has no address of its own yet: "Source" and "Issues" belong here once it has.
    project_urls={
        "DeepSpeed": "https://github.com/deepspeedai/DeepSpeed",
        "Recipe": "https://github.com/nlp-with-transformers/notebooks",
    },
    packages=find_packages(include=["codeparrot_ds", "codeparrot_ds.*"]),
    package_data={
        "codeparrot_ds": ["py.typed"],
        "codeparrot_ds.ds_config": ["known_keys.json"],
        "codeparrot_ds.report": ["templates/*.j2"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["codeparrot-ds = codeparrot_ds.cli.main:main"]},
    install_requires=[
        "torch>=2.11",
        # Private parts of it are used, which a minor version may rename: docs/deepspeed.md.
        "deepspeed>=0.19.8,<0.20",
        # What DeepSpeed reads its JSON files with.
        "hjson>=3.1",
        "transformers>=5.17",
        "datasets>=4",
        "tokenizers>=0.22",
        # Encodes a hundred times as fast where it proves equal; without it (no wheel) the tokenizers library encodes.
        "gigatoken>=0.10; platform_machine in 'x86_64 aarch64'",
        "wandb>=0.20",
        "ninja>=1.11",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "tensorboard>=2.18",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "pillow>=10",
        "PyYAML>=6",
        "tqdm>=4.66",
        "orjson>=3.10",
        "zstandard>=0.22",
        "rensa>=0.5",
        "pyarrow>=18",
        "numpy>=1.26",
        "psutil>=5.9",
        # torch.utils.cpp_extension, which builds DeepSpeed's operators, imports it.
        "setuptools",
    ],
    extras_require={
        # accelerate is the peer that benchmarks measure against.
        "test": [
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.12", "mypy>=1.15", "types-PyYAML"),
            "accelerate>=1.6",
            # Interprets the GPU's kernels where there is none; torch's CUDA build brings it along anyway.
            "triton>=3.6; sys_platform == 'linux'",
        ],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Typing :: Typed",
    ],
)
