"""One walk over the syntax tree of a query: refuses whatever is outside the dialect, and collects what it reads.

Every field of every node must be one that this file knows, so that syntax which a DuckDB upgrade adds is refused until
somebody has looked at it. Tables are unqualified names of the catalog, the ledger, or of a CTE in scope; a CTE sees
only earlier ones, as in DuckDB. Called by `duckdb_guard`.

Each method returns a growth: how many times larger than a stored value the values may be that the node yields
(`duckdb_growth`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from schemas.catalog import Catalog
from schemas.messages import RefusalCode
from streams.adapters.duckdb_dialect import (
    COLLATIONS,
    COMPARISONS,
    FUNCTIONS,
    JOINS,
    LEDGER_VIEW,
    NAMED_TYPES,
    OPERATORS,
    SCALAR_TYPES,
    SESSION_WORDS,
    Growth,
    names,
)
from streams.adapters.duckdb_growth import ParameterSize, grown, growth_of, leaf_of
from streams.adapters.duckdb_patterns import Pattern, pattern_of, takes_pattern
from streams.errors import QueryRefusedError
from streams.limits import (
    QUERY_DEPTH_MAX,
    QUERY_GROWTH_MAX,
    QUERY_GROWTH_TOTAL_MAX,
    QUERY_NODES_MAX,
    QUERY_SOURCES_MAX,
)

Node = dict[str, Any]
#: CTE name, in lower case -> growth of its values.
Scope = Mapping[str, int]

_CTE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
#: Prefixes of DuckDB's own views and functions: no CTE may look like one.
_RESERVED_PREFIXES = ("duckdb_", "pragma_", "pg_", "sqlite_", "information_schema")
_SELECT_FIELDS = names("""
    modifiers cte_map select_list from_table where_clause group_expressions group_sets aggregate_handling having qualify
""")
_WINDOW_FIELDS = names("""
    function_name schema children partitions orders start end start_expr end_expr offset_expr default_expr ignore_nulls
    filter_expr exclude_clause distinct arg_orders
""")
#: Nodes that make new values; the others pass on what is there.
_BUILDING = frozenset(("FUNCTION", "WINDOW", "OPERATOR", "CASE", "CAST"))
#: Operators that yield a boolean, whatever they look at.
_DECIDING = names("OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL COMPARE_IN COMPARE_NOT_IN")
_ANYWHERE = frozenset(("class", "type", "alias", "query_location"))
#: What DuckDB writes where it knows no place.
_NO_LOCATION = 2**64 - 1
_DIALECT_HINT = "docs/wire-protocol.md lists the SQL dialect of queries"
_WORDS = {
    "RECURSIVE_CTE_NODE": "WITH RECURSIVE",
    "SHOW_REF": "SHOW, DESCRIBE or SUMMARIZE",
    "PIVOT": "PIVOT or UNPIVOT",
    "columns": "COLUMNS(...)",
    "rename_list": "RENAME",
    "at_clause": "AT",
    "sample": "TABLESAMPLE or USING SAMPLE",
}


@dataclass(frozen=True)
class Frame:
    """What an expression can refer to."""

    scope: Scope
    #: Growth of the columns of its FROM clause, and of those around it.
    source: int
    #: Alias of an earlier column of the same SELECT, in lower case -> its growth.
    aliases: Mapping[str, int]


@dataclass
class Inspection:
    """One walk over a syntax tree. Methods return the growth of the values that the node yields."""

    catalog: Catalog
    #: Of the parameters whose values are known.
    sizes: Mapping[str, ParameterSize] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    patterns: list[Pattern] = field(default_factory=list)
    nodes: int = 0
    depth: int = 0
    sources: int = 0
    built: int = 0

    def __post_init__(self) -> None:
        self._by_lower_name = {table.name.lower(): table for table in self.catalog.tables}
        self._columns = {name.lower() for table in self.catalog.tables for name in table.column_names}

    # -- queries and tables ------------------------------------------------------------------------------------------

    def query(self, node: Node, scope: Scope, outer: int) -> int:
        """`outer` is the growth of values that a correlated reference may bring in."""
        self._enter()
        self._enter_source()
        scope = self._with_ctes(node.get("cte_map", {}), scope, outer)
        match node["type"]:
            case "SELECT_NODE":
                growth = self._select(node, scope, outer)
            case "SET_OPERATION_NODE":
                only(node, ("modifiers", "cte_map", "setop_type", "left", "right", "setop_all"), "set operation")
                growth = max(self.query(node["left"], scope, outer), self.query(node["right"], scope, outer))
                self._modifiers(node, Frame(scope, growth, {}))
            case kind:
                refuse_construct(_readable(kind), node)
        self.depth -= 1
        return growth

    def _with_ctes(self, cte_map: Node, scope: Scope, outer: int) -> Scope:
        only(cte_map, ("map",), "WITH")
        for entry in cte_map.get("map", ()):
            name, cte = entry["key"], entry["value"]
            only(cte, ("aliases", "query", "materialized"), "WITH")
            only(cte["query"], ("node", "named_param_map"), "WITH")
            lower = name.lower()
            if not _CTE_NAME.fullmatch(name) or lower.startswith(_RESERVED_PREFIXES):
                refuse(f"WITH cannot name a query {name!r}", "use letters, digits and underscores")
            if lower in self._by_lower_name or lower in scope:
                refuse(f"WITH names a query {name!r}, which hides a table or query of that name", "choose another name")
            scope = {**scope, lower: self.query(cte["query"]["node"], scope, outer)}
        return scope

    def _select(self, node: Node, scope: Scope, outer: int) -> int:
        only(
            node,
            _SELECT_FIELDS,
            "SELECT",
        )
        if len(node.get("group_sets", ())) > QUERY_DEPTH_MAX:
            too_complex(f"it has more than {QUERY_DEPTH_MAX} grouping sets")
        source = max(outer, self._table(node["from_table"], scope, outer))
        # A later column may use an earlier one's alias, so growth accumulates along the list.
        aliases: dict[str, int] = {}
        frame, growth = Frame(scope, source, aliases), 1
        for item in node.get("select_list", ()):
            item_growth = self._expression(item, frame)
            growth = max(growth, item_growth)
            if alias := item.get("alias"):
                aliases[alias.lower()] = max(item_growth, aliases.get(alias.lower(), 1))
        for clause in ("where_clause", "having", "qualify"):
            if clause in node:
                self._expression(node[clause], frame)
        self._expressions(node.get("group_expressions", ()), frame)
        self._modifiers(node, Frame(scope, max(source, growth), aliases))
        return growth

    def _modifiers(self, node: Node, frame: Frame) -> None:
        for modifier in node.get("modifiers", ()):
            match modifier["type"]:
                case "ORDER_MODIFIER":
                    self._orders(modifier, frame)
                case "LIMIT_MODIFIER" | "LIMIT_PERCENT_MODIFIER":
                    only(modifier, ("limit", "offset"), "LIMIT")
                    for bound in ("limit", "offset"):
                        if bound in modifier:
                            self._expression(modifier[bound], frame)
                case "DISTINCT_MODIFIER":
                    only(modifier, ("distinct_on_targets",), "DISTINCT")
                    self._expressions(modifier.get("distinct_on_targets", ()), frame)
                case kind:
                    refuse_construct(_readable(kind), modifier)

    def _orders(self, modifier: Node, frame: Frame) -> None:
        only(modifier, ("orders",), "ORDER BY")
        for order in modifier.get("orders", ()):
            only(order, ("null_order", "expression"), "ORDER BY")
            expression = order["expression"]
            if expression["class"] == "STAR" and set(expression) <= {*_ANYWHERE, "columns"}:
                continue  # ORDER BY ALL
            self._expression(expression, frame)

    def _table(self, ref: Node, scope: Scope, outer: int) -> int:
        self._enter()
        match ref["type"]:
            case "EMPTY":
                only(ref, (), "FROM")
                growth = 1
            case "BASE_TABLE":
                growth = self._base_table(ref, scope)
            case "SUBQUERY":
                only(ref, ("subquery", "column_name_alias"), "FROM (SELECT ...)")
                only(ref["subquery"], ("node", "named_param_map"), "FROM (SELECT ...)")
                growth = self.query(ref["subquery"]["node"], scope, outer)
            case "JOIN":
                growth = self._join(ref, scope, outer)
            case "EXPRESSION_LIST":
                only(ref, ("expected_names", "expected_types", "values"), "VALUES")
                growth = max(self._expressions(row, Frame(scope, outer, {})) for row in ref["values"])
            case "TABLE_FUNCTION":
                only(ref, ("function", "column_name_alias", "with_ordinality"), "table function")
                if ref["function"].get("function_name", "").lower() != "unnest":
                    refuse_construct(f"table function {ref['function'].get('function_name', '')}()", ref)
                growth = self._expression(ref["function"], Frame(scope, outer, {}))
            case kind:
                refuse_construct(_readable(kind), ref)
        self.depth -= 1
        return growth

    def _join(self, ref: Node, scope: Scope, outer: int) -> int:
        only(ref, ("left", "right", "condition", "join_type", "ref_type", "using_columns"), "JOIN")
        if ref["ref_type"] not in JOINS:
            refuse_construct(f"{ref['ref_type']} JOIN", ref)
        left = self._table(ref["left"], scope, outer)
        growth = max(left, self._table(ref["right"], scope, max(outer, left)))  # the right side may be lateral
        if "condition" in ref:
            self._expression(ref["condition"], Frame(scope, max(outer, growth), {}))
        return growth

    def _base_table(self, ref: Node, scope: Scope) -> int:
        name = ref["table_name"]
        if "schema_name" in ref or "catalog_name" in ref:
            qualified = ".".join(ref[part] for part in ("catalog_name", "schema_name") if part in ref)
            refuse(f"table {name!r} is qualified with {qualified!r}", "name tables without schema or catalog")
        only(ref, ("table_name", "column_name_alias"), f"table {name!r}")
        self._enter_source()
        lower = name.lower() if name.isascii() else ""
        if lower in scope:
            return scope[lower]
        if lower == LEDGER_VIEW:  # it tells of every table, so whoever asks for it must be allowed to read them all
            self.tables.update(table.name for table in self.catalog.tables)
            return 1
        if lower not in self._by_lower_name:
            self._refuse_table(name)
        self.tables.add(self._by_lower_name[lower].name)
        return 1

    def _refuse_table(self, name: str) -> NoReturn:
        known = [table.name for table in self.catalog.tables]
        near = get_close_matches(name.lower(), known, n=1)
        raise QueryRefusedError(
            f"there is no table {name!r}",
            code=RefusalCode.UNKNOWN_TABLE,
            hint=(f"did you mean {near[0]}? " if near else "") + f"tables: {', '.join(known)}",
        )

    # -- expressions -------------------------------------------------------------------------------------------------

    def _expressions(self, nodes: Iterable[Node], frame: Frame) -> int:
        return max((self._expression(node, frame) for node in nodes), default=1)

    def _expression(self, node: Node, frame: Frame) -> int:
        self._enter()
        handler = _EXPRESSIONS.get(node["class"])
        if handler is None:
            refuse_construct(_readable(node["class"]), node)
        growth = handler(self, node, frame)
        if leaf_of(node) is None:
            self._check_growth(node, growth)
        self.depth -= 1
        return growth

    def _check_growth(self, node: Node, growth: int) -> None:
        if growth > QUERY_GROWTH_MAX:
            too_complex("it builds values a thousand times larger than what is stored; long parameters count")
        if node["class"] in _BUILDING:
            self.built += growth - 1
        if self.built > QUERY_GROWTH_TOTAL_MAX:
            too_complex("together its expressions build values thousands of times larger than what is stored")

    def _enter(self) -> None:
        self.nodes += 1
        self.depth += 1
        if self.nodes > QUERY_NODES_MAX:
            too_complex(f"it has more than {QUERY_NODES_MAX} parts; pass long lists as one parameter")
        if self.depth > QUERY_DEPTH_MAX:
            too_complex(f"it is nested deeper than {QUERY_DEPTH_MAX} levels")

    def _enter_source(self) -> None:
        self.sources += 1
        if self.sources > QUERY_SOURCES_MAX:
            too_complex(f"it has more than {QUERY_SOURCES_MAX} tables and SELECTs")

    def _positional(self, node: Node, frame: Frame) -> int:
        only(node, ("index",), "a column by #position")
        return frame.source

    def _constant(self, node: Node, frame: Frame) -> int:
        del frame
        only(node, ("value",), "literal")
        only(node["value"], ("type", "is_null", "value"), "literal")
        value = node["value"].get("value")
        return growth_of(len(value)) if isinstance(value, str) else 1

    def _parameter(self, node: Node, frame: Frame) -> int:
        del frame
        only(node, ("identifier",), "parameter")
        self.parameters.add(node["identifier"])
        return growth_of(self._size(node).chars)

    def _size(self, parameter: Node) -> ParameterSize:
        return self.sizes.get(parameter["identifier"], ParameterSize())

    def _column(self, node: Node, frame: Frame) -> int:
        only(node, ("column_names",), "column")
        names = [name.lower() for name in node["column_names"]]
        if len(names) == 1 and names[0] in SESSION_WORDS - self._columns:
            refuse_construct(names[0], node)
        return max(frame.source, *(frame.aliases.get(name, 1) for name in names))

    def _star(self, node: Node, frame: Frame) -> int:
        only(node, ("relation_name", "exclude_list", "replace_list"), "this form of *")
        for replaced in node.get("replace_list", ()):
            only(replaced, ("key", "value"), "REPLACE")
        return max(frame.source, self._expressions((entry["value"] for entry in node.get("replace_list", ())), frame))

    def _function(self, node: Node, frame: Frame) -> int:
        name = node["function_name"].lower()
        growth = self._allowed_function(node, name)
        only(
            node,
            ("function_name", "schema", "children", "filter", "order_bys", "distinct", "is_operator"),
            f"this form of {name}()",
        )
        if takes_pattern(name):
            self._pattern(node, name)
        if "filter" in node:
            self._expression(node["filter"], frame)
        if "order_bys" in node:
            self._orders(node["order_bys"], frame)
        arguments = [self._expression(child, frame) for child in node.get("children", ())]
        if name == "unnest" and arguments:
            listed = leaf_of(node["children"][0])
            if listed is not None and listed["class"] == "PARAMETER":
                return growth_of(self._size(listed).element_chars)
        return grown(growth, arguments, node)

    def _pattern(self, node: Node, name: str) -> None:
        arguments = node.get("children", ())
        pattern = pattern_of(name, arguments[1]) if len(arguments) > 1 else None
        if pattern is None:
            refuse_construct(
                "a pattern that depends on a row", node, "give patterns as text, parameters, or both joined"
            )
        fault = None if pattern.has_parameters else pattern.fault({})
        if fault:
            too_complex(fault)
        self.patterns.append(pattern)

    def _allowed_function(self, node: Node, name: str) -> Growth:
        growth = FUNCTIONS.get(name)
        schema = node.get("schema", "")
        if schema not in ("", "main"):  # the parser itself writes main.list_value for [1, 2], and the like
            refuse_construct(
                f"{schema}.{name}()", node, "call functions as name(x), without schema and not as x.name()"
            )
        if "catalog" in node or growth is None:
            near = get_close_matches(name, FUNCTIONS, n=1, cutoff=0.8)
            refuse_construct(f"function {name}()", node, f"did you mean {near[0]}()? {_DIALECT_HINT}" if near else "")
        return growth

    def _window(self, node: Node, frame: Frame) -> int:
        name = node["function_name"].lower()
        growth = self._allowed_function(node, name)
        only(
            node,
            _WINDOW_FIELDS,
            "this form of OVER",
        )
        self._expressions(node.get("partitions", ()), frame)
        for orders in ("orders", "arg_orders"):
            self._orders({"type": "ORDER_MODIFIER", "orders": node.get(orders, ())}, frame)
        for part in ("start_expr", "end_expr", "filter_expr", "offset_expr"):
            if part in node:
                self._expression(node[part], frame)
        children = [*node.get("children", ()), *([node["default_expr"]] if "default_expr" in node else [])]
        return grown(growth, [self._expression(child, frame) for child in children], {**node, "children": children})

    def _cast(self, node: Node, frame: Frame) -> int:
        only(node, ("child", "cast_type", "try_cast"), "CAST")
        self._type(node["cast_type"], node)
        return self._expression(node["child"], frame)

    def _type(self, kind: Node, node: Node) -> None:
        """Refuses types that are not listed, at any depth."""
        self._enter()
        only(kind, ("id", "type_info"), "type")
        info = kind.get("type_info", {})
        match kind["id"], info.get("type"):
            case scalar, None if scalar in SCALAR_TYPES:
                pass
            case "DECIMAL", "DECIMAL_TYPE_INFO":
                only(info, ("width", "scale"), "type")
            case (("LIST" | "MAP"), "LIST_TYPE_INFO"):
                only(info, ("child_type",), "type")
                self._type(info["child_type"], node)
            case "STRUCT", "STRUCT_TYPE_INFO":
                only(info, ("child_types",), "type")
                for member in info["child_types"]:
                    only(member, ("first", "second"), "type")
                    self._type(member["second"], node)
            case "UNBOUND", "UNBOUND_TYPE_INFO" if info.get("name", "").lower() in NAMED_TYPES:
                only(info, ("name",), "type")
            case _:
                refuse_construct(f"type {info.get('name') or kind['id']}", node)
        self.depth -= 1

    def _case(self, node: Node, frame: Frame) -> int:
        only(node, ("case_checks", "else_expr"), "CASE")
        growths = [self._expression(node["else_expr"], frame)] if "else_expr" in node else []
        for check in node["case_checks"]:
            only(check, ("when_expr", "then_expr"), "CASE")
            self._expression(check["when_expr"], frame)
            growths.append(self._expression(check["then_expr"], frame))
        return max(growths)

    def _comparison(self, node: Node, frame: Frame) -> int:
        if node["type"] not in COMPARISONS:
            refuse_construct(_readable(node["type"]), node)
        only(node, ("left", "right"), "comparison")
        self._expressions((node["left"], node["right"]), frame)
        return 1

    def _conjunction(self, node: Node, frame: Frame) -> int:
        only(node, ("children",), "AND and OR")
        self._expressions(node["children"], frame)
        return 1

    def _between(self, node: Node, frame: Frame) -> int:
        only(node, ("input", "lower", "upper"), "BETWEEN")
        self._expressions((node["input"], node["lower"], node["upper"]), frame)
        return 1

    def _operator(self, node: Node, frame: Frame) -> int:
        kind = node["type"]
        if kind not in OPERATORS:
            refuse_construct(_readable(kind), node)
        only(node, ("children",), _readable(kind))
        growths = [self._expression(child, frame) for child in node.get("children", ())]
        if kind in _DECIDING:
            return 1
        return grown(Growth.SPREAD if kind == "ARRAY_CONSTRUCTOR" else Growth.LARGEST, growths, node)

    def _collate(self, node: Node, frame: Frame) -> int:
        only(node, ("child", "collation"), "COLLATE")
        if not set(node["collation"].lower().split(".")) <= COLLATIONS:
            refuse_construct(f"COLLATE {node['collation']}", node)
        return self._expression(node["child"], frame)

    def _arrow(self, node: Node, frame: Frame) -> int:
        """`x -> 'path'`: the parser cannot tell it from a lambda. Functions that take a lambda are not in the dialect,
        and a path is a literal or a parameter."""
        only(node, ("lhs", "expr", "syntax_type"), "lambda")
        if node["expr"]["class"] not in ("CONSTANT", "PARAMETER") or node.get("syntax_type") == "LAMBDA_KEYWORD":
            refuse_construct("a lambda", node)
        return self._expressions((node["lhs"], node["expr"]), frame)

    def _subquery(self, node: Node, frame: Frame) -> int:
        only(node, ("subquery_type", "subquery", "child", "comparison_type"), "subquery")
        only(node["subquery"], ("node", "named_param_map"), "subquery")
        if "child" in node:
            self._expression(node["child"], frame)
        outer = max(frame.source, *frame.aliases.values(), 1)
        return self.query(node["subquery"]["node"], frame.scope, outer)


_EXPRESSIONS: dict[str, Callable[[Inspection, Node, Frame], int]] = {
    "CONSTANT": Inspection._constant,
    "PARAMETER": Inspection._parameter,
    "COLUMN_REF": Inspection._column,
    "POSITIONAL_REFERENCE": Inspection._positional,
    "STAR": Inspection._star,
    "FUNCTION": Inspection._function,
    "WINDOW": Inspection._window,
    "CAST": Inspection._cast,
    "CASE": Inspection._case,
    "COMPARISON": Inspection._comparison,
    "CONJUNCTION": Inspection._conjunction,
    "BETWEEN": Inspection._between,
    "OPERATOR": Inspection._operator,
    "COLLATE": Inspection._collate,
    "LAMBDA": Inspection._arrow,
    "SUBQUERY": Inspection._subquery,
}


def only(node: Node, known: Iterable[str], construct: str) -> None:
    """Refuses a node with a field this file does not know."""
    unknown = node.keys() - _ANYWHERE - set(known)
    if unknown:
        refuse_construct(f"{construct} with {', '.join(map(_readable, sorted(unknown)))}", node)


def refuse(message: str, hint: str = "") -> NoReturn:
    """A construct outside the dialect."""
    raise QueryRefusedError(message, code=RefusalCode.NOT_ALLOWED, hint=hint or _DIALECT_HINT)


def refuse_construct(construct: str, node: Node, hint: str = "") -> NoReturn:
    """As `refuse`, with the place in the text where DuckDB knows it."""
    location = node.get("query_location", _NO_LOCATION)
    where = f" (at character {location + 1})" if location < _NO_LOCATION else ""
    refuse(f"{construct} is not allowed{where}", hint)


def too_complex(why: str) -> NoReturn:
    """A query beyond a limit of size."""
    refuse(f"the query is too complex: {why}", "simplify it, or ask several smaller queries")


def _readable(name: str) -> str:
    """A name of the syntax tree, in words."""
    return _WORDS.get(name, name.replace("_", " "))
