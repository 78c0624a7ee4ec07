-- Airports by their FAA code.
CREATE TABLE airports (
    faa   VARCHAR  NOT NULL,
    name  VARCHAR  NOT NULL,
    lat   DOUBLE   NOT NULL,
    lon   DOUBLE   NOT NULL,
    alt   SMALLINT NOT NULL,   -- feet
    tz    TINYINT  NOT NULL,   -- hours from UTC, without daylight saving
    dst   VARCHAR  NOT NULL,   -- A: US rule, N: none, U: unknown
    tzone VARCHAR,             -- IANA name
    PRIMARY KEY (faa)
) WITH (topic='airports', partitions=4, format='json');
