"""The packages, and (in time) the C++ extension; everything else about the distribution is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["quailora", "quailora.kernels"],
    # A top-level import package named `kernels` would shadow the Hugging Face package that transformers imports.
    package_dir={"quailora.kernels": "kernels"},
)
