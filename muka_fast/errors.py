"""The one exception that stands for bad input: shown to users as one line, exit code 2."""


class UserError(Exception):
    """What is wrong and the way out, in one line that names the file, option or teacher."""
