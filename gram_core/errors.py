"""Everything this package raises on purpose.

Each error carries a `code` from a closed set; the server maps codes to HTTP statuses in one place.
Messages say what was got, what was expected and what to do; they never echo the caller's text.

    GramError
      ModelUnavailable       the named model can't be found, fetched or read       (at start)
      UnsupportedTower       the tower has a shape this code can't represent       (at start)
      FingerprintMismatch    a stored array belongs to another model               (at start)
      InvalidCheckpoint      a checkpoint that is damaged, or of another kind      (at start)
      InvalidImage           bytes that are not an acceptable image
      InvalidClasses         class names, templates or sentences that can't be used
      InvalidTuning          an adaptation option outside its range
      InvalidMemory          bytes that are no session's memory
      InvalidData            labelled images that can't be read as they were named (offline only)
      InvalidConfig          a recipe or option with an unknown name or a wrong value (offline only)
      TrainingDiverged       a loss or a gradient that is not a number             (offline only)
      MethodUnavailable      a method or host that this model can't serve
      OutOfMemory            the device ran out of memory
      DeviceError            the device failed in any other way
      WeightsChanged         the weights in memory are not those that were loaded
"""

from __future__ import annotations


class GramError(Exception):
    """Root of the tree: a sentence for a person, a `code` for a program, maybe the item's `index`."""

    code = "internal"

    def __init__(self, message: str, *, code: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.index = index


class ModelUnavailable(GramError):
    """The named model can't be found, fetched or read."""

    code = "model_unavailable"


class UnsupportedTower(GramError):
    """A tower whose shape this code can't represent."""

    code = "unsupported_tower"


class FingerprintMismatch(GramError):
    """A stored array was made with another model."""

    code = "fingerprint_mismatch"


class InvalidCheckpoint(GramError):
    """A checkpoint that is cut off, changed, of another format, or holds what can't be weights."""

    code = "invalid_checkpoint"


class InvalidImage(GramError):
    """Codes: undecodable_image, unsupported_image_format, image_too_large, image_too_many_pixels,
    image_shape_unsupported, image_too_complex."""

    code = "undecodable_image"


class InvalidClasses(GramError):
    """Codes: invalid_request, duplicate_class, too_many_classes, class_text_too_long, bad_template,
    templates_not_allowed."""

    code = "invalid_request"


class InvalidTuning(GramError):
    """An adaptation option outside its range."""

    code = "invalid_request"


class InvalidMemory(GramError):
    """Bytes that no session exported, or that were changed since."""

    code = "invalid_request"


class InvalidData(GramError):
    """Labelled images that can't be read as they were named."""

    code = "invalid_data"


class InvalidConfig(GramError):
    """A recipe or an option with an unknown name, a wrong type or a value out of range."""

    code = "invalid_config"


class TrainingDiverged(GramError):
    """A loss or a gradient that is not a number."""

    code = "training_diverged"


class MethodUnavailable(GramError):
    """A method, host or scope that this model can't serve."""

    code = "method_unavailable"


class OutOfMemory(GramError):
    """The device ran out of memory."""

    code = "out_of_memory"


class DeviceError(GramError):
    """The device failed; nothing on it can be trusted until the process is replaced."""

    code = "accelerator_failed"


class WeightsChanged(GramError):
    """The weights in memory are not those that were loaded; nothing that they say can be trusted."""

    code = "weights_changed"
