"""Pieces as a user writes them, named in a configuration by dotted paths: built-in formulas under other names."""
from kl_reg.algorithms import LOSSES
from kl_reg.kl.estimators import TOKEN, Effect, Estimator, Value


def reinforce(log_prob, old_log_prob, advantage, mask, hyper):
    """As the built-in one, and nothing is stated of it."""
    return LOSSES["reinforce"](log_prob, old_log_prob, advantage, mask, hyper)


def stated(log_prob, old_log_prob, advantage, mask, hyper):
    """As the built-in one, and registered as such."""
    return LOSSES["reinforce"](log_prob, old_log_prob, advantage, mask, hyper)


LOSSES.register(f"{__name__}.stated", stated, per_token=True)


exact_again = Estimator(None, Value(True, True), {("reverse", "loss", "token"): Effect(TOKEN)}, inverse_ratio=0.0)
