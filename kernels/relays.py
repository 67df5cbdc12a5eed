"""Where a row's coefficients, its selected relays and their bit mask lie, for every kernel that selects relays."""

import functools
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .select import pack_bits, rank, select

# rows of a layout's table, [groups] each; after them the number of every coefficient's bit, [K]
START, SIZE, ACTIVE, FIRST_BYTE, FIRST_SELECTED = (tl.constexpr(i) for i in range(5))
TABLE_ROWS = tl.constexpr(5)

LANES = tl.constexpr(32)  # neighbouring coefficients of a group that lie together in a tile, unless it has fewer


class Layout(NamedTuple):
    """The groups of a model as kernels see them: a tile holds some of them, each padded to `size` coefficients."""

    table: Tensor  # int32 [5 * groups + K], see above
    groups: int  # padded to a power of two with groups of no coefficients
    size: int  # the largest group, padded to a power of two
    bytes: int  # of a row's bit mask: every group starts a byte
    active: int  # relays that a row selects

    def tile(self, rows: int, places: int) -> tuple[int, int]:
        """Rows and groups of a tile [rows, groups, size] of at most so many places (but one group at least)."""
        groups = min(self.groups, max(1, places // self.size))
        return min(rows, max(1, places // (groups * self.size))), groups


@functools.cache  # never dropped: a CUDA graph may hold the table's address
def layout(groups: tuple[int, ...], active: tuple[int, ...], device: torch.device) -> Layout:
    padding = (0,) * (triton.next_power_of_2(len(groups)) - len(groups))
    sizes, counts = groups + padding, active + padding
    mask_bytes = [triton.cdiv(size, 8) for size in sizes]
    first_bytes = [0, *accumulate(mask_bytes)]
    table = [[0, *accumulate(sizes)][:-1], sizes, counts, first_bytes[:-1], [0, *accumulate(counts)][:-1]]
    bits = [8 * first + k for size, first in zip(groups, first_bytes, strict=False) for k in range(size)]
    return Layout(
        torch.tensor([number for row in table for number in row] + bits, dtype=torch.int32).to(device),
        len(sizes),
        max(8, triton.next_power_of_2(max(groups))),
        first_bytes[-1],
        sum(active),
    )


@triton.jit
def places(AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """The group, of AT_ONCE, and the number in it of every place of a tile [P, AT_ONCE, L] (see kernels/select.py)."""
    lanes: tl.constexpr = SIZE_PADDED if SIZE_PADDED < LANES else LANES
    place = tl.arange(0, AT_ONCE * SIZE_PADDED)
    return place // lanes % AT_ONCE, place // (lanes * AT_ONCE) * lanes + place % lanes


@triton.jit
def coefficients(table_ptr, groups, first, AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """The coefficients in a tile of groups first .. first + AT_ONCE - 1, int32 [places], and which are there."""
    group, number = places(AT_ONCE, SIZE_PADDED)
    group_ptr = table_ptr + first + group
    return tl.load(group_ptr + groups * START) + number, number < tl.load(group_ptr + groups * SIZE)


@triton.jit
def by_group(of_places, AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """[R, places] as kernels/select.py takes it: [R, P, AT_ONCE, L]."""
    lanes: tl.constexpr = SIZE_PADDED if SIZE_PADDED < LANES else LANES
    return tl.reshape(of_places, [of_places.shape[0], SIZE_PADDED // lanes, AT_ONCE, lanes])


@triton.jit
def select_coefficients(weight, inside, table_ptr, groups, first, AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """Which weights [R, places] of a tile are selected. inside: as `coefficients` says."""
    active = tl.load(table_ptr + groups * ACTIVE + first + tl.arange(0, AT_ONCE))
    inside = by_group(inside[None, :], AT_ONCE, SIZE_PADDED)
    return tl.reshape(select(by_group(weight, AT_ONCE, SIZE_PADDED), inside, active), weight.shape)


@triton.jit
def store_bits(
    bits_ptr, row, in_batch, selected,  # uint8 [B, mask_bytes]; int64 [R]; bool [R]; bool [R, places]
    mask_bytes, table_ptr, groups, first,
    AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """Write what `select_coefficients` returned: the rows' bit mask."""
    lanes: tl.constexpr = (SIZE_PADDED if SIZE_PADDED < LANES else LANES) // 8
    place = tl.arange(0, AT_ONCE * SIZE_PADDED // 8)
    group_ptr = table_ptr + first + place // lanes % AT_ONCE
    byte = place // (lanes * AT_ONCE) * lanes + place % lanes
    inside = 8 * byte < tl.load(group_ptr + groups * SIZE)
    at = row[:, None] * mask_bytes + (tl.load(group_ptr + groups * FIRST_BYTE) + byte)[None, :]
    tl.store(bits_ptr + at, pack_bits(selected), mask=in_batch[:, None] & inside[None, :])


@triton.jit
def store_indices(
    indices_ptr, row, in_batch, selected,  # int32 [B, active]; int64 [R]; bool [R]; bool [R, places]
    active, table_ptr, groups, first,
    AT_ONCE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """Write what `select_coefficients` returned: the selected coefficients of every row, without gaps."""
    k, _ = coefficients(table_ptr, groups, first, AT_ONCE, SIZE_PADDED)
    group, _ = places(AT_ONCE, SIZE_PADDED)
    first_ptr = table_ptr + groups * FIRST_SELECTED + first + group
    number = tl.reshape(rank(by_group(selected, AT_ONCE, SIZE_PADDED)), selected.shape)  # from 1
    at = row[:, None] * active + tl.load(first_ptr)[None, :] + number - 1
    tl.store(indices_ptr + at, tl.broadcast_to(k[None, :], at.shape), mask=selected & in_batch[:, None])


@triton.jit
def selected_bits(bits_ptr, mask_bytes, row, in_batch, k, K, table_ptr, groups):
    """Whether rows int64 [R] select coefficients int32 [C]: bool [R, C], False outside."""
    bit = tl.load(table_ptr + groups * TABLE_ROWS + k, mask=k < K, other=0)
    inside = in_batch[:, None] & (k < K)[None, :]
    byte = tl.load(bits_ptr + row[:, None] * mask_bytes + (bit // 8)[None, :], mask=inside, other=0)
    return (byte.to(tl.int32) >> (bit % 8)[None, :]) & 1 != 0
