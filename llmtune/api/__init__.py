"""llmtune from Python: the composition of the command line, with typed results.

``plan.py``, ``train.py`` and ``run.py`` each have one function, which ``import llmtune`` offers as
``llmtune.plan``, ``llmtune.train`` and ``llmtune.load_run``.
"""
