"""Take keys and tokens from ``.env`` in the working folder, and nothing else.

The working folder may have come from somebody else, with its ``.env``. A key that is not theirs to
use harms nobody; a variable that says what is executed (``LD_PRELOAD``, ``PYTHONPATH``, ``PATH``,
``BASH_ENV``) or which server a key is sent to (``HF_ENDPOINT``, ``WANDB_BASE_URL``) would.
"""

import os
import re
from pathlib import Path

from llmtune.security.redaction import remember_names
from llmtune.security.trust import require_own

#: Names of keys, tokens and passwords, and of the users and accounts that they belong to.
_KEYS = re.compile(
    r"(?!LD_|DYLD_|PYTHON|BASH)"
    r"(\w+_)?(\w*API_?KEY|KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|PAT|COOKIE|JWT)"
    r"|\w+_(PWD|AUTH|DSN|SAS|CONNECTION_STRING|USER|USERNAME|ACCOUNT_NAME|CLIENT_ID|TENANT_ID)",
    re.IGNORECASE,
)


def load_dotenv_file(file: Path = Path(".env")) -> list[str]:
    """Set the keys and tokens that are not set yet.

    Returns:
        Names of other variables, which were not taken.

    Raises:
        MissingPrerequisiteError: The file belongs to another user, or others may write to it.
    """
    if not file.is_file():
        return []
    require_own(file, ".env", "run llmtune from another folder and set the keys in the environment")
    from dotenv import dotenv_values

    values = {name: value for name, value in dotenv_values(file).items() if value is not None}
    keys = {name for name in values if _KEYS.fullmatch(name)}
    remember_names(keys)
    for name in sorted(keys):
        os.environ.setdefault(name, values[name])
    return sorted(name for name in values.keys() - keys if name not in os.environ)
