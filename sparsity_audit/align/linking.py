"""Link whole tensors of two checkpoints by name: exactly, after dropping wrappers, through ties.

Contract: a tensor has at most one link. A tensor whose names lead to one that is linked already, because
the other side ties what this side stores twice, becomes a *rival* and is left over as untied. Several tensors
behind one normalised name are an `AlignmentError` that shows them all. Swapping the sides mirrors the links.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from operator import itemgetter

from sparsity_audit.align.naming import Keys, NamedSide
from sparsity_audit.align.records import Side
from sparsity_audit.align.rules import NormalName, config_ties, describe_rename, is_embedding, is_vocabulary
from sparsity_audit.errors import AlignmentError

__all__ = ["Link", "Linker", "ambiguity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Two tensors that stand for the same weights, by their names in the catalogues."""

    base: str
    tuned: str
    rule: str


class Linker:
    """Collects links; see the module docstring.

    Args:
        base: The base side.
        tuned: The tuned side, after the user's rules.
    """

    def __init__(self, base: NamedSide, tuned: NamedSide) -> None:
        self.base, self.tuned = base, tuned
        self.links: dict[Side, dict[str, Link]] = {"base": {}, "tuned": {}}
        self.rivals: dict[Side, dict[str, str]] = {"base": {}, "tuned": {}}
        self._renames: Counter[tuple[tuple[str, ...], str, tuple[str, ...], str]] = Counter()

    def unlinked(self, side: Side) -> set[str]:
        """Tensors of a side without a link."""
        named = self.base if side == "base" else self.tuned
        return set(named.catalogue.tensors) - self.links[side].keys()

    def settled(self, side: Side) -> frozenset[str]:
        """Tensors that the user's rules linked; no other rule may doubt them."""
        return frozenset(name for name, link in self.links[side].items() if link.rule == "map")

    def link_exact(self) -> None:
        """Link tensors that share a name, the user's names first."""
        shared = self.base.owner.keys() & self.tuned.owner.keys()
        mapped = shared & self.tuned.mapped
        for name in _in_order(mapped):
            self._offer(self.base.owner[name], self.tuned.owner[name], "map")
        for name in _in_order(shared - mapped):
            base, tuned = self.base.owner[name], self.tuned.owner[name]
            self._offer(base, tuned, "exact" if base == tuned else "tied")

    def link_normalised(self, base_keys: Keys, tuned_keys: Keys) -> None:
        """Link tensors whose names agree once wrappers and roots are dropped.

        Args:
            base_keys: `NamedSide.keys` of the base, without what the user's rules settled.
            tuned_keys: The same of the tuned side.

        Raises:
            AlignmentError: Several tensors of one side have the same normalised name.
        """
        open_base, open_tuned = self.unlinked("base"), self.unlinked("tuned")
        shared = [
            key
            for key in base_keys.keys() & tuned_keys.keys()
            if not (open_base.isdisjoint(base_keys[key]) and open_tuned.isdisjoint(tuned_keys[key]))
        ]
        for key in _in_order(shared):
            if len(base_keys[key]) > 1 or len(tuned_keys[key]) > 1:
                raise ambiguity([*base_keys[key]], [*tuned_keys[key]])
            ((base, one),), ((tuned, other),) = base_keys[key].items(), tuned_keys[key].items()
            if self._offer(base, tuned, "prefix"):
                self._renames[one.wrappers, one.root, other.wrappers, other.root] += 1

    def renames(self) -> list[str]:
        """What the normalising rules did, with the number of tensors."""
        counts: Counter[str] = Counter()
        for (base_wrappers, base_root, tuned_wrappers, tuned_root), count in self._renames.items():
            base = NormalName(key="", wrappers=base_wrappers, root=base_root)
            counts[describe_rename(base, NormalName(key="", wrappers=tuned_wrappers, root=tuned_root))] += (
                count
            )
        return [
            f"{count} tensor{'s' * (count != 1)} matched under another name: {rule}"
            for rule, count in sorted(counts.items())
        ]

    def link_tied(self) -> list[str]:
        """Link the one stored vocabulary matrix of each side; returns what to tell the user.

        A tied model may be stored under the embedding's name or under the head's, as the writer chose.
        """
        if not any(map(is_vocabulary, self.unlinked("base") | self.unlinked("tuned"))):
            return []
        stored = {named.side: _vocabulary(named) for named in (self.base, self.tuned)}
        self._find_untied("base", stored["base"], stored["tuned"])
        self._find_untied("tuned", stored["tuned"], stored["base"])
        if len(stored["base"]) != 1 or len(stored["tuned"]) != 1:
            return []
        base, tuned = stored["base"][0], stored["tuned"][0]
        if base in self.links["base"] or tuned in self.links["tuned"]:
            return []
        ties = {config_ties(self.base.catalogue.config), config_ties(self.tuned.catalogue.config)}
        if True not in ties or False in ties:
            return [
                (
                    f"base stores {base!r} and tuned {tuned!r} as their only vocabulary matrix, and no "
                    f"configuration says that both are tied: not compared; "
                    f"--map '^{re.escape(tuned)}$={base}' compares them"
                )
            ]
        self._offer(base, tuned, "tied")
        return [f"tied embeddings: {base!r} of base is stored as {tuned!r} in tuned; the two are compared"]

    def _find_untied(self, side: Side, mine: list[str], theirs: list[str]) -> None:
        """A second vocabulary matrix where the other side has only one, and does not deny that it is tied."""
        named, other = (self.base, self.tuned) if side == "base" else (self.tuned, self.base)
        if len(theirs) != 1 or config_ties(other.catalogue.config) is False:
            return
        links = self.links[side]
        shapes = {named.spec(name).shape for name in mine if name in links}
        for name in mine:
            if name not in links and named.spec(name).shape in shapes:
                self.rivals[side].setdefault(name, theirs[0])

    def _offer(self, base: str, tuned: str, rule: str) -> bool:
        """Link two tensors unless one of them is linked; returns whether they were linked now."""
        base_is_open, tuned_is_open = base not in self.links["base"], tuned not in self.links["tuned"]
        if base_is_open and tuned_is_open:
            link = Link(base=base, tuned=tuned, rule=rule)
            self.links["base"][base] = self.links["tuned"][tuned] = link
            return True
        if base_is_open:
            self.rivals["base"].setdefault(base, tuned)
        elif tuned_is_open:
            self.rivals["tuned"].setdefault(tuned, base)
        return False


def ambiguity(base: list[str], tuned: list[str]) -> AlignmentError:
    """The error for tensors that could be matched in more than one way.

    Args:
        base: Candidates of the base; parts of one fused tensor stand in one text, separated by commas.
        tuned: Candidates of the tuned side, likewise.
    """
    one, other = (" and ".join(repr(name) for name in sorted(names)) for names in (base, tuned))
    if len(tuned) > 1:
        subject, found = f"base {one}", f"more than one match in tuned: {other}"
    else:
        subject, found = f"tuned {other}", f"more than one match in base: {one}"
    meant = min(tuned, key=lambda name: (name.count(","), name)).split(", ")[0]
    target = min(base, key=lambda name: (name.count(","), name)).split(", ")[0]
    return AlignmentError(
        subject,
        found,
        expected="one partner",
        remedy=f"say which is meant, for instance --map '^{re.escape(meant)}$={target}'",
    )


def _in_order(names: set[str] | list[str]) -> list[str]:
    """Names in the order in which they take partners: an embedding before the head that shares its storage.

    Names decide, so that swapping the sides changes nothing.
    """
    return [
        name for _, name in sorted(((not is_embedding(name), name) for name in names), key=itemgetter(0, 1))
    ]


def _vocabulary(named: NamedSide) -> list[str]:
    found = {
        tensor
        for name, tensor in named.owner.items()
        if is_vocabulary(name) and len(named.spec(tensor).shape) == 2
    }
    return sorted(found)
