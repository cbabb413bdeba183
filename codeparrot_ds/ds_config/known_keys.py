"""Every key that DeepSpeed reads from its JSON with its type, block by block: a check needs no torch.

The keys lie in ``known_keys.json``, which ``tools/known_keys.py`` writes from the installed DeepSpeed's own models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.paths import did_you_mean


@dataclass(frozen=True)
class Kind:
    """The type and the range of one key.

    ``bool``, ``int``, ``number``, ``text``, ``choice`` (of `choices`, text without regard to case), ``texts`` and
    ``numbers`` (lists), ``block`` (an object with keys of its own), or ``any``.
    """

    name: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False  # null stands for DeepSpeed's default
    auto: bool = False  # "auto" is DeepSpeed's own word here

    @property
    def takes_auto(self) -> bool:
        """Whether ``"auto"`` is a value of the key and not a gap that somebody else fills."""
        return self.auto or "auto" in self.choices

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.name == "choice":
            shown = [str(choice) for choice in self.choices]
            return f"one of {', '.join(shown)}" if len(shown) <= 12 else "a known name"
        text = {
            "bool": "true or false",
            "int": "a whole number",
            "number": "a number",
            "text": "text in quotes",
            "texts": "a list of texts",
            "numbers": "a list of numbers",
            "block": "an object {...}",
            "any": "anything",
        }[self.name]
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.minimum),
                ("above", self.above),
                ("at most", self.maximum),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " ".join([text, " and ".join(bounds)]).strip()

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if self.name == "any" or (value is None and self.optional) or (value == "auto" and self.auto):
            return None
        if value is None:
            return f"is null; it must be {self.expected}, or remove the key"
        if isinstance(value, str) and self.name in ("bool", "int", "number"):
            return self._text_problem(value)
        if not self._has_type(value):
            return f"must be {self.expected}, not {_shown(value)}"
        if self.name == "choice":
            return self._choice_problem(value)
        if self.name == "texts" and self.choices and not set(value) <= set(self.choices):
            return f"must be a list of some of {', '.join(self.choices)}, not {_shown(value)}"
        numbers = value if self.name == "numbers" else [value] if self.name in ("int", "number") else []
        if any(not self._in_range(number) for number in numbers):
            return f"must be {self.expected}, not {_shown(value)}"
        return None

    def converted(self, value: Any) -> Any:
        """What DeepSpeed's models make of a value of another type, or None where it is right or they refuse it.

        A truth value for a number they take as 0 or 1, which nobody means: that is none here.
        """
        guess: Any = None
        if self.name == "bool" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            guess = _TRUTH.get(str(value).lower())
        elif self.name in ("int", "number", "choice") and isinstance(value, str) and is_number(value) and not self.auto:
            if self.name == "number":
                guess = float(value)
            elif not set(value.lower()) & set(".einf"):
                guess = int(value)
        return None if guess is None or self.problem(guess) else guess

    def _text_problem(self, text: str) -> str:
        if self.name == "bool" and text.lower() in ("true", "false"):
            return f"is the text {text!r}; write {text.lower()} without quotes"
        if self.name != "bool" and is_number(text):
            return f"is the text {text!r}; write the number without quotes"
        return f"must be {self.expected}, not the text {text!r}"

    def _choice_problem(self, value: Any) -> str | None:
        known = {choice.lower() if isinstance(choice, str) else choice for choice in self.choices}
        if (value.lower() if isinstance(value, str) else value) in known:
            return None
        if isinstance(value, str) and is_number(value) and not isinstance(self.choices[0], str):
            return f"is the text {value!r}; write the number without quotes"
        if not isinstance(value, str) or not all(isinstance(choice, str) for choice in self.choices):
            return f"must be {self.expected}, not {_shown(value)}"
        return f"cannot be {value!r}{did_you_mean(value, self.choices)}"

    def _has_type(self, value: Any) -> bool:
        if self.name == "bool":
            return isinstance(value, bool)
        if self.name == "int":
            # DeepSpeed takes 5e8 for a whole number, as JSON writers do.
            return is_finite(value) and float(value).is_integer()
        if self.name == "number":
            return is_finite(value)
        if self.name == "text":
            return isinstance(value, str)
        if self.name == "choice":
            return isinstance(value, str) or is_finite(value)
        if self.name == "block":
            return isinstance(value, dict)
        of_items = (lambda item: isinstance(item, str)) if self.name == "texts" else is_finite
        return isinstance(value, list) and all(of_items(item) for item in value)

    def _in_range(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, and neither a truth value nor text."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_number(text: str) -> bool:
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object {...}"
    return repr(value)


ANY = Kind("any")
# Texts and numbers that pydantic takes for a truth value.
_TRUTH = {
    **dict.fromkeys("true t yes y on 1 1.0".split(), True),
    **dict.fromkeys("false f no n off 0 0.0".split(), False),
}
KeyPath = tuple[str, ...]
# What a check says: (key path, severity, message).
Said = tuple[KeyPath, str, str]
FILE = Path(__file__).with_name("known_keys.json")
_TABLE: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
DEEPSPEED_VERSION: str = _TABLE["deepspeed"]


def _path(block: str) -> KeyPath:
    return tuple(block.split(".")) if block else ()


_KINDS = {
    label: Kind(**fields | {"choices": tuple(fields.get("choices", ()))}) for label, fields in _TABLE["kinds"].items()
}


def _kinds(table: str) -> dict[str, dict[str, Kind]]:
    return {name: {key: _KINDS[label] for key, label in keys.items()} for name, keys in _TABLE[table].items()}


KEYS: Mapping[KeyPath, Mapping[str, Kind]] = {_path(block): kinds for block, kinds in _kinds("keys").items()}
# Blocks that DeepSpeed reads by name and whose unknown keys it ignores; the other blocks refuse them.
IGNORES_UNKNOWN: frozenset[KeyPath] = frozenset(map(_path, _TABLE["ignores_unknown"]))
# What ``optimizer.params`` may hold, by optimizer in lower case; the others' are not judged.
OPTIMIZER_PARAMS: Mapping[str, Mapping[str, Kind]] = _kinds("optimizer_params")
# What ``scheduler.params`` may hold, by scheduler.
SCHEDULER_PARAMS: Mapping[str, Mapping[str, Kind]] = _kinds("scheduler_params")
# Optimizers that ZeRO takes without "zero_allow_untested_optimizer".
ZERO_OPTIMIZERS = frozenset({"adagrad", "adam", "adamw", "lion", "muon"})

# Keys that DeepSpeed still takes under an old name: what the new one is called. ``modern`` in ``ds_config`` renames.
RENAMED: Mapping[KeyPath, KeyPath] = {
    ("bfloat16",): ("bf16",),
    ("zero_optimization", "cpu_offload"): ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "cpu_offload_param"): ("zero_optimization", "offload_param"),
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): (
        "zero_optimization",
        "stage3_gather_16bit_weights_on_model_save",
    ),
}

# DeepSpeed raises for these.
REMOVED_KEYS = frozenset(_TABLE["removed_keys"])
REMOVED_ZERO_KEYS = frozenset(_TABLE["removed_zero_keys"])
REMOVED_OPTIMIZERS = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})
# Keys of other DeepSpeed versions: what became of them.
OTHER_VERSIONS: Mapping[KeyPath, str] = {
    **{(key,): "the feature was removed" for key in REMOVED_KEYS},
    **{("zero_optimization", key): "the feature was removed" for key in REMOVED_ZERO_KEYS},
    ("fp32_allreduce",): 'write "communication_data_type": "fp32"',
    ("allreduce_always_fp32",): 'write "communication_data_type": "fp32"',
    ("zero_optimization", "cpu_offload_params"): 'write "offload_param": {"device": "cpu"}',
    ("zero_optimization", "cpu_offload_use_pin_memory"): "write pin_memory into the offload block",
    ("aio", "thread_count"): "it is called intra_op_parallelism now",
    ("bf16", "check_overflow"): "it is called check_grad_overflow now",
    ("compile", "enabled"): "call engine.compile() or, here, set the run config's compile",
    ("compile", "backend"): "engine.compile() takes it",
    ("compile", "kwargs"): "engine.compile() takes them",
}
