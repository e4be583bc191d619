#!/usr/bin/env python3
"""Write the pages of docs/ that state what the code says: every knob, and every verb.

    python scripts/docs.py                 write docs/config.md and docs/cli.md
    python scripts/docs.py --check         exit 1, naming the pages that no longer fit the code
    python scripts/docs.py --folder DIR    write or check there

`tests/test_docs.py` runs the check.
"""

import argparse
import dataclasses
import pathlib
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxscale import cli, config_source
from jaxscale.config import FREE_SECTIONS, Config, is_free
from jaxscale.resolve import resolve
from jaxscale.verbs.common import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRESETS_FILE = "configs/lm.py"

CONFIG_WORDS = """\
A config file lists what differs from the defaults below, the command line sets single knobs
(`--config.model.width=256`), and `--print-config` shows the result. An unknown knob, a wrong
type, a value out of its limits, or knobs that do not fit together are refused before anything
compiles.

The last column says whether a run may be resumed with another value. Knobs that are fixed
define the run: its workdir refuses others, unless `--allow-config-change` is given."""

PRESET_WORDS = """\
`--config={file}:NAME`, with `,length=TOKENS` or `,batch=SEQUENCES` behind it for other
sizes; {aliases}."""

CLI_WORDS = """\
`jaxscale VERB ...`, or `python -m jaxscale VERB ...`. Any knob can be set with
`--config.SECTION.KNOB=VALUE` ([config.md](config.md)). A verb that reads a workdir takes its
config, unless `--config` is given."""

EXIT_CODES = {
    DONE: "done",
    FAILED: "a check or the run failed",
    WRONG: "the command or the config is wrong; one line on stderr says what, and the remedy",
    PREEMPTED: "stopped by SIGTERM or Ctrl-C after a clean save; the same command goes on",
    INTERRUPTED: "interrupted before anything could be saved, or by a second Ctrl-C",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a drift")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "docs", help="of the pages")
    args = parser.parse_args(argv)
    drifted = []
    for name, write_page in PAGES.items():
        page, path = write_page(), args.folder / name
        if path.is_file() and path.read_text() == page:
            continue
        drifted.append(path)
        if not args.check:
            path.write_text(page)
    for path in drifted:
        remedy = "no longer fits the code; run python scripts/docs.py"
        print(f"{path}: {remedy if args.check else 'written'}")
    return 1 if args.check and drifted else 0


def config_page() -> str:
    """Return docs/config.md: a table of knobs per section, and the presets."""
    sections = [field.name for field in dataclasses.fields(Config)]
    parts = [head("config.py", "Config"), CONFIG_WORDS, *map(section_table, sections)]
    return "\n\n".join([*parts, preset_table()]) + "\n"


def section_table(section: str) -> str:
    """Return the heading, the words and the table of one section."""
    values = getattr(Config(), section)
    hints = typing.get_type_hints(type(values))
    words = type(values).__doc__ or ""
    if section in FREE_SECTIONS:
        words += " May change on resume, all of it."
    rows = [
        (
            f"`{section}.{field.name}`",
            type_name(hints[field.name]),
            f"`{shown(getattr(values, field.name))}`",
            field.metadata["doc"],
            limits(field.metadata),
            "may change" if is_free(section, field.name) else "fixed",
        )
        for field in dataclasses.fields(values)
    ]
    header = ("knob", "type", "default", "meaning", "limits", "on resume")
    return f"## {section}\n\n{words}\n\n{table(header, rows)}"


def limits(metadata: Any) -> str:
    """Return the values that a knob takes: its choices, its least value, or nothing."""
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    return "" if metadata["minimum"] is None else f"at least {metadata['minimum']:g}"


def type_name(kind: Any) -> str:
    """Return a type in words."""
    if typing.get_origin(kind) is tuple:
        return f"list of {typing.get_args(kind)[0].__name__}"
    return "str or None" if isinstance(kind, types.UnionType) else str(kind.__name__)


def shown(value: Any) -> str:
    """Return a default as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return repr(value) if value == "" else str(value)


def preset_table() -> str:
    """Return the table of the presets' shapes."""
    module = runpy.run_path(str(ROOT / PRESETS_FILE))
    rows = []
    for name in module["PRESETS"]:
        config = resolve(config_source.load(f"{ROOT / PRESETS_FILE}:{name}"))
        model = config.model
        rows.append(
            (
                f"`{name}`",
                *(model.num_layers, model.width, f"{model.num_heads} / {model.num_kv_heads}"),
                *(model.hidden, model.vocab_size, config.data.length),
                config.train.global_batch_size,
            )
        )
    names = "preset, layers, width, heads / kv, hidden, vocabulary, tokens, sequences per step"
    aliases = ", ".join(f"`{short}` is `{name}`" for short, name in module["ALIASES"].items())
    words = PRESET_WORDS.format(file=PRESETS_FILE, aliases=aliases)
    return f"## Presets\n\n{words}\n\n{table(names.split(', '), rows)}"


def cli_page() -> str:
    """Return docs/cli.md: options of every verb, of each verb, and exit codes."""
    parsers = verb_parsers()
    own = {name: options(parser) for name, parser in parsers.items()}
    common = [row for row in own["doctor"] if all(row in rows for rows in own.values())]
    title = head("cli.py", "Command line")
    parts = [title, CLI_WORDS, f"## Every verb\n\n{option_table(common)}"]
    for name, parser in parsers.items():
        rows = [row for row in own[name] if row not in common]
        more = option_table(rows) if rows else "No options of its own."
        parts.append(f"## {name}\n\n{sentence(parser.description or '')}\n\n{more}")
    codes = table(("code", "meaning"), [(f"{code}", text) for code, text in EXIT_CODES.items()])
    return "\n\n".join([*parts, f"## Exit codes\n\n{codes}"]) + "\n"


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    for action in cli.make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the command line has no verbs")


def options(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    """Return (option, default, meaning) of each option but --help."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[-1] if action.option_strings else ""
        if action.nargs != 0:
            name = f"{name} {action.metavar or action.dest.upper()}".strip()
        is_set = action.nargs != 0 and action.default not in (None, "")
        default = f"`{action.default}`" if is_set else ""
        rows.append((f"`{name}`", "required" if action.required else default, action.help or ""))
    return rows


def option_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return a table of options."""
    return table(("option", "default", "meaning"), rows)


def head(source: str, title: str) -> str:
    """Return the first lines of a page."""
    return f"<!-- Written by scripts/docs.py from jaxscale/{source}; do not edit. -->\n\n# {title}"


def sentence(text: str) -> str:
    """Return a text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Return the text of a cell."""
    return str(value).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {"config.md": config_page, "cli.md": cli_page}

if __name__ == "__main__":
    sys.exit(main())
