"""Which settings a method of an edit reads: what it does not read is refused, so that nothing is recorded that was not done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pagoda.errors import ConfigError

Method = Literal["project", "alternate", "optimise"]
METHODS: tuple[Method, ...] = ("project", "alternate", "optimise")
Filling = Literal["teacher", "optimise", "alternate"]
FILLING: tuple[Filling, ...] = ("teacher", "optimise", "alternate")
"""Methods of an inpainting."""
SEARCHING = ("teacher", "optimise")
"""Methods that search for a latent."""
STEPS = 30
"""Of a search, where nothing is said."""
GUESSED_STEPS = 0
"""The same, where a guess of the whole image was drawn: twenty cost a second and gained nothing (docs/editing.md)."""
DRAWINGS = 1
"""Of a hole; of more the most typical one is taken. Eight cost a second and gained little (docs/editing.md)."""
ROUNDS = 3
"""Of an alternation, where nothing is said."""
FILLING_ROUNDS = 6
"""The same, of an inpainting."""


def method_settings(
    method: str,
    *,
    accepted: Sequence[str] = METHODS,
    steps: int | None = None,
    rounds: int | None = None,
    strength: float = 0.0,
    drawings: int | None = None,
    default_rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The settings that a method reads, by name, with their values where nothing was given.

    Args:
        method: One of `accepted`.
        steps: Of "optimise" and "teacher", which can do without (0); `STEPS` and `GUESSED_STEPS` when None.
        rounds: Of "alternate"; `default_rounds` when None.
        strength: Noise of the first latents, in [0, 1]: of a search, and of "alternate" with two rounds or more.
        drawings: Of "teacher"; `DRAWINGS` when None.

    Raises:
        ConfigError: an unknown method, settings out of range, or one that the method does not read.
    """
    if method not in accepted:
        raise ConfigError(f"unknown method {method!r}; accepted are {', '.join(accepted)}.")
    searching = [name for name in accepted if name in SEARCHING]
    read = (("steps", steps, searching), ("rounds", rounds, ["alternate"]), ("drawings", drawings, ["teacher"]))
    for name, value, readers in read:
        if value is not None and method not in readers:
            alone = f"the method {readers[0]} alone" if len(readers) == 1 else f"the methods {' and '.join(readers)}"
            raise ConfigError(
                f"{name}={value} is read by {alone}, the method here is {method}: leave it out, or choose {' or '.join(readers)}."
            )
        lowest = 0 if (name, method) == ("steps", "teacher") else 1
        if value is not None and value < lowest:
            raise ConfigError(f"{name} must be >= {lowest}, got {value}.")
    check_strength(strength)
    if method == "project":
        if strength:
            raise ConfigError(
                f"strength={strength:g} is read by the methods optimise and alternate, the method here is project, which adds no noise: "
                "leave it out, or choose one of them."
            )
        return {"method": method}
    if method in SEARCHING:
        default = STEPS if method == "optimise" else GUESSED_STEPS
        settings = {"method": method, "steps": default if steps is None else steps, "strength": strength}
        if method == "teacher":
            settings["drawings"] = DRAWINGS if drawings is None else drawings
            if drawings == 2:
                raise ConfigError(
                    "drawings=2: of two drawings each is as near to the other, none is more typical. Give 1, or 3 or more."
                )
        return settings
    rounds = default_rounds if rounds is None else rounds
    check_rounds(rounds, strength)
    return {"method": method, "rounds": rounds, "strength": strength}


def restoring(one_call: bool) -> Method:
    """The method of an enlargement or a restoration that is told none.

    Args:
        one_call: Whether images are encoded in one call: a search would take many times as long as all the rest.
    """
    return "project" if one_call else "optimise"


def filling_settings(method: str, **given: Any) -> dict[str, Any]:
    """The settings that a method of an inpainting reads, as `method_settings` gives them.

    Args:
        method: One of `FILLING`.
        **given: `steps`, `rounds`, `strength`, `drawings`.

    Raises:
        ConfigError: as `method_settings`.
    """
    return method_settings(method, accepted=FILLING, default_rounds=FILLING_ROUNDS, **given)


def check_strength(strength: float) -> None:
    """Refuse a share of noise outside of [0, 1].

    Raises:
        ConfigError: see above.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength must lie in [0, 1], got {strength}: 0 keeps the image, 1 makes a fresh one.")


def check_rounds(rounds: int, strength: float) -> None:
    """Refuse an alternation without a round, and noise that none of its rounds would see.

    Raises:
        ConfigError: see above.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be >= 1, got {rounds}.")
    if strength and rounds == 1:
        raise ConfigError(
            f"strength={strength:g} is not read in an alternation of one round: its noise falls to 0 in the last, which is the first. "
            "Leave it out, or give 2 rounds or more."
        )
