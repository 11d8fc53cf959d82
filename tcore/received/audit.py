"""The audit: what T-Core distrusted of an encoder and images from outside, for a user who knows no truth.

Every sentence rests on what the user has: the stages' own tables, both models, and the held-out images,
which no stage has seen. Thresholds of the indicators are this project's [open]; they colour a page and
decide nothing.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image

from tcore.data.images import ImageSet
from tcore.evaluation import metrics, results
from tcore.models.classifier import Classifier, logits
from tcore.received.check import digests
from tcore.report import charts

FEW_SEEDS = 5  # fewer in a class: a single wrong one weighs much
KNOWN = 0.5  # accuracy that confusion may leave on the trusted samples
RECOVERED = 0.7  # accuracy on the clean subset from which the masks say something
EXCESS = 2.0  # a class that loses so many times its share of the images left out stands out
LEAST_EXCESS = 10  # ... if it loses so many at least
ACC_LOSS = 0.05
THUMB = 64  # pixels
PICTURES = 600  # in all
PER_CLASS = 24
SHOWN_CLASSES = 50

PROVES = (
    "It shows which images and channels this run of T-Core did not vouch for, and what the model learnt "
    "without them is worth on held-out images.",
    "It does not show that anything was poisoned: a fixed share of the images is left out and a fixed share "
    "of each layer's channels distrusted, of clean data too. What counts is which ones they are: one class "
    "far above its share, or images that the clean model names otherwise, all alike.",
    "It does not show that the model is clean: poisons that entered the pool look like any other image here, "
    "and without the trigger no test finds what is left of a backdoor.",
    "Accuracies are as good as the held-out labels, which come from the same source. If it was poisoned, "
    "some held-out images carry the trigger, and a clean model is counted wrong on them.",
)


def distrust(
    images: ImageSet, model: Classifier, seeds: pd.DataFrame, subset: pd.DataFrame, pool: pd.DataFrame
) -> pd.DataFrame:
    """A row per training image, least trusted first, `index` as in `images`.

    Images left out of the pool come first, then those that joined last; among equals those whose label
    the clean model finds least likely (`loss`, cross-entropy).
    """
    labels = images.targets
    out = logits(model, images.tensor).cpu()
    rounds = pool.set_index("index")["round"].loc[images.index].to_numpy()
    names = np.array(images.class_names)
    table = pd.DataFrame(
        {
            "index": images.index,
            "class": names[images.labels],
            "clean_model_says": names[out.argmax(1).numpy()],
            "left_out": rounds < 0,
            "joined_in_round": rounds,
            "loss": F.cross_entropy(out, labels, reduction="none").numpy(),
            "seed": seeds.set_index("index")["trusted"].loc[images.index].to_numpy(),
            "in_subset": subset.set_index("index")["round"].loc[images.index].to_numpy() >= 0,
            "row": np.arange(len(images)),
        }
    )
    order = np.lexsort((-table["loss"], -table["joined_in_round"], ~table["left_out"]))
    return table.iloc[order].reset_index(drop=True)


def classes(images: ImageSet, table: pd.DataFrame) -> pd.DataFrame:
    """Per class: its images, seed samples, those in the subset, left out, and those of them named otherwise.

    `excess` is the share left out over that of all classes; `stands_out` follows `EXCESS` and `LEAST_EXCESS`.
    """
    other = table["left_out"] & (table["class"] != table["clean_model_says"])
    found = (
        table.assign(other=other)
        .groupby("class")
        .agg(
            images=("row", "size"),
            seeds=("seed", "sum"),
            subset=("in_subset", "sum"),
            left_out=("left_out", "sum"),
            other=("other", "sum"),
        )
        .reindex(images.class_names)
    )
    overall = max(found["left_out"].sum() / len(table), 1e-12)
    found["excess"] = found["left_out"] / found["images"] / overall
    found["stands_out"] = (found["excess"] >= EXCESS) & (found["left_out"] >= LEAST_EXCESS)
    return found.reset_index(names="name")


def held_out(train: ImageSet, test: ImageSet, undefended: pd.DataFrame, defended: pd.DataFrame) -> dict:
    """Accuracies on the held-out images that are not among the training images, and where models differ."""
    seen = set(digests(train))
    fresh = np.array([digest not in seen for digest in digests(test)])
    found = {"images": len(test), "known": int((~fresh).sum()), "accuracies": {}}
    said = {}
    for name, table in (("none", undefended), ("tcore", defended)):
        table = table[table["view"] == "clean"].set_index("index").loc[test.index]
        said[name] = table["prediction"].to_numpy()
        found["accuracies"][name] = metrics.accuracy(said[name][fresh], test.labels[fresh])
    differ = (said["none"] == test.labels) & (said["tcore"] != test.labels) & fresh
    found["differ"] = np.flatnonzero(differ)
    found["says"] = said["tcore"]
    return found


def indicators(
    per_class: pd.DataFrame, tests: dict, expanded: dict, channels: dict, pool: pd.DataFrame, checked: dict
) -> list[dict]:
    """How far to trust the result: `name`, `value`, `reading`, and whether it calls for `care`."""
    found: list[dict] = []

    def say(name: str, value: str, care: bool, good: str, bad: str) -> None:
        found.append({"name": name, "value": value, "care": bool(care), "reading": bad if care else good})

    least = per_class.loc[per_class["seeds"].idxmin()]
    say(
        "Seed samples of the smallest class",
        f"{least['seeds']} ({least['name']})",
        least["seeds"] < FEW_SEEDS,
        "Enough that a single wrong seed sample weighs little.",
        f"Few seed samples in class {least['name']}: a single wrong one weighs much; "
        "treat the result with care.",
    )
    share = (
        per_class["subset"] / per_class["images"] / (per_class["subset"].sum() / per_class["images"].sum())
    )
    rare = per_class.loc[share.idxmin(), "name"]
    say(
        "Class balance of the clean subset",
        f"{share.min():.2f} to {share.max():.2f} of the even share",
        share.min() < 0.5,
        "Every class is in it about as often as among the images.",
        f"Class {rare} has less than half its share: little vouches for its channels and its head.",
    )
    if expanded["trusted_accuracy"]:  # empty where all of sifting's core is the clean subset
        known = max(expanded["trusted_accuracy"])
        say(
            "Trusted samples that confusion left known",
            f"{100 * known:.1f} %",
            known > KNOWN,
            "The head was made to forget what clean samples look like, so the largest losses are theirs.",
            "The head still knew them: the clean subset was chosen by how odd its images look, and poisons "
            "with a weak trigger look odd. Raise expand.steps or lower expand.trust.",
        )
    out = per_class["left_out"].sum() / per_class["images"].sum()
    standing = per_class.loc[per_class["stands_out"], "name"]
    top = per_class.loc[per_class["excess"].idxmax()]
    say(
        "Images left out",
        f"{100 * out:.1f} % of all; {100 * top['left_out'] / top['images']:.1f} % of {top['name']}",
        len(standing),
        "No class loses much more than its share.",
        f"Far above its share: {', '.join(standing[:5])}. Look at the pictures below: hard images, "
        "wrong labels or one foreign pattern?",
    )
    accuracy = channels["unlearning_accuracy"][-1]
    chance = 1 / len(per_class)
    say(
        "Accuracy at the end of unlearning",
        f"{100 * accuracy:.1f} %",
        accuracy > max(0.2, 1.5 * chance),
        "The encoder was made to forget, so what comes back can be compared.",
        "The encoder was not made to forget: the channel masks say little. Raise "
        "filter_channels.unlearn_epochs.",
    )
    accuracy = channels["recovery_accuracy"][-1]
    say(
        "Accuracy on the clean subset after recovery",
        f"{100 * accuracy:.1f} %",
        accuracy < RECOVERED,
        "Masks alone brought the task back, so they tell channels apart.",
        "Masks alone did not bring the task back: which channels are distrusted is uncertain here. "
        "Raise filter_channels.epochs or its untrusted_share.",
    )
    late = (pool["phase"] == 3).sum()
    say(
        "Rounds until the pool was full",
        f"{pool['round'].max()}; {100 * late / len(pool):.0f} % of all images joined in phase 3",
        late > 0.6 * len(pool),
        "Most of the pool was chosen by its loss.",
        "Most of the pool was chosen in phase 3, by the way it is learnt: where poisons most often get in. "
        "A smaller bootstrap.rho leaves more out.",
    )
    before, after = tests["accuracies"]["none"], tests["accuracies"]["tcore"]
    say(
        "Accuracy on held-out images",
        f"{100 * before.value:.1f} % without T-Core, {100 * after.value:.1f} % with it",
        after.value < before.value - ACC_LOSS,
        "T-Core costs no accuracy worth the name here.",
        "T-Core costs accuracy; or the held-out images are poisoned too, see the pictures.",
    )
    say(
        "Images in the pool, against that accuracy",
        f"{100 * (1 - out):.1f} %",
        1 - out > after.high,
        "No more than the clean model has right of images that it has not seen.",
        "More than the clean model has right of images that it has not seen: the last to join were hard for "
        "it, and poisons may be among them. A smaller bootstrap.rho leaves more out.",
    )
    say(
        "Held-out images that are training images too",
        f"{tests['known']} of {tests['images']}",
        tests["known"],
        "None: the accuracies are on unseen images.",
        "They are left out of the accuracies.",
    )
    say(
        "Repeated training images",
        f"{checked['duplicates']}; {checked['contradictions']} with more than one label",
        checked["contradictions"],
        "No image contradicts itself.",
        "The same image under several labels: at least one of them is wrong.",
    )
    return found


def _pictures(images: ImageSet, rows, says) -> list[dict]:
    """Thumbnails of the given rows, under the label received, and what the clean model says."""
    found = []
    for row, said in zip(rows, says, strict=True):
        picture = Image.fromarray(images.pixels[row])
        if max(picture.size) > THUMB:
            picture.thumbnail((THUMB, THUMB))
        name = images.class_names[images.labels[row]]
        found.append({"uri": charts.image_uri(np.asarray(picture)), "name": name, "says": said})
    return found


def build(
    train: ImageSet,
    test: ImageSet,
    model: Classifier,
    tables: dict[str, pd.DataFrame],
    expanded: dict,
    channels: tuple[dict, dict],
    predictions: dict[str, pd.DataFrame],
    checked: dict,
    encoder: dict,
) -> tuple[dict, pd.DataFrame]:
    """What the page shows, and the table of `distrust`.

    `tables`: seeds, subset, pool; `expanded`: the log of expand; `channels`: tensors and log;
    `predictions`: none, tcore; `checked` and `encoder`: logs of the two first steps.
    """
    with torch.no_grad():
        table = distrust(train, model, tables["seeds"], tables["subset"], tables["pool"])
    per_class = classes(train, table)
    tests = held_out(train, test, predictions["none"], predictions["tcore"])
    tensors, log = channels
    layers = [
        (layer, tensors[f"mask.{layer}"].numpy(), tensors[f"untrusted.{layer}"].numpy().astype(bool))
        for layer in results.layers(tensors)
    ]
    order = per_class[per_class["left_out"] > 0].sort_values("excess", ascending=False)[:SHOWN_CLASSES]
    limit = min(PER_CLASS, PICTURES // max(1, len(order)))
    sheets = []
    for line in order.to_dict("records"):
        rows = table[table["left_out"] & (table["class"] == line["name"])][:limit]
        sheets.append(line | {"pictures": _pictures(train, rows["row"], rows["clean_model_says"])})
    differ = tests["differ"][:PER_CLASS]
    names = np.array(test.class_names)
    return {
        "encoder": encoder,
        "origin": train.origin,
        "checked": checked,
        "tests": tests,
        "indicators": indicators(per_class, tests, expanded, log, tables["pool"], checked),
        "classes": order.to_dict("records"),
        "sheets": sheets,
        "differ": _pictures(test, differ, names[tests["says"][differ]]),
        "masks": Markup(charts.masks(layers, "Channel masks")),
        "untrusted": sum(int(flags.sum()) for _, _, flags in layers),
        "channels": sum(len(flags) for _, _, flags in layers),
        "left": int(table["left_out"].sum()),
        "proves": PROVES,
    }, table.drop(columns="row")
