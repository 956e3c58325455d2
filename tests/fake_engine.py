"""An engine that ships work as a cluster would, pickled, but runs it here and in another order."""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
import types
from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, Self

from sparsity_audit.passes.engine import Ahead

__all__ = ["FakeEngine", "shipped"]


class _Pickler(pickle.Pickler):
    """Pickles functions that no name leads to by their code, defaults and cells; the rest as always."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, types.FunctionType) or _leads_to(value):
            return NotImplemented
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        code = marshal.dumps(value.__code__)
        facts = value.__module__, value.__qualname__, value.__defaults__, value.__kwdefaults__
        return _rebuilt, (code, facts, cells)


def _leads_to(function: types.FunctionType) -> bool:
    found: Any = importlib.import_module(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _rebuilt(code: bytes, facts: tuple, cells: tuple) -> types.FunctionType:
    module, name, defaults, keyword_defaults = facts
    names = importlib.import_module(module).__dict__
    made = types.FunctionType(
        marshal.loads(code), names, name, defaults, tuple(types.CellType(cell) for cell in cells)
    )
    made.__kwdefaults__ = keyword_defaults
    return made


def shipped(value: Any) -> Any:
    """The copy that another process would have."""
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return pickle.loads(stream.getvalue())


class FakeEngine:
    """In the place of `RayEngine`: every unit by a copy of the work, the second half first."""

    made: ClassVar[list[FakeEngine]] = []

    def __init__(self, *, slots: int | None = None, gpus: bool = False) -> None:
        self.slots, self.gpus, self.num_units, self.num_maps = slots, gpus, 0, 0
        FakeEngine.made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def num_slots(self) -> int:
        return self.slots or 1

    def map(
        self,
        work: Callable[[Any], Any],
        units: Iterable[Any],
        *,
        ahead: Ahead | None = None,
    ) -> Generator[tuple[Any, Any], None, None]:
        copy, ahead = shipped((work, ahead))
        self.num_maps += 1
        todo = list(units)
        middle = len(todo) // 2
        for batch in (todo[middle:], todo[:middle]):
            if ahead is not None:
                ahead.announce(shipped(batch))
            yield from ((unit, self._done(copy, unit)) for unit in batch)

    def _done(self, copy: Callable[[Any], Any], unit: Any) -> Any:
        self.num_units += 1
        return shipped(copy(shipped(unit)))
