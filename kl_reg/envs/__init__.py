"""Environments by name: builders (config.env, tokenizer) -> an environment of pure functions and a host reader."""
from kl_reg.envs.teacher_student import teacher_student
from kl_reg.registry import Registry

ENVIRONMENTS = Registry("env.name")
ENVIRONMENTS.register("teacher_student", teacher_student)
