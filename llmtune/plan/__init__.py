"""The frozen plan: hardware, model shape, batches, memory, placement, DeepSpeed's dictionary.

``llmtune.plan(...)`` is :func:`llmtune.api.plan.plan`.
"""

import sys

from llmtune.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
