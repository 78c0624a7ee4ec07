-- Benchmark: the same flights, each a row of its own.
CREATE TABLE flights_append (
    id             VARCHAR     NOT NULL,
    year           SMALLINT    NOT NULL,
    month          TINYINT     NOT NULL,
    day            TINYINT     NOT NULL,
    dep_time       SMALLINT,               -- local, HHMM; null: cancelled
    sched_dep_time SMALLINT    NOT NULL,
    dep_delay      SMALLINT,               -- minutes, negative: early
    arr_time       SMALLINT,
    sched_arr_time SMALLINT    NOT NULL,
    arr_delay      SMALLINT,
    carrier        VARCHAR     NOT NULL,   -- airlines.carrier
    flight         INTEGER     NOT NULL,
    tailnum        VARCHAR,                -- planes.tailnum
    origin         VARCHAR     NOT NULL,   -- airports.faa
    dest           VARCHAR     NOT NULL,   -- airports.faa
    air_time       SMALLINT,               -- minutes
    distance       SMALLINT    NOT NULL,   -- miles
    hour           TINYINT     NOT NULL,   -- of sched_dep_time
    minute         TINYINT     NOT NULL,
    time_hour      TIMESTAMPTZ NOT NULL    -- scheduled departure, whole hour; joins weather with origin
) WITH (topic='flights_append', partitions=4, format='json');
