"""``python -m scripts.foreign_table``: write ``docs/from-other-tools.md`` from the hints on keys.

With ``--check`` nothing is written, and the exit code is 1 where the page is behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmtune.config.foreign import ABSENT_OPTIONS, MEANINGS

PAGE = Path(__file__).parent.parent / "docs/from-other-tools.md"
BEGIN, END = "<!-- table: python -m scripts.foreign_table -->", "<!-- end of table -->"
INTRODUCTION = f"""# From other tools

How keys of transformers, peft, TRL, axolotl, LLaMA-Factory, torchtune and Unsloth are called here.
llmtune itself gives these hints: `lora_rank=8` is refused, with the key that was meant.
Keys that are not listed have the same name here, below a group (`optim.learning_rate`).
What is not there is refused.
All of them: [reference.md](reference.md).

A YAML file of your own takes the place of another tool's, with keys below their groups:

    # mine/experiment/first.yaml
    # @package _global_
    model: {{name_or_path: Qwen/Qwen3-4B}}
    data: {{train: my.jsonl, packing: true}}
    tuner: {{lora_r: 32}}

    python -m llmtune --config-dir mine experiment=first

{BEGIN}
"""


def make_page() -> str:
    """Return the whole page."""
    names: dict[str, list[str]] = {}
    for name, meaning in MEANINGS.items():
        names.setdefault(meaning, []).append(name)
    keys = {here: elsewhere for here, elsewhere in names.items() if not _is_absent(here)}
    absent = {here: elsewhere for here, elsewhere in names.items() if _is_absent(here)}
    lines = ["| elsewhere | here |", "| --- | --- |"]
    lines += [f"| {_code(elsewhere)} | {_show(here)} |" for here, elsewhere in keys.items()]
    lines += ["", "Of these there is none:", "", "| elsewhere | why |", "| --- | --- |"]
    lines += [
        f"| {_code(elsewhere)} | {here.removeprefix('nothing: ')} |"
        for here, elsewhere in absent.items()
    ]
    lines += [
        "",
        "These options have another name here:",
        "",
        "| elsewhere | here |",
        "| --- | --- |",
    ]
    for group, options in ABSENT_OPTIONS.items():
        lines += [f"| `{group}={option}` | {reason} |" for option, reason in options.items()]
    return "\n".join([INTRODUCTION, *lines, "", END, ""])


def _is_absent(meaning: str) -> bool:
    return meaning.startswith("nothing: ")


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(meaning: str) -> str:
    """Write the key as code, and the remark in brackets as text."""
    key, bracket, remark = meaning.partition(" (")
    return f"`{key}`{bracket}{remark}"


def main(arguments: list[str]) -> int:
    """Write the page, or compare."""
    made = make_page()
    if "--check" in arguments:
        if PAGE.read_text() != made:
            sys.stderr.write(f"{PAGE.name}: run python -m scripts.foreign_table\n")
        return int(PAGE.read_text() != made)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
