"""The SELECT dialect that queries may use: functions, operators and types, each listed by name. Nothing else passes.

Functions are grouped by how large their result can be compared with their arguments, because DuckDB's memory limit does
not cover the strings and lists inside one vector: the guard multiplies these factors to bound what a query can build.
A function that takes a size (repeat, lpad, range, format), a lambda, or the name of another function is not here.
"""

from __future__ import annotations

from enum import Enum, auto


class Growth(Enum):
    """The size of a function's result."""

    #: Bounded, whatever the arguments: numbers, dates, booleans, digests.
    FIXED = auto()
    #: Not above the largest argument.
    LARGEST = auto()
    #: Up to the arguments together, and as much again for quoting and list entries.
    TOGETHER = auto()
    #: Up to the product of the arguments: each match or element takes a copy of another argument.
    PRODUCT = auto()
    #: Many elements for one value, or one value out of many rows.
    SPREAD = auto()


_FUNCTIONS = {
    Growth.FIXED: """
        + - * / // % ** ^ & | << >> ~ ^@ @ ~~ !~~ ~~* !~~* ~~~
        abs acos add asin atan atan2 cbrt ceil ceiling cos cot degrees divide even exp fdiv floor fmod gcd
        greatest_common_divisor isfinite isinf isnan lcm ln log log10 log2 mod multiply pi pow power radians round
        round_even sign signbit sin sqrt subtract tan trunc xor bit_count
        approx_count_distinct approx_quantile avg bit_and bit_or bit_xor bool_and bool_or corr count count_if count_star
        countif covar_pop covar_samp entropy favg fsum geomean kurtosis mad mean median product
        quantile quantile_cont quantile_disc regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx
        regr_sxy regr_syy sem skewness stddev stddev_pop stddev_samp sum sumkahan kahan_sum var_pop var_samp variance
        weighted_avg
        cume_dist dense_rank ntile percent_rank rank rank_dense row_number
        age century current_date date_add date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc
        day dayname dayofmonth dayofweek dayofyear days_in_month decade epoch epoch_ms epoch_ns epoch_us era
        get_current_time get_current_timestamp current_localtime current_localtimestamp hour isodow isoyear julian
        last_day make_date make_time make_timestamp make_timestamptz microsecond millennium millisecond minute month
        monthname nanosecond now quarter second strptime timezone to_centuries to_days to_decades to_hours
        to_microseconds to_millennia to_milliseconds to_minutes to_months to_quarters to_seconds to_timestamp to_weeks
        to_years today transaction_timestamp try_strptime time_bucket week weekday weekofyear year yearweek
        ascii bit_length char_length character_length chr contains ends_with ilike_escape instr length like_escape
        not_ilike_escape not_like_escape ord position prefix regexp_full_match regexp_matches starts_with strlen strpos
        suffix unicode
        hash md5 md5_number md5_number_lower md5_number_upper sha1 sha256
        array_contains array_has array_has_all array_has_any array_indexof array_length array_position cardinality len
        list_avg list_bool_and list_bool_or list_contains list_count list_has list_has_all list_has_any list_indexof
        list_median list_position list_product list_stddev_pop list_stddev_samp list_sum list_unique list_var_pop
        list_var_samp map_contains
        json_array_length json_contains json_exists json_type json_valid typeof
    """,
    Growth.LARGEST: """
        any_value arbitrary arg_max arg_max_null arg_min arg_min_null argmax argmin first first_value lag last
        last_value lead max max_by min min_by mode nth_value
        greatest least nullif
        lcase left lower ltrim regexp_extract reverse right rtrim split_part strip_accents substr substring trim ucase
        upper
        array_distinct array_extract array_intersect array_reverse array_reverse_sort array_slice array_sort element_at
        flatten list_any_value list_distinct list_element list_extract list_first list_intersect list_last list_max
        list_min list_reverse list_reverse_sort list_slice list_sort map_entries map_extract map_extract_value map_keys
        map_values struct_extract unnest
        ->> json_extract json_extract_path json_extract_path_text json_extract_string json_keys json_value
    """,
    Growth.TOGETHER: """
        || concat concat_ws strftime
        array_append array_cat array_concat array_prepend list_append list_cat list_concat list_prepend list_value
        map map_concat row struct_insert struct_pack
        array_to_json json_array json_object json_quote row_to_json to_json
    """,
    Growth.PRODUCT: "replace regexp_replace translate array_to_string",
    Growth.SPREAD: """
        array_agg group_concat list listagg string_agg json_group_array json_group_object
        regexp_extract_all regexp_split_to_array split str_split str_split_regex string_split string_split_regex
        string_to_array
    """,
}

#: Lower-case name of every function and operator a query may call -> the growth of its result.
FUNCTIONS: dict[str, Growth] = {name: growth for growth, names in _FUNCTIONS.items() for name in names.split()}


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


OPERATORS = names("""
    OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_TRY COMPARE_IN COMPARE_NOT_IN
    ARRAY_CONSTRUCTOR ARRAY_EXTRACT ARRAY_SLICE STRUCT_EXTRACT GROUPING_FUNCTION
""")
COMPARISONS = names("""
    COMPARE_EQUAL COMPARE_NOTEQUAL COMPARE_LESSTHAN COMPARE_GREATERTHAN COMPARE_LESSTHANOREQUALTO
    COMPARE_GREATERTHANOREQUALTO COMPARE_DISTINCT_FROM COMPARE_NOT_DISTINCT_FROM
""")
#: What each partition has applied, by range of offsets; readable beside the tables, which cannot have such a name. To
#: read it is to read every table.
LEDGER_VIEW = "_ledger"
JOINS = names("REGULAR CROSS NATURAL ASOF POSITIONAL")

#: Types to cast to. Fixed-size arrays and bit strings are left out: their size is in the type.
SCALAR_TYPES = names("""
    BOOLEAN TINYINT SMALLINT INTEGER BIGINT HUGEINT UTINYINT USMALLINT UINTEGER UBIGINT UHUGEINT FLOAT DOUBLE DECIMAL
    VARCHAR BLOB UUID DATE TIME TIMESTAMP TIMESTAMP_S TIMESTAMP_MS TIMESTAMP_NS INTERVAL NULL INTEGER_LITERAL
""") | {"TIMESTAMP WITH TIME ZONE", "TIME WITH TIME ZONE"}
NAMED_TYPES = names("json")

COLLATIONS = names("nocase noaccent nfc binary c posix")

#: Bare words that DuckDB turns into function calls about the connection unless a column has that name.
SESSION_WORDS = names("current_catalog current_database current_role current_schema current_user session_user user")
