"""Decide from a chat template's syntax tree whether it writes message contents unchanged.

Where it does, the text between messages depends on who speaks in which order, never on the words;
it can be learned once for each order, and rows need no rendering. Anything that is not understood
counts as a no.
"""

from __future__ import annotations

from enum import Enum

from jinja2 import nodes


class Verbatim(Enum):
    """The way in which contents reach the text."""

    no = "no"
    """Perhaps changed, or looked at."""
    trimmed = "trimmed"
    """Unchanged but for white space at their ends."""
    yes = "yes"
    """Letter by letter."""


#: Fields of a message that say nothing about its words, and those of a loop. Others may be
#: methods, or messages.
_FIELDS = {
    "role",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
}
_LOOP = {"index", "index0", "revindex", "revindex0", "first", "last", "length"}


#: Nodes that are allowed anywhere, as long as no contents go into them.
_UNDERSTOOD = (
    nodes.Template,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.Assign,
    nodes.Const,
    nodes.Name,
    nodes.NSRef,
    nodes.Compare,
    nodes.Operand,
    nodes.BinExpr,
    nodes.UnaryExpr,
    nodes.Filter,
    nodes.Test,
    nodes.Call,
    nodes.Keyword,
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
)


class _NotUnderstoodError(Exception):
    """Something that could look at a message's words."""


def find_verbatim(tree: nodes.Template) -> Verbatim:
    """Read a template's tree."""
    reader = _Reader()
    try:
        reader.read(tree, written=False)
    except _NotUnderstoodError:
        return Verbatim.no
    return Verbatim.trimmed if reader.trims else Verbatim.yes


class _Reader:
    """Walks the tree.

    It knows which names are lists of messages, which are one message, and which hold its words.
    """

    def __init__(self) -> None:
        self.lists = {"messages"}
        self.singles: set[str] = set()
        self.texts: set[str] = set()
        self.contents_read = 0
        self.trims = False

    def read(self, node: nodes.Node, written: bool) -> None:
        """Read a node and those below it.

        Args:
            written: Whether the value of this node goes to the text and nowhere else.

        Raises:
            _NotUnderstoodError: Contents may be changed or looked at.
        """
        if (
            self._read_writing(node, written)
            or self._read_binding(node)
            or self._read_message_field(node, written)
            or self._read_name(node, written)
        ):
            return
        if not isinstance(node, _UNDERSTOOD):
            # Macros, blocks that capture what they write, imports ...
            raise _NotUnderstoodError
        for child in node.iter_child_nodes():
            self.read(child, written=False)

    def _read_writing(self, node: nodes.Node, written: bool) -> bool:
        """Read what hands its value on to the text; False for another node."""
        match node:
            case nodes.Output() | nodes.Add() | nodes.Concat():
                inside = written or isinstance(node, nodes.Output)
                for child in node.iter_child_nodes():
                    self.read(child, inside)
            case nodes.Filter(name="trim", node=nodes.Node() as inner, args=[], kwargs=[]) if (
                written
            ):
                self.trims = True
                self.read(inner, written=True)
            case nodes.CondExpr(test=test, expr1=first, expr2=second):
                self.read(test, written=False)
                self.read(first, written)
                if second is not None:
                    self.read(second, written)
            case _:
                return False
        return True

    def _read_binding(self, node: nodes.Node) -> bool:
        """Read what gives a name to messages or to contents; False for another node."""
        match node:
            case nodes.For(target=nodes.Name(name=name), iter=source) if self._is_list(source):
                self.singles.add(name)
                children = [*node.body, *node.else_]
                if node.test:
                    children.append(node.test)
                for child in children:
                    self.read(child, written=False)
            case nodes.Assign(target=nodes.Name(name=name), node=source) if self._is_list(source):
                self.lists.add(name)
            case nodes.Assign(target=nodes.Name(name=name), node=source):
                before = self.contents_read
                self.read(source, written=True)
                if self.contents_read > before:
                    self.texts.add(name)
            case _:
                return False
        return True

    def _read_message_field(self, node: nodes.Node, written: bool) -> bool:
        """Read a field of a message or loop, or the number of messages; False for another node."""
        match node:
            case nodes.Filter(node=source, name="length" | "count") if (
                source is not None and self._is_list(source)
            ):
                pass
            case (
                nodes.Getitem(node=source, arg=nodes.Const(value=str(field)))
                | nodes.Getattr(node=source, attr=field)
            ) if self._is_message(source):
                if field == "content":
                    self._read_content(written)
                elif field not in _FIELDS:
                    raise _NotUnderstoodError
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=field) if field in _LOOP:
                pass
            case _:
                return False
        return True

    def _read_name(self, node: nodes.Node, written: bool) -> bool:
        """Read a name that holds contents; False for another node."""
        match node:
            case nodes.Name(name=name) if name in self.texts:
                self._read_content(written)
            case nodes.Name(name=name) if name in self.lists | self.singles | {"loop"}:
                # A whole message, or all of them.
                raise _NotUnderstoodError
            case _:
                return False
        return True

    def _read_content(self, written: bool) -> None:
        if not written:
            raise _NotUnderstoodError
        self.contents_read += 1

    def _is_list(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Name(name=name):
                return name in self.lists
            case nodes.Getitem(node=source, arg=nodes.Slice()):
                return self._is_list(source)
        return False

    def _is_message(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Name(name=name):
                return name in self.singles
            case nodes.Getitem(
                node=source, arg=nodes.Const() | nodes.Sub() | nodes.Add() | nodes.Neg()
            ):
                return self._is_list(source)
        return False
