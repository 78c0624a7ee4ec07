"""Five questions about the flights of 2013, as the demo asks them over the query topic."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """What is asked, in words and in SQL."""

    words: str
    sql: str


QUESTIONS = (
    Question(
        "Which airlines are late, and how late is their unluckiest tenth? (join, percentile)",
        """
        SELECT a.name AS airline, count(*) AS flights, round(avg(f.arr_delay), 1) AS mean_delay,
               round(quantile_cont(f.arr_delay, 0.9)) AS p90_delay
        FROM flights f JOIN airlines a USING (carrier)
        WHERE f.arr_delay IS NOT NULL
        GROUP BY ALL ORDER BY mean_delay DESC LIMIT 5
        """,
    ),
    Question(
        "Are old planes late more often? (join, age in buckets)",
        """
        SELECT CASE WHEN f.year - p.year < 5 THEN '0-4' WHEN f.year - p.year < 10 THEN '5-9'
                    WHEN f.year - p.year < 15 THEN '10-14' WHEN f.year - p.year < 20 THEN '15-19'
                    ELSE '20+' END AS years,
               count(DISTINCT f.tailnum) AS planes, count(*) AS flights,
               round(100.0 * avg((f.arr_delay > 15)::INTEGER), 1) AS late_percent
        FROM flights f JOIN planes p ON f.tailnum = p.tailnum
        WHERE p.year IS NOT NULL AND f.arr_delay IS NOT NULL
        GROUP BY ALL ORDER BY min(f.year - p.year)
        """,
    ),
    Question(
        "What does the weather at the airport do to departures? (join on airport and hour)",
        """
        SELECT CASE WHEN w.visib < 1 THEN '1 fog' WHEN w.precip > 0.1 THEN '2 heavy rain'
                    WHEN w.wind_gust > 35 THEN '3 storm' WHEN w.precip > 0 THEN '4 rain' ELSE '5 fair' END AS weather,
               count(*) AS flights, median(f.dep_delay) AS median_delay, round(avg(f.dep_delay), 1) AS mean_delay,
               round(100.0 * avg((f.dep_time IS NULL)::INTEGER), 1) AS cancelled_percent
        FROM flights f JOIN weather w ON f.origin = w.origin AND f.time_hour = w.time_hour
        GROUP BY ALL ORDER BY weather
        """,
    ),
    Question(
        "Of each month's worst day to fly, which five were the worst? (window function)",
        """
        SELECT month, day, round(avg(dep_delay), 1) AS mean_delay, count(*) FILTER (dep_time IS NULL) AS cancelled
        FROM flights GROUP BY month, day
        QUALIFY row_number() OVER (PARTITION BY month ORDER BY avg(dep_delay) DESC) = 1
        ORDER BY mean_delay DESC LIMIT 5
        """,
    ),
    Question(
        "On which busy routes do pilots make up the most time in the air? (two joins, HAVING)",
        """
        SELECT o.name AS origin, d.name AS destination, count(*) AS flights, f.distance AS miles,
               round(avg(f.dep_delay - f.arr_delay), 1) AS minutes_gained
        FROM flights f JOIN airports o ON f.origin = o.faa JOIN airports d ON f.dest = d.faa
        WHERE f.arr_delay IS NOT NULL
        GROUP BY ALL HAVING count(*) >= 5 ORDER BY minutes_gained DESC, flights DESC LIMIT 5
        """,
    ),
)
