"""What a run would cost: jobs and hours by step and scenario, or those of several targets side by side.

what snakemake would run:  python scripts/tools/estimate_cost.py
two of the paper's tables:
    python scripts/tools/estimate_cost.py table_2 table_10 -- --configfile config/paper.yaml
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from tcore.experiment import cost
from tcore.files import atomic
from tcore.running.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help="of snakemake; without any, all results")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where records of earlier steps are")
    parser.add_argument(
        "--save", type=Path, help=f"write what was measured as a table such as {cost.STANDARD.name}"
    )
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])

    if args.save:
        with atomic(args.save) as temporary:
            cost.measured(args.data).to_csv(temporary, index=False)
        return
    before, images, found = cost.known(args.data), cost.sizes(args.data), {}
    for target in tqdm(args.targets or [None], desc="plans", disable=len(args.targets) < 2):
        jobs = cost.planned(cost.plan([target] if target else [], given[end + 1 :]))
        found[target] = cost.estimate(jobs, before, images)
    if len(found) == 1:
        print(cost.report(*found.values()))
        return
    together = pd.concat(one.assign(target=target) for target, one in found.items())
    print("\n".join(cost.table(together, "target")))
    print("Each alone: what two targets share is counted in both.")


if __name__ == "__main__":
    run(main)
