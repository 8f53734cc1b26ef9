"""The drafters by name; every class enters itself."""

from kd_common.registry import Registry
from spec_decode.drafters.base import Drafter

DRAFTERS: Registry[type[Drafter]] = Registry("drafter")
