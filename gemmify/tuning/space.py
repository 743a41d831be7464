"""The space of one task: lowering x its free sizes x register tile x schedule knobs, without what cannot win.

What is left out before anything is built: lowerings that do not apply or are above a bound (the rules of `compile`),
tiles that do not fit the registers or are modelled far slower than the best, sizes whose scratch exceeds a core's cache
by far. What `compile` picks without a log is a point of the space, unless the lowerings asked for leave it out.

Points are handed out in one spelling (`canonical`): what has its default is left out, free sizes and knobs of the
schedule alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod
from random import Random

import schedules
from lowering import Lowering, Tile, catalogue
from schedules import AnyMachine, Gpu
from schedules.cpu.tile import candidates, modelled_cycles

from ..accuracy import expected_error
from ..errors import InputError
from ..kernels import multiplied_in, on_machine, tile_for, tile_request, too_large
from ..policy import Policy, did_you_mean
from ..select import by_time, consider, error_bound, modelled_time, nothing_fits
from .bound import Limits, lower_bound
from .nearness import among, apart, differ, nearest
from .point import Knobs, Point, Value, knobs
from .task import Task
from .unscheduled import unscheduled

FAR = 2.5
"""Tiles and sizes that are modelled this many times slower than the best of their lowering are left out."""
MOST_SCRATCH = 2
"""Scratch of a thread may exceed a core's L2 this many times."""
MOST_SIZES = 4096
NEAR = 8
"""From how many of the nearest a neighbour is drawn."""
KnobSpace = dict[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Variant:
    """A lowering with all its sizes set: `sizes` in the canonical spelling, `full` all of them; the tiles worth trying
    (`default` among them) and the modelled cycles of the layer with the default tile."""

    lowering: Lowering
    sizes: Knobs
    full: Knobs
    tiles: tuple[Tile, ...]
    default: Tile
    cycles: float


class Space:
    """All points of one task on one machine.

    `lowerings` limits the keys; `max_workspace` (bytes) and `max_error` (relative to the largest output) are the bounds
    of `compile`. Lowerings of channels-first tensors are left out where `lowerings` does not name them: a network's
    activations are channels last, and what their conversion costs is not in the time of a layer alone. Raises
    InputError for an unknown key, and where no lowering remains.
    """

    def __init__(
        self,
        task: Task,
        machine: AnyMachine,
        lowerings: Sequence[str] | None = None,
        max_workspace: int | None = None,
        max_error: float | None = None,
    ) -> None:
        self.task, self.machine = task, machine
        self._problem = on_machine(task.problem, machine)
        self._check_keys(lowerings)
        found = consider(task.problem, machine, max_workspace, max_error)
        self._max_workspace = max_workspace
        self._max_error = error_bound(found) if max_error is None else max_error
        self.left_out = {c.key: str(c.reason) for c in found if c.reason is not None}
        usable = by_time(found)
        if not usable:
            raise InputError(nothing_fits(found, Policy(max_workspace=max_workspace, max_error=max_error)))
        kept = []
        for candidate in usable:
            if lowerings is None and candidate.lowering.layout != "NHWC":
                self.left_out[candidate.key] = "reads and writes NCHW: a network would convert its activations"
            elif lowerings is None or candidate.key in lowerings:
                kept.append(candidate)
            else:
                self.left_out[candidate.key] = "was not asked for"
        if not kept:
            asked = ", ".join(f"{key} {self.left_out[key]}" for key in lowerings or ())
            works = ", ".join(c.key for c in usable[:4])
            raise InputError(f"none of the lowerings asked for applies to {task.title}: {asked}; what works: {works}")
        self.keys = tuple(c.key for c in kept)
        """The lowerings of the space, the least modelled time first."""
        self.cycles = {c.key: c.cycles for c in kept}
        """Modelled cycles of each with its defaults."""
        self._variants: dict[str, dict[Knobs, Variant]] = {}
        self._knobs: dict[tuple[str, Knobs, Tile], KnobSpace] = {}

    @staticmethod
    def _check_keys(keys: Sequence[str] | None) -> None:
        for key in keys or ():
            if key not in catalogue():
                hint = did_you_mean(key, catalogue())
                raise InputError(f"lowering {key!r} is not known; {hint}choose from {', '.join(catalogue())}")

    # What there is.

    def variants(self, key: str) -> dict[Knobs, Variant]:
        """The lowering `key` with each set of sizes worth trying, by `Variant.full`; the untuned one first."""
        if key not in self._variants:
            self._variants[key] = self._make_variants(key)
        return self._variants[key]

    def _make_variants(self, key: str) -> dict[Knobs, Variant]:
        lowering = catalogue()[key]
        choices = lowering.choices(self._problem)
        first = {name: values[0] for name, values in choices.items()}
        default = self._variant(lowering, (), knobs(first))
        assert default is not None, f"{key} applies, so its default must too"
        found = [default]
        for values in islice(product(*choices.values()), 1, MOST_SIZES):
            full = dict(zip(choices, values, strict=True))
            changed = knobs({name: value for name, value in full.items() if value != first[name]})
            if (made := self._variant(lowering, changed, knobs(full))) is not None:
                found.append(made)
        limit = FAR * min(variant.cycles for variant in found)
        return {v.full: v for v in found if v is default or v.cycles <= limit}

    def _variant(self, plain: Lowering, sizes: Knobs, full: Knobs) -> Variant | None:
        """The variant, or None where it does not apply, is above a bound, or cannot win."""
        problem, machine = self._problem, self.machine
        lowering = plain.configured(**dict(sizes))
        if sizes and not self._allowed(lowering):
            return None
        best = tile_for(lowering, problem, machine)
        cost = lowering.cost(problem, best)
        if sizes and cost.thread_bytes > MOST_SCRATCH * machine.l2_bytes:
            return None
        cycles = modelled_time(lowering, problem, machine, best, cost)
        return Variant(lowering, sizes, full, tuple(self._tiles(lowering, best)), best, cycles)

    def _tiles(self, lowering: Lowering, best: Tile) -> Iterator[Tile]:
        """The register tiles worth trying, `best` among them; a GPU's schedule divides a block by knobs of its own."""
        if isinstance(self.machine, Gpu):
            yield best
            return
        request = tile_request(lowering, self._problem)
        limit = FAR * modelled_cycles(request, self.machine, best.mr, best.nr)
        for sides in candidates(request, self.machine):
            tile, near = Tile(*sides), modelled_cycles(request, self.machine, *sides) <= limit
            if near and (tile == best or self._within(lowering, tile)):
                yield tile

    def _allowed(self, lowering: Lowering) -> bool:
        problem = self._problem
        try:
            if lowering.applicable(problem) is not None:
                return False
            cost = lowering.cost(problem, tile_for(lowering, problem, self.machine))
        except ValueError:
            return False
        error = expected_error(cost, problem.dtype, multiplied_in(lowering, problem.dtype, self.machine))
        if too_large(lowering, problem, cost) is not None or error > self._max_error:
            return False
        return self._max_workspace is None or cost.scratch(self.machine.cores) <= self._max_workspace

    def _within(self, lowering: Lowering, tile: Tile) -> bool:
        """Whether the scratch with this tile keeps within the bound."""
        if self._max_workspace is None:
            return True
        return lowering.cost(self._problem, tile).scratch(self.machine.cores) <= self._max_workspace

    def knob_space(self, variant: Variant, tile: Tile) -> KnobSpace:
        """The knobs of the schedule by name, the default first: those of all activation kernels together. Of a knob
        that two kernels have, the values that both take. Milliseconds at the first call for each variant and tile,
        because the kernels are expressed (not scheduled) to read it."""
        at = (variant.lowering.key, variant.sizes, tile)
        if at not in self._knobs:
            self._knobs[at] = self._read_knobs(variant.lowering, tile)
        return self._knobs[at]

    def _read_knobs(self, lowering: Lowering, tile: Tile) -> KnobSpace:
        found: KnobSpace = {}
        for func in unscheduled(lowering, self.task.problem, self.task.epilogue, tile, self.machine):
            for name, values in schedules.knob_space(func, self.machine).items():
                known = found.get(name)
                found[name] = values if known is None else tuple(v for v in known if v in values) or known
        return {name: values for name, values in sorted(found.items()) if len(values) > 1}

    def size(self, key: str) -> int:
        """About how many points the lowering `key` has: the knobs of all are counted as those of its default."""
        variants = list(self.variants(key).values())
        knob_count = prod(map(len, self.knob_space(variants[0], variants[0].default).values()))
        return knob_count * sum(len(variant.tiles) for variant in variants)

    def points(self, key: str) -> Iterator[Point]:
        """Every point of the lowering `key`, the default first."""
        for variant in self.variants(key).values():
            for tile in sorted(variant.tiles, key=lambda tile: tile != variant.default):
                space = self.knob_space(variant, tile)
                for values in product(*space.values()):
                    yield self._point(variant, tile, dict(zip(space, values, strict=True)))

    def _point(self, variant: Variant, tile: Tile, schedule: dict[str, Value]) -> Point:
        space = self.knob_space(variant, tile)
        changed = {name: value for name, value in schedule.items() if name in space and value != space[name][0]}
        return Point(variant.lowering.key, tile, variant.sizes, knobs(changed))

    # Points.

    def default(self, key: str | None = None) -> Point:
        """The untuned point of the lowering `key`; where it is None, of the one that `compile` picks among `keys`."""
        key = self.keys[0] if key is None else key
        return Point(key, tile_for(catalogue()[key], self._problem, self.machine))

    def bound(self, key: str, limits: Limits) -> float:
        """Seconds that no point of the lowering `key` can beat."""
        made = (variant.lowering for variant in self.variants(key).values())
        return min(lower_bound(lowering, self._problem, None, self.machine, limits) for lowering in made)

    def sample(self, rng: Random, key: str) -> Point:
        """A random point of the lowering `key`: sizes, tile and each knob evenly."""
        return self._settled(self.draft(rng, key))

    def neighbours(self, rng: Random, point: Point) -> Point:
        """The point with one thing changed at random: a size, the tile (to one close by) or a knob of the schedule. The
        point itself where nothing can change; ValueError where it is not in the space."""
        return self._settled(self.draft_neighbour(rng, point))

    def _settled(self, draft: Point) -> Point:
        point = self.adapt(draft)
        assert point is not None, "a draft is of a lowering of the space"
        return point

    def draft(self, rng: Random, key: str) -> Point:
        """As `sample`, but cheap: its knobs are those of the lowering's default, and may not fit this tile. `adapt`
        makes a point of it."""
        variants = list(self.variants(key).values())
        variant = rng.choice(variants)
        space = self.knob_space(variants[0], variants[0].default)
        drawn = {name: rng.choice(values) for name, values in space.items()}
        schedule = {name: value for name, value in drawn.items() if value != space[name][0]}
        return Point(key, rng.choice(variant.tiles), variant.sizes, knobs(schedule))

    def draft_neighbour(self, rng: Random, point: Point) -> Point:
        """As `neighbours`, but cheap: where sizes or tile change, the knobs stay as they are. `adapt` makes a point of
        it."""
        variant = self.variant(point)
        if variant is None:
            raise ValueError(f"{point.title} is no point of {self.task.title}")
        variants, space = self.variants(point.lowering), self.knob_space(variant, point.tile)
        moves = ["tile"] * (2 if len(variant.tiles) > 1 else 0)
        moves += ["sizes"] * (2 if len(variants) > 1 else 0) + [f"knob {name}" for name in space]
        if not moves:
            return point
        move = rng.choice(moves)
        if move == "tile":
            near = sorted((t for t in variant.tiles if t != point.tile), key=lambda t: apart(t, point.tile))
            return replace(point, tile=rng.choice(near[:NEAR]))
        if move == "sizes":
            others = sorted(
                (v for v in variants.values() if v is not variant), key=lambda v: differ(v.full, variant.full)
            )
            return replace(point, sizes=rng.choice(others[:NEAR]).sizes)
        name = move.removeprefix("knob ")
        schedule = dict(point.schedule)
        now = schedule.get(name, space[name][0])
        return self._point(variant, point.tile, {**schedule, name: rng.choice([v for v in space[name] if v != now])})

    def _fit(self, variant: Variant, tile: Tile, schedule: dict[str, Value]) -> Point:
        """The point of `variant` that is nearest in tile and knobs."""
        tile = min(variant.tiles, key=lambda t: apart(t, tile))
        space = self.knob_space(variant, tile)
        fitted = {name: nearest(schedule.get(name), values) for name, values in space.items()}
        return self._point(variant, tile, fitted)

    def variant(self, point: Point) -> Variant | None:
        """The variant that the sizes of a point name, all or some of them; None where there is none."""
        if point.lowering not in self.keys:
            return None
        variants = self.variants(point.lowering)
        default = dict(next(iter(variants)))
        given = dict(point.sizes)
        if any(name not in default or type(value) is not type(default[name]) for name, value in given.items()):
            return None
        return variants.get(knobs({**default, **given}))

    def canonical(self, point: Point) -> Point | None:
        """The point as the space spells it, or None where it is not in the space."""
        variant = self.variant(point)
        if variant is None or not self._takes(variant, point.tile):
            return None
        space = self.knob_space(variant, point.tile)
        if any(name not in space or not among(value, space[name]) for name, value in point.schedule):
            return None
        return self._point(variant, point.tile, dict(point.schedule))

    def _takes(self, variant: Variant, tile: Tile) -> bool:
        """Whether a tile can be built: it fits the registers and the bounds, however slow it is modelled."""
        if tile in variant.tiles:
            return True
        if isinstance(self.machine, Gpu):
            return False
        fits = (tile.mr, tile.nr) in candidates(tile_request(variant.lowering, self._problem), self.machine)
        return fits and self._within(variant.lowering, tile)

    def valid(self, point: Point) -> bool:
        """Whether a point, from a log or written by hand, is one of this space."""
        return self.canonical(point) is not None

    def adapt(self, point: Point) -> Point | None:
        """The nearest point of the space, for one that won on another layer, or a draft; None where its lowering is not
        here. A point of the space comes back as it is, in its canonical spelling."""
        if (valid := self.canonical(point)) is not None:
            return valid
        if point.lowering not in self.keys:
            return None
        variants = self.variants(point.lowering)
        wanted = knobs({**dict(next(iter(variants))), **dict(point.sizes)})
        variant = min(variants.values(), key=lambda v: differ(v.full, wanted))
        return self._fit(variant, point.tile, dict(point.schedule))
