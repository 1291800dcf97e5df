"""Families that the recogniser was not made with, by name; kept apart from `FAMILIES` so that recall can be told."""

from __future__ import annotations

from models.families.heldout_common import HeldOut
from models.families.heldout_decoders import HELD_OUT_DECODERS
from models.families.heldout_detectors import HELD_OUT_DETECTORS
from models.families.heldout_modules import HELD_OUT_MODULES
from models.families.heldout_near import HELD_OUT_NEAR
from models.families.heldout_speech import HELD_OUT_SPEECH
from models.families.heldout_text import HELD_OUT_TEXT
from models.families.heldout_vision import HELD_OUT_VISION

HELD_OUT: dict[str, HeldOut] = {
    family.name: family
    for family in (
        *HELD_OUT_DECODERS,
        *HELD_OUT_TEXT,
        *HELD_OUT_VISION,
        *HELD_OUT_DETECTORS,
        *HELD_OUT_SPEECH,
        *HELD_OUT_MODULES,
        *HELD_OUT_NEAR,
    )
}
