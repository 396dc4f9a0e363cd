"""llmtune: plan, fine-tune, resume, merge and export large language models on DeepSpeed.

``llmtune.plan(...)``, ``llmtune.train(...)`` and ``llmtune.load_run(...)`` are the Python API; see
``docs/python-api.md``.
"""

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Import the Python API when it is used.

    ``python -m llmtune`` imports this file before it has left the working folder, so that nothing
    may be imported here before.
    """
    if name not in ("plan", "train", "load_run"):
        raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
    import importlib

    if name == "load_run":
        return importlib.import_module("llmtune.api.run").load_run
    return importlib.import_module(f"llmtune.{name}")
