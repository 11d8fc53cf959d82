"""The paper's tables beside what the grid reproduces.

`config/paper.csv` has the published numbers, one a line: `table`, the cell in the names of
`config/paper.yaml` (`KEYS`), `stage` and `metric` as in `tcore/evaluation/results.py`, `value` as printed,
which is percent but for COUNTS. A table gets a row for each of them, whether its cell is there or not. What
differs from the paper's tables:

- 2: CT's FPR is not printed. Spectral and SPECTRE are told the poison rate, as the paper's are.
- 3, 4: without the poisons isolated. The paper trained these undefended models anew; here they are those of
  all other tables.
- 5: T-Core's sifting in T2, all classes (in the paper the target class); other ratios than 0.2 by
  `config/ratios.yaml`.
- 6: the first column, 10 %. Poisons among the seeds count: SIG on SVHN, printed as 1 beside 6 among the
  seeds, is 7 here.
- 7: distillation with the downstream set. Purified encoders are a stage of T-Core here and no model.
- 8: without bootstrapping of the head alone.
- 12: `config/tis-aware.yaml`. The encoder is not stated; ours is that of the other T2 rows on CIFAR-10, and
  the share of poisons that of all tables. Without a defence only ASR is here, to one decimal.
- 13, 14: `config/growth.yaml`; one subset and one set of channels for all, as only bootstrapping differs.
- 15: the transformer's data sets are not stated; ours are CIFAR-10 and STL-10 (`config/vit.yaml`).
- 17: the attack is not stated; ours is BadNets. Nor is the GPU, so the difference is one of machines; without
  a GPU there is no memory to compare.
- 19: of IBD-PSC only the one rate that is printed apart.

Not among them, because the grid has no such cells: 16 (seconds by images per class: the size of a data set is
no axis), 18. Figures 1 to 6 are published as pictures, without their numbers; what they show is measured by
targets of their own (`tcore/paper/figures/_declared.py`).
"""

from pathlib import Path

import pandas as pd

from tcore.files import InputError

KEYS = ["pretrain", "downstream", "encoder_attack", "dataset_attack", "defense"]
NUMBER = ["stage", "metric"]
TITLES = {
    2: "Detectors against poisoned data sets (T2)",
    3: "ABL by the share that it isolates (T2, T3)",
    4: "CBD by the epochs of its first model (T2, T3)",
    5: "Poisons among T-Core's seeds (T2)",
    6: "Poisons in T-Core's clean subset (T2)",
    7: "Encoders purified by distillation (T1)",
    8: "Repair with a clean subset (T2)",
    9: "T-Core, two attackers (T1+T2)",
    10: "T-Core, poisoned data sets (T2)",
    11: "T-Core, poisoned encoders and adaptive attackers (T1, T3)",
    12: "T-Core, an attacker who knows its sifting (T2)",
    13: "T-Core by the share of samples that a round adds (T2)",
    14: "T-Core by the size of its pool (T2)",
    15: "T-Core on a transformer (T1, T2, T3)",
    17: "What T-Core's stages cost",
    19: "Detectors of triggered test images (T1, T2, T3)",
}
COUNTS = ("poisons", "seconds", "peak_gpu_mb")  # metrics that are no shares, by their beginning
UNITS = {
    12: "Percent, and numbers of poisons among the seeds",
    5: "Numbers of poisons",
    6: "Numbers of poisons",
    17: "Seconds, and MB of GPU memory at the peak",
}
ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "\u2212": "$-$",
    "\u2013": "--",
    "\u2192": r"$\to$",
}
LABELS = {
    "acc": "ACC",
    "asr_encoder": "ASR, encoder's trigger",
    "asr_dataset": "ASR, data set's trigger",
    "tpr": "TPR",
    "fpr": "FPR",
    "tpr_encoder": "TPR, encoder's trigger",
    "tpr_dataset": "TPR, data set's trigger",
}


def published(path: str | Path, names: dict[str, str] | None = None) -> pd.DataFrame:
    """The published numbers; `names` gives data sets of the paper the names of those that stand for them."""
    found = pd.read_csv(path)
    columns = ["table", *KEYS, *NUMBER, "value"]
    if list(found) != columns:
        raise InputError(f"{path}: its columns should be {', '.join(columns)}")
    twice = found[found.duplicated(columns[:-1])]
    if len(twice):
        raise InputError(f"{path}: line {twice.index[0] + 2} is there twice; remove one")
    sets = ["pretrain", "downstream"]
    unknown = set(names or {}) - set(found[sets].to_numpy().flat)
    if unknown:
        raise InputError(f"config: stands_for: {', '.join(sorted(unknown))} is in none of the paper's tables")
    return found.replace({column: names for column in sets}) if names else found


def cells(table: int, reported: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """The grid's cells (rows of `tcore.experiment.grid.cells`) that a table is about."""
    return grid.merge(reported.loc[reported["table"] == table, KEYS].drop_duplicates())


def compare(table: int, reported: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """A row per published number: KEYS, NUMBER, `reported`, `reproduced`, `low`, `high`, `n`, `difference`.

    `found` are tidy rows of cells with any number of random seeds (`tcore/evaluation/results.py`); of a stage
    with steps the last counts. `low` and `high` are the interval of `results.over_seeds`, `n` counts random
    seeds, 0 where no cell is there. All in the published unit.
    """
    from tcore.evaluation import results  # here: whoever plans imports this module and needs no SciPy

    wanted = reported[reported["table"] == table].drop(columns="table").rename(columns={"value": "reported"})
    mine = found.merge(wanted[[*KEYS, *NUMBER]]).sort_values("step", na_position="first", kind="stable")
    mine = mine.drop_duplicates([*KEYS, "seed", *NUMBER], keep="last")
    lines = []
    for key, rows in mine.groupby([*KEYS, *NUMBER]):
        unit, largest = (1, float("inf")) if key[-1].startswith(COUNTS) else (100, 1)
        mean, low, high = (unit * value for value in results.over_seeds(rows, largest))
        lines.append([*key, mean, low, high, len(rows)])
    columns = [*KEYS, *NUMBER, "reproduced", "low", "high", "n"]
    compared = wanted.merge(pd.DataFrame(lines, columns=columns), how="left", on=[*KEYS, *NUMBER])
    compared["n"] = compared["n"].fillna(0).astype(int)
    return compared.assign(difference=compared["reproduced"] - compared["reported"])


def content(table: int, compared: pd.DataFrame) -> list:
    """A page as texts and tables: (heading, text or "", titles, rows or none)."""
    shown = compared.assign(metric=compared["metric"].map(lambda name: LABELS.get(name, name)))
    there = shown[shown["n"] > 0]
    done, whole = (len(part.drop_duplicates(KEYS)) for part in (there, shown))
    unit = UNITS.get(table, "Percent")
    said = (
        f"{done} of {whole} cells are there. {unit}. Reproduced: mean over random seeds with its 95 % "
        "interval (over test images where there is one random seed) and their number."
    )
    parts = [(f"Table {table}: {TITLES[table]}", said, [], [])]
    if done:
        columns = ["reported", "reproduced", "difference"]
        means = there.groupby(["defense", "metric"], sort=False)[columns].mean()
        counts = there.groupby(["defense", "metric"], sort=False).size()
        rows = [
            [*key, str(counts[key]), *map(_number, line[:2]), _number(line[2], "+")]
            for key, line in zip(means.index, means.to_numpy(), strict=True)
        ]
        parts.append(
            ("Means over the cells that are there", "", ["defence", "metric", "cells", *columns], rows)
        )
    columns = [column for column in KEYS if shown[column].nunique() > 1]
    rows = []
    for _, cell in shown.groupby(KEYS, sort=False):
        for position, (_, line) in enumerate(cell.iterrows()):
            names = [line[column] if position == 0 else "" for column in columns]
            numbers = [_number(line["reported"]), _span(line), _number(line["difference"], "+")]
            rows.append([*names, line["metric"], *numbers])
    titles = [column.replace("_", " ").replace("defense", "defence") for column in columns]
    fixed = ", ".join(f"{c.replace('_', ' ')} {shown[c].iloc[0]}" for c in KEYS if c not in columns)
    titles += ["metric", "reported", "reproduced", "difference"]
    return [*parts, ("Cells", f"All: {fixed}." if fixed else "", titles, rows)]


def markdown(table: int, compared: pd.DataFrame) -> str:
    """Means by defence over what is there, then a line for each cell; what is not there is a dash."""
    text = []
    for level, (heading, said, titles, rows) in enumerate(content(table, compared)):
        lines = [titles, ["---"] * len(titles), *rows] if rows else []
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text += [f"{'##' if level else '#'} {heading}", *filter(None, (said, body))]
    return "\n\n".join(text) + "\n"


def latex(table: int, compared: pd.DataFrame) -> str:
    """The same to \\input into a document with the packages booktabs and longtable, and 17 cm of width."""
    text = ["% \\usepackage{booktabs,longtable} \\usepackage[a4paper,margin=2cm]{geometry}"]
    for level, (heading, said, titles, rows) in enumerate(content(table, compared)):
        command = "subsection*" if level else "section*"
        text += [f"\\{command}{{{_escaped(heading)}}}", *filter(None, [_escaped(said)])]
        if rows:
            numbers = titles.index("cells" if "cells" in titles else "reported")
            columns = "l" * numbers + "r" * (len(titles) - numbers)
            lines = [" & ".join(map(_escaped, line)) + r" \\" for line in [titles, *rows]]
            size = r"\begingroup\footnotesize\setlength{\tabcolsep}{2.5pt}"
            head = [
                size,
                f"\\begin{{longtable}}{{{columns}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                r"\endhead",
            ]
            foot = [r"\bottomrule", r"\endfoot"]
            text.append("\n".join([*head, *foot, *lines[1:], r"\end{longtable}", r"\endgroup"]))
    return "\n\n".join(text) + "\n"


def _escaped(text: str) -> str:
    return "".join(ESCAPED.get(character, character) for character in text)


def _number(value: float, sign: str = "") -> str:
    return "\u2013" if pd.isna(value) else f"{value:{sign}.2f}".replace("-", "\u2212")


def _span(line: pd.Series) -> str:
    if line["n"] == 0:
        return "\u2013"
    interval = "" if pd.isna(line["low"]) else f"{_number(line['low'])} to {_number(line['high'])}, "
    return f"{_number(line['reproduced'])} ({interval}n = {line['n']})"
