"""How the workers of a stage find each other: by a store that one of them has.

torch by itself opens that store on every interface of a machine, and it asks nobody who they are.
Here it listens at one address alone. The port is taken when it is chosen, so that no other process
can take it in between.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

MASTER_ADDRESS, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"  # where libraries look for them

_listener: list[socket.socket] = []


def listen(address: str) -> int:
    """Takes a port for the store; is called in the first worker.

    Args:
        address: Where to listen.

    Returns:
        The port.

    Raises:
        OSError: The machine has no such address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listener[:] = [socket.create_server((address, 0), family=family)]
    return _listener[0].getsockname()[1]


def join(rank: int, num_workers: int, address: str, port: int, backend: str, limit_s: int) -> None:
    """Waits for all workers and makes their process group; is called in each.

    Args:
        rank: The worker's number.
        num_workers: How many there are.
        address: Of the first worker's store.
        port: What `listen` has returned.
        backend: `gloo` or `nccl`.
        limit_s: Seconds after which a collective operation is given up.
    """
    os.environ |= {MASTER_ADDRESS: address, MASTER_PORT: str(port)}
    limit = timedelta(seconds=limit_s)
    own = _listener.pop().detach() if rank == 0 else None
    store = dist.TCPStore(
        address, port, num_workers, rank == 0, timeout=limit, master_listen_fd=own
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_workers, timeout=limit)
