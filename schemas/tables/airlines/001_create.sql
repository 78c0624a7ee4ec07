-- Names of the carriers in flights.
CREATE TABLE airlines (
    carrier VARCHAR NOT NULL,
    name    VARCHAR NOT NULL,
    PRIMARY KEY (carrier)
) WITH (topic='airlines', partitions=4, format='json');
