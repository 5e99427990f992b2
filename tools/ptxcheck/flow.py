"""Order of basic blocks for scheduling divergent threads.

Running the group of threads that is first in this order makes divergent threads
meet again: a join comes after both of its branches, and everything in a loop comes
before what follows the loop, wherever the compiler placed the blocks.  Paths that
leave without another barrier come before paths that lead to one.
"""

from __future__ import annotations


def successors(code, label_pc):
    """(sorted block starts, {start: [start of successor, ...]})."""
    n = len(code)
    starts = {0} | set(label_pc.values())
    for pc, ins in enumerate(code):
        if ins.base in ("bra", "brx", "ret", "exit"):
            starts.add(pc + 1)
    starts = sorted(s for s in starts if s < n)
    edges = {}
    for k, s in enumerate(starts):
        end = starts[k + 1] if k + 1 < len(starts) else n
        last = code[end - 1]
        out = []
        if last.base == "bra":
            out = [label_pc.get(getattr(last.ops[0], "name", None))]
        elif last.base == "brx":
            out = [label_pc.get(x.name) for x in getattr(last.ops[1], "items", [])]
        if last.base not in ("bra", "brx", "ret", "exit") or last.guard is not None:
            out.append(end)
        edges[s] = sorted({t for t in out if t is not None and t < n})
    return starts, edges


def reach_barrier(code, starts, edges):
    """Blocks from which a block-wide barrier can be reached."""
    ends = [*starts[1:], len(code)]
    found = {
        s
        for s, e in zip(starts, ends, strict=True)
        if any(i.base in ("bar", "barrier") and "warp" not in i.mods for i in code[s:e])
    }
    grown = True
    while grown:
        more = {s for s in starts if s not in found and any(t in found for t in edges[s])}
        found |= more
        grown = bool(more)
    return found


def components(nodes, edges, roots, late):
    """Strongly connected components in topological order; among unordered
    ones those outside of `late`, then those at lower addresses come first."""
    index, low, on, stack, out = {}, {}, set(), [], []
    inside = set(nodes)
    for root in roots:
        if root in index:
            continue
        work = [(root, None)]
        while work:
            v, it = work.pop()
            if it is None:
                index[v] = low[v] = len(index)
                stack.append(v)
                on.add(v)
                it = iter(
                    sorted((t for t in edges[v] if t in inside), key=lambda t: (t not in late, -t))
                )
            pushed = False
            for t in it:
                if t not in index:
                    work.append((v, it))
                    work.append((t, None))
                    pushed = True
                    break
                if t in on:
                    low[v] = min(low[v], index[t])
            if pushed:
                continue
            if low[v] == index[v]:
                comp = []
                while True:
                    t = stack.pop()
                    on.discard(t)
                    comp.append(t)
                    if t == v:
                        break
                out.append(comp)
            if work:
                parent = work[-1][0]
                low[parent] = min(low[parent], low[v])
    return out[::-1]


def block_order(starts, edges, late):
    """Blocks in scheduling order."""
    result = []

    def visit(nodes, edges, roots):
        for comp in components(nodes, edges, roots, late):
            if len(comp) == 1:
                result.append(comp[0])
                continue
            # the loop is entered at its header; cut the edges back to it
            members = set(comp)
            entered = [
                v
                for v in comp
                if v in roots or any(v in edges[u] for u in nodes if u not in members)
            ]
            head = min(entered or comp)
            inner = {u: [t for t in edges[u] if t != head] for u in comp}
            visit(comp, inner, [head, *sorted(members - {head})])

    visit(starts, edges, starts)
    return result


def priorities(code, label_pc):
    """Scheduling rank of every instruction index (and of the end)."""
    starts, edges = successors(code, label_pc)
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    rank, k = [0] * (len(code) + 1), 0
    late = reach_barrier(code, starts, edges)
    for s in block_order(starts, edges, late):
        for pc in range(s, ends[s]):
            rank[pc] = k
            k += 1
    rank[len(code)] = k
    return rank
