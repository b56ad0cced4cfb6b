"""The one exception that stands for bad input: shown to users as one line, exit code 2."""


class UserError(Exception):
    """What is wrong and the way out, in one line that names the file, option or teacher; several lines of a parser become one."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))
