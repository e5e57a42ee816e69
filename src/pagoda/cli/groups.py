"""Commands of two words, such as `pagoda edit inpaint`: what there is in a group, for those who know its first word alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pagoda.errors import did_you_mean


def group_members(group: str, commands: Mapping[str, type[Any]]) -> dict[str, type[Any]]:
    """The commands of a group by their second word; none where there is no such group."""
    return {name.split()[1]: kind for name, kind in commands.items() if name.split()[:1] == [group] and " " in name}


def group_help(group: str, commands: Mapping[str, type[Any]]) -> str:
    """The commands of a group with the first line of each, and an example.

    Args:
        group: First word of the commands.
        commands: Every command by its name, two words in a group.
    """
    members = group_members(group, commands)
    texts = {name: inspect.cleandoc(kind.__doc__ or "").splitlines() for name, kind in members.items()}
    width = max(map(len, members))
    lines = [f"usage: pagoda {group} {{{','.join(members)}}} ...", ""]
    lines += [f"  {name:<{width}}  {text[0]}" for name, text in texts.items()]
    examples = [line for text in texts.values() for line in text if line.strip().startswith(f"pagoda {group} ")]
    lines += ["", "Example:", *examples[:1], "", f"Settings of each: pagoda {group} {next(iter(members))} --help"]
    return "\n".join(lines)


def refuse_member(group: str, word: str, commands: Mapping[str, type[Any]]) -> str:
    """What to say of a word that is no command of a group."""
    near = did_you_mean(word, group_members(group, commands))
    return f"`pagoda {group}` has no command `{word}`. {near} See `pagoda {group} --help`."
