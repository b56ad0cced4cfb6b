"""Fits the uncertainty head (doubt.py) of a run: the teachers' doubt of the training texts on the exported student's features."""

import logging
from pathlib import Path

import numpy as np

from muka_fast.config import RunConfig
from muka_fast.console import progress
from muka_fast.coverage import doubt_ranks
from muka_fast.data import TextSet, tokenize
from muka_fast.doubt import UncertaintyHead, with_features
from muka_fast.evaluate import load_model, predict
from muka_fast.evidence import SAMPLE, sample_rows
from muka_fast.memory import device_of
from muka_fast.stored import Supervision
from muka_fast.targets import Method
from muka_fast.tokenizer import token_limit

log = logging.getLogger("muka_fast")


def doubt_targets(config: RunConfig, sup: Supervision) -> np.ndarray | None:
    """The teachers' doubt of every text, [n] in (0, 1): the mean of its ranks; None without --uncertainty_head. sup: restricted."""
    if not config.uncertainty_head:
        return None
    return doubt_ranks(sup, config.uncertainty, config.seed).mean(1)


def fit_head(config: RunConfig, output: Path, texts: TextSet, doubt: np.ndarray, method: Method) -> UncertaintyHead:
    """The uncertainty head of the exported student, loaded as anybody would load it, from at most SAMPLE of the texts."""
    rows = sample_rows(texts.example_ids, config.seed, SAMPLE)
    model, tokenizer, names = load_model(output, device_of(config.device), "exported student")
    tokens = tokenize(tokenizer, [texts.texts[row] for row in rows], min(config.max_length, token_limit(model, tokenizer)))
    options = {"token_budget": config.token_budget, "forward": with_features(model), "example_ids": texts.example_ids[rows]}
    with progress(len(rows), "uncertainty head") as bar:
        found = predict(model, tokens, **options, done=bar.advance).numpy()
    logits, features = found[:, : len(names)], found[:, len(names) :]
    head = UncertaintyHead.fit(features, logits, doubt[rows], method.included.numpy()[rows])
    if not head.tells:
        log.warning("uncertainty head: the teachers' doubt does not rise with the student's distance: every text gets the same doubt")
    return head
