"""The command line of every program: --config and its overrides, options, --help, mistakes.

A program calls `run` before it imports anything else, so that `--help` and what is mistyped are
answered at once: importing JAX, Flax and Orbax takes longer than all the rest.
"""

import errno
import importlib
import pathlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from pretraining import config as config_lib
from pretraining import huge_pages
from pretraining.errors import UserError

_HELP = {"--help", "-h", "-help", "--helpfull"}
_NO_CONFIG = "--config is missing: a recipe, e.g. --config=configs/quickstart.py"
# What a disk may refuse to a program that is right.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def run(
    module: str,
    doc: str,
    with_config: bool = True,
    positional: str = "",
    with_overrides: bool = False,
    several: bool = False,
    **options: str,
) -> None:
    """Runs a command: `main(config, **options)` of a module, with mistakes printed as one line.

    Args:
      module: imported once the command line is understood; its `main` is called with the config
        (checked for unknown keys) and every option as a string, or as a bool where the option's
        help starts with "flag: ". Its result is the exit status.
      doc: what `--help` prints first.
      with_config: whether there is a --config, which is then the first argument of `main`.
      positional: the name of one argument without dashes, which must be there; "" = none.
      with_overrides: for a command without --config: whether `--config.SECTION.KEY=VALUE` is
        collected all the same, as the argument `overrides` of `main`: {key: value as typed}.
      several: whether "--" parts the arguments of several runs, each with a --config, which `main`
        gets as `members`; see `parse_members`.
      **options: option name -> help. A help that starts with "required: " makes the option
        mandatory.
    """
    try:
        if several:
            values = {"members": parse_members(sys.argv, doc, options)}
        else:
            values = parse(sys.argv, doc, options, with_config, positional, with_overrides)
        huge_pages.use(module)
        sys.exit(importlib.import_module(module).main(**values))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        print(f"error: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside the loop, where nothing has to be saved
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse(
    argv: list[str],
    doc: str,
    options: dict[str, str],
    with_config: bool = True,
    positional: str = "",
    with_overrides: bool = False,
) -> dict[str, Any]:
    """The option values of a command line; raises UserError on a mistake, exits after --help.

    Args: see `run`.
    """
    values = flags.FlagValues()
    if with_config:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for name, text in options.items():
        is_flag = text.startswith("flag: ")
        define, default = (flags.DEFINE_boolean, False) if is_flag else (flags.DEFINE_string, None)
        define(name, default, text, flag_values=values)
    if _HELP & set(argv[1:]):
        print(_help(argv, doc, options, with_config, with_overrides))
        sys.exit(0)
    result = {}
    if with_overrides:
        argv, result["overrides"] = _take_overrides(argv)
    rest = _parse_flags(values, argv)
    if positional:
        if not rest:
            raise UserError(f"the argument {positional} is missing: see --help")
        result[positional] = rest.pop(0)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: options are written --name=value")
    result |= {name: values[name].value for name in options}
    for name, text in options.items():
        if text.startswith("required: ") and not result[name]:
            raise UserError(f"--{name} is missing: {text.removeprefix('required: ')}")
    if with_config:
        config_lib.check_keys(values["config"].value)
        result["config"] = values["config"].value
    return result


def parse_members(argv: list[str], doc: str, options: dict[str, str]) -> list[dict[str, Any]]:
    """What `parse` finds in the arguments of each run, between which "--" stands.

    Raises:
      UserError: there is one run alone, or a mistake in the arguments of one, told by its number.
    """
    parts: list[list[str]] = [[]]
    for word in argv[1:]:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    found = []
    for count, part in enumerate(parts, 1):
        try:
            found.append(parse([argv[0], *part], doc, options))
        except UserError as error:
            whose = f"in the arguments of run {count} of {len(parts)} (' -- ' parts them)"
            raise UserError(f"{whose}: {error}") from None
    if len(found) == 1:
        raise UserError("one run alone: ' -- ' stands between the arguments of several; see --help")
    return found


def number(name: str, text: str | None, default: int | None, at_least: int = 0) -> int | None:
    """The whole number of an option, or its default."""
    if text is None:
        return default
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(f"--{name}={text!r}: a whole number of at least {at_least}")
    return int(text)


def _take_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line without its `--config.KEY=VALUE`, and those."""
    rest, overrides = [], {}
    for argument in argv:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, re.S)
        if match:
            overrides[match[1]] = match[2]
        else:
            rest.append(argument)
    return rest, overrides


def _parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses in place; returns the positional arguments."""
    chosen = _chosen_recipe(argv)
    for name in values:
        given = [word for word in argv if word.split("=")[0] == f"--{name}"]
        if len(given) > 1 and not values[name].boolean:
            raise UserError(f"--{name} is given more than once")
    if "config" in values and not chosen and any(w.startswith("--config.") for w in argv):
        raise UserError(_NO_CONFIG)
    try:
        if chosen:
            _check_overrides(config_lib.load(chosen), argv)
        rest = values(argv)
    except flags.Error as error:
        raise UserError(str(error).split("\n")[0] + "; see --help") from None
    if "config" in values and not chosen:
        raise UserError(_NO_CONFIG)
    return rest[1:]


def _chosen_recipe(argv: list[str]) -> str | None:
    for position, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _check_overrides(config: ml_collections.ConfigDict, argv: list[str]) -> None:
    known = config_lib.flatten(config)
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for argument in argv:
        match = re.match(r"--config\.([^=]+)", argument)
        if match and match[1] in sections:
            raise UserError(f"config.{match[1]} is a section: set one of its keys")
        if match and match[1] not in known:
            raise UserError(f"unknown config key {match[1]!r}{config_lib.nearest(match[1], known)}")


def _help(argv, doc: str, options: dict[str, str], with_config: bool, with_overrides: bool) -> str:
    lines = [doc.strip(), "", "Options:"]
    if with_config:
        lines.append("  --config=FILE[:ARG]        a recipe, e.g. configs/quickstart.py")
        lines.append("  --config.SECTION.KEY=VALUE changes one of its keys; of several the last")
    if with_overrides:
        lines.append("  --config.SECTION.KEY=VALUE changes a key of every config")
    lines += [f"  --{name:<24} {text}" for name, text in options.items()]
    if with_config:
        lines += ["", *_help_keys(_chosen_recipe(argv))]
    return "\n".join(lines)


def _help_keys(recipe: str | None) -> Iterator[str]:
    """One line for each key, and the comment that stands beside it in its file."""
    base = config_lib.base_recipe()
    if recipe:
        yield f"Keys of {recipe}:"
        config, files = config_lib.load(recipe), [base.__file__, recipe.split(":")[0]]
    else:
        yield "Keys (add --config=... to see a recipe's own keys and values):"
        config, files = base.get_config(), [base.__file__]
    comments = {}
    for file in files:
        comments |= _comments(pathlib.Path(file).read_text())
    for key, value in config_lib.flatten(config).items():
        yield f"  --config.{key}={value!r}"
        section, _, name = key.rpartition(".")
        comment = comments.get((section or "get_config", name))
        if section == "objective" and not comment:  # of a recipe that builds on another one
            comment = _objective_comments(config).get(name)
        if comment:
            yield f"        {comment}"


def _comments(source: str) -> dict[tuple[str, str], str]:
    """{(function, key): comment} of lines `key=value,  # comment`, or with the comment above."""
    comments, function = {}, ""
    line = r"def (\w+)\(|((?:^ *# .*\n)*)^[ \w.]*?(\w+) ?=(?!=)[^\n#]*(?:#([^\n]*))?$"
    for match in re.finditer(line, source, re.M):
        function = match[1] or function
        if match[3] and (text := (match[4] or re.sub(r"\s*# ", " ", match[2])).strip()):
            comments[function, match[3]] = text
    return comments


def _objective_comments(config) -> dict[str, str]:
    recipe = pathlib.Path(config_lib.base_recipe().__file__).parent / f"{config.objective.name}.py"
    found = _comments(recipe.read_text()) if recipe.exists() else {}
    return {name: text for (_, name), text in found.items()}
