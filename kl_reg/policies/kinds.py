"""The kinds of policy by name."""
from __future__ import annotations

from kl_reg.models.decoder import DecoderConfig
from kl_reg.policies.finetuned import full
from kl_reg.policies.head import head
from kl_reg.policies.interface import Policy
from kl_reg.policies.lora import lora
from kl_reg.registry import Registry

POLICIES = Registry("policy.kind")
POLICIES.register("head", head)
POLICIES.register("full", full)
POLICIES.register("lora", lora)


def build(kind: str, config: DecoderConfig, settings) -> Policy:
    """The policy of that kind for a base model of that shape."""
    return POLICIES[kind](config, settings)
