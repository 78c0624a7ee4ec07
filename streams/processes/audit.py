"""Proves in = state = sink, per topic and partition (invariant 7), or names the exact ranges where it is not so.

    1. bound      the log's end of every partition at the start; what comes later is another audit's
    2. pass       wait until the store and the sink have everything below the bound, with a deadline
    3. ask        counts and digests by ranges of offsets, each answer with the position it reflects; and the ledger
    4. read       the log itself, decoded by the same decoder, up to the furthest of these positions; dead letters
    5. compare    each answer with what a copy at its position must hold
    6. search     ranges that differ are asked for row by row, at a later position, up to which the log is read on
The system may go on all the while. Nothing is held in memory but sums: the log's digests lie in a workspace on disk.

What the log has lost cannot be proven from it: a partition whose log begins later is `proven from` there on, and below
that only the rows of append tables are compared, those of the store with those of the sink. Rows that retention is
about to delete count on no side. Called by streams/cli/audit.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from schemas import dead_letters
from schemas.catalog import Catalog
from schemas.row_text import shared_columns, sink_text_in_duckdb, store_text
from schemas.table import TableDefinition
from streams.adapters.duckdb_audit import AuditWorkspace, Copy
from streams.adapters.duckdb_dialect import LEDGER_VIEW
from streams.adapters.kafka_partitioner import key_of
from streams.batches import RecordBatch
from streams.errors import PintailError
from streams.finishing import in_thread
from streams.limits import QUERY_DEADLINE_MS_MAX
from streams.ports import AuditedRange, Decoder, Digest, HeldRow, Holdings, RecordedIntents, Watermarks
from streams.positions import OffsetRange, TopicPartition, next_offset_after
from streams.retry import in_words

#: Of an append table, offsets that one question covers; of a keyed table one question covers all.
RANGE_OFFSETS_MAX = 2_000_000
BUCKETS_MAX = 1_000
BUCKET_OFFSETS_MIN = 100
#: Offsets that are compared row by row with one question.
PAGE_OFFSETS = 2_000
#: Pages that are searched per copy and partition; differences beyond are named by their bucket.
PAGES_MAX = 200
#: Rows so close to the end of their retention count on no side.
RETENTION_MARGIN_MS = 10 * 60 * 1000
_POLL_SECONDS = 0.2
#: Where a difference is of which the log cannot say whose it is.
_BOTH = "store and sink"


class AuditedLog(Protocol):
    """The log, as anybody may read it."""

    async def partitions(self, topic: str) -> list[TopicPartition]:
        """Those that the topic has; none if there is no such topic."""
        ...

    async def is_compacted(self, topic: str) -> bool:
        """Whether the log removes records that have a newer one of their key."""
        ...

    async def watermarks(self, topic_partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """What the log holds at this moment."""
        ...

    def read(self, topic_partition: TopicPartition, offsets: OffsetRange) -> AsyncIterator[RecordBatch]:
        """The records of the range, as batches that touch one another and cover it."""
        ...


class AuditedSink(Protocol):
    """The sink, asked from worker threads. Raises SinkError."""

    def fault(self, table: TableDefinition) -> str | None:
        """Why the table cannot be compared; None if it can."""
        ...

    def holdings(self, table: TableDefinition, asked: AuditedRange) -> Holdings:
        """What it holds of the range, in one statement."""
        ...

    def rows(self, table: TableDefinition, asked: AuditedRange) -> tuple[int, list[HeldRow]]:
        """The rows of the range, and the position that they reflect."""
        ...


class StoreAnswer(Protocol):
    """What a client gives for a query."""

    @property
    def rows(self) -> Sequence[Sequence[Any]]:
        """In the order of the query."""
        ...

    @property
    def offsets(self) -> Mapping[str, Mapping[int, int]]:
        """topic -> partition -> next_offset."""
        ...


class AskStore(Protocol):
    """Asks over the query topic, like anybody: streams.client.AsyncClient.query."""

    async def __call__(
        self,
        sql: str,
        *,
        key: str,
        deadline_ms: int,
        at_least: Mapping[str, Mapping[int, int]] | None = None,
    ) -> StoreAnswer:
        """Raises QueryRefusedError, RequestTimeoutError."""
        ...


class Kind(StrEnum):
    """What can be wrong with a range. MISSING is a hole, DOUBLED an overlap."""

    MISSING = "missing"
    DOUBLED = "doubled"
    CHANGED = "changed"
    UNEXPECTED = "unexpected"
    #: Not searched row by row, because there are too many.
    DIFFERS = "differs"
    HOLE = "hole"
    OVERLAP = "overlap"
    MISCOUNTED = "miscounted"


class Verdict(StrEnum):
    """What an audit amounts to."""

    #: in = state = sink, from offset 0 on.
    PROVEN = "proven"
    #: in = state = sink, as far back as the log goes. Of what it has lost, nothing that can be compared differs.
    PROVEN_FROM_START = "proven_from_start"
    #: Something differs, or could not be asked.
    NOT_PROVEN = "not_proven"


@dataclass(frozen=True)
class Difference:
    """A range that is not as the log says. `records` is None where they were not counted."""

    where: str
    kind: Kind
    offsets: OffsetRange
    records: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        counted = "" if self.records is None else f", {self.records:,} record{'' if self.records == 1 else 's'}"
        return f"{self.where}: {self.kind} {self.offsets}{counted}{f': {self.detail}' if self.detail else ''}"


@dataclass
class PartitionAudit:
    """What the audit of one topic partition found."""

    topic_partition: TopicPartition
    #: What the log holds of it, from which alone something can be proven.
    offsets: OffsetRange
    #: Of that range: records, and what must have become of them.
    rows: int = 0
    deletes: int = 0
    parked: int = 0
    #: Rows that a copy holds of the range; None where it was not asked.
    in_store: int | None = None
    in_sink: int | None = None
    refused_by_sink: int = 0
    differences: list[Difference] = field(default_factory=list)
    #: Why something could not be proven.
    open: list[str] = field(default_factory=list)
    #: What was not compared, by its nature.
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """What this amounts to."""
        if self.differences or self.open:
            return Verdict.NOT_PROVEN
        return Verdict.PROVEN if self.offsets.lo == 0 else Verdict.PROVEN_FROM_START


@dataclass(frozen=True)
class AuditParts:
    """What an audit works with. Without `sink` and `intents` the sink is not compared, without `ask` no store."""

    catalog: Catalog
    log: AuditedLog
    decoder: Decoder
    workspace: AuditWorkspace
    ask: AskStore | None
    query_partitions: int
    sink: AuditedSink | None
    intents: RecordedIntents | None
    deadline_seconds: float = 120.0
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000


async def audit(parts: AuditParts, tables: Sequence[TableDefinition]) -> AsyncIterator[PartitionAudit]:
    """The tables' partitions one after the other, all bounded by the log as it is when this begins."""
    bounds: dict[TopicPartition, Watermarks] = {}
    for table in tables:
        bounds |= await parts.log.watermarks(await parts.log.partitions(table.topic))
    deadline = time.monotonic() + parts.deadline_seconds
    for table in tables:
        await in_thread(parts.workspace.begin_table, table)
        letters: _Letters | None = None
        for topic_partition in (TopicPartition(table.topic, number) for number in range(table.partitions)):
            if topic_partition not in bounds:
                yield PartitionAudit(topic_partition, OffsetRange(0, 0), open=["Kafka has no such partition"])
                continue
            letters = letters or _Letters(parts, table, is_compacted=await parts.log.is_compacted(table.topic))
            low = (await parts.log.watermarks([topic_partition]))[topic_partition].low  # retention goes on meanwhile
            marks = Watermarks(low, max(low, bounds[topic_partition].high))
            yield await _Partition(parts, table, topic_partition, marks, letters, deadline).run()


class _Letters:
    """The dead letters of one table, read on as far as they go whenever that is asked."""

    def __init__(self, parts: AuditParts, table: TableDefinition, *, is_compacted: bool) -> None:
        self._parts, self._table = parts, table
        #: True if records of the table's topic may be gone, so that nothing can be said of their letters and counts.
        self.is_compacted = is_compacted
        self._read_to: dict[TopicPartition, int] = {}
        #: True if the dead-letter topic has lost its beginning.
        self.are_cut = False

    async def read_on(self) -> None:
        log = self._parts.log
        for source, marks in (await log.watermarks(await log.partitions(self._table.dead_letter_topic))).items():
            self.are_cut |= marks.low > 0
            lo = max(marks.low, self._read_to.get(source, 0))
            async for batch in log.read(source, OffsetRange(lo, marks.high)):
                await in_thread(self._parts.workspace.add_letters, _letters_of(batch, self._table.topic))
            self._read_to[source] = marks.high


def _letters_of(batch: RecordBatch, topic: str) -> list[tuple[int, int, str]]:
    """(partition, offset, reason) of those that came from the topic. What has no such headers is not Pintail's."""
    letters = []
    for headers in map(dict, batch.headers.values()):
        try:
            if headers[dead_letters.TOPIC].decode() == topic:
                place = int(headers[dead_letters.PARTITION]), int(headers[dead_letters.OFFSET])
                letters.append((*place, headers[dead_letters.REASON].decode()))
        except (KeyError, ValueError):
            continue
    return letters


@dataclass(frozen=True)
class _Answer:
    """What a copy said of one range."""

    asked: AuditedRange
    holdings: Holdings


class _Partition:
    """One topic partition: steps 2 to 6 of the module's contract."""

    def __init__(
        self,
        parts: AuditParts,
        table: TableDefinition,
        topic_partition: TopicPartition,
        marks: Watermarks,
        letters: _Letters,
        deadline: float,
    ) -> None:
        self._parts, self._table, self._letters, self._deadline = parts, table, letters, deadline
        self._tp, self._marks = topic_partition, marks
        self._shared = shared_columns(table)
        self._offsets = OffsetRange(marks.low, marks.high)
        self._key = key_of(topic_partition.partition, parts.query_partitions)
        self._read_to = marks.low
        self._result = PartitionAudit(topic_partition, self._offsets)
        self._ledger: list[tuple[OffsetRange, tuple[int, int, int]]] | None = None
        #: How far each side says that it is.
        self._passed: dict[Copy, int] = {}

    async def run(self) -> PartitionAudit:
        """Never raises because of what it finds; a side that cannot be asked leaves the result open."""
        result = self._result
        await in_thread(self._parts.workspace.begin_partition, self._tp.partition)
        answers: dict[Copy, list[_Answer]] = {}
        below: dict[Copy, list[_Answer]] = {}
        for copy in self._copies():
            try:
                # 2. pass
                self._passed[copy] = await (self._store_passes() if copy is Copy.STORE else self._sink_passes())
                # 3. ask
                kept = self._table.retention_seconds if copy is Copy.STORE else self._table.history_seconds
                answers[copy] = [await self._answer(copy, asked) for asked in self._ranges(self._offsets, kept)]
                below[copy] = [await self._answer(copy, asked, self._shared) for asked in self._ranges_below()]
                if copy is Copy.STORE:
                    await self._ask_ledger()
            except PintailError as error:
                result.open.append(f"{copy}: {in_words(error)}")
        try:
            # 4. read
            await self._read_log(await self._compare_ends())
            # 5. compare
            await self._compare_letters()
            await self._compare_ledger()
            for copy, own in answers.items():
                await self._compare(copy, own)
            await self._compare_below(below)
        except PintailError as error:
            result.open.append(in_words(error))
        return result

    def _copies(self) -> list[Copy]:
        copies = [Copy.STORE] if self._parts.ask is not None else []
        return copies + ([Copy.SINK] if self._parts.sink is not None else [])

    def _ranges(self, offsets: OffsetRange, kept_seconds: int | None) -> list[AuditedRange]:
        """The questions that cover these offsets, of rows that are kept so long."""
        first, end = offsets
        step = max(1, end - first) if self._table.is_keyed else RANGE_OFFSETS_MAX
        since_ms = 0
        if kept_seconds is not None:
            since_ms = self._parts.clock_ms() - kept_seconds * 1000 + RETENTION_MARGIN_MS
        return [
            AuditedRange(
                self._tp.partition,
                OffsetRange(lo, min(lo + step, end)),
                max(BUCKET_OFFSETS_MIN, -(-min(step, end - first) // BUCKETS_MAX)),
                since_ms,
            )
            for lo in range(first, end, step)
        ]

    def _ranges_below(self) -> list[AuditedRange]:
        """Those that cover what the log has lost, as long as both copies keep it."""
        limits = [each for each in (self._table.retention_seconds, self._table.history_seconds) if each is not None]
        return self._ranges(OffsetRange(0, self._offsets.lo), min(limits, default=None))

    # -- 2. pass -------------------------------------------------------------------------------------------------

    def _remaining_ms(self) -> int:
        return max(1_000, int((self._deadline - time.monotonic()) * 1000))

    async def _store_passes(self) -> int:
        """Returns how far it is."""
        assert self._parts.ask is not None
        newest = self._marks.high - 1
        answer = await self._parts.ask(
            f"SELECT count(*) FROM {LEDGER_VIEW}",
            key=self._key,
            deadline_ms=min(QUERY_DEADLINE_MS_MAX, self._remaining_ms()),
            at_least={self._tp.topic: {self._tp.partition: newest}} if newest >= 0 else None,
        )
        return answer.offsets[self._tp.topic][self._tp.partition]

    async def _sink_passes(self) -> int:
        """Returns how far it is."""
        assert self._parts.intents is not None
        assert self._parts.sink is not None
        if fault := await in_thread(self._parts.sink.fault, self._table):
            raise PintailError(fault)
        while True:
            intent = await self._parts.intents.read(self._tp)
            reached = 0 if intent is None else intent.lo
            if reached >= self._marks.high:
                return reached
            if time.monotonic() >= self._deadline:
                stands = "nothing is recorded" if intent is None else f"it has delivered below {reached}"
                raise PintailError(
                    f"the sink has not passed offset {self._marks.high} of {self._tp} in time: {stands}",
                    hint="is a sink worker up? `pintail status` shows it; give it longer with --deadline-seconds",
                )
            await asyncio.sleep(_POLL_SECONDS)

    # -- 3. ask --------------------------------------------------------------------------------------------------

    async def _answer(self, copy: Copy, asked: AuditedRange, table: TableDefinition | None = None) -> _Answer:
        holdings = await self._holdings(copy, asked, table or self._table)
        self._passed[copy] = max(self._passed[copy], holdings.position)
        return _Answer(asked, holdings)

    async def _holdings(self, copy: Copy, asked: AuditedRange, table: TableDefinition) -> Holdings:
        if copy is Copy.SINK:
            assert self._parts.sink is not None
            held = await in_thread(self._parts.sink.holdings, table, asked)
            return held._replace(position=self._sink_position(held.position))
        answer = await self._ask(
            f"SELECT (_offset // {asked.bucket})::BIGINT, count(*), sum(_offset)::VARCHAR, "
            "sum(md5_number_upper(t))::VARCHAR, sum(md5_number_lower(t))::VARCHAR",
            asked,
            table,
        )
        buckets = {int(bucket): Digest(*map(int, sums)) for bucket, *sums in answer.rows}
        return Holdings(self._store_position(answer), buckets)

    async def _held_rows(self, copy: Copy, asked: AuditedRange, table: TableDefinition) -> tuple[int, list[HeldRow]]:
        if copy is Copy.SINK:
            assert self._parts.sink is not None
            position, rows = await in_thread(self._parts.sink.rows, table, asked)
            return self._sink_position(position), rows
        answer = await self._ask("SELECT _offset, md5_number_upper(t)::VARCHAR, count(*)", asked, table)
        rows = [HeldRow(int(offset), int(digest), int(count)) for offset, digest, count in answer.rows]
        return self._store_position(answer), rows

    async def _ask(self, select: str, asked: AuditedRange, table: TableDefinition) -> StoreAnswer:
        assert self._parts.ask is not None
        text = store_text(table) if table is self._table else sink_text_in_duckdb(table)
        conditions = f"_offset >= {asked.offsets.lo} AND _offset < {asked.offsets.hi}"
        if asked.since_ms > 0:
            conditions += f" AND epoch_ms(_timestamp) >= {asked.since_ms}"
        return await self._parts.ask(
            f"{select} FROM (SELECT _offset, {text} AS t FROM {table.name} WHERE {conditions}) GROUP BY ALL",
            key=self._key,
            deadline_ms=QUERY_DEADLINE_MS_MAX,
        )

    def _store_position(self, answer: StoreAnswer) -> int:
        return max(self._marks.high, answer.offsets[self._tp.topic][self._tp.partition])

    def _sink_position(self, position: int) -> int:
        """It has passed the bound; where it is beyond, only the rows of a keyed table tell."""
        return max(self._marks.high, position) if self._table.is_keyed else self._marks.high

    async def _ask_ledger(self) -> None:
        assert self._parts.ask is not None
        answer = await self._parts.ask(
            f"SELECT first_offset, next_offset, rows, deletes, parked FROM {LEDGER_VIEW} "
            f"WHERE topic = '{self._tp.topic}' ORDER BY first_offset, next_offset",
            key=self._key,
            deadline_ms=QUERY_DEADLINE_MS_MAX,
        )
        self._ledger = [
            (OffsetRange(int(first), int(end)), (int(rows), int(deletes), int(parked)))
            for first, end, rows, deletes, parked in answer.rows
        ]
        self._passed[Copy.STORE] = max([self._passed[Copy.STORE], *(offsets.hi for offsets, _ in self._ledger)])

    # -- 4. read -------------------------------------------------------------------------------------------------

    async def _compare_ends(self) -> int:
        """No side may be ahead of the log, which goes on before they do. Returns how far it must be read."""
        end = (await self._parts.log.watermarks([self._tp]))[self._tp].high
        for copy, passed in self._passed.items():
            if passed > end:
                detail = "it is ahead of the log, whose topic may have been made anew"
                self._result.differences.append(
                    Difference(copy, Kind.UNEXPECTED, OffsetRange(end, passed), detail=detail)
                )
        return min(end, max([self._marks.high, *self._passed.values()]))

    async def _read_log(self, end: int) -> None:
        """Up to `end`, from where it was left; then the letters, which are there before their records are passed."""
        async for batch in self._parts.log.read(self._tp, OffsetRange(self._read_to, end)):
            await in_thread(self._decode, batch)
        self._read_to = max(self._read_to, end)
        await self._letters.read_on()
        await in_thread(self._parts.workspace.settle)

    def _decode(self, batch: RecordBatch) -> None:
        self._parts.workspace.add(self._parts.decoder.decode(self._table, batch))

    # -- 5. compare ----------------------------------------------------------------------------------------------

    async def _compare_letters(self) -> None:
        workspace, result = self._parts.workspace, self._result
        result.rows, result.deletes, result.parked = await in_thread(workspace.counts, self._offsets)
        result.refused_by_sink = await in_thread(workspace.refused, self._offsets)
        missing = await in_thread(workspace.letters_missing, self._offsets)
        if missing and self._letters.are_cut:
            first = await in_thread(workspace.first_letter)
            kept = [offset for offset in missing if first is not None and offset > first]
            if len(kept) < len(missing):
                result.notes.append(
                    f"{len(missing) - len(kept):,} dead letters are beyond the retention of "
                    f"{self._table.dead_letter_topic}"
                )
            missing = kept
        unexpected: list[int] = []
        if not self._letters.is_compacted:
            unexpected = await in_thread(workspace.letters_unexpected, self._offsets)
        for kind, offsets in ((Kind.MISSING, missing), (Kind.UNEXPECTED, unexpected)):
            runs = _Runs("dead letters", workspace.records_between)
            for offset in offsets:
                runs.add(kind, offset, 1)
            result.differences += await in_thread(runs.differences)

    async def _compare_ledger(self) -> None:
        """Ranges must touch one another, and count what the log has."""
        if self._ledger is None:
            return
        end: int | None = None
        for offsets, counted in self._ledger:
            if end is not None and offsets.lo != end:
                kind = Kind.HOLE if offsets.lo > end else Kind.OVERLAP
                between = OffsetRange(min(end, offsets.lo), max(end, offsets.lo))
                self._result.differences.append(Difference("ledger", kind, between))
            end = max(end or 0, offsets.hi)
            if self._letters.is_compacted:
                continue
            if offsets.lo < self._marks.low:
                self._result.notes.append(f"the ledger's counts of {offsets} were not compared: the log begins later")
            else:
                expected = await in_thread(self._parts.workspace.counts, offsets)
                if expected != counted:
                    detail = "rows, deletes, parked: {}, {}, {}; the log has {}, {}, {}".format(*counted, *expected)
                    self._result.differences.append(Difference("ledger", Kind.MISCOUNTED, offsets, detail=detail))
        end = self._marks.low if end is None else end
        if end < self._marks.high:
            self._result.differences.append(Difference("ledger", Kind.HOLE, OffsetRange(end, self._marks.high)))
        if self._ledger and (first := self._ledger[0][0].lo) > self._marks.low:
            self._result.notes.append(
                f"the ledger begins at {first}, as after a rebuild: below, only rows were compared"
            )

    async def _compare(self, copy: Copy, answers: Sequence[_Answer]) -> None:
        """Digests first; then, where they differ, rows."""
        held = 0
        runs = _Runs(copy, self._parts.workspace.records_between)
        pages = 0
        for answer in answers:
            expected = await in_thread(self._parts.workspace.buckets, copy, answer.asked, answer.holdings.position)
            found = answer.holdings.buckets
            for bucket in sorted(expected.keys() | found.keys()):
                held += found[bucket].rows if bucket in found else 0
                if expected.get(bucket) == found.get(bucket):
                    continue
                for page in _pages(answer.asked, bucket):
                    if pages >= PAGES_MAX:
                        runs.add(Kind.DIFFERS, page.offsets.lo, None, hi=page.offsets.hi)
                        continue
                    pages += 1
                    await self._search(copy, page, runs)
        if copy is Copy.STORE:
            self._result.in_store = held
        else:
            self._result.in_sink = held
        self._result.differences += await in_thread(runs.differences)

    # -- 6. search -----------------------------------------------------------------------------------------------

    async def _search(self, copy: Copy, asked: AuditedRange, runs: _Runs) -> None:
        """Compares the page row by row."""
        try:
            position, rows = await self._held_rows(copy, asked, self._table)
        except PintailError as error:
            self._result.open.append(f"{copy} {asked.offsets}: {in_words(error)}")
            return
        if position > self._read_to:
            await self._read_log(position)
        expected = {
            row.offset: row.digest for row in await in_thread(self._parts.workspace.rows, copy, asked, position)
        }
        found: dict[int, Counter[int]] = {}
        for row in rows:
            found.setdefault(row.offset, Counter())[row.digest] += row.copies
        for offset in sorted(expected.keys() | found.keys()):
            there = found.get(offset, Counter())
            if offset not in expected:
                runs.add(Kind.UNEXPECTED, offset, there.total())
            elif not there:
                runs.add(Kind.MISSING, offset, 1)
            elif there.total() > 1:
                runs.add(Kind.DOUBLED, offset, there.total() - 1)
            elif there[expected[offset]] != 1:
                runs.add(Kind.CHANGED, offset, 1)

    # -- what the log has lost -----------------------------------------------------------------------------------

    async def _compare_below(self, answers: Mapping[Copy, Sequence[_Answer]]) -> None:
        """Rows of append tables, those of the store with those of the sink, but for what the sink refused."""
        low = self._offsets.lo
        if low == 0:
            return
        held = {
            copy: sum(digest.rows for each in own for digest in each.holdings.buckets.values())
            for copy, own in answers.items()
        }
        counts = ", ".join(f"{rows:,} rows in the {copy}" for copy, rows in held.items())
        note = f"the log begins at {low}; of what was before ({counts})"
        if len(answers) < 2 or self._table.is_keyed:
            self._result.notes.append(f"{note}, nothing was compared")
            return
        pages = [
            page
            for store, sink in zip(answers[Copy.STORE], answers[Copy.SINK], strict=True)
            for bucket in sorted(store.holdings.buckets.keys() | sink.holdings.buckets.keys())
            if store.holdings.buckets.get(bucket) != sink.holdings.buckets.get(bucket)
            for page in _pages(store.asked, bucket)
        ]
        runs = {where: _Runs(where, lambda *_: True) for where in (*Copy, _BOTH)}
        for page in pages[:PAGES_MAX]:
            await self._search_below(page, runs)
        for page in pages[PAGES_MAX:]:
            runs[_BOTH].add(Kind.DIFFERS, page.offsets.lo, None, hi=page.offsets.hi)
        for each in runs.values():
            self._result.differences += [
                replace(difference, detail="store and sink compared with each other: the log is gone")
                for difference in each.differences()
            ]
        unseen = [column.name for column in self._table.columns if column not in self._shared.columns]
        without = f", without the values of {', '.join(unseen)}" if unseen else ""
        self._result.notes.append(f"{note}, the store was compared with the sink{without}")

    async def _search_below(self, page: AuditedRange, runs: Mapping[str, _Runs]) -> None:
        found: dict[Copy, dict[int, Counter[int]]] = {copy: {} for copy in Copy}
        for copy in Copy:
            for row in (await self._held_rows(copy, page, self._shared))[1]:
                found[copy].setdefault(row.offset, Counter())[row.digest] += row.copies
        refused = await in_thread(self._parts.workspace.letters_of_sink, page.offsets)
        for offset in sorted(found[Copy.STORE].keys() | found[Copy.SINK].keys()):
            there = {copy: found[copy].get(offset, Counter()) for copy in Copy}
            for copy in Copy:
                if there[copy].total() > 1:
                    runs[copy].add(Kind.DOUBLED, offset, there[copy].total() - 1)
                elif not there[copy] and not (copy is Copy.SINK and offset in refused):
                    runs[copy].add(Kind.MISSING, offset, 1)
            if all(there.values()) and there[Copy.STORE].keys() != there[Copy.SINK].keys():
                runs[_BOTH].add(Kind.CHANGED, offset, 1)


def _pages(asked: AuditedRange, bucket: int) -> Iterator[AuditedRange]:
    """The questions by which a bucket is searched row by row."""
    lo = max(asked.offsets.lo, bucket * asked.bucket)
    hi = min(asked.offsets.hi, (bucket + 1) * asked.bucket)
    for start in range(lo, hi, PAGE_OFFSETS):
        yield asked._replace(offsets=OffsetRange(start, min(start + PAGE_OFFSETS, hi)))


class _Runs:
    """Single findings become ranges: neighbours of one kind are one, unless the log has a record between them."""

    def __init__(self, where: str, records_between: Callable[[int, int], bool]) -> None:
        self._where, self._records_between = where, records_between
        self._runs: list[Difference] = []

    def add(self, kind: Kind, offset: int, records: int | None, *, hi: int | None = None) -> None:
        """In ascending order of offsets."""
        end = next_offset_after(offset) if hi is None else hi
        self._runs.append(Difference(self._where, kind, OffsetRange(offset, end), records))

    def differences(self) -> list[Difference]:
        """Blocks: it asks the workspace."""
        merged: list[Difference] = []
        for each in self._runs:
            last = merged[-1] if merged else None
            if last is None or last.kind is not each.kind or self._are_apart(last.offsets, each.offsets):
                merged.append(each)
                continue
            records = None if last.records is None or each.records is None else last.records + each.records
            merged[-1] = replace(last, offsets=OffsetRange(last.offsets.lo, each.offsets.hi), records=records)
        return merged

    def _are_apart(self, before: OffsetRange, after: OffsetRange) -> bool:
        return after.lo > before.hi and self._records_between(before.hi - 1, after.lo)
