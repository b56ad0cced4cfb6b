"""Default epochs and learning rate of a classifier, by the number of texts and the width of the encoder."""

MIN_STEPS = 1000
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
BASE_WIDTH, BASE_LEARNING_RATE = 768, 3e-5


def default_epochs(num_texts: int, batch_size: int) -> int:
    """Passes over the texts that make 1,000 optimizer steps, at least 3 and at most 20.

    Three are the published recipe (arXiv 2112.07327), for large sets; on small ones an encoder needs hundreds of updates all the same
    (Zhang et al., arXiv 2006.05987) and bears 20 passes (Mosbach et al., arXiv 2006.04884).
    """
    steps_per_epoch = -(-num_texts // batch_size)
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, -(-MIN_STEPS // steps_per_epoch)))


def default_learning_rate(width: int) -> float:
    """Peak learning rate of AdamW, to two digits: 3e-5 for a hidden size of 768, in inverse proportion to it.

    Adam's steps are of one size per weight, so that a wider layer moves further with the same rate (Yang et al., arXiv 2203.03466).
    """
    return float(f"{BASE_LEARNING_RATE * BASE_WIDTH / width:.1e}")
