"""Translate the tokenizer that transformers runs into the keys that llama.cpp reads.

llama.cpp has two tokenizers for these models: ``gpt2`` (byte-level BPE with a named splitting rule)
and ``llama`` (SentencePiece BPE: characters are joined by the score of the token that they make). A
wrong name would give other ids, and worse answers without any visible reason; so a tokenizer that
is not known to run the same way in llama.cpp is refused.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from llmtune.errors import ExportError
from llmtune.model.chat_turns import end_of_turn_ids
from llmtune.units import some

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: How text is split before merging, and whether words of the vocabulary skip the merges ->
#: llama.cpp's name of the splitting rule.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    (
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",),
        True,
    ): "llama-bpe",
    (
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",),
        False,
    ): "smaug-bpe",
    ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}",), True): "tekken",
    (
        (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}",),
        False,
    ): "gpt-4o",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The ``tokenizer.*`` keys of a GGUF file."""

    model: str
    """``gpt2`` or ``llama``."""
    pre: str
    """llama.cpp's name of the splitting rule."""
    tokens: list[str]
    """One per row of the embedding."""
    types: list[TokenType]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    """Those of ``bos eos unk pad eot`` that exist."""
    stops: list[str]
    """Tokens that end an answer."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | dict[str, str] | None
    notes: list[str]
    """Differences between llama.cpp and transformers, for the user to read."""


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the tokenizer that transformers loads from ``folder``.

    Args:
        rows: Rows of the embedding; those that no token uses become ``[PADn]``.

    Raises:
        ExportError: There is none, or llama.cpp would tokenize differently.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"export=gguf: no tokenizer can be loaded beside the weights ({error})"
        ) from error
    if not tokenizer.is_fast:
        raise ExportError(
            "export=gguf needs a tokenizer.json (a fast tokenizer); save the base's tokenizer"
            " with one"
        )
    # transformers rebuilds some tokenizers; what it runs counts, and not what the file says.
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _find_model(state)
    notes = _find_normalizer_notes(state)

    pre, merges, prefix = "default", None, False
    if kind == "gpt2":
        pre = _split_name(state)
        merges = [_join(pair) for pair in state["model"]["merges"]]
        if not merges:
            raise ExportError(
                "export=gguf: the tokenizer has no merges, and llama.cpp loads no BPE without them"
            )
    else:
        prefix = _prefixes_space(state, notes)

    tokens, types = _tokens(tokenizer, state, rows, notes)
    special = _special_ids(tokenizer, tokens)
    if kind == "llama" and "unk" in special:
        types[special["unk"]] = TokenType.UNKNOWN
    add_bos, add_eos = _find_added_tokens(tokenizer)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(state, tokens, types) if kind == "llama" else None,
        merges=merges,
        special_ids=special,
        stops=[tokens[token] for token in end_of_turn_ids(tokenizer) if token < rows],
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        chat_template=tokenizer.chat_template,
        notes=notes,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the vocabulary to a ``gguf.GGUFWriter``."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    # Always written: llama.cpp's own default depends on the splitting rule.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    template = vocabulary.chat_template
    if isinstance(template, dict):
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()]
        )
    elif template:
        writer.add_chat_template(template)


def _find_model(state: dict[str, Any]) -> str:
    """Return llama.cpp's name of the tokenizer: ``gpt2`` or ``llama``."""
    model = state["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"export=gguf: the tokenizer is a {model['type']} model; llama.cpp's tokenizers for"
            " these architectures are BPE"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ExportError(
                f"export=gguf: the tokenizer has {key}={model[key]!r}, which llama.cpp does not"
                " know"
            )
    if any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"])):
        return "gpt2"
    if model.get("byte_fallback"):
        return "llama"
    raise ExportError(
        "export=gguf: the tokenizer is neither byte-level BPE nor BPE with byte_fallback"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Flatten a normalizer or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps = []
    for inner in part.get("pretokenizers", part.get("normalizers", [])):
        steps += _steps(inner)
    return steps


def _split_name(state: dict[str, Any]) -> str:
    """Return llama.cpp's name of the splitting rule of a byte-level tokenizer."""
    signature: list[str] = []
    for step in _steps(state["pre_tokenizer"]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            signature.append(str(step["pattern"].get("Regex")))
        elif step["type"] == "Digits" and step["individual_digits"]:
            signature.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            if step["use_regex"]:
                signature.append("gpt2")
        else:
            signature.append(json.dumps(step))
    ignore_merges = bool(state["model"].get("ignore_merges"))
    name = _SPLITS.get((tuple(signature), ignore_merges))
    if name is None:
        raise ExportError(
            f"export=gguf: the tokenizer splits text by {' then '.join(signature) or 'nothing'}"
            f" (ignore_merges={ignore_merges}), and no splitting rule of llama.cpp is known to do"
            f" the same; known are {', '.join(_SPLITS.values())}. export=safetensors keeps the"
            " tokenizer as it is"
        )
    return name


def _find_normalizer_notes(state: dict[str, Any]) -> list[str]:
    """Refuse unknown normalizers; return notes about those that llama.cpp leaves out."""
    notes = []
    for step in _steps(state["normalizer"]):
        replaces_spaces = (
            step["type"] == "Replace"
            and step["pattern"] == {"String": " "}
            and step["content"] == _SPACE
        )
        if replaces_spaces or (step["type"] == "Prepend" and step["prepend"] == _SPACE):
            continue
        if step["type"] not in ("NFC", "NFKC"):
            raise ExportError(
                f"export=gguf: the tokenizer changes text by {json.dumps(step)}, which llama.cpp"
                " does not do"
            )
        notes.append(
            f"llama.cpp leaves out the tokenizer's {step['type']}: give it text that is"
            " normalized so"
        )
    return notes


def _prefixes_space(state: dict[str, Any], notes: list[str]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text."""
    steps = _steps(state["pre_tokenizer"])
    if not steps:
        return any(step["type"] == "Prepend" for step in _steps(state["normalizer"]))
    space = steps[0]
    if len(steps) > 1 or space["type"] != "Metaspace" or space["replacement"] != _SPACE:
        raise ExportError(
            f"export=gguf: the tokenizer splits text by {json.dumps(steps)}, which llama.cpp does"
            " not do"
        )
    if space.get("split", True) and any(_SPACE in token[1:] for token in state["model"]["vocab"]):
        raise ExportError(
            "export=gguf: the tokenizer splits text at spaces (Metaspace split=true) and has tokens"
            " with spaces inside; llama.cpp would use those"
        )
    scheme = str(space["prepend_scheme"])
    if scheme != "never":
        notes.append(
            "llama.cpp puts a space before a text that begins with one; transformers does not"
        )
    if scheme == "first":
        notes.append(
            "llama.cpp puts a space behind every special token; transformers only at the start of a"
            " text"
        )
    return scheme != "never"


def _join(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _tokens(
    tokenizer: Any, state: dict[str, Any], rows: int, notes: list[str]
) -> tuple[list[str], list[TokenType]]:
    """Return text and type of every row of the embedding."""
    known = {token: text for text, token in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in state["added_tokens"]}

    # Added tokens without a row are left out; other tokens must have one.
    beyond = sorted(token for token in known if token >= rows)
    if any(token not in added for token in beyond):
        raise ExportError(
            f"export=gguf: the tokenizer has {max(known) + 1} tokens and the model {rows} rows of"
            " embedding; the tokenizer belongs to another model"
        )
    if beyond:
        notes.append(
            "tokens without a row of embedding are left out:"
            f" {some([known[token] for token in beyond])}"
        )

    # Rows without a token get a text that no token has.
    texts = set(known.values())
    tokens, types = [], []
    for token in range(rows):
        text, kind = known.get(token), TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{token}]", TokenType.UNUSED
            while text in texts:
                text = f"[{text}]"
        elif token in added:
            kind = TokenType.CONTROL
            if not added[token]["special"]:
                kind = TokenType.USER_DEFINED
                text = text.replace(_SPACE, " ")
            if added[token]["lstrip"] or added[token]["rstrip"]:
                notes.append(f"llama.cpp does not take away the spaces around {text}")
        elif state["model"].get("byte_fallback") and _BYTE_TOKEN.fullmatch(text):
            kind = TokenType.BYTE
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(state: dict[str, Any], tokens: list[str], types: list[TokenType]) -> list[float]:
    """Return the score of every token: the earlier its merge, the higher.

    Raises:
        ExportError: llama.cpp would join two tokens that the tokenizer does not merge; or byte
            tokens are missing.
    """
    byte_tokens = types.count(TokenType.BYTE)
    if byte_tokens != 256:
        raise ExportError(
            f"export=gguf: the tokenizer has {byte_tokens} of the 256 byte tokens <0x00> to <0xFF>,"
            " which llama.cpp needs for unknown characters"
        )

    # The score of a token follows from the rank of the merge that makes it.
    ranks: dict[str, int] = {}
    merges = {
        tuple(pair.split(" ") if isinstance(pair, str) else pair)
        for pair in state["model"]["merges"]
    }
    for rank, pair in enumerate(state["model"]["merges"]):
        ranks.setdefault(_join(pair).replace(" ", ""), rank)
    # llama.cpp joins any two tokens whose texts make a third one.
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    missing = []
    for text in sorted(normal):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal and (left, right) not in merges:
                missing.append(f"{left} {right}")
    if missing:
        raise ExportError(
            f"export=gguf: llama.cpp joins any two tokens that make a third, and {len(missing)}"
            f" such pairs are no merge of the tokenizer ({some(missing)}); this is no SentencePiece"
            " vocabulary. export=safetensors keeps it as it is"
        )
    return [-float(ranks.get(text, len(ranks))) for text in tokens]


def _special_ids(tokenizer: Any, tokens: list[str]) -> dict[str, int]:
    """Return the special tokens that have a row of the embedding."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None or ids["eos"] >= len(tokens):
        raise ExportError(
            f"export=gguf: eos_token {tokenizer.eos_token!r} is no token of the model; set it in"
            " the tokenizer"
        )
    others = [token for token in end_of_turn_ids(tokenizer) if token != ids["eos"]]
    if others:
        ids["eot"] = others[0]
    return {name: token for name, token in ids.items() if token is not None and token < len(tokens)}


def _find_added_tokens(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether transformers puts bos before a text, and whether it puts eos behind it.

    Raises:
        ExportError: It adds other tokens.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add_bos in (False, True):
        for add_eos in (False, True):
            if with_special == [bos] * add_bos + plain + [eos] * add_eos:
                return add_bos, add_eos
    raise ExportError(
        f"export=gguf: the tokenizer makes {tokenizer.convert_ids_to_tokens(with_special)} of 'a'; "
        "llama.cpp can add bos_token and eos_token only"
    )
