"""Cycles of a directed graph."""

from __future__ import annotations

from collections.abc import Mapping


def find_cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """One cycle of the graph, its first node again at the end; empty when there is none.

    >>> find_cycle({"a": {"b"}, "b": {"a"}, "c": {"a"}})
    ['a', 'b', 'a']
    """
    left = {node: set(targets) for node, targets in edges.items()}
    while ends := [node for node, targets in left.items() if not targets]:
        for node in ends:
            del left[node]
        for targets in left.values():
            targets.difference_update(ends)
    if not left:
        return []
    path = [min(left)]  # every node that is left has an edge to another one
    while path[-1] not in path[:-1]:
        path.append(min(left[path[-1]]))
    return path[path.index(path[-1]) :]
