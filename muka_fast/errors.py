"""The exception that stands for bad input, shown to users as one line, exit code 2; and words that its messages share."""


class UserError(Exception):
    """What is wrong and the way out, in one line that names the file, option or teacher; several lines of a parser become one."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class LoneError(UserError):
    """Of one process of a job alone: the others do not meet it, so that this one tells it."""


def first_line(error: BaseException) -> str:
    """The first non-blank line of an error's text, without the final period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


NOT_FINITE = "check the checkpoint, or take --scoring_precision fp32"  # the way out of scores that are NaN or infinite
OUT_OF_REACH = "the hub is out of reach (offline?) with no cached copy here"
