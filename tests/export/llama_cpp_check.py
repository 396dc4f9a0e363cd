"""What llama.cpp makes of a GGUF file; for an interpreter that has llama-cpp-python, which llmtune
itself does not need.

    python llama_cpp_check.py FILE.gguf < request.json

The request: ``texts`` to tokenize, ``prompt`` ids to go on from for ``new_tokens``, ``ids`` whose
top tokens are wanted. The answer on stdout: ``tokenized``, ``greedy``, ``top``, and ``logits`` of
the last of ``ids``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp


def main() -> None:
    """Answer one request."""
    request: dict[str, Any] = json.load(sys.stdin)
    model = llama_cpp.Llama(
        sys.argv[1],
        n_ctx=1024,
        n_batch=1024,
        n_ubatch=1024,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )
    answer: dict[str, Any] = {}
    answer["tokenized"] = [
        list(model.tokenize(text.encode(), add_bos=True, special=True)) for text in request["texts"]
    ]
    ids: list[int] = request["ids"]
    model.eval(ids)
    answer["top"] = model.scores[: len(ids)].argmax(-1).tolist()
    answer["logits"] = model.scores[len(ids) - 1].tolist()
    model.reset()
    tokens: list[int] = request["prompt"]
    greedy: list[int] = []
    for _ in range(request["new_tokens"]):
        model.eval(tokens)
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        tokens = greedy[-1:]
    answer["greedy"] = greedy
    answer["end"] = [model.token_bos(), model.token_eos()]
    sys.stdout.write(json.dumps(answer))


main()
