"""The synthetic task `plan`: find the way through a path-star graph (arXiv 2403.06963). From a start two arms lead to two ends;
all edges are given in random order, then the start and one end; the answer is the arm that leads there, node by node.

A model that writes from left to right must choose the arm with its first node: it guesses, unless it looks all the way back
from the end. Every later node is but a step along an edge.

    {"input": "k w, a d, d t, g a, r k, g r, ... from g to p", "target": "g a d t p"}
"""
NODES = "abcdefghijklmnoprstvwxyz"  # a letter behind a space is one token of `bpe`: all but q and u
ARM = 4  # nodes behind the start


def plan(rng, split, split_of):
    """Return the example that a random.Random draws; split_of(word) names the split that owns a graph."""
    while True:
        start, *rest = sorted(NODES, key=lambda _: rng.random())
        arms = rest[:ARM], rest[ARM:2 * ARM]
        if split_of("".join([start, *sorted("".join(arm) for arm in arms)])) == split:
            break
    way = [start, *arms[int(rng.random() * 2)]]
    edges = [f"{a} {b}" for arm in arms for a, b in zip([start, *arm], arm)]
    edges = sorted(edges, key=lambda _: rng.random())
    return {"input": f"{', '.join(edges)} from {start} to {way[-1]}", "target": " ".join(way)}
