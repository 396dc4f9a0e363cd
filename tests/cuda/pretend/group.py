"""Collectives of pretend devices: as NCCL they take no host tensors and run on a stream of their
own; gloo sends the bytes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.cuda import pretend


class Done(dist._Work):
    """Work that has been done, which the current stream has to wait for all the same."""

    def __init__(self, ticket: int, results: list[torch.Tensor]):
        super().__init__()
        self._ticket, self._results = ticket, results

    def wait(self, timeout: Any = None) -> bool:
        """The current stream waits, the host does not."""
        if self._ticket >= 0:
            pretend.load_device().wait_collective(self._ticket)
        return True

    def is_completed(self) -> bool:
        """The host does not know."""
        return True

    def get_future(self) -> Any:
        """With the results."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._results)
        return future


class PretendGroup(dist.ProcessGroup):
    """One rank's end."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._host: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("host", store), rank, size, timeout
        )
        self._device = pretend.load_device()

    def getBackendName(self) -> str:  # noqa: N802
        """Of torch's registry."""
        return pretend.BACKEND

    def _start(self, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> int:
        for tensor in (*reads, *writes):
            if tensor.device.type != pretend.NAME:
                # The words of torch, where NCCL is the only backend of a group.
                raise RuntimeError(
                    f"No backend type associated with device type {tensor.device.type}"
                )
            if not tensor.is_contiguous():
                raise ValueError("Tensors must be contiguous")
        return int(self._device.begin_collective(reads, writes, name))

    def _see(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._device.host_view(tensor) for tensor in tensors]

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        """In place."""
        ticket = self._start("allreduce", tensors, tensors)
        self._reduce_on_host(self._see(tensors), opts or dist.AllreduceOptions())
        return Done(ticket, tensors)

    def _reduce_on_host(self, seen: list[torch.Tensor], opts: Any) -> None:
        mean = "AVG" in str(opts.reduceOp)
        plain: Any = dist.AllreduceOptions()
        plain.reduceOp = dist.ReduceOp.SUM if mean else opts.reduceOp
        self._host.allreduce(seen, plain).wait()
        if mean:
            for tensor in seen:
                tensor /= self.size()

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        """From ``opts.rootRank``."""
        ticket = self._start("broadcast", tensors, tensors)
        self._host.broadcast(self._see(tensors), opts or dist.BroadcastOptions()).wait()
        return Done(ticket, tensors)

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        """To ``opts.rootRank``."""
        ticket = self._start("reduce", tensors, tensors)
        self._host.reduce(self._see(tensors), opts or dist.ReduceOptions()).wait()
        return Done(ticket, tensors)

    def allgather(  # type: ignore[override]
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Done:
        """Into a list."""
        ticket = self._start("allgather", inputs, outputs[0])
        self._host.allgather([self._see(outputs[0])], self._see(inputs)).wait()
        return Done(ticket, outputs[0])

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> Done:
        ticket = self._start("allgather", [given], [output])
        parts = list(self._see([output])[0].view(self.size(), -1).unbind(0))
        self._host.allgather([parts], [self._see([given])[0].reshape(-1).clone()]).wait()
        return Done(ticket, [output])

    def _reduce_scatter_base(
        self, output: torch.Tensor, given: torch.Tensor, opts: Any = None
    ) -> Done:
        ticket = self._start("reduce_scatter", [given], [output])
        (whole,) = self._see([given])
        whole = whole.clone()
        self._reduce_on_host([whole], opts or dist.ReduceScatterOptions())
        self._see([output])[0].copy_(whole.reshape(self.size(), -1)[self.rank()].view(output.shape))
        return Done(ticket, [output])

    def barrier(self, opts: Any = None) -> Done:
        """Blocks the host, as NCCL's does."""
        self._device.synchronize()
        self._host.barrier().wait()
        return Done(-1, [])

    all_gather_single = all_gather_into_tensor = _allgather_base  # type: ignore[assignment]
    reduce_scatter_single = reduce_scatter_tensor = _reduce_scatter_base  # type: ignore[assignment]


def make_group(store: Any, rank: int, size: int, timeout: timedelta) -> PretendGroup:
    """For ``Backend.register_backend``."""
    return PretendGroup(store, rank, size, timeout)
