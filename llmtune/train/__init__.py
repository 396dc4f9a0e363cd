"""Training: construction in ``build.py``, the loop in ``loop.py``, side concerns as hooks.

``llmtune.train(...)`` is :func:`llmtune.api.train.train`.
"""

import sys

from llmtune.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
