"""Static tables of what a launcher chooses: tile sizes, warps, stages. By architecture and shape, never at run time.

Each table stands beside its kernel and reads like one:

    TILES = ConfigTable(
        "decode attention",
        ("head_dim",),
        {2: ((64, DecodeTile(32, 2, 2)), (128, DecodeTile(32, 4, 2)))},
        others={86: {2: ((128, DecodeTile(32, 4, 3)),)}},
    )

A kind of problem (here the bytes of a stored element) has lines: limits and a configuration. The first line whose
limits hold the sizes is taken. ``others`` is what an architecture has instead, where there is a reason to: each of its
lines takes the place of the one with the same limits. A device that is in no table has the first ones, which fit the
shared memory of every target.

A configuration decides the order in which a row's numbers are added, and so its bits. Hence two rules:

- Sizes that a line is chosen by are those of weights and heads. Where the number of rows is one of them, bits may
  change at its limits, and docs/gpu.md says so; what is batch invariant has one line for all rows.
- An architecture may differ in what changes no bits (stages), and in the tiles of many rows, whose matrix instructions
  differ by architecture as it is. What serves up to 64 rows adds in the same order on all of them.

``benchmarks/gpu_tune.py`` measures other lines on a device and says which of them leave the bits as they are.

Imports nothing but the standard library.
"""

import contextlib
import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["ALL", "LEAST_SHARED_BYTES", "SHARED_BYTES", "Chunk", "ConfigTable", "Line"]

#: shared memory that a block may have, by architecture (CUDA C++ programming guide, technical specifications by compute
#: capability)
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: of architectures that are not in the table
LEAST_SHARED_BYTES = 99 * 1024
#: the kind of a table whose problems are all of one
ALL = "all"

Config = TypeVar("Config")
# limits, None where any size will do, and the configuration behind them; tuples of mixed types have no better name
Line = tuple[Any, ...]


class Chunk(NamedTuple):
    """Neighbouring elements that a program takes, and its warps, of kernels that go over rows piece by piece."""

    size: int
    num_warps: int


class ConfigTable(Generic[Config]):
    """Configurations by architecture, kind and sizes.

    Args:
        name: what it is a table of.
        limits: names of the sizes that a line has limits for, in their order.
        lines: kind -> lines, see above; narrower limits first.
        others: architecture -> kind -> the lines that it has instead.

    Raises:
        ValueError: a line of ``others`` replaces none, or one like itself.
    """

    def __init__(
        self,
        name: str,
        limits: tuple[str, ...],
        lines: Mapping[Hashable, tuple[Line, ...]],
        others: Mapping[int, Mapping[Hashable, tuple[Line, ...]]] | None = None,
    ) -> None:
        self.name = name
        self.limits = limits
        self._tried: Config | None = None
        #: the line for these sizes, limits included; every launch asks, so answers are kept
        self.line = functools.lru_cache(maxsize=4096)(self._search)
        self._lines: dict[int, dict[Hashable, tuple[Line, ...]]] = {0: dict(lines)}
        for architecture, kinds in (others or {}).items():
            table = self._lines[architecture] = dict(lines)
            for kind, own in kinds.items():
                instead = {line[:-1]: line for line in own}
                replaced = tuple(instead.get(line[:-1], line) for line in table[kind])
                if len(set(table[kind]) - set(replaced)) != len(own):
                    raise ValueError(
                        f"{name}: {own} of {architecture} do not each replace another line with the same limits, "
                        f"expected those of {table[kind]}"
                    )
                table[kind] = replaced

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        return tuple(self._lines[0])

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those that have lines of their own."""
        return tuple(architecture for architecture in self._lines if architecture)

    def lines(self, architecture: int, kind: Hashable) -> tuple[Line, ...]:
        """All lines of a kind on an architecture (compute capability as a number, 90 for 9.0; 0 for any)."""
        return self._lines.get(architecture, self._lines[0])[kind]

    def _search(self, architecture: int, kind: Hashable, *sizes: int) -> Line:
        for line in self.lines(architecture, kind):
            # the configuration at the end of a line has no size beside it
            if all(limit is None or size <= limit for limit, size in zip(line, sizes, strict=False)):
                return line
        raise AssertionError(f"{self.name}: no line of {kind} for {dict(zip(self.limits, sizes, strict=True))}")

    def find(self, architecture: int, kind: Hashable, *sizes: int) -> Config:
        """The configuration for these sizes.

        Raises:
            AssertionError: the sizes are beyond all lines; launchers refuse such problems before they ask.
        """
        return self.line(architecture, kind, *sizes)[-1] if self._tried is None else self._tried

    @contextlib.contextmanager
    def trying(self, config: Config) -> Iterator[None]:
        """Whatever is looked up inside is ``config``: how the tuner, the lab and the tests launch what no line has.

        Of use to one thread of a process that does nothing else.
        """
        before, self._tried = self._tried, config
        try:
            yield
        finally:
            self._tried = before
