-- Hourly weather at the three airports. Observations are never corrected: an append table.
CREATE TABLE weather (
    origin     VARCHAR     NOT NULL,   -- airports.faa
    year       SMALLINT    NOT NULL,
    month      TINYINT     NOT NULL,
    day        TINYINT     NOT NULL,
    hour       TINYINT     NOT NULL,
    temp       DOUBLE,                 -- degrees Fahrenheit
    dewp       DOUBLE,
    humid      DOUBLE,                 -- percent
    wind_dir   SMALLINT,               -- degrees
    wind_speed DOUBLE,                 -- miles per hour
    wind_gust  DOUBLE,
    precip     DOUBLE,                 -- inches
    pressure   DOUBLE,                 -- millibars
    visib      DOUBLE,                 -- miles
    time_hour  TIMESTAMPTZ NOT NULL
) WITH (topic='weather', partitions=4, format='json');
