"""What words and form tell: a baseline that reads no sentence, to compare evaluated reward models with.

A Bradley-Terry logistic regression on which words and pairs of neighbouring words an answer has, hashed, and on the
counts of the form model. It does not see the prompt.

In:  `processed_helpsteer/`: fitted to its training split, applied to its validation split or to `--pairs`.
Out: a line on the terminal and, in `--output`, figures and `rewards.csv` as `evaluate_reward_model.py` writes them.

    python benchmarks/ngram_model.py --output ngrams
    python benchmarks/ngram_model.py --pairs my_pairs.jsonl other.csv --output ngrams
    python benchmarks/compare_runs.py ngrams evaluation

It needs scikit-learn: `pip install -r requirements-dev.txt`.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.sparse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from reward_pipeline.cards import write_evaluation
from reward_pipeline.conversations import Response, response_text
from reward_pipeline.files import InputError, rounded, write_text
from reward_pipeline.form import form_counts, root_mean_squares
from reward_pipeline.pair_metrics import Columns, join_columns, metrics_line, pair_metrics, text_columns
from reward_pipeline.processed import load_processed, processed_pairs, read_pairs
from reward_pipeline.processes import run_script
from reward_pipeline.runs import evaluation_directory
from reward_pipeline.settings import Parser, filled_text

HASHED = 2**18  # features of n-grams; some share one
NGRAM_SCALE = 0.3  # of their presence, beside counts of which each has a root mean square of 1
INVERSE_PENALTY = 0.01  # scikit-learn's C
STEPS = 300  # of the optimiser at most; it takes some tens
SIDES, PARTS = ("chosen", "rejected"), ("prompt", "response")


def answer_features(answers: Iterable[Response]) -> scipy.sparse.csr_matrix:
    """(N, `HASHED` + F): 1 for every n-gram that an answer has, and its form counts."""
    from sklearn.feature_extraction.text import HashingVectorizer

    texts = [response_text(answer) for answer in answers]
    hashing = HashingVectorizer(ngram_range=(1, 2), n_features=HASHED, binary=True, norm=None, alternate_sign=False)
    return scipy.sparse.hstack([hashing.transform(texts), np.array([form_counts(text) for text in texts])], "csr")


def fit(differences: scipy.sparse.csr_matrix) -> np.ndarray:
    """Weight of every feature.

    There is no intercept, and every pair is there in both orientations: a pair has no side.

    Args:
        differences: (N, `HASHED` + F) features of the chosen answers minus those of the rejected ones.
    """
    from sklearn.linear_model import LogisticRegression

    form_scale = 1 / root_mean_squares(differences[:, HASHED:].toarray())
    scale = np.concatenate([np.full(HASHED, NGRAM_SCALE), form_scale])
    scaled = differences @ scipy.sparse.diags(scale)
    labels = np.repeat([1, 0], scaled.shape[0])
    model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, max_iter=STEPS)
    return model.fit(scipy.sparse.vstack([scaled, -scaled]), labels).coef_[0] * scale


def scored(columns: Columns, weights: np.ndarray) -> Columns:
    """`text_columns` with what `score_pairs` adds to them; nothing is cut."""
    rewards = {f"{side}_reward": answer_features(columns[side]) @ weights for side in SIDES}
    return {**columns, **rewards, **{f"{part}_cut": np.zeros(len(columns["chosen"]), bool) for part in PARTS}}


def main() -> None:
    parser = Parser(__doc__)
    data = measure.script("train_reward_model")["DATA"]
    parser.flag("data", data, filled_text, "directory of load_helpsteer_dataset.py", metavar="DIR")
    parser.flag("pairs", None, filled_text, "to score instead of its validation split", nargs="+", metavar="SOURCE")
    parser.flag("output", None, filled_text, "directory for figures and plots", required=True, metavar="DIR")
    options = parser.parse_args()
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("scikit-learn is not installed; pip install -r requirements-dev.txt")

    splits, metadata = load_processed(options.data)
    if options.pairs:
        sources = {name: read_pairs(name) for name in options.pairs}
    else:
        sources = {options.data: processed_pairs(splits, options.data, "validation")}
    with evaluation_directory(options.output) as directory:
        chosen, rejected = (answer_features(splits["train"][side]) for side in SIDES)
        weights = fit(chosen - rejected)
        fitted = metadata["form_model"], metadata["author_strengths"]
        columns = join_columns([scored(text_columns(pairs, name, *fitted), weights) for name, pairs in sources.items()])
        metrics = pair_metrics(columns)
        print(metrics_line(metrics))
        write_evaluation(columns, metrics, directory)
        metrics |= {"train_pairs": len(splits["train"]), "source": metadata["source"]}
        write_text(directory / "metrics.json", json.dumps(rounded(metrics), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
