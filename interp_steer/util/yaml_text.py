"""YAML that a person wrote, bounded before it is built.

A key that is there twice is refused, and so are numbers that YAML 1.1 reads in another way than
they look: 1:30 as 90, 010 as 8.
"""

from typing import Any

import yaml

from interp_steer.errors import RequestError, SteerError
from interp_steer.util.files import DEEPEST, LONGEST_NUMBER, MOST_LISTS


class _Refused(yaml.YAMLError):
    """A text that is YAML and is not read; what is said of it follows the file's name."""


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader`, bounded in depth and in size, aliases followed."""

    _depth = 0

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # nodes below each one that was composed, by its id
        self._kept: list[yaml.Node] = []  # so that no id is given twice

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth == DEEPEST:
            raise _Refused(f"is nested more than {DEEPEST} levels deep")
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        try:
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            try:
                node.value.encode()
            except UnicodeEncodeError as wrong:
                raise _Refused(f"holds half a character, {wrong.object[wrong.start]!a}") from wrong
        if node is None or isinstance(node, yaml.ScalarNode):
            return node
        if alias:
            if id(node) not in self._sizes:
                raise _Refused("holds a list or mapping that contains itself")
            return node
        children = [
            part
            for entry in node.value
            for part in (entry if isinstance(entry, tuple) else (entry,))
        ]
        self._kept.append(node)
        self._sizes[id(node)] = size = 1 + sum(self._sizes.get(id(part), 1) for part in children)
        if size > MOST_LISTS:
            raise _Refused(f"holds more than {MOST_LISTS:,} entries, aliases followed")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise _Refused(
                        f"holds {key.value[:60]!r} twice, in lines {seen[key.value]} and {line}"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        if len(text) > LONGEST_NUMBER:
            raise _Refused(f"holds a number of {len(text)} digits, expected {LONGEST_NUMBER}")
        float_like = node.tag.endswith("float")
        made: int | float
        made = self.construct_yaml_float(node) if float_like else self.construct_yaml_int(node)
        digits = text.lstrip("+-")
        if ":" in text or (not float_like and digits[:1] == "0" and digits[1:2].isdigit()):
            raise _Refused(
                f"holds {text}, which YAML reads as {made}; write that, or put it in quotes"
            )
        return made


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def parse_yaml(text: str, where: object, error: type[SteerError] = RequestError) -> Any:
    """What a YAML text says.

    Args:
        where: names the text in errors.
        error: what is raised; see `files.parse_json`.

    Raises:
        error: it is no YAML; a key is there twice; it is nested more than 64 levels deep, holds
            more than 500,000 entries, aliases followed, or a whole number of more than 300 digits.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Refused as wrong:
        raise error(f"{where} {wrong}") from wrong
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as wrong:
        told = " ".join(str(wrong).split())
        raise error(f"{where} is not YAML: {told[:300]}") from wrong
