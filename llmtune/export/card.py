"""The model card of an export: what it was made from, and how to load it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jinja2

from llmtune.checkpoint import names
from llmtune.secrets import redact

_TEMPLATE = """---
{% if base_id %}base_model: {{ base_id }}
{% endif %}library_name: transformers
pipeline_tag: text-generation
tags: [llmtune, {{ tuner }}]
---

# {{ name }}

{{ base }} fine-tuned with [llmtune] ({{ tuner }}).

| | |
| --- | --- |
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ folder }}")
tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```

The licence of {{ base }} applies.
"""


def write_card(folder: Path, published_as: Path, base: str, tuner: str, facts: dict[str, Any]) -> None:
    """``README.md``; it carries no clock, so that the same inputs make the same file."""
    text = jinja2.Template(_TEMPLATE, keep_trailing_newline=True).render(
        name=published_as.parent.name if published_as.name == "merged" else published_as.name,
        base=base,
        base_id=base if "/" in base and not base.startswith(("/", ".")) else None,
        tuner=tuner,
        facts=facts,
        folder=published_as,
    )
    (folder / "README.md").write_text(redact(text.replace("[llmtune]", "llmtune")), encoding="utf-8")


def facts_of_run(run: Path | None) -> dict[str, Any]:
    """What the run's files say about data, settings and results; empty without a run."""
    if run is None or not (run / names.PLAN).is_file():
        return {}
    plan = json.loads((run / names.PLAN).read_text())
    data, shape = plan["data"], plan["shape"]
    facts: dict[str, Any] = {
        "base weights": Path(plan["model_folder"]).name,
        "training rows": f"{data['train']['rows']:,} ({data['train']['tokens']:,} tokens, "
        f"{data['train']['trained_tokens']:,} trained)",
        "data fingerprint": data["fingerprint"],
        "trainable parameters": f"{shape['trainable_parameters']:,} of {shape['parameters']:,}",
        "planned steps": plan["steps"]["total_steps"],
        "global batch size": plan["batch"]["global_batch_size"],
        "peak learning rate": plan["deepspeed"]["optimizer"]["params"]["lr"],
    }
    evaluations = _evaluations(run / names.METRICS)
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        facts["held-out loss"] = (
            f"{first['eval_loss']:.4f} at step {first['step']}, {last['eval_loss']:.4f} at step {last['step']}"
        )
    return facts


def _evaluations(metrics: Path) -> list[dict[str, Any]]:
    """Evaluation lines; a half-written one, as a crash leaves it, is passed over."""
    found = []
    for line in metrics.read_text().split("\n") if metrics.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if "eval_loss" in record:
                found.append(record)
    return found
