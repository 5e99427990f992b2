"""One answer for all processes of a distributed run.

Not a broadcast: ranks with batches of other lengths, or with other layers, do not ask for the same
answers at the same time, or at all, and a collective that some of them never join is a deadlock.
Through the store of the process group the first rank to ask answers for all.
"""

import datetime
from collections.abc import Callable

import torch

# A rank compiles and measures in seconds. One that waits for a collective which this process has
# not joined yet would never answer, so it is not waited for longer.
PATIENCE = datetime.timedelta(minutes=1)


def agreed(topic: str, answer: Callable[[], str], store, patience=PATIENCE) -> str:
    """The answer of the first process that asked about `topic`; that process computes it.

    Args:
        topic: the question.
        answer: computes this process's answer; not empty.
        store: the `torch.distributed.Store` that the processes share, or None for a process alone.
        patience: how long to wait for the answer of another process.

    Raises:
        RuntimeError: the process that was asked first failed or is not done in time.
        Exception: what `answer` raised, here and then.
    """
    if store is None:
        return answer()
    asked, answered = f"{topic}/asked", f"{topic}/answer"
    if store.add(asked, 1) == 1:
        found = ""
        try:
            found = answer()
        finally:
            store.set(answered, found)  # empty: the others need not wait for what will not come
        return found
    store.wait([answered], patience)
    found = store.get(answered).decode()
    if not found:
        raise RuntimeError("the process that measures for all of them failed")
    return found


def group_store():
    """The store of this process's default group; None if it is in no group."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    store = distributed.distributed_c10d._get_default_store()
    return distributed.PrefixStore("lorasb_kernels", store)


__all__ = ["agreed", "group_store"]
