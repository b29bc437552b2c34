"""The ``consensus`` command: one subcommand a stage, nothing but wiring.

Every stage is a dataclass of keys and a function ``main(config)`` in its own room. Keys come from the YAML file named
with ``--config`` and from the command line, the latter winning. What a user got wrong ends in exit code 2 and one line
on stderr that names the field, the value and the mend; any other error is a bug and keeps its traceback.

Imports of torch, transformers and Ray happen only once a subcommand is known, so that ``consensus --help`` is instant.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deliberation.types import InputError


class Stage(NamedTuple):
    """Where a subcommand lives: ``module`` has the dataclass ``config`` and the function ``main(config)``.

    ``word`` is the key that a first word without dashes stands for, as in ``consensus keys list``.
    """

    module: str
    config: str
    help: str
    word: str | None = None


STAGES = {
    "sft": Stage("rl.sft", "SFTArguments", "fine-tune the policy on statements people rated as good"),
    "preference": Stage("reward.train", "PreferenceConfig", "fit the preference model to people's ratings"),
    "ppo": Stage("rl.train", "PPOScriptConfig", "optimise the policy for the group's welfare with PPO"),
    "compare": Stage("evaluation.compare", "CompareConfig", "compare policies on held-out deliberations"),
    "serve": Stage("serving.deployments", "ServeConfig", "serve consensus statements over HTTP with Ray Serve"),
    "ask": Stage("serving.ask", "AskConfig", "put a group's opinions to a running service: ask FILE", "request"),
    "keys": Stage("serving.manage_keys", "KeysConfig", "API keys of the service: keys create|list|revoke", "action"),
    "experiment": Stage(
        "serving.manage_experiments",
        "ExperimentConfig",
        "compare policies by people's ratings: experiment create|status|stop|report",
        "action",
    ),
    "store": Stage(
        "serving.manage_store", "StoreConfig", "the service's database: store backup|restore|check|migrate", "action"
    ),
    "export": Stage("serving.export", "ExportConfig", "members' ratings as a table that `consensus preference` reads"),
    "cycle": Stage("serving.cycle", "CycleConfig", "train the next policy on members' ratings: export to new arm"),
    "demo": Stage("demo", "DemoConfig", "run all stages on the embedded models, from data to a served answer"),
}

LIBRARIES = ("transformers", "trl")
"""Where the dataclasses come from that our stages extend."""

OVERVIEW = """usage: consensus STAGE [--config FILE.yaml] [--key value ...]

Find statements that a group with diverse opinions can endorse.

stages:
{stages}

Every key of a stage's YAML file can be overridden on the command line; `consensus STAGE --help` lists them.
Examples: configs/embedded/ (runs anywhere) and configs/qwen3-0.6b/ (one GPU, LoRA)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after ``consensus``; those of the process by default.

    Returns:
        The exit code: 0, or 2 for what the user can mend.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        stages = "\n".join(f"  {name:<12}{stage.help}" for name, stage in STAGES.items())
        print(OVERVIEW.format(stages=stages))
        return 0
    name = words.pop(0)
    try:
        if name not in STAGES:
            raise InputError("stage", name, f"must be one of {', '.join(STAGES)}; see `consensus --help`")
        named = STAGES[name].word
        if named is not None and words and not words[0].startswith("-"):
            words[:1] = [f"--{named}", words[0]]
        # A mistyped file name should not cost the import of torch.
        config_path = _config_path(name, words)
        run, config = _parse(name, config_path, words)
        run(config)
    except InputError as error:
        print(f"consensus {name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"consensus {name}: stopped", file=sys.stderr)
        return 130
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _config_path(name: str, words: list[str]) -> str | None:
    """Take ``--config PATH`` (or ``--config=PATH``) out of ``words`` and return the path of a readable file."""
    path = None
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise InputError("config", "", f"give a file, e.g. --config configs/embedded/{name}.yaml")
            path = words[i + 1]
            del words[i : i + 2]
            break
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
            del words[i]
            break
    if any(word == "--config" or word.startswith("--config=") for word in words):
        raise InputError("config", path, "is given twice; keep one")
    if path is not None and not os.path.isfile(path):
        raise InputError("config", path, f"is not a file; give one like configs/embedded/{name}.yaml")
    return path


def _parse(name: str, config_path: str | None, words: list[str]) -> tuple[Callable[[Any], object], Any]:
    """Import the stage and read its keys; returns its ``main`` and its config.

    Raises:
        InputError: on an unknown key, or a value that a key (or the dataclass as a whole) refuses.
    """
    stage = STAGES[name]
    import yaml

    module = importlib.import_module(stage.module)
    parser = make_parser(name, getattr(module, stage.config))
    files = [] if config_path is None else ["--config", config_path]
    try:
        (config,) = parser.parse_args_and_config([*files, *words])
    except InputError:
        raise
    except argparse.ArgumentError as error:
        raise _bad_value(error, name) from error
    except (ValueError, TypeError, OSError, ImportError, yaml.YAMLError) as error:
        # The dataclasses of transformers and TRL check combinations of keys in __post_init__ and say which.
        raise InputError(f"{name} config", config_path or "command line", _one_line(error)) from error
    return module.main, config


def _bad_value(error: argparse.ArgumentError, name: str) -> InputError:
    """``argument --learning_rate: invalid float value: 'abc'``, taken apart into field, value and mend."""
    field = (error.argument_name or "arguments").split("/")[0].lstrip("-")
    found = re.fullmatch(r"(invalid [\w ]+): '?(.*?)'?( \(choose from .*\))?", error.message)
    if found is None:
        return InputError(field, "", f"{error.message}; {_mend(name)}")
    problem, value, choices = found.groups()
    return InputError(field, value, f"{problem}{choices or ''}; {_mend(name)}")


def _mend(name: str) -> str:
    return f"see `consensus {name} --help` for the values it takes"


def make_parser(name: str, config_class: type) -> Any:
    """TRL's parser for one stage, made strict.

    Args:
        name: the subcommand, for the help text.
        config_class: the stage's dataclass.

    Returns:
        A ``TrlParser`` whose ``parse_args_and_config`` returns a one-tuple of the dataclass, refuses unknown keys in
        file and command line alike, and gives values from the file the same checks as those from the command line.
    """
    from trl import TrlParser

    class StrictParser(TrlParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise InputError("arguments", "command line", f"{message}; {_mend(name)}")

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
            parsed, unknown = super().parse_known_args(args, namespace)
            if unknown and not unknown[0].startswith("--"):
                raise InputError("arguments", unknown[0], f"is not of the form --key value; {_mend(name)}")
            if unknown:
                raise _unknown_key(self, name, unknown[0][2:].split("=")[0].replace("-", "_"))
            return parsed, unknown

        def set_defaults_with_config(self, **config: Any) -> list[str]:
            for key in config:
                if key not in _keys(self):
                    raise _unknown_key(self, name, key)
            checked = {key: _checked(self, key, value) for key, value in config.items()}
            return super().set_defaults_with_config(**checked)

    parser = StrictParser(
        config_class,
        prog=f"consensus {name}",
        usage=f"consensus {name}{_word(name)} [--config FILE.yaml] [--key value ...]",
        description=STAGES[name].help + ". Keys may stand in the YAML file named with --config; the command line wins.",
        allow_abbrev=False,
        exit_on_error=False,
        add_help=True,
    )
    _own_keys_first(parser, name, config_class)
    _help_from_docstrings(parser, config_class)
    return parser


def _word(name: str) -> str:
    word = STAGES[name].word
    return "" if word is None else f" {word.upper()}"


def _keys(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Key -> action, without ``--help`` and the ``--no_x`` twins of booleans."""
    return {action.dest: action for action in reversed(parser._actions) if action.nargs != 0}


def _unknown_key(parser: argparse.ArgumentParser, name: str, key: str) -> InputError:
    close = difflib.get_close_matches(key, _keys(parser), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return InputError("key", key, f"is not a key of this stage; {hint}`consensus {name} --help` lists them all")


def _checked(parser: argparse.ArgumentParser, key: str, value: Any) -> Any:
    """A value from YAML, converted and checked exactly as if it had been typed on the command line."""
    action = _keys(parser)[key]
    if value is None or (isinstance(value, (list, dict)) and action.type is str and action.nargs is None):
        return value
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_checked_scalar(parser, action, item) for item in items]
    return _checked_scalar(parser, action, value)


def _checked_scalar(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    converted = parser._get_value(action, str(value))  # type: ignore[attr-defined]
    parser._check_value(action, converted)  # type: ignore[attr-defined]
    return converted


def _own_keys_first(parser: argparse.ArgumentParser, name: str, config_class: type) -> None:
    """In ``--help``, show the stage's own keys before the hundred that it inherits from transformers and TRL."""
    inherited: set[str] = set()
    for base in config_class.__mro__[1:]:
        if dataclasses.is_dataclass(base) and base.__module__.split(".")[0] in LIBRARIES:
            inherited |= {field.name for field in dataclasses.fields(base)}
    if not inherited:
        return
    # argparse has no public way to order groups; these three attributes only shape the help text.
    options = parser._optionals
    own = parser.add_argument_group(f"keys of {name}")
    parser._action_groups.insert(0, parser._action_groups.pop())
    own._group_actions = [a for a in options._group_actions if a.dest not in inherited and a.dest != "help"]
    options._group_actions = [a for a in options._group_actions if a not in own._group_actions]
    options.title = "keys inherited from transformers and TRL"


def _help_from_docstrings(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Use the string below a field of our dataclasses as its help, so that each key is described in one place."""
    actions = _keys(parser)
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base) or base.__module__.split(".")[0] in LIBRARIES:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)):
                continue
            if isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant):
                action = actions.get(field.target.id)
                if action is not None:
                    action.help = " ".join(str(text.value.value).split()).replace("%", "%%") + " (default: %(default)s)"


if __name__ == "__main__":
    sys.exit(main())
