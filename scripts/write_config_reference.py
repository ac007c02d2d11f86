"""Write docs/reference/config.md from the dataclasses and the YAML of configs/.

    .venv/bin/python scripts/write_config_reference.py            write the page
    .venv/bin/python scripts/write_config_reference.py --check    exit 1 when the page is not what it would write

A unit test checks it too.
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from rlvla.cli import VERBS
from rlvla.compose import SCHEMAS, config_dir, describe_schema, group_choices
from rlvla.policies.architectures import ARCHITECTURES, architecture

FORMS = {"eval_suites": ("eval", "rlvla eval, several suites", "`rlvla eval POLICY... suites=[NAME,...]`")}
"""Schemas of a verb's other form: the verb, the heading, how it is called."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/write_config_reference.py from the dataclasses; a test fails when it is stale. -->

A verb takes `key=value` words in any order: `rlvla train policy=PATH algo.target_kl=0.05`. `suite=NAME` and, for
`rlvla sft`, `policy=NAME` choose a [YAML file](#yaml-files); every other key sets one value. `null` means none.
`suite.options.KEY=VALUE` and `task_weights.TASK=VALUE` add entries; which there are, the suite says. So do
`learning_rates.GROUP=VALUE` and, for `rlvla train`, `algo.learning_rates.GROUP=VALUE`, for the policy's parameter
groups, `algo.teacher.weights.TASK=VALUE` and `algo.reasoning_teacher.weights.DOMAIN=VALUE`.

Words without a key are policy folders (`eval`, `compare`, `serve`) or suites (`suites`).

`rlvla VERB key=value --help` prints a verb's options as the command sets them; `--cfg` prints the same as YAML. YAML
files override the defaults below, and the command line overrides both. An unknown key, a
wrong type and an impossible value are refused with exit status 2.

A default of *required* has to be given. A folder named by `policy=` or `dataset=` is read, one named by `output=` is
written and must not hold anything yet, but for what the same command left there.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is stale")
    arguments = parser.parse_args()
    if not arguments.check:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(render())
    elif not PAGE.is_file() or PAGE.read_text() != render():
        print(f"{PAGE} is stale. Run scripts/write_config_reference.py and commit the page.", file=sys.stderr)
        raise SystemExit(1)


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    shared: dict[str, list[str]] = {}
    for verb, schema in SCHEMAS.items():
        called, heading, form = FORMS.get(verb, (verb, f"rlvla {verb}", ""))
        purpose = VERBS[called]
        chosen = dict(choice.split("=") for choice in _chosen(verb))
        own = [row for row in describe_schema(schema) if "." not in row[0]]
        rows = [(key, chosen.get(key, default), meaning) for key, default, meaning in own]
        told = f"{_sentence(purpose)}{f' {form}' if form else ''}"
        parts.append(f"## {heading}\n\n{told}\n\n{_table(schema, rows)}")
        blocks = _blocks(schema)
        for block in blocks:
            shared.setdefault(block, []).append(verb)
        if blocks:
            parts.append("And the shared " + ", ".join(f"[`{b}.*`](#{b})" for b in blocks) + ".\n")
    for block, verbs in shared.items():
        schema = SCHEMAS[verbs[0]]
        nested = _blocks(schema)[block]
        rows = [row for row in describe_schema(schema) if row[0].startswith(f"{block}.")]
        users = ", ".join(dict.fromkeys(f"`rlvla {FORMS.get(verb, (verb,))[0]}`" for verb in verbs))
        parts.append(f"## {block}\n\n{_first_line(nested)} Used by {users}.\n\n{_table(schema, rows)}")
    parts.append(
        "## policy\n\nThe architecture that `rlvla sft` builds; the other verbs read it from the policy's folder. "
        "The names under `policy.vlm` are those of the model's configuration in transformers.\n"
    )
    for name in ARCHITECTURES:
        schema = architecture(name).config
        table = _table(schema, describe_schema(schema, "policy."), prefix="policy.")
        parts.append(f"### policy.name={name}\n\n{_first_line(schema)}\n\n{table}")
    parts.append(_yaml_files())
    return "\n".join(parts)


def _yaml_files() -> str:
    chosen = {verb: _chosen(verb) for verb in VERBS}
    choices = "\n".join(f"* `rlvla {v}`: {', '.join(f'`{c}`' for c in names)}" for v, names in chosen.items() if names)
    parts = ["## YAML files", "Without a choice on the command line a verb takes these:", choices]
    groups = {group: names for verb in VERBS for group, names in group_choices(verb).items()}
    for group, names in groups.items():
        parts.append(f"### {group}=NAME")
        for name in names:
            text = (config_dir() / group / f"{name}.yaml").read_text()
            values = [line for line in text.splitlines() if not line.startswith(("defaults:", "  - "))]
            parts += [f"`{group}={name}`", "\n".join(["```yaml", *values, "```"])]
    return "\n\n".join(parts) + "\n"


def _chosen(verb: str) -> list[str]:
    """The group choices of configs/VERB.yaml, as one would type them."""
    defaults = yaml.safe_load((config_dir() / f"{verb}.yaml").read_text())["defaults"]
    return [f"{group}={name}" for entry in defaults if isinstance(entry, dict) for group, name in entry.items()]


def _blocks(schema: type) -> dict[str, type]:
    """Nested dataclasses by the name of their field."""
    return {
        f.name: f.type
        for f in dataclasses.fields(schema)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
    }


def _table(schema: type, rows: Iterable[tuple[str, str, str]], *, prefix: str = "") -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, default, meaning in rows:
        kind = _type_name(_field_type(schema, key.removeprefix(prefix)))
        shown = "*required*" if default == "required" else f"`{default}`"
        cells = (f"`{key}`", kind, shown, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _field_type(schema: type, key: str) -> Any:
    first, _, rest = key.partition(".")
    found = typing.get_type_hints(schema)[first]
    return _field_type(typing.cast(type, found), rest) if rest else found


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    if isinstance(kind, types.UnionType):
        return " or ".join("`null`" if part is types.NoneType else _type_name(part) for part in kind.__args__)
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_name(kind.__args__[0])}"
    if typing.get_origin(kind) is dict:
        return "mapping"
    return "name of a YAML file" if kind is Any else str(kind.__name__)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _first_line(schema: type) -> str:
    return (schema.__doc__ or "").split("\n", 1)[0]


if __name__ == "__main__":
    main()
