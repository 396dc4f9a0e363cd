"""Keep Python from importing modules of the working folder, where ``python -m`` looks first.

A ``psutil.py`` beside the data would otherwise be imported in the place of psutil. This module
imports only what Python itself has loaded by then, and not even ``__future__``, which would be
looked for in the working folder too.
"""

import os
import sys


def leave_working_folder() -> None:
    """Remove the working folder from the module path, of this process and of its children.

    It stays where llmtune itself is in it: a developer chose that code, and may not have installed
    it.
    """
    try:
        here = os.getcwd()
    except OSError:
        # It was removed meanwhile, and holds no modules.
        here = ""
    if here == os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))):
        return
    # Only what ``-m`` has put there: a folder that the user names in PYTHONPATH stays.
    if sys.path and sys.path[0] in ("", here):
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
