"""Bad growth stages."""

from __future__ import annotations

from tests.recipes.bad_inputs import Case

STACK = '[[growth.stages]]\nat = "2 steps"\nfactor = 2\n'


def _growth(at: str, more: str = "", training: str = "") -> str:
    table = f"[training]\n{training}\n" if training else ""
    return f"{table}[[growth.stages]]\nat = {at}\nfactor = 2\n{more}"


def _growth_of(keys: str) -> str:
    """A recipe with one growth of these keys."""
    return f"[[growth.stages]]\nat = '2 steps'\n{keys}\n"


CASES = [
    Case(
        "growth: bad unit",
        r'growth\.stages\.0\.at: .*"300 steps" or "10M tokens".*, got .2 epochs',
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
    Case(
        "growth: nothing says how large",
        r"growth\.stages\.0: does not say how large the model becomes\. Give factor or",
        toml=_growth_of("operator = 'interpose'"),
    ),
    Case(
        "growth: factor and sizes",
        r"growth\.stages\.0: gives both factor and n_layers .*Give one of the two",
        toml=_growth_of("factor = 2\nn_layers = 4"),
    ),
    Case(
        "growth: a width for a depth operator",
        r"growth\.stages\.0\.dim: has no meaning for 'stack', which changes the depth\. Remove it",
        toml=_growth_of("dim = 64"),
    ),
    Case(
        "growth: layer map beyond the model",
        r"growth\.stages\.0: layer_map names layer 7, but the model has only 2 layers by then",
        toml=_growth_of("operator = 'map'\nlayer_map = [0, 1, 7, 1]") + "[growth.base]\nn_layers = 2\n",
    ),
    Case(
        "growth: layer map without a base",
        r"growth\.stages\.0: needs growth\.base\.n_layers",
        toml=_growth_of("operator = 'map'\nlayer_map = [0, 1, 0, 1]"),
    ),
    Case(
        "growth: chain misses the model",
        r"growth\.stages: the growths do not end at the model of \[model\]: they end at n_layers = 6 instead of 4",
        toml=_growth_of("factor = 2") + "[growth.base]\nn_layers = 3\n",
    ),
    Case(
        "growth: mask_steps is missing",
        r"growth\.stages\.0\.mask_steps: is missing: over how many steps is the mask to open",
        toml=_growth_of("operator = 'random_depth'\nfactor = 2"),
    ),
    Case(
        "growth: a mask that nothing has",
        r"growth\.stages\.0\.mask_steps: has no meaning for 'stack'",
        toml=_growth_of("factor = 2\nmask_steps = 3"),
    ),
    Case(
        "growth: another mesh that does not fit",
        r"growth\.stages\.0: parallelism\.tensor_parallel_degree: 3 does not divide the 1 rank",
        toml=_growth_of("factor = 2\nparallelism = {tensor_parallel_degree = 3}"),
    ),
    Case(
        "growth: unknown key of another mesh",
        r"growth\.stages\.0\.parallelism\.tensor_paralel_degree: unknown key .*Did you mean 'tensor_parallel_degree'",
        toml=_growth_of("factor = 2\nparallelism = {tensor_paralel_degree = 2}"),
    ),
    Case(
        "growth: batch that does not fit the next mesh",
        r"growth\.stages\.0: training\.global_batch_size: 9 is not a multiple of training\.local_batch_size 4",
        toml=_growth_of("factor = 2\nglobal_batch_size = 9\nlocal_batch_size = 4"),
    ),
    Case(
        "growth: reset moments under an old counter",
        r"growth\.stages\.0: keeps Adam's step counter and resets the moments",
        toml=_growth_of("factor = 2\noptimizer_step = 'keep'"),
    ),
    Case(
        "growth: moments of a learned growth",
        r"growth\.stages\.0: optimizer_state = 'copy': moments cannot be carried through maps that are learned",
        toml=_growth_of("operator = 'learn'\nfactor = 2\noptimizer_state = 'copy'"),
    ),
    Case(
        "growth: share of the run",
        r"growth\.stages\.0\.at: .*a share of the run lies between 0% and 100%",
        toml='[[growth.stages]]\nat = "120%"\nfactor = 2\n',
    ),
    Case(
        "growth: roll-backs of nothing",
        r"growth\.watchdog\.max_roll_backs: must be at least 1, got 0",
        toml=STACK + "[growth.watchdog]\nmax_roll_backs = 0",
    ),
]
