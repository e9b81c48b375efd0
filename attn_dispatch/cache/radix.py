"""`PrefixTree`: which prefixes are in the cache, block by block.

RadixAttention (Zheng et al., SGLang, arXiv 2312.07104): a tree over token sequences whose paths are prefixes. Here an
edge is one full block of tokens, the unit in which blocks are shared and evicted, so that no edge is ever split.
"""

from __future__ import annotations

from collections.abc import Hashable

from attn_dispatch.errors import CacheError

__all__ = ["Node", "PrefixTree"]


class Node:
    """One cached block: what its tokens are, and what came before them.

    Attributes:
        parent: the block before it; None of a tenant's root.
        key: the block's tokens as bytes (of a root: its tenant).
        block: its id (-1 of a root).
        children: by their tokens. Compared in full: no collision of hashes can mix up two prompts.
    """

    __slots__ = ("block", "children", "key", "parent")

    def __init__(self, parent: Node | None, key: Hashable, block: int) -> None:
        self.parent = parent
        self.key = key
        self.block = block
        self.children: dict[Hashable, Node] = {}


class PrefixTree:
    """The cached prefixes of every tenant. Tenants never see each other's."""

    def __init__(self) -> None:
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def child(self, parent: Node | None, tenant: Hashable, key: bytes) -> Node | None:
        """Return the block with these tokens that follows `parent` (None: that a tenant's prefixes begin with)."""
        above = self._roots.get(tenant) if parent is None else parent
        return None if above is None else above.children.get(key)

    def add(self, parent: Node | None, tenant: Hashable, key: bytes, block: int) -> Node:
        """Record that `block` holds these tokens after `parent` (None: at the beginning).

        Raises:
            CacheError: the block is in the tree, or another one has that place.
        """
        above = self._roots.setdefault(tenant, Node(None, tenant, -1)) if parent is None else parent
        if block in self._nodes or key in above.children:
            raise CacheError(f"block {block} cannot be recorded: it is in the tree, or its place is taken")
        node = above.children[key] = self._nodes[block] = Node(above, key, block)
        return node

    def above(self, node: Node) -> Node | None:
        """Return the block before this one, None before a tenant's first."""
        parent = node.parent
        return None if parent is None or parent.parent is None else parent

    def remove(self, block: int) -> None:
        """Forget a block that none follows.

        Raises:
            CacheError: it is not in the tree, or others follow it.
        """
        node = self._nodes.get(block)
        if node is None or node.children:
            raise CacheError(f"block {block} is {'followed by others' if node else 'not in the tree'}")
        del self._nodes[block]
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]

    def path(self, block: int) -> list[int]:
        """Return the blocks of a cached prefix, from its beginning to this one.

        Raises:
            CacheError: it is not in the tree.
        """
        node = self._nodes.get(block)
        if node is None:
            raise CacheError(f"block {block} is not in the tree")
        blocks: list[int] = []
        while node is not None:
            blocks.append(node.block)
            node = self.above(node)
        return blocks[::-1]
