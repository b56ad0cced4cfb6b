"""How far a rule could get from what muka-auto looks at: targets by a regression that has seen the true owners of other texts.

    python bench/headroom.py [the options of bench/paper.py; its teachers in the work folder are used again]

Row `owners learned`: p(i | x) by a regression, fitted on four fifths of the pool with true owners and asked about the last fifth,
on every teacher's own and second score, normalised entropy, top probability and energy, and on the weights by muka-evidence and
muka-auto. It is no method: it needs the labels. A rule without labels that comes near it has used up its inputs. Settings whose
teachers all have the same labels are left out: nobody owns a text there.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paper
import torch
from environment import command, keep
from paper_report import markdown
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from muka_fast.config import RunConfig, load_config
from muka_fast.console import setup_logging
from muka_fast.errors import UserError
from muka_fast.evidence import CERTAINTY, SAMPLE, energies, own_scores, sample_rows, second_scores
from muka_fast.labels import LabelSpace
from muka_fast.methods import build_method
from muka_fast.selection import label_ids, owners
from muka_fast.stored import Supervision
from muka_fast.train import pool_features, pool_weights

LEARNED = "owners learned"
ROWS = ("muka-hard", "muka-evidence", "muka-auto", LEARNED, "oracle")
FOLDS = 5
TOLD = f"Row `{LEARNED}`: weights by a regression on all that muka-auto looks at, fitted to the true owners of other texts; no method."


def learned(args: argparse.Namespace, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The cell of `owners learned`."""
    options = [paper.run_options(args, seed, method, folder) for method in ("muka-evidence", "muka-auto")]
    configs = [load_config(RunConfig, None, given) for given in options]
    texts, sup, space = paper.open_pool(configs[0])
    neutral = pool_features(configs[0], texts, folder)
    weights = [pool_weights(config, sup, space, texts, neutral, folder) for config in configs]
    rows = sample_rows(texts.example_ids, seed, SAMPLE)
    x = np.concatenate([teacher_scores(sup.restrict(space), rows), *(np.log(w + 1e-4) for w in weights)], axis=1)
    found = learn(x, first_owner(texts.labels, space), len(sup.teachers))
    built = build_method(configs[1], sup, space, None, found)
    return {"setting": name, "seed": seed, "method": LEARNED} | paper.figures(built, texts, space)


def teacher_scores(sup: Supervision, rows: np.ndarray) -> np.ndarray:
    """Five scores of each teacher for each text, [n, 5 N]; the Gaussians of the own scores are fitted on `rows`."""
    blocks = itertools.pairwise(sup.offsets)
    top = torch.stack([torch.softmax(sup.logits[:, a:b], dim=-1).amax(-1) for a, b in blocks], dim=-1).numpy()
    entropy = sup.normalized_entropy.numpy()
    scores = [own_scores(sup, rows, CERTAINTY), second_scores(sup), entropy, np.log(1 - top + 1e-4), energies(sup)]
    return np.concatenate(scores, axis=1)


def first_owner(labels: Sequence[str], space: LabelSpace) -> np.ndarray:
    """The first teacher that has a text's label, int [n]."""
    return owners(space)[:, label_ids(labels, space)].int().argmax(0).numpy()


def learn(x: np.ndarray, owner: np.ndarray, num_teachers: int) -> np.ndarray:
    """p(i | x) of each text by a regression that has not seen it, fp32 [n, N]."""
    found = np.zeros((len(x), num_teachers), np.float32)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    found[:, np.unique(owner)] = cross_val_predict(model, x, owner, cv=folds, method="predict_proba")
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, dict[str, Any]] = {}
    cells = []
    for seed in range(args.seeds):
        for name, setting in args.settings.items():
            folder = paper.seed_folder(args, name, seed)
            found = paper.prepare(args, name, seed, folder)
            settings.setdefault(name, {"what": setting.what, "group": setting.group, "seeds": []})["seeds"].append(found)
            for method in ROWS:
                cells.append(learned(args, name, seed, folder) if method == LEARNED else paper.cell(args, name, seed, method, folder))
                print(json.dumps(cells[-1]), flush=True)
    options = paper.numbers(args, (*paper.TEACHER_NUMBERS, "neutral_encoder", "seeds"))
    return {"options": options, "settings": settings, "cells": [cell | {"accuracy": None, "macro_f1": None} for cell in cells]}


def main(argv: Sequence[str] | None = None) -> int:
    setup_logging()
    args = paper.parse_arguments(argv, stem="headroom")
    args.selection_only = True
    asked = {name: setting for name, setting in args.settings.items() if not setting.same}
    if not asked:
        raise UserError(f"--settings {' '.join(args.settings)}: all teachers have the same labels; name one where they differ")
    args.settings = asked
    results = run(args)
    text = markdown(results) + f"\n{TOLD}\n"
    print(text)
    keep(args.stem, results, text, "cpu", args.results)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
