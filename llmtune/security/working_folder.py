"""Keep Python from taking modules from the working folder, which may be another's: ``python -m``
looks there first of all.

A ``psutil.py`` beside the data would otherwise be imported in the place of psutil. This module
imports only what Python itself has loaded by then, and not even ``__future__``, which would be
looked for in the working folder too.
"""

import os
import sys


def leave_working_folder() -> None:
    """Take the working folder from the module path, of this process and of all that it will start.

    Not so where llmtune itself lies there: who works in its source has chosen that code, and others
    may not be installed.
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
