"""All metadata is in pyproject.toml; this file lets older tools install the package."""
from setuptools import setup

setup()
