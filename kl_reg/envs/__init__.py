"""Environments by name: builders (config.env, tokenizer, end tokens) -> an environment of pure functions and a host
reader."""
from kl_reg.envs.completion import completion
from kl_reg.envs.tabular import tabular
from kl_reg.envs.teacher_student import teacher_student
from kl_reg.registry import Registry

ENVIRONMENTS = Registry("env.name")
ENVIRONMENTS.register("teacher_student", teacher_student)
ENVIRONMENTS.register("completion", completion)
ENVIRONMENTS.register("tabular", tabular)
