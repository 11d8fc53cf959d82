# Secure transfer learning with T-Core, from data sets to the report: `snakemake --cores all`.
import gc
import os
import sys
from pathlib import Path
from shlex import quote

from snakemake.utils import min_version

min_version("9.27")

# A plan is one large graph that stays; looking for garbage in it again and again takes a fifth of the time.
gc.set_threshold(1_000_000)

# This folder. Everything of ours is found from here, wherever the data are: `--directory`, or as a module.
ROOT = Path(str(workflow.current_basedir))
sys.path.insert(0, str(ROOT))


configfile: str(ROOT / "config/config.yaml")


container: "workflow/tcore.sif"  # used with --sdm apptainer only; recipe: workflow/tcore.def


report: "workflow/captions/workflow.rst"


# One victim; a pathvar, so that rules write data/results/<cell>/...
CELL = "{pretrain}-{encoder_attack}/{downstream}-{dataset_attack}/{seed}"


pathvars:
    cell=CELL,
    logs="data/logs",


from tcore.running import alive, starter

# For the records of steps, and what they compute in. The files are no parameter of a rule, because another file
# with the same settings makes nothing stale; the precision is (`code` in rules/common.smk).
configured = [*workflow.configfiles[-1:], *workflow.configfiles[:-1]]  # the base first, it is found last
os.environ.update(
    TCORE_CONFIG=" ".join(os.path.relpath(file, ROOT) for file in configured),
    TCORE_PRECISION=str(config.get("precision", "auto")),
)

shell.prefix(starter.prefix().replace("{", "{{").replace("}", "}}"))

if workflow.is_main_process:
    running = [alive.enter(".snakemake")]  # held until this process ends


include: "rules/common.smk"
include: "rules/datasets.smk"
include: "rules/encoders.smk"
include: "rules/poisoning.smk"
include: "rules/user.smk"
include: "rules/tcore.smk"
include: "rules/defenses.smk"
include: "rules/evaluation.smk"
include: "rules/tables.smk"
include: "rules/figures.smk"
include: "rules/received.smk"


# `dvc commit` wants every folder that it tracks, also after a run that stopped early.
onstart:
    for family in ("datasets", "encoders", "poisoned", "defended", "results"):
        Path("data", family).mkdir(parents=True, exist_ok=True)
    if workflow.is_main_process and not workflow.deployment_settings.deployment_method:
        running.append(starter.start())


rule all:
    default_target: True
    input:
        rules.make_report.output.output if len(CELLS) else [],
        audits,
    message:
        "Done. Open {input}"
