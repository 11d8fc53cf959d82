"""The paper's figures, measured on the grid's victims: what a file `tcore/paper/figures/figure_<n>.py` says.

They are published as pictures, without their numbers, so there is nothing to compare digit by digit. Each
file measures what its figure is about and says in a sentence what the paper reports. It is the evaluator's:
it may see the truth, triggers and test images.

    CELLS     scenario -> the attacks that the figure is about, None: all of the grid; a literal
    METHODS   the methods whose settings it takes beside its own and the head's; a literal
    TRUSTED   optional: the table of trusted samples that it takes, below the victim's folder; a literal
    TITLE, CAPTION                     what is shown; what the paper reports and what to compare
    measure(victim, settings) -> rows  tidy, of one victim (`tcore/paper/figures/_victim.py`); `settings` by
                                       method; a share comes with its interval, `low` and `high`
    draw(rows) -> Figure               of all victims; `rows` then say whose they are (`IDENTITY`)

Who plans imports this module and none of those: literals are read from the source.
"""

import pandas as pd

from tcore.experiment import grid, registry, settings
from tcore.files import InputError

FAMILY = "paper/figures"
IDENTITY = [column for column in grid.COLUMNS if column != "defense"]


def names() -> list[str]:
    """The figures that there are, as `figure_1`."""
    return registry.names(FAMILY)


def declared(figure: str) -> dict:
    """CELLS, METHODS and, where there is one, TRUSTED."""
    return settings.constants(registry.path(FAMILY, figure))


def victims(figure: str, cells: pd.DataFrame) -> pd.DataFrame:
    """The victims, with IDENTITY, among a grid's cells that a figure is about."""
    found = cells[IDENTITY].drop_duplicates(ignore_index=True)
    about = pd.Series(False, index=found.index)
    for scenario, attacks in declared(figure)["CELLS"].items():
        chosen = found["scenario"] == scenario
        if attacks is not None:
            chosen &= found["encoder_attack"].isin(attacks) | found["dataset_attack"].isin(attacks)
        about |= chosen
    return found[about]


def methods(figure: str) -> list[str]:
    """The methods whose settings a figure takes, its own among them if it has any."""
    own = [figure] if figure in settings.methods() else []
    return [*own, "head", *declared(figure)["METHODS"]]


def scale(figure: str, step: float, end: float) -> list[float]:
    """0, `step`, 2 `step`, ... up to `end`, for the figure's horizontal axis."""
    if not 0 < step <= end:
        raise InputError(f"methods.{figure}.step = {step} should be more than 0 and at most {end}")
    return [round(k * step, 9) for k in range(int(end / step + 1e-9) + 1)]


def wanted(figure: str) -> str:
    """What a grid needs for a figure, in words."""
    return " or ".join(
        scenario if attacks is None else f"{scenario} with {' or '.join(attacks)}"
        for scenario, attacks in declared(figure)["CELLS"].items()
    )
