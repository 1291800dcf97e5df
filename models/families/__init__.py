"""Tiny seeded models of every family worth supporting, by name."""

from __future__ import annotations

from models.families.decoders import DECODERS
from models.families.encoder_decoder import ENCODER_DECODERS
from models.families.encoders import ENCODERS
from models.families.family import Example, Family, Form, shake
from models.families.negatives import NEGATIVES
from models.families.speech import SPEECH
from models.families.torch_modules import TORCH_MODULES
from models.families.vision import VISION

__all__ = ["FAMILIES", "Example", "Family", "Form", "shake"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *VISION, *SPEECH, *TORCH_MODULES, *NEGATIVES)
}
