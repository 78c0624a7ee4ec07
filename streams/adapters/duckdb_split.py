"""Splits one guarded query over partitions that live on different workers: what each is asked, and what is made of it.

Both sides are made from DuckDB's own syntax tree, which DuckDB turns back into SQL without a loss: no second parser has
another opinion of what a query means. The ways, the first that fits a query is taken:

    aggregate   partial aggregates per partition, grouped; final aggregates over them (count, sum, min, max, avg, ...)
    rows        the query itself per partition; the rows together, distinct, sorted and cut once more
    tables      the columns that the query names, of the rows that pass its filters; the query runs over them

A join is split like a table if its condition says that both sides are of one partition (`a._partition = b._partition`);
that keys which look alike are in one partition is nothing the store can know. Called by `duckdb_merge`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import orjson

from schemas.catalog import Catalog
from schemas.duckdb_ddl import quote
from schemas.table import METADATA_COLUMNS
from streams.adapters.duckdb_dialect import LEDGER_VIEW
from streams.adapters.duckdb_guard import parser
from streams.adapters.duckdb_store import LEDGER_NUMBERS

Node = dict[str, Any]

#: The table from which a final statement reads what the partitions sent.
PARTS = "pintail_parts"
#: Of columns that the split invents. A query that has such names itself is not split.
_OWN = "pintail_"
_GROUP, _PARTIAL, _SORT = f"{_OWN}g", f"{_OWN}a", f"{_OWN}o"

#: Aggregate -> the statement's words over its partial results. {0} and {1} are the columns of `_PARTIALS`.
_FINALS = {
    "count_star": "CAST(coalesce(sum({0}), 0) AS BIGINT)",
    "count": "CAST(coalesce(sum({0}), 0) AS BIGINT)",
    "sum": "sum({0})",
    "min": "min({0})",
    "max": "max({0})",
    "avg": "CAST(sum({0}) AS DOUBLE) / sum({1})",
    "mean": "CAST(sum({0}) AS DOUBLE) / sum({1})",
    "bool_and": "bool_and({0})",
    "bool_or": "bool_or({0})",
    "bit_and": "bit_and({0})",
    "bit_or": "bit_or({0})",
    "bit_xor": "bit_xor({0})",
}
_PARTIALS = {"avg": ("sum", "count"), "mean": ("sum", "count")}
_DISTINCT_ANYWAY = frozenset(("min", "max", "bool_and", "bool_or"))
_COUNT_DISTINCT = "coalesce(len(list_distinct(flatten(list({0})))), 0)"

#: What one partition cannot decide alone -> in words.
_WHOLE = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "COLLATE": "a collation",
    "POSITIONAL_REFERENCE": "a column by its #position",
}


@dataclass(frozen=True)
class Part:
    """What every partition is asked."""

    #: The table that the final statement reads it from.
    table: str
    sql: str
    parameters: frozenset[str]
    #: Whether its columns are renamed by their position, `pintail_c0` and so on, but for those of the split's own.
    renamed: bool = False


@dataclass(frozen=True)
class Split:
    """The parts of a query, and the statement over them. Parameters are named, `p1` for the first positional one."""

    parts: tuple[Part, ...]
    final: str
    final_parameters: frozenset[str]
    #: Why whole rows must travel, in words for a refusal; empty if they need not.
    why: str = ""


class _WholeNeededError(Exception):
    """This way of splitting does not fit; the message says why."""


def splits_of(sql: str, catalog: Catalog) -> tuple[Split, ...]:
    """The ways to split this query, the cheapest first; the last one always works. The query has passed the guard."""
    (statement,) = _serialised(sql)["statements"]
    node: Node = statement["node"]
    for each in _nodes(node):
        if each.get("class") == "PARAMETER" and each["identifier"].isdigit():
            each["identifier"] = f"p{each['identifier']}"
    try:
        scope = _Scope.of(node, catalog)
        cheap = _aggregated(node, scope) if _is_aggregated(node) else _rows(node, scope)
    except _WholeNeededError as error:
        return (_tables(node, catalog, str(error)),)
    return cheap, _tables(node, catalog, "what it computes")


def named_parameters(params: list[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by the names that a split has for them."""
    if isinstance(params, list):
        return {f"p{number}": value for number, value in enumerate(params, start=1)}
    return {f"p{name}" if name.isdigit() else name: value for name, value in params.items()}


# -- what can be split -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scope:
    """A FROM clause whose rows are each of one partition."""

    #: Lower-case columns of its tables.
    columns: frozenset[str]
    #: What its table is called there, in lower case, if it is just one.
    name: str | None

    @classmethod
    def of(cls, node: Node, catalog: Catalog) -> _Scope:
        """Raises _WholeNeededError if a partition cannot answer its share of the query."""
        if node["type"] != "SELECT_NODE":
            raise _WholeNeededError("a set operation")
        if node["cte_map"]["map"]:
            raise _WholeNeededError("WITH")
        if node["qualify"]:
            raise _WholeNeededError("QUALIFY")
        for each in _nodes(node):
            if each.get("class") in _WHOLE:
                raise _WholeNeededError(_WHOLE[each["class"]])
            if each.get("function_name") == "unnest":
                raise _WholeNeededError("unnest")
        tables = _one_partition(node["from_table"], catalog)
        columns = frozenset(name.lower() for table in tables.values() for name in table)
        aliases = [item["alias"].lower() for item in node["select_list"] if item["alias"]]
        own = [alias for alias in aliases if alias.startswith(_OWN)]
        hidden = [
            item["alias"]
            for item in node["select_list"]
            if item["alias"].lower() in columns and _column_of(item) != item["alias"].lower()
        ]
        if own or hidden or len(set(aliases)) < len(aliases):
            raise _WholeNeededError("an alias that hides a column")
        return cls(columns, next(iter(tables)) if len(tables) == 1 else None)


class _Readable(NamedTuple):
    """What a query may read from."""

    name: str
    columns: tuple[str, ...]


def _readable(catalog: Catalog) -> dict[str, _Readable]:
    """By its name in lower case: the tables, and the ledger."""
    readable = [_Readable(table.name, (*table.column_names, *METADATA_COLUMNS)) for table in catalog.tables]
    readable.append(_Readable(LEDGER_VIEW, ("partition", "topic", *LEDGER_NUMBERS)))
    return {each.name.lower(): each for each in readable}


def _one_partition(ref: Node, catalog: Catalog) -> dict[str, tuple[str, ...]]:
    """Name of each table of a FROM clause there -> its columns."""
    known = _readable(catalog)
    if ref["type"] == "BASE_TABLE" and ref["table_name"].lower() in known and not ref["column_name_alias"]:
        return {(ref["alias"] or ref["table_name"]).lower(): known[ref["table_name"].lower()].columns}
    if ref["type"] != "JOIN":
        raise _WholeNeededError("rows that are not a table's")
    left, right = _one_partition(ref["left"], catalog), _one_partition(ref["right"], catalog)
    if ref["ref_type"] != "REGULAR" or left.keys() & right.keys() or not _same_partition(ref, left, right):
        raise _WholeNeededError("a join that does not also compare `_partition`")
    return left | right


def _same_partition(join: Node, left: Iterable[str], right: Iterable[str]) -> bool:
    if "_partition" in (name.lower() for name in join["using_columns"]):
        return True
    for each in _conjuncts(join["condition"]):
        if each["type"] == "COMPARE_EQUAL":
            sides = [[name.lower() for name in each[side].get("column_names", ())] for side in ("left", "right")]
            if all(len(side) == 2 and side[1] == "_partition" for side in sides):
                (one, _), (other, _) = sides
                if (one in left and other in right) or (other in left and one in right):
                    return True
    return False


def _is_aggregated(node: Node) -> bool:
    return bool(
        node.get("group_expressions")
        or node.get("having")
        or node.get("aggregate_handling") == "FORCE_AGGREGATES"
        or any(map(_is_aggregate, _nodes([node.get("select_list"), node.get("modifiers")])))
    )


# -- partial aggregates ------------------------------------------------------------------------------------------------


def _aggregated(node: Node, scope: _Scope) -> Split:
    rewriting = _Rewriting(scope, _groups(node))
    if len(node["group_sets"]) > 1:
        raise _WholeNeededError("several grouping sets")
    final = copy.deepcopy(node)
    final["select_list"] = [rewriting.final(item) for item in node["select_list"]]
    final["having"] = node["having"] and rewriting.final(node["having"])
    for modifier in final["modifiers"]:
        match modifier["type"]:
            case "ORDER_MODIFIER":
                for order in modifier["orders"]:
                    order["expression"] = rewriting.final(order["expression"])
            case "DISTINCT_MODIFIER":
                modifier["distinct_on_targets"] = [rewriting.final(each) for each in modifier["distinct_on_targets"]]
    rewriting.check_columns(final)
    groups = [_column(f"{_GROUP}{index}") for index in range(len(rewriting.groups))]
    final |= {"from_table": _from_parts(), "where_clause": None, "aggregate_handling": "STANDARD_HANDLING"}
    final |= {"group_expressions": groups, "group_sets": [list(range(len(groups)))] if groups else []}
    part = copy.deepcopy(node)
    part |= {"modifiers": [], "having": None, "aggregate_handling": "STANDARD_HANDLING"}
    part["select_list"] = [
        *({**group, "alias": f"{_GROUP}{index}"} for index, group in enumerate(rewriting.groups)),
        *rewriting.partials,
    ]
    part["group_expressions"] = [_expression(str(index + 1)) for index in range(len(groups))]
    part["group_sets"] = final["group_sets"]
    if not part["select_list"]:  # SELECT 1 FROM t HAVING true, say
        raise _WholeNeededError("HAVING without aggregates")
    return Split((Part(PARTS, _text(part), _parameters(part)),), _text(final), _parameters(final))


def _groups(node: Node) -> list[Node]:
    """The expressions by which rows are grouped: positions and aliases looked up, ALL spelt out."""
    items = node["select_list"]
    if node["aggregate_handling"] == "FORCE_AGGREGATES":
        found = [item for item in items if not any(map(_is_aggregate, _nodes(item)))]
    else:
        by_alias = {item["alias"].lower(): item for item in items if item["alias"]}
        found = []
        for group in node["group_expressions"]:
            position = group.get("value", {}).get("value") if group["class"] == "CONSTANT" else None
            if type(position) is int:
                if not 1 <= position <= len(items):
                    raise _WholeNeededError("a group by a position that is not there")
                group = items[position - 1]
            elif group["class"] == "COLUMN_REF" and len(group["column_names"]) == 1:
                group = by_alias.get(group["column_names"][0].lower(), group)
            found.append(group)
    if any(each["class"] == "STAR" for each in items) or any(each["class"] == "STAR" for each in found):
        raise _WholeNeededError("* beside aggregates")
    return [{**group, "alias": ""} for group in found]


class _Rewriting:
    """From expressions over rows to expressions over partial aggregates."""

    def __init__(self, scope: _Scope, groups: list[Node]) -> None:
        self._scope = scope
        self.groups = groups
        self._group_of = {
            self._canonical(group): index for index, group in enumerate(groups) if group["class"] != "CONSTANT"
        }
        self.partials: list[Node] = []
        self._final_of: dict[str, str] = {}

    def final(self, expression: Any) -> Any:
        """The same over what the partitions sent."""
        if isinstance(expression, list):
            return [self.final(each) for each in expression]
        if not isinstance(expression, dict):
            return expression
        if "class" in expression:
            canonical = self._canonical(expression)
            if (group := self._group_of.get(canonical)) is not None:
                return {**_column(f"{_GROUP}{group}"), "alias": expression["alias"]}
            if _is_aggregate(expression):
                if canonical not in self._final_of:
                    self._final_of[canonical] = self._decomposed(expression)
                return {**_expression(self._final_of[canonical]), "alias": expression["alias"]}
        return {name: self.final(value) for name, value in expression.items()}

    def check_columns(self, final: Node) -> None:
        """What is left of the tables' columns would be read from parts that do not have them."""
        allowed: set[str] = set()
        for item in final["select_list"]:
            self._check(item, allowed)
            allowed.add(item["alias"].lower())
        for clause in (final["having"], final["modifiers"]):
            self._check(clause, allowed)

    def _check(self, tree: Any, allowed: set[str]) -> None:
        for each in _nodes(tree):
            if each.get("class") == "COLUMN_REF":
                names = [name.lower() for name in each["column_names"]]
                if names[0] not in allowed and not names[0].startswith(_OWN):
                    raise _WholeNeededError("a column that is neither grouped nor aggregated")
            elif each.get("class") == "STAR" and not each.get("columns"):
                raise _WholeNeededError("* beside aggregates")

    def _decomposed(self, aggregate: Node) -> str:
        """Adds the partial aggregates; the final one in words."""
        name = aggregate["function_name"]
        if name not in _FINALS or aggregate["order_bys"]["orders"] or len(aggregate["children"]) > 1:
            raise _WholeNeededError(f"the aggregate {name}()")
        if aggregate["distinct"] and name not in _DISTINCT_ANYWAY:
            if name != "count":
                raise _WholeNeededError(f"the aggregate {name}(DISTINCT ...)")
            return _COUNT_DISTINCT.format(self._partial({**aggregate, "function_name": "list"}))
        steps = _PARTIALS.get(name, (name,))
        return _FINALS[name].format(*(self._partial({**aggregate, "function_name": step}) for step in steps))

    def _partial(self, aggregate: Node) -> str:
        name = f"{_PARTIAL}{len(self.partials)}"
        self.partials.append({**aggregate, "alias": name})
        return name

    def _canonical(self, expression: Any) -> str:
        """Equal for expressions that mean the same here."""
        return orjson.dumps(self._plain(expression), option=orjson.OPT_SORT_KEYS).decode()

    def _plain(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self._plain(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        plain = {name: self._plain(value) for name, value in tree.items() if name not in ("alias", "query_location")}
        if tree.get("class") == "COLUMN_REF":
            names = [name.lower() for name in tree["column_names"]]
            if len(names) > 1 and names[0] == self._scope.name and names[0] not in self._scope.columns:
                names = names[1:]
            plain["column_names"] = names
        return plain


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(node: Node, scope: _Scope) -> Split:
    del scope
    part = copy.deepcopy(node)
    modifiers = {modifier["type"]: modifier for modifier in node["modifiers"]}
    if modifiers.get("DISTINCT_MODIFIER", {}).get("distinct_on_targets"):
        raise _WholeNeededError("DISTINCT ON")
    if "LIMIT_PERCENT_MODIFIER" in modifiers:
        raise _WholeNeededError("LIMIT in percent")
    sorts: list[Node] = []
    final_modifiers: list[Node] = []
    if order := copy.deepcopy(modifiers.get("ORDER_MODIFIER")):
        for each in order["orders"]:
            if each["expression"]["class"] not in ("CONSTANT", "STAR"):  # not by a position, not by ALL
                sorts.append({**each["expression"], "alias": f"{_SORT}{len(sorts)}"})
                each["expression"] = _column(sorts[-1]["alias"])
        final_modifiers.append(order)
    part["select_list"] += sorts
    part["modifiers"] = [each for kind, each in modifiers.items() if kind == "DISTINCT_MODIFIER"]
    if limit := modifiers.get("LIMIT_MODIFIER"):
        final_modifiers.append(limit)
        part["modifiers"] += [each for kind, each in modifiers.items() if kind == "ORDER_MODIFIER"]
        part["modifiers"].append(_first_rows(limit))
    hidden = ", ".join(sort["alias"] for sort in sorts)
    source = f"(SELECT DISTINCT * FROM {PARTS})" if "DISTINCT_MODIFIER" in modifiers else PARTS
    final = _select(f"SELECT *{f' EXCLUDE ({hidden})' if sorts else ''} FROM {source} AS {PARTS}")
    final["modifiers"] = final_modifiers
    return Split((Part(PARTS, _text(part), _parameters(part), renamed=True),), _text(final), _parameters(final))


def _first_rows(limit: Node) -> Node:
    """The LIMIT of a part: what the final OFFSET skips is needed, too."""
    if limit["offset"] is None or limit["limit"] is None:
        return {**limit, "offset": None} if limit["offset"] is None else {**limit, "limit": None, "offset": None}
    both = _expression("1 + 1")
    both["children"] = [limit["limit"], limit["offset"]]
    return {**limit, "limit": both, "offset": None}


# -- tables ------------------------------------------------------------------------------------------------------------


def _tables(node: Node, catalog: Catalog, why: str) -> Split:
    known = _readable(catalog)
    read = [each for each in _nodes(node) if each.get("type") == "BASE_TABLE"]
    names = [each["table_name"].lower() for each in read if each["table_name"].lower() in known]
    mentioned = _mentioned(node, [each["alias"] or each["table_name"] for each in read])
    filters = _filters(node, {name: table.columns for name, table in known.items()})
    parts = []
    for name in sorted(set(names)):
        columns = known[name].columns
        wanted = [each for each in columns if mentioned is None or each.lower() in mentioned] or columns[-1:]
        alias, where = filters.get(name, ("", [])) if names.count(name) == 1 else ("", [])
        part = _select(f"SELECT {', '.join(map(quote, wanted))} FROM {quote(name)}")
        if where:
            part["from_table"]["alias"] = alias
            part["where_clause"] = where[0] if len(where) == 1 else {**_expression("true AND true"), "children": where}
        parts.append(Part(known[name].name, _text(part), _parameters(part)))
    return Split(tuple(parts), _text(node), _parameters(node), why)


def _mentioned(node: Node, tables: Iterable[str]) -> frozenset[str] | None:
    """Lower-case names that may be columns; None if all columns are needed."""
    names: set[str] = set()
    for each in _nodes(node):
        if each.get("class") == "STAR" and each["columns"]:
            continue  # ORDER BY ALL
        if each.get("class") in ("STAR", "POSITIONAL_REFERENCE") or each.get("column_name_alias"):
            return None
        if each.get("ref_type") in ("NATURAL", "POSITIONAL"):
            return None
        names.update(name.lower() for key in ("column_names", "using_columns") for name in each.get(key) or ())
        if each.get("class") == "COLUMN_REF" and each["column_names"][-1].lower() in map(str.lower, tables):
            return None  # a whole row
    return frozenset(names)


def _filters(node: Node, columns: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, list[Node]]]:
    """Table -> its alias, and those conditions of WHERE that its rows decide alone. Of inner joins: the rows that an
    outer join adds would be judged too early."""
    leaves = _inner_leaves(node.get("from_table") or {})
    if node["type"] != "SELECT_NODE" or leaves is None:
        return {}
    sources = {
        (leaf["alias"] or leaf["table_name"]).lower(): leaf["table_name"].lower()
        for leaf in leaves
        if leaf["type"] == "BASE_TABLE" and leaf["table_name"].lower() in columns
    }
    if len(sources) < len(leaves):
        return {}
    owners: dict[str, list[str]] = {}
    for alias, table in sources.items():
        for name in columns[table]:
            owners.setdefault(name.lower(), []).append(alias)
    aliases = {item["alias"].lower() for item in node["select_list"]}
    found: dict[str, tuple[str, list[Node]]] = {}
    for condition in _conjuncts(node["where_clause"]):
        owning = {
            _owner([name.lower() for name in each["column_names"]], sources, owners, aliases)
            for each in _nodes(condition)
            if each.get("class") == "COLUMN_REF"
        }
        if len(owning) == 1 and None not in owning and not any(map(_is_whole, _nodes(condition))):
            (alias,) = owning
            assert alias is not None
            found.setdefault(sources[alias], (alias, []))[1].append(condition)
    return found


def _inner_leaves(ref: Node) -> list[Node] | None:
    """The tables of a FROM clause without outer joins; None if it has one."""
    if ref.get("type") != "JOIN":
        return [ref] if ref.get("type") == "BASE_TABLE" and not ref["column_name_alias"] else None
    left, right = _inner_leaves(ref["left"]), _inner_leaves(ref["right"])
    is_inner = ref["join_type"] == "INNER" and ref["ref_type"] in ("REGULAR", "CROSS")
    return left + right if is_inner and left is not None and right is not None else None


def _owner(
    names: list[str], sources: Mapping[str, str], owners: Mapping[str, list[str]], aliases: set[str]
) -> str | None:
    """The alias of the table that a column is of; None unless that is plain."""
    if names[0] in owners:
        return owners[names[0]][0] if len(owners[names[0]]) == 1 and names[0] not in aliases | sources.keys() else None
    return names[0] if len(names) > 1 and names[0] in sources else None


# -- trees -------------------------------------------------------------------------------------------------------------


def _nodes(tree: Any) -> Iterator[Node]:
    """Every node of a tree, from the top."""
    pending = [tree]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            pending.extend(each.values())
        elif isinstance(each, list):
            pending.extend(each)


def _conjuncts(condition: Node | None) -> list[Node]:
    if condition is None:
        return []
    if condition["type"] == "CONJUNCTION_AND":
        return [part for child in condition["children"] for part in _conjuncts(child)]
    return [condition]


def _column_of(item: Node) -> str:
    return item["column_names"][-1].lower() if item["class"] == "COLUMN_REF" else ""


def _is_whole(node: Node) -> bool:
    return node.get("class") in _WHOLE or node.get("function_name") == "unnest" or _is_aggregate(node)


def _is_aggregate(node: Node) -> bool:
    return node.get("class") == "FUNCTION" and node["function_name"] in _aggregates()


def _parameters(tree: Any) -> frozenset[str]:
    return frozenset(each["identifier"] for each in _nodes(tree) if each.get("class") == "PARAMETER")


def _column(name: str) -> Node:
    return copy.deepcopy(_template(f"SELECT {quote(name)}"))["select_list"][0]  # type: ignore[no-any-return]


def _expression(text: str) -> Node:
    return copy.deepcopy(_template(f"SELECT {text}"))["select_list"][0]  # type: ignore[no-any-return]


def _select(text: str) -> Node:
    return copy.deepcopy(_template(text))


def _from_parts() -> Node:
    return _select(f"SELECT 1 FROM {PARTS}")["from_table"]  # type: ignore[no-any-return]


@cache
def _template(sql: str) -> Node:
    node: Node = _serialised(sql)["statements"][0]["node"]
    return node


def _serialised(sql: str) -> Node:
    tree: Node = orjson.loads(_ask("SELECT json_serialize_sql(?::VARCHAR)", sql))
    return tree


def _text(node: Node) -> str:
    """The statement in SQL."""
    parameters = [{"key": name, "value": number} for number, name in enumerate(sorted(_parameters(node)), start=1)]
    tree = {"error": False, "statements": [{"node": node, "named_param_map": parameters}]}
    return _ask("SELECT json_deserialize_sql(?::JSON)", orjson.dumps(tree).decode())


def _ask(sql: str, value: str) -> str:
    with parser().cursor() as cursor:
        row = cursor.execute(sql, [value]).fetchone()
    assert row is not None
    return str(row[0])


@cache
def _aggregates() -> frozenset[str]:
    with parser().cursor() as cursor:
        sql = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = 'aggregate'"
        return frozenset(name for (name,) in cursor.execute(sql).fetchall())
