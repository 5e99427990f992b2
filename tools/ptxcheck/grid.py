"""All blocks of a launch: batches of whole clusters, in turns."""

from __future__ import annotations

import time
from itertools import chain

import numpy as np

from .errors import StepLimitExceeded
from .executor import Batch

SLICE = 5000  # segments a batch runs before another gets a turn
RESIDENT_BYTES = 1 << 31


def cluster_blocks(grid, dims):
    """The linear numbers of the blocks of every cluster, in order of their ranks."""
    if dims == (1, 1, 1):
        return [[i] for i in range(grid[0] * grid[1] * grid[2])]
    gx, gy, gz = grid
    cx, cy, cz = dims
    return [
        [
            x + a + gx * (y + b + gy * (z + c))
            for c in range(cz)
            for b in range(cy)
            for a in range(cx)
        ]
        for z in range(0, gz, cz)
        for y in range(0, gy, cy)
        for x in range(0, gx, cx)
    ]


def run_grid(kernel, grid, params, dyn_smem, options, stats):
    """Run all blocks of a launch.

    Whole clusters of blocks are batched.  Batches are time-sliced: one that uses up its slice is
    suspended and the next one starts, so that every block eventually runs even
    when earlier blocks wait for it."""
    clusters = cluster_blocks(grid, kernel.cluster)
    bx, by, bz = kernel.block
    tp = (bx * by * bz + 31) // 32 * 32
    each = max(1, min(len(clusters), options.max_lanes // (tp * len(clusters[0]))))
    rng = None
    if options.schedule_seed is not None:
        rng = np.random.default_rng(options.schedule_seed)
        clusters = [clusters[i] for i in rng.permutation(len(clusters))]
    todo = [[*chain(*clusters[i : i + each])] for i in range(0, len(clusters), each)]
    todo.reverse()
    per = each * len(clusters[0])
    key = (
        per,
        options.key(),
        kernel.block,
        kernel.cluster,
        kernel.explicit_cluster,
        kernel.shared_size,
    )
    if key not in kernel.pool:
        kernel.pool.clear()  # batches are large: keep one kind only
    pool = kernel.pool.setdefault(key, [])
    running = []
    start = time.time()
    total = rounds = 0
    with np.errstate(all="ignore"):
        while todo or running:
            room = not running or running[0].st.nbytes * len(running) < RESIDENT_BYTES
            if todo and (room or rounds >= 50):
                batch = pool.pop() if pool else Batch(kernel, per, options)
                batch.start(todo.pop(), grid, params, dyn_smem, stats, rng)
                running.insert(0, batch)
                rounds = 0
            rounds += 1
            for batch in list(running):
                before = batch.st.steps
                done = batch.run(SLICE)
                total += batch.st.steps - before
                if done:
                    batch.collect()
                    running.remove(batch)
                    rounds = 0
                    if len(pool) < 2:
                        pool.append(batch)
                if total > options.max_steps:
                    bar = batch.st.mbar.refused
                    raise StepLimitExceeded(
                        f"kernel {kernel.name}: more than "
                        f"{options.max_steps} steps; endless loop?"
                        + (f"\n  last polled in vain: {bar}" if bar else "")
                    )
                if options.time_limit and time.time() - start > options.time_limit:
                    raise StepLimitExceeded(
                        f"kernel {kernel.name}: ran longer than {options.time_limit} s"
                    )
    stats.steps = total
    stats.seconds += time.time() - start
