"""Why no override reaches a key, and what would: from the composed config and conf/ alone, without the schema.

conf/ lists every key that our own dataclasses take (a test holds that), so a key that it does not list is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lightsparse.config.targets import did_you_mean


def about_unknown_key(key: str, value: str, raw: Mapping[str, Any], conf: Path, own: Sequence[str] = ()) -> str:
    """One sentence about the override `key=value`, which reaches nothing.

    raw   the config composed without it
    conf  the folder of the groups
    own   keys of the command itself, beside those of conf/
    """
    place, name, nodes = _walk(raw, key.split("."))
    prefix = "".join(f"{part}." for part in place)
    if not isinstance(nodes[-1], Mapping):
        return f"{prefix[:-1]} is {nodes[-1]}, which has no keys; write {prefix[:-1]}=…"
    wrong, known = f"{prefix}{name}", [each for each in nodes[-1] if each != "_target_"]
    near = did_you_mean(name, [*known, *(() if place else own)], prefix)
    if _takes_any(nodes):
        way_out = f"{near} To add it, " if near else "; "
        return f"{wrong} has no value in conf/ that could be overridden{way_out}write +{wrong}=…"
    choice, readers = _readers(raw, place, conf)
    if wrong == key and name in readers:
        return f"{key} is {value}, which {choice} does not read; use {readers[name]}"
    if not near and (others := get_close_matches(name, readers, n=1)):
        near = did_you_mean(name, others, prefix) + f" {choice} does not read it; use {readers[others[0]]}"
    return f"{wrong} is not a key" + (near or f"; {prefix[:-1] or 'the config'} has {', '.join(known) or 'none'}")


def _walk(raw: Mapping[str, Any], parts: Sequence[str]) -> tuple[list[str], str, list[Any]]:
    """How far a key leads: the parts that there are, the first one that there is not, and the nodes on the way."""
    nodes: list[Any] = [raw]
    for depth, part in enumerate(parts):
        if not isinstance(nodes[-1], Mapping) or part not in nodes[-1] or depth == len(parts) - 1:
            break
        nodes.append({} if nodes[-1][part] is None else nodes[-1][part])
    return list(parts[:depth]), part, nodes


def _takes_any(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last node may have keys that conf/ does not list: arguments of another package, things by name."""
    for group in nodes[1:2]:
        foreign = not str(group.get("_target_", "lightsparse.")).startswith("lightsparse.")
        inside = any("_target_" in node for node in nodes[2:])
        by_name = "_target_" not in nodes[-1] and all(
            each is None or (isinstance(each, Mapping) and "_target_" in each) for each in nodes[-1].values()
        )
        return foreign or inside or by_name
    return False


def _readers(raw: Mapping[str, Any], place: Sequence[str], conf: Path) -> tuple[str, dict[str, str]]:
    """`group=choice` of a place, and who reads which other keys there: key → `group=another or yet another`."""
    if not place or "_target_" not in raw[place[0]]:
        return "", {}
    choice, readers = "", dict[str, str]()
    for file in sorted((conf / place[0]).glob("*.yaml")):
        node: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        if node.get("_target_") == raw[place[0]]["_target_"]:
            choice = choice or f"{place[0]}={file.stem}"
            continue
        for part in place[1:]:
            node = node.get(part) or {}
        for key in node:
            readers[key] = f"{readers[key]} or {file.stem}" if key in readers else f"{place[0]}={file.stem}"
    return choice, readers
