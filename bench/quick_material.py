"""Material of `bench/paper.py --quick`: docstrings of installed libraries and two untrained encoders. No download."""

from pathlib import Path

import transformers
from settings import BERT, MPNET, Setting, write_rows

from muka_fast.docstrings import collect
from muka_fast.material import random_model, small_config, train_tokenizer

TEXTS_PER_LIBRARY = 60
QUICK = {
    "docstrings_3": Setting(
        "docstrings, three teachers of two architectures, overlapping labels, 30 % of the pool for the first two",
        (("docstrings", 3),),
        (BERT, MPNET),
        overlap=1,
        share=0.3,
    ),
    "docstrings_same": Setting("docstrings, two teachers of the same labels", (("docstrings", 2),), same=True),
}


def make_material(folder: Path) -> tuple[Path, Path]:
    """Folders of the data sets and of the encoders; what is there already is used again."""
    data, encoders = folder / "data", folder / "encoders"
    if (folder / "done").is_file():
        return data, encoders
    docs = collect(TEXTS_PER_LIBRARY, seed=0)
    (data / "docstrings").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", docs.train), ("test", docs.test)):
        write_rows(data / "docstrings" / f"{name}.jsonl", [(docs.texts[row], docs.labels[row]) for row in rows])
    tokenizer = train_tokenizer([docs.texts[row] for row in docs.train])
    for number, family in enumerate(("modernbert", "distilbert")):
        random_model(transformers.AutoModel, small_config(family, tokenizer), number).save_pretrained(encoders / family)
        tokenizer.save_pretrained(encoders / family)
    (folder / "done").touch()
    return data, encoders
