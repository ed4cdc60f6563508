"""The exams of observation, in the order in which a reader wants them."""

from __future__ import annotations

from tomoscope.exams.abilities import ABILITIES
from tomoscope.exams.attributions import DIRECT, TOKEN_ATTRIBUTION
from tomoscope.exams.lenses import LOGIT_LENS, TUNED_LENS
from tomoscope.exams.roles import HEAD_ROLES

EXAMS = (ABILITIES, LOGIT_LENS, TUNED_LENS, HEAD_ROLES, DIRECT, TOKEN_ATTRIBUTION)
