"""Rewards by name: plain functions fn(prompts, completions, completion_ids, **columns) -> list[float | None].

"classifier" alone is no such function but makes one, of `reward.path` and `reward.label`.
"""
from collections.abc import Callable

from ml_collections import ConfigDict

from kl_reg.models.encoder_families import load_config
from kl_reg.registry import Registry
from kl_reg.rewards import replies
from kl_reg.rewards.classifier import ClassifierReward, classifier, output_of
from kl_reg.rewards.vader import vader

REWARDS = Registry("reward.name")
REWARDS.register("vader", vader)
REWARDS.register("classifier", classifier)


def check(settings: ConfigDict) -> None:
    """Whether `build` can make a reward function, without reading a classifier's weights.

    Raises:
        ValueError: an unknown name, a classifier without a path or with an unknown label, or another reward with one.
        FileNotFoundError: there is no model in `reward.path`.
    """
    if REWARDS[settings.name] is not classifier:
        if settings.path or settings.label:
            raise ValueError(f"reward.path={settings.path!r} and reward.label={settings.label!r} have no effect with "
                             f"reward.name={settings.name!r}; they are of reward.name='classifier'")
    elif not settings.path:
        raise ValueError("reward.path='' with reward.name='classifier': give the folder or hub name of a classifier")
    else:
        output_of(load_config(settings.path).labels, settings.label, settings.path)


def build(settings: ConfigDict) -> Callable:
    """The reward function that `config.reward` names.

    Raises:
        ValueError, FileNotFoundError: as `check` does; or the classifier's weights do not fit.
    """
    check(settings)
    reward = REWARDS[settings.name]
    return classifier(settings.path, settings.label) if reward is classifier else reward


def digest(reward_fn: Callable) -> str:
    """SHA-256 of what a reward depends on: a classifier's weights, tokenizer and label, or a function's code."""
    return reward_fn.digest() if isinstance(reward_fn, ClassifierReward) else replies.digest(reward_fn)
