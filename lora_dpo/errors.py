"""The exception tree. Every error a user can cause derives from `LoraDPOError`.

    LoraDPOError
    ├── ConfigError        the recipe or a command-line option
    ├── DataError          a preference file or a row in it
    │   ├── UnclearColumns which column of a file is the prompt, and which are the answers, cannot be told
    │   └── NoPairs        answers were sampled and judged, and none is better than another
    ├── ModelError         loading, fetching or describing a base model
    ├── AdapterError       an adapter folder: missing, broken, made for another base
    │   ├── PackageError   a package that is refused: pickle, symlink, bomb, a name that hides something
    │   └── BaseDiffers    the base is not quite the one that the passport names: a warning, with strict an error
    ├── ReferenceMismatch  step 0: the policy is not the reference
    ├── JudgeError         a judge cannot be reached, or gives no usable scores
    ├── OutputError        a result cannot be written where it was asked for
    ├── RequestRefused     a request to `lora-dpo serve` that makes no sense to it
    └── Busy               a request that is not taken: too many wait, or a training goes on already
        └── PromptTooLong  its prompt is longer than the model or its host takes

A message says what is wrong, the value seen and the next step, in one or two sentences: the
command line prints it as it is and exits with status 1. Whatever a message repeats from a file or a
request, it stays one line of bounded length.
"""

from collections.abc import Mapping

from lora_dpo.text import one_line


class LoraDPOError(Exception):
    """Base of all errors that lora-dpo raises on purpose.

    Args:
        message: written on one line, cut in the middle if it is longer than `text.LONGEST`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class ConfigError(LoraDPOError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class DataError(LoraDPOError):
    """A preference file is missing, unreadable or holds no usable pair."""


class UnclearColumns(DataError):
    """Which column of a file is the prompt, and which are the answers, cannot be told.

    Args:
        columns: the columns that there are.
        guess: those that are told by their words, by what they are; the others are for a person to choose.
    """

    def __init__(self, message: str, *, columns: tuple[str, ...] = (), guess: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.columns, self.guess = columns, dict(guess or {})

    @property
    def problem(self) -> str:
        """The message without the options that mend it, for a place that has others."""
        return str(self).partition(" Name them: ")[0]


class NoPairs(DataError):
    """Answers were sampled and judged, and there is nothing to choose between."""


class ModelError(LoraDPOError):
    """A base model cannot be fetched, loaded or used for preference tuning."""


class AdapterError(LoraDPOError):
    """An adapter folder is missing, incomplete or does not fit the base model."""


class ReferenceMismatch(LoraDPOError):
    """At step 0 the policy differs from the reference, so the loss would mean nothing."""


class JudgeError(LoraDPOError):
    """A judge cannot be loaded or reached, or what it returns are no scores."""


class OutputError(LoraDPOError):
    """A result cannot be written: the place is taken, full or not writable."""


class RequestRefused(LoraDPOError):
    """A request over HTTP is malformed, or asks for what is not there.

    Args:
        param: the parameter that is wrong.
        code: OpenAI's word for it.
        status: HTTP's number for it.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Busy(LoraDPOError):
    """A request is not taken now; nothing was computed for it."""


class PromptTooLong(Busy):
    """A prompt is longer than the model, or its host, takes."""


class PackageError(AdapterError):
    """A package of an adapter is refused before anything of it is used."""


class BaseDiffers(AdapterError, UserWarning):
    """The base is another revision or quantisation than the adapter's own, or nothing says what it was made for.

    Issued with `warnings.warn`; `warnings.simplefilter("error", BaseDiffers)` makes it an error, as `--strict` does.
    """
