"""Bad growth stages."""

from __future__ import annotations

from tests.recipes.bad_inputs import Case

STACK = '[[growth.stages]]\nat = "2 steps"\nfactor = 2\n'


def _growth(at: str, more: str = "", training: str = "") -> str:
    table = f"[training]\n{training}\n" if training else ""
    return f"{table}[[growth.stages]]\nat = {at}\nfactor = 2\n{more}"


CASES = [
    Case(
        "growth: bad unit",
        r'growth\.stages\.0\.at: .*"300 steps" or "10M tokens", got .2 epochs',
        toml=_growth('"2 epochs"'),
    ),
    Case("growth: bare number", r'growth\.stages\.0\.at: expected a string, got 2.*"2 steps"', toml=_growth("2")),
    Case("growth: number in quotes", r"growth\.stages\.0\.at: expected a count with a unit", toml=_growth('"2"')),
    Case("growth: at 0", r"growth\.stages\.0\.at: .*at least 1", toml=_growth('"0 steps"')),
    Case("growth: after the last step", r'at: "6 steps" is not before the last step', toml=_growth('"6 steps"')),
    Case("growth: after the last token", r'at: "2k tokens" is not before the last step', toml=_growth('"2k tokens"')),
    Case(
        "growth: after the last token, batch -1",
        r'at: "2k tokens" is not before the last step',
        toml=_growth('"2k tokens"', training="global_batch_size = -1"),
    ),
    Case("growth: enormous number", r"growth\.stages\.0\.at: ", toml=_growth(f'"{"9" * 400} steps"')),
    Case(
        "growth: out of order",
        r"stages\.1\.at: .*is not after the growth",
        toml=_growth('"4 steps"', "[[growth.stages]]\nat='2 steps'\nfactor=2"),
    ),
    Case(
        "growth: out of order, batch -1",
        r"stages\.1\.at: .*is not after the growth",
        toml=_growth('"4 steps"', "[[growth.stages]]\nat='200 tokens'\nfactor=2", "global_batch_size = -1"),
    ),
    Case(
        "growth: factor does not divide",
        r"growth\.stages\.0\.factor: the factor 3 does not divide 4 layers",
        toml=STACK.replace("factor = 2", "factor = 3"),
    ),
    Case(
        "growth: factor 1",
        r"growth\.stages\.0\.factor: must be at least 2, got 1",
        toml=STACK.replace("factor = 2", "factor = 1"),
    ),
    Case(
        "growth: no factor",
        r"growth\.stages\.0: does not say how large the model becomes\. Give factor or",
        toml=STACK.replace("factor = 2", ""),
    ),
    Case("growth: no at", r"growth\.stages\.0\.at: is missing", toml="[[growth.stages]]\nfactor = 2"),
    Case(
        "growth: unknown operator", r"unknown operator 'stak'.*Did you mean 'stack'", toml=STACK + 'operator = "stak"'
    ),
    Case(
        "growth: one stage as a table",
        r"growth\.stages: expected a list",
        toml='[growth.stages]\nat = "2 steps"\nfactor = 2',
    ),
    Case(
        "growth: no checkpoints",
        r"growth\.enable: growing needs checkpoints",
        toml=STACK + "[checkpoint]\nenable = false",
    ),
    Case(
        "growth: load_only",
        r"checkpoint\.load_only: conflicts with growth",
        toml=STACK + "[checkpoint]\nload_only = true",
    ),
]
