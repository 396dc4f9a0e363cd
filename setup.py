"""The packages of the wheel: those of ``llmtune/``, and ``conf/``, which is installed within them.

Everything else is in ``setup.cfg``, which can find packages but not add one that is elsewhere.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llmtune", "llmtune.*"]), "llmtune.conf"],
    package_dir={"llmtune": "llmtune", "llmtune.conf": "conf"},
)
