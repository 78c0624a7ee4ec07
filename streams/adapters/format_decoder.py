"""The decoder of the workers: each table's records by its format and its policy for extra fields.

JSON tables that ignore extra fields are most tables and go to the decoder made for whole batches, untouched. All others
are read one record at a time to a Change, to which exact_decoder gives the columns' types, by one set of rules.
"""

from __future__ import annotations

from schemas.table import ExtraFields, RecordFormat, TableDefinition
from streams.adapters.avro_records import AvroRecords
from streams.adapters.debezium_changes import DebeziumRecords
from streams.adapters.exact_decoder import ChangeReader, decode_one_by_one, json_change
from streams.batches import RecordBatch
from streams.ports import DecodedBatch, Decoder, SchemaRegistry


class FormatDecoder(Decoder):
    """Decodes every format. `registry` is needed by tables of the Avro formats only."""

    def __init__(self, json_decoder: Decoder, registry: SchemaRegistry | None = None) -> None:
        self._json_decoder = json_decoder
        self._debezium = DebeziumRecords()
        self._avro = AvroRecords(registry) if registry else None

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """See Decoder."""
        if table.format is RecordFormat.JSON and table.extra_fields is ExtraFields.IGNORE:
            return self._json_decoder.decode(table, batch)
        return decode_one_by_one(table, batch, self._reader(table.format))

    def _reader(self, record_format: RecordFormat) -> ChangeReader:
        if record_format is RecordFormat.JSON:
            return json_change
        if record_format is RecordFormat.DEBEZIUM:
            return self._debezium.read
        assert self._avro is not None, "tables in Avro need a registry"
        return self._avro.reader(debezium=record_format.is_debezium)
