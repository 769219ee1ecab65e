"""The experiment's schema with every default, and its two halves: Static and Hyper."""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from kl_reg import algorithms
from kl_reg.kl.estimators import KLConfig
from kl_reg.kl.spends import SPENDS
from kl_reg.types import Hyper

HYPER = {"kl.coef": "kl_coef", "kl.target": "kl_target", "kl.horizon": "kl_horizon", "kl.rate": "kl_rate",
         "kl.gain": "kl_gain", "kl.final": "kl_final", "kl.budget": "kl_budget", "kl.turn_budget": "kl_turn_budget",
         "kl.token_budget": "kl_token_budget", "kl.miss_coef": "kl_miss_coef",
         "kl.budget_ramp": "kl_budget_ramp", "optim.learning_rate": "learning_rate",
         "optim.value_learning_rate": "value_learning_rate", "rl.clip": "clip",
         "rl.clip_high": "clip_high", "rl.dual_clip": "dual_clip", "rl.truncation": "truncation",
         "rl.temperature": "temperature", "rl.value_clip": "value_clip", "rl.stop_kl": "stop_kl",
         "rl.entropy_coef": "entropy_coef", "rl.value_coef": "value_coef", "rl.discount": "discount",
         "rl.gae_lambda": "gae_lambda"}
"""Settings that members of one program may differ in, and their names in `Hyper`."""

BUDGETS = ("kl.budget", "kl.turn_budget", "kl.token_budget")

_RUN_ONLY = ("sweep", "checkpoint", "log", "parallel")     # settings that change no number of a result
LATER = {"env.prefill": "", "reward.nan": "refuse", "kl.operation": "tilt", "kl.ledger": "exact",
         "kl.target_floor": 0.0, "kl.miss_coef": 0.0, "kl.budget_ramp": 0.0, "sampling.student_temperature": None,
         "reward.scale": "", "reward.empty": None,
         "env.opening_unfinished": False, "env.reply_limit": 0, "env.end_tokens": False, "env.empty_tokens": 4,
         "optim.eps": 1e-8, "optim.policy_grad_norm": None, "policy.actor": "mlp", "policy.critic_layers": 1,
         "policy.critic_activation": "silu"}
"""Settings that older runs lack: as here they are not in the fingerprint."""


def default() -> ConfigDict:
    """Every setting with its default; a configuration file changes some of them."""
    config = ConfigDict()
    config.seed = 0
    config.sweep = []                     # a union of grids: [{"kl.coef": (0.0, 0.1), "seed": (0, 1)}, ...]

    config.model = ConfigDict()
    config.model.path = "embedded"        # or a packaged model, a folder, or a model of the hub: docs/models.md
    config.model.dtype = "float32"        # of parameters and activations; KL and losses are float32
    config.model.quantize = ""            # "int8": the matrices of the frozen base model's layers
    config.model.cache = ""               # dtype of the KV cache: "" as model.dtype, "bfloat16" or "int8"
    config.model.attention = ""           # of whole sequences: "cudnn", fused on an NVIDIA GPU; "xla": its plain equal
    config.model.copies = True            # sampling reads a copy of the weights, each layer's by itself: faster
    config.model.remat = ""               # what gradients recompute of a trunk: "layers", "products" (less), "" nothing

    config.env = ConfigDict()
    config.env.name = "teacher_student"
    config.env.openings = "fixed"         # "fixed": env.opening; "held_out": it and turns of held-out conversations;
    #                                       or a file of prompts, a folder or hub name of a dataset, or a dotted path
    #                                       to a function that makes rows: docs/envs.md
    config.env.opening = "<|start|>"
    config.env.opening_unfinished = False           # texts end inside the agent's turn; no marker is added to them
    config.env.opening_turns = 2
    config.env.opening_tokens = 48        # longer openings are left out
    config.env.split = "train"            # of a dataset
    config.env.column = "prompt"          # of a dataset or .jsonl file: a text, or the messages of a chat
    config.env.prefill = ""               # a chat that ends with the assistant: "" refuses it, "continue" continues it
    config.env.teacher = "A:"
    config.env.student = "B:"
    config.env.end = "\n"
    config.env.markers = "forced"         # "written": whoever has the turn writes the markers, as in the paper
    config.env.length = 64                # tokens of an episode behind its opening
    config.env.turns = 0                  # of both speakers, at most; 0: as many as fit
    config.env.reply_limit = 0            # tokens of a student's reply, behind which it is cut; 0: no limit
    config.env.end_tokens = False         # the model's own end tokens end a turn, and the next marker is forced
    config.env.empty_tokens = 4           # turns of at most so many tokens, markers included, count as short
    config.env.student_model = ""         # another model than the base, with the same vocabulary, plays the student
    config.env.writers = ""               # of "tabular": who writes each token, as "AASA" (S: the base model); "": A

    config.reward = ConfigDict()
    config.reward.name = "vader"          # or another of docs/rewards.md, a dotted path, or several: "vader,length"
    config.reward.weights = ()            # of several; (): 1 each
    config.reward.nan = "refuse"          # what a reward that is NaN does: an error, or "skip": it means None
    config.reward.gold = ""               # measured beside the reward that is trained on: a name, as `name`
    config.reward.path = ""               # of "classifier" (its "": the paper's) and "log_likelihood" a model, of
    #                                       "table" a .npy file
    config.reward.label = ""              # of "classifier": whose probability is the reward; "": the positive one
    config.reward.scale = ""              # of "vader" and "classifier": "signed_confidence", as the paper's authors
    config.reward.empty = config_dict.placeholder(float)    # what a reply without text is worth; None: as it says
    config.reward.target = 20             # of "length": tokens
    config.reward.pattern = ""            # of "regex"
    config.reward.ngram = 2               # of "distinct"

    config.policy, config.kl, config.reference, config.sampling = _policy(), _kl(), _reference(), _sampling()
    config.parallel = _parallel()

    config.rl = _rl()

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-3
    config.optim.value_learning_rate = config_dict.placeholder(float)   # of the value head; None: as learning_rate
    config.optim.warmup = 2               # iterations
    config.optim.final = 0.1              # part of the learning rate that is left at the last iteration; 0: that one
    #                                       trains nothing
    config.optim.eps = 1e-8               # of Adam
    config.optim.policy_grad_norm = config_dict.placeholder(float)      # of all parameters but the value head's, by
    #                                       themselves; None: they have no limit of their own
    config.optim.max_grad_norm = 1.0      # gradients of a larger norm are scaled down to it; None: none are

    config.evaluation = ConfigDict()
    config.evaluation.episodes = 256      # of each member; the base has as many for each seed of the sweep
    config.evaluation.seed = 1_000_003    # with a member's seed, decides its random numbers: settings share them

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10          # iterations
    config.checkpoint.keep = 10           # the last ones
    config.log = ConfigDict(convert_dict=False)     # so that `groups` is one setting, a dictionary
    config.log.tensorboard = True
    config.log.groups = {}                # KL of tokens by their text: name -> regular expression that is found in it
    return config.lock()


def _policy():
    """What is trained."""
    policy = ConfigDict()
    policy.kind = "head"           # "head": on the frozen trunk; "lora": low-rank changes; "full": all weights
    policy.layers = 3              # last hidden layers that a head reads
    policy.actor = "mlp"           # of a head; "linear": one layer from hidden states, time and budget to all logits
    policy.hidden = 128            # units of each hidden layer: of the actor, the value head and the budget neuron
    policy.critic_layers = 1       # hidden layers of the value head
    policy.critic_activation = "silu"       # or "tanh"
    policy.rank = 8                # of "lora"
    policy.alpha = 16.0            # of "lora": changes are multiplied by alpha / rank
    policy.targets = ".*"          # of "lora": the layers that change, a regular expression; ".*": all of
    #                                       query, key, value, out, gate, up, down that the model has
    policy.spend_init = 0.05       # part of the remaining budget that a token may spend at first
    policy.spend_levels = 16       # of kl.spend="sampled": parts are multiples of one over this
    return policy


def _rl():
    """How rewards become an update. What is None here is as the algorithm has it: docs/algorithms.md."""
    rl, nothing = ConfigDict(), config_dict.placeholder
    rl.algorithm = "ppo"               # reinforce, rloo, ppo_dual_clip, grpo, dr_grpo, dapo, gspo, cispo, awr
    rl.loss = nothing(str)
    rl.advantage = nothing(str)        # gae, monte_carlo, leave_one_out; group: over its deviation; group_batch: over
    #                                       the batch's; group_mean: over none
    rl.reduction = nothing(str)        # "token_mean", "sequence_mean" or "fixed_length", of all parts of the loss
    rl.group = nothing(int)            # episodes with the same opening
    rl.normalise = nothing(bool)       # advantages to zero mean and unit deviation; the KL loss by the same factor
    rl.clip = nothing(float)           # ratios are clipped below 1 - clip
    rl.clip_high = nothing(float)      # and above 1 + clip_high
    rl.value_coef = nothing(float)
    rl.iterations = 50
    rl.episodes = 32                   # of each member, an iteration
    rl.epochs = 2
    rl.minibatches = 1
    rl.accumulate = 1                  # parts of a minibatch, read one after the other, whose gradients add up
    rl.entries = 2**28                 # of tokens x vocabulary, of all members, that an update forms at a time at most
    rl.stop_kl = nothing(float)        # nats per token from the sampling policy, that end an iteration; None: none do
    rl.discount = 1.0
    rl.gae_lambda = 0.95
    rl.dual_clip = 3.0                 # of "dual_clip": what a negative advantage is multiplied with at most
    rl.truncation = 2.0                # largest importance weight of "reinforce"; None: no limit
    rl.temperature = 1.0               # of "awr", reward units
    rl.value_clip = nothing(float)     # of the value's change in an iteration, reward units; None: none
    rl.entropy_coef = 0.0
    return rl


def _kl():
    """The KL contract, its coefficient and the hard budgets."""
    kl = ConfigDict()
    kl.coef = 0.0                  # reward units per nat; where a controller starts
    kl.direction = "reverse"       # D(pi || ref), "KL to the base"; "forward": D(ref || pi)
    kl.estimator = "exact"         # or k1, k2, k3, k3_weighted, absolute: docs/kl.md says what each descends
    kl.placement = "full"          # "reward", "loss", or both: "full"
    kl.reduction = "token"         # "sequence": the estimator of an episode's summed log-ratio
    kl.temperature = config_dict.placeholder(float)     # that the KL counts at; None: the sampler's
    kl.allow_biased = False        # accept combinations with no, wrong or double effect
    kl.controller = "fixed"        # of the coefficient: linear, cosine, adaptive, lagrangian, pi
    kl.target = 10.0               # nats per episode, that a controller aims at
    kl.horizon = 1000.0            # episodes, of "adaptive"
    kl.rate = 0.05                 # of "lagrangian" and "pi": log coefficient per iteration and relative error
    kl.gain = 0.5                  # of "pi": log coefficient per relative error
    kl.final = 0.0                 # coefficient at the end of a schedule
    kl.budget = config_dict.placeholder(float)          # hard, nats per episode; None: none
    kl.turn_budget = config_dict.placeholder(float)     # hard, nats per turn of the agent
    kl.token_budget = config_dict.placeholder(float)    # hard, nats per token of the agent
    kl.ledger = "exact"            # what is charged; "log_ratio" of the drawn token is no hard budget: docs/kl.md
    kl.target_floor = 0.0          # of "log_ratio": nats that every token may cost, whatever remains
    kl.miss_coef = 0.0             # of (D - what the token may cost)^2 in the loss, reward units per nat^2
    kl.budget_ramp = 0.0           # part of the run in which all budgets grow linearly from 0
    kl.carry = False               # what a turn or a token leaves of its budget is added to the later ones'
    kl.operation = "tilt"          # how the budget moves a proposal; "mixture", as the paper's authors do: docs/kl.md
    kl.spend = "neuron"            # part of what is left that a token may spend: its output; "sampled": drawn
    #                                around it; "greedy": all; "uniform": an even share of the tokens to come. With
    #                                "sampled" fewer penalties are sound: docs/kl.md
    return kl


def _reference():
    """What KL is measured to."""
    reference = ConfigDict()
    reference.name = "base"        # "checkpoint", "ema", "sync", "mixture", "pessimistic"
    reference.paths = ()           # model folders; of "checkpoint" one, or a run's member: "runs/x:3"
    reference.decay = 0.99         # of "ema", an iteration
    reference.every = 10           # of "sync", iterations
    reference.alpha = 0.1          # of "pessimistic": the top of the posterior, from all (0) to the best (1)
    reference.cut = "best"         # "best": weight relative to the best; "cumulative": to the sum of the better
    return reference


def _sampling():
    """How everybody's tokens are drawn, in training and evaluation."""
    sampling = ConfigDict()
    sampling.temperature = 1.0
    sampling.student_temperature = config_dict.placeholder(float)   # of the student alone; None: as temperature
    sampling.top_k = 0             # 0: all. Truncations keep a set that the reference decides
    sampling.top_p = 1.0
    sampling.min_p = 0.0
    return sampling


def _parallel():
    """The devices. All axes 1: one device."""
    parallel = ConfigDict()
    parallel.mode = "jit"          # "pmap": every device has the whole model and its part of the episodes
    parallel.member = 1            # members of the sweep are divided over so many devices; -1: over all that are left
    parallel.data = 1              # the episodes of each member
    parallel.fsdp = 1              # episodes and weights, which are gathered for use
    parallel.tensor = 1            # columns of matrices, heads and vocabulary
    parallel.expert = 1            # experts of a mixture
    parallel.slices = 1            # of a pod, that a slower network joins: over "member" or "data"
    return parallel


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled program depends on: the configuration without `Hyper` and seed, and whether a budget is hard."""

    settings: str                         # canonical JSON
    constrained: bool

    def config(self) -> ConfigDict:
        """The settings, nested."""
        return ConfigDict(json.loads(self.settings))

    def kl(self) -> KLConfig:
        """How the KL is penalised."""
        return kl_config(self.config())


def kl_config(config: ConfigDict) -> KLConfig:
    """The KL contract of a configuration; it counts at the sampler's temperature.

    Raises:
        ValueError: kl.spend is unknown.
    """
    kl = config.kl
    return KLConfig(kl.direction, kl.estimator, kl.placement, kl.reduction, config.sampling.temperature,
                    kl.allow_biased, drawn=SPENDS.facts(kl.spend)["drawn"])


def flat(config: ConfigDict) -> dict:
    """Dotted keys -> values."""
    out = {}
    for key, value in config.items():
        out.update({f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, ConfigDict) else {key: value})
    return out


def members(config: ConfigDict) -> list[dict]:
    """The members of the sweep, each as the dotted settings that it overrides; one without any for an empty sweep."""
    grids = config.sweep or [{}]
    out = [dict(zip(grid, values, strict=True)) for grid in grids
           for values in itertools.product(*(_choices(key, choice) for key, choice in grid.items()))]
    return [member for i, member in enumerate(out) if member not in out[:i]]


def _choices(key, choices):
    if not isinstance(choices, (list, tuple)) or not choices:
        raise ValueError(f"sweep: {key!r} has {choices!r}; give a tuple of values")
    return choices


def override(config: ConfigDict, member: dict) -> ConfigDict:
    """The configuration of one member, without the sweep.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    known = flat(config)
    for key, value in member.items():
        if key not in known or key == "sweep":
            raise ValueError(f"sweep: unknown setting {key!r}; settings are {', '.join(sorted(known))}")
        try:
            default().update_from_flattened_dict({key: value})      # which knows the type of what is None here
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"sweep: {key}={value!r}: {error}") from None
    config.sweep = []
    return config


def split(config: ConfigDict) -> tuple[Static, Hyper, int]:
    """One member's (Static, Hyper, seed)."""
    config = _with_algorithm(config)
    values = {name: config[key.split(".")[0]][key.split(".")[1]] for key, name in HYPER.items()}
    values = {name: math.inf if value is None else value for name, value in values.items()}
    hyper = Hyper(**{name: jnp.float32(value) for name, value in values.items()})
    return static_of(config), hyper, config.seed


def static_of(config: ConfigDict) -> Static:
    """One member's `Static`; makes no array, so that no accelerator is taken."""
    config = _with_algorithm(config)
    settings = {key: value for key, value in flat(config).items() if key not in HYPER and key != "seed"}
    constrained = any(config.kl[key.split(".")[1]] is not None for key in BUDGETS)
    nested = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return Static(json.dumps(nested, sort_keys=True), constrained)


def _with_algorithm(config):
    """With what the algorithm decides where a setting is None."""
    return override(config, {f"rl.{key}": value for key, value in algorithms.resolve(config.rl).items()})


def counts(key: str) -> bool:
    """Whether a setting changes a result: those of logging, checkpoints and devices do not."""
    return key.split(".")[0] not in _RUN_ONLY or key == "sweep"


def fingerprint(config: ConfigDict, *inputs: str) -> str:
    """Twelve hexadecimal digits of everything that changes a result (so not of logging or checkpoint settings).

    Args:
        inputs: digests of what the settings only name: the model's weights, a reward function.
    """
    kept = {key: value for key, value in flat(config).items()
            if key.split(".")[0] not in _RUN_ONLY and (key, value) not in LATER.items()}
    kept["members"], kept["inputs"] = members(config), inputs
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
