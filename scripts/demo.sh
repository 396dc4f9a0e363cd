#!/usr/bin/env bash
# The main job, from a bare machine: set up, fine-tune SmolLM2-135M with LoRA on the embedded data, merge, and ask the merged
# model a held-out question under plain transformers. Safe to run again: a finished run is found and not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

printf '== fine-tuning: python -m llmtune\n'
.venv/bin/python -m llmtune

run=runs/smollm2_135m-lora-stdlib_docs
printf '== a held-out question to %s/merged under plain transformers\n' "$run"
.venv/bin/python - "$run" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.set_verbosity_error()
logging.disable_progress_bar()
run = Path(sys.argv[1])
sample = json.loads((run / "samples.json").read_text())[0]
model = AutoModelForCausalLM.from_pretrained(run / "merged")
tokenizer = AutoTokenizer.from_pretrained(run / "merged")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": sample["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=48, do_sample=False)
print("question:", sample["prompt"])
print("answer:  ", tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
print("the docs:", sample["expected"])
PYTHON
