"""Working and long-term memory: keys that all objects share, and values by the frame in which objects arrived.

An element is one position of the stride-16 grid of a memory frame, or a prototype made of many. A *cohort* is the set of
objects whose first mask came in the same frame; an element that is older than a cohort has no value for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config import XMemConfig
from .reading import memory_rows, query_rows, top_k

SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
"""Similarities computed at a time: on a CPU as many as its cache holds, on a GPU enough to fill it in bounded memory."""


class ElementTable:
    """One row an element, in one buffer: the working memory's from 0, the long-term memory's from `split`.

    Grows by doubling up to what the settings allow, and is then never reallocated. `split` is the most elements that
    working memory can hold; None where there is no long-term memory, and then the table grows without end.
    """

    def __init__(self, width: int, like: torch.Tensor, split: int | None, long_capacity: int) -> None:
        self.data = like.new_empty((0, width))
        self.split, self.limit = split, None if split is None else split + long_capacity
        self.working_size = self.long_size = 0

    @property
    def working(self) -> torch.Tensor:
        return self.data[: self.working_size]

    @property
    def long(self) -> torch.Tensor:
        return self.data[self.split or 0 :][: self.long_size]

    def append_working(self, rows: torch.Tensor) -> None:
        end = self.working_size + len(rows)
        self._reserve(end)
        self.data[self.working_size : end] = rows
        self.working_size = end

    def append_long(self, rows: torch.Tensor) -> None:
        start = self.split + self.long_size
        self._reserve(start + len(rows))
        self.data[start : start + len(rows)] = rows
        self.long_size += len(rows)

    def drop_working(self, start: int, stop: int) -> None:
        tail = self.working[stop:].clone()
        self.working_size -= stop - start
        self.data[start : self.working_size] = tail

    def keep_long(self, kept: torch.Tensor) -> None:
        rows = self.long[kept]
        self.long_size = len(rows)
        self.long.copy_(rows)

    def row_of(self, places: torch.Tensor) -> torch.Tensor:
        """Rows of elements counted through working and then long-term memory."""
        return torch.where(places < self.working_size, places, places + ((self.split or 0) - self.working_size))

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.data):
            return
        capacity = max(rows, 2 * len(self.data))
        if self.limit is not None:
            capacity = max(rows, min(capacity, self.limit))
        grown = self.data.new_empty((capacity, self.data.shape[1]))
        grown[: len(self.data)] = self.data
        self.data = grown


class MemoryBank:
    """Elements with keys, and the values of one or more cohorts for them.

    A cohort's values belong to the *last* elements of each part of the memory. With several cohorts this pairing is the
    published program's, also where consolidation makes it pair values with keys of other elements.
    """

    def __init__(self, config: XMemConfig, like: torch.Tensor, elements_per_frame: int, key_channels: int) -> None:
        self.config, self.elements_per_frame, self.like = config, elements_per_frame, like.new_empty(0)
        self.split = config.max_mid_term_frames * elements_per_frame if config.enable_long_term else None
        self.key_channels = key_channels
        self.rows = self._table(2 * key_channels + 1)
        self.origins = self._table(2 * key_channels + 1, long_term=False)  # key, shrinkage, selection
        self.usage = self._table(2)  # how much an element was read, and for how many frames it could be
        self.cohorts: list[ElementTable] = []

    def _table(self, width: int, long_term: bool = True) -> ElementTable:
        return ElementTable(width, self.like, self.split, self.config.max_long_term_elements if long_term else 0)

    def write(self, origins_QR: torch.Tensor, values: list[torch.Tensor]) -> None:
        """One frame: key, shrinkage and selection of its elements, and values (Q, objects x C_v) of each cohort, a new one last."""
        key, shrinkage, _ = self._parts(origins_QR)
        self.rows.append_working(memory_rows(key, shrinkage))
        self.usage.append_working(self._fresh_usage(len(origins_QR)))
        if self.config.enable_long_term:
            self.origins.append_working(origins_QR)
        while len(self.cohorts) < len(values):
            self.cohorts.append(self._table(values[len(self.cohorts)].shape[1]))
        for cohort, values_QD in zip(self.cohorts, values):
            cohort.append_working(values_QD)
        if self.config.enable_long_term and self.rows.working_size >= self.split:
            self._consolidate()

    def read(self, queries_QR: torch.Tensor) -> list[torch.Tensor]:
        """What each cohort's values say at the queries, (Q, objects x C_v) each; counts the elements' usage.

        Each query reads its `top_k` most similar elements only, so their values are gathered instead of multiplying the
        whole memory with a matrix that is nearly all zeros; and queries go in chunks, so that this matrix never exists.
        """
        rows, usage = self.rows, self.usage
        working, long = rows.working_size, rows.long_size
        increment = queries_QR.new_zeros(working + long)
        readouts = [queries_QR.new_empty((len(queries_QR), cohort.data.shape[1])) for cohort in self.cohorts]
        chunk = max(1, SCORES_AT_ONCE.get(queries_QR.device.type, 2**21) // (working + long))
        for start in range(0, len(queries_QR), chunk):
            queries = queries_QR[start : start + chunk]
            scores = queries.new_empty((len(queries), working + long))
            torch.mm(queries, rows.working.T, out=scores[:, :working])
            if long:
                torch.mm(queries, rows.long.T, out=scores[:, working:])
            found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
            for i, cohort in enumerate(self.cohorts):
                sizes = (cohort.working_size, cohort.long_size)
                if sizes not in found:
                    found[sizes] = self._attend(scores, *sizes)
                weights, places = found[sizes]
                if i == 0:
                    increment.scatter_add_(0, places.flatten(), weights.flatten())
                readouts[i][start : start + chunk] = F.embedding_bag(cohort.row_of(places), cohort.data, per_sample_weights=weights, mode="sum")
        if self.config.enable_long_term:
            usage.working.add_(torch.stack([increment[:working], torch.ones_like(increment[:working])], 1))
            if long and self.config.enable_long_term_count_usage:
                usage.long.add_(torch.stack([increment[working:], torch.ones_like(increment[working:])], 1))
        return readouts

    def _attend(self, scores_QN: torch.Tensor, working: int, long: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and places of the best of the last `working` and the last `long` elements, counted among these."""
        all_working = self.rows.working_size
        if (working, long) != (all_working, self.rows.long_size):
            scores_QN = torch.cat([scores_QN[:, all_working - working : all_working], scores_QN[:, scores_QN.shape[1] - long :]], 1)
        best, places = top_k(scores_QN, min(self.config.top_k, scores_QN.shape[1]))
        return best.softmax(1), places

    def _consolidate(self) -> None:
        """Compress all but the first and the newest frames of working memory into prototypes in long-term memory."""
        config, frame = self.config, self.elements_per_frame
        self._evict()
        total = self.rows.working_size
        kept = config.min_mid_term_frames * frame
        candidates = total - kept  # elements [frame, frame + candidates)
        span = slice(frame, frame + candidates)
        chosen = choose_prototypes(frequency(self.usage.working[span]), config.num_prototypes)
        key, shrinkage, selection = self._parts(self.origins.working[span])
        scores_PN = query_rows(key[chosen], selection[chosen]) @ self.rows.working[span].T
        shares_PN = scores_PN.softmax(1)
        for cohort in self.cohorts:
            own = cohort.working_size - kept  # its candidates: the last `own` of all
            if cohort.working_size == total:
                cohort.append_long(shares_PN @ cohort.working[span])
            elif own > frame:
                qualified = chosen >= candidates - own
                if qualified.any():
                    shares = scores_PN[qualified, candidates - own :].softmax(1)
                    cohort.append_long(shares @ cohort.working[frame : frame + own])
            if own >= frame:
                cohort.drop_working(frame, frame + own)
        self.rows.append_long(memory_rows(key[chosen], shares_PN @ shrinkage))
        self.usage.append_long(self._fresh_usage(len(chosen)))
        for table in (self.rows, self.origins, self.usage):
            table.drop_working(span.start, span.stop)

    def _evict(self) -> None:
        """Make room for prototypes: drop the long-term elements that are read least, and with them all that tie with the last of these."""
        size, room = self.rows.long_size, self.config.max_long_term_elements - self.config.num_prototypes
        if size <= room:
            return
        if not self.config.enable_long_term_count_usage:
            raise ValueError(
                f"long-term memory is full ({size} of xmem.max_long_term_elements={self.config.max_long_term_elements}) and the usage of its elements was not "
                "counted; set xmem.enable_long_term_count_usage=true, or allow more elements"
            )
        read = frequency(self.usage.long)
        keep = read > read.kthvalue(size - room).values
        for table in (self.rows, self.usage, *self.cohorts):
            table.keep_long(keep[size - table.long_size :])

    def _parts(self, origins_QR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key, shrinkage and selection."""
        return origins_QR.split([self.key_channels, 1, self.key_channels], 1)

    def _fresh_usage(self, elements: int) -> torch.Tensor:
        return self.like.new_tensor([0.0, 1e-7]).expand(elements, 2)


class XMemMemory:
    """What is remembered of one video, for all objects of all hypotheses. Objects are numbered in the order of their arrival.

    `compatible` settings keep one list of elements for all cohorts. Otherwise each cohort has a list of its own, which
    begins with the frame of its arrival: no value is ever read with another element's key.
    """

    def __init__(self, config: XMemConfig) -> None:
        self.config = config
        self.banks: list[MemoryBank] = []
        self.cohort_sizes: list[int] = []

    @property
    def objects(self) -> int:
        return sum(self.cohort_sizes)

    def write(self, key_1Chw: torch.Tensor, shrinkage_11hw: torch.Tensor, selection_1Chw: torch.Tensor, values_OVhw: torch.Tensor) -> None:
        """Remember a frame. Objects beyond those known make a new cohort."""
        origins = _as_rows(torch.cat([key_1Chw, shrinkage_11hw, selection_1Chw], 1)).to(values_OVhw.dtype)
        if len(values_OVhw) > self.objects:
            self.cohort_sizes.append(len(values_OVhw) - self.objects)
            if not (self.banks and self.config.compatible):
                self.banks.append(MemoryBank(self.config, values_OVhw, len(origins), key_1Chw.shape[1]))
        values = [cohort.permute(2, 3, 0, 1).reshape(len(origins), -1) for cohort in values_OVhw.split(self.cohort_sizes)]
        if self.config.compatible:
            self.banks[0].write(origins, values)
        else:
            for bank, cohort_values in zip(self.banks, values):
                bank.write(origins, [cohort_values])

    def read(self, key_1Chw: torch.Tensor, selection_1Chw: torch.Tensor) -> torch.Tensor:
        """What memory says of each object at each position, (O, C_v, h, w). Counts as one use of the memory."""
        dtype = self.banks[0].like.dtype
        queries = query_rows(_as_rows(key_1Chw).to(dtype), _as_rows(selection_1Chw).to(dtype))
        readouts = [readout for bank in self.banks for readout in bank.read(queries)]
        height, width = key_1Chw.shape[2:]
        return torch.cat([r.view(height, width, n, -1) for r, n in zip(readouts, self.cohort_sizes)], 2).permute(2, 3, 0, 1)

    def sizes(self) -> dict[str, list]:
        """Elements of working and of long-term memory, all and by cohort; for each bank (one, if `compatible`)."""
        return {
            "working": [bank.rows.working_size for bank in self.banks],
            "working_by_cohort": [cohort.working_size for bank in self.banks for cohort in bank.cohorts],
            "long_term": [bank.rows.long_size for bank in self.banks],
            "long_term_by_cohort": [cohort.long_size for bank in self.banks for cohort in bank.cohorts],
        }

    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        tables = (table for bank in self.banks for table in (bank.rows, bank.origins, bank.usage, *bank.cohorts))
        return sum(table.data.numel() * table.data.element_size() for table in tables)


def frequency(usage_N2: torch.Tensor) -> torch.Tensor:
    """How often elements were read a frame (N)."""
    return usage_N2[:, 0] / usage_N2[:, 1]


def choose_prototypes(frequency_N: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the most read candidates, most read first; all of them where there are fewer than `count`."""
    return frequency_N.topk(min(count, len(frequency_N))).indices


def _as_rows(x_1Chw: torch.Tensor) -> torch.Tensor:
    return x_1Chw[0].flatten(1).T
