"""Find the state dict in what a checkpoint's pickle holds.

Contract: a dict of tensors is the state dict; otherwise it is the one dict of tensors under a key, looked for
under the customary keys first, and inside nested dicts a few levels deep. Two candidates are an error that
lists them; everything left out that holds tensors is named in a note, everything else is counted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsity_audit.checkpoint.torch_vocabulary import Refused, TensorRef
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["StateDict", "find_state_dict"]

_CUSTOMARY = ("state_dict", "model", "module", "model_state_dict")
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """Tensors by name, and what was left out.

    Args:
        tensors: In the order of the file.
        notes: Where it was found and what was ignored; empty for a plain state dict.
    """

    tensors: Mapping[str, TensorRef | Refused]
    notes: tuple[str, ...]


def find_state_dict(root: object, *, subject: str) -> StateDict:
    """The state dict in `root`.

    Args:
        root: What the pickle holds.
        subject: What messages call the file.

    Raises:
        UnsupportedFormatError: No dict of tensors, several, or the state of an optimizer.
        CorruptCheckpointError: A tensor's name is not text.
    """
    holders = _find_holders(root)
    keys: list[str] = []
    notes: list[str] = []
    node = root
    while len(keys) <= _MAX_DEPTH:
        if not isinstance(node, dict):
            raise UnsupportedFormatError(
                subject,
                f"holds a {_kind(node)}",
                expected="a dict of tensors by name",
                remedy="torch.save the model's `state_dict()`",
            )
        if _is_optimizer(node):
            raise UnsupportedFormatError(
                subject,
                "holds the state of an optimizer, not weights",
                remedy="name the file or directory with the model's weights",
            )
        key = _choose(node, holders, subject=subject)
        if key is None:
            return _flat(node, holders, keys=keys, notes=notes, subject=subject)
        left_out = [_shown(k) for k, v in node.items() if k != key and _holds_tensors(v, holders)]
        if left_out:
            notes.append(f"ignored tensors beside {key!r}, under {', '.join(left_out[:8])}")
        keys.append(key)
        node = node[key]
    raise UnsupportedFormatError(subject, f"nests its tensors more than {_MAX_DEPTH} levels deep")


def _choose(node: dict[object, object], holders: frozenset[int], *, subject: str) -> str | None:
    """The key to descend into, or None when `node` itself is the state dict."""
    nested = [k for k, v in node.items() if isinstance(k, str) and isinstance(v, dict) and id(v) in holders]
    customary = [key for key in nested if key in _CUSTOMARY]
    if not customary and any(isinstance(v, TensorRef | Refused) for v in node.values()):
        return None
    candidates = customary or nested
    if not candidates:
        raise UnsupportedFormatError(
            subject,
            f"holds no tensors in its {len(node)} keys",
            expected="a dict of tensors, or one under " + ", ".join(_CUSTOMARY),
        )
    if len(candidates) > 1:
        listed = ", ".join(repr(key[:40]) for key in candidates[:8])
        raise UnsupportedFormatError(
            subject,
            f"holds {len(candidates)} dicts of tensors: {listed}",
            expected="one",
            remedy=f"torch.save the one you mean: torch.save(torch.load(…)[{candidates[0][:40]!r}], …)",
        )
    return candidates[0]


def _flat(
    node: dict[object, object],
    holders: frozenset[int],
    *,
    keys: list[str],
    notes: list[str],
    subject: str,
) -> StateDict:
    tensors: dict[str, TensorRef | Refused] = {}
    others: list[object] = []
    for name, value in node.items():
        if not isinstance(value, TensorRef | Refused):
            others.append(name)
            continue
        if not isinstance(name, str) or not name.isprintable():
            raise CorruptCheckpointError(
                subject,
                f"a tensor is named {_shown(name)}",
                expected="text without control characters",
            )
        tensors[name] = value
    if keys:
        notes.append(f"read the state dict under {'.'.join(keys)!r}")
    if others:
        nested = [_shown(name) for name in others if _holds_tensors(node[name], holders)]
        text = f"ignored {len(others)} entries of the state dict that are not tensors"
        notes.append(
            text + (f"; tensors nested under {', '.join(nested[:8])} are not compared" if nested else "")
        )
    return StateDict(tensors=tensors, notes=tuple(notes))


def _find_holders(root: object) -> frozenset[int]:
    """Ids of the containers below `root` that lead to a tensor; the state of an optimizer does not count.

    Linear in the number of references, also where a hostile pickle shares or nests its containers.
    """
    parents: dict[int, list[int]] = {id(root): []}
    pending, holders = [root], list[int]()
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            children = [] if _is_optimizer(node) else list(node.values())
        else:
            children = list(node) if isinstance(node, list | tuple) else []
        for child in children:
            if isinstance(child, TensorRef | Refused):
                holders.append(id(node))
            elif isinstance(child, dict | list | tuple):
                if id(child) not in parents:
                    parents[id(child)] = []
                    pending.append(child)
                parents[id(child)].append(id(node))
    found: set[int] = set()
    while holders:
        holder = holders.pop()
        if holder not in found:
            found.add(holder)
            holders.extend(parents[holder])
    return frozenset(found)


def _holds_tensors(value: object, holders: frozenset[int]) -> bool:
    return isinstance(value, TensorRef | Refused) or id(value) in holders


def _is_optimizer(node: dict[object, object]) -> bool:
    return "state" in node and "param_groups" in node


def _kind(node: object) -> str:
    return "single tensor" if isinstance(node, TensorRef | Refused) else type(node).__name__.lower()


def _shown(name: object) -> str:
    if isinstance(name, int):
        return str(name)
    return repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
