"""The shares of a split run as they lie in one directory or several.

Contract: nothing is joined before every share is there, finished, and of one plan; every refusal names the
shares it is about. Journals are read one at a time: the tallies of a share are let go before the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.errors import ChangedInputError, OutputError, UsageError
from sparsity_audit.masks.share_bits import share_bits_path
from sparsity_audit.passes.journal import Journal, read_identity
from sparsity_audit.passes.plan import Plan, WorkUnit
from sparsity_audit.stats.tally import Tally

__all__ = ["FoundShares", "find_shares"]

_SHOWN = 12
_WHAT_MAKES_THEM = "what `diff … -o DIR --shard-index I --num-shards N` leaves"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundShares:
    """All shares of one run.

    Args:
        folders: The directories that were named.
        journals: The shares' journals, in the order of shares.
        facts: What all of them say: references, question, mask.
        plan_key: The plan of all of them.
    """

    folders: tuple[Path, ...]
    journals: tuple[Path, ...]
    facts: Mapping[str, Any]
    plan_key: str

    @property
    def num_shards(self) -> int:
        """How many shares there are."""
        return len(self.journals)

    @property
    def bits(self) -> tuple[Path, ...]:
        """Where the shares' mask bits lie."""
        return tuple(share_bits_path(path.parent, path.stem) for path in self.journals)

    def verify_here(self) -> None:
        """Raise UsageError where local checkpoints are not: their names would be sought on the Hub."""
        gone = [name for name in self.facts.get("local", ()) if not Path(name).exists()]
        if gone:
            raise UsageError(
                " and ".join(gone),
                "not here: the shares compared local files of this name",
                remedy="merge in the directory where the shares ran, or where the same names lead to copies",
            )

    def verify_plan(self, plan: Plan) -> None:
        """Raise ChangedInputError when headers, sizes or times of the checkpoints now give another plan."""
        if plan.key != self.plan_key:
            raise ChangedInputError(
                f"{self.facts['base']} and {self.facts['tuned']}",
                "are not the checkpoints that the shares compared",
                expected="the same files, of the same sizes and times of modification",
                remedy="merge where the shares ran, or run the shares again with --overwrite",
            )

    def verify_complete(self, units: Sequence[Sequence[WorkUnit]], *, with_bits: bool) -> None:
        """Raise UsageError when a share has not done all its units, or its mask bits are not there."""
        if with_bits and self.facts["mask"] is None:
            raise UsageError(
                _places(self.folders),
                "the shares ran without --mask and kept no mask bits",
                remedy="merge without --mask, or run them again with --mask and --overwrite",
            )
        unfinished = []
        for number, (path, mine) in enumerate(zip(self.journals, units, strict=True)):
            lost = {unit.key for unit in mine} - self._open(path, number).keys()
            if lost:
                unfinished.append(f"{number} ({len(mine) - len(lost)} of {len(mine)} units)")
            elif with_bits and not share_bits_path(path.parent, path.stem).exists():
                unfinished.append(f"{number} (no mask bits)")
        if unfinished:
            raise UsageError(
                _places(self.folders),
                f"unfinished shares: {_list(unfinished)}",
                expected="every share finished",
                remedy="run them again with the same options; each goes on where it stopped",
            )

    def tallies(self, plan: Plan) -> Iterator[tuple[WorkUnit, Tally]]:
        """Every unit with what was counted of it, share by share."""
        by_key = {unit.key: unit for unit in plan.units}
        for number, path in enumerate(self.journals):
            for key, tally in self._open(path, number).items():
                yield by_key[key], tally

    def remove(self) -> None:
        """Delete the shares' files. Raises OutputError."""
        try:
            for path in (*self.bits, *self.journals):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(_places(self.folders), error.strerror or "cannot be written") from error

    def _open(self, path: Path, number: int) -> Mapping[str, Tally]:
        """What a share's journal holds; refused while the share still runs."""
        facts = {**self.facts, "share": [number, self.num_shards]}
        journal = Journal(path, plan_key=self.plan_key, facts=facts)
        journal.close()
        return journal.done


def find_shares(folders: Sequence[Path]) -> FoundShares:
    """The shares in some directories.

    Raises:
        UsageError: There are none, some are missing or there twice, or they are not of one run.
        OutputError: A journal cannot be read.
    """
    paths: dict[tuple[int, int], Path] = {}
    for folder in folders:
        if not folder.is_dir():
            found = "is no directory" if folder.exists() else "no such directory"
            raise UsageError(str(folder), found, expected=_WHAT_MAKES_THEM)
        for path in sorted(folder.glob("share-*-of-*.jsonl")):
            match = re.fullmatch(r"share-(\d{5,})-of-(\d{5,})", path.stem)
            if match is None:
                continue
            index, count = map(int, match.groups())
            other = paths.setdefault((count, index), path)
            if other.resolve() != path.resolve():
                _refuse_twice(other, path)
    if not paths:
        raise _no_share(folders)
    counts = {count: path for (count, _), path in sorted(paths.items(), reverse=True)}
    if len(counts) > 1:
        first, second = sorted(counts)[:2]
        raise UsageError(
            _places(folders),
            f"shares of {first} ({counts[first].name}) and of {second} ({counts[second].name})",
            expected="shares of one run",
            remedy="remove those of the other run",
        )
    (count,) = counts
    missing = [index for index in range(count) if (count, index) not in paths]
    if missing:
        raise UsageError(
            _places(folders),
            f"{len(missing)} of {count} shares are missing: {_list(_spans(missing))}",
            remedy="run them with the same options and --shard-index, or name their directories as well",
        )
    return _of_one_run(folders, [paths[count, index] for index in range(count)])


def _of_one_run(folders: Sequence[Path], journals: Sequence[Path]) -> FoundShares:
    first: dict[str, Any] | None = None
    for number, path in enumerate(journals):
        found = dict(read_identity(path))
        if found.pop("share", None) != [number, len(journals)]:
            raise UsageError(str(path), "is not the share its name says", remedy="run it again")
        first = first or found
        odd = [key for key in (first | found) if first.get(key) != found.get(key)]
        if odd:
            raise UsageError(
                str(path),
                f"is of another run than {journals[0].name}: {_difference(first, found, odd[0])}",
                expected="the same checkpoints, options and version of the tool in every share",
                remedy="run one of them again with --overwrite",
            )
    assert first is not None
    facts = {key: value for key, value in first.items() if key not in ("version", "tool", "plan")}
    return FoundShares(
        folders=tuple(folders), journals=tuple(journals), facts=facts, plan_key=str(first["plan"])
    )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> str:
    """The first thing two identities disagree about; a plan's hash says nothing to a reader."""
    if key == "plan":
        return "its checkpoints differ (names, sizes or times of modification of their files)"
    a, b = one.get(key), other.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(name for name in a | b if a.get(name) != b.get(name))
        a, b = a.get(key), b.get(key)
    return f"{key} {b!r} instead of {a!r}"


def _no_share(folders: Sequence[Path]) -> UsageError:
    holds = "holds" if len(folders) == 1 else "hold"
    done = any((folder / "report.json").is_file() for folder in folders)
    return UsageError(
        _places(folders),
        f"{holds} no share, but a finished report" if done else f"{holds} no share",
        expected=_WHAT_MAKES_THEM,
        remedy="they may be merged already: see `report`, or run the shares again" if done else None,
    )


def _refuse_twice(one: Path, other: Path) -> None:
    raise UsageError(
        str(other), f"the same share lies in {one.parent}", remedy="remove one of them, or name one directory"
    )


def _places(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))


def _spans(numbers: Sequence[int]) -> list[str]:
    """3, 5-7 for 3, 5, 6, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [str(a) if a == b else f"{a}-{b}" for a, b in spans]


def _list(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
