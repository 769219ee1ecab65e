"""Every setting of an experiment, declared once: `config.default()`, the checks of values, docs/settings.md and what
members of one program may differ in all come from `SETTINGS`."""
from __future__ import annotations

import difflib
import math
import numbers
import textwrap
from typing import NamedTuple

import numpy as np


class Setting(NamedTuple):
    """One setting.

    `kind`: the type of its value; its default's, unless that is None. `low`, `high`: the least and the largest value;
    `above`, `below`: what it must exceed and stay under. `choices`: the values that it may have. `none`: what None
    means; "": it needs a value. `endless`: it may be infinite, which is the same as None. `why`: the reason
    for its bounds, which its error gives. `unit`: what a number counts. `field`: its name in `types.Hyper`, if members
    of one program may differ in it. `idle`: a setting, and the values of it with which this one has no effect. `later`:
    older runs lack it, and have its default. `also`: what others call it.
    """

    name: str
    default: object
    help: str
    kind: type | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    none: str = ""
    endless: bool = False
    why: str = ""
    unit: str = ""
    field: str = ""
    idle: tuple[str, tuple[str, ...]] | None = None
    later: bool = False
    also: tuple[str, ...] = ()

    @property
    def type(self) -> type:
        """The type of its value."""
        return self.kind or type(self.default)

    @property
    def section(self) -> str:
        """The part of its name before the dot; "": it stands at the top."""
        return self.name.rpartition(".")[0]

    def accepted(self) -> str:
        """What its value may be, as the end of a sentence; "": whatever has its type."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        bounds = [f"{word} {bound:g}" for word, bound in (
            ("of at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
            if bound is not None]
        words = f"a number {' and '.join(bounds)}" if bounds else ""
        return f"{words}, or None" if words and self.none else words

    def converted(self, value):
        """The value in the setting's type, as a whole number in that of a fraction or one of NumPy's in Python's.

        Raises:
            ValueError: it is of another type.
        """
        value = value.item() if isinstance(value, np.generic) else value
        if value is None or isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool)):
            return value
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value) if abs(value) < 2**1023 else math.inf
        if self.type is tuple and isinstance(value, list):
            return tuple(value)
        raise ValueError(f"{self.name}={value!r} must be {_KINDS[self.type]}{', or None' if self.none else ''}")

    def check(self, value) -> None:
        """Raises where this is no value for it.

        Raises:
            ValueError: names the setting, the value and what is accepted.
        """
        value = self.converted(value)
        if value is None:
            if not self.none:
                raise ValueError(f"{self.name}=None: give it a value; its default is {self.default!r}")
            return
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}={value!r} is unknown; choose one of {', '.join(map(repr, self.choices))}"
                             f"{_nearest(value, self.choices)}")
        if self.type in (int, float):
            _check_number(self, value)
        elif self.type is tuple:
            for number in value:
                if isinstance(number, numbers.Real):
                    _check_number(self, number, value)


_KINDS = {bool: "True or False", str: "a text", int: "a whole number", float: "a number", tuple: "a tuple",
          list: "a list", dict: "a dictionary"}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def _check_number(setting, number, whole=None):
    """Raises on a number, a value or a part of it, that is out of bounds, or that int32 or float32 does not hold."""
    said = f"{setting.name}={number if whole is None else whole!r}"
    if setting.endless and number == math.inf:
        return
    accepted = setting.accepted() or "a number"
    if not math.isfinite(number):
        raise ValueError(f"{said} must be {accepted.replace('a number', 'a finite number')}")
    low, above, high, below = setting.low, setting.above, setting.high, setting.below
    if (low is not None and number < low or above is not None and number <= above
            or high is not None and number > high or below is not None and number >= below):
        raise ValueError(f"{said} must be {accepted}{setting.why and f'; {setting.why}'}")
    if isinstance(number, numbers.Integral):
        if abs(number) >= 2**31 and setting.name != "rl.entries":       # no array has that size
            raise ValueError(f"{said} must be less than 2**31")
    elif abs(number) > _LARGEST or 0 < abs(number) < _SMALLEST:
        raise ValueError(f"{said} is out of the range of float32, in which it is computed: its size must be 0 or from "
                         f"{_SMALLEST:.3g} to {_LARGEST:.3g}")


_LORA = "policy.kind", ("head", "full")
_HEAD = "policy.kind", ("lora", "full")
_CHAT = "env.name", ("completion", "tabular")
_TEXT = "env.name", ("tabular",)
_LIST = "env.name", ("teacher_student", "tabular")
_TABLE = "env.name", ("teacher_student", "completion")
_ADAM = "optim.name", ("adam", "adamw")

_ALL = [
    Setting("seed", 0, "All random numbers of a member follow from it.", low=0),
    Setting("sweep", [], 'The members of the run are a union of grids: `[{"kl.coef": (0.0, 0.1), "seed": (0, 1)}]`.'),

    Setting("model.path", "embedded", "The base model is embedded, packaged, a folder, or a model of the hub "
            "(docs/models.md).", also=("model_name", "model_name_or_path", "model_id")),
    Setting("model.dtype", "float32", "Parameters and activations have this type; KL and losses are float32.",
            choices=("float32", "bfloat16"), also=("torch_dtype",)),
    Setting("model.quantize", "", "The matrices of the frozen base model's layers are kept in int8.",
            choices=("", "int8"), also=("load_in_8bit",)),
    Setting("model.cache", "", "The KV cache has this type; '' is model.dtype.", choices=("", "bfloat16", "int8")),
    Setting("model.attention", "", "Attention of whole sequences is our own (''), JAX's ('xla'), or cuDNN's fused "
            "kernels on an NVIDIA GPU.", choices=("", "xla", "cudnn"), also=("attn_implementation",)),
    Setting("model.copies", True, "Sampling reads a copy of the weights, each layer's by itself, which is faster."),
    Setting("model.remat", "", "Gradients compute a trunk's layers, or all of them but matrix products, a second time.",
            choices=("", "layers", "products"), also=("gradient_checkpointing",)),

    Setting("env.name", "teacher_student", "The task is teacher_student, completion, tabular, or a dotted path "
            "(docs/envs.md)."),
    Setting("env.openings", "fixed", "Episodes begin with env.opening ('fixed'), also with turns of held-out "
            "conversations ('held_out'), or with the prompts of a file, of a dataset, or of a function at a dotted "
            "path (docs/envs.md).", idle=_TEXT, also=("dataset", "dataset_name", "prompts")),
    Setting("env.opening", "<|start|>", "The text that episodes begin with."),
    Setting("env.opening_unfinished", False, "Openings end inside the agent's turn; no marker is added to them.",
            idle=_CHAT, later=True),
    Setting("env.opening_turns", 2, "An opening has so many turns of a held-out conversation.", low=0, idle=_CHAT),
    Setting("env.opening_tokens", 48, "Longer openings are left out.", low=1, unit="tokens",
            also=("max_prompt_length",)),
    Setting("env.split", "train", "The split of a dataset.", idle=_TEXT),
    Setting("env.column", "prompt", "The column of a dataset or a .jsonl file, with texts or chats.", idle=_TEXT),
    Setting("env.prefill", "", "A chat that ends with the assistant is refused (''), or continued ('continue').",
            idle=_LIST, later=True),
    Setting("env.teacher", "A:", "The marker of the agent's turns.", idle=_CHAT),
    Setting("env.student", "B:", "The marker of the student's turns.", idle=_CHAT),
    Setting("env.end", "\n", "The text that ends a turn or a completion."),
    Setting("env.markers", "forced", "Markers are forced behind the end of a turn, or 'written' by whoever has the "
            "turn, as in the paper.", choices=("forced", "written"), idle=_CHAT),
    Setting("env.length", 64, "An episode has so many tokens behind its opening.", low=1, unit="tokens",
            also=("max_completion_length", "max_new_tokens", "response_length")),
    Setting("env.turns", 0, "An episode has so many turns of both speakers at most; 0: as many as fit.", low=0,
            idle=_CHAT),
    Setting("env.reply_limit", 0, "A student's reply is cut behind so many tokens; 0: it has no limit.", low=0,
            unit="tokens", idle=_CHAT, later=True),
    Setting("env.end_tokens", False, "The model's own end tokens end a turn, and the next marker is forced.",
            idle=_CHAT, later=True),
    Setting("env.empty_tokens", 4, "Turns of at most so many tokens, markers included, count as short.", low=0,
            unit="tokens", idle=_CHAT, later=True),
    Setting("env.student_model", "", "Another model than the base, with the same vocabulary, plays the student.",
            idle=("env.name", ("completion",))),
    Setting("env.writers", "", "Who writes each token of a tabular episode, as 'AASA' (S: the base model); '': the "
            "agent.", idle=_TABLE),
    Setting("env.options", {}, "Settings of an environment of one's own, which finds them here.", later=True,
            idle=("env.name", ("teacher_student", "completion", "tabular"))),

    Setting("reward.name", "vader", "The reward is one of docs/rewards.md, a dotted path, or several: 'vader,length'.",
            also=("reward_funcs", "reward_fn")),
    Setting("reward.weights", (), "The weights of several rewards; (): each has 1.", also=("reward_weights",)),
    Setting("reward.nan", "refuse", "A reward that is NaN is an error ('refuse'), or means that the episode was not "
            "judged ('skip').", later=True),
    Setting("reward.gold", "", "A reward that is measured beside the one that is trained on, named like it."),
    Setting("reward.path", "", "The model of 'classifier' ('': the paper's) and of 'log_likelihood', or the .npy file "
            "of 'table'."),
    Setting("reward.label", "", "The label whose probability 'classifier' rewards; '': the positive one."),
    Setting("reward.scale", "", "The scale of 'vader' and 'classifier'; 'signed_confidence' is that of the paper's "
            "authors.", later=True),
    Setting("reward.empty", None, "What a reply without text is worth.", kind=float, none="what the reward says of it",
            later=True),
    Setting("reward.target", 20, "The length that 'length' rewards.", unit="tokens"),
    Setting("reward.pattern", "", "The regular expression of 'regex'."),
    Setting("reward.ngram", 2, "The n-grams that 'distinct' counts have so many words."),
    Setting("reward.options", {}, "Arguments by name of rewards of one's own, at dotted paths.", later=True),

    Setting("policy.kind", "head", "What is trained: a 'head' on the frozen trunk, 'lora' (low-rank changes), 'full' "
            "(all weights), or a dotted path."),
    Setting("policy.layers", 3, "A head reads so many of the last hidden layers.", low=1),
    Setting("policy.actor", "mlp", "A head changes the last hidden state ('mlp'), or, with one layer from hidden "
            "states, time and budget, all logits ('linear').", choices=("mlp", "linear"), idle=_HEAD, later=True),
    Setting("policy.hidden", 128, "Hidden layers of actor, value head and budget neuron have so many units.", low=1),
    Setting("policy.critic_layers", 1, "The value head has so many hidden layers.", low=1, later=True),
    Setting("policy.critic_activation", "silu", "The activation of the value head.", choices=("silu", "tanh"),
            later=True),
    Setting("policy.rank", 8, "The rank of the changes of 'lora'.", low=1, idle=_LORA, also=("lora_r", "r")),
    Setting("policy.alpha", 16.0, "The changes of 'lora' are multiplied by alpha / rank.", low=0, idle=_LORA,
            also=("lora_alpha",)),
    Setting("policy.targets", ".*", "A regular expression of the layers that 'lora' changes, of query, key, value, "
            "out, gate, up, down.", idle=_LORA, also=("target_modules",)),
    Setting("policy.spend_init", 0.05, "The part of the remaining budget that a token may spend at first.", above=0,
            below=1),
    Setting("policy.spend_levels", 16, "With kl.spend='sampled' parts are multiples of one over this.", low=1),
    Setting("policy.options", {}, "Settings of a kind of policy of one's own, which finds them here.", later=True,
            idle=("policy.kind", ("head", "lora", "full"))),

    Setting("kl.coef", 0.0, "The coefficient of the KL; a controller starts from it.", low=0, unit="reward per nat",
            field="kl_coef", also=("beta", "kl_coef", "kl_coefficient", "init_kl_coef")),
    Setting("kl.direction", "reverse", "'reverse' is D(pi || ref), the KL to the base; 'forward' is D(ref || pi)."),
    Setting("kl.estimator", "exact", "The KL is exact, or estimated by k1, k2, k3, k3_weighted or absolute "
            "(docs/kl.md).", also=("kl_estimator", "kl_loss_type")),
    Setting("kl.placement", "full", "The KL is penalised in the 'reward', in the 'loss', or in both ('full')."),
    Setting("kl.reduction", "token", "The estimator is of a token, or of an episode's summed log-ratio ('sequence')."),
    Setting("kl.temperature", None, "The temperature that the KL counts at.", kind=float, none="the sampler's"),
    Setting("kl.allow_biased", False, "Combinations are accepted that have no, a wrong or a double effect."),
    Setting("kl.controller", "fixed", "What moves the coefficient: fixed, linear, cosine, adaptive, lagrangian, pi, or "
            "a dotted path."),
    Setting("kl.controller_options", {}, "Arguments by name of a controller of one's own.", later=True,
            idle=("kl.controller", ("fixed", "linear", "cosine", "adaptive", "lagrangian", "pi"))),
    Setting("kl.target", 10.0, "The KL that a controller aims at.", low=0, unit="nats per episode", field="kl_target"),
    Setting("kl.horizon", 1000.0, "The horizon of 'adaptive'.", low=0, unit="episodes", field="kl_horizon",
            also=("kl_horizon",)),
    Setting("kl.rate", 0.05, "The rate of 'lagrangian' and 'pi': log coefficient per iteration and relative error.",
            low=0, field="kl_rate"),
    Setting("kl.gain", 0.5, "The gain of 'pi': log coefficient per relative error.", low=0, field="kl_gain"),
    Setting("kl.final", 0.0, "The coefficient at the end of a schedule.", low=0, unit="reward per nat",
            field="kl_final"),
    Setting("kl.budget", None, "The hard budget of an episode.", kind=float, low=0, none="none",
            unit="nats per episode", field="kl_budget"),
    Setting("kl.turn_budget", None, "The hard budget of a turn of the agent.", kind=float, low=0, none="none",
            unit="nats per turn", field="kl_turn_budget"),
    Setting("kl.token_budget", None, "The hard budget of a token of the agent.", kind=float, low=0, none="none",
            unit="nats per token", field="kl_token_budget"),
    Setting("kl.ledger", "exact", "What the budget is charged: the exact KL, or the drawn token's log-ratio, which is "
            "no hard budget (docs/kl.md).", choices=("exact", "log_ratio"), later=True),
    Setting("kl.target_floor", 0.0, "With 'log_ratio' every token may cost so much, whatever remains.", low=0,
            unit="nats per token", later=True),
    Setting("kl.miss_coef", 0.0, "The coefficient of (D - what the token may cost)^2 in the loss.", low=0,
            unit="reward per nat^2", field="kl_miss_coef", later=True),
    Setting("kl.budget_ramp", 0.0, "The part of the run in which all budgets grow linearly from 0.", low=0, high=1,
            field="kl_budget_ramp", later=True),
    Setting("kl.carry", False, "What a turn or a token leaves of its budget is added to the later ones'."),
    Setting("kl.operation", "tilt", "How the budget moves a proposal: 'tilt', 'mixture' as the paper's authors do, or "
            "a dotted path (docs/kl.md).", later=True),
    Setting("kl.spend", "neuron", "The part of what remains that a token may spend: a 'neuron' of the policy, drawn "
            "around it ('sampled'), all ('greedy'), or an even share ('uniform') (docs/kl.md)."),

    Setting("reference.name", "base", "What the KL is measured to: base, checkpoint, ema, sync, mixture, pessimistic, "
            "or a dotted path.", also=("ref_model",)),
    Setting("reference.paths", (), "Model folders; of 'checkpoint' one, or a run's member: 'runs/x:3'."),
    Setting("reference.decay", 0.99, "The decay of 'ema', an iteration.", low=0, high=1,
            also=("ref_model_mixup_alpha",)),
    Setting("reference.every", 10, "'sync' takes the policy over so often.", low=1, unit="iterations",
            also=("ref_model_sync_steps",)),
    Setting("reference.alpha", 0.1, "The top of the posterior that 'pessimistic' keeps, from all (0) to the best (1).",
            low=0, high=1),
    Setting("reference.cut", "best", "A weight is compared with the best one, or with the sum of the better ones "
            "('cumulative').", choices=("best", "cumulative")),

    Setting("sampling.temperature", 1.0, "The temperature of policy, base and student.", above=0,
            also=("temperature",)),
    Setting("sampling.student_temperature", None, "The temperature of the student alone.", kind=float, above=0,
            none="sampling.temperature", later=True),
    Setting("sampling.top_k", 0, "Tokens are drawn from the reference's so many most probable ones; 0: from all.",
            low=0, also=("top_k",)),
    Setting("sampling.top_p", 1.0, "Tokens are drawn from the reference's most probable ones of this mass.", above=0,
            high=1, also=("top_p",)),
    Setting("sampling.min_p", 0.0, "Tokens are drawn that have at least this part of the largest probability.", low=0,
            high=1, also=("min_p",)),

    Setting("parallel.mode", "jit", "The compiler divides all arrays ('jit'), or each device has the whole model and "
            "its part of the episodes ('pmap').", choices=("jit", "pmap")),
    *(Setting(f"parallel.{axis}", 1, f"{what} divided over so many devices; -1: over all that are left.")
      for axis, what in (("member", "The members of the sweep are"), ("data", "The episodes of each member are"),
                         ("fsdp", "Episodes, and weights, which are gathered for use, are"),
                         ("tensor", "Columns of matrices, heads and the vocabulary are"),
                         ("expert", "The experts of a mixture are"))),
    Setting("parallel.slices", 1, 'A pod has so many slices, which a slower network joins, over "member" or "data".',
            low=1),

    Setting("rl.algorithm", "ppo", "A set of loss, advantage and reduction: reinforce, rloo, ppo, ppo_dual_clip, grpo, "
            "dr_grpo, dapo, gspo, cispo or awr (docs/algorithms.md)."),
    *(Setting(f"rl.{name}", None, text, kind=kind, none="as the algorithm has it", **others)
      for name, kind, text, others in (
          ("loss", str, "The loss, or a dotted path.", {}),
          ("advantage", str, "gae, monte_carlo, leave_one_out, group (over its deviation), group_batch (over the "
           "batch's), group_mean (over none), or a dotted path.", {}),
          ("reduction", str, "token_mean, sequence_mean or fixed_length, of all parts of the loss.",
           {"also": ("loss_type",)}),
          ("group", int, "So many episodes have the same opening.", {"low": 1, "also": ("num_generations",)}),
          ("normalise", bool, "Advantages have zero mean and unit deviation, and the KL loss the same factor.",
           {"also": ("whiten_advantages",)}),
          ("clip", float, "Ratios are clipped below 1 - clip.",
           {"low": 0, "field": "clip", "also": ("epsilon", "cliprange", "clip_range")}),
          ("clip_high", float, "Ratios are clipped above 1 + clip_high.",
           {"low": 0, "field": "clip_high", "also": ("epsilon_high",)}),
          ("value_coef", float, "The coefficient of the value's error.",
           {"low": 0, "field": "value_coef", "also": ("vf_coef",)}))),
    Setting("rl.loss_options", {}, "Arguments by name of a loss of one's own, at a dotted path.", later=True),
    Setting("rl.iterations", 50, "A run has so many iterations.", low=1,
            also=("steps", "max_steps", "num_steps", "total_episodes")),
    Setting("rl.episodes", 32, "Each member samples so many episodes an iteration.", low=1,
            also=("batch_size", "per_device_train_batch_size", "rollout_batch_size")),
    Setting("rl.epochs", 2, "An update reads the episodes so often.", low=1,
            also=("num_ppo_epochs", "ppo_epochs", "num_iterations")),
    Setting("rl.minibatches", 1, "An epoch has so many minibatches.", low=1, also=("num_mini_batches",)),
    Setting("rl.accumulate", 1, "A minibatch is read in so many parts, one after the other, whose gradients add up.",
            low=1, also=("gradient_accumulation_steps",)),
    Setting("rl.entries", 2**28, "An update forms so many entries of tokens x vocabulary, of all members, at a time at "
            "most.", low=1),
    Setting("rl.stop_kl", None, "The KL from the sampling policy that ends an iteration's updates.", kind=float,
            above=0, none="none does", endless=True, unit="nats per token", field="stop_kl", also=("target_kl",)),
    Setting("rl.discount", 1.0, "The discount of a token.", low=0, high=1, field="discount", also=("gamma",)),
    Setting("rl.gae_lambda", 0.95, "The lambda of generalised advantage estimation.", low=0, high=1,
            field="gae_lambda", also=("lam", "lambda")),
    Setting("rl.dual_clip", 3.0, "What 'dual_clip' multiplies a negative advantage with at most.", above=0,
            field="dual_clip"),
    Setting("rl.truncation", 2.0, "The largest importance weight of 'reinforce'.", above=0, none="no limit",
            endless=True, field="truncation"),
    Setting("rl.temperature", 1.0, "The temperature of 'awr'.", above=0, unit="reward", field="temperature"),
    Setting("rl.value_clip", None, "The value changes by so much in an iteration at most.", kind=float, above=0,
            none="no limit", endless=True, unit="reward", field="value_clip", also=("cliprange_value",)),
    Setting("rl.entropy_coef", 0.0, "The coefficient of the entropy.", low=0, unit="reward per nat",
            field="entropy_coef", also=("ent_coef",)),

    Setting("optim.name", "adam", "The optimizer is adam, adamw, or the dotted path of an optax factory, as "
            "'optax.scale_by_lion'.", later=True, also=("optimizer",)),
    Setting("optim.options", {}, "Arguments by name of an optimizer at a dotted path.", later=True, idle=_ADAM),
    Setting("optim.learning_rate", 1e-3, "The learning rate.", low=0, field="learning_rate",
            also=("lr", "learning_rate", "step_size")),
    Setting("optim.value_learning_rate", None, "The learning rate of the value head.", kind=float, above=0,
            none="optim.learning_rate", field="value_learning_rate", also=("critic_lr",)),
    Setting("optim.warmup", 2, "The learning rate rises linearly for so long.", low=1, unit="iterations",
            also=("warmup_steps",)),
    Setting("optim.final", 0.1, "The part of the learning rate that is left at the last iteration; with 0 that one "
            "trains nothing.", low=0),
    Setting("optim.beta1", 0.9, "The decay of Adam's mean of gradients.", low=0, below=1, later=True,
            also=("adam_beta1",)),
    Setting("optim.beta2", 0.999, "The decay of Adam's mean of their squares.", low=0, below=1, later=True,
            also=("adam_beta2",)),
    Setting("optim.eps", 1e-8, "The epsilon of Adam.", above=0, later=True, also=("adam_epsilon",)),
    Setting("optim.weight_decay", 0.0, "Weights shrink by the learning rate times this, in an update of 'adamw'.",
            low=0, idle=("optim.name", ("adam",)), later=True, also=("weight_decay",)),
    Setting("optim.policy_grad_norm", None, "Gradients of all parameters but the value head's have this norm at most, "
            "by themselves.", kind=float, above=0, none="no limit", later=True),
    Setting("optim.max_grad_norm", 1.0, "All gradients together have this norm at most.", low=1e-6, none="no limit",
            why="gradients of a smaller norm vanish beside the epsilon of Adam, so that nothing would be trained",
            also=("max_gradient_norm", "grad_clip")),

    Setting("evaluation.episodes", 256, "The evaluation has so many episodes of each member, and as many of the base "
            "for each seed of the sweep.", low=1),
    Setting("evaluation.seed", 1_000_003, "With a member's seed, it decides the evaluation's random numbers, which "
            "settings share.", low=0),

    Setting("checkpoint.every", 10, "A checkpoint is saved so often.", low=1, unit="iterations", also=("save_steps",)),
    Setting("checkpoint.keep", 10, "The last so many checkpoints are kept.", low=1, also=("save_total_limit",)),
    Setting("log.tensorboard", True, "Metrics are written for TensorBoard, too."),
    Setting("log.groups", {}, "The KL is recorded of tokens by their text: names, and regular expressions that are "
            "found in it."),
]

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}
"""By their dotted names, in the order in which they are told."""

HYPER = {name: setting.field for name, setting in SETTINGS.items() if setting.field}
"""Settings that members of one program may differ in, and their names in `Hyper`."""

LATER = {name: setting.default for name, setting in SETTINGS.items() if setting.later}
"""Settings that older runs lack: as here they are not in the fingerprint."""

SECTIONS = {
    "": "A run", "model": "The base model", "env": "The task", "reward": "The reward", "policy": "What is trained",
    "kl": "The KL, its coefficient, and hard budgets", "reference": "What the KL is measured to",
    "sampling": "How everybody's tokens are drawn, in training and evaluation", "parallel": "The devices",
    "rl": "How rewards become an update", "optim": "The optimizer", "evaluation": "The evaluation",
    "checkpoint": "Checkpoints", "log": "Logs"}
"""Titles of the sections."""


def unknown(name: str) -> str:
    """A sentence about a setting that does not exist, with the nearest ones that do."""
    last = name.rpartition(".")[2].lower()
    same = [own for own, setting in SETTINGS.items() if last in setting.also or last == own.rpartition(".")[2]]
    near = same or difflib.get_close_matches(name, SETTINGS, 3, 0.7) or [
        own for own in SETTINGS if difflib.get_close_matches(last, [own.rpartition(".")[2]], 1, 0.75)]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else f"; sections are {', '.join(filter(None, SECTIONS))}"
    return f"unknown setting {name!r}{hint}"


def _nearest(value, choices):
    near = difflib.get_close_matches(str(value), [choice for choice in choices if choice], 1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != value else ""


_INTRODUCTION = """\
Every setting with its default. `--config.SETTING=VALUE` sets one on the command line, `config.SETTING = VALUE` in a
configuration file. Members of a sweep may differ in all but those of `model`, `env`, `reward`, `sampling`,
`evaluation`, `checkpoint`, `log` and `parallel`, and `rl.iterations`; those marked with * share one compiled program,
whatever their values. This page is made from `kl_reg/settings.py`.

```python
from kl_reg.config import default
from kl_reg.settings import SETTINGS

config = default()
config.kl.budget = 10.0
assert SETTINGS["kl.budget"].unit == "nats per episode"
```"""


def markdown() -> str:
    """The page docs/settings.md."""
    out = ["# Settings", "", *_INTRODUCTION.splitlines(), ""]
    for section, title in SECTIONS.items():
        out += [f"## {title}", "", "| setting | default | accepted | |", "|---|---|---|---|"]
        for setting in SETTINGS.values():
            if setting.section == section:
                out.append(f"| `{setting.name}`{'*' if setting.field else ''} | `{_escaped(repr(setting.default))}` | "
                           f"{_told(setting)} | {_sentence(setting)} |")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def told(width: int = 100) -> str:
    """All settings for a terminal, by sections: name, default, and what it is."""
    out = []
    for section, title in SECTIONS.items():
        out += ["", f"{title}:"]
        for setting in SETTINGS.values():
            if setting.section == section:
                words = _sentence(setting).replace("\\|", "|")
                out.append(f"  --config.{setting.name}={setting.default!r}   ({_told(setting)})")
                out += textwrap.wrap(words, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(out[1:])


def _told(setting):
    """What is accepted, for the table."""
    words = setting.accepted() or _KINDS[setting.type]
    if setting.type is int:
        words = words.replace("a number", "a whole number")
    unit = f"; {setting.unit}" if setting.unit else ""
    none = ", or None" if setting.none and "None" not in words else ""
    return _escaped(f"{words}{none}{unit}")


def _sentence(setting):
    none = f" None: {setting.none}." if setting.none else ""
    idle = ""
    if setting.idle is not None:
        idle = f" It has no effect with {setting.idle[0]}={' or '.join(map(repr, setting.idle[1]))}."
    return _escaped(setting.help + none + idle)


def _escaped(text):
    """For a cell of a table."""
    return text.replace("|", "\\|")
