"""The changes that an adapter makes to one tensor of its base, a few rows at a time, in fp32.

The formulas are peft's (``peft/tuners/lora``): the same products in the same order, so that fp32
adapters merge to the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

#: Reads one of the adapter's tensors.
Read = Callable[[str], torch.Tensor]


class Delta(Protocol):
    """One step from a base tensor to the merged one."""

    @property
    def needs_all_rows(self) -> bool:
        """Return whether the rows depend on each other, so that all are passed at once."""

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Read the adapter's tensors, and return the function that is applied to the rows.

        Its arguments are rows of the tensor and the index of the first of them.
        """


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that was trained or resized as a whole and is stored in the adapter."""

    key: str
    needs_all_rows = False

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Take the adapter's rows."""
        new = read(self.key)
        return lambda rows, first: new[first : first + len(rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """``W + scale * B @ A`` (Hu et al. 2021), for linear layers and embeddings."""

    a: str
    """Shape (r, in), or (r, vocabulary) for an embedding."""
    b: str
    """Shape (out, r), or (embedding width, r)."""
    scale: float
    transposed: bool
    """The base stores (in, out), as GPT-2's Conv1D and every embedding do."""
    magnitude: str | None = None
    """DoRA's length of each output (Liu et al. 2024), shape (out,); None without DoRA."""

    @property
    def needs_all_rows(self) -> bool:
        """Return whether DoRA's norms run over rows: where outputs are columns."""
        return self.transposed and self.magnitude is not None

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Add the product, and scale to DoRA's lengths where there are any."""
        a, b = read(self.a).float(), read(self.b).float()
        magnitude = None if self.magnitude is None else read(self.magnitude).float().reshape(-1)

        def add(rows: torch.Tensor, first: int) -> torch.Tensor:
            last = first + len(rows)
            # The transposed product, not the product of transposes: peft's bits.
            delta = (b @ a[:, first:last]).T if self.transposed else b[first:last] @ a
            delta = delta.mul_(self.scale)
            if magnitude is not None and self.transposed:
                # Summed in peft's order of operands, which decides the layout in memory and so the
                # last digit of the norm.
                factor: torch.Tensor = magnitude / torch.linalg.norm(rows.T + delta.T, dim=1)
                return factor.view(1, -1) * delta.add_(rows)
            merged = delta.add_(rows)
            if magnitude is None:
                return merged
            norms = torch.linalg.norm(merged, dim=1)
            return merged.mul_((magnitude[first:last] / norms).view(-1, 1))

        return add


@dataclass(frozen=True, slots=True)
class LoraBias:
    """The bias of the second matrix (``lora_bias``), which is added to the base's bias."""

    key: str
    scale: float
    needs_all_rows = False

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Add the scaled bias."""
        bias = read(self.key).float()
        return lambda rows, first: rows.float() + bias[first : first + len(rows)] * self.scale


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding that were trained one by one (``trainable_token_indices``)."""

    key: str
    """Shape (number of indices, embedding width)."""
    indices: tuple[int, ...]
    needs_all_rows = False

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Replace the trained rows."""
        new, indices = read(self.key), torch.tensor(self.indices)

        def put(rows: torch.Tensor, first: int) -> torch.Tensor:
            inside = (indices >= first) & (indices < first + len(rows))
            if not bool(inside.any()):
                return rows
            # In the finer dtype of the two; the writer rounds them, once.
            finer = torch.promote_types(rows.dtype, new.dtype)
            return rows.to(finer).index_copy(0, indices[inside] - first, new[inside].to(finer))

        return put


@dataclass(frozen=True, slots=True, kw_only=True)
class StackDelta:
    """``W + scale * B @ A`` for each expert, with peft's layout of ``ParamWrapper``."""

    a: str
    """Shape (experts * r, in): the rows of each expert stand together."""
    b: str
    """Shape (out, r * experts): column ``j * experts + e`` is column ``j`` of expert ``e``."""
    scale: float
    experts: int
    is_transposed: bool
    """Each expert's matrix is stored as (in, out)."""
    needs_all_rows = False

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Add the products of some experts, which are rows of the stack."""
        a, b = read(self.a), read(self.b)
        a, b = a.reshape(self.experts, -1, a.shape[1]), b.reshape(len(b), -1, self.experts)
        product = "ore,eri->eio" if self.is_transposed else "ore,eri->eoi"

        def add(rows: torch.Tensor, first: int) -> torch.Tensor:
            last = first + len(rows)
            delta = torch.einsum(product, b[..., first:last].float(), a[first:last].float())
            return (delta * self.scale).add_(rows)

        return add


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDelta:
    """The same for a stored tensor that is a matrix of one expert, or some rows of it."""

    a: str
    b: str
    scale: float
    experts: int
    expert: int
    first_row: int
    """The tensor's first row in the expert's matrix, which is stored as (out, in)."""
    needs_all_rows = False

    def bind(self, read: Read) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Add the rows of the expert's product."""
        a, b = read(self.a), read(self.b)
        rank = len(a) // self.experts
        own_a = a[self.expert * rank : (self.expert + 1) * rank].float()
        own_b = b[self.first_row :, self.expert :: self.experts].float()

        def add(rows: torch.Tensor, first: int) -> torch.Tensor:
            delta = own_b[first : first + len(rows)] @ own_a
            return delta.mul_(self.scale).add_(rows)

        return add


StackPart = StackDelta | ExpertDelta
"""The change of a stored tensor that has all experts of a stack, or one."""
