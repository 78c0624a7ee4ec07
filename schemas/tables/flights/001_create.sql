-- On-time data of every flight that left New York City (EWR, JFK, LGA) in 2013: 336,776 of them.
-- The data set has no single key column. (year, month, day, carrier, flight, origin) is unique; publishers write it
-- into `id` as year-month-day-carrier-flight-origin, such as 2013-01-01-UA-1545-EWR.
CREATE TABLE flights (
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
    time_hour      TIMESTAMPTZ NOT NULL,   -- scheduled departure, whole hour; joins weather with origin
    PRIMARY KEY (id)
) WITH (topic='flights', partitions=4, format='json');
