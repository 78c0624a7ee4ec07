-- Aircraft by tail number, for those the FAA registry knows.
CREATE TABLE planes (
    tailnum      VARCHAR  NOT NULL,
    year         SMALLINT,             -- built
    type         VARCHAR  NOT NULL,
    manufacturer VARCHAR  NOT NULL,
    model        VARCHAR  NOT NULL,
    engines      TINYINT  NOT NULL,
    seats        SMALLINT NOT NULL,
    speed        SMALLINT,             -- cruising, miles per hour
    engine       VARCHAR  NOT NULL,
    PRIMARY KEY (tailnum)
) WITH (topic='planes', partitions=4, format='json');
